"""The whole way of a teacher: labelled here and by Ray, killed, resumed, audited, verified, shown in a browser."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browser import CHROMIUM, playwright
from conftest import autolabel, labels_of, refused

from autolabel.manifests.label_space import IGNORE
from autolabel.manifests.run.folder import Run

OWN = "own"  # the folder below `place` in which the teacher and all of its files lie


def go(
    teacher: str,
    manifest: Path,
    place: Path,
    *,
    seen: Path | None = None,
    changed: str = "",
    more: tuple[object, ...] = (),
) -> Path:
    """Take a teacher in `place`/OWN the whole way over a manifest with fine labels; return the run that was made here.

    seen: a manifest of images that the teacher says it has seen. changed: a file of the teacher that is then changed.
    more: further options of `generate`.
    """
    command = ("generate", manifest, "--unit-size", 1, *more)
    here, killed, ray = (place / name for name in ("here", "killed", "ray"))

    # Here, and by two workers of Ray: the same bytes.
    local = autolabel(*command, "--teacher", teacher, "--out", here, "--engine", "local")
    assert local.exit_code == 0, local.output
    assert autolabel(*command, "--teacher", teacher, "--out", ray, "--workers", 2).exit_code == 0
    assert labels_of(ray) == labels_of(here)
    assert any((label != IGNORE).any() for label in Run.open(here).labels.values())

    # Killed in the middle, and resumed with the teacher elsewhere: its files decide which it is.
    words = [sys.executable, "-m", "autolabel", *map(str, command), "--teacher", teacher, "--out", str(killed)]
    process = subprocess.Popen([*words, "--engine", "local"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(killed.glob("units/*.parquet")):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    shutil.copytree(place / OWN, place / "elsewhere")
    elsewhere = teacher.replace(str(place / OWN), str(place / "elsewhere"))
    again = autolabel(*command, "--teacher", elsewhere, "--out", killed, "--engine", "local")
    assert again.exit_code == 0, again.output
    assert labels_of(killed) == labels_of(here)
    if changed:
        with (place / "elsewhere" / changed).open("a") as file:
            file.write("\n")
        assert "teacher was" in refused(*command, "--teacher", elsewhere, "--out", killed)

    # Audited, scored but not on what it has seen, verified, and shown.
    audit = autolabel("audit", here, "--truth", manifest, "--allow-leak")
    assert audit.exit_code == 0, audit.output
    if seen:
        assert "trained on" in refused("evaluate", teacher, seen)
    scored = autolabel("evaluate", teacher, manifest)
    assert scored.exit_code == 0, scored.output
    assert autolabel("verify", ray).exit_code == 0
    assert autolabel("report", here, "--teacher", teacher).exit_code == 0
    _look_at(here, teacher)
    return here


def _look_at(run: Path, teacher: str) -> None:
    """Open the report of a run: it names the teacher, shows pictures and complains of nothing."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH to look at the report")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((run / "report" / "index.html").as_uri())
        assert Path(teacher).name in page.inner_text("body")  # without its folders, which are of this machine
        assert page.locator("img").count() >= len(Run.open(run).labels)
        browser.close()
    assert complaints == []
