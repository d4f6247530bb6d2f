"""A trained model of text as a folder of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mpcli.data.text import TextInfo

_UNKNOWN_LENGTH = 10**9
"""Transformers has 10^30 where nobody said how long a text may be."""


def save(tensors: Mapping[str, Tensor], info: TextInfo, model: Any, folder: Path) -> None:
    """Write config, weights and tokenizer.

    Args:
        tensors: the weights, by the names that the model gives them; tied ones under every name.
        model: of transformers.
    """
    # Weights that are one parameter have to be one tensor: then it writes them once.
    values: dict[Tensor, Tensor] = {}
    state = {
        name: values.setdefault(parameter, tensors[name])
        for name, parameter in model.state_dict(keep_vars=True).items()
    }
    stored = str(next(iter(state.values())).dtype).removeprefix("torch.")
    model.save_pretrained(folder, state_dict=state)
    # It noted the type that the model computes in, which the weights need not have.
    config = folder / "config.json"
    about = json.loads(config.read_text("utf-8")) | {"dtype": stored}
    config.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    tokenizer = info.tokenizer
    if tokenizer.model_max_length > _UNKNOWN_LENGTH:
        tokenizer.model_max_length = info.sequence_length  # no later position was learnt
    tokenizer.save_pretrained(folder)
