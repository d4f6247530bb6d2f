"""Activation checkpointing changes memory and time, and no number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcli.data.batch import Batch
from mpcli.data.images import ImageInfo
from mpcli.recipe.errors import UserError
from mpcli.recipe.task import ImageClassification
from mpcli.tasks import apply_activation_checkpointing, image_classification
from tests.host_reads import HostReads

INFO = ImageInfo(10, 10, (3, 32, 32), 10, "test")
SMALLNET = {"kind": "smallnet", "width": 4}
RESNET9 = {"kind": "resnet9", "width": 4}
MODELS = [
    SMALLNET,
    RESNET9,
    {"kind": "torchvision", "name": "mobilenet_v3_small"},
    {"kind": "torchvision", "name": "shufflenet_v2_x0_5", "stem": "cifar"},
    pytest.param({"kind": "torchvision", "name": "efficientnet_b0"}, marks=pytest.mark.slow),
]


def task(model: dict[str, Any]) -> ImageClassification:
    return ImageClassification.model_validate({"kind": "image-classification", "model": model})


def build(model: dict[str, Any], *, checkpointed: bool) -> nn.Module:
    torch.manual_seed(0)
    built = image_classification.build_model(task(model), INFO)
    if checkpointed:
        apply_activation_checkpointing(built)
    return built


def backward(model: nn.Module, chosen: ImageClassification, dtype: torch.dtype) -> Tensor:
    images = torch.randn(3, *INFO.input_shape, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)  # of dropout
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, _ = image_classification.loss(
            chosen, model, Batch({"inputs": images, "targets": torch.arange(3)})
        )
    loss.backward()
    return loss.detach()


def state(model: nn.Module) -> dict[str, Tensor | None]:
    gradients = {f"{name}.grad": item.grad for name, item in model.named_parameters()}
    return {**model.state_dict(), **gradients}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.get("name", model["kind"]))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_gradients_and_buffers_are_bit_identical(model: dict[str, Any], dtype: torch.dtype):
    usual, ours = build(model, checkpointed=False), build(model, checkpointed=True)
    for _ in range(2):
        assert torch.equal(backward(usual, task(model), dtype), backward(ours, task(model), dtype))
    expected, got = state(usual), state(ours)
    assert list(expected) == list(got)
    for name, tensor in expected.items():
        other = got[name]
        assert (tensor is None and other is None) or torch.equal(tensor, other), name


def saved_bytes(model: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward, weights aside."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(torch.randn(8, *INFO.input_shape))
    del output
    return sum(kept.values())


def test_less_is_kept_for_backward():
    usual, ours = (build(RESNET9, checkpointed=checkpointed) for checkpointed in (False, True))
    assert saved_bytes(ours) < 0.5 * saved_bytes(usual)


def test_a_deep_copy_runs_itself():
    model = build(SMALLNET, checkpointed=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(torch.randn(2, 3, 32, 32)).any()
    assert model(torch.randn(2, 3, 32, 32)).any()


def test_evaluation_is_untouched():
    usual, ours = (
        build(SMALLNET, checkpointed=checkpointed).eval() for checkpointed in (False, True)
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(usual(images), ours(images))


def test_no_value_is_read_by_the_host():
    model = build(RESNET9, checkpointed=True)
    with HostReads() as reads:
        backward(model, task(RESNET9), torch.float32)
    assert reads.count == 0


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match="no blocks") as caught:
        build({"kind": "torchvision", "name": "alexnet"}, checkpointed=True)
    assert caught.value.problems[0].path == "engine.activation_checkpointing"


@pytest.mark.slow
def test_a_compiled_model_updates_its_statistics_once():
    usual, ours = build(SMALLNET, checkpointed=False), build(SMALLNET, checkpointed=True)
    backward(usual, task(SMALLNET), torch.float32)
    backward(torch.compile(ours, dynamic=False), task(SMALLNET), torch.float32)
    expected, got = state(usual), state(ours)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
