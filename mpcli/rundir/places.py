"""Where runs are: new folders for them, and folders that hold one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from datetime import UTC, datetime
from pathlib import Path

from mpcli.recipe.errors import Exit, user_error
from mpcli.rundir.storage import storage_errors


def newest_run() -> Path:
    """The newest of all runs in `runs`.

    Raises:
        UserError: exit 2, there is none.
    """
    found = [latest.resolve() for latest in Path("runs").glob("*/latest") if latest.is_dir()]
    if not found:
        hint = "name a run directory; `mptrain run` makes one"
        raise user_error("there are no runs in the folder `runs`", hint)
    newest = max(found, key=lambda path: path.name)  # which begins with the time
    return Path(os.path.relpath(newest))


_KINDS = (
    *((f"{name}.jsonl", Path.is_file, "file") for name in ("steps", "layers", "evals")),
    *((f"{name}.jsonl", Path.is_file, "file") for name in ("rollbacks", "events")),
    *((name, Path.is_file, "file") for name in ("lock", "result.json", "result.json.tmp")),
    *((name, Path.is_dir, "folder") for name in ("attempts", "checkpoints", "flights")),
    *((name, Path.is_dir, "folder") for name in ("final", "final.tmp")),
)


def check_is_run(path: Path, option: str) -> None:
    hint = "a run directory is named, such as `runs/NAME/latest`"
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such folder"
        raise user_error(f"{option}{path}: {found}", hint)
    try:
        entries = sorted(path.iterdir())
        attempts = sorted((path / "attempts").rglob("*"))
    except OSError as error:
        raise user_error(f"{option}{path}: {error.strerror}", exit_code=Exit.STORAGE) from error
    if (path / "study.json").exists():
        hint = f"name one of its runs, in `{path / 'trials'}`"
        raise user_error(f"{option}{path}: a sweep, and not a run", hint)
    if not any((path / name).exists() for name in ("recipe.yaml", "foreign.json")):
        names = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        if (path / "latest").is_dir():
            hint = f"`{option}{path / 'latest'}` is its newest run"
        raise user_error(f"{option}{path}: not a run: no recipe.yaml, but {names}{more}", hint)
    for entry in (*entries, *attempts):  # what is written to must lie in this folder
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            name = entry.relative_to(path)
            what = f"{option}{path}: `{name}` is neither a file nor a folder"
            raise user_error(what, "a run directory holds no links or devices")
    for known, is_kind, kind in _KINDS:
        if os.path.lexists(path / known) and not is_kind(path / known):
            raise user_error(f"{option}{path}: `{known}` is not a {kind}", "move it away")


def attempts(path: Path) -> list[int]:
    names = [entry.name for entry in (path / "attempts").glob("*")]
    return [int(name) for name in names if re.fullmatch("[1-9][0-9]{0,99}", name)]


def empty_folder(output: Path) -> Path:
    with storage_errors(output, f"the run directory {output}"):
        if output.is_symlink() and not output.exists():
            what = f"--output {output}: a link to {output.readlink()}, which does not exist"
            raise user_error(what, "name a new or an empty folder")
        if output.exists() and not output.is_dir():
            raise user_error(f"--output {output}: is a file", "name a new or an empty folder")
        if output.is_dir() and any(output.iterdir()):
            found, hint = "is not empty", "name a new or an empty folder"
            if (output / "recipe.yaml").exists():
                found, hint = "holds a run", f"{hint}, or go on with the run: `--resume {output}`"
            raise user_error(f"--output {output}: the folder {found}", hint)
        output.mkdir(parents=True, exist_ok=True)
    return output


def new_folder(name: str, recipe_text: str) -> Path:
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    digest = hashlib.sha256(recipe_text.encode()).hexdigest()[:8]
    root = Path("runs") / name
    with storage_errors(root, str(root)):
        root.mkdir(parents=True, exist_ok=True)
        for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
            with contextlib.suppress(FileExistsError):
                path = root / f"{time}-{digest}{suffix}"
                path.mkdir()
                return path
    raise user_error(f"{root}: 999 runs of this second exist", exit_code=Exit.STORAGE)


def point_latest(path: Path) -> None:
    latest, temporary = path.parent / "latest", path.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.name)
    try:
        temporary.replace(latest)
    except OSError:
        temporary.unlink()
        raise
