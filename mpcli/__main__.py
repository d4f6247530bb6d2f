"""`python -m mpcli`: the `mptrain` command, for those that start Python modules (torchrun)."""

from __future__ import annotations

from mpcli.cli import main

main()
