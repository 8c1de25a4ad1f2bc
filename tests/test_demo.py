"""The demo works, and its students are worth looking at. Takes minutes, so it is marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import autolabel


@pytest.mark.slow
def test_the_demo_trains_students_that_find_most_of_the_street(tmp_path: Path) -> None:
    result = autolabel("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "demo" / "compare" / "compare.json").read_text())["arms"]
    for arm in ("fine", "fine + coarse", "fine + auto"):
        assert arms[arm][0]["miou"] > 0.4
        assert arms[arm][0]["iou"]["pole"] > 0.5
    assert (tmp_path / "demo" / "runs" / "auto" / "report" / "index.html").is_file()
    assert autolabel("demo", "--out", tmp_path / "demo").exit_code == 0  # again: finds everything done
