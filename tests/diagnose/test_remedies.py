"""Suggestions for a run of ours: what they set can be loaded, and means what it says."""

from dataclasses import replace

import pytest

from mpcli.diagnose import remedies
from mpcli.diagnose.evidence import Evidence
from mpcli.diagnose.facts import Facts
from mpcli.precision.observe import LOSS
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.load import load_recipe

RECIPE = """\
name: small
task: {kind: image-classification, model: {kind: smallnet}}
data: {kind: digits}
precision: {mode: fp16}
optim: {kind: adamw, lr: 0.1}
train: {steps: 4, global_batch_size: 8}
"""


@pytest.fixture
def evidence(tmp_path):
    def make(*settings: str) -> Evidence:
        (tmp_path / "recipe.yaml").write_text(RECIPE)
        recipe = load_recipe(tmp_path / "recipe.yaml", settings).recipe
        return replace(Evidence(Facts(path="x", kind="run")), recipe=recipe)

    return make


def followed(evidence: Evidence, suggestion, tmp_path):
    path = tmp_path / "resolved.yaml"
    path.write_text(resolved_yaml(evidence.recipe))
    return load_recipe(path, suggestion.set).recipe.precision


PURE = ("precision.mode=bf16-pure", "precision.stochastic_rounding=true")


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ((), ["bf16", "fp32"]),
        (("precision.mode=fp16-master",), ["bf16-master", "fp32"]),
        (("precision.mode=bf16",), ["fp32"]),
        (PURE, ["fp32"]),
        (("precision.mode=fp32",), ["fp32"]),
    ],
)
def test_a_wider_format_is_another_one(evidence, tmp_path, settings, modes):
    before = evidence(*settings)
    found = [followed(before, suggestion, tmp_path) for suggestion in remedies.wide(before)]
    assert [precision.mode for precision in found] == modes
    assert {precision.loss_scale.kind for precision in found} == {"none"}
    assert not any(precision.stochastic_rounding for precision in found)


def test_what_runs_outside_of_any_module_is_no_name_of_a_layer(evidence, tmp_path):
    before = evidence()
    for module, first in (("", ()), (LOSS, (LOSS,)), ("head", ("head",))):
        suggestion = remedies.fp32_module(before, module)[0]
        assert followed(before, suggestion, tmp_path).sensitive_layers == first


@pytest.mark.parametrize("largest", [0.02, 0.0011, 3.0, 1e-9, 60000.0])
def test_a_static_scale_is_a_power_of_two_with_a_bit_to_spare(evidence, tmp_path, largest):
    before = evidence()
    scale = followed(before, remedies.static_scale(before, largest), tmp_path).loss_scale.scale
    assert scale.hex().startswith("0x1.0000000000000p")
    assert scale == 2.0**24 or scale == 1.0 or 65504 / 4 < largest * scale <= 65504 / 2
