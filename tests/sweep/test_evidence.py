"""What is read out of finished runs, against computing it from the tensors themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpcli.precision.statistics import Key, Samples
from mpcli.records import LayerRecord, ModuleTypes
from mpcli.rundir import RunDirectory
from mpcli.sweep.evidence import evidence_of
from mpcli.sweep.prediction import Prediction
from tests.small import run_small

PRODUCT = ModuleTypes(stored="fp32", computed="fp16", gradient="fp32", operands="fp16")
NORM = ModuleTypes(stored="fp32", computed="fp16", gradient="fp32")


class Recorded:
    """As much of a run directory as evidence needs."""

    def __init__(self, *rows: LayerRecord, **types: ModuleTypes) -> None:
        self.rows, self.types = rows, types

    def layers(self) -> list[LayerRecord]:
        return list(self.rows)

    def observed(self) -> dict[str, ModuleTypes]:
        return self.types


def row(
    tensor: torch.Tensor,
    key: Key,
    *,
    shadow: torch.Tensor | None = None,
    scale: float = 1.0,
    step: int = 1,
) -> LayerRecord:
    samples = Samples(torch.device("cpu"))
    samples.begin(scale)
    samples.add(tensor, key, scaled=True, shadow=shadow)
    (found,) = samples.finish().records(step, 1) or []
    return found


def evidence(*rows: LayerRecord, **types: ModuleTypes) -> dict[str, object]:
    return evidence_of(Recorded(*rows, **types))  # type: ignore[arg-type]


def grad(name: str) -> Key:
    return Key(name.rpartition(".")[0], "grad", name)


def test_a_histogram_is_of_all_moments_and_calls() -> None:
    rows = [
        row(torch.tensor([0.0, 1.5, 0.3]), Key("a", "grad_output", "a", 0), step=1),
        row(torch.tensor([0.0, 0.3, 0.3]), Key("a", "grad_output", "a", 1), step=1),
        row(torch.tensor([0.0, 3.0, 3.0]), Key("a", "grad_output", "a", 0), step=5),
        row(torch.tensor([7.0]), Key("a", "output", "a"), step=1),
        row(torch.tensor([-9.0]), Key("a", "output", "a"), step=5),
    ]
    found = evidence(*rows)
    (histogram,) = found["histograms"]  # type: ignore[misc]
    assert (histogram.elements, histogram.max, histogram.zeros) == (6, 3.0, pytest.approx(1 / 3))
    assert (histogram.lowest, histogram.counts) == (-2, (3, 0, 1, 2))
    assert found["outputs_max"] == {"a": 9.0}


def test_a_moment_at_which_fp32_itself_overflows_is_left_out() -> None:
    finite, infinite = torch.tensor([1.5, 0.3]), torch.tensor([torch.inf, 0.3])
    rows = [row(finite, grad("a.weight")), row(infinite, grad("a.weight"), step=5)]
    assert evidence(*rows)["histograms"] == evidence(rows[0])["histograms"]
    assert evidence(rows[1])["histograms"] == ()


def test_only_what_fp16_holds_counts() -> None:
    values = torch.tensor([1.0, 2.0])
    rows = [
        row(values.half(), Key("linear", "grad_output", "linear"), shadow=values),
        row(values, Key("norm", "grad_output", "norm"), shadow=values),
        row(values, grad("linear.weight"), shadow=values),
        row(values, grad("norm.weight"), shadow=values),
    ]
    layers = evidence(*rows, linear=PRODUCT, norm=NORM)["layers"]
    assert [layer.name for layer in layers] == ["linear", "linear.weight"]  # type: ignore[attr-defined]


def test_shares_are_of_what_is_not_zero_in_the_shadow() -> None:
    true = torch.tensor([0.0, 0.0, 2.0**-30, 2.0**-20, 1.0, 2.0**18])
    layers = evidence(row(true.half(), Key("a", "grad_output", "a"), shadow=true))["layers"]
    (layer,) = layers  # type: ignore[misc]
    shares = {"underflow": 0.25, "subnormal": 0.25, "overflow": 0.25}
    assert layer.fractions.model_dump() == pytest.approx(shares)


def test_the_gradient_error_is_that_of_all_parameters_together() -> None:
    torch.manual_seed(0)
    scale = 2.0**-10
    true = [torch.randn(100) * 2.0**-8, torch.randn(50) * 2.0**-14]
    held = [(one * scale).half() for one in true]
    names = ["a.weight", "b.weight"]
    rows = [
        row(h, grad(name), shadow=t, scale=scale)
        for h, t, name in zip(held, true, names, strict=True)
    ]
    error = evidence(*rows)["gradient_error"]
    mine, exact = torch.cat(held).double() / scale, torch.cat(true).double()
    relative = (mine - exact).norm() / exact.norm()
    assert error.relative == pytest.approx(relative.item(), rel=1e-6)  # type: ignore[attr-defined]
    cosine = torch.cosine_similarity(mine, exact, dim=0)
    assert error.cosine == pytest.approx(cosine.item(), rel=1e-9)  # type: ignore[attr-defined]


def test_a_gradient_that_is_all_lost_points_nowhere_and_an_overflow_is_no_error() -> None:
    true = torch.full((4,), 2.0**-30)
    lost = row(true.half(), grad("a.weight"), shadow=true)
    error = evidence(lost)["gradient_error"]
    assert (error.cosine, error.relative) == (0.0, 1.0)  # type: ignore[attr-defined]
    infinite = row((true * 2.0**60).half(), grad("a.weight"), shadow=true, scale=2.0**60, step=2)
    assert evidence(lost, infinite)["gradient_error"] == error
    assert evidence(infinite)["gradient_error"] is None


def test_a_bias_whose_gradient_is_rounding_is_left_out() -> None:
    torch.manual_seed(0)
    outputs = row(torch.randn(64, 8) * 1e-3, Key("key", "grad_output", "key"))
    noise, real = torch.randn(8) * 1e-9, torch.randn(8) * 1e-5

    def names(bias: torch.Tensor) -> list[str]:
        found = evidence(outputs, row(bias, grad("key.bias")))["histograms"]
        return [one.name for one in found]  # type: ignore[attr-defined]

    assert names(noise) == ["key"]
    assert names(real) == ["key", "key.bias"]


def test_a_run_that_was_not_sampled_says_nothing(tmp_path: Path) -> None:
    run, _ = run_small(tmp_path, "probe.every=0")
    assert evidence_of(run) == {}


def test_the_prediction_is_what_a_real_step_loses(tmp_path: Path) -> None:
    """The same weights and the same batch: the first step. `make verify` has three models."""

    def evidence_at(name: str, precision: str) -> dict[str, object]:
        run, _ = run_small(
            tmp_path,
            f"precision={precision}",
            "probe={every: 0, steps: [1]}",
            "train.steps=1",
            name=name,
        )
        return evidence_of(RunDirectory.read(run.path))

    scale = 2.0**-8
    fp32 = evidence_at("fp32", "{mode: fp32}")
    half = evidence_at("half", f"{{mode: fp16, loss_scale: {{kind: static, scale: {scale}}}}}")
    measured = {layer.name: layer for layer in half["layers"]}  # type: ignore[attr-defined]
    histograms = [one for one in fp32["histograms"] if one.name in measured]  # type: ignore[attr-defined]
    predicted = Prediction(histograms).layers(scale)
    assert len(predicted) == len(measured) > 15
    assert max(layer.fractions.underflow for layer in predicted) > 0.05
    for layer in predicted:
        if layer.elements > 1000:
            seen = measured[layer.name].fractions
            assert layer.fractions.underflow == pytest.approx(seen.underflow, abs=0.04), layer.name
            assert layer.fractions.subnormal == pytest.approx(seen.subnormal, abs=0.04), layer.name
