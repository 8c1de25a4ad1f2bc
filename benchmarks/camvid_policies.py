"""What each policy's labels are worth on CamVid: 305 coarsely labelled images against their fine labels.

    python benchmarks/camvid.py CAMVID OUT          # or a teacher from elsewhere: --teacher
    python benchmarks/camvid_policies.py CAMVID OUT

The teacher was trained on the 62 other images. It labels the 305 once, with its confidence kept; every policy relabels
that run, and `autolabel audit` holds the result against the fine labels, which nobody has used. Thresholds by class
come from an audit of the 101 validation images, at a target precision of 0.9.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

LEVELS = 24
SHARES = ("precision", "coverage", "iou_kept", "iou")
POLICIES = {
    "paper": "threshold = 0.5",
    "0.9": "threshold = 0.9",
    "union of thin and rare": "\n".join(
        ["[coarse_rules]", *(f'{c} = "union"' for c in ("pole", "sign", "fence", "pedestrian", "bicyclist"))]
    ),
    "thresholds by class": "",  # suggested by the audit of the validation images
    "agree": 'coarse = "agree"',
    "teacher-wins": 'coarse = "teacher-wins"',
    "human-wins": 'coarse = "human-wins"',
    "human-wins, 0.3": 'coarse = "human-wins"\nthreshold = 0.3',
    "human-wins, 0.7": 'coarse = "human-wins"\nthreshold = 0.7',
}


def autolabel(command: str) -> None:
    """Print a command and run it; stop if it fails."""
    print(f"$ autolabel {command}", flush=True)
    subprocess.run([sys.executable, "-m", "autolabel.cli", *shlex.split(command)], check=True)


def main() -> None:
    """Parse the arguments, label, relabel, audit, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("teacher/best.pt"))
    parser.add_argument("--precision", default="auto")
    asked = parser.parse_args()
    camvid = asked.camvid.resolve()
    os.chdir(asked.out)
    space = "--label-space camvid"
    fine = f"--images coarse/images --labels {camvid}/fine/train {space}"
    autolabel(f"manifest scan folder {fine} -o truth.parquet")
    for name in ("coarse", "val"):
        autolabel(
            f"generate --manifest {name}.parquet --teacher {asked.teacher} --out runs/kept-{name}"
            f" --keep-confidence {LEVELS} --precision {asked.precision}"
        )
    autolabel("audit runs/kept-val --truth val.parquet --target-precision 0.9")
    found = {}
    for name, text in POLICIES.items():
        file, run = Path("policies") / f"{name.replace(' ', '-').replace(',', '')}.toml", Path("runs") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text or Path("runs/kept-val/suggested.toml").read_text(encoding="utf-8"), encoding="utf-8")
        autolabel(f"relabel runs/kept-coarse --policy {shlex.quote(str(file))} --out {shlex.quote(str(run))}")
        autolabel(f"audit {shlex.quote(str(run))} --truth truth.parquet")
        found[name] = json.loads((run / "audit.json").read_text(encoding="utf-8"))
    print(f"\n{'policy, means over classes in %':<34}" + "".join(f"{s:>11}" for s in SHARES) + "      F 2 px")
    for name, audit in found.items():
        mean = audit["mean"]
        shares = [mean[s] for s in SHARES] + [mean["boundary_f"]["2"]]
        print(f"{name:<34}" + "".join(f"{100 * share:>11.1f}" for share in shares))
    for share in ("iou_kept", "coverage"):
        classes = [c["name"] for c in found["paper"]["classes"]]
        print(f"\n{share + ' in %':<24}" + "".join(f"{c:>11}" for c in classes))
        for name, audit in found.items():
            row = "".join(f"{'–' if c[share] is None else f'{100 * c[share]:.1f}':>11}" for c in audit["classes"])
            print(f"{name:<24}{row}")


if __name__ == "__main__":
    main()
