"""A comparison that flatters, hides a class that loses, or calls noise a gain sends the wrong labels into training."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import autolabel

from autolabel.manifests.policy import Policy
from autolabel.manifests.run.folder import Run
from autolabel.manifests.samples import Manifest, load_manifest, save_manifest
from autolabel.manifests.teachers import TeacherName
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.run import generate
from autolabel.student.comparison.compare import ArmProgress, _teachers, all_arms, compare, joined_arm, last_scores
from autolabel.student.comparison.intervals import (
    Chance,
    Estimate,
    Pairing,
    estimate,
    pairing,
    t_quantile,
    two_sided,
)
from autolabel.student.comparison.page import Interval, page_of, render
from autolabel.student.comparison.verdicts import MEAN, ArmDifference, Comparison
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.evaluate import Scores
from autolabel.student.job import TrainJob
from autolabel.student.metrics import read_metrics
from autolabel.student.sampling import Draws
from autolabel.student.steps import StepReport
from autolabel.teacher.checkpoints import DRAWN_STREETS

ARMS = ("fine", "fine + coarse", "fine + auto")

torch.set_num_threads(1)  # the small network is no slower with one, and never waits for a busy core

# --- what a few seeds tell --------------------------------------------------------------------------------------------


def test_one_fortieth_of_students_t_lies_above_each_quantile() -> None:
    """To the table of the NIST/SEMATECH e-Handbook, section 1.3.6.7.2, and to four decimals above it."""
    table = (
        12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
    )  # fmt: skip
    assert tuple(round(t_quantile(freedom), 3) for freedom in range(1, 31)) == table
    above = {31: 2.0395, 40: 2.0211, 60: 2.0003, 120: 1.9799, 10_000: 1.9602}
    assert {freedom: round(t_quantile(freedom), 4) for freedom in above} == above
    for freedom in (0, -1):
        with pytest.raises(ValueError, match=f"^{freedom} degrees of freedom: expected 1 or more"):
            t_quantile(freedom)


def test_the_chance_of_a_t_is_what_its_density_holds_outside() -> None:
    """Against the density itself, integrated by Simpson's rule from 0."""
    for freedom in (1, 2, 3, 4, 5, 30, 31):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        for t in (0.0, 0.5, 2.0, 9.0):
            x = np.linspace(0, t, 2001)
            y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
            inside = (x[1] / 3) * (y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum())
            assert two_sided(t, freedom) == two_sided(-t, freedom) == pytest.approx(1 - 2 * inside, abs=1e-9)
    assert two_sided(math.inf, 2) == two_sided(math.inf, 3) == 0


def test_an_interval_is_computed_as_by_hand() -> None:
    """0.1, 0.2, 0.3: deviation 0.1, so 4.30265 x 0.1 / sqrt 3 = 0.248414."""
    found = estimate([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2) and found.half == pytest.approx(0.248414, abs=1e-6)
    assert estimate([0.25]) == Estimate(0.25, None)
    assert estimate([0.1, None, 0.3]) == estimate([None]) == estimate([0.1, math.nan]) == Estimate(None, None)


def test_the_chance_of_a_mean_is_a_twentieth_where_its_interval_ends_at_zero() -> None:
    """0.1, 0.2, 0.3 has t = 0.2 sqrt 3 / 0.1 = 3.4641 and, for two degrees, p = 1 - t / sqrt(2 + t²) = 0.0741799."""
    assert estimate([0.1, 0.2, 0.3]).p_value(3) == pytest.approx(0.0741799, abs=1e-7)
    assert Estimate(-0.3, 0.3).p_value(5) == pytest.approx(0.05)
    assert (Estimate(0.2, 0.0).p_value(3), Estimate(0.0, 0.1).p_value(3)) == (0, 1)
    for nothing in (Estimate(None, None), Estimate(0.2, None), Estimate(0.0, 0.0)):  # the last: 0 in every training
        assert nothing.p_value(3) is None


def test_adding_seeds_until_something_is_decided_makes_13_of_100_equal_arms_differ() -> None:
    """docs/compare.md names this number: looks with two, three, four and five seeds, where one look would make 5."""
    differences = np.random.default_rng(0).normal(size=(40_000, 5))
    decided = np.zeros(len(differences), bool)
    for n in range(2, 6):
        own = differences[:, :n]
        decided |= abs(own.mean(axis=1)) > t_quantile(n - 1) * own.std(axis=1, ddof=1) / math.sqrt(n)
    assert decided.mean() == pytest.approx(0.135, abs=0.005)


def test_pairing_is_told_by_correlation_and_by_the_width_that_it_saves() -> None:
    """Deviations 0.1 and 0.2, correlation 1: differences 0.1, 0.2, 0.3 deviate by 0.1; unpaired, by sqrt(0.05)."""
    found = pairing([0.2, 0.3, 0.4], [0.1, 0.3, 0.5])
    assert found is not None and found.correlation == pytest.approx(1)
    assert found.ratio == pytest.approx(4.30265 * 0.1 / (2.77645 * math.sqrt(0.05)), abs=1e-5)
    assert str(Pairing(-0.5, 1.554)) == (
        "By seed, the mean IoUs of the two arms correlate with \N{MINUS SIGN}0.50: the paired interval is 1.55 times as"
        " wide as an unpaired one."
    )
    known = [0.2, 0.3, 0.4]
    for other in ([0.3, 0.3, 0.3], [0.2, None, 0.4]):
        assert pairing(known, other) is pairing(other, known) is None
    assert pairing([0.2, 0.3], [0.1, 0.3]) is None


def test_false_discoveries_are_controlled_as_benjamini_and_hochberg_do() -> None:
    """Their own fifteen p values: at 5 % the first four are left, though nine of them are below 0.05."""
    p_values = [
        0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590,
        1.0,
    ]  # fmt: skip
    found = Chance.of(p_values[::-1], excluding=9, losses=2)
    assert found == Chance(15, 9, 2, 0.0095, 4) and found.expected == 0.75
    assert str(found) == (
        "9 of 15 intervals exclude 0, 2 of them as losses. By chance about 0.8 would, 0.4 of them as losses, if no arm"
        " differed. 4 of the 9 also hold at a false discovery rate of 5 % (\N{DAGGER})."
    )
    assert Chance.of([0.02, 0.03, 0.04], excluding=3, losses=0).holding == 3  # the last takes the others along
    nothing = Chance.of([0.6], excluding=0, losses=0)
    assert (nothing.largest, nothing.holding) == (-1, 0)
    assert str(nothing).endswith("if no arm differed.")
    assert Chance.of([], excluding=0, losses=0).intervals == 0


def made_up(values: dict[str, Sequence[dict[str, float | None]]]) -> Comparison:
    """Scores by arm and seed; the mean IoU is that of what there is. Every curve: 4 steps of 8 images, 16 a second."""
    scores = {
        arm: [Scores(iou, float(np.mean([v for v in iou.values() if v is not None])), 0.9, 3) for iou in of_arm]
        for arm, of_arm in values.items()
    }
    curve = [StepReport(n, 4.0 / n, 1.0, 0.001, 16.0, 0.1 * n if n % 2 == 0 else None) for n in range(1, 5)]
    seeds = tuple(range(len(next(iter(scores.values())))))
    asked = {
        "steps": 4, "arch": "a network", "batch_size": 8, "crop": [64, 96], "loss": "cross-entropy", "init": None,
        "optimizer": "adamw", "learning_rate": 0.003, "precision": "float32", "val": "val.parquet", "runs": [],
        "looks": [len(seeds)],
        "schedule": "poly", "power": 0.9, "ema": 0.99, "weights": True, "noise": None, "fine_only_last": 0.25,
        "added_share": 0.5,
        "manifests": {arm: f"{arm}.parquet" for arm in scores}, "images": dict.fromkeys(scores, 6),
    }  # fmt: skip
    curves = {arm: [curve for _ in seeds] for arm in scores}
    return Comparison(seeds, scores, curves, 8, ("a note <to> read",), asked)


@pytest.fixture
def three_seeds() -> Comparison:
    """Seeds differ by 0.3, the arms of one seed by little: only pairs can tell. Pole loses 0.021 ± 0.008 by auto."""
    seeds, around = (0.2, 0.5, 0.8), 0.008 * math.sqrt(3) / 4.302653
    return made_up(
        {
            "fine": [{"road": s, "sky": 0.5, "pole": s, "train": None} for s in seeds],
            "fine + coarse": [
                {"road": s + d, "sky": v, "pole": s + 0.05, "train": None}
                for s, d, v in zip(seeds, (0.03, 0.04, 0.05), (0.5, 0.52, 0.48), strict=True)
            ],
            "fine + auto": [
                {"road": s + 0.1, "sky": v, "pole": s + 0.029 + d, "train": None}
                for s, d, v in zip(seeds, (-around, 0.0, around), (0.41, 0.5, 0.47), strict=True)
            ],
        }
    )


def test_differences_are_paired_by_seed(three_seeds: Comparison) -> None:
    """Road of fine + coarse against fine: +0.03, 0.04, 0.05, so 0.04 ± 4.30265 x 0.01 / sqrt 3 = 0.0248414."""
    found = three_seeds.difference("fine + coarse", "fine", "road")
    assert found.mean == pytest.approx(0.04) and found.half == pytest.approx(0.0248414, abs=1e-7)
    assert found.verdict == "better"
    alone = three_seeds.estimate("fine + coarse", "road").half
    assert alone is not None and alone > 0.7  # unpaired, nothing could be said


def test_a_verdict_is_given_only_where_the_interval_excludes_zero(three_seeds: Comparison) -> None:
    verdicts = {(d.arm, d.baseline, d.name): d.verdict for d in three_seeds.differences()}
    assert {key[:2] for key in verdicts} == {
        ("fine + coarse", "fine"), ("fine + auto", "fine + coarse"), ("fine + auto", "fine"),
    }  # fmt: skip
    against = {name: verdicts["fine + auto", "fine + coarse", name] for name in ("road", "sky", "pole", "train")}
    assert against == {"road": "better", "sky": "undecided", "pole": "worse", "train": "undecided"}
    assert ArmDifference("a", "b", "road", 0.2, 0.2).verdict == "undecided"  # 0 is still in it


def test_a_class_that_loses_is_said_first(three_seeds: Comparison) -> None:
    assert [f"{d.arm}: {d}" for d in three_seeds.losses()] == [
        "fine + auto: pole loses 2.1 ± 0.8 points against fine + coarse"
    ]
    assert three_seeds.names == ("pole", "road", "sky", MEAN) and three_seeds.absent == ("train",)
    assert three_seeds.record()["losses"] == ["fine + auto: pole loses 2.1 ± 0.8 points against fine + coarse"]
    page = render(three_seeds)
    assert page.index("pole loses</b> 2.1 ± 0.8 points against fine + coarse") < page.index('<dl class="tiles"')
    rows = re.findall(r'<th scope="row">(.*?)</th>', page)
    assert rows[:4] == ["pole", "road", "sky", MEAN]


def test_the_greatest_loss_comes_before_others() -> None:
    values = {"fine": (0.5, 0.5), "fine + coarse": (0.4, 0.4), "fine + auto": (0.1, 0.1)}
    found = made_up({arm: [{"road": v, "sky": 0.9 - v} for v in of_arm] for arm, of_arm in values.items()})
    assert [(d.arm, d.baseline, d.name) for d in found.losses()] == [
        ("fine + auto", "fine", "road"), ("fine + auto", "fine + coarse", "road"), ("fine + coarse", "fine", "road"),
    ]  # fmt: skip


def test_one_seed_gives_no_verdict() -> None:
    values = {"fine": 0.5, "fine + coarse": 0.1, "fine + auto": 0.9}
    found = made_up({arm: [{"road": v, "train": None}] for arm, v in values.items()})
    assert {d.verdict for d in found.differences() if d.name != "train"} == {"undecided (one seed)"}
    assert found.losses() == [] and found.estimate("fine", "road") == Estimate(0.5, None)
    assert "undecided (one seed)" in (page := render(found)) and "One seed has no interval" in page


def with_commonest(found: Comparison, miou: float) -> Comparison:
    """The same scores on images where naming the commonest class everywhere has this mean IoU."""
    scores = {arm: [replace(s, commonest_miou=miou) for s in of_arm] for arm, of_arm in found.scores.items()}
    return replace(found, scores=scores)


def test_an_arm_no_better_than_the_commonest_class_everywhere_is_not_judged() -> None:
    values = {"fine": (0.5, 0.6), "fine + coarse": (0.3, 0.4), "fine + auto": (0.2, 0.01)}
    found = with_commonest(made_up({arm: [{"road": v} for v in of_arm] for arm, of_arm in values.items()}), 0.01)
    assert found.unlearnt == ("fine + auto",)
    verdicts = {(d.arm, d.baseline): d.verdict for d in found.differences() if d.name == MEAN}
    assert verdicts == {
        ("fine + coarse", "fine"): "worse",
        ("fine + auto", "fine + coarse"): "not judged",
        ("fine + auto", "fine"): "not judged",
    }
    refusal = (
        "fine + auto: not judged. A training of it has 1.0 % mean IoU, no better than naming the commonest class"
        " everywhere (1.0 %): train longer."
    )
    assert found.lines()[0] == refusal
    assert str(found.difference("fine + auto", "fine")) == "mean IoU is not judged against fine"
    page = render(found)
    assert f"<li>{refusal}</li>" in page and ">not judged</span>" in page


def test_students_that_have_all_learnt_nothing_leave_no_verdict_and_no_loss() -> None:
    values = {"fine": (0.02, 0.03), "fine + coarse": (0.01, 0.01), "fine + auto": (0.05, 0.05)}
    found = with_commonest(made_up({arm: [{"road": v} for v in of_arm] for arm, of_arm in values.items()}), 0.06)
    assert {d.verdict for d in found.differences()} == {"not judged"} and found.losses() == []
    assert [line.partition(":")[0] for line in found.lines()] == [*values, "note"] and found.chance.intervals == 0
    assert "is shown to lose" not in render(found)


def test_an_interval_that_no_iou_can_have_is_marked(three_seeds: Comparison) -> None:
    """Road of fine: 0.2, 0.5, 0.8, so 0.5 ± 0.745; sky: 0.5 thrice."""
    assert str(three_seeds.estimate("fine", "road")) == "50.0 ± 74.5*"
    assert str(three_seeds.estimate("fine", "sky")) == "50.0 ± 0.0"
    note = "* The interval leaves 0 to 100 %: 3 seeds say little here; more seeds or more steps say more."
    assert note in three_seeds.score_table().notes and note in render(three_seeds)
    assert not any("leaves" in note for note in three_seeds.verdict_table("fine + auto", "fine").notes)
    assert ArmDifference("a", "b", "road", -0.4, 0.7).change == "\N{MINUS SIGN}40.0 ± 70.0*"


def test_verdicts_stand_beside_those_that_chance_would_give(three_seeds: Comparison) -> None:
    """Three pairs of arms with road, sky, pole and the mean: twelve intervals; no image has a train."""
    record = three_seeds.record()
    tested = [d for d in record["differences"] if d["p"] is not None]
    decided = [d for d in tested if d["verdict"] in ("better", "worse")]
    assert {(d["arm"], d["name"]) for d in record["differences"] if d["p"] is None} == {
        (arm, "train") for arm in ("fine + coarse", "fine + auto")
    }
    counts = {"intervals": 12, "excluding_0": len(decided), "losses": 1, "expected": 0.6, "expected_losses": 0.3}
    assert record["chance"] == pytest.approx({**counts, "holding": sum(d["holds"] for d in record["differences"])})
    assert all(d["p"] < 0.05 for d in decided) and all(d["p"] > 0.05 for d in tested if d not in decided)
    sentence = f"{len(decided)} of 12 intervals exclude 0, 1 of them as losses. By chance about 0.6 would"
    assert any(line.startswith(sentence) for line in three_seeds.lines())
    assert f'<li id="chance">{sentence}' in render(three_seeds)


def test_a_verdict_that_holds_among_all_is_marked(three_seeds: Comparison) -> None:
    """Seven of twelve have p below 0.05; Benjamini and Hochberg keep those up to 7/12 of it, all of these."""
    table = three_seeds.verdict_table("fine + auto", "fine + coarse")
    assert three_seeds.chance.holding == three_seeds.chance.excluding == 7
    assert {row[0]: row[2] for row in table.rows} == {
        "pole": "worse †", "road": "better †", "sky": "undecided", MEAN: "undecided",
    }  # fmt: skip
    assert not three_seeds.holds(replace(three_seeds.losses()[0], p=0.04))
    assert "† This verdict also holds at a false discovery rate of 5 %." in table.notes
    assert '<td class=" better" data-name="verdict">better †</td>' in render(three_seeds)


def test_differences_that_chance_cannot_make_are_not_counted() -> None:
    """They are those of an arm that is not judged, of a class that nobody ever finds, and of a single seed."""
    values = {"fine": (0.5, 0.6), "fine + coarse": (0.3, 0.5), "fine + auto": (0.2, 0.01)}
    found = made_up({arm: [{"road": v, "train": 0.0} for v in of_arm] for arm, of_arm in values.items()})
    assert found.chance.intervals == 6  # road and the mean, of three pairs
    assert with_commonest(found, 0.01).chance.intervals == 2
    one = made_up({arm: [{"road": v} for v in of_arm[:1]] for arm, of_arm in values.items()})
    assert one.chance.intervals == 0 and "By chance" not in render(one) + str(one)
    assert one.limits() == []


def test_one_teacher_and_seeds_added_later_are_told_as_limits(three_seeds: Comparison) -> None:
    run = {"arm": "fine + auto", "run": "run", "policy": "", "teacher": "best.pt", "teacher_sha256": "ab"}
    found = replace(three_seeds, setting={**three_seeds.setting, "runs": [run], "looks": [2, 3]})
    teacher, seeds = found.limits()
    assert teacher.startswith(
        "The automatic labels of fine + auto come from 1 teacher. Trained again, a teacher labels"
    )
    assert seeds.startswith("Verdicts in this folder were looked at with 2 and 3 seeds. Whoever adds seeds until")
    assert three_seeds.limits() == [] and found.record()["limits"] == [teacher, seeds]
    assert f"{teacher} {seeds}" in render(found) and f"note: {seeds}" in found.lines()


def test_a_class_that_never_occurs_has_no_number_anywhere(three_seeds: Comparison) -> None:
    record = json.loads(json.dumps(three_seeds.record(), allow_nan=False))
    assert record["summary"]["fine"]["train"] == {"mean": None, "half": None}
    assert [d["verdict"] for d in record["differences"] if d["name"] == "train"] == ["undecided"] * 3
    assert "nan" not in re.sub(r"<style>.*</style>", "", render(three_seeds), flags=re.DOTALL).lower()


def test_the_cost_of_an_arm_is_its_images_divided_by_its_speed(three_seeds: Comparison) -> None:
    """Three trainings of 4 steps of 8 images at 16 a second: 2 s each."""
    assert three_seeds.cost("fine") == (16.0, 6.0)
    assert three_seeds.record()["seconds"] == 18.0


# --- a real comparison ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def auto(teacher: Path, city: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that labelled the coarse images."""
    out = tmp_path_factory.mktemp("run")
    generate(
        LabelJob(
            city / "coarse.parquet",
            teacher,
            out,
            scales=(0.5, 1),
            policy=Policy(threshold=0.2),
        )
    )
    return out


def both(city: Path, auto: Path, coarse: str = "coarse.parquet") -> dict[str, Path]:
    """The arms coarse and auto."""
    return {"coarse": city / coarse, "auto": auto}


@pytest.fixture(scope="module")
def template(city: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """Two steps. The fine samples weigh 2 each, as they may after `manifest fuse --weight`."""
    folder = tmp_path_factory.mktemp("compare")
    fine = load_manifest(city / "fine.parquet")
    heavy = tuple(replace(s, weight=2.0) for s in fine.samples)
    save_manifest(folder / "heavy.parquet", replace(fine, samples=heavy))
    job = TrainJob(folder / "heavy.parquet", city / "val.parquet", folder / "out", steps=2, batch_size=2, crop=(64, 64))
    return replace(job, device="cpu", precision="float32")


@pytest.fixture(scope="module")
def comparison(city: Path, auto: Path, template: TrainJob) -> tuple[Comparison, list[tuple[str, int, int]]]:
    steps: list[tuple[str, int, int]] = []

    def note(now: ArmProgress) -> None:
        if now.step:  # else labels are read
            steps.append((now.arm, now.seed, now.step))
            assert (now.done, now.total) == (len(steps), 12)

    return compare(template.manifest, both(city, auto), template=template, seeds=(0, 1), on_progress=note), steps


def test_three_arms_are_trained_alike_with_every_seed(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    result, steps = comparison
    assert steps == [(arm, seed, step) for seed in (0, 1) for arm in ARMS for step in (1, 2)]
    assert {arm: [s.images for s in found] for arm, found in result.scores.items()} == {arm: [3, 3] for arm in ARMS}
    slugs = ("fine", "fine-coarse", "fine-auto")
    folders = {f"{slug}-seed{seed}" for slug in slugs for seed in (0, 1)}
    files = {"compare.json", "index.html", *(f"{slug}.parquet" for slug in slugs)}
    assert {p.name for p in template.out.iterdir()} == folders | files
    asked = {name: json.loads((template.out / name / "train.json").read_text()) for name in folders}
    for slug, images in zip(slugs, (6, 16, 16), strict=True):
        for seed in (0, 1):
            job = asked[f"{slug}-seed{seed}"]
            assert (job["manifest"], job["images"], job["seed"]) == (
                str(template.out / f"{slug}.parquet"),
                images,
                seed,
            )
    alike = [{k: v for k, v in job.items() if k not in ("manifest", "images", "seed")} for job in asked.values()]
    assert alike == [alike[0]] * 6


def test_the_record_holds_what_was_measured(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    record = json.loads((template.out / "compare.json").read_text())
    assert (record["seeds"], record["steps"], record["arch"]) == ([0, 1], 2, "hrnet18s_ocr_mscale")
    assert {arm: [Scores(**s) for s in found] for arm, found in record["arms"].items()} == comparison[0].scores


@pytest.mark.parametrize(("slug", "source"), [("fine-coarse", "coarse"), ("fine-auto", "auto")])
def test_half_of_the_draws_are_fine_samples(
    slug: str, source: str, comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    """Six fine samples at weight 2, ten others at 1.2: eight and eight of the sixteen draws of an epoch."""
    manifest = load_manifest(template.out / f"{slug}.parquet")
    assert Counter(s.source for s in manifest.samples) == {"fine": 6, source: 10}
    assert {s.source: round(s.weight, 6) for s in manifest.samples} == {"fine": 2.0, source: 1.2}
    kinds = {s.sample_id: s.source for s in manifest.samples}
    draws = Draws(manifest.labelled, manifest.label_space, seed=0, length=64)
    taken = TrainingCrops(ManifestDataset(manifest), draws, augmentation=Augmentation((32, 32)))
    for epoch in range(4):
        drawn = Counter(kinds[taken[epoch * 16 + n]["sample_id"]] for n in range(16))
        assert {7, 8, 9} >= set(drawn.values())


def test_the_share_of_what_an_arm_adds_can_be_asked_for(
    city: Path, auto: Path, template: TrainJob, tmp_path: Path
) -> None:
    """Six fine samples at weight 2 are a quarter of the draws, ten others at 3.6 are the rest."""
    job = replace(template, out=tmp_path, steps=1)
    found = compare(template.manifest, both(city, auto), template=job, seeds=(0,), added_share=0.75)
    for arm, source in (("fine + coarse", "coarse"), ("fine + auto", "auto")):
        manifest = load_manifest(tmp_path / f"{arm.replace(' + ', '-')}.parquet")
        assert {s.source: round(s.weight, 6) for s in manifest.samples} == {"fine": 2.0, source: 3.6}
    assert json.loads((tmp_path / "compare.json").read_text())["added_share"] == found.setting["added_share"] == 0.75
    assert "75.0 % of the draws are of the labels that the arm adds" in (tmp_path / "index.html").read_text()
    with pytest.raises(ValueError, match=r"other samples, labels or shares .*fine-coarse.parquet"):
        compare(template.manifest, both(city, auto), template=job, seeds=(0,), added_share=0.5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 83.0, math.nan])
def test_a_share_that_leaves_nothing_to_compare_is_refused(
    share: float, city: Path, auto: Path, template: TrainJob, tmp_path: Path
) -> None:
    job = replace(template, out=tmp_path / "out")
    with pytest.raises(ValueError, match=rf"added-share {share:g}: expected a number between 0 and 1"):
        compare(template.manifest, both(city, auto), template=job, seeds=(0,), added_share=share)
    assert not job.out.exists()


def test_the_second_and_third_arm_see_the_same_pictures_with_other_labels(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    coarse, auto = (ManifestDataset(template.out / f"{slug}.parquet") for slug in ("fine-coarse", "fine-auto"))
    assert [s.image for s in coarse.samples] == [s.image for s in auto.samples]
    different = [not torch.equal(a["label"], b["label"]) for a, b in zip(coarse, auto, strict=True)]
    assert different == [False] * 6 + [True] * 10


def test_a_finished_student_is_not_trained_again(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob
) -> None:
    record = (template.out / "compare.json").read_bytes()
    steps: list[str] = []
    again = compare(
        template.manifest,
        both(city, auto),
        template=template,
        seeds=(0, 1),
        on_progress=lambda now: steps.append(now.note),
    )
    assert again == comparison[0]
    assert steps == []
    assert (template.out / "compare.json").read_bytes() == record


def test_a_comparison_remembers_with_how_many_seeds_it_was_looked_at(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob
) -> None:
    path = template.out / "compare.json"
    record = json.loads(path.read_text())
    assert record["looks"] == [2]
    path.write_text(json.dumps({**record, "looks": [3]}))
    assert again(template, city, auto).setting["looks"] == [2, 3]
    path.write_text(json.dumps({**record, "looks": "three"}))
    assert again(template, city, auto) == comparison[0] and json.loads(path.read_text()) == record


@pytest.mark.parametrize(
    ("coarse", "auto", "named"),
    [
        pytest.param("val.parquet", "coarse.parquet", "val.parquet", id="coarse manifest without coarse labels"),
        pytest.param(
            "coarse.parquet", "coarse.parquet", "coarse.parquet", id="coarse labels where automatic ones belong"
        ),
    ],
)
def test_an_arm_without_labels_of_its_kind_is_refused(
    coarse: str, auto: str, named: str, city: Path, template: TrainJob, tmp_path: Path
) -> None:
    """Else an arm would quietly repeat another one, and the table would say that the labels add nothing."""
    job = replace(template, out=tmp_path, steps=1)
    with pytest.raises(ValueError, match=re.escape(str(city / named))):
        compare(city / "fine.parquet", both(city, city / auto, coarse), template=job, seeds=(0,))


def test_compare_json_holds_what_the_curves_hold(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    record = json.loads((template.out / "compare.json").read_text())
    for arm, slug in zip(ARMS, ("fine", "fine-coarse", "fine-auto"), strict=True):
        for seed in (0, 1):
            curve = read_metrics(template.out / f"{slug}-seed{seed}")
            assert record["curves"][arm][seed] == [[row.step, row.loss, row.miou] for row in curve]
            assert record["arms"][arm][seed]["miou"] == pytest.approx(curve[-1].miou, abs=1e-3)  # of the last step
    (run,) = record["runs"]
    assert run["arm"] == "fine + auto" and run["teacher"].endswith("best.pt") and record["notes"] == []


def again(template: TrainJob, city: Path, auto: Path, **more: Path) -> Comparison:
    """The same comparison, of fine labels that weigh 2, with further arms."""
    return compare(template.manifest, both(city, auto) | more, template=template, seeds=(0, 1))


def test_the_last_step_counts_even_where_an_earlier_one_was_better(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], template: TrainJob
) -> None:
    """Its scores are those of the training's last validation: nothing is scored again."""
    for arm, slug in (("fine", "fine"), ("fine + coarse", "fine-coarse"), ("fine + auto", "fine-auto")):
        for seed, scores in enumerate(comparison[0].scores[arm]):
            folder = template.out / f"{slug}-seed{seed}"
            *_, last = read_metrics(folder)
            assert last.miou == pytest.approx(scores.miou, abs=1e-6)
            assert last_scores(replace(template, out=folder)) == scores == Scores.read(folder / "last_scores.json")


def test_the_compare_command_prints_a_finished_comparison_without_training(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob
) -> None:
    record = (template.out / "compare.json").read_bytes()
    found = autolabel(
        "compare", "--fine", template.manifest, "--coarse", city / "coarse.parquet", "--auto", auto,
        "--val", city / "val.parquet", "--out", template.out, "--seeds", 2, "--steps", 2, "--batch-size", 2,
        "--crop", "64x64", "--precision", "float32", "--device", "cpu",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert (template.out / "compare.json").read_bytes() == record
    result = comparison[0]
    assert found.stdout.startswith(f"{result.lines()[0]}\n")
    mean = result.estimate("fine")
    assert mean.mean is not None and mean.half is not None
    assert f"{100 * mean.mean:.1f} ± {100 * mean.half:.1f}" in found.stdout
    assert all(text in found.stdout for text in ("against fine + coarse", "images/s", "index.html"))


def test_a_further_arm_trains_beside_the_finished_ones(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Eight of the ten automatic labels, fused with the fine ones by someone: only what is not fine is taken."""
    fine, run = load_manifest(city / "fine.parquet"), load_manifest(auto / "manifest.parquet")
    save_manifest(tmp_path / "eight.parquet", replace(run, samples=run.samples[:8]))
    fused = autolabel(
        "manifest", "fuse", city / "fine.parquet", tmp_path / "eight.parquet", "-o", tmp_path / "fused.parquet"
    )
    assert fused.exit_code == 0, fused.output
    found = again(template, city, auto, eight=tmp_path / "fused.parquet")
    assert found.arms == (*ARMS, "fine + eight") and found.baselines("fine + eight") == ("fine + coarse", "fine")
    assert {arm: found.scores[arm] for arm in ARMS} == comparison[0].scores
    samples = load_manifest(template.out / "fine-eight.parquet").samples
    assert Counter((s.source, round(s.weight, 6)) for s in samples) == {("fine", 2.0): 6, ("auto", 1.5): 8}
    assert len(fine.samples) == 6
    assert found.notes == (
        "fine + eight holds other images than fine + coarse (0 more, 2 fewer, 8 the same): a difference may come from"
        " the images, not from their labels.",
    )
    assert "2 fewer" in (template.out / "index.html").read_text()
    assert again(template, city, auto) == comparison[0]  # and leaves the folder as others know it


def test_a_teacher_that_has_seen_validation_images_is_refused(
    teacher: Path, city: Path, auto: Path, template: TrainJob, tmp_path: Path
) -> None:
    job = replace(template, val=city / "fine.parquet", out=tmp_path)
    first = load_manifest(city / "fine.parquet").samples[0].sample_id
    with pytest.raises(
        ValueError, match=rf"was trained on 6 of the 6 validation images .*{first!r}.*validate on others"
    ):
        compare(city / "val.parquet", both(city, auto), template=job, seeds=(0,))
    asked = (
        "compare", "--fine", city / "val.parquet", "--coarse", city / "coarse.parquet", "--auto", auto,
        "--val", city / "fine.parquet", "--out", tmp_path / "out",
    )  # fmt: skip
    refused = autolabel(*asked)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert refused.stderr.startswith(f"autolabel: fine + auto: the teacher {teacher} of {auto} was trained on 6")
    fixed = load_manifest(auto / "manifest.parquet")  # the teacher's word in most pixels, and none of its run's labels
    fixed = replace(
        fixed,
        samples=tuple(replace(s, source="corrected", run=None) for s in fixed.samples),
        provenance={"corrects": [str(auto)]},
    )
    save_manifest(tmp_path / "fixed.parquet", fixed)
    with pytest.raises(ValueError, match=r"^fine \+ fixed: the teacher .* was trained on 6 of the 6 validation images"):
        compare(city / "val.parquet", {"fixed": tmp_path / "fixed.parquet"}, template=job, seeds=(0,))
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_gone_another_or_unknown_gives_a_note_and_a_damaged_run_is_refused(
    city: Path, auto: Path, tmp_path: Path
) -> None:
    shutil.copytree(auto, tmp_path / "run")
    run, shipped = Run.open(tmp_path / "run"), TeacherName.of(DRAWN_STREETS)

    def notes() -> list[str]:
        (about,), found = _teachers([("fine + mine", run.path)], city / "val.parquet")
        assert (about["arm"], about["run"]) == ("fine + mine", str(run.path))
        return found

    assert notes() == []
    unknown = "so nobody can tell whether it has seen validation images."
    replace(run, teacher=TeacherName.of("gone.pt")).save()
    assert notes() == [f"fine + mine: the teacher gone.pt is gone, {unknown}"]
    replace(run, teacher=shipped).save()
    assert notes() == [f"fine + mine: {shipped} is no longer the teacher that labelled {run.path}, {unknown}"]
    replace(run, teacher=None).save()
    assert notes() == [f"fine + mine: no teacher is known of the labels of {run.path}, {unknown}"]
    gone = tmp_path / "gone"
    assert _teachers([("fine + mine", gone)], city / "val.parquet", {gone}) == ([], [
        f"fine + mine: the run {gone}, whose labels were corrected, is gone, so nobody can tell whether its teacher has"
        " seen validation images."
    ])  # fmt: skip
    record = tmp_path / "run" / "run.json"
    record.write_bytes(record.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"run\.json is no JSON, or cut off: .*; restore it"):
        notes()


def test_trainings_on_other_labels_are_not_taken_for_these(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Same images, same names, another run: the finished trainings know nothing of its labels."""
    run = load_manifest(auto / "manifest.parquet")
    save_manifest(tmp_path / "other.parquet", replace(run, samples=run.samples[::-1]))
    with pytest.raises(
        ValueError, match=r"holds trainings on other samples, labels or shares .*fine-auto.parquet.*--out"
    ):
        again(template, city, tmp_path / "other.parquet")


@pytest.mark.parametrize("text", ["clean", "=x.parquet", "clean="])
def test_an_arm_without_name_or_path_is_refused(text: str, city: Path, tmp_path: Path) -> None:
    asked = ("compare", "--fine", "f", "--coarse", "c", "--auto", "r", "--val", "v", "--out", tmp_path, "--arm", text)
    refused = autolabel(*asked)
    assert refused.exit_code == 2 and refused.stderr.startswith(f"autolabel: --arm {text}: expected NAME=")


def test_arms_come_in_the_order_in_which_they_are_compared() -> None:
    """The first one is the baseline of all that follow."""
    coarse, auto, mine = (Path(name) for name in ("c.parquet", "runs/auto", "runs/mine"))
    assert list(all_arms(coarse, auto, {"mine": mine}).items()) == [("coarse", coarse), ("auto", auto), ("mine", mine)]
    assert all_arms(None, None, {"auto": auto}) == all_arms(None, auto, {}) == {"auto": auto}


def test_names_that_stand_twice_or_are_no_file_names_are_refused() -> None:
    for name in ("fine", "../up", ""):
        with pytest.raises(ValueError, match=re.escape(f"arm {name!r}: expected a name of letters")):
            all_arms(None, None, {name: Path("x")})
    with pytest.raises(ValueError, match=r"^arm 'auto' is given twice, as a and b: give every arm a name of its own"):
        all_arms(None, Path("a"), {"auto": Path("b")})


def test_an_arm_that_cannot_be_used_is_refused_before_any_training(city: Path, tmp_path: Path) -> None:
    fine, coarse = load_manifest(city / "fine.parquet"), load_manifest(city / "coarse.parquet")
    space = replace(fine.label_space, classes=fine.label_space.classes[:-1])
    save_manifest(tmp_path / "other.parquet", replace(coarse, label_space=space))
    unlabelled = tuple(replace(s, source="none", label=None) for s in coarse.samples)
    save_manifest(tmp_path / "none.parquet", replace(coarse, samples=unlabelled))
    for name in ("photographs", "begun"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    asked = ["compare", "--fine", city / "fine.parquet", "--val", city / "val.parquet", "--out", tmp_path / "out"]
    for place, expected in {
        "": "nothing to compare with the fine labels: give --arm NAME=RUN, --auto RUN or --coarse MANIFEST",
        "photographs": "is a folder without run.json: expected a run, or a manifest",
        "begun": "is not finished: `autolabel generate` with the same --out first",
        "missing.parquet": "does not exist",
        "other.parquet": "label space",
        "none.parquet": "has no labelled samples beside the fine ones: this arm would only repeat the first",
    }.items():
        refused = autolabel(*asked, *(("--arm", f"mine={tmp_path / place}") if place else ()))
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert expected in refused.stderr and str(tmp_path / place if place else "") in refused.stderr
        assert not (tmp_path / "out").exists()


def test_an_arm_of_corrected_labels_keeps_its_weights_and_gives_way_to_fine_labels_of_the_same_images(
    city: Path, tmp_path: Path
) -> None:
    fine, coarse = load_manifest(city / "fine.parquet"), load_manifest(city / "coarse.parquet")
    auto = tuple(replace(s, source="auto") for s in coarse.samples[:6])
    corrected = tuple(replace(s, source="corrected", weight=4.0) for s in coarse.samples[6:])
    again = tuple(replace(s, source="corrected", label=coarse.samples[0].label) for s in fine.samples[:2])
    fused = Manifest.of(fine.label_space, (*fine.samples, *auto, *corrected))
    save_manifest(tmp_path / "fused.parquet", fused)
    arm, notes = joined_arm(fine, "fixed", tmp_path / "fused.parquet", 0.5)
    weights = Counter((s.source, s.weight) for s in arm.samples)
    assert weights == {("fine", 1.0): 6, ("auto", 6 / 22): 6, ("corrected", 24 / 22): 4} and notes == []

    save_manifest(tmp_path / "again.parquet", replace(fused, samples=(*auto, *again)))
    arm, notes = joined_arm(fine, "again", tmp_path / "again.parquet", 0.5)
    assert Counter((s.source, s.weight) for s in arm.samples) == {("fine", 1.0): 6, ("auto", 1.0): 6}
    (note,) = notes
    assert note.startswith(
        "fine + again: 2 fine labels stand before corrected labels of the same images; people differ"
    )

    for samples in (again, tuple(replace(s, weight=0.0) for s in auto)):
        save_manifest(tmp_path / "nothing.parquet", replace(fused, samples=samples))
        with pytest.raises(
            ValueError, match=r"nothing\.parquet adds no label to the fine ones: their images are the same"
        ):
            joined_arm(fine, "nothing", tmp_path / "nothing.parquet", 0.5)


def test_two_arms_of_runs_alone_are_compared_without_coarse_labels(
    comparison: tuple[Comparison, list[tuple[str, int, int]]], city: Path, auto: Path, template: TrainJob
) -> None:
    """In the folder of the other comparison, so that two of the three arms are trained already."""
    arms = {"auto": auto, "mine": auto}
    found = compare(template.manifest, arms, template=template, seeds=(0, 1))
    assert found.arms == ("fine", "fine + auto", "fine + mine") and found.notes == ()
    assert found.baselines("fine + mine") == ("fine + auto", "fine") and found.baselines("fine + auto") == ("fine",)
    assert found.scores["fine + auto"] == found.scores["fine + mine"] == comparison[0].scores["fine + auto"]
    assert {d.mean for d in found.differences() if d.baseline == "fine + auto"} <= {0.0, None}
    record = json.loads((template.out / "compare.json").read_text())
    assert list(record["manifests"]) == ["fine", "fine + auto", "fine + mine"] and "coarse" not in str(record["arms"])
    assert ">fine + coarse<" not in (template.out / "index.html").read_text()
    asked = (
        "compare", "--fine", template.manifest, "--arm", f"auto={auto}", "--val", city / "val.parquet", "--out",
        template.out, "--seeds", 2, "--steps", 2, "--batch-size", 2, "--crop", "64x64", "--precision", "float32",
        "--device", "cpu",
    )  # fmt: skip
    alone = autolabel(*asked)
    assert alone.exit_code == 0, alone.output
    assert "fine + auto against fine: points" in alone.stdout and "coarse" not in alone.stdout
    assert again(template, city, auto) == comparison[0]  # and leaves the folder as others know it


# --- the page ---------------------------------------------------------------------------------------------------------


def test_one_wild_class_gets_an_arrow_and_leaves_the_axis_to_the_others() -> None:
    steady = {name: (0.50, 0.51, 0.52) for name in ("road", "sky", "car", "tree", "sign", "fence")}
    own = {name: (0.52, 0.53, 0.54) for name in steady} | {"pole": (0.1, 0.9, 0.8)}
    base = {**steady, "pole": (0.8, 0.1, 0.1)}
    found = made_up(
        {
            arm: [{name: values[seed] for name, values in of_arm.items()} for seed in range(3)]
            for arm, of_arm in {"fine": base, "fine + auto": own}.items()
        }
    )
    wild = found.difference("fine + auto", "fine", "pole")
    assert wild.mean == pytest.approx(0.2667, abs=1e-4) and wild.half is not None and wild.half > 1
    (part,) = page_of(found).verdicts
    assert part.plot.ticks[-1][0] <= 0.2  # points of the others: 2
    (lane,) = (place for _, place in part.plot.lanes["pole"])
    assert lane == Interval(100, 0, 100, off="right", cut_left=True, cut_right=True)
    (lane,) = (place for _, place in part.plot.lanes["road"])
    assert lane is not None and not lane.off and not lane.cut_left and not lane.cut_right and 50 < lane.dot < 100
    text = render(found)
    assert text.count('<i class="off right"') == 1 and "-0.0" not in text and "\N{MINUS SIGN}0.0" not in text


def test_no_interval_is_drawn_beyond_what_an_iou_can_be(three_seeds: Comparison) -> None:
    lanes = page_of(three_seeds).scores.lanes["road"]  # fine: 0.5 ± 0.745, on an axis that ends at 1 at most
    place = next(place for arm, place in lanes if arm.name == "fine")
    assert place is not None and place.left == 0 and place.left + place.width <= 100 and not place.cut_left


def test_the_title_says_what_is_compared_and_the_page_names_no_folder(three_seeds: Comparison, tmp_path: Path) -> None:
    runs = [{"arm": "fine + auto", "run": f"{tmp_path}/runs/auto", "policy": "paper", "teacher": f"{tmp_path}/net.pt",
             "teacher_sha256": "0" * 64}]  # fmt: skip
    setting = {**three_seeds.setting, "val": f"{tmp_path}/val.parquet", "runs": runs,
               "manifests": {arm: f"{tmp_path}/{arm}.parquet" for arm in three_seeds.arms}}  # fmt: skip
    text = render(replace(three_seeds, setting=setting, notes=(f"{tmp_path}/net.pt does not exist",)))
    assert "<h1>fine + coarse and fine + auto against fine</h1>" in text
    assert str(tmp_path) not in text and ">net.pt does not exist<" in text and "<dd>val.parquet, " in text


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["three seeds", "one seed", "six arms, long names"])
def test_the_page_works_in_a_browser(three_seeds: Comparison, kind: str, tmp_path: Path) -> None:
    """From disk, without script or network, on a phone and on a desk, light and dark, every text readable."""
    from browser import CHROMIUM, FAINT, playwright

    if CHROMIUM is None:
        pytest.skip("needs Chromium on the PATH")
    found = three_seeds
    if kind == "one seed":
        found = made_up({arm: [found.scores[arm][0].iou] for arm in found.arms})
    elif kind == "six arms, long names":
        more = {f"fine + {'automatic-' * 4}{k}": [s.iou for s in found.scores["fine + auto"]] for k in range(3)}
        found = made_up({**{arm: [s.iou for s in found.scores[arm]] for arm in found.arms}, **more})
    (tmp_path / "index.html").write_text(render(found), encoding="utf-8")
    complaints: list[str] = []
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        for width in (400, 1400):
            for scheme in ("light", "dark"):
                size = {"width": width, "height": 900}
                page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
                page.on("console", lambda message: complaints.append(message.text))
                page.on("pageerror", lambda error: complaints.append(str(error)))
                page.on("request", lambda r: None if r.url.startswith("file:") else complaints.append(r.url))
                page.goto((tmp_path / "index.html").as_uri())
                assert page.evaluate("document.documentElement.scrollWidth") == width
                assert page.evaluate(FAINT) == []
                assert page.locator("script").count() == 0
                assert page.locator("#notes li").all_text_contents() == ["a note <to> read"]
                for part in page.locator(".card").all():  # nothing sticks out of its card
                    assert part.evaluate("card => card.scrollWidth <= card.clientWidth"), part.inner_text()
        lines = page.locator("#curves .line[d*=' ']").count()
        browser.close()
    assert complaints == []
    assert lines >= 2 * len(found.seeds) * len(found.arms)
