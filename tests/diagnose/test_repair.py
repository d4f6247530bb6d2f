"""A recipe with a suggestion in it: the author's text, or all values where that cannot be."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mpcli.diagnose.finding import Finding, Suggestion
from mpcli.diagnose.repair import overrides, repaired
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.load import load_recipe
from mpcli.recipe.plugin import PluginFile, load_plugin

RECIPE = """\
# ours
name: small
task: {kind: image-classification, model: {kind: smallnet}}
data: {kind: digits}
precision:
  mode: fp16                # fast
  loss_scale: {kind: static, scale: 1024}   # tried
optim: {kind: sgd, lr: 0.1}
train: {steps: 4, global_batch_size: 8}  # short
"""


def repair(
    folder: Path,
    text: str,
    *settings: str,
    given: tuple[str, ...] = (),
    plugin: PluginFile | None = None,
) -> tuple[str, bool]:
    """What `settings` make of a run of the recipe, that was started with `given`."""
    source, resolved = folder / "source.yaml", folder / "resolved.yaml"
    source.write_text(text, "utf-8", newline="")
    resolved.write_text(resolved_yaml(load_recipe(source, given, plugin).recipe))
    out = folder / "out"
    out.mkdir()
    result, own = repaired(resolved, source, settings, out, plugin)
    assert not list(out.iterdir())
    (out / "fixed.yaml").write_text(result, newline="")
    fixed = load_recipe(out / "fixed.yaml", plugin=plugin).recipe
    wanted = load_recipe(resolved, settings, plugin).recipe
    assert resolved_yaml(fixed) == resolved_yaml(wanted)
    return result, own


def changed(before: str, after: str) -> list[str]:
    return [line for line in after.splitlines() if line not in before.splitlines()]


@pytest.mark.parametrize("scale", ["{kind: dynamic, init_scale: 1024.0}", "{kind: none}"])
def test_a_mode_that_was_given_changes_the_default_scale_too(tmp_path, scale):
    text = RECIPE.replace("fp16", "fp32").replace("  loss_scale", "  # loss_scale")
    repaired_text, own = repair(
        tmp_path, text, f"precision.loss_scale={scale}", given=("precision.mode=fp16",)
    )
    assert own
    assert len(changed(text, repaired_text)) == 2


def test_only_what_changes_is_changed(tmp_path):
    text, own = repair(tmp_path, RECIPE, "precision.loss_scale={kind: dynamic}")
    assert own
    assert changed(RECIPE, text) == ["  loss_scale: {kind: dynamic}   # tried"]


def test_changes_that_need_each_other(tmp_path):
    settings = ("precision.mode=bf16", "precision.loss_scale={kind: none}")
    text, own = repair(tmp_path, RECIPE, *settings)
    assert own
    assert changed(RECIPE, text) == [
        "  mode: bf16                # fast",
        "  loss_scale: {kind: none}   # tried",
    ]


def test_a_new_section_is_written_with_what_it_needs(tmp_path):
    text, own = repair(tmp_path, RECIPE, "train.clip={kind: norm, max_norm: 0.5}")
    assert own
    assert changed(RECIPE, text) == [
        "train: {steps: 4, global_batch_size: 8, clip: {kind: norm, max_norm: 0.5}}  # short"
    ]


def test_what_the_command_line_set_is_kept(tmp_path):
    text, own = repair(
        tmp_path, RECIPE, "optim.lr=0.01", given=("train.steps=7", "precision.mode=bf16")
    )
    assert own
    assert "train: {steps: 7, global_batch_size: 8}  # short" in text
    assert "  mode: bf16                # fast" in text
    assert "optim: {kind: sgd, lr: 0.01}" in text


@pytest.mark.parametrize(
    ("length", "given", "expected"),
    [
        ("{epochs: 2, global_batch_size: 8}", "steps=7", "{steps: 7, global_batch_size: 8}"),
        ("{global_batch_size: 8, steps: 7}", "epochs=2", "{global_batch_size: 8, epochs: 2}"),
        ("{epochs: 2, steps: null, global_batch_size: 8}", "steps=7",
         "{steps: 7, global_batch_size: 8}"),
    ],
)  # fmt: skip
def test_of_two_fields_that_exclude_each_other_one_takes_the_place(
    tmp_path, length, given, expected
):
    text = RECIPE.replace("{steps: 4, global_batch_size: 8}", length)
    after, own = repair(tmp_path, text, "optim.lr=0.01", given=(f"train.{given}",))
    assert own
    assert changed(text, after) == ["optim: {kind: sgd, lr: 0.01}", f"train: {expected}  # short"]


def test_a_fragment_of_the_package_stays_a_fragment(tmp_path):
    text = RECIPE.replace("optim: {kind: sgd, lr: 0.1}", "use: {optim: adamw-cosine}")
    text, own = repair(tmp_path, text, "optim.lr=0.5")
    assert own
    assert "use: {optim: adamw-cosine}" in text and "optim: {lr: 0.5}" in text


def test_a_fragment_that_is_not_there_is_written_out(tmp_path):
    (tmp_path / "configs" / "optim").mkdir(parents=True)
    (tmp_path / "configs" / "optim" / "mine.yaml").write_text("kind: sgd\nlr: 0.3\n")
    text = RECIPE.replace("optim: {kind: sgd, lr: 0.1}", "use: {optim: mine}")
    text, own = repair(tmp_path, text, "precision.mode=bf16", "precision.loss_scale={kind: none}")
    assert not own
    assert "# ours" not in text


def test_the_text_of_a_run_with_a_plugin_is_kept(tmp_path):
    text = RECIPE.replace(
        "{kind: image-classification, model: {kind: smallnet}}",
        "{kind: plugin, model: mlp, layer: loss, fault: none}",
    ).replace("digits", "plugin")
    plugin = load_plugin(str(Path(__file__).parent / "faulty_plugin.py"))
    after, own = repair(tmp_path, text, "optim.lr=0.01", plugin=plugin)
    assert own
    assert changed(text, after) == ["optim: {kind: sgd, lr: 0.01}"]


PLAIN = """\
name: small # 1
# 2
task: {kind: image-classification, model: {kind: smallnet}} # 3
data: {kind: digits}
optim: {kind: sgd, lr: 0.1}
train: {steps: 4, global_batch_size: 8} # 4
precision: # 5
  # 6
  mode: fp16 # 7
  loss_scale: # 8
    # 9
    kind: static # 10
    scale: 1024 # 11
"""
TEXTS = {
    "plain": PLAIN,
    "windows": PLAIN.replace("\n", "\r\n"),
    "no line break at the end": PLAIN.rstrip("\n"),
    "byte order mark": "\ufeff" + PLAIN,
    "document marks": f"---\n{PLAIN}...\n",
    "quoted keys": PLAIN.replace("precision:", '"precision":').replace("mode:", "'mode':"),
    "anchor": PLAIN.replace("precision:", "precision: &p"),
    "flow over lines": PLAIN[: PLAIN.index("precision")]
    + "precision: {mode: fp16, # 5\n  loss_scale: {kind: static,\n    scale: 1024}} # 6",
    "JSON": json.dumps(yaml.safe_load(PLAIN)),
    "JSON over lines": json.dumps(yaml.safe_load(PLAIN), indent=1),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
@pytest.mark.parametrize("scale", ["{kind: dynamic}", "{kind: static, scale: 8.0}"])
def test_a_text_in_any_style_stays_in_it(tmp_path, text, scale):
    after, own = repair(tmp_path, text, f"precision.loss_scale={scale}", "optim.momentum=0.5")
    assert own
    comments = set(re.findall(r"# \d+", text)) - {"# 11"}  # of what may be gone
    assert comments <= set(re.findall(r"# \d+", after))
    assert after.count("\r\n") == (after.count("\n") if "\r" in text else 0)
    assert len(changed(text, after)) <= 3


def cause(finding: str, *settings: str, **more: object) -> Finding:
    return Finding.model_validate({
        "id": finding, "severity": "error", "cause": "it is so", "phase": "update",
        "confidence": 1.0, "evidence": {}, "suggestion": Suggestion(what="do", set=settings),
        **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("causes", "expected"),
    [
        (
            [cause("underflow", "a.b=1"), cause("learning-rate", "optim.lr=2")],
            ("a.b=1", "optim.lr=2"),
        ),
        ([cause("underflow", "a.b=1"), cause("learning-rate", "a.b=2")], ("a.b=1",)),
        ([cause("underflow", "a.b=1"), cause("learning-rate", "c=2", "a.b.c=2")], ("a.b=1",)),
        ([cause("underflow", "a.b=1"), cause("learning-rate", "a.bc=2")], ("a.b=1", "a.bc=2")),
        (
            [
                cause("norm-in-half", "precision.sensitive_layers=[a]"),
                cause("half-reduction", 'precision.sensitive_layers=["b.*", a]'),
            ],
            ('precision.sensitive_layers=[a, "b.*"]',),
        ),
        ([cause("underflow", "a.b=1", verified=False)], ()),
        ([cause("underflow", "a.b=1", severity="info")], ()),
        ([cause("underflow", suggestion=None)], ()),
    ],
)
def test_of_several_causes_the_first_decides(causes, expected):
    assert overrides(causes) == expected
