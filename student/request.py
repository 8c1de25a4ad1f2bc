"""A training job that can be done: its data, its start, and the crops of every step. Nothing is computed here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.documents import read_json
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.run.sample_labels import keeps_probability
from autolabel.manifests.samples import Manifest, fingerprints
from autolabel.manifests.schemas import AUTO
from autolabel.manifests.wording import Progress
from autolabel.student.data import Augmentation, ManifestDataset, TrainingCrops
from autolabel.student.job import LARGEST_CROP, TrainJob
from autolabel.student.noise import LabelNoise
from autolabel.student.sampling import Draws
from autolabel.student.trackers import require_packages
from autolabel.teacher.checkpoints import Checkpoint, fingerprint_tensor, load_network, overlap, read_checkpoint
from autolabel.teacher.networks.build import architecture, build
from autolabel.teacher.networks.decoders import SegmentationNet
from autolabel.teacher.start import Start, read_start

_NAMED_IMAGES = 8  # images of a batch that a message names


class TrainRequest:
    """A job and the data it needs, checked. Every process that trains gets a copy.

    recipe: the job's recipe with everything filled in that the job left open; train.json holds it. crops: the crops of
    all steps, or None for a training that is finished. `progress` is called with (done, total) while labels are read.
    Raises ValueError for a request that cannot be met, or that differs from the one in the folder.
    """

    def __init__(self, job: TrainJob, manifest: Manifest | None = None, *, progress: Progress | None = None) -> None:
        require_outside_runs(job.out)
        require_packages(job.log)
        self.job = job
        self.data, self.val = ManifestDataset(manifest or job.manifest), ManifestDataset(job.val)
        self.space = self.data.label_space
        if self.val.label_space != self.space:
            raise ValueError(f"{job.manifest} and {job.val} use different label spaces: train and validate in one")
        marks = fingerprints(self.data.samples)
        self.trained_on = fingerprint_tensor(marks)
        start = self._start()
        if start is not None and start.trained_on is not None:  # the result has seen what its start has seen
            self.trained_on = torch.unique(torch.cat([self.trained_on, start.trained_on]))
        self._require_batch_norm()
        self._require_epoch()
        self._require_held_out()
        self._require_probabilities()
        self.noise = LabelNoise.read(job.noise, self.space) if job.noise else None
        self.started_from = start and start.description
        self.recipe = job.recipe() | {
            # A choice that was left open is recorded as made: on another machine it could be another one.
            "crop": list(self._crop()),
            "learning_rate": job.peak,
            "weight_decay": job.decay,
            "noise": self.noise and self.noise.record(),
            "images": len(marks),
            "started_from": self.started_from,
        }
        self.last = job.out / "last.pt"
        unresolved = {name: value for name, value in self.recipe.items() if name != "precision"}  # known per device
        done = self.require_same(unresolved, self.read_last())
        self.crops = self._crops(progress) if done < job.steps else None

    def read_last(self) -> Checkpoint | None:
        """The checkpoint to go on from, or None for a training that has saved nothing."""
        return read_checkpoint(self.last) if storage.exists(self.last) else None

    def require_same(self, recipe: Mapping[str, Any], last: Checkpoint | None) -> int:
        """Return the number of steps done. Raises ValueError if the folder holds a training by another recipe."""
        state = (last and last.training) or {}
        path = self.job.out / "train.json"
        another = "choose another --out"
        written = read_json(path, dict[str, Any], advice=another) if storage.exists(path) else None
        before = state.get("recipe", {}) if written is None else written
        different = [
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in recipe.items()
            if before and before.get(name) != value
        ]
        if different:
            raise ValueError(f"{self.job.out} holds another training ({'; '.join(different)}): choose another --out")
        if last is not None and (last.trained_on is None or not torch.equal(last.trained_on, self.trained_on)):
            raise ValueError(
                f"{self.last} was trained on other images than {self.job.manifest} lists: choose another --out"
            )
        return int(state.get("step", 0))

    def network(self, last: Checkpoint | None) -> SegmentationNet:
        """The network with the weights of `last`, or else of the job's start, or else with random ones."""
        if last is not None:
            return load_network(self.last, last)
        start = self._start()
        network = build(self.job.arch, len(self.space), scales=start.scales if start else 3)
        if start is not None:
            network.load_state_dict(network.state_dict() | start.state_dict)
        return network

    def transition(self, device: torch.device) -> Tensor | None:
        """The probability (C, C) of every label given the true class, None for a job without noise."""
        return None if self.noise is None else torch.from_numpy(self.noise.transition()).to(device)

    def shown_at(self, step: int) -> str:
        """The sample ids of a step's batch, as text."""
        assert self.crops is not None
        draws = range(step * self.job.batch_size, (step + 1) * self.job.batch_size)
        ids = list(dict.fromkeys(self.data.samples[self.crops.draws[n].sample].sample_id for n in draws))
        more = len(ids) - _NAMED_IMAGES
        return ", ".join(ids[:_NAMED_IMAGES]) + (f" and {more} more" if more > 0 else "")

    def _start(self) -> Start | None:
        return read_start(self.job.init, self.job.arch, space=self.space) if self.job.init else None

    def _require_batch_norm(self) -> None:
        """Raise ValueError unless batch norm gets two values per channel, even at 1/32 of the half-size image.

        A decoder with ASPP pools the whole image into one value; there only a batch of two gives two.
        """
        height, width = self._crop()
        images = self.job.batch_size // self.job.accumulate
        if images < 2 and architecture(self.job.arch).pools:
            raise ValueError(f"{self.job.arch} pools the whole image: train it with a batch of 2 or more at once")
        values = images * math.ceil((height // 2) / 32) * math.ceil((width // 2) / 32)
        if values < 2:
            raise ValueError(
                f"crop {height}x{width} with a batch of one leaves batch norm a single value: give a side above 64"
                " pixels, or a larger batch"
            )

    def _require_epoch(self) -> None:
        """Raise ValueError for an epoch too small for its shares or its workers.

        Shares hold for whole epochs, and an epoch of two crops has no fifth. Without shares a small epoch is repeated.
        """
        size, epoch, workers = self.job.batch_size, len(self.data), self.job.machine.workers
        if self.job.auto_share is not None and epoch < size:
            raise ValueError(
                f"auto-share {self.job.auto_share:g}: an epoch of {epoch} crops is smaller than a batch of {size}; give"
                " more images, or a smaller batch"
            )
        if workers > epoch:
            raise ValueError(f"workers {workers}: {self.job.manifest} has {epoch} samples, give at most as many")

    def _require_held_out(self) -> None:
        """Raise ValueError if a validation image is trained on, by content."""
        shared = overlap(self.trained_on, fingerprints(self.val.samples))
        if shared:
            first = self.val.samples[shared[0]].sample_id
            raise ValueError(
                f"{len(shared)} validation images are also trained on (the first is {first!r}): the score would mean"
                " nothing; leave them out of one manifest"
            )

    def _require_probabilities(self) -> None:
        """Raise ValueError if pixels are to be weighed by probabilities that an automatic label does not have."""
        if not self.job.weights:
            return
        for sample in self.data.samples:
            if sample.source == AUTO and sample.run is None:
                raise ValueError(
                    f"weights: the automatic label of {sample.sample_id!r} in {self.job.manifest} belongs to no run, so"
                    " nobody knows its probability: leave out --weights"
                )
        for run in self.data.manifest.runs:
            if not keeps_probability(run):
                raise ValueError(
                    f"weights: the run {run} has not kept the probability of its labels: generate or relabel with"
                    " --keep-probability"
                )

    def _crop(self) -> tuple[int, int]:
        if self.job.crop is not None:
            return self.job.crop
        largest = max(s.height for s in self.data.samples), max(s.width for s in self.data.samples)
        return min(largest[0], LARGEST_CROP[0]), min(largest[1], LARGEST_CROP[1])

    def _crops(self, progress: Progress | None) -> TrainingCrops:
        job, data, length = self.job, self.data, self.job.steps * self.job.batch_size
        draws = Draws(data.samples, self.space, mix=job.mix, seed=job.seed, length=length, progress=progress)
        augmentation = Augmentation(self._crop(), published=job.published_crops, blur=job.blur)
        return TrainingCrops(data, draws, augmentation=augmentation, weights=job.weights)
