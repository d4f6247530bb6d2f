"""Records of files, tables and the hub; what cannot be decoded is named or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpcli.data.text import plain, tables
from mpcli.data.text.records import Damage, Record, Source, Split
from mpcli.recipe.data import Datasets, Text
from mpcli.recipe.errors import Exit, UserError

ROWS = [("good film", 1), ("bad film", 0), ("ümlaut, and a comma", 1)]


def read(source: Source, split: Split = "train", on_error: Any = "stop") -> list[Record]:
    return list(source.read(split, Damage(on_error)))


def table(**fields: Any) -> Datasets:
    return Datasets(kind="datasets", text_columns=("text",), eval_split="test", **fields)


def write_rows(folder: Path, kind: str, split: str, rows: list[tuple[str, int]] = ROWS) -> None:
    texts, labels = [text for text, _ in rows], [label for _, label in rows]
    path = folder / f"{split}.{kind}"
    match kind:
        case "parquet":
            pq.write_table(pa.table({"text": texts, "label": labels, "other": texts}), path)
        case "csv":
            lines = [f'"{text}",{label}' for text, label in rows]
            path.write_text("\n".join(["text,label", *lines]) + "\n", "utf-8")
        case _:
            lines = [json.dumps({"text": t, "label": n}, ensure_ascii=False) for t, n in rows]
            path.write_text("\n".join(lines) + "\n", "utf-8")


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
def test_every_format_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    write_rows(tmp_path, kind, "train")
    write_rows(tmp_path, kind, "test", ROWS[:1])
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert read(source) == [Record((text,), label) for text, label in ROWS]
    assert read(source, "eval") == [Record(("good film",), 1)]
    unlabelled = tables.find(table(path=str(tmp_path)), labels=False)
    assert [record.label for record in read(unlabelled)] == [-1, -1, -1]


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, row in enumerate(ROWS):
        write_rows(tmp_path / "data", "parquet", f"train-0000{number}-of-00003", [row])
    write_rows(tmp_path / "data", "parquet", "test-00000-of-00001", ROWS[:1])
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert [record.texts[0] for record in read(source)] == [text for text, _ in ROWS]
    assert [path.name[:5] for path in source.files["train"]] == ["train"] * 3


def test_shards_are_ordered_by_number_and_whole(tmp_path: Path) -> None:
    write_rows(tmp_path, "csv", "test-1", ROWS[:1])
    write_rows(tmp_path, "csv", "test-2", ROWS[1:2])
    write_rows(tmp_path, "csv", "test-10", ROWS[2:])
    write_rows(tmp_path, "csv", "test-unseen")
    for number in (0, 2):
        write_rows(tmp_path, "csv", f"train-0000{number}-of-00003-ab12")
    with pytest.raises(UserError, match="holds 2 of the 3 shards of `train`") as caught:
        tables.find(table(path=str(tmp_path)), labels=True)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    write_rows(tmp_path, "csv", "train-00001-of-00003-ab12")
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert [record.texts[0] for record in read(source, "eval")] == [text for text, _ in ROWS]
    assert len(read(source)) == 9


def test_the_folder_of_a_subset_comes_first(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path, "csv", split)
        write_rows(tmp_path / "small", "csv", split, ROWS[:1])
    assert len(read(tables.find(table(path=str(tmp_path), subset="small"), labels=True))) == 1


def test_two_columns_are_a_pair(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": "x", "b": "y", "label": 1}\n')
    (tmp_path / "test.jsonl").write_text('{"a": "x", "b": "y", "label": 1}\n')
    data = table(path=str(tmp_path)).model_copy(update={"text_columns": ("a", "b")})
    assert read(tables.find(data, labels=True)) == [Record(("x", "y"), 1)]


def damaged(folder: Path, kind: str) -> Path:
    """A file whose second record cannot be decoded."""
    path = folder / f"train.{kind}"
    match kind:
        case "parquet":
            broken = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).cast(pa.string(), safe=False)
            pq.write_table(pa.table({"text": broken, "label": [0, 1, 0]}), path)
        case "csv":
            path.write_bytes(b"text,label\na,0\n\xff\xfe,1\nc,0\n")
        case _:
            path.write_bytes(b'{"text": "a", "label": 0}\n{"te\n{"text": "c", "label": 0}\n')
    return path


@pytest.mark.parametrize(
    ("kind", "where"), [("parquet", "row 1"), ("csv", "line 3"), ("jsonl", "line 2")]
)
def test_a_damaged_record_is_named_or_counted(tmp_path: Path, kind: str, where: str) -> None:
    path = damaged(tmp_path, kind)
    write_rows(tmp_path, kind, "test")
    source = tables.find(table(path=str(tmp_path)), labels=True)
    with pytest.raises(UserError) as caught:
        read(source)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert caught.value.problems[0].what.startswith(f"{path}: {where}: ")
    damage = Damage("skip")
    assert [record.texts[0] for record in source.read("train", damage)] == ["a", "c"]
    assert damage.skipped == 1
    assert damage.first.startswith(f"{path}: {where}: ")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"text": null, "label": 0}', "`text` is no text"),
        ('{"label": 0}', "`text` is no text"),
        ('{"text": "\\ud800", "label": 0}', "`text` is not UTF-8"),
        ('{"text": "a", "label": -1}', "the label -1 is not a whole number from 0"),
        ('{"text": "a", "label": null}', "the label None is not a whole number from 0"),
        ('{"text": "a", "label": ""}', "the label '' is not a whole number from 0"),
        ('{"text": "a", "label": 3.8}', "the label 3.8 is not a whole number from 0"),
        ('{"text": "a", "label": "3.8"}', "the label '3.8' is not a whole number from 0"),
        ('{"text": "a", "label": NaN}', "the label nan is not a whole number from 0"),
        ('{"text": "a", "label": 1e400}', "the label inf is not a whole number from 0"),
        ('{"text": "a", "label": [1]}', "the label [1] is not a whole number from 0"),
        ("[1]", "is not a JSON object"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, row: str, what: str) -> None:
    (tmp_path / "train.jsonl").write_text(f"{row}\n")
    write_rows(tmp_path, "jsonl", "test")
    with pytest.raises(UserError, match=r"train.jsonl: line 1: ") as caught:
        read(tables.find(table(path=str(tmp_path)), labels=True))
    assert what in caught.value.problems[0].what


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("written", "numbers"),
    [
        ([1.0, 0.0], [1, 0]),
        ([True, False], [1, 0]),
        (["2", "0"], [2, 0]),
        (["2.0", "0.0"], [2, 0]),
        (["positive", "negative"], [1, 0]),
    ],
)
def test_labels_are_written_in_many_ways(
    tmp_path: Path, kind: str, written: list[Any], numbers: list[int]
) -> None:
    for split in ("train", "test"):
        if kind == "csv":
            rows = "".join(f"a,{value}\n" for value in written)
            (tmp_path / f"{split}.csv").write_text(f"text,label\n{rows}")
        else:
            columns = {"text": ["a"] * len(written), "label": written}
            pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    records = read(tables.find(table(path=str(tmp_path)), labels=True))
    assert [record.label for record in records] == numbers


def test_names_of_classes_are_numbered_in_their_order(tmp_path: Path) -> None:
    names = pa.array(["b", " c", "a", None]).dictionary_encode()
    train = pa.table({"text": pa.array(["x"] * 4, pa.large_string()), "label": names})
    pq.write_table(train, tmp_path / "train.parquet")
    write_rows(tmp_path, "csv", "test", [("x", "c"), ("x", "A"), ("x", 1)])  # type: ignore[list-item]
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert source.label_names() == ("a", "b", "c")
    assert [record.label for record in read(source, on_error="skip")] == [1, 2, 0]
    damage = Damage("skip")
    assert [record.label for record in source.read("eval", damage)] == [2]
    assert damage.skipped == 2
    with pytest.raises(UserError, match=r"train.parquet: row 3: the label None is none of"):
        read(source)
    with pytest.raises(UserError, match=r"test.csv: line 3: the label 'A' is none of the .*a, b"):
        read(source, "eval")


def test_a_name_among_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,x\n")
    write_rows(tmp_path, "csv", "test")
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert source.label_names() == ()
    with pytest.raises(UserError, match=r"line 3: the label 'x' is not a whole number from 0"):
        read(source)


def test_texts_are_no_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path, "csv", split, [(f"text {n}", n) for n in range(1001)])
    data = table(path=str(tmp_path), label_column="text")
    with pytest.raises(UserError, match="the model would read its answers: `text` is"):
        tables.find(data, labels=True)
    other = data.model_copy(update={"text_columns": ("label",)})
    with pytest.raises(UserError, match="`text` has more than 1,000 different labels") as caught:
        read(tables.find(other, labels=True))
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert len(read(tables.find(data, labels=False))) == 1001


@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n  "])
def test_an_array_of_json(tmp_path: Path, start: str) -> None:
    rows: list[Any] = [{"text": text, "label": label} for text, label in ROWS]
    (tmp_path / "train.json").write_text(start + json.dumps(rows, indent=1), "utf-8")
    (tmp_path / "test.json").write_text(json.dumps([rows[0], 5]), "utf-8")
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert read(source) == [Record((text,), label) for text, label in ROWS]
    with pytest.raises(UserError, match=r"test.json: row 1: is not a JSON object"):
        read(source, "eval")
    (tmp_path / "test.json").write_text(json.dumps(rows)[:-9])
    with pytest.raises(UserError, match=r"test.json is not JSON \(") as caught:
        read(source, "eval", "skip")
    assert caught.value.exit_code == Exit.ENVIRONMENT


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_blank_lines_are_no_records(tmp_path: Path, kind: str) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path, kind, split)
        path = tmp_path / f"{split}.{kind}"
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    source = tables.find(table(path=str(tmp_path)), labels=True)
    assert [record.texts[0] for record in read(source)] == [text for text, _ in ROWS]


def test_a_long_text_in_csv(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path, "csv", split, [("word " * 40_000, 0)])
    (record,) = read(tables.find(table(path=str(tmp_path)), labels=True))
    assert record.texts[0] == "word " * 40_000


def test_a_quote_that_is_not_closed(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('label,text\n0,fine\n1,"open\n0,fine\n1,fine\n')
    write_rows(tmp_path, "csv", "test")
    with pytest.raises(UserError, match=r"train.csv: line 3: unexpected end of data"):
        read(tables.find(table(path=str(tmp_path)), labels=True))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,text,label\na,b,0\n")
    write_rows(tmp_path, "csv", "test")
    with pytest.raises(UserError, match=r"train.csv has 2 columns `text`"):
        read(tables.find(table(path=str(tmp_path)), labels=True))


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    write_rows(tmp_path, "parquet", "train")
    write_rows(tmp_path, "parquet", "test")
    data = table(path=str(tmp_path), label_column="stars")
    with pytest.raises(UserError, match="no column `stars`; its columns: `text`, `label`, `other`"):
        read(tables.find(data, labels=True))


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 or so")
    write_rows(tmp_path, "parquet", "test")
    with pytest.raises(UserError, match=r"train.parquet is not a readable parquet file") as caught:
        read(tables.find(table(path=str(tmp_path)), labels=True))
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_a_split_that_is_missing(tmp_path: Path) -> None:
    write_rows(tmp_path, "csv", "train")
    with pytest.raises(UserError, match=r"no split `test` in .*; it holds train.csv") as caught:
        tables.find(table(path=str(tmp_path)), labels=True)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert "`<split>-00000-of-00002.parquet`" in str(caught.value.problems[0].hint)


def test_a_hub_name_offline_names_the_layouts_that_would_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nobody/nothing cannot be had from the hub") as caught:
        tables.find(table(hub="nobody/nothing"), labels=True)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    hint = str(caught.value.problems[0].hint)
    assert "put it into FOLDER/nothing and set MPTRAIN_DATA=FOLDER" in hint
    assert "`<split>-00000-of-00002.parquet`" in hint


def test_a_hub_name_is_first_looked_for_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nothing").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "nothing", "parquet", split)
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path))
    assert len(read(tables.find(table(hub="nobody/nothing"), labels=True))) == 3


def test_a_set_that_the_datasets_library_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes a folder of this name for the hub's: the way there without a network."""
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for split in ("train", "test"):
        write_rows(tmp_path / "owner" / "name", "parquet", split)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tables.find(table(hub="owner/name"), labels=True)
    assert read(source) == [Record((text,), label) for text, label in ROWS]
    assert all(path.is_file() for path in (*source.files["train"], *source.files["eval"]))


def lines(count: int) -> str:
    return "".join(f"This is line number {number} of the text.\n" for number in range(count))


def test_every_tenth_stretch_of_plain_text_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(lines(2000), "utf-8")
    source = plain.find(Text(kind="text", path=str(tmp_path)))
    train, held_out = read(source), read(source, "eval")
    whole = sorted(line for r in (*train, *held_out) for line in r.texts[0].splitlines(True))
    assert whole == sorted(lines(2000).splitlines(True))
    assert (len(train), len(held_out)) == (18, 1)
    assert all(len(record.texts[0]) >= plain.STRETCH for record in (*train[:-1], *held_out))
    assert [record.ends for record in train] == [False] * (len(train) - 1) + [True]


@pytest.mark.parametrize(
    "text", ["one two three. " * 20_000, "漢字" * 99_999, "é" * 99_999 + "\n" + "ab cd " * 9_999]
)
def test_a_long_line_is_cut(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, "utf-8")
    source = plain.find(Text(kind="text", path=str(tmp_path / "a.txt")))
    train, held_out = read(source), read(source, "eval")
    merged = [r.texts[0] for r in train]
    for place, record in enumerate(held_out, 1):
        merged.insert(place * plain.HELD_OUT - 1, record.texts[0])
    assert "".join(merged) == text
    assert len(held_out) >= 2
    assert max(map(len, merged)) <= 2 * plain.STRETCH
    if text.startswith("one"):
        assert all(part.startswith((" ", "one")) and part[-1] in "eo. " for part in merged)
        assert {word for part in merged for word in part.split()} == {"one", "two", "three."}


def test_the_end_of_a_line_is_not_cut(tmp_path: Path) -> None:
    for length in range(plain.STRETCH - 3, plain.STRETCH + 3):
        (tmp_path / "a.txt").write_bytes(b"x" * length + b"\r\nb\xff\n")
        paths = {"path": str(tmp_path / "a.txt"), "eval_path": str(tmp_path / "a.txt")}
        source = plain.find(Text(kind="text", **paths))
        assert "".join(r.texts[0] for r in read(source, on_error="skip")) == "x" * length + "\n"
        with pytest.raises(UserError, match="line 2: is not UTF-8"):
            read(source)


def test_what_is_learnt_and_held_out_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.txt").write_text("text")
        write_rows(tmp_path, "csv", name)
    whole = {"path": str(tmp_path), "eval_path": str(tmp_path / "test.txt")}
    plain.find(Text(kind="text", **{**whole, "path": str(tmp_path / "train.txt")}))
    tables.find(table(path=str(tmp_path)), labels=True)
    assert not caplog.text
    plain.find(Text(kind="text", **whole))
    assert f"{tmp_path}/test.txt is both learnt from and held out" in caplog.text
    caplog.clear()
    tables.find(table(path=str(tmp_path), train_split="test"), labels=True)  # meant so
    assert not caplog.text


def test_held_out_text_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(lines(300))
    (tmp_path / "test.txt").write_text("Held out.\r\n")
    paths = {"path": str(tmp_path / "train.txt"), "eval_path": str(tmp_path / "test.txt")}
    source = plain.find(Text(kind="text", **paths))
    assert "".join(record.texts[0] for record in read(source)) == lines(300)
    assert read(source, "eval") == [Record(("Held out.\n",))]


def test_a_line_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbffirst\nsecond \xe9\nthird\n")
    source = plain.find(Text(kind="text", path=str(path), eval_path=str(path)))
    with pytest.raises(UserError, match=r"text.txt: line 2: is not UTF-8") as caught:
        read(source)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert read(source, on_error="skip") == [Record(("first\nthird\n",))]


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no `.txt` file in"):
        plain.find(Text(kind="text", path=str(tmp_path)))
    with pytest.raises(UserError, match="no file or folder"):
        plain.find(Text(kind="text", path=str(tmp_path / "absent")))


def test_the_embedded_text() -> None:
    source = plain.find(Text(kind="text"))
    sizes = [sum(len(r.texts[0]) for r in read(source, split)) for split in ("train", "eval")]
    assert sum(sizes) > 400_000
    assert 0.05 < sizes[1] / sum(sizes) < 0.15
