"""The trace names the module that made a non-finite value, not its neighbour."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mpcli.precision.convert import convert
from mpcli.precision.numerics import numerics
from mpcli.precision.trace import WEIGHTS, ModuleTrace, defect
from mpcli.records import NonFiniteOrigin


class Faulty(torch.autograd.Function):
    """The identity, but for what is added forward and backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ahead: float, back: float) -> Tensor:
        ctx.back = back
        return values + ahead

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient + ctx.back, None, None


class Fault(nn.Module):
    def __init__(self, ahead: float = 0.0, back: float = 0.0) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back

    def forward(self, values: Tensor) -> Tensor:
        return Faulty.apply(values, self.ahead, self.back)


def traced(
    model: nn.Module, inputs: Tensor, loss: Callable[[Tensor], Tensor] = lambda y: y.sum()
) -> NonFiniteOrigin | None:
    with ModuleTrace(model) as trace:
        value = loss(model(inputs))
        trace.watch(value)
        value.backward()
    return trace.origin


def mlp(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), *between, nn.Linear(8, 3))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def test_a_healthy_step_has_no_origin() -> None:
    assert traced(mlp(), ones(2, 4)) is None


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize(("kind", "value"), [("nan", math.nan), ("inf", math.inf)])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_producing_module_is_named(place: int, kind: str, value: float, phase: str) -> None:
    layers = [*mlp(nn.Linear(8, 8))]
    layers[place] = nn.Sequential(
        layers[place], Fault(value, 0.0) if phase == "forward" else Fault(0.0, value)
    )
    origin = traced(nn.Sequential(*layers), ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.phase) == (f"{place}.1", phase)
    assert origin.value == kind


def test_an_overflow_of_a_product_is_the_layers_and_not_the_next_ones() -> None:
    model = mlp(nn.LayerNorm(8)).half()
    model[0].weight.data.fill_(60000.0)
    origin = traced(model, ones(2, 4).half())
    assert origin is not None
    assert (origin.module, origin.phase, origin.value) == ("0", "forward", "inf")
    assert origin.operation == "addmm"


def test_a_layer_with_a_nan_weight_is_named() -> None:
    model = mlp()
    model[2].weight.data[0, 0] = math.nan
    origin = traced(model, ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.phase, origin.operation) == ("2", "forward", WEIGHTS)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_bad_batch_is_the_inputs_fault(value: float) -> None:
    inputs = ones(2, 4)
    inputs[0, 0] = value
    origin = traced(mlp(), inputs)
    assert origin is not None
    assert (origin.module, origin.phase, origin.value) == ("", "input", "inf")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_targets_that_are_not_finite_came_with_the_batch(value: float) -> None:
    targets = ones(2, 3)
    targets[1, 2] = value
    origin = traced(mlp(), ones(2, 4), lambda y: F.mse_loss(y, targets))
    assert origin is not None
    assert (origin.module, origin.phase) == ("", "input")


class MaskedBlock(nn.Module):
    """Attention whose -inf mask has a gradient, as those made of scores have."""

    def __init__(self, ahead: float, back: float) -> None:
        super().__init__()
        self.mask = Causal()
        self.proj = nn.Sequential(nn.Linear(4, 4), Fault(ahead, back))

    def forward(self, values: Tensor) -> Tensor:
        scores = self.mask(values @ values.mT)
        return values + self.proj(scores.softmax(-1) @ values)


class Causal(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(ones(*scores.shape[-2:]).triu(1) > 0, -math.inf)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("ahead", "back"), [(math.inf, 0.0), (0.0, math.inf), (0.0, math.nan)])
def test_a_mask_takes_no_blame_for_what_comes_after_it(
    place: int, ahead: float, back: float
) -> None:
    torch.manual_seed(0)
    faults = [(ahead, back) if number == place else (0.0, 0.0) for number in range(2)]
    model = nn.Sequential(nn.Linear(4, 4), *(MaskedBlock(*fault) for fault in faults))
    origin = traced(model, torch.randn(2, 3, 4))
    assert origin is not None
    phase = "forward" if ahead else "backward"
    assert (origin.module, origin.phase) == (f"{place + 1}.proj.1", phase)


def test_a_row_that_is_masked_throughout_is_the_softmaxs_fault() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mask = Causal()
            self.softmax = nn.Softmax(-1)

        def forward(self, values: Tensor) -> Tensor:
            scores = self.mask(values @ values.mT)
            hidden = torch.where(ones(3, 1) > 0, -math.inf, scores)
            return self.softmax(hidden) @ values

    model = nn.Sequential(nn.Linear(4, 4), Attention())
    origin = traced(model, torch.randn(2, 3, 4))
    assert origin is not None
    assert (origin.module, origin.value, origin.phase) == ("1.softmax", "nan", "forward")


def test_a_learned_bias_with_minus_infinity_takes_no_blame_either() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3, 3))
            self.up = nn.Sequential(nn.Linear(4, 4), Fault(math.inf))

        def forward(self, values: Tensor) -> Tensor:
            bias = self.bias.masked_fill(ones(3, 3).triu(1) > 0, -math.inf)
            scores = F.scaled_dot_product_attention(values, values, values, attn_mask=bias)
            return self.up(scores)

    origin = traced(Biased(), torch.randn(2, 3, 4))
    assert origin is not None
    assert (origin.module, origin.phase) == ("up.1", "forward")


def test_minus_infinity_is_named_where_it_is_no_mask() -> None:
    origin = traced(nn.Sequential(mlp(), Fault(-math.inf), nn.Identity()), ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.phase) == ("1", "forward")


def test_what_hides_tensors_in_an_object_hides_no_module() -> None:
    class State:
        def __init__(self, values: Tensor) -> None:
            self.values = values

    class Layer(nn.Module):
        def __init__(self, ahead: float = 0.0, back: float = 0.0) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.fault = ahead, back

        def forward(self, state: State) -> State:
            return State(Faulty.apply(self.linear(state.values), *self.fault))

    class Model(nn.Module):
        def __init__(self, *layers: nn.Module) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, values: Tensor) -> Tensor:
            state = State(values)
            for layer in self.layers:
                state = layer(state)
            return state.values

    for fault in ((math.inf, 0.0), (0.0, math.nan)):
        origin = traced(Model(Layer(), Layer(*fault), Layer()), ones(2, 4))
        assert origin is not None
        assert origin.module == "layers.1"


def test_the_results_of_a_dataclass_with_slots_are_kept() -> None:
    @dataclass(slots=True)
    class Output:
        logits: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, values: Tensor) -> Output:
            return Output(self.linear(values))

    model = Model()
    with ModuleTrace(model, keep=True) as trace:
        loss = model(ones(2, 4)).logits.sum()
        trace.watch(loss)
        loss.backward()
    assert len(trace.kept["", 0].outputs[0]) == 4
    assert trace.kept["", 0].gradients[0].tolist() == [1.0] * 4


def test_fp8_is_looked_at() -> None:
    spoilt = ones(2).to(torch.float8_e5m2)
    assert defect(spoilt) is None
    assert defect(torch.full((2,), math.inf).to(torch.float8_e5m2)) == "inf"


def test_a_part_that_was_written_to_in_place_is_found_in_the_whole() -> None:
    class Written(nn.Module):
        def forward(self, values: Tensor) -> Tensor:
            whole = torch.zeros(2, 8)
            whole[:, :3].fill_(math.inf)
            return values + whole

    origin = traced(mlp(Written(), nn.Identity()), ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.operation) == ("2", "fill_")


def test_a_nan_loss_of_finite_outputs_is_the_losss() -> None:
    origin = traced(mlp(), ones(2, 4), lambda y: (y - y.max() - 1).log().sum())
    assert origin is not None
    assert (origin.module, origin.phase, origin.value) == ("loss", "forward", "nan")


def test_an_infinite_gradient_that_the_loss_makes_is_the_losss() -> None:
    origin = traced(mlp(), ones(2, 4), lambda y: (y - y.detach()).sqrt().sum())
    assert origin is not None
    assert (origin.module, origin.phase, origin.value) == ("loss", "backward", "inf")


class Residual(nn.Module):
    """Operations of its own between its children."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.own = nn.Linear(8, 8), nn.Linear(8, 8), own

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = values + self.second(self.own(self.first(values)))
        return result


@pytest.mark.parametrize(
    ("own", "phase"),
    [
        (lambda x: x * math.inf, "forward"),
        (lambda x: (x - x.detach()).sqrt(), "backward"),
        (lambda x: Faulty.apply(x, 0.0, math.nan), "backward"),
    ],
)
def test_what_a_container_computes_itself_is_its_own_fault(
    own: Callable[[Tensor], Tensor], phase: str
) -> None:
    origin = traced(mlp(Residual(own)), ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.phase) == ("2", phase)


def test_finite_gradients_that_add_up_to_infinity_are_the_fault_of_where_the_ways_part() -> None:
    model = mlp(Residual(lambda x: x)).half()
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(0.2)  # no ReLU is at 0
    for layer in (model[2].first, model[2].second):
        layer.weight.data.copy_(torch.eye(8))
    model[3].weight.data.copy_(torch.eye(3, 8))
    origin = traced(model, ones(1, 4).half(), lambda y: (y.float() * 40000).sum())
    assert origin is not None
    assert (origin.module, origin.phase) == ("2", "backward")
    assert (origin.value, origin.operation) == ("inf", "sum of gradients")


class Masked(nn.Module):
    """Attention with -inf in its scores, through a module of softmax."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.scores, self.softmax, self.after = nn.Linear(4, 4), nn.Softmax(-1), after

    def forward(self, values: Tensor) -> Tensor:
        mask = torch.ones(4, 4).triu(1).bool()
        scores = self.scores(values).masked_fill(mask, -math.inf)
        result: Tensor = self.after(self.softmax(scores) @ values)
        return result


def test_a_mask_of_infinities_is_nobodys_fault() -> None:
    assert traced(Masked(nn.Linear(4, 3)), ones(4, 4)) is None
    origin = traced(nn.Sequential(Masked(Fault(math.nan))), ones(4, 4))
    assert origin is not None
    assert origin.module == "0.after"


def test_a_mask_among_the_inputs_is_nobodys_fault() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)

        def forward(self, values: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(3)
            result: Tensor = self.layer(values, mask)
            return result

    assert traced(Model(), torch.randn(2, 3, 8)) is None


def test_an_infinity_of_a_frozen_layer_is_not_taken_for_a_mask() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(-math.inf)
    model[0].requires_grad_(False)
    model[1] = nn.Identity()
    origin = traced(model, ones(2, 4))
    assert origin is not None
    assert (origin.module, origin.phase, origin.value) == ("0", "forward", "inf")


def test_backward_may_begin_at_outputs_with_gradients_of_their_own() -> None:
    model = mlp(Fault(0.0, math.inf))
    with ModuleTrace(model) as trace:
        outputs = model(ones(2, 4)), model(ones(2, 4))
        trace.watch(*outputs)
        torch.autograd.backward(outputs, (ones(2, 3), ones(2, 3)))
    assert trace.origin is not None
    assert (trace.origin.module, trace.origin.phase) == ("2", "backward")


def test_a_nan_gradient_that_never_reaches_a_weight_is_nobodys_fault() -> None:
    # The derivative of a root at 0 is infinite, and that of the ReLU before it makes it 0.
    model = mlp()
    model[2] = nn.Identity()
    with torch.no_grad():
        model[0].weight.fill_(-1.0)
    assert traced(model, ones(2, 4), lambda y: y.relu().sqrt().sum()) is None


def test_what_a_later_module_made_finite_is_not_the_origin() -> None:
    # Infinity under a sigmoid: 1, with a gradient of 0. The NaN comes from the last layer.
    model = nn.Sequential(Fault(math.inf), nn.Sigmoid(), nn.Linear(4, 4), Fault(math.nan))
    origin = traced(model, ones(2, 4))
    assert origin is not None
    assert origin.module == "3"


def test_a_module_that_is_called_twice_is_named_with_its_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            nn.init.constant_(self.layer.weight, 500.0)

        def forward(self, values: Tensor) -> Tensor:
            result: Tensor = self.layer(self.layer(values))
            return result

    origin = traced(Twice().half(), ones(2, 4).half())
    assert origin is not None
    assert (origin.module, origin.call, origin.phase) == ("layer", 1, "forward")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("fault", "phase"), [(Fault(math.nan), "forward"), (Fault(0.0, math.inf), "backward")]
)
def test_recomputation_in_backward_does_not_confuse(
    fault: Fault, phase: str, reentrant: bool
) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.block = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), fault)
            self.last = nn.Linear(4, 4)

        def forward(self, values: Tensor) -> Tensor:
            inside = checkpoint(self.block, self.first(values), use_reentrant=reentrant)
            result: Tensor = self.last(inside)
            return result

    origin = traced(Checkpointed(), ones(2, 4))
    assert origin is not None
    # A reentrant block has one node for all of it, made by whoever called it.
    inside = "" if reentrant and phase == "backward" else "block.1"
    assert (origin.module, origin.phase) == (inside, phase)


@pytest.mark.parametrize("mode", ["fp16", "fp16-master", "fp16-pure"])
def test_a_cast_back_to_half_that_overflows_is_the_islands_fault(mode: Any) -> None:
    model = mlp(nn.LayerNorm(8))
    model[2].weight.data.fill_(1e6)
    convert(model, numerics(mode), torch.device("cpu"), ("2",))
    with torch.amp.autocast("cpu", torch.float16, enabled=mode == "fp16"):
        origin = traced(model, ones(2, 4), lambda y: y.float().sum())
    assert origin is not None
    assert (origin.module, origin.phase) == ("2", "forward")


def test_forward_alone_can_be_traced() -> None:
    model = mlp(Fault(math.nan))
    with ModuleTrace(model) as trace, torch.no_grad():
        model(ones(2, 4))
    assert trace.origin is not None
    assert trace.origin.module == "2"


def test_tensors_in_dictionaries_and_keyword_arguments_are_seen() -> None:
    class Inner(nn.Module):
        def forward(self, *, given: dict[str, Tensor]) -> dict[str, list[Tensor]]:
            return {"values": [given["x"] * 2]}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fault = Inner(), Fault(math.nan)
            self.weight = nn.Parameter(ones(4))

        def forward(self, values: Tensor) -> Tensor:
            faulty = self.fault(values * self.weight)
            return self.inner(given={"x": faulty})["values"][0]

    origin = traced(Model(), ones(4))
    assert origin is not None
    assert origin.module == "fault"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_every_layer_of_a_transformer_with_padding_is_named(phase: str, checkpointed: bool) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, num_hidden_layers=2, attn_implementation="eager", **sizes)
    model = BertForMaskedLM(config)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens, mask = torch.randint(0, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    fault = Fault(math.inf, 0.0) if phase == "forward" else Fault(0.0, math.inf)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)}
    for name, layer in layers.items():
        handle = layer.register_forward_hook(lambda layer, inputs, output: fault(output))
        with ModuleTrace(model.train()) as trace:
            loss = model(input_ids=tokens, attention_mask=mask, labels=tokens).loss
            trace.watch(loss)
            loss.backward()
        handle.remove()
        assert trace.origin is not None
        assert (trace.origin.module, trace.origin.phase) == (name, phase)


def test_nothing_of_the_trace_stays_and_nothing_is_changed() -> None:
    model, other = mlp(nn.Dropout(0.5)), mlp(nn.Dropout(0.5))
    torch.manual_seed(1)
    traced(model, ones(2, 4))
    torch.manual_seed(1)
    other(ones(2, 4)).sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        assert torch.equal(one.grad, two.grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_outputs_and_their_gradients_are_kept_as_they_were() -> None:
    model = mlp()
    inputs = ones(2, 4)
    hidden = F.linear(inputs, model[0].weight, model[0].bias).detach()
    with ModuleTrace(model, keep=True) as trace:
        loss = model(inputs).sum()
        trace.watch(loss)
        loss.backward()
    assert list(trace.kept) == [("0", 0), ("1", 0), ("2", 0), ("", 0)]
    # The ReLU in place has changed the tensor since then.
    assert torch.allclose(trace.kept["0", 0].outputs[0], hidden.flatten())
    assert torch.equal(trace.kept["2", 0].gradients[0], ones(6))
    behind = (ones(2, 3) @ model[2].weight.detach()) * (hidden > 0)
    assert torch.allclose(trace.kept["0", 0].gradients[0], behind.flatten())
    assert trace.kept["1", 0].inputs[0].numel() == 16


def test_detect_anomaly_lets_pass_what_the_trace_finds() -> None:
    model = mlp(Fault(0.0, math.inf))
    with torch.autograd.detect_anomaly(check_nan=True):
        model(ones(2, 4)).sum().backward()
    origin = traced(mlp(Fault(0.0, math.inf)), ones(2, 4))
    assert origin is not None
    assert origin.module == "2"
