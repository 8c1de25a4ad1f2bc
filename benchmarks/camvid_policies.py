"""What each policy's labels are worth on CamVid: 305 coarsely labelled images against their fine labels.

    python benchmarks/camvid.py CAMVID OUT          # or a teacher from elsewhere: --teacher
    python benchmarks/camvid_policies.py OUT [--smallest]

The teacher was trained on the 62 other images. It labels the 305 once, with its confidence kept; every policy relabels
that run, and the result is held against the fine labels, which nobody has used. Thresholds by class come from
`autolabel audit` of the 101 validation images, at a target precision of 0.9. The numbers are those of `audit`
(docs/audit.md), which would run the teacher again for each policy. A dash: the class is nowhere in these labels.
With --smallest, of an OUT that was made so, three policies are tried and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from autolabel import cli
from autolabel.manifests.policy import HUMAN_FIRST
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.labels import read_sample_label
from autolabel.manifests.samples import load_manifest
from autolabel.manifests.scores import BoundaryF, Confusion

LEVELS = 24
POLICIES = {
    "paper": "threshold = 0.5",
    "0.9": "threshold = 0.9",
    "union of thin and rare": "\n".join(
        ["[coarse_rules]", *(f'{c} = "union"' for c in ("pole", "sign", "fence", "pedestrian", "bicyclist"))]
    ),
    "thresholds by class": "",  # suggested by the audit of the validation images
    "agree": 'coarse = "agree"',
    "teacher-wins": 'coarse = "teacher-wins"',
    "human-first, 0.3": 'coarse = "human-wins"\nthreshold = 0.3',
    "human-first, 0.5": 'coarse = "human-wins"',
    "human-first": HUMAN_FIRST.to_toml(),
}
SMALLEST = ("paper", "thresholds by class", "human-first")


def autolabel(command: str) -> None:
    """Print a command and run it in this process; stop if it fails."""
    print(f"$ autolabel {command}", flush=True)
    try:
        cli.main(shlex.split(command), prog_name="autolabel")
    except SystemExit as end:
        if end.code:
            raise


def scores(run: Path, truth: Path) -> dict[str, NDArray[np.float64]]:
    """By class (C,): precision, coverage, IoU of the kept pixels, IoU where an ignored pixel is a miss, boundary F."""
    manifest, labels = load_manifest(truth), Run.open(run).labels
    classes = len(manifest.label_space)
    confusion, borders = Confusion(classes), BoundaryF(classes, (2,))
    for sample in manifest.labelled:
        true = read_sample_label(sample, manifest.label_space)
        confusion.add(true, labels[sample.sample_id])
        borders.add(true, labels[sample.sample_id])
    return {
        "precision": confusion.precision(),
        "coverage": confusion.recall(),
        "IoU kept": confusion.iou_of_kept(),
        "IoU": confusion.iou(),
        "F 2 px": borders.f()[0],
        "all pixels": np.array(
            [np.trace(confusion.matrix[:, :-1]), confusion.matrix[:, :-1].sum(), confusion.matrix.sum()]
        ),
    }


def main() -> None:
    """Parse the arguments, label, relabel, audit, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("teacher/best.pt"))
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    policies = POLICIES
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        policies = {name: POLICIES[name] for name in SMALLEST}
    os.chdir(asked.out)
    label = f"generate --teacher {asked.teacher} --precision {asked.precision}"
    for name in ("coarse", "val"):
        autolabel(f"{label} {name}.parquet --out runs/kept-{name} --keep-confidence {LEVELS}")
    autolabel("audit runs/kept-val --truth val.parquet --target-precision 0.9")
    found = {}
    for name, text in policies.items():
        slug = name.replace(" ", "-").replace(",", "")
        file, run = Path(f"policies/{slug}.toml"), Path(f"policies/{slug}")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text or Path("runs/kept-val/suggested.toml").read_text(encoding="utf-8"), encoding="utf-8")
        autolabel(f"relabel runs/kept-coarse --policy {file} --out {run}")
        found[name] = scores(run, Path("truth.parquet"))
    show(found)


def show(found: dict[str, dict[str, NDArray[np.float64]]]) -> None:
    """Print means over classes, then IoU and coverage of every class."""
    means = [key for key in found["paper"] if key != "all pixels"]
    print(f"\n{'means over classes, %':<24}" + "".join(f"{key:>11}" for key in means) + "   labelled   of it right")
    for name, by_class in found.items():
        right, labelled, known = by_class["all pixels"]
        row = "".join(f"{100 * np.nanmean(by_class[key]):>11.1f}" for key in means)
        print(f"{name:<24}{row}{100 * labelled / known:>11.1f}{100 * right / labelled:>14.1f}")
    for key in ("IoU kept", "precision", "coverage"):
        print(
            f"\n{key + ', %':<24}" + "".join(f"{c[:10]:>11}" for c in load_manifest("truth.parquet").label_space.names)
        )
        for name, by_class in found.items():
            print(f"{name:<24}" + "".join(f"{100 * share:>11.1f}".replace("nan", "  –") for share in by_class[key]))


if __name__ == "__main__":
    main()
