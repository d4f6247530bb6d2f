"""`mptrain sweep`: many short runs of one recipe, and what they show together."""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mpcli.cli.console import write
from mpcli.cli.errors import write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath, RecipePath, Strict
from mpcli.cli.plan import planned_for
from mpcli.cli.plugin import named_plugin
from mpcli.cli.result import show_warnings
from mpcli.recipe.errors import Exit, Problem, UserError, user_error
from mpcli.recipe.render import visible
from mpcli.signals import held

if TYPE_CHECKING:
    from mpcli.recipe.load import LoadedRecipe
    from mpcli.recipe.precision import Mode
    from mpcli.records import Plan, Status
    from mpcli.sweep.asked import Asked
    from mpcli.sweep.cells import Cell
    from mpcli.sweep.results import SweepResult, TrialResult

MOST_STEPS = 2**31 - 1  # as in a recipe
Seeds = Annotated[
    int, typer.Option("--seeds", metavar="K", min=1, max=1000, help="Runs of each setting.")
]
Jobs = Annotated[
    int, typer.Option("--jobs", metavar="J", min=1, max=1000, help="Runs at the same time.")
]
Output = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="The sweep's folder; default: runs/<name>/sweep-..., the same for the same command, "
        "which goes on where it ended.",
        show_default=False,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Optuna storage of the study, which several machines join; default: a journal file "
        "in the folder.",
        show_default=False,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=MOST_STEPS,
        help="Steps of each run; default: the recipe's.",
        show_default=False,
    ),
]


def loss_scale(
    recipe: RecipePath,
    overrides: Overrides,
    values: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Scales, such as `2^8..2^15` or `1,256,65536,dynamic`; default: 1, 2^4, 2^8, "
            "2^12, 2^16, 2^20, 2^24 and dynamic.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=MOST_STEPS,
            help="Steps of each run; default: half of the recipe's, at most 100.",
            show_default=False,
        ),
    ] = None,
    seeds: Seeds = 1,
    jobs: Jobs = 1,
    output: Output = None,
    storage: Storage = None,
    plugin: PluginPath = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Predict and measure what the loss scale does; recommend one."""
    from mpcli.recipe.load import load_recipe
    from mpcli.sweep import asked as ask

    _check_first(output)
    wanted = ask.SCALES if values is None else ask.scales(values)
    loaded = load_recipe(recipe, overrides, named_plugin(plugin))
    ask.check_scaled(loaded)
    planned, warnings = _planned_beside_imports(loaded, strict=strict)
    length = steps or ask.short_steps(planned.steps)
    if length != (steps or planned.steps):
        _tell(
            f"each run has {length} of the recipe's {planned.steps:,} steps; `--steps` changes it"
        )
    asked = ask.loss_scale_sweep(loaded.recipe, wanted, steps=length, seeds=seeds)
    sweep = _Sweep(loaded, planned, asked, output, storage, jobs)
    _check(loaded, asked.cells, sweep.folder)
    show_warnings(loaded, warnings)
    with held():
        from mpcli.sweep.recommendation import LossScaleSweep

        found = LossScaleSweep(sweep.run())
        recommended = found.recommended()
        for number in range(1, ask.ANSWERS + 1):
            setting = recommended["set"]
            tried = {one for trials in found.half.values() for one in trials[0].settings}
            if not setting or setting in tried or recommended["confirmed"]:
                break
            more = ask.confirming(loaded.recipe, setting, number, steps=length, seeds=seeds)
            found = LossScaleSweep(sweep.run(more))
            recommended = found.recommended()
        result = sweep.result(found.trials, found.rows(), recommended, found.predicted())
        patch = None if as_json else _patch(loaded, sweep, recommended["set"])
    if not as_json:
        from mpcli.cli.sweep_text import show_loss_scale, show_recommended

        show_loss_scale(result, found.prediction)
        show_recommended(recommended, patch, given=bool(overrides))
    _end(result, as_json=as_json)


def precision(
    recipe: RecipePath,
    overrides: Overrides,
    modes: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Modes, such as `fp32,fp16`; default: fp32, bf16, fp16, bf16-master and "
            "fp16-master, those that can be.",
            show_default=False,
        ),
    ] = None,
    steps: Steps = None,
    seeds: Seeds = 1,
    jobs: Jobs = 1,
    output: Output = None,
    storage: Storage = None,
    plugin: PluginPath = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Compare modes: accuracy, time and memory, same seeds."""
    from mpcli.recipe.load import load_recipe
    from mpcli.sweep import asked as ask

    _check_first(output)
    wanted = ask.MODES if modes is None else ask.modes(modes)
    _check_several(wanted)
    loaded = load_recipe(recipe, overrides, named_plugin(plugin))
    planned, warnings = _planned_beside_imports(loaded, strict=strict)
    asked = ask.precision_sweep(loaded.recipe, wanted, steps=steps, seeds=seeds)
    if modes is None:
        _, refused = _planned(loaded, asked.cells, Path(), strict=strict)
        for mode, problems in refused.items():
            _tell(f"{mode} is left out: {problems[0].what}")
        left = [mode for mode in wanted if mode not in refused]
        asked = ask.precision_sweep(loaded.recipe, left, steps=steps, seeds=seeds)
        _check_several(left)
    sweep = _Sweep(loaded, planned, asked, output, storage, jobs)
    plans = _check(loaded, asked.cells, sweep.folder, strict=strict, memory=True)
    # What a process has on a CPU is libraries more than anything.
    memory = {k: p.memory.peak for k, p in plans.items() if p.device == "cpu" and p.memory}
    show_warnings(loaded, warnings)
    with held():
        from mpcli.sweep.comparison import precision_rows

        trials = sweep.run()
        result = sweep.result(trials, precision_rows(trials, memory))
    if not as_json:
        from mpcli.cli.sweep_text import show_precision

        show_precision(result)
    _end(result, as_json=as_json)


def grid(
    recipe: RecipePath,
    overrides: Overrides,
    over: Annotated[
        list[str],
        typer.Option(
            metavar="PATH=V1,V2",
            default_factory=list,
            help="Values of a path of the recipe, such as `optim.lr=1e-3,3e-3`. Repeatable: every "
            "combination is run.",
            show_default=False,
        ),
    ],
    steps: Steps = None,
    seeds: Seeds = 1,
    jobs: Jobs = 1,
    output: Output = None,
    storage: Storage = None,
    plugin: PluginPath = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Run every combination of values and rank them."""
    from mpcli.recipe.load import load_recipe
    from mpcli.sweep import asked as ask

    _check_first(output)
    wanted = ask.grid(over, overrides)
    loaded = load_recipe(recipe, overrides, named_plugin(plugin))
    planned, warnings = _planned_beside_imports(loaded, strict=strict)
    asked = ask.grid_sweep(loaded.recipe, wanted, steps=steps, seeds=seeds)
    sweep = _Sweep(loaded, planned, asked, output, storage, jobs)
    _check(loaded, asked.cells, sweep.folder, strict=strict)
    show_warnings(loaded, warnings)
    with held():
        from mpcli.sweep.comparison import grid_rows

        trials = sweep.run()
        rows = grid_rows(trials, ask.points(wanted))
        result = sweep.result(trials, rows, rows[0] if rows[0]["finished"] else None)
    if not as_json:
        from mpcli.cli.sweep_text import show_grid

        show_grid(result)
    _end(result, as_json=as_json)


def _planned_beside_imports(loaded: LoadedRecipe, *, strict: bool) -> tuple[Plan, list[Problem]]:
    """Plan the recipe, while the server of the trials' processes imports what they need."""
    from mpcli.sweep.jobs import start_server

    start_server()
    return planned_for(loaded, strict=strict)


def _check_several(modes: Sequence[Mode]) -> None:
    if len(set(modes)) < 2:
        hint = "name two or more: `--modes fp32,fp16`"
        raise user_error("one mode has nothing to be beside", hint)


def _check_first(output: str | None) -> None:
    """What can be said before anything is read or imported.

    Raises:
        UserError: exit 2, `--output` names nothing; 3, Optuna is not installed.
    """
    from mpcli.sweep.jobs import check_installed

    check_installed()
    if output == "":
        raise user_error("`--output` names no folder", "leave it out, or name a new folder")


COMMANDS: dict[str, Callable[..., None]] = {
    "loss-scale": loss_scale,
    "precision": precision,
    "grid": grid,
}


class _Sweep:
    """A sweep that is asked for, and where it is."""

    def __init__(
        self,
        loaded: LoadedRecipe,
        planned: Plan,
        asked: Asked,
        output: str | None,
        storage: str | None,
        jobs: int,
    ) -> None:
        from mpcli.sweep.folder import SweepFolder, identity

        name = f"sweep-{asked.kind}-{identity(loaded, asked.record)}"
        self.folder = Path("runs") / loaded.recipe.name / name if output is None else Path(output)
        self._files = SweepFolder(self.folder)
        self._loaded, self._asked, self._cells = loaded, asked, asked.cells
        self._steps = asked.steps or planned.steps
        self._how: dict[str, Any] = {"storage": storage, "jobs": jobs}

    @property
    def recipe_path(self) -> Path:
        """The resolved recipe of all runs."""
        return self._files.recipe_path

    def run(self, more: Sequence[Cell] = ()) -> list[TrialResult]:
        """Train what has no result yet; with `more`, those cells too."""
        from mpcli.sweep.jobs import run_sweep

        self._cells = (*self._cells, *more)
        return run_sweep(
            self.folder, self._loaded, self._cells, kind=self._asked.kind,
            asked=self._asked.record, tell=_tell, **self._how,
        )  # fmt: skip

    def result(
        self,
        trials: Sequence[TrialResult],
        rows: Iterable[Mapping[str, Any]],
        recommended: Mapping[str, Any] | None = None,
        predicted: Iterable[Mapping[str, Any]] = (),
    ) -> SweepResult:
        """All of it, kept in the folder."""
        from mpcli.sweep.results import SweepResult

        status: Status = "done"
        if not any(trial.status == "done" for trial in trials):
            diverged = any(trial.status == "diverged" for trial in trials)
            status = "diverged" if diverged else "failed"
        codes = {"diverged": Exit.NUMERICS, "failed": Exit.ENVIRONMENT}
        result = SweepResult(
            kind=self._asked.kind,
            status=status,
            exit_code=codes.get(status, Exit.DONE),
            name=self._loaded.recipe.name,
            study=self.folder.name,
            steps=self._steps,
            seeds=self._asked.seeds,
            recommended=recommended and dict(recommended),
            rows=tuple(map(dict, rows)),
            predicted=tuple(map(dict, predicted)),
            trials=tuple(trials),
        )
        self._files.write_result(result)
        _tell(f"runs and result: {self.folder}")
        return result


def _end(result: SweepResult, *, as_json: bool) -> NoReturn:
    if as_json:
        write_json(result.model_dump(mode="python"))
    raise typer.Exit(result.exit_code)


def _check(
    loaded: LoadedRecipe,
    cells: Sequence[Cell],
    folder: Path,
    *,
    strict: bool = False,
    memory: bool = False,
) -> dict[str, Plan]:
    """Load and plan every cell, as it will be in the sweep's folder, before any is run.

    Returns:
        label -> the plan of that setting.

    Raises:
        UserError: every problem once, with the cells that have it.
    """
    found: dict[Problem, list[str]] = {}
    plans, refused = _planned(loaded, cells, folder, strict=strict, memory=memory)
    for label, problems in refused.items():
        for problem in problems:
            found.setdefault(replace(problem, place=None), []).append(label)
    if found:
        raise UserError(*(_with(problem, labels) for problem, labels in found.items()))
    return plans


def _with(problem: Problem, labels: Sequence[str]) -> Problem:
    more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
    return replace(problem, what=f"{problem.what}, with `{labels[0]}`{more}")


def _planned(
    loaded: LoadedRecipe,
    cells: Sequence[Cell],
    folder: Path,
    *,
    strict: bool = False,
    memory: bool = False,
) -> tuple[dict[str, Plan], dict[str, tuple[Problem, ...]]]:
    """Label -> the plan of that setting, with its last seed, and label -> why there is none."""
    from mpcli.recipe.dump import resolved_yaml
    from mpcli.recipe.load import parsed_recipe
    from mpcli.recipe.source import Source

    base = Source("recipe.yaml", resolved_yaml(loaded.recipe))
    plans: dict[str, Plan] = {}
    refused: dict[str, tuple[Problem, ...]] = {}
    for label, overrides in {cell.label: cell.overrides for cell in cells}.items():
        try:
            cell = parsed_recipe(base, folder, overrides, loaded.plugin)
            plans[label], _ = planned_for(cell, strict=strict, memory=memory)
        except UserError as error:
            refused[label] = error.problems
    return plans, refused


def _patch(loaded: LoadedRecipe, sweep: _Sweep, setting: str | None) -> str | None:
    """The change of the recipe's own text; None where it cannot hold it, or has it."""
    from mpcli.diagnose.repair import repaired

    if setting is None:
        return None
    source = Path(loaded.file)
    text, own = repaired(sweep.recipe_path, source, [setting], source.parent, loaded.plugin)
    if not own:
        return None
    old, new = (list(io.StringIO(part)) for part in (loaded.source, text))  # lines end with \n
    lines = difflib.unified_diff(old, new, loaded.file, loaded.file)
    whole = (line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}\n" for line in lines)
    return "".join(whole) or None


_NO_NEWLINE = "\\ No newline at end of file"  # as POSIX' `diff` says it


def _tell(text: str) -> None:
    write(visible(text), sys.stderr)
