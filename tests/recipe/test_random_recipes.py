"""Random and mutated recipes: a recipe or a `UserError`, soon, and nothing else."""

from __future__ import annotations

import tempfile
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.errors import Exit, UserError
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir
from mpcli.recipe.render import problem_json, render_problem

RECIPES = [path.read_text("utf-8") for path in sorted(packaged_dir("recipes").glob("*.yaml"))]
TOKENS = """
[ ] { } : , - ? | > & * ! # % @ ` ' " ~ << --- ... &a *a !!str null true no 0123 12:30 1e400 .nan -1
0x10 kind: name: use: train: \\
"""
PIECES = st.one_of(
    st.sampled_from(TOKENS.split()),
    st.sampled_from(["\n", "\n  ", ": ", " #", "  ", "\t", "\0", "\x1b", "\r", "\u2028"]),
    st.text(max_size=3),
)
QUICK = settings(max_examples=300, deadline=None)


def check(content: bytes, overrides: list[str] | None = None) -> None:
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_bytes(content)
        try:
            recipe = load_recipe(path, overrides or []).recipe
        except UserError as error:
            assert error.problems
            assert error.exit_code == Exit.USAGE
            for problem in error.problems:
                shown = render_problem(problem).replace("\n", "")
                assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, shown))
                assert problem_json(problem)["file"] is not None
        else:
            path.write_text(resolved_yaml(recipe), encoding="utf-8")
            assert load_recipe(path).recipe == recipe
    assert time.process_time() - began < 1


@QUICK
@given(st.binary(max_size=200))
def test_random_bytes(content: bytes) -> None:
    check(content)


@QUICK
@given(st.lists(PIECES, max_size=40))
def test_random_yaml(pieces: list[str]) -> None:
    check("".join(pieces).encode("utf-8", "replace"))


@QUICK
@given(st.data())
def test_mutated_recipes(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(RECIPES))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from([0, 0, 1, 2, 10]))
        text = text[:start] + data.draw(PIECES) + text[end:]
    check(text.encode("utf-8", "replace"))


PATHS = """
name task.model.kind task.model data.kind data.path data.augment precision.mode use.optim use optim
precision.loss_scale.kind precision.loss_scale.init_scale precision.loss_scale.min_scale
precision.loss_scale.points precision.sensitive_layers precision.stochastic_rounding
optim.kind optim.lr optim.schedule optim.betas train.steps train.epochs train.clip
eval.every engine.processes train a.b
"""
VALUES = """
1 0 -1 1e-4 1e18 .nan .inf null true no 3.0 fp16 sgd adamw resnet9 static dynamic [flip] [] {}
bf16-pure scheduled [[0,8]] [[0,1],[5,.nan]] [[0,1],5] [0,8] [norm,head.*] [norms] agc value
{kind:sgd,lr:1} {kind} [[]] '' "\\0" sgd-one-cycle ../x
"""
OVERRIDES = st.builds(
    "{}={}".format,
    st.sampled_from(PATHS.split()),
    st.one_of(st.sampled_from(VALUES.split()), st.lists(PIECES, max_size=6).map("".join)),
)


@QUICK
@given(st.sampled_from(RECIPES), st.lists(st.one_of(OVERRIDES, st.text(max_size=9)), max_size=4))
def test_random_overrides(recipe: str, overrides: list[str]) -> None:
    check(recipe.encode(), overrides)


@pytest.mark.parametrize("override", ["data.path=\udcff", "\udcff=1", "name=\ud800"])
def test_overrides_that_are_not_unicode(override: str) -> None:
    with pytest.raises(UserError):
        load_recipe(packaged_dir("recipes") / "digits-fp32.yaml", [override])
