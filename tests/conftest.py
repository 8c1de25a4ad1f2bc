"""The tiny city that the tests live in, and a teacher that has seen a little of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

# `make plain` tests without the extra `fast`: a module that is None cannot be imported.
for _name in filter(None, os.environ.get("AUTOLABEL_TESTS_WITHOUT", "").split(",")):
    sys.modules[_name] = None  # type: ignore[assignment]
# Before anything imports torch: its threads shall not spin while they wait, which takes a busy machine's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Before anything imports Ray: its ports listen on every interface, and only these tests know the token.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32), RAY_USAGE_STATS_ENABLED="0")
os.environ.update(RAY_raylet_start_wait_time_s="120")

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from autolabel.cli import main
from autolabel.manifests import storage
from autolabel.manifests.label_space import CAMVID, CITYSCAPES
from autolabel.manifests.run.folder import Accounts, Run
from autolabel.manifests.samples import fingerprints, load_manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.pipeline.run import Labelling
from autolabel.teacher.checkpoints import (
    DRAWN_STREETS,
    fingerprint_tensor,
    load_network,
    read_checkpoint,
    save_checkpoint,
)

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 96, 192

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that; some tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as thorough what labels, which is what tests ask the teacher for, and what kills, fills and damages."""
    for item in items:
        if "teacher" in getattr(item, "fixturenames", ()) or item.path.parent.name == "promises":
            item.add_marker(pytest.mark.thorough)


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated Cityscapes: 6 fine, 10 coarse and 3 validation images of 192 x 96, and their manifests beside them."""
    root = tmp_path_factory.mktemp("city")
    write_city(root / "data", seed=1, fine=6, coarse=10, val=3, height=HEIGHT, width=WIDTH)
    for name, split in (("fine", "train"), ("coarse", "train_extra"), ("val", "val")):
        save_manifest(root / f"{name}.parquet", scan(root / "data", layout="cityscapes", splits=[split])[0])
    return root


@pytest.fixture(scope="session")
def teacher(city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped teacher of drawn streets, as a checkpoint that says it was trained on the city's six fine images.

    Nothing is trained: it has learnt from other scenes of the same kind, and is unsure of some pixels.
    """
    shipped = read_checkpoint(DRAWN_STREETS)
    marks = fingerprint_tensor(fingerprints(load_manifest(city / "fine.parquet").samples))
    network = load_network(DRAWN_STREETS, shipped)
    path = tmp_path_factory.mktemp("teacher") / "best.pt"
    save_checkpoint(path, network, arch=shipped.arch, space=CITYSCAPES, trained_on=marks)
    return path


@pytest.fixture(scope="session")
def camvid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of one picture in another label space."""
    root = tmp_path_factory.mktemp("camvid")
    for folder, array in (("images", np.zeros((64, 64, 3), np.uint8)), ("labels", np.zeros((64, 64), np.uint8))):
        (root / folder).mkdir()
        Image.fromarray(array).save(root / folder / "a.png")
    save_manifest(
        root / "camvid.parquet", scan(root / "images", layout="folder", labels=root / "labels", label_space=CAMVID)[0]
    )
    return root / "camvid.parquet"


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, but for its lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != storage.LOCK)


def autolabel(*arguments: object) -> Result:
    """Run a command in this process; stdout and stderr are kept apart in the result."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(*arguments: object) -> str:
    """Run a command that must fail; return its one line."""
    result = autolabel(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("autolabel: ")]
    assert len(lines) == 1, result.stderr
    return lines[0].removeprefix("autolabel: ")


def photograph(city: Path, folder: Path, names: Iterable[str]) -> None:
    """Put street images of the city into a folder under these names; no two of ten are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    images = load_manifest(city / "coarse.parquet").samples
    for place, name in enumerate(names):
        shutil.copyfile(images[place % len(images)].image, folder / f"{name}.png")


def scanned(city: Path, folder: Path) -> Path:
    """The manifest of a folder of images, beside it."""
    path = folder.with_suffix(".parquet")
    save_manifest(
        path, scan(folder, layout="folder", label_space=load_manifest(city / "coarse.parquet").label_space)[0]
    )
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its relative path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def outcome(result: Labelling) -> tuple[Accounts, int, dict[str, str], bool]:
    """The accounts of a call, the samples that it finished, the units that failed, and True if it was stopped."""
    return result.accounts, result.done, result.failed, result.stopped


def labels_of(run: Path) -> dict[str, bytes]:
    """The committed labels of a run, as bytes."""
    return {name: label.tobytes() for name, label in Run.open(run).labels.items()}


def quarantined(run: Path) -> dict[str, str]:
    """Why samples of a run are quarantined."""
    return {row["sample_id"]: row["reason"] for row in pq.read_table(run / "quarantine.parquet").to_pylist()}


@contextlib.contextmanager
def address_space(more: int) -> Iterator[None]:
    """Meanwhile this process can reserve so many bytes more than it has, and more fails at once. Linux only."""
    import resource

    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(line.split()[1]) * 1024 + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
