"""Images in folders named after their classes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpcli.data.image_sources import describe, load
from mpcli.recipe.data import ImageFolder
from mpcli.recipe.errors import Exit, UserError
from tests.small import run_small

COLOURS = {"blue": (0, 0, 250), "red": (250, 0, 0)}


def write_images(folder: Path, size: tuple[int, int] = (12, 8), evaluation: str = "val") -> None:
    for split, number in (("train", 6), (evaluation, 3)):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", size, colour).save(place / f"{index}.png")


def data(folder: Path, **changes: object) -> ImageFolder:
    return ImageFolder.model_validate(
        {"kind": "imagefolder", "path": str(folder), "size": 8, **changes}
    )


@pytest.mark.parametrize("evaluation", ["val", "validation", "test"])
def test_classes_are_the_folders(tmp_path: Path, evaluation: str) -> None:
    write_images(tmp_path, evaluation=evaluation)
    (tmp_path / "train" / "blue" / ".hidden").write_text("of an editor")
    info = describe(data(tmp_path))
    assert (info.num_train, info.num_eval, info.num_classes) == (12, 6, 2)
    assert info.classes == ("blue", "red")
    splits, again = load(data(tmp_path))
    assert again == info
    assert splits.train.labels.tolist() == [0] * 6 + [1] * 6
    assert splits.eval.images.shape == (6, 3, 8, 8)
    for label, colour in enumerate(COLOURS.values()):
        image = splits.train.images[splits.train.labels == label][0]
        assert image.flatten(1).float().mean(1).tolist() == list(colour)


def test_the_shorter_side_is_scaled_and_the_longer_cut(tmp_path: Path) -> None:
    write_images(tmp_path)
    wide = Image.new("RGB", (40, 10), (0, 0, 0))
    wide.paste((200, 200, 200), (15, 0, 25, 10))  # the middle square
    wide.save(tmp_path / "train" / "blue" / "0.png")
    image = load(data(tmp_path, size=4))[0].train.images[0]
    assert image.shape == (3, 4, 4)
    assert image.min() > 150  # but for the edges nothing of what is beside it
    gray = Image.new("L", (4, 4), 7)
    gray.save(tmp_path / "train" / "blue" / "0.png")
    assert torch.equal(load(data(tmp_path, size=4))[0].train.images[0], torch.full((3, 4, 4), 7))


def test_gray_of_16_bits(tmp_path: Path) -> None:
    write_images(tmp_path)
    gray = np.full((4, 4), 0x4321, np.uint16)
    Image.fromarray(gray).save(tmp_path / "train" / "blue" / "0.png")
    image = load(data(tmp_path, size=4))[0].train.images[0]
    assert torch.equal(image, torch.full((3, 4, 4), 0x43))


BROKEN = {
    "empty": b"",
    "text": b"no image at all",
    "cut off": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "GIF": b"GIF89a\1\0\1\0\0\0\0;",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    write_images(tmp_path)
    bad = tmp_path / "train" / "red" / "bad.jpg"
    bad.write_bytes(content)
    assert describe(data(tmp_path)).num_train == 13  # nothing is read for this
    with pytest.raises(UserError, match=f"{bad} is not a readable PNG or JPEG image") as caught:
        load(data(tmp_path))
    assert caught.value.exit_code == Exit.ENVIRONMENT
    assert "on_error: skip" in (caught.value.problems[0].hint or "")


def test_it_is_skipped_and_counted_when_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path)
    for index, split in enumerate(("train", "train", "val")):
        (tmp_path / split / "blue" / f"bad{index}.png").write_bytes(b"no image")
    skipping = data(tmp_path, on_error="skip")
    with caplog.at_level(logging.WARNING):
        info = describe(skipping)
    assert caplog.text.count("skipped:") == 3
    assert "bad0.png" in caplog.text
    assert (info.num_train, info.num_eval) == (12, 6)
    assert "3 files skipped" in info.source
    assert load(skipping)[1] == info  # from the cache too


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("", "no such folder"),
        ("train", "no folder `train`"),
        ("val", "none of `val`, `validation` or `test`"),
        ("train/red", "`val` has the class `red`, and `train` not"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path: Path, missing: str, said: str) -> None:
    folder = tmp_path / "images"
    write_images(folder)
    (folder / missing).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=said) as caught:
        describe(data(folder))
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    write_images(tmp_path)
    for split in ("train", "val"):
        shutil.rmtree(tmp_path / split / "red")
    with pytest.raises(UserError, match="`train` has the class `blue` alone") as caught:
        describe(data(tmp_path))
    assert caught.value.exit_code == Exit.ENVIRONMENT


def test_only_broken_files_are_no_data(tmp_path: Path) -> None:
    write_images(tmp_path)
    for path in tmp_path.glob("val/*/*"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="`val` holds no image"):
        describe(data(tmp_path, on_error="skip"))


def test_a_model_learns_from_it(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    chosen = f"data={{kind: imagefolder, path: {tmp_path / 'images'}, size: 8, augment: [flip]}}"
    run, result = run_small(tmp_path, chosen, "train={steps: 20, global_batch_size: 4}")
    assert result.metrics["eval"]["accuracy"] == 1.0
    assert "CLASSES = ['blue', 'red']" in (run.final_path / "load.py").read_text()
