"""Models of transformers: from a config with fresh weights, or with weights of a folder or hub."""

from __future__ import annotations

import logging
from typing import Any, assert_never

import torch
from torch import nn

from mpcli.data.cache import expand
from mpcli.data.text import TextInfo
from mpcli.recipe.data import PretrainedTokenizer, TextData, Tokenizer, WordPiece
from mpcli.recipe.errors import Exit, UserError, did_you_mean, user_error
from mpcli.recipe.task import ModelConfig, PretrainedModel, TextTask
from mpcli.signals import uninterrupted

_log = logging.getLogger(__name__)


def _bert(layers: int, width: int, heads: int) -> tuple[str, dict[str, int]]:
    return "bert", {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }


_SIZES = {
    # Turc et al., Well-Read Students Learn Better, 2019
    "bert-tiny": _bert(2, 128, 2),
    "bert-mini": _bert(4, 256, 4),
    "bert-small": _bert(4, 512, 8),
    "bert-medium": _bert(8, 512, 8),
    # Devlin et al., BERT, 2019
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "gpt2-tiny": ("gpt2", {"n_layer": 2, "n_embd": 128, "n_head": 2}),
    "gpt2-mini": ("gpt2", {"n_layer": 4, "n_embd": 256, "n_head": 4}),
}
"""Name -> model type of transformers, and values of its config."""


def tokenizer_options(options: TextTask, data: TextData) -> Tokenizer:
    """The recipe's tokenizer, else that of the model whose weights are loaded.

    Raises:
        UserError: exit 3, `init_from` is no finished run.
    """
    if data.tokenizer is not None:
        return data.tokenizer
    match options.model:
        case ModelConfig():
            return WordPiece(kind="wordpiece")
        case PretrainedModel():
            path, hub = options.model.path, options.model.hub
            return PretrainedTokenizer(kind="pretrained", path=path, hub=hub)
        case None:
            return PretrainedTokenizer(kind="pretrained", path=_trained(options))
        case _:
            assert_never(options.model)


def build(auto: str, options: TextTask, info: TextInfo) -> nn.Module:
    """The model on torch's default device; on the meta device without reading any weights.

    Args:
        auto: the class of transformers that builds it, such as `AutoModelForMaskedLM`.

    Raises:
        UserError: exit 2, there is no such model, or it does not fit the data; exit 3, its weights
            cannot be had.
    """
    transformers = _quiet_transformers()
    config = _config(options, info)
    config.num_labels = info.num_labels or config.num_labels
    _check_fit(config, info)
    build_class = getattr(transformers, auto)
    place = _place(options)
    try:
        if place is None or torch.get_default_device().type == "meta":
            model: nn.Module = build_class.from_config(
                config, attn_implementation=options.attention, trust_remote_code=False
            )
        else:
            model, loading = build_class.from_pretrained(
                place,
                output_loading_info=True,
                config=config,
                attn_implementation=options.attention,
                dtype=torch.float32,
                use_safetensors=True,  # the other format can execute code
                trust_remote_code=False,
            )
            _log.info(
                "weights that %s lacks are fresh: %s", place, loading["missing_keys"] or "none"
            )
    except Exception as error:  # whatever values of the config or damaged files lead to
        raise _no_model(options, place, error) from error
    return model.train()


def _quiet_transformers() -> Any:
    """The library, without progress bars and reports of its own."""
    with uninterrupted():
        import transformers
    logging_of_its_own: Any = transformers.utils.logging
    logging_of_its_own.set_verbosity_error()
    logging_of_its_own.disable_progress_bar()
    return transformers


def _config(options: TextTask, info: TextInfo) -> Any:
    from transformers import AutoConfig

    if not isinstance(options.model, ModelConfig):
        place = str(_place(options))
        try:
            return AutoConfig.from_pretrained(place, trust_remote_code=False)
        except Exception as error:
            raise _no_model(options, place, error) from error

    kind, sizes = _SIZES.get(options.model.name, (options.model.name, {}))
    default = _default_config(kind)
    known = {*default.to_dict(), *default.attribute_map}
    for name in options.model.values:
        if name not in known:
            hint = did_you_mean(name, known)
            path = f"task.model.values.{name}"
            raise user_error(f"the config of `{kind}` has no value `{name}`", hint, path=path)
    special = {
        name: number for name, number in _special_tokens(info.tokenizer).items() if name in known
    }
    values = {"vocab_size": len(info.tokenizer), **special, **sizes, **options.model.values}
    try:
        return AutoConfig.for_model(kind, **values)
    except Exception as error:
        raise _no_model(options, None, error) from error


def _default_config(kind: str) -> Any:
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        known = [*_SIZES, *CONFIG_MAPPING]
        close = did_you_mean(kind, known) or ""
        hint = close if close.startswith("did") else f"such as {', '.join(_SIZES)}, or `roberta`"
        raise user_error(f"no model is called `{kind}`", hint, path="task.model.name")
    return CONFIG_MAPPING[kind]()


def _special_tokens(tokenizer: Any) -> dict[str, int | None]:
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    begin = tokenizer.cls_token_id if begin is None else begin
    end = tokenizer.sep_token_id if end is None else end
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": begin,
        "eos_token_id": end,
        "cls_token_id": begin,
        "sep_token_id": end,
    }


def _check_fit(config: Any, info: TextInfo) -> None:
    size, words = getattr(config, "vocab_size", None), len(info.tokenizer)
    if isinstance(size, int) and words > size:
        raise user_error(
            f"the tokenizer has {words} entries, and the model {size}",
            "use the model's own: `data.tokenizer: null`",
            path="data.tokenizer",
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and info.sequence_length > longest:
        raise user_error(
            f"the model takes at most {longest} tokens",
            "use shorter sequences, or set `max_position_embeddings` in `task.model.values`",
            path="data.sequence_length",
        )


def _place(options: TextTask) -> str | None:
    """Where the weights are; None where they are fresh."""
    match options.model:
        case ModelConfig():
            return None
        case PretrainedModel():
            path, hub = options.model.path, options.model.hub
            return hub if path is None else str(expand(path))
        case None:
            return _trained(options)
        case _:
            assert_never(options.model)


def _trained(options: TextTask) -> str:
    """The folder of a run's trained model."""
    run = expand(str(options.init_from))
    for folder in (run / "final", run):
        if (folder / "config.json").is_file():
            return str(folder)
    raise user_error(
        f"no trained model of text in {run}",
        "name the directory of a finished run, or its `final`",
        path="task.init_from",
        exit_code=Exit.ENVIRONMENT,
    )


def _no_model(options: TextTask, place: str | None, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if place is None:
        return user_error(f"this model cannot be built: {reason}", path="task.model")
    path = "task.init_from" if options.model is None else "task.model"
    return user_error(
        f"no model can be had from {place}: {reason}",
        "name a folder that holds `config.json` and `model.safetensors`, or use "
        "`model: {kind: config, name: ...}`",
        path=path,
        exit_code=Exit.ENVIRONMENT,
    )
