"""A trained model of text as a folder of transformers, which loads without this program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from mpcli.data.text import TextInfo
from mpcli.recipe.dump import resolved_yaml
from mpcli.recipe.recipe import Recipe


def save(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], info: TextInfo, card: str
) -> None:
    """Write config, weights, tokenizer and model card.

    Args:
        state: the weights, by the names that the model gives them; tied ones under every name.
        card: Markdown for people.
    """
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    stored = str(next(iter(tensors.values())).dtype)
    model.save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]
    # It noted the type that the model computes in, which the weights need not have.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = stored.removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    info.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, "utf-8")


def model_card(model: nn.Module, recipe: Recipe, metrics: Mapping[str, Mapping[str, float]]) -> str:
    """What the model is, how well it does and how it was trained, in Markdown."""
    parameters = sum(p.numel() for p in model.parameters())
    weights = "averages of the" if recipe.train.ema else "the last"
    rows = [
        f"| {split} | {name} | {value:.4f} |"
        for split, values in metrics.items()
        for name, value in values.items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "---",
            "",
            f"# {recipe.name}",
            "",
            f"A `{type(model).__name__}` with {parameters:,} parameters for {recipe.task.kind}, "
            f"trained in the precision mode `{recipe.precision.mode}`. The weights here are "
            f"{weights} ones.",
            "",
            "| data | metric | value |",
            "| --- | --- | --- |",
            *rows,
            "",
            "## Recipe",
            "",
            "```yaml",
            f"{resolved_yaml(recipe)}```",
            "",
        ]
    )
