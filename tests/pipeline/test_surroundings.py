"""What polygons say is drawn as it was counted. If this fails, people trust polygons wrongly."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from autolabel.manifests.evidence import INSIDE, OUTSIDE, PolygonCounts
from autolabel.manifests.label_space import CAMVID
from autolabel.pipeline.report.page import write_counts_page
from autolabel.pipeline.report.surroundings import PolygonPlot

BINS, DEPTHS = len(OUTSIDE) + 1, len(INSIDE) + 1


def counts(*, wrong: int = 0) -> PolygonCounts:
    """Road for sure up to 2 px of 480 and then tree in three of four pixels; hardly anything beyond eight bins."""
    space = CAMVID
    road, tree, car = (space.names.index(name) for name in ("road", "tree", "car"))
    outside = np.zeros((len(space), BINS, len(space)), np.int64)
    outside[road, :3, road] = 100
    outside[road, 3:8, road], outside[road, 3:8, tree] = 25, 75
    outside[road, 8:, road] = 1  # fewer than 20 pixels
    outside[car, 0, car], outside[car, 0, tree] = 40, 60
    inside = np.zeros((len(space), DEPTHS, 2), np.int64)
    inside[road, 0], inside[road, -1] = (100 - wrong, wrong), (900, 0)
    return PolygonCounts.of(space, {"480x360": 12}, outside, inside)


def area(outline: str) -> float:
    """The area of a closed path of horizontal and vertical lines, by the shoelace formula, as a share of the plot."""
    x, y = (float(v) for v in outline[1:].split("V")[0].split())
    points = [(x, y)]
    for kind, value in re.findall(r"([VH])([\d.]+)", outline):
        x, y = (float(value), y) if kind == "H" else (x, float(value))
        points.append((x, y))
    pairs = zip(points, [*points[1:], points[0]], strict=True)
    return abs(sum(a * d - b * c for (a, b), (c, d) in pairs)) / 2 / (100 * BINS)


def test_a_colour_is_as_high_as_its_share_of_the_pixels_at_that_distance() -> None:
    road, car = PolygonPlot.of(counts(), width=480).around
    assert (road.name, road.pixels, [layer.name for layer in road.layers]) == ("road", 807, ["road", "tree"])
    assert [area(layer.outline) for layer in road.layers] == pytest.approx([(3 + 5 * 0.25) / BINS, 5 * 0.75 / BINS])
    assert road.layers[0].outline.startswith("M0 100V0H1V0H2V0H3V75H4") and road.layers[0].outline.endswith("H0Z")
    assert [(layer.name, layer.share) for layer in car.layers] == [("car", 0.4), ("tree", 0.6)]
    assert area(car.layers[1].outline) == pytest.approx(0.6 / BINS)


def test_distances_are_pixels_of_images_of_the_width_that_was_asked_for() -> None:
    narrow, wide = (PolygonPlot.of(counts(), width=width) for width in (480, 2048))
    assert [said for _, said in narrow.ticks] == ["1", "2.5", "4.5", "15", "50"]
    assert [said for _, said in wide.ticks] == ["4.3", "11", "19", "64", "213"]
    assert [plot.around[0].said for plot in (narrow, wide)] == ["mostly road up to 2 px", "mostly road up to 8.6 px"]
    assert narrow.around[1].said == "40 % car within 1 px"
    assert narrow.legend == ["road", "tree", "car"] and narrow.images == "12 images of 480 × 360"
    assert narrow.unseen == [name for name in CAMVID.names if name not in narrow.legend]


def test_distances_that_no_pixel_of_small_images_can_have_are_left_out() -> None:
    outside = np.array(counts().outside)
    outside[:, [0, 1, 3]] = 0
    found = PolygonPlot.of(PolygonCounts.of(CAMVID, {"256x128": 3}, outside, np.ones((11, DEPTHS, 2), int)), width=256)
    assert found.bins == BINS - 3 and [layer.name for layer in found.around[0].layers] == ["road", "tree"]
    assert found.around[0].layers[0].outline.startswith("M0 100V0H1V75H2") and found.ticks[0] == (100 / 12, "1.1")


def test_how_often_polygons_are_wrong_is_told_by_class_and_depth_and_in_a_sentence_if_they_never_are() -> None:
    table = PolygonPlot.of(counts(wrong=5), width=480).inside
    assert list(table.header) == ["class", "to 1 px", "to 2 px", "to 3 px", "to 5 px", "to 10 px", "to 20 px",
                                  "over 20 px", "all"]  # fmt: skip
    assert [list(row) for row in table.rows] == [
        [name, "5.0", "–", "–", "–", "–", "–", "0.0", "0.5"] for name in ("road", "all")
    ]
    never = PolygonPlot.of(counts(), width=480).inside
    assert never.rows == [] and never.notes == ["Of 1,000 pixels with truth inside polygons none is wrong."]


def test_counts_have_a_page_of_their_own_beside_their_file(camvid: Path, tmp_path: Path) -> None:
    page = write_counts_page(tmp_path / "mine.json", counts(wrong=5), camvid)
    assert page == tmp_path / "mine.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 2 and "Around polygons of road: mostly road up to 2 px" in text
    assert "12 images of 480 × 360" in text and "Wrong pixels inside polygons" in text and "http" not in text
