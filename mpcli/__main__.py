"""`python -m mpcli`: the `mptrain` command, for those that start Python modules (torchrun)."""

from __future__ import annotations

import sys

from mpcli.cli import main

sys.exit(main())
