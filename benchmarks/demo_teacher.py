"""Train the small teacher that comes with the package, teacher/drawn_streets.safetensors, and say what it is worth.

python benchmarks/demo_teacher.py OUT [--steps N] [--scenes N] [--smallest]

Draws 1,500 street scenes and 50 to validate on, from a seed that the demo's users are not likely to name, and trains
the default network on them. A scene follows from its seed alone, and training in float32 from the data and the job, so
that another machine gets this teacher again but for rounding. Started again, it goes on. Half an hour of one core;
weights are rounded to float16 (`save_tensors`), fingerprints of the scenes travel along, so that an audit or a
validation on one of them is refused. With --smallest the teacher is worth nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from autolabel.manifests.samples import save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.scenes import write_city
from autolabel.student.evaluate import evaluate
from autolabel.student.job import TrainJob
from autolabel.student.train import train
from autolabel.teacher.checkpoints import read_checkpoint, save_tensors

SEED = 1_000_003


@dataclass(frozen=True)
class Extent:
    """How much is drawn and learnt: scenes to validate on, crops of a step, their size."""

    val: int = 50
    batch: int = 8
    crop: tuple[int, int] = (96, 128)


SMALLEST = Extent(1, 2, (32, 64))


def main() -> None:
    """Draw, train, write, score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--scenes", type=int, default=1500)
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    extent, steps, scenes = Extent(), asked.steps, asked.scenes
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent, steps, scenes = SMALLEST, 2, 2
    out, shipped = asked.out, asked.out / "drawn_streets.safetensors"
    if not (out / "val.parquet").exists():
        write_city(out / "city", SEED, fine=scenes, coarse=0, val=extent.val)
        for name, split in (("fine", "train"), ("val", "val")):
            save_manifest(out / f"{name}.parquet", scan(out / "city", layout="cityscapes", splits=[split])[0])
    job = TrainJob(
        out / "fine.parquet", out / "val.parquet", out / "teacher", steps=steps, batch_size=extent.batch,
        crop=extent.crop, schedule="cosine", ema=0.995, precision="float32",
    )  # fmt: skip
    train(job, lambda step: print(f"step {step.step}  loss {step.loss:.3f}", end="\r", flush=True))
    save_tensors(shipped, read_checkpoint(out / "teacher" / "best.pt"))
    scores = evaluate(shipped, out / "val.parquet", scales=(0.5, 1.0, 2.0))
    print(f"\n{shipped}: {shipped.stat().st_size / 1e6:.1f} MB, mean IoU {100 * scores.miou:.1f}")


if __name__ == "__main__":
    main()
