"""Counts of polygons are what a plain loop counts. If this fails, the policy dense believes in what is not there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import autolabel, refused
from numpy.typing import NDArray
from PIL import Image

from autolabel.manifests.documents import BadDocument
from autolabel.manifests.evidence import INSIDE, OUTSIDE, PolygonCounts
from autolabel.manifests.label_space import CAMVID, CITYSCAPES, IGNORE, LabelSpace
from autolabel.manifests.policy import load_policy
from autolabel.manifests.samples import Manifest, Sample, load_manifest, save_manifest
from autolabel.pipeline.analysis.polygons import TwoLabels, count_image, count_polygons

C = len(CAMVID)
Labels = NDArray[np.uint8]


def labels(seed: int, size: tuple[int, int] = (24, 40)) -> TwoLabels:
    """Blocks of a few classes; polygons are drawn inside them, and one lies where it may not."""
    dice = np.random.default_rng(seed)
    fine = dice.choice(np.array([0, 1, 2, 3, 8, IGNORE], np.uint8), (size[0] // 8, size[1] // 8)).repeat(8, 0)
    fine = fine.repeat(8, 1)
    coarse = np.full(size, IGNORE, np.uint8)
    for top in range(0, size[0], 8):
        for left in range(0, size[1], 8):
            if dice.random() < 0.6:
                coarse[top + 2 : top + 6, left + 1 : left + 6] = fine[top + 3, left + 3]
    coarse[0:3, 0:3] = 1
    return TwoLabels(fine, coarse)


def written(
    folder: Path, pairs: list[TwoLabels], space: LabelSpace = CAMVID, change: Callable[[Sample], Sample] = lambda s: s
) -> Path:
    """A manifest of samples with these fine and coarse labels."""
    made = []
    for n, pair in enumerate(pairs):
        for kind, label in pair._asdict().items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(label).save(folder / kind / f"{n}.png")
        height, width = pair.fine.shape
        sample = Sample(f"s{n}", folder / f"images/{n}.png", height, width, source="fine")
        made.append(change(replace(sample, label=folder / f"fine/{n}.png", coarse_label=folder / f"coarse/{n}.png")))
    save_manifest(folder / "both.parquet", Manifest.of(space, tuple(made)))
    return folder / "both.parquet"


@pytest.fixture
def both(tmp_path: Path) -> Path:
    return written(tmp_path, [labels(seed) for seed in range(20)])


def chamfer(mask: NDArray[np.bool_], goal: tuple[int, int]) -> float:
    """The distance from a pixel to the nearest True one, along steps as OpenCV's 5 x 5 mask takes them."""
    apart = np.sort(abs(np.argwhere(mask) - goal), axis=1)
    short, long = apart[:, 0], apart[:, 1]
    knight = np.minimum(short, long - short)  # moves of 2 and 1; the rest goes straight, or along a diagonal
    return float((2.1969 * knight + 1.4 * (short - knight) + np.maximum(long - 2 * short, 0)).min())


def bin_of(distance: float, ends: tuple[float, ...], width: int) -> int:
    return sum(distance >= end * width for end in ends)


def test_counts_of_an_image_are_those_of_a_plain_loop() -> None:
    fine, coarse = labels(3)
    width = fine.shape[1]
    outside, inside = np.zeros((C, len(OUTSIDE) + 1, C), int), np.zeros((C, len(INSIDE) + 1, 2), int)
    for y, x in zip(*np.nonzero(fine < C), strict=True):
        c, n = int(fine[y, x]), int(coarse[y, x])
        if n < C:
            inside[n, bin_of(chamfer(coarse != n, (y, x)), INSIDE, width), int(c != n)] += 1
            continue
        (d, nearest), (second, _), *_ = sorted((chamfer(coarse == k, (y, x)), k) for k in np.unique(coarse[coarse < C]))
        if second - d < 1e-6:  # two polygons are as near: either may count, so the pixel is left out here
            fine[y, x] = IGNORE
        else:
            outside[nearest, bin_of(d, OUTSIDE, width), c] += 1
    found = count_image(TwoLabels(fine, coarse), C)
    assert found.outside.tolist() == outside.tolist() and (outside.sum(axis=(0, 2)) > 0).sum() > 4
    assert found.inside.tolist() == inside.tolist() and inside[..., 1].any()
    assert found.truth.tolist() == [int((fine == k).sum()) for k in range(C)]


def test_counts_are_the_sum_over_images_whatever_the_number_of_threads(both: Path, tmp_path: Path) -> None:
    calls = list[tuple[int, int]]()
    one = count_polygons(both, workers=1, progress=lambda done, total: calls.append((done, total)))
    many = count_polygons(both, output=tmp_path / "polygons.json", workers=5)
    assert one == many
    assert calls == [(n, 20) for n in range(1, 21)]
    each = [count_image(labels(seed), C) for seed in range(20)]
    assert one.counts.counts.tolist() == sum(image.outside for image in each).tolist()
    assert np.array(one.counts.inside).tolist() == sum(image.inside for image in each).tolist()
    assert one.counts.sizes == {"40x24": 20} and one.counts.images == 20
    assert PolygonCounts.read(tmp_path / "polygons.json") == one.counts


def test_the_command_shows_what_people_named_and_what_lies_outside(both: Path, tmp_path: Path) -> None:
    result = autolabel("polygons", both, "-o", tmp_path / "polygons.json")
    assert result.exit_code == 0, result.output
    summary = count_polygons(both)
    right, wrong = np.array(summary.counts.inside).sum(axis=(0, 1))
    assert f"20 images counted\npeople named {100 * (right + wrong) / sum(summary.truth):.1f} % of the pixels" in (
        result.stdout
    )
    n = CAMVID.names.index("building")
    row = next(row for row in summary.tables()[0].rows if row[0] == "building")
    yes, no = np.array(summary.counts.inside)[n].sum(axis=0)
    assert row[:4] == [
        "building",
        f"{yes + no:,}",
        f"{100 * yes / summary.truth[n]:.1f}",
        f"{100 * yes / (yes + no):.1f}",
    ]
    assert "In no label: " in result.stdout and str(summary) in result.stdout
    assert result.stdout.endswith(f"wrote {tmp_path / 'polygons.json'}\n") and ".toml" not in result.stdout
    (tmp_path / "polygons.toml").write_text('[polygons]\ncounts = "polygons.json"')
    again = autolabel("polygons", both, "-o", tmp_path / "polygons.json")
    assert f"{tmp_path / 'polygons.toml'} was made for earlier counts: fit it to these with --teacher" in again.stdout


def test_polygons_drawn_of_no_class_are_not_what_people_left_out(tmp_path: Path) -> None:
    source = bytes(c.source_ids[0] for c in CITYSCAPES.classes)
    fine = np.full((8, 40), source[0], np.uint8)
    coarse = np.zeros((8, 40), np.uint8)  # 0, unlabelled: nobody drew anything
    coarse[:, :10] = source[0]
    coarse[:, 30:] = 1  # the ego vehicle, which people drew
    path = written(tmp_path, [TwoLabels(fine, coarse)], CITYSCAPES, lambda s: replace(s, label_ids="source"))
    found = count_polygons(path).counts
    assert found.counts.sum() == 8 * 20 and np.array(found.inside).sum() == 8 * 10


# --- bad input --------------------------------------------------------------------------------------------------------


def refusal(path: Path, tmp_path: Path, output: str = "polygons.json") -> str:
    """The line that the command ends with; nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    message = refused("polygons", path, "-o", tmp_path / output)
    assert sorted(tmp_path.rglob("*")) == before
    return message


def test_a_manifest_without_coarse_labels_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [labels(0), labels(1)], change=lambda s: replace(s, coarse_label=None))
    assert f"{path} lists 2 images with a fine label, none of them with a coarse one" in refusal(path, tmp_path)


def test_a_manifest_without_fine_labels_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [labels(0)], change=lambda s: replace(s, source="coarse", label=s.coarse_label))
    assert f"{path} lists no image with a fine or corrected label" in refusal(path, tmp_path)


def test_coarse_labels_taken_for_fine_ones_are_refused(tmp_path: Path) -> None:
    same = written(tmp_path / "path", [labels(0)], change=lambda s: replace(s, label=s.coarse_label))
    assert f"{same}: the fine label of the image is the coarse one itself" in refusal(same, tmp_path)
    copies = [TwoLabels(pair.coarse, pair.coarse) for pair in map(labels, range(2))]
    equal = written(tmp_path / "pixels", copies)
    assert f"{equal}: the fine label of all 2 images is the coarse one itself" in refusal(equal, tmp_path)
    some = written(tmp_path / "some", [*copies, labels(5)])
    assert "1 image counted, 2 whose fine label is their coarse one" in str(count_polygons(some))


def test_coarse_labels_of_other_images_are_refused_with_the_agreement(tmp_path: Path) -> None:
    pairs = [labels(seed) for seed in range(6)]
    path = written(tmp_path, [TwoLabels(a.fine, b.coarse) for a, b in zip(pairs, pairs[1:] + pairs[:1], strict=True)])
    named = [(p.fine, q.coarse) for p, q in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
    right = sum(int(((f == c) & (f < C) & (c < C)).sum()) for f, c in named)
    share = 100 * right / sum(int(((f < C) & (c < C)).sum()) for f, c in named)
    assert f"{path}: fine and coarse labels agree in {share:.1f} % of the pixels that people named, expected 60 %" in (
        refusal(path, tmp_path)
    )


def test_one_image_with_the_labels_of_another_is_named(tmp_path: Path) -> None:
    pairs = [labels(seed) for seed in range(6)]
    pairs[3] = TwoLabels(pairs[3].fine, pairs[4].coarse)
    notes = count_polygons(written(tmp_path, pairs)).notes
    assert any("in 1 image fewer than 60 % of the pixels" in note and "'s3'" in note for note in notes)


def test_few_images_and_classes_without_counts_are_pointed_out(tmp_path: Path) -> None:
    summary = count_polygons(written(tmp_path, [labels(seed) for seed in range(5)]))
    assert summary.notes[0] == "5 images only: chance shows in the counts; count on 20 or more if you can"
    unseen = "pavement, tree, sign, fence, pedestrian and bicyclist"
    assert summary.notes[1] == (
        f"no unnamed pixel of {unseen} was counted: polygons will say nothing for or against them"
    )
    never = CAMVID.names.index("tree")
    assert set(summary.counts.lifts[:, :, never].ravel()) == {0.0}  # neither for nor against it, anywhere


def test_images_of_several_shapes_are_counted_by_shares_of_their_widths(tmp_path: Path) -> None:
    path = written(tmp_path, [labels(0), labels(1), labels(2, (24, 48))])
    summary = count_polygons(path)
    assert summary.counts.sizes == {"40x24": 2, "48x24": 1}
    assert "images of 2 shapes, such as 40x24 (2) and 48x24 (1): distances count as shares of" in summary.notes[-1]


def test_a_damaged_label_is_left_out_and_named_and_the_last_one_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, [labels(seed) for seed in range(3)])
    damaged = tmp_path / "coarse/1.png"
    damaged.write_bytes(damaged.read_bytes()[:50])
    summary = count_polygons(path)
    assert summary.counts.images == 2 and summary.left_out["unreadable"] == 1
    assert "2 images counted, 1 unreadable" in summary.lines()
    assert summary.notes[-1].startswith(f"left out, the first of 1: its coarse label {damaged}: ")
    for n in (0, 2):
        (tmp_path / f"fine/{n}.png").unlink()
    assert f"no pair of labels of {path} can be read: " in refusal(path, tmp_path)


def test_labels_without_a_gap_or_without_a_polygon_are_refused(tmp_path: Path) -> None:
    fine, coarse = labels(0)
    nothing = np.full_like(coarse, IGNORE)
    path = written(tmp_path, [TwoLabels(fine, nothing)])
    assert f"{path}: no unnamed pixel with truth was counted" in refusal(path, tmp_path)


def test_counts_are_written_into_a_json_outside_runs_only(both: Path, tmp_path: Path) -> None:
    assert "expected a name that ends in .json" in refusal(both, tmp_path, "both.parquet")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"format": "autolabel-run/7"}')
    assert "is a run" in refusal(both, tmp_path, "run/polygons.json")
    assert load_manifest(both).samples


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outside": {"sky": ["nan 0 0"]}}, "'outside' has other classes than 'classes'"),
        ({"inside": "x"}, "'inside' is missing or no object"),
        ({"sizes": {"480x360": "many"}}, "'sizes', '480x360' is 'many': expected numbers of images by WIDTHxHEIGHT"),
        ({"sizes": {"480": 3}}, "'sizes', '480' is 3: expected numbers of images by WIDTHxHEIGHT"),
        ({"classes": 3}, "'classes' is missing or no list"),
        ({"teacher": "5e", "beside_teacher": 3}, "'beside_teacher' is missing or no object"),
        (
            {"teacher": "5e", "beside_teacher": {name: ["0.5"] for name in CAMVID.names}},
            "'beside_teacher': expected 11 x 15 x 11 numbers",
        ),
        (
            {"teacher": "5e", "beside_teacher": {name: [" ".join(["nan"] * 11)] * 15 for name in CAMVID.names}},
            "'beside_teacher': expected 11 x 15 x 11 numbers from -20 to 20",
        ),
        ({"format": "autolabel polygons 9"}, "its format is 'autolabel polygons 9', expected 'autolabel polygons 1'"),
        ("nan", "'outside' holds something else than rows of whole numbers"),
        ("0.5", "'outside' holds something else than rows of whole numbers"),
        ("-1", "'outside': expected 11 x 15 x 11 numbers of pixels"),
        ("1 1", "'outside': expected 11 x 15 x 11 numbers of pixels"),
        ("9" * 30, "'outside': expected 11 x 15 x 11 numbers of pixels"),
        ("9" * 18, "'outside': expected 11 x 15 x 11 numbers of pixels"),
    ],
)
def test_a_wrong_polygons_file_is_refused_with_its_name_and_key(
    both: Path, tmp_path: Path, change: dict[str, Any] | str, message: str
) -> None:
    document = count_polygons(both).counts.to_dict()
    if isinstance(change, str):
        document["outside"]["sky"][3] = " ".join([change, *document["outside"]["sky"][3].split()[1:]])
    else:
        document |= change
    file = tmp_path / "polygons.json"
    file.write_text(json.dumps(document))
    (tmp_path / "mine.toml").write_text('[polygons]\ncounts = "polygons.json"')
    for read in (lambda: PolygonCounts.read(file), lambda: load_policy(str(tmp_path / "mine.toml"))):
        with pytest.raises(BadDocument) as wrong:
            read()
        assert str(wrong.value).startswith(f"{file}: ") and message in str(wrong.value)


@pytest.mark.parametrize("number", ["nan", "inf", "21", "1 1"])
def test_what_a_teacher_says_beside_polygons_is_refused_unless_it_is_the_logarithm_of_a_factor(
    both: Path, tmp_path: Path, number: str
) -> None:
    document, row = count_polygons(both).counts.to_dict(), " ".join(["0.5"] * C)
    document["teacher"] = "5e"
    document["beside_teacher"] = {name: [row] * (len(OUTSIDE) + 1) for name in CAMVID.names}
    assert PolygonCounts.from_dict(document).lifts.tolist() == np.full((C, len(OUTSIDE) + 1, C), 0.5).tolist()
    document["beside_teacher"]["sky"][3] = f"{number} {row[4:]}"
    file = tmp_path / "polygons.json"
    file.write_text(json.dumps(document))
    with pytest.raises(BadDocument, match=r"polygons\.json: 'beside_teacher': expected 11 x 15 x 11 numbers from -20"):
        PolygonCounts.read(file)


def test_a_number_that_is_none_is_refused_with_its_place(both: Path, tmp_path: Path) -> None:
    document = count_polygons(both).counts.to_dict()
    document["sizes"] = {"480x360": math.nan}
    file = tmp_path / "polygons.json"
    file.write_text(json.dumps(document))
    with pytest.raises(BadDocument, match=r"polygons\.json, 'sizes', '480x360' is nan: expected a finite number"):
        PolygonCounts.read(file)


def test_counts_of_other_classes_are_refused_by_name(both: Path) -> None:
    counts = count_polygons(both).counts
    with pytest.raises(ValueError, match="counted for other classes than those of label space 'cityscapes'"):
        counts.require(CITYSCAPES)
    counts.require(CAMVID)
