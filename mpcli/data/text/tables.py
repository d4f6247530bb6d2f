"""Tables with columns of text: local files of parquet, JSON lines or CSV, and sets of the hub."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mpcli.data.cache import expand
from mpcli.data.text.records import Damage, Record, Source, Split, no_data
from mpcli.recipe.data import Datasets
from mpcli.recipe.errors import UserError, one_of
from mpcli.signals import uninterrupted

FORMATS = (".parquet", ".jsonl", ".json", ".csv")
LAYOUTS = (
    f"it should hold `<split>` with {one_of(FORMATS)}, or its shards such as "
    "`<split>-00000-of-00002.parquet`; itself, or in its folder `data`"
)

_Row = tuple[str, dict[str, Any] | ValueError]
"""Where a row is, and its values by column, or why it has none."""


def find(data: Datasets, *, labels: bool) -> Source:
    """The files of both splits: local ones, or those of a set of the hub after its download.

    A set of the hub is first looked for in `$MPTRAIN_DATA/<the last part of its name>`.

    Args:
        labels: whether records have to have them.

    Raises:
        UserError: exit 3, they are not there.
    """
    folder = _folder(data)
    if folder is None:
        return _from_hub(data, labels)
    files: dict[Split, tuple[Path, ...]] = {
        "train": _split_files(folder, data.subset, data.train_split),
        "eval": _split_files(folder, data.subset, data.eval_split),
    }

    def read(split: Split, damage: Damage) -> Iterator[Record]:
        for path in files[split]:
            yield from _records(_rows(path, _columns(data, labels)), data, labels, path, damage)

    return Source(files, str(folder), read)


def _folder(data: Datasets) -> Path | None:
    if data.path is not None:
        return expand(data.path)
    root = os.environ.get("MPTRAIN_DATA")
    given = expand(root) / str(data.hub).rpartition("/")[2] if root else None
    return given if given and given.is_dir() else None


def _columns(data: Datasets, labels: bool) -> tuple[str, ...]:
    return (*data.text_columns, data.label_column) if labels else data.text_columns


# Local files


def _split_files(folder: Path, subset: str | None, split: str) -> tuple[Path, ...]:
    for place in (folder, folder / "data", *([folder / subset] if subset else [])):
        for suffix in FORMATS:
            whole = place / f"{split}{suffix}"
            if whole.is_file():
                return (whole,)
            if shards := sorted(place.glob(f"{split}-*{suffix}")):
                return tuple(shards)
    if not folder.is_dir():
        raise no_data(f"no folder {folder}", LAYOUTS, "data.path")
    names = sorted(path.name for path in folder.iterdir())
    holds = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "nothing"
    raise no_data(f"no split `{split}` in {folder}; it holds {holds}", LAYOUTS, "data.path")


def _rows(path: Path, columns: Sequence[str]) -> Iterator[_Row]:
    match path.suffix:
        case ".parquet":
            return _parquet_rows(path, columns)
        case ".csv":
            return _csv_rows(path, columns)
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
    # Bytes that are not UTF-8 become surrogates, which `_text` finds.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
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
            if len(values) == len(names):
                yield where, dict(zip(names, values, strict=True))
            else:
                yield where, ValueError(f"has {len(values)} values, not {len(names)}")


def _json_rows(path: Path) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                values = ValueError(f"is not JSON ({error})")
            known = isinstance(values, dict | ValueError)
            yield f"line {number}", values if known else ValueError("is not a JSON object")


def _check_columns(path: Path, wanted: Sequence[str], found: Sequence[str]) -> None:
    for name in wanted:
        if name not in found:
            has = ", ".join(f"`{column}`" for column in found) or "none"
            raise no_data(
                f"{path} has no column `{name}`; its columns: {has}",
                "name them in `data.text_columns` and `data.label_column`",
            )


# From rows to records


def _records(
    rows: Iterator[_Row], data: Datasets, labels: bool, file: object, damage: Damage
) -> Iterator[Record]:
    for where, values in rows:
        try:
            yield _record(values, data, labels)
        except ValueError as error:
            damage.add(file, where, str(error))


def _record(values: dict[str, Any] | ValueError, data: Datasets, labels: bool) -> Record:
    """ValueError: what is wrong with the row."""
    if isinstance(values, ValueError):
        raise values
    texts = tuple(_text(values.get(name), name) for name in data.text_columns)
    return Record(texts, _label(values.get(data.label_column), data) if labels else -1)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{name}` is not UTF-8") from error
    return value


def _label(value: Any, data: Datasets) -> int:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if type(number) is not int or not 0 <= number < 2**20:
        raise ValueError(f"the label {value!r} is not a whole number from 0")
    if data.num_labels is not None and number >= data.num_labels:
        raise ValueError(f"the label {number} is not one of the {data.num_labels} from 0")
    return number


# The hub


def _from_hub(data: Datasets, labels: bool) -> Source:
    tables: dict[Split, Any] = {
        "train": _downloaded(data, data.train_split),
        "eval": _downloaded(data, data.eval_split),
    }
    for table in tables.values():
        _check_columns(Path(str(data.hub)), _columns(data, labels), table.column_names)

    def read(split: Split, damage: Damage) -> Iterator[Record]:
        rows = ((f"row {number}", row) for number, row in enumerate(tables[split]))
        return _records(rows, data, labels, data.hub, damage)

    files = {
        split: tuple(Path(file["filename"]) for file in table.cache_files)
        for split, table in tables.items()
    }
    return Source(files, f"{data.hub} (Hugging Face hub)", read)


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
