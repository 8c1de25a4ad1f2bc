"""The paper's question, answered on your data: what do automatic labels add?

Three students, alike in everything but their labels (arXiv 2005.10821, section 3.3 and table 6): fine labels only; fine
and coarse; fine and automatic labels of the same coarse images. Same network, steps, seeds and validation images. In
the second and third arm half of the draws are fine samples, as in the reference's recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from autolabel.manifests.files import write_json
from autolabel.manifests.tables import Manifest, fuse, load_manifest, save_manifest
from autolabel.student.evaluate import Scores
from autolabel.student.train import StepReport, TrainJob, train

ARMS = ("fine", "fine + coarse", "fine + auto")
OnArm = Callable[[str, int, StepReport], None]  # arm, seed, report


@dataclass(frozen=True)
class Comparison:
    """Scores by arm, one for each seed, in the order of the seeds."""

    seeds: tuple[int, ...]
    scores: dict[str, list[Scores]]

    def mean_iou(self, arm: str, name: str | None = None) -> tuple[float, float]:
        """Mean and deviation over the seeds of an arm's mIoU, or of one class's IoU (NaN if it never occurs)."""
        values = [s.miou if name is None else s.iou[name] for s in self.scores[arm]]
        numbers = np.array([np.nan if v is None else v for v in values], np.float64)
        return float(numbers.mean()), float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0


def _half_and_half(fine: Manifest, other_name: Path, other: Manifest, source: str) -> Manifest:
    """Fine samples and the others of one source, weighted so that each kind gives half of the draws."""
    chosen = tuple(s for s in other.labelled if s.source == source)
    if not chosen:
        raise ValueError(f"{other_name} has no samples with {source} labels: this arm would only repeat the first")
    weight = sum(s.weight for s in fine.labelled) / len(chosen)
    parts = [("the fine manifest", fine), (str(other_name), replace(other, samples=chosen))]
    return fuse(parts, {source: weight}, leak_check=None)


def compare(
    fine: Path,
    coarse: Path,
    auto: Path,
    template: TrainJob,
    seeds: Sequence[int],
    on_step: OnArm | None = None,
) -> Comparison:
    """Train and score every arm with every seed, under `template.out`; what is finished there is not done again.

    `auto` is the manifest of a run. `template` gives validation manifest, network, steps and batch size.
    Raises ValueError.
    """
    fine_manifest, coarse_manifest, auto_manifest = (load_manifest(path) for path in (fine, coarse, auto))
    arms = {
        ARMS[0]: fine_manifest,
        ARMS[1]: _half_and_half(fine_manifest, coarse, coarse_manifest, "coarse"),
        ARMS[2]: _half_and_half(fine_manifest, auto, auto_manifest, "auto"),
    }
    scores: dict[str, list[Scores]] = {arm: [] for arm in ARMS}
    for arm, manifest in arms.items():
        slug = arm.replace(" + ", "-")
        path = template.out / f"{slug}.parquet"
        save_manifest(path, manifest)
        for seed in seeds:
            job = replace(template, manifest=path, out=template.out / f"{slug}-seed{seed}", seed=seed, validations=1)
            report = (lambda r, a=arm, s=seed: on_step(a, s, r)) if on_step else None
            scores[arm].append(train(job, report))
    comparison = Comparison(tuple(seeds), scores)
    write_json(
        template.out / "compare.json",
        {
            "seeds": list(seeds),
            "steps": template.steps,
            "arch": template.arch,
            "arms": {arm: [s.__dict__ for s in found] for arm, found in scores.items()},
        },
    )
    return comparison
