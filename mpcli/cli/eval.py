"""`mptrain eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from mpcli.cli.console import show_table, write
from mpcli.cli.errors import as_records, show_problems, write_json
from mpcli.cli.options import AsJson, Overrides, PluginPath
from mpcli.cli.plan import planned_for
from mpcli.cli.plugin import plugin_of_run
from mpcli.recipe.errors import Exit
from mpcli.signals import uninterrupted
from mpcli.sizes import metric_text


def eval(
    overrides: Overrides,
    run_dir: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN_DIR", help="The run; default: the newest in `runs`.", show_default=False
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="STEP",
            help="The step of a checkpoint, or `best`; default: the trained model in `final`.",
            show_default=False,
        ),
    ] = None,
    plugin: PluginPath = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate what a run has learnt: in any precision, on any data."""
    from mpcli.other_data import from_final, on_other_data
    from mpcli.recipe.load import load_recipe
    from mpcli.rundir import RunDirectory, newest_run

    run = RunDirectory.read(newest_run() if run_dir is None else Path(run_dir))
    run.refuse_foreign()
    file = plugin_of_run(run, plugin)
    own = load_recipe(run.recipe_path, plugin=file).recipe
    loaded = load_recipe(run.recipe_path, overrides, file)
    trained_on = None
    if loaded.recipe.data != own.data:
        loaded, trained_on = on_other_data(run, loaded)
    loaded = from_final(run, loaded)
    planned, warnings = planned_for(loaded, training=False)

    with uninterrupted():
        from mpcli.evaluation import evaluate, load_weights

    warnings = [warning for warning in warnings if not warning.finding]  # others: of training
    show_problems(warnings)
    for message in loaded.dropped:
        write(message, sys.stderr)
    weights = load_weights(run, own, checkpoint)
    metrics = evaluate(loaded.recipe, planned, weights, trained_on)
    if as_json:
        found = {"checkpoint": weights.name, "metrics": {"eval": metrics}}
        problems = as_records(warnings)
        write_json({"status": "done", "exit_code": Exit.DONE, **found, "problems": problems})
    else:
        rows = [(f"eval {name}", metric_text(name, value)) for name, value in metrics.items()]
        where = str(run.path / weights.name)
        precision = loaded.recipe.precision.mode
        show_table("Evaluation", ("", ""), [*rows, ("precision", precision), ("weights", where)])
