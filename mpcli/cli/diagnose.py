"""`mptrain diagnose`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson, PluginPath
from mpcli.cli.plugin import plugin_of_run
from mpcli.recipe.errors import Exit, user_error
from mpcli.recipe.render import visible
from mpcli.signals import uninterrupted


def diagnose(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="A run, a checkpoint, a folder or a file of weights; default: the newest run in "
            "`runs`.",
            show_default=False,
        ),
    ] = None,
    replay: Annotated[
        bool,
        typer.Option(
            "--replay/--no-replay",
            help="Run the step that failed, or the last one, again beside bf16 and fp32.",
        ),
    ] = False,
    plugin: PluginPath = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run or a file of weights says about its numbers."""
    from mpcli.rundir import RunDirectory, newest_run

    if path == "":
        raise user_error("the path is empty", "leave it out for the newest run")
    place = newest_run() if path is None else Path(path)
    run = None
    if replay:
        run = RunDirectory.read(place, "--replay ")
        run.refuse_foreign("--replay ")
        file = plugin_of_run(run, plugin)
    elif plugin is not None:
        raise user_error(f"--plugin {plugin}: only a replay runs code", "add `--replay`")

    with uninterrupted():
        from mpcli.cli.evidence import show_evidence
        from mpcli.cli.replayed import show_replay
        from mpcli.diagnose.places import gather
        from mpcli.diagnose.summary import verdict

    evidence = gather(place)
    replayed = None
    if run:
        with uninterrupted():
            from mpcli.diagnose.replay import replay as replay_step

        replayed = replay_step(run, plugin=file, tell=lambda text: write(text, sys.stderr))
    sentence = verdict(evidence, replayed)
    if as_json:
        found = evidence.model_dump() | {"replay": replayed.model_dump() if replayed else None}
        write_json({
            "verdict": sentence, "findings": [], "margins": {}, "evidence": found,
            "status": "done", "exit_code": Exit.DONE,
        })  # fmt: skip
        return
    show_evidence(evidence)
    if replayed:
        show_replay(replayed)
    write(visible(f"{evidence.path}: {sentence}"))
