"""What a loss-scale sweep costs beside its runs: the prediction, in steps of the fp32 reference.

CPU time on one thread. The prediction reads the three sampled steps from the run's directory and
says what every scale from 2^-8 to 2^32 loses, in total and of each layer. What the samples take
from the reference run stands beside it.

    make bench-sweep
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.probe import measure
from mpcli.launch import launch
from mpcli.machine import detect_machine
from mpcli.plan import make_plan
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import templates
from mpcli.rundir import RunDirectory
from mpcli.sweep.evidence import evidence_of
from mpcli.sweep.prediction import SCALES, Prediction
from tests.small import Silent

RECIPES = ("digits-fp32", "bert-tiny-mlm")
SHORT = ("train.steps=3", "eval.every=null", "output.checkpoint_every=null",
         "probe={every: 0, steps: [1, 2, 3]}")  # fmt: skip


def prediction_seconds(name: str) -> float:
    """Of everything after the reference run."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_recipe(templates()[name], SHORT)
        plan = make_plan(loaded.recipe, detect_machine())
        run = RunDirectory.create(loaded, plan, {}, Path(folder, "run"))
        launch(run, Silent())
        started = time.process_time()
        prediction = Prediction(evidence_of(run)["histograms"])
        for scale in SCALES:
            prediction.total(scale)
            prediction.layers(scale)
        return time.process_time() - started


def main() -> None:
    """Print a row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'recipe':16} {'step':>9} {'prediction of 41 scales':>24} {'three samples':>14}")
    for name in arguments.recipe or RECIPES:
        pairs = measure(name, [], arguments.seconds)
        step, sampled, _ = map(statistics.median, zip(*pairs, strict=True))
        seconds = prediction_seconds(name)
        print(
            f"{name:16} {1e3 * step:6.1f} ms {1e3 * seconds:10.1f} ms {seconds / step:4.2f} steps "
            f"{3 * (sampled - step) / step:8.2f} steps",
            flush=True,
        )


if __name__ == "__main__":
    main()
