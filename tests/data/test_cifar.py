"""CIFAR from its three layouts, and what is said when it is missing or damaged."""

from __future__ import annotations

import hashlib
import pickle
import socket
import urllib.error
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpcli.data import cifar
from mpcli.data.cifar import archive, parquet, python_batches
from mpcli.data.image_sources import describe, load
from mpcli.recipe.data import Cifar10, Cifar100
from mpcli.recipe.errors import Exit, Problem, UserError
from tests.tiny_cifar import png, tiny_split, write_parquet, write_tiny_cifar


@pytest.fixture(autouse=True)
def nothing_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, no MPTRAIN_DATA, no network."""
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPTRAIN_DATA", raising=False)

    def no_network(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", no_network)


@pytest.fixture
def tiny_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published sets have 50 and 10 images."""
    tiny = {kind: replace(spec, num_train=50, num_eval=10) for kind, spec in cifar.SPECS.items()}
    monkeypatch.setattr(cifar, "SPECS", tiny)


def cifar10(path: Path | None) -> Cifar10:
    return Cifar10(kind="cifar10", path=None if path is None else str(path))


def cifar100(path: Path | None) -> Cifar100:
    return Cifar100(kind="cifar100", path=None if path is None else str(path))


def problem(data: Cifar10 | Cifar100) -> Problem:
    """The one problem of loading, which must be one of the environment."""
    with pytest.raises(UserError) as caught:
        load(data)
    assert caught.value.exit_code == Exit.ENVIRONMENT
    (only,) = caught.value.problems
    return only


def assert_tiny(data: Cifar10 | Cifar100, num_train: int, num_eval: int) -> None:
    """The data is that of `tiny_split`, pixel by pixel, and its description is true."""
    splits, info = load(data)
    assert info == describe(data)
    assert (info.num_train, info.num_eval) == (num_train, num_eval)
    for seed, (split, num_images) in enumerate(zip(splits, (num_train, num_eval), strict=True)):
        images, labels = tiny_split(num_images, seed)
        assert torch.equal(split.images, torch.from_numpy(images))
        assert split.labels.dtype == torch.int64 and split.labels.tolist() == labels.tolist()


# Parquet


def test_parquet_in_the_folder_itself(tmp_path: Path):
    write_tiny_cifar(tmp_path, 30, 20)
    assert_tiny(cifar10(tmp_path), 30, 20)
    info = describe(cifar10(tmp_path))
    assert info.source == f"{tmp_path} (parquet)"
    assert info.input_shape == (3, 32, 32) and info.num_classes == 10


@pytest.mark.parametrize("place", ["data", "plain_text", "cifar10"])
def test_parquet_shards_in_a_subfolder_of_the_hub(tmp_path: Path, place: str):
    images, labels = tiny_split(30, 0)
    encoded = [png(image) for image in images]
    for shard in range(2):
        part = slice(shard * 15, shard * 15 + 15)
        path = tmp_path / place / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, encoded[part], labels[part].tolist(), image_column="image")
    images, labels = tiny_split(20, 1)
    path = tmp_path / place / "test-00000-of-00001.parquet"
    write_parquet(path, [png(image) for image in images], labels.tolist(), image_column="image")
    assert_tiny(cifar10(tmp_path), 30, 20)
    (tmp_path / place / "train-00000-of-00002.parquet").unlink()
    assert "has 1 of 2 shards" in problem(cifar10(tmp_path)).what


def test_cifar100_learns_the_fine_labels(tmp_path: Path):
    images, _ = tiny_split(10, 0)
    for name in ("train", "test"):
        write_parquet(
            tmp_path / "cifar100" / f"{name}.parquet",
            [png(image) for image in images],
            [99, *range(9)],
            label_column="fine_label",
        )
    splits, info = load(cifar100(tmp_path))
    assert splits.train.labels.tolist() == [99, *range(9)] and info.num_classes == 100


def test_grey_and_transparent_images_become_rgb(tmp_path: Path):
    write_tiny_cifar(tmp_path, 10, 10)
    for mode in ("L", "RGBA", "P"):
        file = tmp_path / "image.png"
        Image.new(mode, (32, 32)).save(file)
        write_parquet(tmp_path / "train.parquet", [file.read_bytes()], [3])
        assert load(cifar10(tmp_path))[0].train.images.shape == (1, 3, 32, 32)


def test_jpeg_is_decoded(tmp_path: Path):
    write_tiny_cifar(tmp_path, 10, 10)
    Image.new("RGB", (32, 32), (200, 100, 50)).save(tmp_path / "image.jpg")
    write_parquet(tmp_path / "train.parquet", [(tmp_path / "image.jpg").read_bytes()], [3])
    pixel = load(cifar10(tmp_path))[0].train.images[0, :, 5, 5]
    assert (pixel.int() - torch.tensor([200, 100, 50])).abs().max() < 4


def small_png() -> bytes:
    return png(np.zeros((3, 28, 28), np.uint8))


def gif() -> bytes:
    import io

    file = io.BytesIO()
    Image.new("P", (32, 32)).save(file, "GIF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "label", "said"),
    [
        (b"not an image", 0, "row 7: is not a readable PNG or JPEG image"),
        (gif(), 0, "row 7: is not a readable PNG or JPEG image"),
        (small_png(), 0, "row 7: the image is 28x28, not 32x32"),
        (png(tiny_split(1, 0)[0][0])[:400], 0, "row 7: is not a readable PNG or JPEG image"),
        (None, 0, "row 7: holds no image bytes"),
        (png(tiny_split(1, 0)[0][0]), 10, "row 7: label 10 is not in 0..9"),
        (png(tiny_split(1, 0)[0][0]), -1, "row 7: label -1 is not in 0..9"),
        (png(tiny_split(1, 0)[0][0]), None, "row 7: label None is not in 0..9"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, image: bytes | None, label: int | None, said: str):
    write_tiny_cifar(tmp_path, 10, 10)
    images, labels = tiny_split(10, 0)
    cells: list[bytes | None] = [png(item) for item in images]
    numbers: list[int | None] = labels.tolist()
    cells[7], numbers[7] = image, label
    write_parquet(tmp_path / "train.parquet", cells, numbers)
    assert f"{tmp_path / 'train.parquet'}: {said}" in problem(cifar10(tmp_path)).what


def test_the_first_bad_row_is_named_in_a_file_of_several_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(parquet, "_ROWS_PER_TASK", 3)
    write_tiny_cifar(tmp_path, 20, 10)
    assert_tiny(cifar10(tmp_path), 20, 10)
    images, labels = tiny_split(20, 0)
    cells: list[bytes | None] = [png(item) for item in images]
    cells[5] = cells[16] = b"bad"
    write_parquet(tmp_path / "train.parquet", cells, labels.tolist())
    assert "row 5:" in problem(cifar10(tmp_path)).what


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image_column": "picture"}, "has no column `img` or `image` of encoded images"),
        ({"label_column": "class"}, "has no column `label` of whole numbers, but `img`, `class`"),
        ({"image_column": "label", "label_column": "img"}, "has no column `img` or `image`"),
    ],
)
def test_a_wrong_column_is_told_before_anything_is_read(
    tmp_path: Path, columns: dict[str, str], said: str
):
    write_tiny_cifar(tmp_path, 10, 10)
    images, labels = tiny_split(10, 0)
    cells = [png(image) for image in images]
    write_parquet(tmp_path / "train.parquet", cells, labels.tolist(), **columns)
    with pytest.raises(UserError, match=said):
        describe(cifar10(tmp_path))


def test_a_file_that_is_not_parquet(tmp_path: Path):
    write_tiny_cifar(tmp_path, 10, 10)
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no")
    said = problem(cifar10(tmp_path))
    assert said.what.startswith(f"{tmp_path / 'test.parquet'}: is not a readable parquet file")


def test_a_parquet_file_damaged_in_the_middle(tmp_path: Path):
    write_tiny_cifar(tmp_path, 10, 10)
    path = tmp_path / "train.parquet"
    content = bytearray(path.read_bytes())
    content[200:2000] = bytes(1800)
    path.write_bytes(content)
    assert str(path) in problem(cifar10(tmp_path)).what


def test_an_empty_split(tmp_path: Path):
    write_tiny_cifar(tmp_path, 10, 0)
    assert "holds no images" in problem(cifar10(tmp_path)).what


# The published python version


def write_python_version(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Pickles with 50 and 10 images, which torchvision's list of MD5s then knows."""
    spec = cifar.SPECS[kind]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[kind]
    folder.mkdir(parents=True)
    known: list[list[tuple[str, str]]] = []
    for seed, names in enumerate(spec.python_files):
        images, labels = tiny_split(50 if seed == 0 else 10, seed)
        known.append([])
        for name, part in zip(
            names, np.array_split(np.arange(len(labels)), len(names)), strict=True
        ):
            batch = {"data": images[part].reshape(len(part), -1), key: labels[part].tolist()}
            content = pickle.dumps(batch, protocol=2)
            (folder / name).write_bytes(content)
            known[-1].append((name, hashlib.md5(content).hexdigest()))
    listed = SimpleNamespace(train_list=known[0], test_list=known[1])
    monkeypatch.setattr(python_batches, "published", lambda _: listed)


@pytest.mark.parametrize("inside", [True, False])
def test_python_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_official: None, inside: bool
):
    folder = tmp_path / "there"
    place = folder / "cifar-10-batches-py" if inside else folder
    write_python_version(place, monkeypatch, "cifar10")
    assert_tiny(cifar10(folder), 50, 10)
    assert describe(cifar10(folder)).source == f"{folder} (python batches)"


def test_python_batches_of_cifar100(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_official: None
):
    write_python_version(tmp_path / "cifar-100-python", monkeypatch, "cifar100")
    assert_tiny(cifar100(tmp_path), 50, 10)


class _Attack:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_a_pickle_with_another_md5_is_never_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_official: None
):
    folder, mark = tmp_path / "cifar-10-batches-py", tmp_path / "executed"
    write_python_version(folder, monkeypatch, "cifar10")
    (folder / "data_batch_3").write_bytes(pickle.dumps(_Attack(mark)))
    said = problem(cifar10(tmp_path))
    assert "data_batch_3: is not the published file: MD5" in said.what
    assert not mark.exists()


def test_torchvision_lists_every_file_that_is_looked_for():
    for spec in cifar.SPECS.values():
        listed = python_batches.published(spec)
        for names, known in zip(
            spec.python_files, (listed.train_list, listed.test_list), strict=True
        ):
            assert list(names) == [name for name, _ in known]
        assert spec.python_folder == listed.base_folder


# The binary version


def write_binary_version(folder: Path, kind: str) -> None:
    spec = cifar.SPECS[kind]
    folder.mkdir(parents=True)
    for seed, names in enumerate(spec.binary_files):
        images, labels = tiny_split(50 if seed == 0 else 10, seed)
        coarse = np.full((len(labels), spec.label_bytes - 1), 19)
        records = np.concatenate([coarse, labels[:, None], images.reshape(len(labels), -1)], 1)
        for name, part in zip(names, np.array_split(records, len(names)), strict=True):
            (folder / name).write_bytes(part.astype(np.uint8).tobytes())


@pytest.mark.parametrize(
    ("make", "name"),
    [(cifar10, "cifar-10-batches-bin"), (cifar100, "cifar-100-binary"), (cifar10, ".")],
)
def test_binary_version(tmp_path: Path, tiny_official: None, make: Any, name: str):
    folder = tmp_path / "there"
    write_binary_version(folder / name, make(None).kind)
    assert_tiny(make(folder), 50, 10)


def test_a_binary_file_of_another_size(tmp_path: Path, tiny_official: None):
    write_binary_version(tmp_path / "bin", "cifar10")
    path = tmp_path / "bin" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-3073])
    with pytest.raises(UserError, match=r"data_batch_2.bin: has 27,657 bytes instead of 30,730"):
        describe(cifar10(tmp_path / "bin"))


def test_a_binary_file_with_a_wrong_label(tmp_path: Path, tiny_official: None):
    write_binary_version(tmp_path / "bin", "cifar10")
    path = tmp_path / "bin" / "test_batch.bin"
    content = bytearray(path.read_bytes())
    content[4 * 3073] = 10
    path.write_bytes(content)
    assert (
        "test_batch.bin: record 4: label 10 is not below 10"
        in problem(cifar10(tmp_path / "bin")).what
    )


# Where it is looked for


def test_mptrain_data_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tiny_cifar(tmp_path / "sets" / "cifar10", 20, 10)
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path / "sets"))
    assert_tiny(cifar10(None), 20, 10)


def test_a_named_path_comes_before_mptrain_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tiny_cifar(tmp_path / "sets" / "cifar10", 20, 10)
    write_tiny_cifar(tmp_path / "mine", 30, 20)
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path / "sets"))
    assert describe(cifar10(tmp_path / "mine")).num_train == 30


def test_a_path_that_is_not_there(tmp_path: Path):
    for action in (describe, load):
        with pytest.raises(UserError, match=f"no folder {tmp_path}/nowhere") as caught:
            action(cifar10(tmp_path / "nowhere"))
        assert caught.value.exit_code == Exit.ENVIRONMENT
        assert caught.value.problems[0].path == "data.path"


def test_a_folder_without_the_data_says_what_it_holds(tmp_path: Path):
    (tmp_path / "train.parquet").touch()
    (tmp_path / "holiday.jpg").touch()
    said = problem(cifar10(tmp_path))
    assert said.what == f"no whole CIFAR-10 in {tmp_path}; it holds holiday.jpg, train.parquet"
    assert "cifar-10-batches-bin" in (said.hint or "")


def test_without_network_every_place_and_every_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MPTRAIN_DATA", str(tmp_path / "sets"))
    said = problem(cifar10(None))
    for place in (tmp_path / "sets" / "cifar10", tmp_path / "cache" / "download" / "cifar10"):
        assert str(place) in said.what
    assert "no network in tests" in said.what
    for remedy in ("data.path", "MPTRAIN_DATA", "network"):
        assert remedy in (said.hint or "")
    monkeypatch.delenv("MPTRAIN_DATA")
    assert "$MPTRAIN_DATA/cifar10 (not set)" in problem(cifar10(None)).what


def test_what_is_to_be_downloaded_is_described_as_published():
    for data, classes in ((cifar10(None), 10), (cifar100(None), 100)):
        info = describe(data)
        assert (info.num_train, info.num_eval) == (50_000, 10_000)
        assert info.num_classes == classes and "by download" in info.source


# Download


def published_archive(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    files = SimpleNamespace(url="u", filename="f", tgz_md5="m")
    monkeypatch.setattr(archive, "published", lambda _: files)
    monkeypatch.setattr(
        "torchvision.datasets.utils.download_and_extract_archive",
        lambda url, root, filename, md5: write(Path(root)),
    )


def test_a_download_is_kept_and_found_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_official: None,
):
    def write(root: Path) -> None:
        print("Extracting")  # noqa: T201, as torchvision does
        (root / "archive.tar.gz").write_bytes(b"...")
        write_python_version(root / "cifar-10-batches-py", monkeypatch, "cifar10")

    published_archive(monkeypatch, write)
    assert load(cifar10(None))[1].num_train == 50
    assert capsys.readouterr().out == ""
    published_archive(monkeypatch, pytest.fail)
    assert_tiny(cifar10(None), 50, 10)
    assert "download" in describe(cifar10(None)).source
    assert [path.name for path in (tmp_path / "cache" / "download").iterdir()] == ["cifar10"]


@pytest.mark.parametrize(
    "error", [OSError("cut off"), RuntimeError("File not found or corrupted.")]
)
def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def write(root: Path) -> None:
        (root / "archive.tar.gz").write_bytes(b"half")
        raise error

    published_archive(monkeypatch, write)
    timeout = socket.getdefaulttimeout()
    assert str(error) in problem(cifar10(None)).what
    assert not list((tmp_path / "cache" / "download").iterdir())
    assert "by download" in describe(cifar10(None)).source
    assert socket.getdefaulttimeout() == timeout


# Real data


def test_the_real_cifar10(shared_data: Path):
    info = describe(cifar10(None))
    assert (info.num_train, info.num_eval) == (50_000, 10_000)


@pytest.mark.slow
def test_the_real_cifar10_decodes(shared_data: Path):
    splits, _ = load(cifar10(None))
    for split, each in zip(splits, (5000, 1000), strict=True):
        assert torch.bincount(split.labels).tolist() == [each] * 10
        assert split.images.shape == (10 * each, 3, 32, 32)
    mean = splits.train.images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(mean, torch.tensor([0.491, 0.482, 0.447]), atol=2e-3, rtol=0)
