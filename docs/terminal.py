"""Draw `docs/terminal.svg`: what a terminal shows at the end of a real run (`make docs`)."""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 116
COMMAND = "mptrain run digits-fp16.yaml --set 'eval.every=2 epochs'"
ERASE_LINE = "\x1b[2K"


def main() -> None:
    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tool = Path(sys.executable).with_name("mptrain")
        subprocess.run([tool, "init", "digits-fp16"], check=True, capture_output=True)
        shown = on_a_terminal([str(tool), *shlex.split(COMMAND)[1:]])
        os.chdir("/")
    console = Console(width=COLUMNS, record=True, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ {COMMAND}\n{shown}"))
    svg = console.export_svg(title="mptrain")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fetches nothing
    path = Path(__file__).with_suffix(".svg")
    path.write_text(svg, encoding="utf-8")
    print("wrote docs/terminal.svg")


def on_a_terminal(command: list[str]) -> str:
    """Run a command on a terminal; what remains on the screen, with colors."""
    output = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        output.extend(data)
        return data

    pty.spawn(command, read)
    lines = output.decode().replace("\r", "").split("\n")
    kept = [line.rpartition(ERASE_LINE)[2] for line in lines]
    return re.sub(r"\x1b\[\?[0-9]+[hl]", "", "\n".join(kept)).rstrip()


if __name__ == "__main__":
    main()
