"""metrics.jsonl is what a training leaves to those who ask how it went: nothing in it may be torn, doubled or lost."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from autolabel.manifests.documents import BadDocument
from autolabel.student.metrics import Metrics, read_metrics
from autolabel.student.steps import StepReport


def line(step: int) -> str:
    return json.dumps(StepReport(step, 1.5, 2.0, 0.001, 9.0).record()) + "\n"


def test_every_number_comes_back_as_it_was_measured(tmp_path: Path) -> None:
    steps = [
        StepReport(1, 1 / 3, 2.5, 0.003, 1e-9),
        StepReport(2, math.inf, math.nan, 0.002, 9.0, skipped=1, first_skipped=2),
        StepReport(3, 0.25, 1.0, 0.001, 9.0, 0.1, {"road": 0.1, "train": None}, skipped=1, first_skipped=2),
    ]
    metrics = Metrics(tmp_path, step=0)
    for step in steps:
        metrics.add(step)
    metrics.append()()
    first, second, third = read_metrics(tmp_path)
    assert (first, third) == (steps[0], steps[2])
    assert math.isnan(second.loss) and math.isnan(second.gradient_norm) and second.skipped == 1
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "step": 2, "loss": None, "gradient_norm": None, "learning_rate": 0.002, "images_per_s": 9.0, "skipped": 1,
        "first_skipped": 2,
    }  # fmt: skip
    assert list(rows[2])[5:7] == ["miou", "iou"] and rows[2]["iou"] == {"road": 0.1, "train": None}


@pytest.mark.parametrize(
    ("step", "text", "kept"),
    [
        (2, line(1) + line(2) + line(3), 2),
        (3, line(1) + line(2) + line(3)[:-1], 2),  # the last line is torn
        (9, line(1) + line(2)[:20] + "\n" + line(3), 1),
        (9, line(1) + line(1), 1),
        (9, '{"step": 1}\n', 0),
        (9, "\0\0", 0),
        (0, line(1), 0),
        (5, "", 0),
    ],
)
def test_metrics_keep_whole_lines_up_to_the_step(step: int, text: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    metrics = Metrics(tmp_path, step=step)
    assert (path.read_text() if path.exists() else "") == text[: len(line(1)) * kept]
    metrics.add(StepReport(step + 1, 1.0, 1.0, 0.1, 1.0))
    metrics.append()()
    metrics.append()()
    assert [report.step for report in read_metrics(tmp_path)] == [*range(1, kept + 1), step + 1]


def test_a_reader_leaves_out_a_line_that_is_being_written_and_names_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2)[:10])
    assert [report.step for report in read_metrics(tmp_path)] == [1]
    path.write_text(line(1) + '{"step": "two"}\n')
    with pytest.raises(BadDocument, match=r"metrics\.jsonl, line 2"):
        read_metrics(tmp_path)
    path.unlink()
    with pytest.raises(BadDocument, match=r"metrics\.jsonl does not exist: choose another --out"):
        read_metrics(tmp_path)
