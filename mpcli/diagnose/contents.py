"""From files to the facts in them: bare files, our checkpoints, Hugging Face checkpoint folders."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mpcli.checkpoint import Checkpoint, load
from mpcli.checkpoint.layout import SHARD
from mpcli.diagnose import safetensors_files, torch_files
from mpcli.diagnose.facts import Facts, NotRead
from mpcli.diagnose.numbers import Numbers, is_examined, scaler_facts, stored_once
from mpcli.diagnose.reading import inside, read_json, size_of, unreadable
from mpcli.diagnose.trainer_state import trainer_facts
from mpcli.recipe.errors import user_error

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
TRAINER_STATE = "trainer_state.json"
LEFT_ALONE = {
    "training_args.bin": "it is a pickle of Python objects, not of tensors",
    "rng_state*.pth": "it holds random states only",
    "scheduler.*": "it holds no tensors",
}
_STATES = ("optimizer.pt", "optimizer.bin", "scaler.pt")
_INDEX = ".index.json"
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_MAX_DEPTH = 50  # of containers in one another
_MAX_VIEWS = 8  # bytes of tensors for each byte of a file: views may share memory, within reason


def file_facts(path: Path) -> Facts:
    """Facts about a bare `.safetensors`, `.bin`, `.pt` or `.pth`.

    Raises:
        UserError: exit 4 for what cannot be read.
    """
    numbers = Numbers()
    _read(path, numbers)
    return _facts(path, "file", numbers)


def checkpoint_facts(checkpoint: Checkpoint) -> Facts:
    """Facts about one of our checkpoints: the exact weights are the masters, where there are any.

    Raises:
        UserError: exit 4, as `checkpoint.verify`.
    """
    tensors, _ = load(checkpoint)
    numbers = Numbers()
    _read_ours(checkpoint.path, tensors, numbers)
    return _facts(checkpoint.path, "checkpoint", numbers)


def is_folder_of_weights(folder: Path) -> bool:
    """Whether `folder_facts` has anything to say about a folder."""
    names = _names(folder)
    return TRAINER_STATE in names or any(name.endswith((*SUFFIXES, _INDEX)) for name in names)


def folder_facts(folder: Path) -> Facts:
    """Facts about a Hugging Face checkpoint, or any other folder with weights.

    Of weights that are there in several forms, the first is read of: an index of safetensors,
    safetensors, an index of pickles, pickles.

    Raises:
        UserError: exit 2 for several files, or several indexes, of which none has the usual name;
            4 for a file that cannot be read, or is not in the folder.
    """
    numbers, names = Numbers(), _names(folder)
    not_read = [
        NotRead(file=name, why=why)
        for pattern, why in LEFT_ALONE.items()
        for name in fnmatch.filter(names, pattern)
    ]
    alone = {left.file for left in not_read}
    weights, index = _weight_files(folder, [name for name in names if name not in alone])
    for name in weights:
        _read(inside(folder, name), numbers)
    if missing := [name for name in index if name not in numbers]:
        raise unreadable(folder, f"its index names `{missing[0]}`, which no file has")
    for name in _STATES:
        if name in names:
            _read(inside(folder, name), numbers)
    known = {*weights, *alone, *_STATES}
    not_read += [
        NotRead(file=name, why="other files have the weights")
        for name in names
        if name.endswith(SUFFIXES) and name not in known
    ]
    found = _facts(folder, "folder", numbers, not_read)
    if TRAINER_STATE not in names:
        return found
    path = inside(folder, TRAINER_STATE)
    return found.model_copy(update={"trainer": trainer_facts(path, read_json(path))})


def _facts(path: Path, kind: str, numbers: Numbers, not_read: Sequence[NotRead] = ()) -> Facts:
    weights = numbers.weights()
    return Facts.model_validate(
        {
            "path": str(path),
            "kind": kind,
            "weights_from": str(path) if weights else None,
            "weights": weights,
            "optimizer": numbers.optimizer(),
            "scaler": numbers.scaler,
            "not_read": not_read,
        }
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error.strerror or str(error)) from error


def _weight_files(folder: Path, names: list[str]) -> tuple[list[str], Mapping[str, str]]:
    """Names of the files with the weights, of one form only; of an index, tensor -> file."""
    for whole, suffixes in zip(_WHOLE, ((".safetensors",), SUFFIXES[1:]), strict=True):
        indexes = [name for name in names if name.endswith(tuple(s + _INDEX for s in suffixes))]
        if indexes:
            index = _index(folder, _one(folder, indexes, whole + _INDEX))
            return sorted(set(index.values())), index
        if found := [name for name in names if name.endswith(suffixes) and name not in _STATES]:
            return [_one(folder, found, whole)], {}
    return [], {}


def _one(folder: Path, names: list[str], usual: str) -> str:
    """The one file that there is, or else the one with the usual name: several are other models."""
    if len(names) == 1 or usual in names:
        return usual if usual in names else names[0]
    listed = ", ".join(f"`{name}`" for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise user_error(
        f"{folder}: {len(names)} files may have the weights, and no index says which",
        f"name one of: {listed}{more}",
    )


def _index(folder: Path, name: str) -> Mapping[str, str]:
    """Tensor -> file: each of them a file of weights in the folder."""
    path = inside(folder, name)
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise unreadable(path, "it has no `weight_map`")
    for file in set(index.values()):
        if not file.endswith(SUFFIXES):
            raise unreadable(path, f"it names `{file}`, which is no file of weights")
        inside(folder, file)
    return index


def _read(path: Path, numbers: Numbers) -> None:
    """Collect what is in a file, of whatever form."""
    if SHARD.fullmatch(path.name):
        _read_ours(path, dict(safetensors_files.tensors(path)), numbers)
    elif path.suffix == ".safetensors":
        for name, tensor in safetensors_files.tensors(path):
            _add(path, numbers, name, tensor)
    else:
        value = torch_files.load(path)
        _Walk(path, numbers).visit(value)


def _add(path: Path, numbers: Numbers, name: str, tensor: Tensor) -> None:
    """Two weights of one name: nobody knows which one counts, and none may hide the other."""
    if name in numbers:
        raise unreadable(path, f"it has `{name:.100}`, and so has what was read before")
    numbers.weight(name, tensor)


def _read_ours(path: Path, tensors: Mapping[str, Tensor], numbers: Numbers) -> None:
    """The names are those of `LocalEngine.checkpoint`."""
    scaler: dict[str, Any] = {}
    masters: set[str] = set()
    for key in sorted(tensors, key=lambda key: not key.startswith("master.")):
        tensor = tensors[key]
        part, _, name = key.partition(".")
        if part == "master":
            masters.add(name)
        if part in ("master", "buffer") or (part == "model" and name not in masters):
            _add(path, numbers, name, tensor)
        elif part == "optimizer":
            state, _, parameter = name.partition(".")
            numbers.state(state, parameter, tensor)
        elif part == "scaler" and tensor.numel() == 1:
            scaler[name] = tensor.item()
    if "scale" in scaler:
        scaler["_growth_tracker"] = scaler.get("good_steps", 0)
        numbers.scaler = scaler_facts(scaler)


class _Walk:
    """Through the containers that `torch.load` returned."""

    def __init__(self, path: Path, numbers: Numbers) -> None:
        self._path = path
        self._numbers = numbers
        self._bytes_left = _MAX_VIEWS * size_of(path)
        self._visited: dict[int, Any] = {}

    def visit(self, value: Any, name: str = "", depth: int = 0) -> None:
        """Collect every tensor below a value.

        Raises:
            UserError: exit 4 for what is nested too deep, or shows the same memory many times.
        """
        if isinstance(value, Tensor):
            name = name or self._path.stem
            if not self._numbers.tied(self._path, name, value):
                self._count(value)
                _add(self._path, self._numbers, name, value)
            return
        if not isinstance(value, dict | list | tuple) or id(value) in self._visited:
            return
        if depth > _MAX_DEPTH:
            raise unreadable(self._path, "its containers are nested too deep")
        self._visited[id(value)] = value
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        if isinstance(value, dict) and {"state", "param_groups"} <= value.keys():
            self._optimizer(value["state"])
        elif isinstance(value, dict) and {"scale", "_growth_tracker"} <= value.keys():
            self._scaler(value)
        else:
            for number, (key, item) in enumerate(entries):
                part = _key(key) or f"?{number}"
                self.visit(item, f"{name}.{part}" if name else part, depth + 1)

    def _optimizer(self, state: Any) -> None:
        """`{parameter: {key: tensor}}`, as every optimizer of torch has it."""
        for parameter, entries in state.items() if isinstance(state, dict) else ():
            for key, tensor in entries.items() if isinstance(entries, dict) else ():
                if isinstance(tensor, Tensor):
                    self._count(tensor)
                    self._numbers.state(_key(key) or "?", _key(parameter) or "?", tensor)

    def _scaler(self, state: dict[str, Any]) -> None:
        try:
            self._numbers.scaler = scaler_facts(state)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise unreadable(self._path, "it holds no state of a loss scale") from error

    def _count(self, tensor: Tensor) -> None:
        if is_examined(tensor):
            self._bytes_left -= stored_once(tensor).numel() * tensor.element_size()
        if self._bytes_left < 0:
            raise unreadable(self._path, "its tensors show the same memory again and again")


def _key(key: object) -> str:
    """Empty where a key is neither text nor a number."""
    return f"{key:.200}" if isinstance(key, str) else str(key) if type(key) is int else ""
