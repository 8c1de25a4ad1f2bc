"""Label a folder with Ray Data: python ray_data.py TEACHER IMAGES OUT.

As its guides say: `read_images`, `map_batches` with a class that holds the network, a write at the end, and row ids
checkpointed, so that the same call goes on after a kill. The class writes OUT/NAME.png itself, because `write_images`
(Ray 2.60) makes up names that do not say which image a label is of.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from ray.data.checkpoint import CheckpointConfig

os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"  # for its workers


class Segment:
    """An actor with the network."""

    def __init__(self, teacher: Path, out: Path) -> None:
        from segmenters import segmenter

        self.segment, self.out = segmenter(teacher), out

    @torch.inference_mode()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Label a batch of one image."""
        for path, image in zip(batch["path"], batch["image"], strict=True):
            label, _ = self.segment(Image.fromarray(image))
            Image.fromarray(label).save(self.out / f"{Path(path).stem}.png")
        return {"path": batch["path"]}


def main(teacher: Path, images: Path, out: Path) -> None:
    """Label all images."""
    # One for the network's actor, one to read and write, and, in a second call, some for the actors that leave out what
    # is done: with two in all, a second call labelled nothing for half an hour.
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=4)
    out.mkdir(exist_ok=True)
    ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig("path", str(out / "checkpoint"))
    (
        ray.data.read_images(str(images), mode="RGB", include_paths=True)
        .map_batches(Segment, fn_constructor_args=(teacher, out), batch_size=1, concurrency=1, num_cpus=1)
        .write_parquet(str(out / "rows"))
    )


if __name__ == "__main__":
    main(*(Path(argument).absolute() for argument in sys.argv[1:4]))
