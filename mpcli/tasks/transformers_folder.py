"""A trained model as a folder of transformers, which loads without this program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from torch import Tensor, nn

from mpcli.data.text import TextInfo


def is_of_text(info: object) -> TypeGuard[TextInfo]:
    """Whether `info` describes text, and so the model is one of transformers."""
    return isinstance(info, TextInfo)


def save(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor], info: TextInfo, card: str
) -> None:
    """Write config, weights, tokenizer and model card.

    Args:
        state: the weights, by the names that the model gives them; tied ones under every name.
        card: Markdown for people.
    """
    tensors = {name: value.contiguous().cpu() for name, value in state.items()}
    model.save_pretrained(folder, state_dict=tensors)  # type: ignore[operator]
    # It notes the type that the model computes in, which the weights need not have.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    info.tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, "utf-8")
