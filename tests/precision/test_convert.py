"""fp32 islands: what is inside computes in fp32, forward and backward, among half neighbours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpcli.precision.convert import convert
from mpcli.precision.numerics import autocast, numeric_settings, numerics
from mpcli.precision.sensitive import sensitive_modules
from mpcli.recipe.precision import Mode, Precision
from mpcli.tasks import apply_activation_checkpointing

CPU = torch.device("cpu")
HALF_MODES: list[Mode] = [
    "fp16",
    "bf16",
    "fp16-master",
    "bf16-master",
    "fp16-pure",
    "bf16-pure",
]


class Products(TorchDispatchMode):
    """Notes the types of matrix products in the order they run."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm"):
            assert {a.dtype for a in args if isinstance(a, Tensor)} == {result.dtype}
            self.types.append(result.dtype)
        return result


def three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def converted(model: nn.Module, mode: Mode, *patterns: str) -> nn.Module:
    convert(model, numerics(mode), CPU, sensitive_modules(model, patterns))
    return model


@pytest.mark.parametrize("mode", HALF_MODES)
def test_an_island_computes_in_fp32_forward_and_backward(mode: Mode) -> None:
    meaning = numerics(mode)
    half, fp32 = meaning.compute, torch.float32
    model = converted(three_layers(), mode, "1")
    inputs = torch.randn(4, 8)
    with Products() as forward, autocast(meaning, CPU):
        outputs = model(inputs)
    assert forward.types == [half, fp32, half]
    with Products() as backward:
        outputs.float().sum().backward()
    # The input needs no gradient, so the first layer has one product.
    assert backward.types == [half, half, fp32, fp32, half]
    assert [p.dtype for p in model[1].parameters()] == [fp32, fp32]  # type: ignore[index]
    assert model[1].weight.grad.dtype == fp32  # type: ignore[index,union-attr]


@pytest.mark.parametrize("mode", HALF_MODES)
def test_an_island_returns_to_the_type_of_its_neighbours_but_the_head_does_not(mode: Mode) -> None:
    meaning = numerics(mode)
    model = converted(three_layers(), mode, "1", "head")
    types: list[torch.dtype] = []
    for layer in model.children():
        layer.register_forward_hook(lambda m, inputs, output: types.append(output.dtype))
    with autocast(meaning, CPU):
        model(torch.randn(4, 8))
    assert types == [meaning.compute, meaning.compute, torch.float32]


def test_an_islands_values_are_those_of_fp32_arithmetic() -> None:
    """fp16 rounds 2048 + 1 to 2048; fp32 does not."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2048.0, 1.0]]))
        model[1].weight.fill_(1.0)
    inputs = torch.ones(1, 2)
    assert converted(copy.deepcopy(model), "fp16-pure")(inputs).item() == 2048
    exact = converted(copy.deepcopy(model), "fp16-pure", "*")(inputs)
    assert exact.item() == 2049


@pytest.mark.parametrize("mode", ["fp32", "tf32"])
def test_in_32_bits_nothing_changes(mode: Mode) -> None:
    model = converted(three_layers(), mode, "1")
    assert all("forward" not in vars(module) for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Attends(nn.Module):
    """Softmax as a function, keyword arguments, a dictionary as output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.block = Block()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.block(self.layer(x), scale=2.0, mask=None)
        logits: Tensor = self.last(attended["values"])
        return logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, scale: float, mask: Tensor | None) -> dict[str, Any]:
        weights = F.softmax(scale * self.inner(x), -1)
        return {"values": weights, "index": torch.arange(3), "mask": mask, "type": weights.dtype}


@pytest.mark.parametrize("mode", HALF_MODES)
def test_a_module_of_modules_with_any_signature_can_be_an_island(mode: Mode) -> None:
    meaning = numerics(mode)
    model = converted(Attends(), mode, "block")
    seen: dict[str, Any] = {}
    model.block.register_forward_hook(  # type: ignore[union-attr]
        lambda m, inputs, output: seen.update(output)
    )
    with autocast(meaning, CPU):
        output = model(torch.randn(2, 8))
    assert seen["type"] == torch.float32  # inside
    assert seen["values"].dtype == meaning.compute  # outside
    assert seen["index"].dtype == torch.int64
    assert output.dtype == meaning.compute
    assert {p.dtype for p in model.block.parameters()} == {torch.float32}  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["bf16-master", "fp16-pure"])
def test_inputs_by_keyword_are_cast_too(mode: Mode) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.island = nn.Bilinear(8, 8, 8)
            self.last = nn.Linear(8, 8)

        def forward(self, *, x: Tensor) -> Tensor:
            hidden = self.inner(x)
            result: Tensor = self.last(self.island(input1=hidden, input2=hidden))
            return result

    model = converted(Gated(), mode, "island")
    assert model(x=torch.randn(2, 8)).dtype == numerics(mode).compute


@pytest.mark.parametrize("mode", ["fp32", "bf16", "bf16-master", "bf16-pure"])
def test_attention_takes_the_same_path_in_evaluation_as_in_training(mode: Mode) -> None:
    """torch's fused path computes an encoder layer as one operation, in types of its own."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = converted(layer, mode)
    meaning = numerics(mode)
    x = torch.randn(2, 3, 8)
    with numeric_settings(Precision(mode=mode), CPU), torch.no_grad(), autocast(meaning, CPU):
        outputs = [model.train(training)(x) for training in (True, False)]
    assert outputs[0].dtype == outputs[1].dtype
    assert torch.equal(*outputs)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("mode", ["fp16-master", "bf16-pure"])
def test_calls_of_softmax_compute_in_fp32_when_asked_for(mode: Mode) -> None:
    class Softmaxes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.types: list[torch.dtype] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "softmax" in func.overloadpacket.__name__:
                self.types.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    def types(*patterns: str) -> list[torch.dtype]:
        precision = Precision(mode=mode, sensitive_layers=patterns)
        model = converted(Attends(), mode, *patterns)
        attention = nn.MultiheadAttention(8, 2, batch_first=True).to(numerics(mode).weights)
        x = torch.randn(2, 3, 8)
        with numeric_settings(precision, CPU), Softmaxes() as softmaxes:
            output = model(x)
            assert output.dtype == numerics(mode).compute
            weights = attention(*[x.to(output.dtype)] * 3)[1]
            (output.float().sum() + weights.float().sum()).backward()
        return softmaxes.types

    assert set(types()) == {numerics(mode).compute}
    assert types("softmax") == [torch.float32] * 4  # two forwards, two backwards
    assert set(types()) == {numerics(mode).compute}  # and the setting ends with its block


@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
def test_softmax_in_fp32_is_that_of_fp32_and_keeps_the_type_asked_for(softmax: Any) -> None:
    precision = Precision(mode="fp16-pure", sensitive_layers=("softmax",))
    x = torch.randn(4, 64).half()
    exact = softmax(x.float(), -1)
    with numeric_settings(precision, CPU):
        assert torch.equal(softmax(x, -1), exact.half())
        assert torch.equal(softmax(x, -1, dtype=torch.float32), exact)
        assert torch.equal(softmax(x.float(), -1), exact)


@pytest.mark.parametrize("mode", HALF_MODES)
def test_shared_parameters_have_one_type(mode: Mode) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.middle = nn.Linear(8, 8)
            self.out = nn.Linear(8, 10, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.out(self.middle(self.embedding(tokens)))
            return logits

    meaning = numerics(mode)
    model = converted(Tied(), mode, "embedding")
    assert model.out.weight is model.embedding.weight  # type: ignore[union-attr]
    assert model.out.weight.dtype == torch.float32  # type: ignore[union-attr]
    with autocast(meaning, CPU):
        output = model(torch.arange(4))
    assert output.dtype == torch.float32  # it is the last layer
    output.sum().backward()
    assert model.middle.weight.grad.dtype == meaning.weights  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["fp16", "bf16-master", "fp16-pure"])
def test_names_copies_and_recomputation_survive(mode: Mode) -> None:
    meaning = numerics(mode)

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        return nn.Sequential(block, nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 3))

    x = torch.randn(4, 8)
    gradients = []
    for recomputes in (False, True):
        model = make()
        names = list(model.state_dict())
        if recomputes:
            apply_activation_checkpointing(model)
        converted(model, mode, "norm", "1")
        twin = copy.deepcopy(model)
        assert list(twin.state_dict()) == names
        with torch.no_grad():
            model[0][0].weight.fill_(7.0)  # type: ignore[index,operator]
        with numeric_settings(Precision(mode=mode), CPU), autocast(meaning, CPU):
            twin(x).float().square().sum().backward()
        assert model[0][0].weight.grad is None  # type: ignore[index]
        gradients.append([p.grad for p in twin.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("mode", ["fp16-master", "bf16-pure"])
def test_fp32_from_islands_and_constants_meets_half_weights(mode: Mode) -> None:
    class Model(nn.Module):
        """Its last module by name runs in the middle, and a constant is fp32."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.norm(self.first(x)) + torch.ones(8))
            return logits

    model = converted(Model(), mode, "norm")
    output = model(torch.randn(2, 8))
    assert output.dtype == numerics(mode).compute
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


@pytest.mark.parametrize("mode", HALF_MODES)
def test_what_is_in_a_list_of_modules_is_an_island_too(mode: Mode) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4)])
            self.head = nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            for block in self.blocks:
                values = block(values)
            result: Tensor = self.head(values)
            return result

    model, meaning = converted(Model(), mode, "blocks.*"), numerics(mode)
    with Products() as forward, autocast(meaning, CPU):
        model(torch.ones(2, 4))
    assert forward.types == [torch.float32, torch.float32, meaning.compute]
