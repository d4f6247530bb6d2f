"""Tables with columns of text: local files of parquet, JSON or CSV, and sets of the hub."""

from __future__ import annotations

import csv
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpcli.data.cache import expand
from mpcli.data.text.records import Damage, Record, Source, Split, no_data, warn_of_shared
from mpcli.recipe.data import Datasets
from mpcli.recipe.errors import UserError, one_of, user_error
from mpcli.signals import uninterrupted

FORMATS = (".parquet", ".jsonl", ".json", ".csv")
LAYOUTS = (
    f"it should hold `<split>` with {one_of(FORMATS)}, or its shards such as "
    "`<split>-00000-of-00002.parquet`; itself, or in its folder `data`"
)

_MOST_NAMES = 1000  # of classes: a column with more is one of texts
_LARGEST = 2**20  # labels are below

_Row = tuple[str, dict[str, Any] | ValueError]
"""Where a row is, and its values by column, or why it has none."""
_Rows = Callable[[Split, Sequence[str]], Iterator[tuple[object, _Row]]]
"""The rows of a split with these columns at least, and the file of each."""


def find(data: Datasets, *, labels: bool) -> Source:
    """The files of both splits: local ones, or those of a set of the hub after its download.

    A set of the hub is first looked for in `$MPTRAIN_DATA/<the last part of its name>`.

    Args:
        labels: whether records have to have them.

    Raises:
        UserError: exit 3, they are not there; exit 2, the labels are in the texts.
    """
    if labels and data.label_column in data.text_columns:
        what = f"the model would read its answers: `{data.label_column}` is a column of text, too"
        raise user_error(what, "name another", path="data.label_column")
    folder = _folder(data)
    if folder is None:
        return _from_hub(data, labels)
    files: dict[Split, tuple[Path, ...]] = {
        "train": _split_files(folder, data.subset, data.train_split),
        "eval": _split_files(folder, data.subset, data.eval_split),
    }

    warn_of_shared(files)

    def rows(split: Split, columns: Sequence[str]) -> Iterator[tuple[object, _Row]]:
        for path in files[split]:
            yield from ((path, row) for row in _rows(path, columns))

    return _source(data, labels, files, str(folder), rows)


def _folder(data: Datasets) -> Path | None:
    if data.path is not None:
        return expand(data.path)
    root = os.environ.get("MPTRAIN_DATA")
    given = expand(root) / str(data.hub).rpartition("/")[2] if root else None
    return given if given and given.is_dir() else None


def _columns(data: Datasets, labels: bool) -> tuple[str, ...]:
    label = (data.label_column,) if labels else ()
    return tuple(dict.fromkeys((*data.text_columns, *label)))


# Local files


def _split_files(folder: Path, subset: str | None, split: str) -> tuple[Path, ...]:
    for place in (*([folder / subset] if subset else []), folder, folder / "data"):
        for suffix in FORMATS:
            whole = place / f"{split}{suffix}"
            if whole.is_file():
                return (whole,)
            if shards := _shards(place, split, suffix):
                return shards
    if not folder.is_dir():
        raise no_data(f"no folder {folder}", LAYOUTS, "data.path")
    names = sorted(path.name for path in folder.iterdir())
    holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    raise no_data(f"no split `{split}` in {folder}; it holds {holds}", LAYOUTS, "data.path")


def _shards(place: Path, split: str, suffix: str) -> tuple[Path, ...]:
    """By their numbers; `test-unseen.csv` is none of `test`."""
    name = re.compile(rf"{re.escape(split)}-(\d+)(-of-(\d+).*)?{re.escape(suffix)}")
    found = [
        (int(match[1]), path, match[3])
        for path in (place.iterdir() if place.is_dir() else ())
        if (match := name.fullmatch(path.name))
    ]
    for _, path, number in found:
        if number and int(number) != len(found):
            what = f"{place} holds {len(found)} of the {int(number)} shards of `{split}`"
            raise no_data(what, f"they are named as {path.name}", "data.path")
    return tuple(path for _, path, _ in sorted(found))


def _rows(path: Path, columns: Sequence[str]) -> Iterator[_Row]:
    match path.suffix:
        case ".parquet":
            return _parquet_rows(path, columns)
        case ".csv":
            return _csv_rows(path, columns)
        case ".json" if _is_array(path):
            return _json_array_rows(path)
        case _:
            return _json_rows(path)


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[_Row]:
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            number = 0
            for batch in file.iter_batches(columns=list(columns)):
                for values in _parquet_values(batch):
                    yield f"row {number}", values
                    number += 1
    except (pa.ArrowException, OSError) as error:
        raise no_data(f"{path} is not a readable parquet file: {error}") from error


def _parquet_values(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | ValueError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            yield ValueError(f"is not UTF-8 ({error.reason})")
            return
        for row in range(batch.num_rows):  # which one is it?
            yield from _parquet_values(batch.slice(row, 1))


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # of the process; a text may well be longer than 128 KiB
    # Bytes that are not UTF-8 become surrogates, which `_text` finds. Unless the reader is strict,
    # a quote that is not closed takes the rest of the file for a text.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        names = next(reader, [])
        _check_columns(path, columns, names)
        while True:
            where = f"line {reader.line_num + 1}"
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, ValueError(str(error))
                continue
            if not values:  # a blank line
                continue
            if len(values) == len(names):
                yield where, dict(zip(names, values, strict=True))
            else:
                yield where, ValueError(f"has {len(values)} values, not {len(names)}")


def _json_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                values = ValueError(f"is not JSON ({error})")
            yield f"line {number}", _json_object(values)


def _is_array(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BOM_UTF8).lstrip().startswith(b"[")


def _json_array_rows(path: Path) -> Iterator[_Row]:
    """Of one array, which has to fit into memory."""
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise no_data(f"{path} is not JSON ({error})") from error
    yield from ((f"row {number}", _json_object(row)) for number, row in enumerate(rows))


def _json_object(value: Any) -> dict[str, Any] | ValueError:
    if isinstance(value, dict | ValueError):
        return value
    return ValueError("is not a JSON object")


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    for name in wanted:
        if found.count(name) > 1:
            raise no_data(f"{path} has {found.count(name)} columns `{name}`", "rename all but one")
        if name not in found:
            has = ", ".join(f"`{column}`" for column in found) or "none"
            raise no_data(
                f"{path} has no column `{name}`; its columns: {has}",
                "name them in `data.text_columns` and `data.label_column`",
            )


# From rows to records


def _source(
    data: Datasets, labels: bool, files: dict[Split, tuple[Path, ...]], about: str, rows: _Rows
) -> Source:
    @cache
    def label_names() -> tuple[str, ...]:
        if data.label_names is not None:
            return data.label_names
        return _label_names(rows, data.label_column) if labels else ()

    def read(split: Split, damage: Damage) -> Iterator[Record]:
        numbers = {name: number for number, name in enumerate(label_names())}
        for file, (where, values) in rows(split, _columns(data, labels)):
            try:
                record = _record(values, data, numbers if labels else None)
            except ValueError as error:
                damage.add(file, where, str(error))
            else:
                yield record

    return Source(files, about, read, label_names)


def _label_names(rows: _Rows, column: str) -> tuple[str, ...]:
    """The names of the training split's classes in their order; none if its first is a number."""
    names: set[str] = set()
    for _, (_, values) in rows("train", (column,)):
        label = None if isinstance(values, ValueError) else _label(values.get(column))
        if isinstance(label, str):
            names.add(label)
        elif label is not None and not names:
            return ()
        if len(names) > _MOST_NAMES:
            what = f"the column `{column}` has more than {_MOST_NAMES:,} different labels"
            raise no_data(what, "name that of the classes", "data.label_column")
    return tuple(sorted(names))


def _label(value: Any) -> float | str | None:
    """A label as a number or, where it is none, as the name of a class; None if it is neither."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value.strip() if _is_utf8(value) and value.strip() else None
    return value if isinstance(value, int | float) else None


def _record(
    values: dict[str, Any] | ValueError, data: Datasets, numbers: dict[str, int] | None
) -> Record:
    """Its label is a whole number itself, or `numbers` has it; None: it has no label.

    ValueError: what is wrong with the row.
    """
    if isinstance(values, ValueError):
        raise values
    texts = tuple(_text(values.get(name), name) for name in data.text_columns)
    if numbers is None:
        return Record(texts)
    return Record(texts, _label_number(values.get(data.label_column), numbers))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is no text")
    if not _is_utf8(value):
        raise ValueError(f"`{name}` is not UTF-8")
    return value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label_number(value: Any, numbers: dict[str, int]) -> int:
    label = _label(value)
    if numbers:
        name = f"{label:g}" if isinstance(label, int | float) else label
        if name in numbers:
            return numbers[name]
        known = ", ".join([*numbers][:8]) + (", ..." if len(numbers) > 8 else "")
        raise ValueError(f"the label {value!r} is none of the known ones ({known})")
    if not isinstance(label, int | float) or not 0 <= label < _LARGEST or label % 1:
        raise ValueError(f"the label {value!r} is not a whole number from 0 to {_LARGEST - 1:,}")
    return int(label)


# The hub


def _from_hub(data: Datasets, labels: bool) -> Source:
    tables: dict[Split, Any] = {
        "train": _downloaded(data, data.train_split),
        "eval": _downloaded(data, data.eval_split),
    }
    for table in tables.values():
        _check_columns(Path(str(data.hub)), _columns(data, labels), table.column_names)

    def rows(split: Split, columns: Sequence[str]) -> Iterator[tuple[object, _Row]]:
        table = tables[split].select_columns(list(columns))
        return ((data.hub, (f"row {number}", row)) for number, row in enumerate(table))

    files = {
        split: tuple(Path(file["filename"]) for file in table.cache_files)
        for split, table in tables.items()
    }
    return _source(data, labels, files, f"{data.hub} (Hugging Face hub)", rows)


def _downloaded(data: Datasets, split: str) -> Any:
    with uninterrupted():
        import datasets
    try:
        return datasets.load_dataset(data.hub, data.subset, split=split)
    except Exception as error:  # whatever the network, the hub or its files lead to
        raise _no_download(data, error) from error


def _no_download(data: Datasets, error: Exception) -> UserError:
    name = str(data.hub).rpartition("/")[2]
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return no_data(
        f"{data.hub} cannot be had from the hub: {reason}",
        f"put it into FOLDER/{name} and set MPTRAIN_DATA=FOLDER; {LAYOUTS}",
        "data.hub",
    )
