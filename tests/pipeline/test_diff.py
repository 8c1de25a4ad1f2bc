"""Two runs side by side. If this fails, nobody knows what a new teacher or threshold changed in the labels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel

from autolabel.manifests.label_space import CITYSCAPES, LabelSpace
from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import load_manifest, save_manifest
from autolabel.pipeline.analysis.diff import RunDifference, compare
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.run import generate


@pytest.fixture
def three() -> RunDifference:
    """Classes road, sidewalk and building. 100 pixels of A's road: 80 the same, 5 sidewalk, 15 ignored; …"""
    joint = [[80, 5, 0, 15], [0, 40, 0, 0], [0, 0, 0, 0], [20, 0, 10, 30]]
    space = LabelSpace("three", CITYSCAPES.classes[:3])
    return RunDifference(
        Path("a"), Path("b"), space, np.array(joint, np.int64), images=2, identical=0, only_a=0, only_b=0
    )


def test_a_difference_of_three_classes_equals_counts_by_hand(three: RunDifference) -> None:
    road, sidewalk, building = (three.classes.loc[name] for name in three.space.names)
    assert road[["a_pixels", "b_pixels"]].tolist() == [100, 100]
    assert road[["a_share", "b_share"]].tolist() == [100 / 140, 100 / 155]
    assert road[["agreement", "lost", "gained", "moved"]].tolist() == [80 / 120, 0.15, 0.2, 0.05]
    assert sidewalk[["agreement", "lost", "gained", "moved"]].tolist() == [40 / 45, 0, 0, 0]
    assert building[["b_pixels", "agreement", "gained"]].tolist() == [10, 0, 1]
    assert building[["lost", "moved"]].isna().all()  # A has no such pixel
    assert three.agreement == 120 / 125
    assert three.coverage == (140 / 200, 155 / 200)
    shares = [(100 / 140, 100 / 155), (40 / 140, 45 / 155), (0, 10 / 155)]
    assert three.drift == pytest.approx(sum(abs(a - b) for a, b in shares) / 2)
    assert three.moves() == {
        "ignored": [("road", 20 / 60), ("building", 10 / 60)],
        "road": [("ignored", 0.15), ("sidewalk", 0.05)],
    }
    assert three.moves(least=0.1)["road"] == [("ignored", 0.15)]


def test_a_difference_without_a_labelled_pixel_has_no_agreement(three: RunDifference) -> None:
    empty = replace(three, joint=np.diag([0, 0, 0, 7]).astype(np.int64))
    assert np.isnan(empty.agreement) and np.isnan(empty.drift) and empty.coverage == (0, 0) and empty.moves() == {}


@pytest.fixture(scope="module")
def runs(city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same images at two thresholds; and at the lower one again, but only four of them and as PNG."""
    folder = tmp_path_factory.mktemp("diff")
    asked = LabelJob(city / "coarse.parquet", teacher, folder / "low", (1.0,), policy=Policy(threshold=0.3))
    generate(asked)
    generate(replace(asked, out=folder / "high", policy=Policy(threshold=0.5)))
    generate(replace(asked, out=folder / "few", store="png", portion=Portion(limit=4)))
    return {name: folder / name for name in ("low", "high", "few")}


def test_a_lower_threshold_keeps_all_that_a_higher_one_keeps(runs: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = compare(runs["low"], runs["high"], progress=lambda done, total: seen.append((done, total)))
    assert (found.images, found.only_a, found.only_b) == (10, 0, 0)
    assert seen == [(k, 10) for k in range(1, 11)]
    assert found.agreement == 1 and not found.joint[-1, :-1].any()
    assert (found.classes["moved"].fillna(0) == 0).all() and found.classes["lost"].max() > 0
    assert {target for became in found.moves().values() for target, _ in became} == {"ignored"}
    # And against brute force.
    low, high = (np.concatenate([x.ravel() for x in Run.open(runs[name]).labels.values()]) for name in ("low", "high"))
    assert found.coverage == ((low != 255).mean(), (high != 255).mean())
    for c, (_, row) in enumerate(found.classes.iterrows()):
        assert row[["a_pixels", "b_pixels"]].tolist() == [(low == c).sum(), (high == c).sum()]
        either = ((low == c) | (high == c)).sum()
        assert not either or row["agreement"] == ((low == c) & (high == c)).sum() / either


def test_diff_in_the_other_order_swaps_gained_and_lost(runs: dict[str, Path]) -> None:
    one, other = compare(runs["low"], runs["high"]), compare(runs["high"], runs["low"])
    assert (one.joint == other.joint.T).all() and one.drift == other.drift
    assert one.classes["lost"].equals(other.classes["gained"])


def test_only_what_both_have_labelled_is_compared(runs: dict[str, Path]) -> None:
    found = compare(runs["few"], runs["low"])
    assert (found.images, found.identical, found.only_a, found.only_b) == (4, 4, 0, 6)
    assert found.agreement == 1 and found.drift == 0 and found.moves() == {}
    shown = autolabel("diff", runs["few"], runs["low"])
    assert shown.exit_code == 0
    assert "in both: 4, of them with the same label: 4; only in A: 0, only in B: 6" in shown.stdout


def test_the_biggest_moves_are_put_into_words(runs: dict[str, Path]) -> None:
    shown = autolabel("diff", runs["low"], runs["high"]).stdout
    name, ((target, share), *_) = next(iter(compare(runs["low"], runs["high"]).moves().items()))
    assert f"of A's {name}, {100 * share:.1f} % became {target}" in shown


def refused(run_a: Path, run_b: Path) -> str:
    result = autolabel("diff", run_a, run_b)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    return result.stderr.removeprefix("autolabel: ").rstrip()


def test_diff_refuses_runs_over_different_manifests(
    runs: dict[str, Path], city: Path, teacher: Path, tmp_path: Path
) -> None:
    listed = load_manifest(city / "coarse.parquet")
    save_manifest(tmp_path / "few.parquet", replace(listed, samples=listed.samples[:2]))
    generate(LabelJob(tmp_path / "few.parquet", teacher, tmp_path / "run", (1.0,)))
    line = refused(runs["low"], tmp_path / "run")
    assert line.startswith(f"{runs['low']} and {tmp_path}/run label different manifests ({city}/coarse.parquet, sha256")
    assert f"{tmp_path}/few.parquet, sha256" in line and "compare two runs over the same one" in line


def test_a_run_that_has_labelled_nothing_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    empty = Path(shutil.copytree(runs["low"], tmp_path / "empty"))
    for record in (empty / "units").iterdir():
        record.unlink()
    assert refused(runs["low"], empty) == f"no image is labelled in both {runs['low']} (10) and {empty} (0)"


def test_a_folder_that_holds_no_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    assert refused(runs["low"], tmp_path).startswith(f"{tmp_path} is not a run")
    about = json.loads((runs["low"] / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**about, "manifest_sha256": "0"}))
    assert "differs from what was written" in refused(tmp_path, runs["low"])
