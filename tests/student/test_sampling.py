"""A rare class that is never drawn is never learnt; a share that is met on average is not the one asked for."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import autolabel
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from autolabel.manifests.fuse import join
from autolabel.manifests.images import encode_label
from autolabel.manifests.label_space import CITYSCAPES
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.centroids import Centroids, centroids, find_centroids
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.job import Mix
from autolabel.student.sampling import Draws

EPOCH = 16  # six fine samples and ten automatic ones


@pytest.fixture(scope="module")
def runs(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same labels in both kinds of store; no pixel of three classes is sure enough to be among them."""
    root = tmp_path_factory.mktemp("runs")
    policy = Policy(threshold=0.2, thresholds=dict.fromkeys(("traffic light", "traffic sign", "person"), 0.99999))
    for store in ("zarr", "png"):
        job = LabelJob(city / "coarse.parquet", teacher, root / store, scales=(1.0,), policy=policy)
        generate(replace(job, store=store, unit_size=4))
    return {store: root / store for store in ("zarr", "png")}


@pytest.fixture(scope="module")
def fused(city: Path, runs: dict[str, Path]) -> Manifest:
    parts = [(name, load_manifest(path)) for name, path in (
        ("fine", city / "fine.parquet"), ("auto", runs["zarr"] / "manifest.parquet"),
    )]  # fmt: skip
    return join(parts)


def draws(manifest: Manifest, mix: Mix, seed: int = 0, length: int = 10 * EPOCH) -> Draws:
    return Draws(manifest.samples, CITYSCAPES, mix=mix, seed=seed, length=length)


def sources(manifest: Manifest, drawn: Draws, start: int = 0, stop: int | None = None) -> Counter[str]:
    numbers = range(start, len(drawn) if stop is None else stop)
    return Counter(manifest.samples[drawn[n].sample].source for n in numbers)


def rows(found: Centroids) -> list[tuple[float, ...]]:
    return list(zip(*(getattr(found, name).tolist() for name in ("sample", "class_id", "y", "x")), strict=True))


# --- where classes are ------------------------------------------------------------------------------------------------


def test_centroids_are_centres_of_mass_by_tile_and_class() -> None:
    label = np.full((600, 700), 255, np.uint8)
    label[10:12, 20:30] = 3
    label[511:513, 0] = 5  # one pixel in either tile
    label[599, 699] = 3
    found = [
        tuple(row[k] for k in ("class_id", "tile_y", "tile_x", "y", "x", "pixels")) for row in centroids(label, 19)
    ]
    assert found == [
        (3, 0, 0, 10.5, 24.5, 20),
        (5, 0, 0, 511.0, 0.0, 1),
        (5, 1, 0, 512.0, 0.0, 1),
        (3, 1, 1, 599.0, 699.0, 1),
    ]


def centroids_one_tile_after_the_other(label: NDArray[np.uint8], classes: int) -> list[dict[str, Any]]:
    return [
        {
            "class_id": c,
            "tile_y": top // 512,
            "tile_x": left // 512,
            "y": top + int(y.sum()) / len(y),
            "x": left + int(x.sum()) / len(x),
            "pixels": len(y),
        }
        for top in range(0, label.shape[0], 512)
        for left in range(0, label.shape[1], 512)
        for c in range(classes)
        if len((places := np.nonzero(label[top : top + 512, left : left + 512] == c))[0])
        for y, x in [places]
    ]


def test_centroids_of_runs_are_those_of_a_plain_loop_in_any_label_of_any_size() -> None:
    dice = np.random.default_rng(0)
    values = np.array([0, 1, 2, 18, 19, 254, 255], np.uint8)  # from 19 on they are no classes
    for height, width, block in [(1, 1, 1), (1, 700, 3), (700, 1, 3), (512, 512, 40), (513, 1025, 1), (600, 1100, 37)]:
        small = dice.choice(values, (-(-height // block), -(-width // block)))
        label = small.repeat(block, 0).repeat(block, 1)[:height, :width]
        for of in (label, label[::-1, ::-1]):  # no rows side by side in memory are needed
            assert centroids(of, 19) == centroids_one_tile_after_the_other(of, 19)


@pytest.mark.parametrize("store", ["zarr", "png"])
def test_a_runs_table_says_what_its_labels_say_and_none_of_them_is_read(store: str, runs: dict[str, Path]) -> None:
    samples = load_manifest(runs[store] / "manifest.parquet").samples
    read: list[int] = []
    from_table = find_centroids(samples, CITYSCAPES, progress=lambda done, total: read.append(total))
    labels = Run.open(runs[store]).labels
    counted = [
        (place, row["class_id"], float(np.float32(row["y"])), float(np.float32(row["x"])))
        for place, sample in enumerate(samples)
        for row in centroids(labels[sample.sample_id], 19)
    ]
    assert len(counted) >= 20
    assert rows(from_table) == counted
    assert read == []
    fine_like = [replace(s, source="coarse", run=None) for s in samples]  # the table is for what the run has labelled
    assert rows(find_centroids(fine_like, CITYSCAPES, progress=lambda done, total: read.append(done))) == counted
    assert read == list(range(1, 11))


@pytest.mark.parametrize("how", ["another table", "no table", "no record of it"])
def test_a_table_that_is_not_the_recorded_one_is_not_believed(how: str, runs: dict[str, Path], tmp_path: Path) -> None:
    """The rows are counted again from the labels; a table of other labels under the same name would aim at nothing."""
    run = tmp_path / "run"
    for path in runs["zarr"].rglob("*"):
        if path.is_file():
            (run / path.relative_to(runs["zarr"])).parent.mkdir(parents=True, exist_ok=True)
            (run / path.relative_to(runs["zarr"])).write_bytes(path.read_bytes())
    samples = load_manifest(run / "manifest.parquet").samples
    expected = rows(find_centroids(samples, CITYSCAPES))
    table = run / "stats" / "centroids.parquet"
    if how == "another table":
        old = pq.read_table(table)
        pq.write_table(old.set_column(4, old.schema.field(4), [np.zeros(len(old), np.float32)]), table)
    elif how == "no table":
        table.unlink()
    else:
        replace(Run.open(run), tables_sha256=None).save()
    read: list[int] = []
    assert rows(find_centroids(samples, CITYSCAPES, progress=lambda done, total: read.append(done))) == expected
    assert len(read) == 10


def test_a_label_that_changes_under_a_training_is_noticed(city: Path, tmp_path: Path) -> None:
    fine = load_manifest(city / "fine.parquet").samples[0]
    assert fine.label is not None
    label = tmp_path / "label.png"
    label.write_bytes(fine.label.read_bytes())
    dataset = ManifestDataset(Manifest(CITYSCAPES, (replace(fine, label=label),), tmp_path, tmp_path))
    draws = Draws(dataset.samples, CITYSCAPES, mix=Mix(class_uniform=1), seed=0, length=10)
    crops = TrainingCrops(dataset, draws, augmentation=Augmentation((32, 32)))
    label.write_bytes(encode_label(np.zeros((fine.height, fine.width), np.uint8)))
    with pytest.raises(ValueError, match=re.escape(f"{label}: the label of {fine.sample_id!r} has changed")):
        crops[0]


# --- shares -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
def test_every_epoch_has_exactly_the_share_of_automatic_labels(share: float, fused: Manifest) -> None:
    drawn = draws(fused, Mix(auto_share=share))
    for epoch in range(10):
        found = sources(fused, drawn, epoch * EPOCH, (epoch + 1) * EPOCH)
        assert found["auto"] == round(share * EPOCH)
        assert found.total() == EPOCH


@pytest.mark.parametrize("mix", [Mix(), Mix(auto_share=0.3), Mix(class_uniform=0.25), Mix(class_uniform=1.0)], ids=str)
def test_every_epoch_has_exactly_the_share_of_aimed_crops(mix: Mix, fused: Manifest) -> None:
    drawn = draws(fused, mix)
    for epoch in range(10):
        aimed = sum(drawn[n].around is not None for n in range(epoch * EPOCH, (epoch + 1) * EPOCH))
        assert aimed == round(mix.class_uniform * EPOCH)


def test_weights_decide_between_sources_where_no_share_is_given(fused: Manifest) -> None:
    """Six fine samples of weight 1 and ten automatic ones of 0.6: half and half."""
    light = replace(fused, samples=tuple(replace(s, weight=0.6 if s.source == "auto" else 1.0) for s in fused.samples))
    drawn = draws(light, Mix())
    found = [sources(light, drawn, e * EPOCH, (e + 1) * EPOCH)["auto"] for e in range(10)]
    assert set(found) <= {7, 8}  # 8 to the last bit of a float32
    assert sources(fused, draws(fused, Mix())) == {"auto": 100, "fine": 60}


def test_every_class_of_a_source_comes_as_often_as_the_next(city: Path) -> None:
    """Forty copies of the fine samples make an epoch long enough to count: within one draw, rare or not."""
    fine = load_manifest(city / "fine.parquet").samples
    many = [replace(s, sample_id=f"{s.sample_id}-{k}") for k in range(40) for s in fine]
    drawn = Draws(many, CITYSCAPES, seed=0, length=480)
    present = {row[1] for row in rows(find_centroids(fine, CITYSCAPES))}
    assert len(present) >= 6
    for epoch in range(2):
        aims = [drawn[n].around for n in range(240 * epoch, 240 * (epoch + 1))]
        counts = Counter(around.class_id for around in aims if around)
        assert counts.keys() == present
        assert counts.total() == 120
        assert max(counts.values()) - min(counts.values()) <= 1
    plain = Counter(drawn[n].sample for n in range(240) if drawn[n].around is None)
    assert (len(plain), set(plain.values())) == (120, {1})  # of the other half, no sample comes twice


@pytest.mark.parametrize("share", [0.25, 0.95])
def test_a_class_without_automatic_labels_is_drawn_from_fine_ones(share: float, fused: Manifest) -> None:
    """A class that automatic labels lack comes as often as any other, as far as the share of fine labels goes."""
    many = [replace(s, sample_id=f"{s.sample_id}-{k}") for k in range(40) for s in fused.samples]
    drawn = Draws(many, CITYSCAPES, mix=Mix(auto_share=share), seed=0, length=640)
    places = {(many[row[0]].source, row[1]) for row in rows(find_centroids(many, CITYSCAPES))}
    present = {c for _, c in places}
    missing = {c for c in present if ("auto", c) not in places}
    assert len(present) >= 6
    assert len(missing) >= 2
    aimed = [d for d in (drawn[n] for n in range(640)) if d.around]
    sources = Counter(many[d.sample].source for d in aimed)
    assert sources == {"auto": round(share * 320), "fine": 320 - round(share * 320)}
    counts = Counter(d.around.class_id for d in aimed if d.around)
    assert counts.keys() == present
    if share == 0.25:
        assert max(counts.values()) - min(counts.values()) <= 2  # rounded once in each source
    else:  # of 16 fine draws, all go to what is only there
        assert sum(counts[c] for c in missing) == 16


def test_automatic_labels_are_drawn_for_the_named_classes_only(fused: Manifest) -> None:
    drawn = draws(fused, Mix(auto_share=0.5, auto_classes=("road", "sky")), length=20 * EPOCH)
    aimed = Counter(
        (fused.samples[d.sample].source, d.around.class_id) for d in (drawn[n] for n in range(320)) if d.around
    )
    road, sky = (CITYSCAPES.names.index(name) for name in ("road", "sky"))
    assert {c for source, c in aimed if source == "auto"} == {road, sky}
    assert aimed["auto", road] == aimed["auto", sky] == 40  # of the 160 automatic draws half are aimed
    assert len({c for source, c in aimed if source == "fine"}) > 3
    assert sources(fused, drawn) == {"auto": 160, "fine": 160}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_all_crops_of_automatic_labels_are_aimed_where_asked_and_so_many_fewer_of_the_fine_ones(
    share: float, fused: Manifest
) -> None:
    drawn = draws(fused, Mix(auto_share=share, auto_aimed=True))
    for epoch in range(10):
        one = [drawn[n] for n in range(epoch * EPOCH, (epoch + 1) * EPOCH)]
        found = Counter((fused.samples[d.sample].source, d.around is not None) for d in one)
        auto = round(share * EPOCH)
        expected = {("auto", True): auto, ("fine", True): 8 - auto, ("fine", False): 8}
        assert found == {key: count for key, count in expected.items() if count}


def test_an_epoch_as_published_has_as_many_draws_aimed_at_each_class_boosted_or_not(fused: Manifest) -> None:
    """Half an epoch aims at classes, all alike; the boosted ones are found mostly in automatic labels."""
    many = [replace(s, sample_id=f"{s.sample_id}-{k}") for k in range(40) for s in fused.samples]
    boosted = tuple(CITYSCAPES.names[c] for c in (0, 2, 10))  # road, building, sky
    drawn = Draws(many, CITYSCAPES, mix=Mix(auto_share=0.1, auto_classes=boosted, auto_aimed=True), seed=0, length=1280)
    for epoch in range(2):
        one = [drawn[n] for n in range(640 * epoch, 640 * (epoch + 1))]
        found = Counter((many[d.sample].source, d.around.class_id) for d in one if d.around)
        assert sum(n for (source, _), n in found.items() if source == "auto") == 64
        assert {c for source, c in found if source == "auto"} == {0, 2, 10}
        classes = Counter[int]()
        for (_, c), n in found.items():
            classes[c] += n
        assert classes.total() == 320
        assert max(classes.values()) - min(classes.values()) <= 2  # rounded once in each source
        assert not [d for d in one if many[d.sample].source == "auto" and d.around is None]


@pytest.mark.parametrize(("tail", "first"), [(0.15, 136), (0.5, 80), (1.0, 0)])
def test_the_last_crops_are_fine_only(tail: float, first: int, fused: Manifest) -> None:
    mix = Mix(auto_share=0.5, fine_only_last=tail)
    drawn = draws(fused, mix)
    assert sources(fused, drawn, first) == {"fine": 160 - first}
    before = draws(fused, replace(mix, fine_only_last=0.0))
    assert [drawn[n] for n in range(first)] == [before[n] for n in range(first)]
    assert first == 0 or sources(fused, drawn, 0, first // EPOCH * EPOCH)["auto"] == first // EPOCH * 8
    six = [drawn[n] for n in range(first, first + 6)]  # an epoch of the fine samples
    assert sum(d.around is not None for d in six) == 3


def test_corrected_labels_are_drawn_as_fine_ones_are(fused: Manifest) -> None:
    renamed = {s.sample_id for s in only(fused, "fine")[::2]}
    mixed = replace(
        fused,
        samples=tuple(replace(s, source="corrected") if s.sample_id in renamed else s for s in fused.samples),
    )
    mix = Mix(auto_share=0.5, fine_only_last=0.5)
    before, after = draws(fused, mix), draws(mixed, mix)
    assert [after[n] for n in range(len(after))] == [before[n] for n in range(len(before))]
    assert sources(mixed, after, 80).keys() == {"fine", "corrected"}
    people = replace(mixed, samples=tuple(s for s in mixed.samples if s.source == "corrected"))
    assert sources(people, draws(people, Mix(fine_only_last=0.5))) == {"corrected": 160}


# --- the n-th crop is the n-th crop -----------------------------------------------------------------------------------


def test_crops_are_the_same_from_either_store_any_worker_and_any_start(fused: Manifest, runs: dict[str, Path]) -> None:
    mix = Mix(auto_share=0.5, fine_only_last=0.2)
    pngs = {s.sample_id: s for s in load_manifest(runs["png"] / "manifest.parquet").samples}
    from_png = replace(fused, samples=tuple(pngs.get(s.sample_id, s) for s in fused.samples))
    assert {s.label_index for s in from_png.samples} == {None}

    def crops(manifest: Manifest) -> TrainingCrops:
        dataset = ManifestDataset(manifest)
        draws = Draws(dataset.samples, dataset.label_space, mix=mix, seed=7, length=40)
        return TrainingCrops(dataset, draws, augmentation=Augmentation((48, 64)))

    one = crops(fused)
    first = [one[n] for n in range(40)]
    again = {
        "PNG": [crops(from_png)[n] for n in range(40)],
        "no worker": list(DataLoader(crops(fused), batch_size=None)),
        "two workers": list(DataLoader(crops(fused), batch_size=None, num_workers=2)),
        "backwards": [one[n] for n in reversed(range(40))][::-1],
        "resumed": first[:25] + list(DataLoader(crops(fused), batch_size=None, sampler=range(25, 40), num_workers=2)),
    }
    for name, items in again.items():
        assert [i["sample_id"] for i in items] == [i["sample_id"] for i in first], name
        for key in ("image", "label"):
            assert all(torch.equal(a[key], b[key]) for a, b in zip(items, first, strict=True)), name


def test_other_seeds_and_other_epochs_draw_otherwise(fused: Manifest) -> None:
    orders = [
        tuple(d.sample for d in (drawn[n] for n in range(start, start + EPOCH)))
        for drawn in (draws(fused, Mix(), seed=seed) for seed in (0, 1))
        for start in (0, EPOCH)
    ]
    assert len(set(orders)) == 4


# --- what cannot be met -----------------------------------------------------------------------------------------------


def only(manifest: Manifest, source: str) -> tuple[Sample, ...]:
    return tuple(s for s in manifest.samples if s.source == source)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"auto_share": 1.5}, "auto-share 1.5: expected a number from 0 to 1"),
        ({"auto_share": -0.1}, "auto-share -0.1: expected a number from 0 to 1"),
        ({"auto_share": float("nan")}, "auto-share nan: expected a number from 0 to 1"),
        ({"fine_only_last": 2}, "fine-only-last 2: expected a number from 0 to 1"),
        ({"auto_classes": ()}, "auto-classes is empty: name a class, or leave it out for all of them"),
        ({"auto_aimed": True}, "auto-aimed needs an auto-share: give the share of automatic labels"),
        (
            {"auto_aimed": True, "auto_share": 0.6},
            "auto-aimed with auto-share 0.6: only 0.5 of all crops are aimed, give at most that",
        ),
    ],
)
def test_shares_outside_0_to_1_are_refused(mix: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Mix(**mix)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "mix", "message"),
    [
        ("fine", Mix(auto_share=0.5), "auto-share: the manifest has no automatic labels"),
        ("fine", Mix(auto_classes=("road",)), "auto-classes: the manifest has no automatic labels"),
        ("auto", Mix(auto_share=0.5), "auto-share 0.5: the manifest has only automatic labels to draw from"),
        ("auto", Mix(fine_only_last=0.15), "fine-only-last 0.15: the manifest has no fine labels"),
        (
            "auto",
            Mix(auto_classes=("tree",)),
            "auto-classes: 'tree' is not in label space 'cityscapes': road, sidewalk",
        ),
        ("auto", Mix(auto_classes=("train",)), "auto-classes: no automatic label has a pixel of 'train'"),
    ],
)
def test_a_mix_that_the_manifest_cannot_give_is_refused(source: str, mix: Mix, message: str, fused: Manifest) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Draws(only(fused, source), CITYSCAPES, mix=mix, seed=0, length=10)


def test_the_command_takes_a_mix_and_refuses_one_in_a_line(city: Path, fused: Manifest, tmp_path: Path) -> None:
    save_manifest(tmp_path / "fused.parquet", fused)
    asked = (
        "train",
        tmp_path / "fused.parquet",
        "--val",
        city / "val.parquet",
        "--out",
        tmp_path / "out",
    )
    asked = (*asked, "--steps", 2, "--batch-size", 2, "--crop", "64x64", "--auto-classes", "road, sky")
    refused = autolabel(*asked, "--auto-share", 2)
    assert (refused.exit_code, refused.stderr) == (2, "autolabel: auto-share 2: expected a number from 0 to 1\n")
    done = autolabel(*asked, "--auto-share", 0.5, "--fine-only-last", 0.5)
    assert done.exit_code == 0, done.stderr
    about = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (about["auto_share"], about["auto_classes"], about["fine_only_last"]) == (0.5, ["road", "sky"], 0.5)
    other = autolabel(*asked, "--auto-share", 0.25, "--fine-only-last", 0.5)
    assert other.exit_code == 2
    assert "auto_share was 0.5, now 0.25" in other.stderr
    assert "auto_classes" not in other.stderr
