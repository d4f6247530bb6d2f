"""Words for what is wrong with a value: every validation error as a `Problem` at its place."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass
from types import NoneType
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mpcli.recipe.base import Section
from mpcli.recipe.errors import Place, Problem, closest, did_you_mean, one_of
from mpcli.recipe.fields import all_fields, kind_of, kinds, located
from mpcli.recipe.nodes import Mapping, Node, Scalar, Sequence, find, key_place, resolve
from mpcli.recipe.source import OVERRIDE

Path = tuple[str, ...]

MAX_ERRORS = 500  # a file of thousands of mistakes is not worth as many suggestions

# What other tools call the fields here.
_SYNONYMS = {
    "accelerator": "engine.device",
    "accumulate_grad_batches": "train.micro_batch_size",
    "adam_epsilon": "optim.eps",
    "allow_tf32": "precision.mode: tf32",
    "amp": "precision.mode: fp16",
    "batch_size": "train.global_batch_size",
    "bf16": "precision.mode: bf16",
    "bf16_stochastic_round": "precision.stochastic_rounding",
    "bucket_cap_mb": "engine.bucket_megabytes",
    "checkpoint_interval": "output.checkpoint_every",
    "clip_factor": "train.clip.clipping",
    "clip_grad": "train.clip",
    "clip_grad_norm": "train.clip.max_norm",
    "clip_grad_value": "train.clip.clip_value",
    "clip_mode": "train.clip.kind",
    "comm_hook": "engine.gradient_compression",
    "dataset": "data",
    "ddp_bucket_cap_mb": "engine.bucket_megabytes",
    "ddp_comm_hook": "engine.gradient_compression",
    "ddp_find_unused_parameters": "engine.find_unused_parameters",
    "ddp_timeout": "engine.timeout_seconds",
    "devices": "engine.processes",
    "dtype": "precision.mode",
    "dynamic_growth_steps": "precision.loss_scale.growth_interval",
    "eval_steps": "eval.every",
    "eval_strategy": "eval.every",
    "evaluation_strategy": "eval.every",
    "find_unused_params": "engine.find_unused_parameters",
    "fp16": "precision.mode: fp16",
    "fp16_compression": "engine.gradient_compression",
    "fp16_opt_level": "precision.mode",
    "fp32_layers": "precision.sensitive_layers",
    "fp32_modules": "precision.sensitive_layers",
    "fsdp": "engine.kind: fsdp2",
    "gpus": "engine.processes",
    "gpus_per_node": "engine.processes",
    "grad_clip": "train.clip",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "gradient_clip_algorithm": "train.clip.kind",
    "gradient_clip_val": "train.clip.max_norm",
    "gradient_clipping": "train.clip.max_norm",
    "initial_loss_scale": "precision.loss_scale.init_scale",
    "initial_scale": "precision.loss_scale.init_scale",
    "initial_scale_power": "precision.loss_scale.init_scale",
    "keep_batchnorm_fp32": "precision.sensitive_layers: [norm]",
    "keep_fp32": "precision.sensitive_layers",
    "keep_in_fp32_modules": "precision.sensitive_layers",
    "label_smoothing_factor": "task.label_smoothing",
    "learning_rate": "optim.lr",
    "loss_scale_window": "precision.loss_scale.growth_interval",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule.kind",
    "master_weights": "precision.mode: fp16-master",
    "max_epochs": "train.epochs",
    "max_grad_norm": "train.clip.max_norm",
    "max_loss_scale": "precision.loss_scale.max_scale",
    "max_steps": "train.steps",
    "max_value": "train.clip.clip_value",
    "min_loss_scale": "precision.loss_scale.min_scale",
    "mixed_precision": "precision.mode",
    "model": "task.model",
    "n_gpu": "engine.processes",
    "nproc_per_node": "engine.processes",
    "num_epochs": "train.epochs",
    "num_gpus": "engine.processes",
    "num_processes": "engine.processes",
    "num_train_epochs": "train.epochs",
    "num_workers": "engine.data_workers",
    "opt_level": "precision.mode",
    "optimizer": "optim",
    "per_device_train_batch_size": "train.micro_batch_size",
    "reshard": "engine.reshard_after_forward",
    "run_name": "name",
    "save_every": "output.checkpoint_every",
    "save_steps": "output.checkpoint_every",
    "save_total_limit": "output.keep_last",
    "scale_window": "precision.loss_scale.growth_interval",
    "scheduler": "optim.schedule",
    "sharding_strategy": "engine.reshard_after_forward",
    "strategy": "engine.kind",
    "sync_batchnorm": "engine.sync_batch_norm",
    "sync_bn": "engine.sync_batch_norm",
    "tf32": "precision.mode: tf32",
    "timeout": "engine.timeout_seconds",
    "torch_compile": "engine.compile",
    "torch_dtype": "precision.mode",
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "warmup_ratio": "optim.schedule.warmup",
    "warmup_steps": "optim.schedule.warmup",
    "workers": "engine.data_workers",
}

_OFFLOAD = "write `kind: deepspeed` with `offload: true`, or `kind: fsdp2` with `cpu_offload: true`"

# What other tools set, and what decides it here.
_DECIDED = {
    "backend": "`engine.device` decides: NCCL on GPUs, gloo on a CPU",
    "master_addr": "`mptrain run` takes it: `--rdzv-endpoint HOST:PORT`",
    "master_port": "`mptrain run` takes it: `--rdzv-endpoint HOST:PORT`",
    "nnodes": "`mptrain run` takes it: `--nodes`",
    "nodes": "`mptrain run` takes it: `--nodes`",
    "num_nodes": "`mptrain run` takes it: `--nodes`",
    "offload": _OFFLOAD,
    "offload_optimizer": _OFFLOAD,
    "offload_params": _OFFLOAD,
    "rdzv_endpoint": "`mptrain run` takes it: `--rdzv-endpoint HOST:PORT`",
    "tensorboard": "use `trackers: [tensorboard]`",
    "world_size": "it is `engine.processes` times the `--nodes` of `mptrain run`",
}

_FP32 = "write `fp32`"
_TF32 = "write `tf32`: fp32 numbers, products on TF32 tensor cores"
_FP16 = "write `fp16`: fp32 weights, fp16 autocast, dynamic loss scale"
_BF16 = "write `bf16`: fp32 weights, bf16 autocast"
_FP16_PURE = "write `fp16-pure`: weights, compute and optimizer state in fp16"
_BF16_PURE = "write `bf16-pure`: weights, compute and optimizer state in bf16"
_LATER = "this version's modes have 16 or 32 bits"

_MODES = {
    _FP32: ("32", "32-true", "float", "float32", "full", "single", "torch.float32"),
    _TF32: ("tensorfloat32", "tensorfloat-32"),
    _FP16: (
        *("16", "16-mixed", "amp", "amp_fp16", "float16", "half", "mixed", "mixed_float16"),
        "torch.float16",
    ),
    _BF16: ("amp_bf16", "bf16-mixed", "bfloat16", "mixed_bfloat16", "torch.bfloat16"),
    _FP16_PURE: ("16-true", "pure_fp16"),
    _BF16_PURE: ("bf16-true", "pure_bf16"),
    "did you mean `fp32` (Apex's O0)?": ("o0",),
    "did you mean `fp16` (Apex's O1)?": ("o1",),
    "did you mean `fp16-master` (Apex's O2)?": ("o2",),
    "did you mean `fp16-pure` (Apex's O3)?": ("o3",),
    _LATER: ("fp8", "float8", "fp64", "float64", "double", "64", "64-true"),
}

_ENGINES = {
    "write `local`": ("single", "single_device", "single_process"),
    "write `ddp`": ("dp", "data_parallel", "distributed_data_parallel", "torchrun", "multi_gpu"),
    "write `fsdp2`": ("fsdp", "fsdp1", "fully_shard", "fully_sharded_data_parallel", "zero3"),
    "write `deepspeed`": ("zero", "zero1", "zero2"),
    "this version's engines are `local`, `ddp`, `fsdp2` and `deepspeed`": ("horovod", "megatron"),
}

# (path, lower-case value) -> remedy: what other tools call the values here, and what is to come.
_VALUES = {
    **{("precision.mode", word): hint for hint, words in _MODES.items() for word in words},
    **{("engine.kind", word): hint for hint, words in _ENGINES.items() for word in words},
    ("engine.device", "gpu"): "write `cuda`",
    ("train.clip.kind", "adaptive"): "write `agc`",
    ("precision.loss_scale.kind", "constant"): "write `static`",
    ("precision.loss_scale.kind", "fixed"): "write `static`",
}

# Sections that other tools write as a number.
_NUMBERS = {"clip": "{kind: norm, max_norm: %s}", "loss_scale": "{kind: static, scale: %s}"}


def validation_problems(
    error: ValidationError, schema: type[Section], tree: Mapping, file: str
) -> list[Problem]:
    """One problem for each value that is wrong.

    Args:
        schema: of the whole recipe.
        tree: the nodes of what was validated.
        file: the recipe's, for what is missing altogether.
    """
    grouped: dict[Path, list[ErrorDetails]] = {}
    holders: dict[Path, type[BaseModel]] = {}
    for details in error.errors(include_url=False)[:MAX_ERRORS]:
        if details["type"] == "default_factory_not_called":
            continue  # another field of the section is wrong
        path, holder = located(details, schema, tree)
        if details["type"] == "missing" and isinstance(details["loc"][-1], int):
            path = path[:-1]  # an item of a list: the list is too short
        field = details.get("ctx", {}).get("field")
        if field:
            path = (*path, *field.split("."))
        grouped.setdefault(path, []).append(details)
        holders[path] = holder
    meant = {
        _meant(path, holders[path])
        for path, details in grouped.items()
        if details[0]["type"] == "extra_forbidden"
    }
    for path in [path for path, details in grouped.items() if details[0]["type"] == "missing"]:
        if ".".join(path) in meant:
            del grouped[path]  # it is there, under another name
    for path in [path for path in grouped if isinstance(find(tree, path), Mapping)]:
        if any(inner != path and inner[: len(path)] == path for inner in grouped):
            del grouped[path]  # a member of a union that was not meant
    words = _Words(tree, file)
    return [words.problem(path, holders[path], details) for path, details in grouped.items()]


@dataclass(frozen=True)
class _Words:
    """Words one problem; `path` is where it is and `holder` the section that holds that field."""

    tree: Mapping
    file: str

    def problem(
        self, path: Path, holder: type[BaseModel], errors: SequenceType[ErrorDetails]
    ) -> Problem:
        first, *_ = errors
        field = holder.model_fields.get(path[-1])
        known = sorted(kinds(field)) if field else []
        node = find(self.tree, path)
        match first["type"]:
            case "extra_forbidden":
                what, hint = "unknown field", _unknown_hint(path, holder)
                return Problem(what, hint, ".".join(path), key_place(self.tree, path))
            case "missing" if isinstance(first["loc"][-1], str):
                hint = _missing_hint(path[-1], field)
                place = self.section(path[:-1])
                return Problem("required, but missing", hint, ".".join(path), place)
            case "union_tag_not_found":
                path = (*path, "kind")
                hint = f"add `kind:` with {one_of(known)}"
                return Problem("required, but missing", hint, ".".join(path), self.key(path[:-1]))
            case "union_tag_invalid":
                path = (*path, "kind")
                node = find(self.tree, path)  # of the kind
                hint = _value_hint(path, node) or did_you_mean(_written(node), known)
                what = f"unknown kind, found {_found(node)}"
            case "model_type" | "model_attributes_type":
                what = f"expected a section, found {_found(node)}"
                hint = _section_hint(path[-1], node, kinds(field) if field else {})
            case "mistake":
                what, hint = first["ctx"]["message"], first["ctx"]["hint"]
                if what.startswith("expected"):
                    what = f"{what}, found {_found(node)}"
                elif isinstance(node, Mapping):
                    return Problem(what, hint, ".".join(path), self.section(path))
                hint = _null_hint(field, node) or hint
            case "value_error" | "assertion_error":  # of a plug-in's own validators
                what, hint = str(first["ctx"]["error"]), None
                if isinstance(node, Mapping):
                    return Problem(what, hint, ".".join(path), self.section(path))
            case "too_long" | "missing" if field and isinstance(node, Sequence):
                length = len(get_args(field.annotation))
                what, hint = f"expected {length} values, found {len(node.items)}", None
            case _:
                what = f"{_expected(errors)}, found {_found(node)}"
                hint = _value_hint(path, node) or _null_hint(field, node) or _hint(errors, node)
        return Problem(what, hint, ".".join(path), self.value(path))

    def value(self, path: Path) -> Place:
        """The place of the value at `path`, or of the nearest thing written around it."""
        node = find(self.tree, path)
        return node.place if node and path else self.key(path)

    def section(self, path: Path) -> Place:
        """What a section lacks is lacking at its key, or at the override that took it away."""
        node = find(self.tree, path)
        for name, entry in node.entries.items() if isinstance(node, Mapping) else ():
            value = entry.node
            took_away = name == "kind" or (isinstance(value, Scalar) and value.value is None)
            if took_away and value.place.file == OVERRIDE:
                return value.place
        return self.key(path)

    def key(self, path: Path) -> Place:
        """The place of the key of a section, or of the nearest one written around it."""
        for end in range(len(path), 0, -1):
            if place := key_place(self.tree, path[:end]):
                return place
        return Place(self.file, 1, 1)


def _unknown_hint(path: Path, holder: type[BaseModel]) -> str | None:
    name, parent = path[-1], ".".join(path[:-1])
    if name.casefold() in _SYNONYMS:
        return f"here it is called `{_SYNONYMS[name.casefold()]}`"
    if name.casefold() in _DECIDED:
        return _DECIDED[name.casefold()]
    if close := _close(name, holder):
        return f"did you mean `{close}`?"
    found = [(place, section) for place, field, section in all_fields() if field == name != "kind"]
    if others := [f"kind: {kind_of(section)}" for place, section in found if place == parent]:
        return f"`{name}` is a field of {one_of(others)}"
    for place, _ in found:
        return f"`{name}` belongs to `{place}`" if place else f"`{name}` is a field of its own"
    return did_you_mean(name, holder.model_fields)


def _close(name: str, holder: type[BaseModel]) -> str | None:
    return closest(name, holder.model_fields, cutoff=0.75)


def _meant(path: Path, holder: type[BaseModel]) -> str | None:
    """The path that an unknown field most likely stands for."""
    close = _close(path[-1], holder)
    return _SYNONYMS.get(path[-1].casefold()) or (".".join((*path[:-1], close)) if close else None)


def _missing_hint(name: str, field: FieldInfo | None) -> str:
    known = sorted(kinds(field)) if field else []
    if known and "" not in known:
        return f"add `{name}: {{kind: ...}}` with {one_of(known)}"
    about = f" ({field.description})" if field and field.description else ""
    return f"add `{name}:`{about}"


def _section_hint(name: str, node: Node | None, known: dict[str, type[Section]]) -> str | None:
    word = _written(node)
    if re.match(r"[\w-]+:[^\s/]", word):
        return "a field needs a space after its `:`"
    if word in known and word:
        needed = [n for n, f in known[word].model_fields.items() if f.is_required() and n != "kind"]
        return f"write `{name}: {{{', '.join([f'kind: {word}', *(f'{n}: ...' for n in needed)])}}}`"
    if isinstance(node, Scalar) and node.value is None:
        return f"give `{name}` fields, or remove the line"
    if name in _NUMBERS and isinstance(node, Scalar) and type(node.value) in (int, float):
        return f"write `{name}: {_NUMBERS[name] % word}`"
    if name == "precision" and word:
        meant = _VALUES.get(("precision.mode", word.casefold()))
        if meant:
            return f"write `precision: {{mode: ...}}`; {meant}"
        return f"write `precision: {{mode: {word}}}`"
    return f"write `{name}: {{field: value}}`, or the fields on indented lines below"


def _expected(errors: SequenceType[ErrorDetails]) -> str:
    phrases = [_phrase(details) for details in errors]
    if None in phrases:  # a type that only plug-ins use
        what = errors[phrases.index(None)]["msg"]
        return f"{what[:1].lower()}{what[1:]}"
    return f"expected {' or '.join(dict.fromkeys(filter(None, phrases)))}"


def _phrase(details: ErrorDetails) -> str | None:
    about = details.get("ctx", {})
    match details["type"]:
        case "int_type" | "int_from_float":
            return "a whole number"
        case "float_type":
            return "a number"
        case "finite_number":
            return "a finite number"
        case "bool_type":
            return "`true` or `false`"
        case "string_type":
            return "text"
        case "tuple_type" | "list_type" | "set_type":
            return "a list"
        case "dict_type" | "dataclass_type":
            return "a section"
        case "literal_error":
            return one_of(_literals(details))
        case "greater_than":
            return f"more than {_number(about['gt'])}"
        case "greater_than_equal":
            return f"at least {_number(about['ge'])}"
        case "less_than":
            return f"less than {_number(about['lt'])}"
        case "less_than_equal":
            return f"at most {_number(about['le'])}"
        case _:
            return None


def _hint(errors: SequenceType[ErrorDetails], node: Node | None) -> str | None:
    """What helps with a value of the wrong type."""
    types = {details["type"] for details in errors}
    choices = [name for details in errors for name in _literals(details)]
    if isinstance(node, Mapping):
        if types & _LISTS:
            return "lists are written whole, such as `[a, b]`"
        return "this is a single value: it has no fields"
    if not isinstance(node, Scalar):
        return None
    if node.value is None:
        return "write a value, or remove the line"
    if types & _LISTS:
        return f"write `[{node.written}]`"
    if "string_type" in types and len(node.written) <= 40:
        return f'put it in quotes: `"{node.written}"`'
    if "bool_type" in types:
        truth = _TRUTH.get(node.written.casefold())
        return f"write `{truth}`" if truth else None
    if types & {"int_type", "float_type"}:
        comma = re.fullmatch(r"(-?[1-9][0-9]{0,2}),([0-9]{3})", node.written.strip())
        if comma and "int_type" not in types:
            return f"write `{comma[1]}{comma[2]}` or `{comma[1]}.{comma[2]}`, without a comma"
        number = _number_meant(node, whole="int_type" in types)
        if number is not None:
            return f"write `{number}`" + (" without quotes" if node.quoted else "")
    beyond = "float_type" in types and isinstance(node.value, int)
    if (beyond or "finite_number" in types) and any(map(str.isdigit, node.written)):
        return "the largest number is about 1.8e308"
    close = closest(node.written, choices)
    return f"did you mean `{close}`?" if close else None


_LISTS = {"tuple_type", "list_type", "set_type"}
_TRUTH = {
    **dict.fromkeys(("yes", "on", "y", "true", "1"), "true"),
    **dict.fromkeys(("no", "off", "n", "false", "0"), "false"),
}


def _number_meant(node: Scalar, *, whole: bool) -> str | None:
    """A number written in a way that recipes do not read."""
    text = node.written
    value: object = node.value if isinstance(node.value, float) else None
    if isinstance(node.value, str) and len(text) <= 40:
        plain = re.sub(r"[_ ](?=[0-9])|^\+", "", text.strip())
        if re.fullmatch(r"-?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?", plain):
            plain = plain.replace(",", "")
        plain = plain.replace(",", ".")
        if power := re.fullmatch(r"2(?:\^|\*\*)(-?[0-9]{1,3})", plain):
            value = 2 ** int(power[1])
        elif percent := re.fullmatch(r"([0-9.]+)%", plain):
            share = resolve(percent[1])
            value = share / 100 if isinstance(share, int | float) else None
        elif re.fullmatch(r"0[xX][0-9a-fA-F]+", plain):
            value = int(plain, 16)
        else:
            value = resolve(re.sub(r"^(-?)0+(?=[0-9])", r"\1", plain))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if value == int(value) and abs(value) < 2**53:
        return str(int(value))
    return None if whole else repr(value)


def _value_hint(path: Path, node: Node | None) -> str | None:
    return _VALUES.get((".".join(path), _written(node).casefold()))


def _null_hint(field: FieldInfo | None, node: Node | None) -> str | None:
    may_be_null = field is not None and NoneType in get_args(field.annotation)
    if may_be_null and _written(node).casefold() in ("none", "null", "nil"):
        return "write `null`"
    return None


def _found(node: Node | None) -> str:
    if isinstance(node, Mapping):
        return "a section"
    if isinstance(node, Sequence):
        return "a list"
    if node is None or (node.written == "" and not node.quoted):
        return "nothing"
    text = node.written if len(node.written) <= 40 else f"{node.written[:40]}…"
    return f'`"{text}"`' if node.quoted else f"`{text}`"


def _written(node: Node | None) -> str:
    return node.written if isinstance(node, Scalar) else ""


def _literals(details: ErrorDetails) -> list[str]:
    if details["type"] != "literal_error":
        return []
    found = re.findall(r"'([^']*)'|(\d+)", details["ctx"]["expected"])
    return [word or number for word, number in found]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 2**64 else f"{value:g}"
