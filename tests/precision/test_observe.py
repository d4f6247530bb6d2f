"""The observer says what really ran, and in which type: asserted module by module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpcli.precision.cpu_autocast import cuda_autocast_policy
from mpcli.precision.formats import dtype_name
from mpcli.precision.observe import TypesObserver, observed_types
from mpcli.tasks import apply_activation_checkpointing
from tests.host_reads import HostReads

HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("half", HALVES, ids=dtype_name)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            nn.Identity(),
            nn.Flatten(),
        )
        self.head = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        logits: Tensor = self.head(features)
        return logits * 0.125


MODEL_ORDER = ["", *(f"body.{i}" for i in range(5)), "head", "loss"]


def convnet() -> tuple[nn.Module, Tensor]:
    return ConvNet(), torch.ones(2, 1, 8, 8)


def transformer() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return layer, torch.ones(2, 4, 8)


def classify(model: nn.Module, inputs: Tensor) -> Tensor:
    """A task's loss: outside the model, in fp32."""
    logits = model(inputs)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="sum")


def autocast(half: torch.dtype) -> torch.amp.autocast:
    return torch.amp.autocast("cpu", dtype=half)


def observe(
    make: Callable[[], tuple[nn.Module, Tensor]],
    half: torch.dtype,
    *,
    fake: bool = False,
    training: bool = True,
) -> TypesObserver:
    with FakeTensorMode() if fake else nullcontext(), cuda_autocast_policy():
        model, inputs = make()
        model.train(training)
        with TypesObserver(model) as observer, autocast(half):
            classify(model, inputs)
    return observer


@halves
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_a_convnet_under_autocast(half: torch.dtype, fake: bool) -> None:
    name = dtype_name(half)
    observer = observe(convnet, half, fake=fake)
    assert observer.computed == {
        "": name,  # the product with 0.125
        "body.0": name,
        "body.1": name,  # its statistics, which are fp32, do not count
        "body.2": name,
        "body.3": name,
        "body.4": name,
        "head": name,
        "loss": "fp32",
    }
    assert list(observer.computed) == sorted(observer.computed, key=MODEL_ORDER.index)


def test_a_dropout_that_drops_nothing_computes_nothing() -> None:
    assert "body.4" not in observe(convnet, torch.bfloat16, training=False).computed


@halves
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_transformer_under_autocast(half: torch.dtype, fake: bool, training: bool) -> None:
    name = dtype_name(half)
    observer = observe(transformer, half, fake=fake, training=training)
    assert observer.computed == {
        "": f"{name}+fp32",  # ReLU in half; residual sums with a norm's output in fp32
        "self_attn": name,  # its `out_proj` does not run as a module
        "linear1": name,
        "linear2": name,
        "norm1": "fp32",
        "norm2": "fp32",
        "loss": "fp32",
    }
    assert observer.softmax_in == {"self_attn"}


@halves
def test_torchs_fused_transformer_layer_runs_by_operation(half: torch.dtype) -> None:
    with torch.no_grad():
        observer = observe(transformer, half, training=False)
    assert observer.computed["linear1"] == dtype_name(half)
    assert observer.softmax_in == {"self_attn"}


@pytest.mark.parametrize(
    ("policy", "computed"), [(cuda_autocast_policy, "bf16+fp32"), (nullcontext, "bf16")]
)
def test_a_softmax_beside_products_shows(policy: Callable[[], Any], computed: str) -> None:
    """CPU autocast keeps it in half, CUDA's policy computes it in fp32."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            queries, keys = self.qk(x).chunk(2, -1)
            return torch.softmax(queries @ keys.mT, -1) @ x

    model = nn.Sequential(Attention())
    with policy(), TypesObserver(model) as observer, autocast(torch.bfloat16):
        model(torch.ones(2, 3, 4))
    assert observer.computed == {"0": computed, "0.qk": "bf16"}
    assert observer.softmax_in == {"0"}


def test_what_fused_attention_decomposes_into_shows() -> None:
    model, inputs = transformer()
    with (
        sdpa_kernel(SDPBackend.MATH),
        TypesObserver(model) as observer,
        autocast(torch.bfloat16),
    ):
        model(inputs)
    assert observer.computed["self_attn"] == "bf16+fp32"
    assert observer.softmax_in == {"self_attn"}


def _in_fp32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.amp.autocast("cpu", enabled=False):
        return forward(x.float()).to(x.dtype)


@halves
@pytest.mark.parametrize("name", ["body.0", "body.1", "head"])
def test_an_fp32_island_is_fp32(half: torch.dtype, name: str) -> None:
    """Its casts do not count."""
    model, inputs = convnet()
    island = model.get_submodule(name)
    island.forward = partial(_in_fp32, island.forward)
    before = observe(convnet, half).computed
    with TypesObserver(model) as observer, autocast(half):
        classify(model, inputs.to(half))
    assert observer.computed == before | {name: "fp32"}


@halves
def test_half_weights_without_autocast(half: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)).to(half)
    with TypesObserver(model) as observer:
        model(torch.tensor([1, 2]))
    assert observer.computed == dict.fromkeys(("0", "1", "2"), dtype_name(half))


def test_moving_numbers_is_no_computation() -> None:
    class Mover(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.cat([x.half(), x.bfloat16()], 1).float().detach().clone().mT.contiguous()
            x = F.pad(x.flip(0).roll(1)[:, torch.tensor([1, 0])], (0, 1)).repeat(2, 1)
            torch.zeros_like(x).normal_()
            torch.arange(3) / 2
            return torch.stack([x, x]).chunk(2)[0].expand(3, -1, -1)

    model = nn.Sequential(Mover(), nn.Identity(), nn.Flatten(), nn.Dropout(0.5).eval())
    with TypesObserver(model) as observer:
        assert (model(torch.ones(2, 2)) > 0).any()
    assert observer.computed == {}


def test_a_module_that_runs_twice_has_the_types_of_both_runs() -> None:
    """The name is its first one."""
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"first": layer, "second": nn.Sequential(layer)})
    with TypesObserver(model) as observer:
        model["first"](torch.ones(1, 2))
        with autocast(torch.bfloat16):
            model["second"](torch.ones(1, 2))
    assert observer.computed == {"first": "bf16+fp32"}


def test_what_hooks_compute_belongs_to_their_module() -> None:
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model[0].register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)
    model[1].register_forward_hook(lambda module, inputs, output: output.half() * 2)
    with TypesObserver(model) as observer:
        model(torch.ones(2))
    assert observer.computed == {"0": "fp32", "1": "fp16"}


def hooks(model: nn.Module) -> list[object]:
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [hook for m in model.modules() for name in kept for hook in getattr(m, name)]


def test_an_exception_leaves_nothing_behind() -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("on purpose")

    class Catching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), Failing())

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.inner(x)
            except ValueError:
                return x.half() * 2

    model = nn.Sequential(Catching(), nn.Linear(2, 2).half(), Failing())
    observer = TypesObserver(model)
    with pytest.raises(ValueError, match="on purpose"), observer:
        model(torch.ones(1, 2))
    assert observer.computed == {"0": "fp16", "0.inner.0": "fp32", "1": "fp16"}
    assert hooks(model) == []
    torch.ones(2) * 2
    assert "loss" not in observer.computed


@pytest.mark.parametrize("backward_inside", [True, False])
def test_backward_and_what_it_computes_again_do_not_count(backward_inside: bool) -> None:
    def checkpointed() -> tuple[nn.Module, Tensor]:
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2)]
        model = nn.Sequential(*blocks, nn.Linear(4, 2))
        apply_activation_checkpointing(model)
        return model, torch.ones(2, 4)

    forward_only = observe(checkpointed, torch.bfloat16).computed
    assert set(forward_only) == {"0.0", "0.1", "1.0", "1.1", "2", "loss"}
    model, inputs = checkpointed()
    with TypesObserver(model) as observer, autocast(torch.bfloat16):
        loss = classify(model, inputs)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    assert observer.computed == forward_only
    assert model[0][0].weight.grad is not None


@pytest.mark.parametrize("outside", [True, False])
def test_other_dispatch_modes_may_be_around_and_within(outside: bool) -> None:
    model, inputs = convnet()
    expected = observe(convnet, torch.bfloat16).computed
    observer, reads = TypesObserver(model), HostReads()
    first, second = (reads, observer) if outside else (observer, reads)
    with first, second, autocast(torch.bfloat16):
        classify(model, inputs)
    assert observer.computed == expected
    assert reads.count == 0


def test_a_compiled_model_runs_by_operation_while_it_is_observed() -> None:
    model, inputs = convnet()
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend, dynamic=False)
    with TypesObserver(model) as observer, autocast(torch.bfloat16):
        classify(model, inputs)
    assert observer.computed == observe(convnet, torch.bfloat16).computed
    assert graphs == []
    model(inputs)
    assert len(graphs) == 1


def test_observed_types_hold_storage_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2).half(), nn.ReLU(), nn.Linear(2, 2))
    with TypesObserver(model) as observer:
        loss = model[2](model[1](model[0](torch.ones(1, 2).half())).float()).sum()
    loss.backward()
    types = {
        name: (types.stored, types.computed, types.gradient)
        for name, types in observed_types(model, observer).items()
    }
    assert types == {
        "": ("-", "-", "-"),
        "0": ("fp16", "fp16", "fp16"),
        "1": ("-", "fp16", "-"),
        "2": ("fp32", "fp32", "fp32"),
        "loss": ("-", "fp32", "-"),
    }


def test_the_loss_is_observed_and_an_operation_has_the_type_of_its_result() -> None:
    class Sums(nn.Module):
        """Half in, fp32 out."""

        def forward(self, x: Tensor) -> Tensor:
            return x.sum(-1, dtype=torch.float32)

    model = Sums()
    with TypesObserver(model) as observer:
        model(torch.ones(2, 3).bfloat16()).bfloat16().square()
    observed = observed_types(model, observer)
    assert observed[""].computed == "fp32"
    assert observed["loss"].computed == "bf16"
