"""Values changed in the text of a recipe."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpcli.recipe.dump import written
from mpcli.recipe.edit import with_other, with_value, without

TEXT = """\
# what it is for
name: it                  # its name
precision:
  mode: fp16              # why
  loss_scale:             # how
    kind: static          # always
    scale: 1024           # as tried

  # about layers
  sensitive_layers: [norm]
optim: {kind: sgd, lr: 0.1}  # fast
train:
  steps: 10
"""


def changed(path: str, value: object, text: str = TEXT) -> list[str]:
    """Lines that are new, with `-` those that are gone."""
    result = with_value(text, tuple(path.split(".")), value)
    assert at(yaml.safe_load(result), path) == value
    before, after = text.splitlines(), result.splitlines()
    gone = [f"-{line}" for line in before if line not in after]
    return gone + [line for line in after if line not in before]


def at(value, path):
    for part in path.split("."):
        value = value[part]
    return value


def test_a_value_keeps_its_comment():
    assert changed("precision.mode", "bf16") == [
        "-  mode: fp16              # why",
        "  mode: bf16              # why",
    ]


def test_a_flow_section_is_changed_in_place():
    assert changed("optim.lr", 0.01)[1] == "optim: {kind: sgd, lr: 0.01}  # fast"


def test_a_new_field_stands_at_the_end_of_its_section():
    assert changed("optim.momentum", 0.9)[1] == "optim: {kind: sgd, lr: 0.1, momentum: 0.9}  # fast"
    assert changed("train.clip", {"kind": "norm", "max_norm": 1.0}) == [
        "  clip: {kind: norm, max_norm: 1.0}"
    ]
    assert changed("precision.stochastic_rounding", True) == ["  stochastic_rounding: true"]
    assert changed("probe.every", 10) == ["probe: {every: 10}"]


def test_a_section_of_another_kind_loses_the_fields_it_does_not_have():
    assert changed("precision.loss_scale", {"kind": "dynamic"}) == [
        "-    kind: static          # always",
        "-    scale: 1024           # as tried",
        "    kind: dynamic          # always",
    ]


def test_a_scalar_may_become_a_section_and_back():
    assert changed("optim", None)[1] == "optim: null  # fast"
    text = "train:\n  clip: null  # none\n"
    assert changed("train.clip.max_norm", 1.0, text)[1] == "  clip: {max_norm: 1.0}  # none"
    assert changed("train.clip", {"kind": "value"}, "train:\n  clip:\n  steps: 3\n") == [
        "-  clip:",
        "  clip: {kind: value}",
    ]


def test_lists_are_replaced():
    text = "precision:\n  sensitive_layers:\n    - norm  # all\n    - head\n  mode: fp16\n"
    changed("precision.sensitive_layers", ["a.b", "c"], text)
    changed("precision.sensitive_layers", [], text)


def test_a_text_that_ends_without_a_line_break():
    assert with_value("a: 1", ("b",), 2) == "a: 1\nb: 2\n"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("{a: 1, b: 2}", "{b: 2}"),
        ("{b: 2, a: 1}", "{b: 2}"),
        ("{a: 1}", "{}"),
        ("a: 1\nb: 2", "b: 2"),
    ],
)
def test_a_field_is_removed(text, left):
    assert without(text, ("a",)) == left


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("t:\n  a: 1  # why\n  c: 3\n", "t:\n  b: 2  # why\n  c: 3\n"),
        ("t:\n  a:\n    x: 1  # gone\n", "t:\n  b: 2  # gone\n"),
        ("t: {c: 3, a: 1}", "t: {c: 3, b: 2}"),
        ("t: {a: 1, b: null}", "t: {b: 2}"),
        ("t: {c: 3}", "t: {c: 3, b: 2}"),
        ("c: 3\n", "c: 3\nt: {b: 2}\n"),
    ],
)
def test_a_field_takes_the_place_of_another(text, after):
    assert with_other(text, ("t", "a"), "b", 2) == after


KEYS = st.sampled_from("abcde")
SCALARS = (
    st.none() | st.booleans() | st.integers(-99, 99) | st.sampled_from(["x", "y z", "#", "a: b"])
)
TREES = st.recursive(
    SCALARS | st.lists(SCALARS, max_size=3),
    lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=4),
    max_leaves=12,
)
SECTIONS = st.dictionaries(KEYS, TREES, min_size=1, max_size=4)


def as_text(tree, flow, indent=""):
    lines = []
    for number, (key, value) in enumerate(tree.items()):
        comment = f"  # {number}"
        if isinstance(value, dict) and not flow[(number + len(indent)) % len(flow)]:
            lines += [f"{indent}{key}:{comment}", *as_text(value, flow, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {inline(value)}{comment}")
    return lines


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {inline(inner)}" for key, inner in value.items()) + "}"
    return written(value)


@given(
    SECTIONS,
    st.lists(st.booleans(), min_size=1, max_size=4),
    st.lists(KEYS, min_size=1, max_size=3),
    TREES,
)
def test_any_value_anywhere(tree, flow, path, value):
    text = "# first\n" + "\n".join(as_text(tree, flow)) + "\n# last\n"
    expected, node = tree, tree
    for part in path[:-1]:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[path[-1]] = value
    result = with_value(text, tuple(path), value)
    assert yaml.safe_load(result) == expected
    assert result.startswith("# first\n")
    assert result.endswith("# last\n")
