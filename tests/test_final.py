"""`final/`: a model that other programs load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpcli.data.image_sources import load
from mpcli.engines.local import LocalEngine
from mpcli.recipe.data import Digits
from tests.small import run_small
from tests.tiny_cifar import write_tiny_cifar

LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from load import load, prepare
images = torch.load(sys.argv[2], weights_only=True)
torch.save(load()(prepare(images)), sys.argv[3])
assert not [name for name in sys.modules if name.startswith(("mpcli", "pydantic"))]
"""
MODELS = [
    "{kind: smallnet, width: 4}",
    "{kind: resnet9, width: 4}",
    "{kind: vit, layers: 2, width: 16, heads: 2, mlp_width: 16}",
    *(
        pytest.param(f"{{kind: torchvision, name: {name}}}", marks=pytest.mark.slow)
        for name in ("resnet18, stem: cifar", "squeezenet1_1, stem: cifar", "shufflenet_v2_x0_5")
    ),
]


def logits_elsewhere(final: Path, images: torch.Tensor, scratch: Path) -> torch.Tensor:
    """What `final/load.py` computes, in a process that has never heard of this program."""
    torch.save(images, scratch / "images")
    subprocess.run(
        [sys.executable, "-I", "-c", LOAD, final, scratch / "images", scratch / "logits"],
        check=True,
    )
    logits: torch.Tensor = torch.load(scratch / "logits", weights_only=True)
    return logits


@pytest.mark.parametrize("model", MODELS)
def test_the_model_scores_the_same_without_this_program(tmp_path: Path, model: str) -> None:
    small = "smallnet" in model
    write_tiny_cifar(tmp_path / "cifar")
    data = "{kind: digits}" if small else f"{{kind: cifar10, path: {tmp_path / 'cifar'}}}"
    run, result = run_small(
        tmp_path, f"task.model={model}", f"data={data}", "train.steps=2", "train.ema=0.5"
    )
    if small:
        images, labels = load(Digits(kind="digits"))[0].eval
    else:
        from io import BytesIO

        import pyarrow.parquet as pq
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        table = pq.read_table(tmp_path / "cifar" / "test.parquet").to_pydict()
        pictures = [Image.open(BytesIO(cell["bytes"])) for cell in table["img"]]
        images, labels = (
            torch.stack(list(map(pil_to_tensor, pictures))),
            torch.tensor(table["label"]),
        )
    logits = logits_elsewhere(run.final_path, images, tmp_path)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(result.metrics["eval"]["loss"], rel=1e-5)
    card = (run.final_path / "README.md").read_text()
    assert f"loss on the evaluation data: {loss:.3f}"[:-1] in card
    assert "mode: fp32" in card


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_another_type_of_the_weights(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    exact, _ = run_small(tmp_path, name="exact")
    run, _ = run_small(tmp_path, f"output.final_dtype={name}")
    saved, expected = (load_file(r.final_path / "model.safetensors") for r in (run, exact))
    for key, value in expected.items():
        assert torch.equal(saved[key], value.to(dtype) if value.is_floating_point() else value)
    assert json.loads((run.final_path / "model.json").read_text())["dtype"] == name
    assert (
        logits_elsewhere(run.final_path, torch.zeros(1, 1, 8, 8).byte(), tmp_path).isfinite().all()
    )


def test_a_weight_that_fp16_cannot_hold_stays_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dict = LocalEngine.state_dict

    def with_a_large_one(self: LocalEngine) -> dict[str, torch.Tensor]:
        return state_dict(self) | {"head.bias": torch.full((10,), 70000.0)}

    monkeypatch.setattr(LocalEngine, "state_dict", with_a_large_one)
    run, result = run_small(tmp_path, "output.final_dtype=fp16")
    (problem,) = result.problems
    assert problem["finding"] == "weights-exceed-fp16"
    assert problem["message"].startswith("`head.bias` has 70000, too large")
    saved = load_file(run.final_path / "model.safetensors")
    assert torch.equal(saved.pop("head.bias"), torch.full((10,), 70000.0))
    assert {value.dtype for value in saved.values()} == {torch.float16, torch.int64}
