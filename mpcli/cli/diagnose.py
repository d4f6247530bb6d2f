"""`mptrain diagnose`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson, PluginPath
from mpcli.cli.plugin import named_plugin, plugin_of_run
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.render import visible
from mpcli.signals import uninterrupted

if TYPE_CHECKING:
    from mpcli.diagnose.finding import Finding
    from mpcli.records import Replay
    from mpcli.rundir import RunDirectory

Level = Literal["info", "warning", "error"]


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
        bool | None,
        typer.Option(
            "--replay/--no-replay",
            help="Run the step that failed, or the last one, again beside bf16 and fp32. Without "
            "either, it is done where it takes at most a minute.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Try what is suggested: run the same steps without and with it."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Steps of `--verify` after the one where something is wrong; default: 32.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="The recipe of a checkpoint or a file of weights that lies in no run.",
            show_default=False,
        ),
    ] = None,
    plugin: PluginPath = None,
    as_json: AsJson = False,
    fail_on: Annotated[
        Level | None,
        typer.Option(
            metavar="LEVEL",
            help="Exit with 5 if anything is found of this level (info, warning, error) or above.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what is wrong with a run's numbers: cause, layer and fix."""
    from mpcli.rundir import newest_run

    if path == "":
        raise user_error("the path is empty", "leave it out for the newest run")
    place = newest_run() if path is None else Path(path)

    with uninterrupted():
        from mpcli.cli.evidence import show_evidence
        from mpcli.cli.replayed import show_replay
        from mpcli.diagnose.checks import findings
        from mpcli.diagnose.margins import margins
        from mpcli.diagnose.places import gather, is_run
        from mpcli.diagnose.ranking import ranked
        from mpcli.diagnose.summary import verdict
        from mpcli.recipe.load import load_recipe
        from mpcli.rundir import RunDirectory

    run = RunDirectory.read(place) if is_run(place) else None
    if verify and run is None:
        raise user_error(
            f"--verify {place}: it is no run, so there are no steps to run again",
            "name the run directory that it is of",
        )
    if run and verify:
        run.refuse_foreign("--verify ")
    if steps and not verify:
        raise user_error(f"--steps {steps}: of what?", "add `--verify`")
    named = load_recipe(recipe, plugin=named_plugin(plugin)) if recipe else None
    if run and recipe:
        raise user_error(f"--recipe {recipe}: the run has its own", "leave it out")
    evidence = gather(place, named.recipe if named else None)
    if replay is not False:
        evidence = replace(evidence, replay=_replayed(run, plugin, asked=bool(replay)))
    causes = ranked(findings(evidence))
    if run and verify:
        causes = _verified(run, causes, steps, plugin)
    sentence = verdict(evidence.facts, evidence.replay, causes)
    code = _exit_code(fail_on, [cause.severity for cause in causes])
    if as_json:
        shown = evidence.replay.model_dump() if evidence.replay else None
        write_json({
            "verdict": sentence,
            "findings": [cause.model_dump() for cause in causes],
            "margins": margins(evidence),
            "evidence": evidence.facts.model_dump() | {"replay": shown},
            "status": "done", "exit_code": code,
        })  # fmt: skip
    else:
        show_evidence(evidence.facts)
        if evidence.replay:
            show_replay(evidence.replay)
        write(visible(f"{place}: {sentence}"))
    raise typer.Exit(code)


LEVELS = ("info", "warning", "error")


def _exit_code(fail_on: Level | None, severities: list[Level]) -> Exit:
    if fail_on is None:
        return Exit.DONE
    reached = any(LEVELS.index(severity) >= LEVELS.index(fail_on) for severity in severities)
    return Exit.NUMERICS if reached else Exit.DONE


def _verified(
    run: RunDirectory, causes: list[Finding], steps: int | None, plugin: str | None
) -> list[Finding]:
    """What became of the suggestions."""
    with uninterrupted():
        from mpcli.diagnose.verify import STEPS
        from mpcli.diagnose.verify import verify as verify_findings

    file = plugin_of_run(run, plugin)
    return verify_findings(run, causes, steps=steps or STEPS, plugin=file, tell=_tell)


def _tell(text: str) -> None:
    write(visible(text), sys.stderr)


def _replayed(run: RunDirectory | None, plugin: str | None, *, asked: bool) -> Replay | None:
    """A step once more. Where nobody asked, only if it is quick, and not if it cannot be."""
    if run is None or (run.foreign() and not asked):
        return None
    with uninterrupted():
        from mpcli.diagnose.replay import is_quick
        from mpcli.diagnose.replay import replay as replay_step

    try:
        run.refuse_foreign("--replay ")
        file = plugin_of_run(run, plugin)
        if not asked and not is_quick(run):
            _tell("no step is run again, as that takes more than a minute: `--replay` does it")
            return None
        return replay_step(run, plugin=file, tell=_tell)
    except UserError as error:
        if asked:
            raise
        why = error.problems[0]
        _tell(f"no step is run again: {why.what}; {why.hint or ''}".rstrip("; "))
        return None
