"""What the teacher said is kept, and another policy asks it again. If this fails, `relabel` makes other labels than
`generate` would have, and nobody can tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import autolabel, labels_of

from autolabel.manifests.policy import PAPER, REFERENCE, Policy
from autolabel.manifests.run.folder import Run, RunFolder
from autolabel.manifests.run.shards import DamagedLabel
from autolabel.manifests.schemas import FATES
from autolabel.pipeline.job import LabelJob, Portion
from autolabel.pipeline.relabel import relabel
from autolabel.pipeline.run import generate
from autolabel.pipeline.verify import verify
from autolabel.teacher.loading import load_teacher

OTHERS = {
    "another threshold": Policy(threshold=0.3),
    "by class": Policy(thresholds={"road": 0.7, "car": 0.3, "sky": 0.9}),
    "human first": Policy("human-first", coarse="human-wins"),
    "reference": REFERENCE,
    "all rules": Policy(
        "all",
        0.3,
        {"sky": 0.9},
        area=REFERENCE.area,
        boundary=1,
        smallest_piece=400,
        coarse="teacher-wins",
        coarse_rules={"road": "agree"},
    ),
}
NOT_THE_LABELS = {"decode_ms", "infer_ms", "encode_ms", "worker"}


def nothing(*_: object) -> None:
    pass


def job(city: Path, teacher: Path, out: Path, policy: Policy = PAPER, **more: object) -> LabelJob:
    asked = LabelJob(city / "coarse.parquet", teacher, out, (1.0,), policy=policy, unit_size=4)
    return replace(asked, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["zarr", "png"])
def kept(request: pytest.FixtureRequest, city: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    generate(job(city, teacher, run, keep_confidence=8, store=request.param))
    return run


def test_top_class_and_level_are_those_of_the_teacher(kept: Path, teacher: Path, city: Path) -> None:
    from autolabel.manifests.images import read_image
    from autolabel.manifests.samples import load_manifest

    confidence, knows = Run.open(kept).confidence, load_teacher(teacher, device="cpu")
    assert len(confidence.edges) == 7 and 0.5 in confidence.edges
    samples = load_manifest(city / "coarse.parquet").samples
    assert set(confidence) == {s.sample_id for s in samples}
    for sample in samples[:3]:
        winner, p = knows.confidence(read_image(sample.image), scales=(1.0,))
        top, level = confidence[sample.sample_id]
        assert np.array_equal(top, winner)
        assert np.array_equal(level, sum((p > np.float32(e)).astype(int) for e in confidence.edges))


@pytest.mark.parametrize("policy", OTHERS.values(), ids=OTHERS)
def test_relabelled_is_what_generate_would_have_labelled(
    policy: Policy, kept: Path, city: Path, teacher: Path, tmp_path: Path
) -> None:
    """Labels bit for bit; statistics but for how long it took."""
    store = Run.open(kept).recipe.store
    result = relabel(Run.open(kept), policy, out=tmp_path / "relabelled")
    generate(job(city, teacher, tmp_path / "generated", policy, store=store))
    assert result.accounts.labelled == 10
    assert labels_of(tmp_path / "relabelled") == labels_of(tmp_path / "generated") != labels_of(kept)
    for name in ("images", "classes", "centroids"):
        runs = (tmp_path / "relabelled", tmp_path / "generated")
        one, other = (
            RunFolder(run).statistics(name).to_pandas().drop(columns=NOT_THE_LABELS, errors="ignore") for run in runs
        )
        for column in one:
            if one[column].dtype.kind == "f":
                np.testing.assert_allclose(one[column], other[column], rtol=1e-12)
            else:
                assert list(map(str, one[column])) == list(map(str, other[column]))
    assert verify(tmp_path / "relabelled").faults == []


def test_the_fates_of_all_pixels_sum_to_the_image(kept: Path, tmp_path: Path) -> None:
    relabel(Run.open(kept), OTHERS["all rules"], out=tmp_path / "run")
    images = RunFolder(tmp_path / "run").statistics("images").to_pandas().set_index("sample_id")
    classes = RunFolder(tmp_path / "run").statistics("classes").to_pandas()
    fates = classes.groupby("sample_id")[[f"{fate}_pixels" for fate in FATES]].sum()
    assert (fates.sum(axis=1) == images["height"] * images["width"]).all()
    assert (fates.sum() > 0).all()  # every rule has had its say
    assert (classes["pixels"] == classes["kept_pixels"] + classes["from_human_pixels"]).all()
    for sample_id, label in Run.open(tmp_path / "run").labels.items():
        mine = classes[classes["sample_id"] == sample_id].set_index("class_id")["pixels"]
        assert mine[mine > 0].to_dict() == {c: n for c, n in enumerate(np.bincount(label.ravel())[:19]) if n}


def test_stats_diff_report_and_fuse_work_on_a_relabelled_run(kept: Path, city: Path, tmp_path: Path) -> None:
    """It is a run like any other: stats, diff, report, fuse."""
    run = tmp_path / "run"
    relabel(Run.open(kept), OTHERS["human first"], out=run)
    fused = "manifest", "fuse", city / "fine.parquet", run / "manifest.parquet", "-o", tmp_path / "fused.parquet"
    for command in (("stats", run), ("diff", kept, run), ("report", run, "--images", "2"), fused):
        result = autolabel(*command)
        assert (result.exit_code, result.stderr.count("Traceback")) == (0, 0), result.stderr
    assert f"confidence kept by {kept.name}" in (run / "report/index.html").read_text(encoding="utf-8")


def test_a_relabelling_that_was_stopped_labels_what_is_left(kept: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    relabel(Run.open(kept), OTHERS["by class"], out=whole)
    relabel(Run.open(kept), OTHERS["by class"], out=run)
    next((run / "units").iterdir()).unlink()
    result = relabel(Run.open(kept), OTHERS["by class"], out=run)
    assert 0 < result.done < 10
    assert labels_of(run) == labels_of(whole)
    with pytest.raises(ValueError, match=r"policy: threshold was 0\.5, now 0\.3"):
        relabel(Run.open(kept), OTHERS["another threshold"], out=run)


def test_relabel_needs_neither_teacher_nor_images(city: Path, teacher: Path, tmp_path: Path) -> None:
    own = Path(teacher.parent / "moved.pt")
    own.write_bytes(teacher.read_bytes())
    generate(job(city, own, tmp_path / "run", keep_confidence=3))
    own.unlink()
    result = relabel(Run.open(tmp_path / "run"), Policy(coarse="human-wins"), out=tmp_path / "again")
    assert result.accounts.labelled == 10


def test_a_flipped_bit_in_what_is_kept_is_found_and_repaired(city: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    generate(job(city, teacher, run, keep_confidence=8))
    for layer in ("top", "confidence"):
        shard = run / f"{layer}.zarr/b512x512/c.1.0.0"
        before = shard.read_bytes()
        shard.write_bytes(before[:100] + bytes([before[100] ^ 1]) + before[101:])
        with pytest.raises(DamagedLabel):
            relabel(Run.open(run), PAPER, out=tmp_path / f"from a damaged {layer}")
        assert any(f"{layer}.zarr" in fault for fault in verify(run, repair=True).faults)
        generate(job(city, teacher, run, keep_confidence=8))
        assert shard.read_bytes() == before
        assert verify(run).faults == []


def test_a_relabelling_that_is_impossible_is_refused_in_one_line(city: Path, teacher: Path, tmp_path: Path) -> None:
    plain, run, mine = tmp_path / "plain", tmp_path / "run", tmp_path / "mine.toml"
    generate(job(city, teacher, plain, portion=Portion(limit=4)))
    generate(job(city, teacher, run, keep_confidence=4))
    refusals = [
        (plain, "paper", f"{plain} has kept no confidence: generate it anew with --keep-confidence 8"),
        (run, "threshold = 0.123", f"has threshold 0.123, but {run} can tell apart only 0.5, 0.7, 0.9: use these"),
        (run, "temperature = 2", f"has temperature 2, {run} 1: only `autolabel generate` can change it"),
        (run, "[thresholds]\nrode = 0.5", "'rode' is no class of label space 'cityscapes': did you mean 'road'?"),
        (run, "[area]\nrows = [0, 97]\ncolumns = [0, 9]", "leaves an image of 96 rows and 192 columns"),
    ]
    for source, text, message in refusals:
        mine.write_text(text)
        named = "paper" if text == "paper" else mine
        result = autolabel("relabel", source, "--policy", named, "--out", tmp_path / "out")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and message in result.stderr
        assert not (tmp_path / "out/run.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--policy", "paper", "--threshold", "0.6"],
            "--threshold 0.6 and --policy: write the threshold into",
        ),
        (["--policy", "nowhere.toml"], "policy 'nowhere.toml' is neither a preset"),
        (["--keep-confidence", "1"], "keep-confidence 1: expected 2 to 32 levels"),
        (["--keep-confidence", "33"], "keep-confidence 33: expected 2 to 32 levels"),
        (["--threshold", "1"], "threshold 1: expected a probability in [0, 1)"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    options: list[str], message: str, city: Path, teacher: Path, tmp_path: Path
) -> None:
    made = city / "coarse.parquet", "--teacher", teacher, "--out", tmp_path / "run"
    result = autolabel("generate", *made, *options)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1) and message in result.stderr
    assert not (tmp_path / "run").exists()
