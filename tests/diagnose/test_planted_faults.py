"""Replay names the very module, phase and value of faults that were planted in four models."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from mpcli.diagnose.replay import replay
from mpcli.diagnose.stage import Stage
from mpcli.recipe.load import load_recipe
from mpcli.trainer import settings
from tests.diagnose.faulty_runs import faulty_run

FAULTS = [
    ("mlp", "0", "forward-overflow"),
    ("mlp", "2", "backward-nan"),
    ("mlp", "4", "backward-inf"),
    ("conv", "1", "backward-nan"),
    ("conv", "3", "backward-inf"),
    ("conv", "loss", "loss-nan"),
    ("transformer", "embed", "backward-inf"),
    ("transformer", "encoder.layers.1.linear2", "forward-overflow"),
    ("transformer", "head", "backward-nan"),
    ("residual", "0", "backward-nan"),  # an operation of a container's own
    ("residual", "1.down", "forward-overflow"),
    ("residual", "loss", "loss-nan"),
]
EXPECTED = {
    "forward-overflow": ("forward", "inf"),
    "backward-nan": ("backward", "nan"),
    "backward-inf": ("backward", "inf"),
    "loss-nan": ("forward", "nan"),
}
faults = pytest.mark.parametrize(("model", "layer", "fault"), FAULTS)


@faults
def test_the_very_module_is_named(tmp_path: Path, model: str, layer: str, fault: str) -> None:
    run, plugin = faulty_run(tmp_path, model, layer, fault)
    found = replay(run, plugin=plugin)
    assert found.reproduced
    assert found.origin is not None
    phase, value = EXPECTED[fault]
    assert (found.origin.module, found.origin.phase, found.origin.value) == (layer, phase, value)
    is_fp16s = fault in ("forward-overflow", "backward-inf")
    for shadow in ("bf16", "fp32"):
        origin = found.shadow_origins[shadow]
        assert (origin is None) == is_fp16s
        assert origin is None or origin == found.origin
    if is_fp16s:
        assert found.parting is not None
        assert (found.parting.module, found.parting.phase) == (layer, phase)


@pytest.mark.parametrize(
    ("model", "layer", "fault", "raises"),
    [
        ("conv", "loss", "loss-nan", False),
        ("residual", "loss", "loss-nan", False),
        ("mlp", "2", "backward-nan", True),
    ],
)
def test_detect_anomaly_lets_a_nan_loss_pass(
    tmp_path: Path, model: str, layer: str, fault: str, raises: bool
) -> None:
    run, plugin = faulty_run(tmp_path, model, layer, fault)
    found = replay(run, plugin=plugin)
    assert found.origin is not None
    recipe = load_recipe(run.recipe_path, plugin=plugin).recipe
    with settings(recipe, run.plan()), torch.autograd.detect_anomaly(check_nan=True):
        stage = Stage(recipe, run.plan())
        stage.bring_to(run, found.step, lambda text: None)
        batch = stage.batch(found.step)
        told = pytest.raises(RuntimeError, match="nan values") if raises else nullcontext()
        with told:
            stage.engine.accumulate(stage.loss, batch, batch.weight, last=True)
