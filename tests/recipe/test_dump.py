from __future__ import annotations

from collections.abc import Callable

import pytest

from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.load import load_recipe
from mpcli.recipe.packaged import packaged_dir


@pytest.mark.parametrize(
    "path", sorted(packaged_dir("recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_packaged_recipes_round_trip(path: str, write: Callable[..., str]) -> None:
    recipe = load_recipe(path).recipe
    assert load_recipe(write(resolved_yaml(recipe))).recipe == recipe


@pytest.mark.parametrize(
    "override",
    [
        "optim={kind: adamw, lr: 1e-18, eps: 1e-8, betas: [0.5, 1e-3]}",
        "precision.loss_scale={kind: static, scale: 0.000244140625}",
        "precision.loss_scale={kind: dynamic, growth_interval: 7}",
        "precision.loss_scale={kind: dynamic, min_scale: [[0, 1], [1000, 0.125]]}",
        "precision.loss_scale={kind: scheduled, points: [[0, 1e-18], [7, 65536]]}",
        "precision={mode: bf16-pure, stochastic_rounding: true}",
        "precision.sensitive_layers=[norm, '*', 'a.[!0-9].*', '-', 'null', '1', 'true']",
        "train={steps: 2147483647, global_batch_size: 3, clip: {kind: norm, max_norm: 1}}",
        "train.clip={kind: value, clip_value: 1}",
        "train.clip={kind: agc}",
        "data={kind: cifar10, augment: []}",
        'data={kind: cifar10, path: "a: #b"}',
        "data={kind: cifar10, path: '\"quoted\" \\\\'}",
        'data={kind: cifar10, path: "\\x07\\u2028\\x7f\\u00a0\\U0001F600 学習"}',
        'data={kind: cifar10, path: "null"}',
        "task.model={kind: torchvision, name: no}",
        "task.model={kind: torchvision, name: '1e-4'}",
        "task.model={kind: torchvision, name: ''}",
        "task.model={kind: torchvision, name: 'a '}",
        "task.model={kind: torchvision, name: '- a'}",
        "eval.every=null",
        "name=1a",
    ],
)
def test_awkward_values_round_trip(override: str, write: Callable[..., str]) -> None:
    recipe = load_recipe(write(), [override]).recipe
    assert load_recipe(write(resolved_yaml(recipe))).recipe == recipe
