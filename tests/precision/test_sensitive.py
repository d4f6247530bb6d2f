"""Patterns of `sensitive_layers` find the modules they describe, in models of several makers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from mpcli.precision.sensitive import (
    OUTSIDE_MODULES,
    last_layer,
    lstm_modules,
    matched,
    no_match,
    norm_modules,
    sensitive_modules,
)
from mpcli.recipe.errors import Problem, UserError
from mpcli.recipe.precision import GROUPS
from mpcli.tasks.vision import ResNet9, SmallNet


def smallnet() -> nn.Module:
    return SmallNet(1, 8, 10, width=4)


def torchvision_model(name: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = torchvision.models.get_model(name)
    return model


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


def bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=2))


class Tied(nn.Module):
    """An output layer with the weights of the embedding, inside a block with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight


def problems_of(model: nn.Module, *patterns: str) -> tuple[Problem, ...]:
    with pytest.raises(UserError) as error:
        sensitive_modules(model, patterns)
    return error.value.problems


@pytest.mark.parametrize(
    ("model", "norms", "head"),
    [
        (smallnet(), [f"blocks.{i}.norm" for i in range(4)], "head"),
        (
            ResNet9(3, 10, width=4),
            [
                "blocks.0.norm",
                "blocks.1.norm",
                "blocks.2.block1.norm",
                "blocks.2.block2.norm",
                "blocks.3.norm",
                "blocks.4.norm",
                "blocks.5.block1.norm",
                "blocks.5.block2.norm",
            ],
            "head",
        ),
    ],
    ids=["smallnet", "resnet9"],
)
def test_the_recipe_of_the_reference(model: nn.Module, norms: list[str], head: str) -> None:
    """`[norm, "head.*"]` on the models that come with the program."""
    expected = {**dict.fromkeys(norms, "norm"), head: "head.*"}
    assert sensitive_modules(model, ["norm", "head.*"]) == expected


@pytest.mark.parametrize(
    ("model", "group", "names"),
    [
        (torchvision_model("resnet18"), "head", ["fc"]),
        (torchvision_model("vit_b_16"), "head", ["heads.head"]),
        (
            torchvision_model("vit_b_16"),
            "attention",
            [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(12)],
        ),
        (torchvision_model("swin_t"), "head", ["head"]),
        (
            torchvision_model("swin_t"),
            "attention",
            [
                f"features.{s}.{b}.attn"
                for s, n in ((1, 2), (3, 2), (5, 6), (7, 2))
                for b in range(n)
            ],
        ),
        (encoder(), "norm", [f"layers.{i}.norm{j}" for i in (0, 1) for j in (1, 2)]),
        (encoder(), "attention", ["layers.0.self_attn", "layers.1.self_attn"]),
        (
            bert(),
            "embedding",
            [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")],
        ),
        (bert(), "head", ["cls.predictions.decoder"]),
        (
            bert(),
            "norm",
            [
                "bert.embeddings.LayerNorm",
                "bert.encoder.layer.0.attention.output.LayerNorm",
                "bert.encoder.layer.0.output.LayerNorm",
                "cls.predictions.transform.LayerNorm",
            ],
        ),
        # The owner of the query-key product, and the module that is called `attention`.
        (
            bert(),
            "attention",
            ["bert.encoder.layer.0.attention", "bert.encoder.layer.0.attention.self"],
        ),
        (gpt2(), "attention", ["transformer.h.0.attn"]),
        (gpt2(), "embedding", ["transformer.wte", "transformer.wpe"]),
        (gpt2(), "head", ["lm_head"]),
        (gpt2(), "softmax", []),
        (nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.LogSoftmax(-1)), "softmax", ["1", "2"]),
        (nn.Sequential(nn.Linear(2, 2), nn.MSELoss()), "loss", ["1"]),
        (nn.Sequential(nn.Embedding(2, 2), nn.EmbeddingBag(2, 2)), "embedding", ["0", "1"]),
    ],
)
def test_groups(model: nn.Module, group: str, names: list[str]) -> None:
    assert matched(model, group) == names


def test_norms_of_resnet18() -> None:
    model = torchvision_model("resnet18")
    batch_norms = [n for n, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(batch_norms) == 20
    assert matched(model, "norm") == norm_modules(model) == batch_norms


def test_a_norm_is_told_by_its_class_and_a_wrapper_is_none() -> None:
    class RootNorm(nn.Module):
        pass

    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Sequential(RootNorm(), nn.Linear(2, 2), nn.GroupNorm(1, 2))

    model = nn.ModuleDict({"block": PreNorm(), "norm": nn.Identity()})
    assert norm_modules(model) == ["block.inside.0", "block.inside.2"]
    assert matched(model, "norm") == ["block.inside.0", "block.inside.2", "norm"]


def test_attention_is_the_innermost_module_of_such_a_class() -> None:
    class MyAttention(nn.MultiheadAttention):
        pass

    class AttentionBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.ModuleList([MyAttention(4, 2), nn.Linear(4, 4)])

    assert matched(nn.Sequential(AttentionBlock()), "attention") == ["0.inside.0"]


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_includes_modules_of_its_name(group: str) -> None:
    part = nn.ModuleDict({group: nn.ReLU(), "other": nn.Linear(2, 2)})
    model = nn.ModuleDict({"part": part, "last": nn.Linear(2, 2)})
    assert f"part.{group}" in matched(model, group)
    assert "part.other" not in matched(model, group)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.1", ["blocks.1"]),
        ("blocks.1.*", ["blocks.1", *(f"blocks.1.{x}" for x in ("conv", "pool", "norm", "act"))]),
        ("*.conv", [f"blocks.{i}.conv" for i in range(4)]),
        ("blocks.[02].conv", ["blocks.0.conv", "blocks.2.conv"]),
        ("Conv2d", [f"blocks.{i}.conv" for i in range(4)]),
        ("_ConvNd", [f"blocks.{i}.conv" for i in range(4)]),
        ("ConvBlock", [f"blocks.{i}" for i in range(4)]),
        ("Blocks.1", []),
        ("Module", []),
        ("conv", []),
        ("object", []),
    ],
)
def test_globs_and_class_names(pattern: str, names: list[str]) -> None:
    assert matched(smallnet(), pattern) == names


def test_a_star_matches_the_model_too() -> None:
    model = smallnet()
    assert matched(model, "*") == [name for name, _ in model.named_modules()]


def test_a_word_that_is_a_name_and_a_class_means_both() -> None:
    model = nn.ModuleDict({"ReLU": nn.Linear(2, 2), "act": nn.ReLU()})
    assert matched(model, "ReLU") == ["ReLU", "act"]


def test_what_is_inside_a_sensitive_module_is_sensitive() -> None:
    """`nn.MultiheadAttention` uses the weights of its `out_proj` without calling it."""
    assert sensitive_modules(encoder(), ["attention"]) == dict.fromkeys(
        [f"layers.{i}.self_attn{part}" for i in (0, 1) for part in ("", ".out_proj")], "attention"
    )


def test_the_first_pattern_is_the_reason_and_the_order_is_the_models() -> None:
    found = sensitive_modules(smallnet(), ["head", "Linear", "blocks.0.conv"])
    assert list(found.items()) == [("blocks.0.conv", "blocks.0.conv"), ("head", "head")]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("embedding", {"embed": "embedding", "out": "shares a parameter with embed"}),
        ("out", {"embed": "shares a parameter with out", "out": "out"}),
        ("norm", {"body.1": "norm"}),
    ],
)
def test_tied_weights_are_sensitive_together(pattern: str, found: dict[str, str]) -> None:
    assert sensitive_modules(Tied(), [pattern]) == found


def test_ties_are_followed_until_nothing_changes() -> None:
    """first - second.0, whose neighbour second.1 stays; third.1 - fourth, since third joins."""
    layers = [nn.Linear(2, 2, bias=False) for _ in range(6)]
    first, second_0, second_1, third_0, third_1, fourth = layers
    third = nn.Sequential(third_0, third_1)
    third.tied = second_0.weight = first.weight  # the whole of third owns the parameter
    fourth.weight = third_1.weight
    model = nn.ModuleDict(
        {
            "fourth": fourth,
            "third": third,
            "second": nn.Sequential(second_0, second_1),
            "first": first,
        }
    )
    found = sensitive_modules(model, ["first"])
    assert set(found) == {"first", "second.0", "third", "third.0", "third.1", "fourth"}
    assert found["fourth"] == "shares a parameter with third.1"


def test_the_head_of_language_models_takes_the_embedding_along() -> None:
    assert sensitive_modules(gpt2(), ["head"]) == {
        "transformer.wte": "shares a parameter with lm_head",
        "lm_head": "head",
    }
    # BERT's decoder shares its bias with the module around it.
    assert set(sensitive_modules(bert(), ["head"])) == {
        "bert.embeddings.word_embeddings",
        "cls.predictions",
        *(f"cls.predictions.{part}" for part in ("transform", "decoder")),
        *(
            f"cls.predictions.transform.{part}"
            for part in ("dense", "transform_act_fn", "LayerNorm")
        ),
    }


def test_a_module_with_two_names_is_found_by_both_and_named_once() -> None:
    layer = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"again": layer}), "c": nn.Linear(2, 2)})
    assert sensitive_modules(model, ["b.again"]) == {"a": "b.again"}


MODELS = [smallnet(), encoder(), bert(), torchvision_model("swin_t"), Tied()]
MODELS += [nn.ModuleDict({"a[b]": nn.Linear(1, 1), "*": nn.ReLU(), "norm": nn.ReLU()})]


@given(st.data())
def test_names_of_modules_match_themselves(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from(MODELS))
    names = sorted(name for name, _ in model.named_modules() if name)
    patterns = data.draw(st.lists(st.sampled_from(names), unique=True))
    assert set(patterns) <= set(sensitive_modules(model, patterns))


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("blocks.0.covn", "did you mean `blocks.0.conv`?"),
        ("blokcs.0.*", "did you mean `blocks.0.*`?"),
        ("*.nrom", "did you mean `*.norm`?"),
        ("layernorm", "did you mean `norm`?"),
        ("batchnorm", "did you mean `BatchNorm2d`?"),
        ("Linar", "did you mean `Linear`?"),
        ("haed", "did you mean `head`?"),
        ("attention", "groups of this model: `norm`, `head`, `loss`"),
        ("embedding", "groups of this model: `norm`, `head`, `loss`"),
        ("zzz", "`mptrain plan` without it shows the names and classes of the modules"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str, hint: str) -> None:
    assert problems_of(smallnet(), "norm", pattern) == (
        Problem(
            f"`{pattern}` matches no module of this model",
            hint,
            path="precision.sensitive_layers.1",
        ),
    )


def test_every_pattern_that_matches_nothing_is_reported() -> None:
    problems = problems_of(smallnet(), "blocks.9", "norm", "softmax", "Conv3d")
    assert [p.path for p in problems] == [
        "precision.sensitive_layers.0",
        "precision.sensitive_layers.3",
    ]


def test_softmax_and_loss_are_left_to_the_caller() -> None:
    model = smallnet()
    assert sensitive_modules(model, OUTSIDE_MODULES) == {}
    assert matched(model, "softmax") == matched(model, "loss") == []
    problem = no_match(model, "softmax", 2)
    assert problem.path == "precision.sensitive_layers.2"
    assert problem.what == "`softmax` matches no module of this model"


def test_lstms() -> None:
    model = nn.ModuleList([nn.LSTM(2, 2), nn.GRU(2, 2), nn.Sequential(nn.LSTM(2, 2))])
    assert lstm_modules(model) == ["0", "2.0"]


@pytest.mark.parametrize(
    ("model", "name"),
    [(Tied(), "out"), (nn.Linear(2, 2), ""), (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "0")],
)
def test_the_last_layer(model: nn.Module, name: str) -> None:
    assert last_layer(model) == name
