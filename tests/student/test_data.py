"""A label that slips against its image by a crop, a flip or a resize teaches the student that roads are trees."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from autolabel.manifests import images
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.run.shards import bucket_of, create_zarr, encode_zarr, write_zarr_shard
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.job import Mix
from autolabel.student.sampling import Draws

HEIGHT, WIDTH, STRIPE = 96, 192, 16
MEAN_COLOUR = (124, 116, 104)
STILL = Augmentation((HEIGHT, WIDTH), scale=(1, 1), jitter=0)  # only the flip is left
PLAIN = Mix(class_uniform=0)  # samples by weight, aimed at nothing


@pytest.fixture(scope="module")
def fine(city: Path) -> Manifest:
    return load_manifest(city / "fine.parquet")


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> ManifestDataset:
    """Two images whose red is 200 x the label's class: upright stripes of classes 0 and 1, and lying ones."""
    root = tmp_path_factory.mktemp("stripes")
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for name, position in (("upright", x), ("lying", y)):
        label = (position // STRIPE % 2).astype(np.uint8)
        image = np.stack([200 * label, np.full_like(label, 90), np.full_like(label, 60)], axis=-1)
        for folder, array in (("images", image), ("labels", label)):
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(root / folder / f"{name}.png")
    return ManifestDataset(scan(root / "images", layout="folder", labels=root / "labels", label_space=CAMVID)[0])


def crops(
    dataset: ManifestDataset, augmentation: Augmentation, seed: int = 0, length: int = 1000, mix: Mix = PLAIN
) -> TrainingCrops:
    draws = Draws(dataset.samples, dataset.label_space, mix=mix, seed=seed, length=length)
    return TrainingCrops(dataset, draws, augmentation=augmentation)


def pixels(item: dict[str, torch.Tensor]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(h, w, 3) image and (h, w) label of an item."""
    return item["image"].permute(1, 2, 0).numpy(), item["label"].numpy()


def drawn_as_labels(
    root: Path,
    labels: Mapping[str, NDArray[np.uint8]],
    images: Mapping[str, NDArray[np.uint8]] | None = None,
    suffix: str = "png",
) -> ManifestDataset:
    """These labels of CamVid's classes, with images that show them or with images of their own."""
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for name, label in labels.items():
        image = images[name] if images else np.stack([label] * 3, axis=-1)
        Image.fromarray(image).save(root / "images" / f"{name}.{suffix}", quality=95)
        Image.fromarray(label).save(root / "labels" / f"{name}.png")
    return ManifestDataset(scan(root / "images", layout="folder", labels=root / "labels", label_space=CAMVID)[0])


# --- whole pictures ---------------------------------------------------------------------------------------------------


def test_an_item_is_the_picture_and_its_label_in_train_ids(city: Path, fine: Manifest) -> None:
    dataset = ManifestDataset(city / "fine.parquet")
    assert len(dataset) == 6
    assert dataset.label_space == CITYSCAPES
    for n, sample in enumerate(fine.samples):
        item = dataset[n]
        image, label = pixels(item)
        assert (item["image"].shape, item["image"].dtype) == ((3, HEIGHT, WIDTH), torch.uint8)
        assert (item["label"].shape, item["label"].dtype) == ((HEIGHT, WIDTH), torch.uint8)
        assert item["sample_id"] == sample.sample_id
        assert np.array_equal(image, np.asarray(Image.open(sample.image)))
        assert sample.label is not None
        assert label.tobytes() == np.asarray(Image.open(sample.label)).tobytes().translate(CITYSCAPES.train_ids)
        assert 0 in label  # road
        assert set(np.unique(label)) <= {*range(19), 255}


def test_samples_without_a_label_or_a_readable_image_are_left_out(fine: Manifest) -> None:
    unlabelled = replace(fine.samples[0], label=None, source="none")
    unreadable = replace(fine.samples[1], height=0, width=0)
    dataset = ManifestDataset(replace(fine, samples=(unlabelled, unreadable, *fine.samples[2:])))
    assert [s.sample_id for s in dataset.samples] == [s.sample_id for s in fine.samples[2:]]


def test_a_manifest_without_a_label_is_refused(fine: Manifest) -> None:
    message = "^the manifest has no labelled sample: nothing to train on or to score$"
    for samples in ((), (replace(fine.samples[0], label=None),)):
        with pytest.raises(ValueError, match=message):
            ManifestDataset(replace(fine, samples=samples))


def test_labels_of_a_run_are_read_from_zarr_as_from_png(fine: Manifest, tmp_path: Path) -> None:
    """The same labels once as PNG files, once as rows 2, 3, … of a Zarr array: whole items and crops are equal."""
    from_png = ManifestDataset(fine)
    bucket, labels = bucket_of(HEIGHT, WIDTH), [item["label"].numpy() for item in from_png]
    create_zarr(tmp_path / "labels.zarr", {bucket: 8}, shard_rows=8, attributes={})
    array = tmp_path / "labels.zarr" / bucket
    write_zarr_shard(array, 0, shard_rows=8, labels=[None, None, *map(encode_zarr, labels)])
    stored = tuple(
        replace(s, source="auto", label=array, label_index=n + 2, label_ids="train") for n, s in enumerate(fine.samples)
    )
    save_manifest(tmp_path / "manifest.parquet", Manifest.of(CITYSCAPES, stored))
    from_zarr = ManifestDataset(tmp_path / "manifest.parquet")
    seen = 0
    for here, there in (
        (from_png, from_zarr),
        tuple(crops(d, Augmentation((64, 80)), length=20, mix=Mix()) for d in (from_png, from_zarr)),
    ):
        assert len(here) == len(there)
        for n in range(len(here)):
            a, b = here[n], there[n]
            assert a["sample_id"] == b["sample_id"]
            assert torch.equal(a["image"], b["image"])
            assert torch.equal(a["label"], b["label"])
            seen += 1
    assert seen == 26


# --- what changed on disk since the scan ------------------------------------------------------------------------------


@pytest.fixture
def one(tmp_path: Path, fine: Manifest) -> ManifestDataset:
    """One sample whose files may be damaged."""
    sample = fine.samples[0]
    assert sample.label is not None
    image, label = tmp_path / "image.png", tmp_path / "label.png"
    image.write_bytes(sample.image.read_bytes())
    label.write_bytes(sample.label.read_bytes())
    return ManifestDataset(Manifest.of(CITYSCAPES, (replace(sample, image=image, label=label),)))


def complaints(dataset: ManifestDataset) -> set[str]:
    """What is said when the sample is read whole, and when a crop of it is."""
    said = set()
    for mix in (None, PLAIN, Mix(class_uniform=1)):
        with pytest.raises(ValueError) as refused:
            _ = (dataset if mix is None else crops(dataset, Augmentation((32, 32)), mix=mix))[0]
        said.add(str(refused.value))
    return said


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        pytest.param(0, "the file is empty", id="empty"),
        pytest.param(0.0002, "damaged or truncated: the file ends in its header", id="only a start"),
        pytest.param(0.5, "damaged or truncated: the file ends in the middle", id="half"),
    ],
)
def test_a_damaged_image_is_named_with_the_reason(kept: float, reason: str, one: ManifestDataset) -> None:
    image = one.samples[0].image
    os.truncate(image, int(image.stat().st_size * kept))
    (said,) = complaints(one)
    assert said.startswith(f"image {image}: {reason}")


def test_an_image_that_is_gone_is_named(one: ManifestDataset) -> None:
    image = one.samples[0].image
    image.unlink()
    (said,) = complaints(one)
    assert said.startswith(f"image {image}: ")


def test_an_image_of_another_size_than_at_scan_time_is_refused(one: ManifestDataset) -> None:
    image = one.samples[0].image
    Image.open(image).resize((96, 96)).save(image)
    assert complaints(one) == {f"image {image}: the image is 96 x 96 but its manifest says 192 x 96: scan again"}


def test_a_label_of_another_size_than_at_scan_time_is_refused(one: ManifestDataset) -> None:
    """Stretched over its image it would look right and be wrong everywhere."""
    label = one.samples[0].label
    assert label is not None
    label.write_bytes(encode_label(np.asarray(Image.open(label))[:48, :96]))
    (said,) = complaints(one)
    assert str(label) in said
    assert "96 x 48" in said
    assert "192 x 96" in said


def test_a_label_with_an_id_that_means_nothing_is_refused(one: ManifestDataset) -> None:
    label = one.samples[0].label
    assert label is not None
    label.write_bytes(encode_label(np.full((HEIGHT, WIDTH), 77, np.uint8)))
    assert complaints(one) == {f"{label}: ids [77] are not in label space 'cityscapes' (source ids)"}


# --- augmented crops --------------------------------------------------------------------------------------------------


def test_the_label_stays_on_its_image_through_crop_scale_and_flip(stripes: ManifestDataset) -> None:
    """Red says what every pixel is; between two stripes it is mixed, and the label there is the nearer stripe's."""
    mixed: list[float] = []
    for n in range(60):
        image, label = pixels(crops(stripes, Augmentation((64, 96), jitter=0))[n])
        inside = label != 255
        assert np.isin(label[inside], (0, 1)).all()
        assert (image[~inside] == MEAN_COLOUR).all()
        assert (image[inside][:, 1:] == (90, 60)).all()  # no padding where there is a label
        red = image[..., 0].astype(int)
        sure = inside & (abs(red - 100) > 30)
        assert np.array_equal(red[sure] > 100, label[sure] == 1)
        mixed.append(float(1 - sure.sum() / inside.sum()))
    assert max(mixed) < 0.15


def test_crops_come_from_everywhere_at_scales_from_half_to_double(tmp_path: Path) -> None:
    """Of an image whose red is x and whose green is y, each crop tells where and at which scale it was taken."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.uint8)
    dataset = drawn_as_labels(tmp_path, {"a": 0 * x}, {"a": np.stack([x, y, 0 * x], axis=-1)})
    taken = crops(dataset, Augmentation((32, 32), jitter=0))
    found = [pixels(taken[n])[0].astype(int) for n in range(300)]
    scales = np.array([32 / (1 + np.ptp(image[..., 0])) for image in found])
    assert 0.49 < scales.min() < 0.55
    assert 1.8 < scales.max() < 2.1
    assert 0.85 < np.median(scales) < 1.15  # as often below 1 as above
    for channel, last in ((0, WIDTH - 1), (1, HEIGHT - 1)):
        assert min(image[..., channel].min() for image in found) <= 4
        assert max(image[..., channel].max() for image in found) >= last - 4
    assert 110 <= sum(image[0, 0, 0] > image[0, -1, 0] for image in found) <= 190  # half of them mirrored


def hues(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(picture).convert("HSV"))[..., 0]


def test_published_crops_have_uniform_scales_turned_hues_and_black_around(tmp_path: Path) -> None:
    """A red square of 32 on grey: its side tells the scale, its hue the turn; around the image there is padding."""
    label = np.zeros((64, 64), np.uint8)
    label[16:48, 16:48] = 1
    image = np.full((64, 64, 3), 128, np.uint8)
    image[label == 1] = (200, 40, 40)
    dataset = drawn_as_labels(tmp_path, {"a": label}, {"a": image})
    taken = crops(dataset, Augmentation((130, 130), published=True))
    scales, turns, around = [], [], []
    for n in range(200):
        picture, ids = pixels(taken[n])
        square, padding = ids == 1, picture[ids == 255].astype(int)
        scales.append(square.any(axis=0).sum() / 32)
        turns.append(int(np.median(hues(picture)[square]).astype(np.int8)))  # of 256 in a circle
        assert (padding == padding[0, 0]).all()
        around.append(int(padding[0, 0]))
    assert 0.5 <= min(scales) < 0.6 and 1.9 < max(scales) <= 2
    assert 1.18 < np.mean(scales) < 1.32  # uniform: 1.25; uniform in the logarithm: 1.08
    assert -65 <= min(turns) < -58 and 58 < max(turns) <= 65
    assert abs(np.mean(turns)) < 8
    assert min(around) == 0 and 0 < max(around) < 40  # black, and what a change of contrast makes of it


def test_published_crops_are_moved_into_the_image_and_small_images_lie_in_the_middle(tmp_path: Path) -> None:
    """Of 100 places of a window of 100 over pixel 60 of 200, those before the image and behind it become its ends."""
    label = np.zeros((200, 200), np.uint8)
    label[60, 60] = 1
    colours = np.stack([np.indices((200, 200))[1]] * 3, axis=-1).astype(np.uint8)
    dataset = drawn_as_labels(tmp_path, {"a": label}, {"a": colours})
    still = Augmentation((100, 100), scale=(1, 1), jitter=0, published=True)
    taken = crops(dataset, still, mix=Mix(class_uniform=1))
    first = []
    for n in range(600):
        around, (picture, ids) = taken.draws[n].around, pixels(taken[n])
        assert around is not None
        if around.class_id == 1:
            assert 1 in ids
            first.append(int(picture[0, :, 0].astype(int).min()))
    assert (min(first), max(first)) == (0, 60)  # 39 of the 100 places begin before the image
    assert 0.3 < np.mean([place == 0 for place in first]) < 0.5
    for n in range(10):
        ids = pixels(crops(dataset, replace(still, crop=(240, 301)))[n])[1] != 255
        assert np.argwhere(ids).min(axis=0).tolist() == [20, 50]


def test_published_crops_are_resized_as_pillow_does_bicubically(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    image = dice.integers(0, 256, (40, 60, 3)).astype(np.uint8)
    dataset = drawn_as_labels(tmp_path, {"a": np.zeros((40, 60), np.uint8)}, {"a": image})
    picture, _ = pixels(crops(dataset, Augmentation((80, 120), scale=(2, 2), jitter=0, published=True))[0])
    expected = np.asarray(Image.fromarray(image).resize((120, 80), Image.Resampling.BICUBIC))
    assert abs(np.minimum(*(abs(picture.astype(int) - e) for e in (expected, expected[:, ::-1])))).max() <= 6  # by HSV


def test_every_crop_is_blurred_by_a_sigma_between_the_published_ones(tmp_path: Path) -> None:
    """A step from 0 to 200 rises by about 200 / (sigma * sqrt(2 pi)) a pixel at its middle, by 200 at sigma 0.15."""
    label = np.zeros((64, 64), np.uint8)
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, 32:] = 200
    dataset = drawn_as_labels(tmp_path, {"a": label}, {"a": image})
    still = Augmentation((64, 64), scale=(1, 1), jitter=0)
    sharp = crops(dataset, still)
    taken = crops(dataset, replace(still, blur=True))
    steps = []
    for n in range(200):
        assert abs(np.diff(pixels(sharp[n])[0][..., 0].astype(int), axis=1)).max() == 200
        row = pixels(taken[n])[0][32, :, 0].astype(int)
        assert row.min() == 0 and row.max() == 200
        steps.append(abs(np.diff(row)).max())
    assert 190 <= max(steps) <= 200
    assert 55 <= min(steps) <= 65  # 200 / (1.3 * 2.5) = 61
    assert 105 < np.median(steps) < 135  # 110 at 0.725, the middle of the range; Pillow's three boxes give 125


@pytest.mark.parametrize(("share", "most"), [(0.0, 0.1), (1.0, None)])
def test_a_rare_class_is_looked_for_where_crops_are_aimed(share: float, most: float | None, tmp_path: Path) -> None:
    """Of two classes, one has four pixels in a corner: exactly every other aimed crop is aimed at it, and shows it."""
    label = np.zeros((200, 300), np.uint8)
    label[60:62, 280:282] = 1
    dataset = drawn_as_labels(tmp_path, {"a": label})
    taken = crops(dataset, Augmentation((32, 32), scale=(1, 1), jitter=0), mix=Mix(class_uniform=share))
    shown = np.array([1 in taken[n]["label"] for n in range(300)])
    aims = [taken.draws[n].around for n in range(300)]
    if most is not None:
        assert shown.mean() <= most
        assert aims == [None] * 300
    else:
        aimed = np.array([around is not None and around.class_id == 1 for around in aims])
        assert shown[aimed].all()
        assert 100 < aimed.sum() < 200  # one draw an epoch: either class, as often


def test_a_crop_lies_over_a_pixel_of_its_class_also_where_the_centroid_does_not(tmp_path: Path) -> None:
    """Two poles at either end of a tile: between them, where the centroid is, there is only road."""
    label = np.zeros((700, 800), np.uint8)
    label[100:160, 10:14] = label[100:160, 490:494] = 2
    label[650:, 700:] = 255
    dataset = drawn_as_labels(tmp_path, {"a": label})
    still = Augmentation((40, 40), scale=(1, 1), jitter=0)
    taken = crops(dataset, still, mix=Mix(class_uniform=1))
    classes = Counter[int]()
    for n in range(80):
        around = taken.draws[n].around
        assert around is not None
        if around.class_id == 2:
            assert (around.y, around.x) == (129.5, 251.5)
        assert around.class_id in taken[n]["label"]
        classes[around.class_id] += 1
    assert min(classes[0], classes[2]) > 20


def test_labels_that_are_all_ignored_are_refused_where_crops_are_aimed(one: ManifestDataset) -> None:
    label = one.samples[0].label
    assert label is not None
    label.write_bytes(encode_label(np.zeros((HEIGHT, WIDTH), np.uint8)))  # source id 0: unlabeled
    taken = crops(one, Augmentation((32, 32)))
    assert all((taken[n]["label"] == 255).all() for n in range(5))
    message = "no fine label has a pixel of any class: there is nothing to learn from them"
    with pytest.raises(ValueError, match=f"^{message}$"):
        crops(one, Augmentation((32, 32)), mix=Mix())


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("scale", [0.2, 0.5, 0.7, 1.0, 2.0])
def test_every_pixel_of_a_crop_keeps_its_label_whatever_the_scale(suffix: str, scale: float, tmp_path: Path) -> None:
    """Red is x / 2 and green y / 2, and so is the label, in cells of 64: also where a JPEG is decoded at half its size.

    The image's colours say where each pixel of a crop comes from, the label at that place is known.
    """
    y, x = np.mgrid[:384, :448]
    label = (y // 64 * 0 + (x // 64 + y // 64) % 7).astype(np.uint8)
    image = np.stack([x // 2, y // 2, 0 * x + 128], axis=-1).astype(np.uint8)
    dataset = drawn_as_labels(tmp_path, {"a": label}, {"a": image}, suffix)
    crop = (48, 80)
    taken = crops(dataset, Augmentation(crop, scale=(scale, scale), jitter=0), mix=Mix())
    mirrored = 0
    for n in range(12):
        colours, ids = pixels(taken[n])
        inside = ids != 255
        assert np.array_equal(inside, (colours != MEAN_COLOUR).any(axis=-1))
        from_x, from_y = (2 * colours[inside][:, k].astype(float) + 0.5 for k in (0, 1))
        # Far from a border of the cells by more than resampling and JPEG can shift it.
        margin = 8 + 2 / scale
        sure = np.minimum(abs((from_x + 32) % 64 - 32), abs((from_y + 32) % 64 - 32)) > margin
        expected = (from_x // 64 + from_y // 64) % 7
        assert sure.sum() > 20
        assert np.array_equal(expected[sure], ids[inside][sure])
        columns = np.flatnonzero(inside.any(axis=0))
        row = np.flatnonzero(inside.any(axis=1))[0]
        mirrored += colours[row, columns[0], 0] > colours[row, columns[-1], 0]
    assert 0 < mirrored < 12


def test_a_crop_of_the_pictures_own_size_is_the_picture_or_its_mirror_image(fine: Manifest) -> None:
    dataset = ManifestDataset(fine)
    whole = {item["sample_id"]: item for item in dataset}
    flips = Counter()
    for n in range(24):
        item = crops(dataset, STILL)[n]
        original = whole[item["sample_id"]]
        flip = not torch.equal(item["image"], original["image"])
        flips[flip] += 1
        for name in ("image", "label"):
            assert torch.equal(item[name].flip(-1) if flip else item[name], original[name])
    assert min(flips[True], flips[False]) >= 5


def test_a_crop_larger_than_the_picture_holds_all_of_it_and_ignores_the_rest(fine: Manifest) -> None:
    dataset = ManifestDataset(fine)
    whole = {item["sample_id"]: item["label"] for item in dataset}
    corners = set()
    for n in range(12):
        item = crops(dataset, Augmentation((128, 256), scale=(1, 1), jitter=0))[n]
        image, label = pixels(item)
        assert (image.shape, label.shape) == ((128, 256, 3), (128, 256))
        original = whole[item["sample_id"]].numpy()
        places = [
            (top, left, step)
            for step in (1, -1)
            for top in range(33)
            for left in range(65)
            if np.array_equal(label[top : top + HEIGHT, left : left + WIDTH], original[:, ::step])
        ]
        assert len(places) == 1
        top, left, _ = places[0]
        outside = np.ones((128, 256), bool)
        outside[top : top + HEIGHT, left : left + WIDTH] = False
        assert (label[outside] == 255).all()
        assert (image[outside] == MEAN_COLOUR).all()
        corners.add((top, left))
    assert len(corners) == 12  # anywhere, not always in the same corner


def test_colour_jitter_changes_the_image_and_leaves_the_label(fine: Manifest) -> None:
    dataset = ManifestDataset(fine)
    for n in range(6):
        plain = crops(dataset, STILL)[n]
        bright = crops(dataset, replace(STILL, jitter=0.25))[n]
        assert plain["sample_id"] == bright["sample_id"]
        assert torch.equal(plain["label"], bright["label"]) or torch.equal(plain["label"], bright["label"].flip(-1))
        assert not torch.equal(plain["image"], bright["image"])


# --- which crop comes when --------------------------------------------------------------------------------------------


def test_a_crop_depends_on_the_seed_and_its_number_alone(fine: Manifest) -> None:
    """Backwards, from a shorter sequence, from two processes: the n-th crop is the n-th crop."""
    augmentation = Augmentation((48, 64))
    first = [crops(ManifestDataset(fine), augmentation, seed=3)[n] for n in range(9)]
    again = crops(ManifestDataset(fine), augmentation, seed=3, length=9)
    backwards = [again[n] for n in reversed(range(9))][::-1]
    elsewhere = list(DataLoader(again, batch_size=None, sampler=range(9), num_workers=2))
    for items in (backwards, elsewhere):
        assert [i["sample_id"] for i in items] == [i["sample_id"] for i in first]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(items, first, strict=True))
        assert all(torch.equal(a["label"], b["label"]) for a, b in zip(items, first, strict=True))


@pytest.mark.parametrize("published", [False, True])
def test_a_crop_is_the_same_whoever_decodes_the_image_and_how_many_of_its_rows(
    published: bool, fine: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentation = Augmentation((24, 48), scale=(0.3, 3.0), published=published)
    dataset = ManifestDataset(fine)
    draws = Draws(dataset.samples, dataset.label_space, seed=5, length=40)
    crops = list(TrainingCrops(dataset, draws, augmentation=augmentation))
    monkeypatch.setattr(images, "decode_png", lambda *_, **__: None)
    for crop, by_pillow in zip(crops, TrainingCrops(dataset, draws, augmentation=augmentation), strict=False):
        assert torch.equal(crop["image"], by_pillow["image"]) and torch.equal(crop["label"], by_pillow["label"])


def test_other_seeds_and_other_epochs_give_other_crops(fine: Manifest) -> None:
    dataset, augmentation = ManifestDataset(fine), Augmentation((48, 64))
    one, two = crops(dataset, augmentation, seed=1), crops(dataset, augmentation, seed=2)
    pictures = [one[n]["image"].numpy().tobytes() for n in range(12)] + [
        two[n]["image"].numpy().tobytes() for n in range(6)
    ]
    assert len(set(pictures)) == 18
    orders = {tuple(source[n]["sample_id"] for n in span) for source in (one, two) for span in (range(6), range(6, 12))}
    assert len(orders) == 4


def drawn(fine: Manifest, weights: tuple[float, ...], epochs: int) -> list[Counter[str]]:
    """How often each of the first samples is drawn, epoch by epoch."""
    samples = tuple(replace(s, weight=w) for s, w in zip(fine.samples, weights, strict=False))
    taken = crops(ManifestDataset(replace(fine, samples=samples)), Augmentation((32, 32)))
    names = {s.sample_id: str(n) for n, s in enumerate(samples)}
    count = len(samples)
    return [Counter(names[taken[e * count + n]["sample_id"]] for n in range(count)) for e in range(epochs)]


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
def test_an_epoch_draws_every_sample_once_when_weights_are_equal(weight: float, fine: Manifest) -> None:
    assert drawn(fine, (weight,) * 6, epochs=4) == [Counter("012345")] * 4


def test_draws_follow_the_weights_in_every_epoch(fine: Manifest) -> None:
    """Weights 0, 1, 1, 2, 4 over five draws: shares of 0, 0.625, 0.625, 1.25 and 2.5, each rounded up or down."""
    epochs = drawn(fine, (0, 1, 1, 2, 4), epochs=40)
    allowed = {"0": {0}, "1": {0, 1}, "2": {0, 1}, "3": {1, 2}, "4": {2, 3}}
    assert {name: {epoch[name] for epoch in epochs} for name in allowed} == allowed
    total = sum(epochs, Counter())
    for name, share in (("1", 25), ("2", 25), ("3", 50), ("4", 100)):
        assert abs(total[name] - share) <= 12


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (1.0, float("nan"))], ids=["all 0", "negative", "nan"])
def test_negative_and_infinite_weights_are_refused(weights: tuple[float, ...], fine: Manifest) -> None:
    message = "sample weights must not be negative, and one at least must be above 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        drawn(fine, weights, epochs=1)
