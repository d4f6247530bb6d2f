"""`mptrain diagnose`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import as_records, show_problems, write_json
from mpcli.cli.fix import new_file, write_fix
from mpcli.cli.options import AsJson, PluginPath, named_or_newest
from mpcli.cli.plugin import named_plugin, plugin_of_run
from mpcli.recipe.errors import Exit, UserError, user_error
from mpcli.recipe.render import visible
from mpcli.signals import held, uninterrupted

if TYPE_CHECKING:
    from mpcli.diagnose.finding import Finding
    from mpcli.recipe.load import LoadedRecipe
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
    evidence: Annotated[
        bool, typer.Option("--evidence", help="Print the evidence too, as tables.")
    ] = False,
    fix: Annotated[
        str | None,
        typer.Option(
            metavar="OUT",
            help="Write the recipe with the fixes in it to a new YAML file.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            help="The recipe of a checkpoint or a file of weights that lies in no run of ours.",
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
    place = named_or_newest(path)
    out = new_file(fix)

    with uninterrupted():
        from mpcli.cli.evidence import show_evidence
        from mpcli.cli.findings import show_command, show_facts, show_findings
        from mpcli.cli.replayed import show_replay
        from mpcli.diagnose.checks import findings
        from mpcli.diagnose.margins import margins
        from mpcli.diagnose.places import gather, is_run, run_around
        from mpcli.diagnose.ranking import ranked
        from mpcli.diagnose.repair import overrides
        from mpcli.diagnose.summary import seen, verdict, without_trouble
        from mpcli.rundir import RunDirectory

    run = RunDirectory.read(place, "--replay ") if replay or is_run(place) else None
    if run and replay:
        run.refuse_foreign("--replay ")
    if verify and run is None:
        raise user_error(
            f"--verify {place}: it is no run, so there are no steps to run again",
            "name the run directory that it is of",
        )
    if run and verify:
        run.refuse_foreign("--verify ")
    if steps and not verify:
        raise user_error(f"--steps {steps}: of what?", "add `--verify`")
    if run and fix and not run.foreign():
        plugin_of_run(run, plugin)  # what the recipe needs: to fail before the work
    if plugin and not recipe and (run is None or run.foreign()):
        raise user_error(f"--plugin {plugin}: {place} has none", "leave it out")
    named = _named_recipe(recipe, plugin, run)
    found = gather(place, named.recipe if named else None)
    if replay is not False:
        found = dataclasses.replace(found, replay=_replayed(run, plugin, asked=bool(replay)))
    causes = ranked(findings(found))
    if run and verify:
        causes = _verified(run, causes, steps, plugin)
    sentence, around = verdict(found.facts, found.replay, causes), margins(found)
    code = _exit_code(fail_on, [cause.severity for cause in causes])
    written = failed = None
    try:
        with held():  # no half a recipe is left
            written = out and write_fix(out, causes, run, named, plugin)
    except UserError as error:  # what was found is told first
        failed = error
    if as_json:
        shown = found.replay.model_dump() if found.replay else None
        end: dict[str, object] = {"status": "done", "exit_code": code}
        if failed:
            code = failed.exit_code
            show_problems(failed.problems)
            end = {"status": "failed", "exit_code": code, "problems": as_records(failed.problems)}
        write_json({
            "verdict": sentence,
            "findings": [cause.model_dump() for cause in causes],
            "margins": around,
            "evidence": found.facts.model_dump() | {"replay": shown},
            "fix": written and str(written),
        } | end)  # fmt: skip
        raise typer.Exit(code)
    if evidence:
        show_evidence(found.facts)
        if found.replay:
            show_replay(found.replay)
    show_findings(causes, around, without_trouble(found.facts, found.replay))
    show_facts(place, seen(found.facts, found.replay))
    if failed:
        raise failed
    if written:
        with_plugin = ["--plugin", plugin] if plugin else []
        show_command(f"wrote {written}:", ["mptrain", "run", str(written), *with_plugin])
    elif run and not run.foreign() and not fix and overrides(causes):
        # Of a plug-in that nobody named, the run's own copy is the one that is surely there.
        file = plugin or (str(run.path / "plugin.py") if run.plugin() else None)
        what = "write the repaired recipe" if verify else "try the fix and write the recipe"
        show_command(f"to {what}:", [
            "mptrain", "diagnose", str(place), *(["--plugin", file] if file else []),
            "--verify", "--fix", "fixed.yaml",
        ])  # fmt: skip
    elif whose := run_around(place):
        command = shlex.join(["mptrain", "diagnose", str(whose)])
        _tell(f"its run may say more: {command}")
    raise typer.Exit(code)


def _named_recipe(
    path: str | None, plugin: str | None, run: RunDirectory | None
) -> LoadedRecipe | None:
    """The recipe of `--recipe`."""
    if path is None:
        return None
    if run and not run.foreign():
        raise user_error(f"--recipe {path}: the run has its own", "leave it out")
    from mpcli.recipe.load import load_recipe

    return load_recipe(path, plugin=named_plugin(plugin))


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
    tried = verify_findings(run, causes, steps=steps or STEPS, plugin=file, tell=_tell)
    return sorted(tried, key=lambda cause: cause.verified is False)  # what no fix mends comes last


def _tell(text: str) -> None:
    write(visible(text), sys.stderr)


def _replayed(run: RunDirectory | None, plugin: str | None, *, asked: bool) -> Replay | None:
    """A step once more. Where nobody asked, only if it is quick, and not if it cannot be."""
    if run is None or run.foreign():
        return None
    with uninterrupted():
        from mpcli.diagnose.replay import is_quick
        from mpcli.diagnose.replay import replay as replay_step

    try:
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
