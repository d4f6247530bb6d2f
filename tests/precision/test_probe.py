"""Hooks that gather the outputs of modules and their gradients on sampled steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpcli.precision.probe import MAX_CALLS, ActivationHooks, probed_modules
from mpcli.precision.statistics import Samples
from mpcli.records import LayerRecord


def probe(model: nn.Module, inputs: Tensor, samples: Samples | None = None) -> list[LayerRecord]:
    samples = samples or Samples(torch.device("cpu"))
    with ActivationHooks(model, samples):
        output = model(inputs)
    output.square().sum().backward()
    return samples.finish().records(1, 1) or []


def test_every_leaf_has_its_output_and_the_gradient_of_that() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    )
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        seen[f"output {name}"] = output.detach().clone()
        output.register_hook(
            lambda gradient: seen.update({f"grad_output {name}": gradient.clone()})
        )

    for name, module in model.named_children():
        module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    rows = probe(model, torch.randn(5, 3))
    assert {f"{row.tensor} {row.name}" for row in rows} == set(seen)
    for row in rows:
        tensor = seen[f"{row.tensor} {row.name}"]
        assert row.max == tensor.abs().max().item()
        assert row.zeros == (tensor == 0).double().mean().item()
        assert row.module == row.name


def test_owners_of_parameters_are_probed_though_they_have_children() -> None:
    attention = nn.MultiheadAttention(4, 2)
    assert set(probed_modules(attention)) == {"", "out_proj"}


def test_calls_of_a_module_are_told_apart_up_to_a_number() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(MAX_CALLS + 3):
                x = self.cell(x)
            return x

    rows = probe(Loop(), torch.ones(1, 2))
    assert sorted(row.call for row in rows if row.tensor == "output") == list(range(MAX_CALLS))
    assert sorted(row.call for row in rows if row.tensor == "grad_output") == list(range(MAX_CALLS))


def test_a_parameter_that_is_an_output_keeps_no_hook() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = Token()

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = x + self.token(x)
            return output

    model = Sum()
    rows = [probe(model, torch.ones(2, 3)) for _ in range(3)][-1]
    assert [row.tensor for row in rows if row.name == "token"] == ["output"]
    assert not model.token.weight._backward_hooks


def test_of_several_backwards_the_first_one_counts() -> None:
    model, samples = nn.Linear(3, 2), Samples(torch.device("cpu"))
    with ActivationHooks(model, samples):
        loss = model(torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    (7 * loss).backward()
    (row,) = [r for r in samples.finish().records(1, 1) or [] if r.tensor == "grad_output"]
    assert row.max == 1.0


def test_outputs_whose_elements_cannot_be_looked_at_are_left_out() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
            return {"sparse": x.to_sparse(), "jagged": nested, "numbers": x.long(), "dense": x}

    samples = Samples(torch.device("cpu"))
    model = Odd()
    with ActivationHooks(model, samples):
        model(torch.ones(2, 3))
    assert [row.max for row in samples.finish().records(1, 1) or []] == [1.0]
    linear = nn.Linear(3, 2)
    with ActivationHooks(linear, samples):
        torch.vmap(linear)(torch.ones(4, 3))


def test_every_tensor_of_an_output_is_looked_at() -> None:
    rows = probe_lstm()
    assert {row.name for row in rows if row.tensor == "output"} >= {"0", "0[1]", "0[2]"}


def probe_lstm() -> list[LayerRecord]:
    class First(nn.Module):
        def forward(self, outputs: Any) -> Tensor:
            return outputs[0]  # type: ignore[no-any-return]

    return probe(nn.Sequential(nn.LSTM(3, 4), First()), torch.ones(2, 1, 3))


def test_what_is_computed_again_in_backward_does_not_count_again() -> None:
    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    rows = probe(Recomputed(), torch.ones(2, 3, requires_grad=True))
    assert [row.call for row in rows if (row.tensor, row.name) == ("output", "inner")] == [0]


def test_afterwards_no_hook_is_left_and_the_training_was_the_same() -> None:
    def trained(*, probed: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 2)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            inputs = torch.randn(20_000, 3)
            if probed:
                probe(model, inputs)
            else:
                model(inputs).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    plain, probed = trained(probed=False), trained(probed=True)
    for own, other in zip(plain.parameters(), probed.parameters(), strict=True):
        assert torch.equal(own, other)
    for module in probed.modules():
        assert not module._forward_hooks
