"""Order, augmentation and normalisation of batches."""

from __future__ import annotations

import pytest
import torch

from mpcli.data import image_dataset
from mpcli.data.augment import Cutout, FlipAndCrop
from mpcli.data.image_dataset import ImageDataset, mean_and_std
from mpcli.data.images import ImageInfo, Split, Splits
from mpcli.data.seeds import derive_seed

CPU = torch.device("cpu")


def numbered(num_train: int = 50, num_eval: int = 10) -> Splits:
    """Every image has a label of its own; the evaluation's are 1000 and above."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (num_train, 3, 8, 8), generator=generator).to(torch.uint8)
    held_out = torch.full((num_eval, 3, 8, 8), 255, dtype=torch.uint8)
    return Splits(
        Split(train, torch.arange(num_train)), Split(held_out, 1000 + torch.arange(num_eval))
    )


def dataset(
    splits: Splits | None = None,
    *augment: str,
    channels_last: bool = False,
    device: torch.device = CPU,
) -> ImageDataset:
    splits = splits or numbered()
    info = ImageInfo(len(splits.train.labels), len(splits.eval.labels), (3, 8, 8), 2000, "test")
    data = ImageDataset(info, lambda: (splits, info), augment=augment, channels_last=channels_last)
    data.prepare(device)
    return data


def labels(data: ImageDataset, seed: int, steps: range, batch_size: int = 16) -> list[int]:
    return [
        n for step in steps for n in data.train_batch(seed, step, batch_size)["targets"].tolist()
    ]


def test_an_epoch_is_a_permutation_without_its_incomplete_batch():
    data = dataset()
    for epoch in range(3):
        seen = labels(data, 0, range(3 * epoch, 3 * epoch + 3))
        assert len(set(seen)) == 48 and set(seen) <= set(range(50))
    assert sorted(labels(data, 0, range(10), batch_size=5)) == list(range(50))


def test_epochs_and_seeds_have_orders_of_their_own():
    data = dataset()
    orders = {tuple(labels(data, seed, range(e, e + 3))) for seed in (0, 1) for e in (0, 3)}
    assert len(orders) == 4


def test_a_batch_depends_on_its_arguments_alone():
    first, second = (dataset(None, "flip", "crop", "cutout") for _ in range(2))
    forward = [first.train_batch(5, step, 16) for step in range(8)]
    backward = [second.train_batch(5, step, 16) for step in reversed(range(8))][::-1]
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one["inputs"], other["inputs"])
        assert torch.equal(one["targets"], other["targets"])
    torch.manual_seed(99)
    assert torch.equal(first.train_batch(5, 3, 16)["inputs"], forward[3]["inputs"])


def test_batches_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    dataset(None, "flip", "crop", "cutout").train_batch(0, 0, 16)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_evaluation_split_is_never_trained_on():
    splits = numbered()
    data = dataset(splits, "flip", "crop", "cutout")
    assert max(labels(data, 0, range(30))) < 1000
    black = splits._replace(eval=Split(torch.zeros_like(splits.eval.images), splits.eval.labels))
    other = dataset(black, "flip", "crop", "cutout")
    for step in range(6):
        assert torch.equal(
            data.train_batch(0, step, 16)["inputs"], other.train_batch(0, step, 16)["inputs"]
        )


def test_evaluation_sees_every_image_once_and_as_it_is():
    splits = numbered()
    data = dataset(splits, "flip", "crop", "cutout")
    batches = list(data.eval_batches(4))
    assert [len(batch["targets"]) for batch in batches] == [4, 4, 2]
    assert (
        torch.cat([batch["targets"] for batch in batches]).tolist() == splits.eval.labels.tolist()
    )
    mean, std = mean_and_std(splits.train.images)
    expected = (splits.eval.images.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(torch.cat([batch["inputs"] for batch in batches]), expected)


def test_training_inputs_are_standardised_per_channel():
    data = dataset()
    inputs = torch.cat([data.train_batch(0, step, 10)["inputs"] for step in range(5)])
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        inputs.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0
    )


def test_mean_and_std_equal_torch_in_double():
    images = numbered(200).train.images
    mean, std = mean_and_std(images)
    exact = images.double()
    torch.testing.assert_close(mean, exact.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, exact.std((0, 2, 3), correction=0).float())


def test_a_constant_channel_does_not_divide_by_zero():
    mean, std = mean_and_std(torch.full((4, 1, 8, 8), 77, dtype=torch.uint8))
    assert (mean.item(), std.item()) == (77.0, 1.0)


def test_channels_last_changes_the_layout_only():
    usual = dataset(None, "flip", "crop").train_batch(0, 0, 16)["inputs"]
    nhwc = dataset(None, "flip", "crop", channels_last=True).train_batch(0, 0, 16)["inputs"]
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(usual, nhwc)


def test_the_order_of_the_list_of_augmentations_does_not_matter():
    one = dataset(None, "cutout", "crop", "flip").train_batch(0, 0, 16)["inputs"]
    assert torch.equal(one, dataset(None, "flip", "crop", "cutout").train_batch(0, 0, 16)["inputs"])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("size", [8, 32])
def test_flip_and_crop_give_what_a_loop_over_images_gives(flip: bool, crop: bool, size: int):
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8)
    augment = FlipAndCrop((size, size), flip=flip, crop=crop, device=CPU)
    results = augment(images, torch.Generator().manual_seed(1))

    padding = size // 8 if crop else 0
    mirrored = 0
    for image, result in zip(images, results, strict=True):
        padded = torch.zeros(3, size + 2 * padding, size + 2 * padding, dtype=torch.uint8)
        padded[:, padding : padding + size, padding : padding + size] = image
        variants = [
            (mirror, cut.flip(2) if mirror else cut)
            for mirror in ((False, True) if flip else (False,))
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
            for cut in [padded[:, y : y + size, x : x + size]]
        ]
        matches = [mirror for mirror, variant in variants if torch.equal(variant, result)]
        assert len(matches) == 1
        mirrored += matches[0]
    assert 10 <= mirrored <= 30 if flip else mirrored == 0


def test_every_flip_and_crop_is_as_likely_as_any_other():
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    augment = FlipAndCrop((8, 8), flip=True, crop=True, device=CPU)
    results = augment(image.expand(9000, -1, -1, -1), torch.Generator().manual_seed(0))
    variants, counts = results.flatten(1).unique(dim=0, return_counts=True)
    assert len(variants) == 18  # mirrored or not, 3 x 3 places
    assert counts.min() > 400 and counts.max() < 600


@pytest.mark.parametrize(("size", "side"), [(8, 2), (32, 8)])
def test_cutout_zeroes_one_square_inside_each_image(size: int, side: int):
    inputs = torch.ones(50, 3, size, size)
    Cutout((size, size), device=CPU)(inputs, torch.Generator().manual_seed(0))
    corners = set()
    for image in inputs:
        assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
        rows, columns = (image[0] == 0).nonzero(as_tuple=True)
        assert len(rows) == side * side
        assert rows.max() - rows.min() == columns.max() - columns.min() == side - 1
        corners.add((int(rows[0]), int(columns[0])))
    assert len(corners) > 20


def test_cutout_leaves_the_draws_of_flip_and_crop_as_they_were():
    plain = dataset(None, "flip", "crop").train_batch(0, 0, 16)["inputs"]
    cut = dataset(None, "flip", "crop", "cutout").train_batch(0, 0, 16)["inputs"]
    changed = (plain != cut).any(1)
    assert (cut[changed.unsqueeze(1).expand_as(cut)] == 0).all()
    assert (changed.sum((1, 2)) <= 4).all()


def test_derived_seeds_differ_by_seed_stream_and_index():
    seeds = {
        derive_seed(seed, stream, index)
        for seed in (0, 1, 2**63 - 1)
        for stream in ("order", "augment")
        for index in range(100)
    }
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "order", 0) == 7603036502936883827  # runs can be repeated later


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("free", [2**40, 0], ids=["images on the GPU", "images on the host"])
def test_batches_on_a_gpu_are_the_cpus(monkeypatch: pytest.MonkeyPatch, free: int):
    splits = numbered()
    augment = ("flip", "crop", "cutout")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**40))
    cuda = dataset(splits, *augment, device=torch.device("cuda"))
    cpu = dataset(splits, *augment)
    for step in range(5):
        one, other = cuda.train_batch(3, step, 16), cpu.train_batch(3, step, 16)
        assert torch.equal(one["inputs"].cpu(), other["inputs"])
        assert torch.equal(one["targets"].cpu(), other["targets"])
        assert one["inputs"].device.type == "cuda"


@pytest.mark.parametrize(("share", "fit"), [(1.9, False), (2.0, True), (2.1, True)])
def test_images_are_kept_on_a_gpu_that_has_twice_the_room(
    monkeypatch: pytest.MonkeyPatch, share: float, fit: bool
):
    splits = numbered()
    size = splits.train.images.nbytes + splits.eval.images.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (share * size, 2**40))
    assert image_dataset._fit(splits, torch.device("cuda")) == fit
    assert image_dataset._fit(splits, CPU)
