"""What is installed is what the folders hold. If this fails, a wheel works here and misses a file elsewhere."""

from __future__ import annotations

import configparser
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from conftest import ROOT
from test_arrows import MAY_IMPORT

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg", encoding="utf-8")


def files() -> list[Path]:
    """Every file of the rooms and the root's Python files, relative to the root."""
    rooms = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*") if path.is_file()]
    found = [path.relative_to(ROOT) for path in [*rooms, *ROOT.glob("*.py"), ROOT / "py.typed"]]
    return sorted(path for path in found if "__pycache__" not in path.parts)


def test_every_folder_with_python_files_is_listed_as_a_package_and_no_other() -> None:
    folders = {".".join(("autolabel", *path.parent.parts)) for path in files() if path.suffix == ".py"}
    assert sorted(CONFIG["options"]["packages"].split()) == sorted(folders)


def test_every_file_that_is_not_python_matches_a_pattern_of_the_package_data() -> None:
    patterns = [pattern.strip() for pattern in CONFIG["options.package_data"]["*"].split(",")]
    others = [path for path in files() if path.suffix != ".py"]
    assert [path for path in others if not any(fnmatch(path.name, pattern) for pattern in patterns)] == []


def test_the_package_data_stays_below_five_megabytes() -> None:
    assert sum((ROOT / path).stat().st_size for path in files() if path.suffix != ".py") < 5_000_000


@pytest.mark.parametrize("extra", ["test", "lint", "dev"])
def test_every_package_that_development_needs_is_pinned(extra: str) -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[><=\[ ;]", name)[0]).lower()

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {plain(line) for line in lines if "==" in line and not line.startswith("#")}
    extras = CONFIG["options.extras_require"]
    needed = extras[extra].split() + CONFIG["options"]["install_requires"].split()
    for own in [name for name in needed if name.startswith("autolabel[")]:  # the extras that an extra holds
        needed.remove(own)
        needed += [name for other in own[len("autolabel[") : -1].split(",") for name in extras[other].split()]
    assert {plain(name) for name in needed} - pinned == set()
