"""The demo shows what it claims: automatic labels beat coarse ones. Takes minutes, so it is marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import autolabel


@pytest.mark.slow
def test_on_the_demo_automatic_labels_beat_coarse_ones(tmp_path: Path) -> None:
    result = autolabel("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 0, result.output
    arms = json.loads((tmp_path / "demo" / "compare" / "compare.json").read_text())["arms"]
    coarse, auto = arms["fine + coarse"][0], arms["fine + auto"][0]
    assert auto["iou"]["pole"] > coarse["iou"]["pole"]
    assert auto["miou"] > coarse["miou"]
    assert (tmp_path / "demo" / "runs" / "auto" / "report" / "index.html").is_file()
    assert autolabel("demo", "--out", tmp_path / "demo").exit_code == 0  # again: finds everything done
