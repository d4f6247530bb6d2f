"""Models of transformers: from a config with fresh weights, or with weights of a folder or hub."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection
from typing import Any, assert_never

import torch
from torch import nn

from mpcli.data.cache import expand
from mpcli.data.text import TextInfo, padding
from mpcli.data.text.tokenizer import is_empty
from mpcli.data.text.tokenizer import load as load_tokenizer
from mpcli.recipe.data import PretrainedTokenizer, TextData, Tokenizer, WordPiece
from mpcli.recipe.errors import Exit, UserError, closest, one_of, user_error
from mpcli.recipe.task import TEXT_MODELS, ModelConfig, PretrainedModel, TextTask
from mpcli.signals import uninterrupted

_log = logging.getLogger(__name__)


_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""Values of a config that say what a model returns; ours never differ."""
_NO_VALUES = {
    **dict.fromkeys((*_OUTPUTS, "use_cache"), "it says what a model returns, not what it is"),
    **dict.fromkeys(("dtype", "torch_dtype"), "`precision.mode` says what types there are"),
    "is_decoder": "the kind of the task says whether later tokens are seen",
}
"""Values that are not for a recipe to set, and why."""


def tokenizer_options(options: TextTask, data: TextData) -> Tokenizer:
    """The recipe's tokenizer, else that of the model whose weights are loaded.

    Raises:
        UserError: exit 3, `init_from` is no finished run.
    """
    if data.tokenizer is not None:
        return data.tokenizer
    if isinstance(options.model, ModelConfig):
        return WordPiece(kind="wordpiece")
    return _own_tokenizer(options)


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
    place = _place(options)
    if place is not None:
        _check_tokenizer(options, info)
    _check_vocabulary(config, info)
    if info.num_labels:
        _check_head(config, options, info.num_labels)
        config.num_labels = info.num_labels
        if info.label_names:
            config.id2label = dict(enumerate(info.label_names))
            config.label2id = {name: number for number, name in enumerate(info.label_names)}
        config.pad_token_id = padding(info.tokenizer)  # what the last token of a text is found by
    if hasattr(config, "is_decoder"):
        config.is_decoder = auto == "AutoModelForCausalLM"
    for name, value in _OUTPUTS.items():
        setattr(config, name, value)
    build_class = getattr(transformers, auto)
    try:
        if place is None or torch.get_default_device().type == "meta":
            model: nn.Module = build_class.from_config(
                config,
                attn_implementation=options.attention,
                dtype=torch.float32,
                trust_remote_code=False,
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
        _check_saving(model)
    except Exception as error:  # whatever values of the config or damaged files lead to
        raise _no_model(options, place, error) from error
    _check_embeddings(model, info)
    return model.train()


def model_sha256(model: Any, info: TextInfo) -> str:
    """Of what a model is built from but its weights: its config, and the tokenizer."""
    config = model.config.to_diff_dict()
    about = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
    text = json.dumps([about, _json(info.tokenizer)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path")


def _json(tokenizer: Any) -> str:
    text: str = tokenizer.backend_tokenizer.to_str()
    return text


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

    kind, sizes = TEXT_MODELS.get(options.model.name, (options.model.name, {}))
    default = _default_config(kind)
    known = {name for name in default.to_dict() if not name.startswith("_")}
    known |= set(default.attribute_map)
    for name in options.model.values:
        _check_value(kind, name, known)
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
        close = closest(kind, [*TEXT_MODELS, *CONFIG_MAPPING], cutoff=0.8)
        hint = f"did you mean `{close}`?" if close else f"such as {one_of(TEXT_MODELS)}"
        raise user_error(f"no model is called `{kind}`", hint, path="task.model.name")
    return CONFIG_MAPPING[kind]()


def _check_value(kind: str, name: str, known: Collection[str]) -> None:
    path = f"task.model.values.{name}"
    if name in _NO_VALUES:
        raise user_error(f"`{name}` cannot be set: {_NO_VALUES[name]}", "remove it", path=path)
    if name not in known:
        close = closest(name, known)
        hint = f"did you mean `{close}`?" if close else None
        raise user_error(f"the config of `{kind}` has no value `{name}`", hint, path=path)


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


def _check_tokenizer(options: TextTask, info: TextInfo) -> None:
    """Weights know the tokens of their own tokenizer, whatever the number of others."""
    try:
        own = load_tokenizer(_own_tokenizer(options))
    except UserError:
        return  # it came without one
    if not is_empty(own) and _json(own) != _json(info.tokenizer):
        raise user_error(
            "this is not the tokenizer that the model's weights were trained with",
            "use the model's own: `data.tokenizer: null`",
            path="data.tokenizer",
        )


def _check_vocabulary(config: Any, info: TextInfo) -> None:
    size, words = getattr(config, "vocab_size", None), len(info.tokenizer)
    if isinstance(size, int) and words > size:
        raise user_error(
            f"the tokenizer has {words} entries, and the model {size}",
            "use the model's own: `data.tokenizer: null`",
            path="data.tokenizer",
        )


def _check_head(config: Any, options: TextTask, num_labels: int) -> None:
    trained = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    if trained and config.num_labels != num_labels:
        raise user_error(
            f"the model tells {config.num_labels} labels apart, and the data has {num_labels}",
            "use one that was not trained to classify: a language model, say",
            path=_path(options),
        )


def _check_saving(model: Any) -> None:
    """The checks that transformers makes when a model is saved, which is after the training."""
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)


def _check_embeddings(model: nn.Module, info: TextInfo) -> None:
    """A number beyond a table ends a run without a word of which; without values, no plan sees it.

    Raises:
        UserError: sequences are longer than the model's positions; a table is empty.
    """
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    reserved = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding):
            continue
        if module.num_embeddings == 0:
            raise user_error(f"this model cannot be built: `{name}` is empty", path="task.model")
        if name.endswith("position_embeddings") and module.padding_idx is not None:
            reserved = module.padding_idx + 1  # as RoBERTa's, which count from there
    if isinstance(longest, int) and 0 < longest < info.sequence_length + reserved:
        needed = info.sequence_length + reserved
        raise user_error(
            f"the model takes at most {longest - reserved} tokens",
            "use shorter sequences, or, for a model with fresh weights, "
            f"`max_position_embeddings: {needed}` in `task.model.values`",
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


def _own_tokenizer(options: TextTask) -> PretrainedTokenizer:
    """That of the model whose weights are loaded."""
    if isinstance(options.model, PretrainedModel):
        path, hub = options.model.path, options.model.hub
        return PretrainedTokenizer(kind="pretrained", path=path, hub=hub)
    return PretrainedTokenizer(kind="pretrained", path=_trained(options))


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


def _path(options: TextTask) -> str:
    return "task.init_from" if options.model is None else "task.model"


def _no_model(options: TextTask, place: str | None, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "scaled_dot_product_attention" in reason:
        what = "transformers has no fused attention (`sdpa`) for this model"
        return user_error(what, "use `attention: eager`", path="task.attention")
    if place is None:
        return user_error(f"this model cannot be built: {reason}", path="task.model")
    return user_error(
        f"no model can be had from {place}: {reason}",
        "name a folder that holds `config.json` and `model.safetensors`, or use "
        "`model: {kind: config, name: ...}`",
        path=_path(options),
        exit_code=Exit.ENVIRONMENT,
    )
