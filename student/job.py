"""A request for a training: its settings, their choices and defaults. Nothing heavy is imported here."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any

from autolabel.manifests.settings import parse_names, parse_pair, require_choices, setting

ARCH = "hrnet18s_ocr_mscale"
LOSSES = ("cross-entropy", "balanced", "image-weighted", "rmi")
LEARNING_RATES = {"adamw": 0.003, "sgd": 0.01}  # highest learning rate by optimizer
WEIGHT_DECAYS = {"adamw": 0.01, "sgd": 5e-4}
TRACKERS = ("csv", "tensorboard", "wandb", "mlflow")
FINE_TUNING = 3  # a training that starts from a checkpoint divides its learning rate by this
SCHEDULES = ("poly", "cosine")
POWER = 0.9  # exponent of poly
WARM_UP = 0.05  # share of the steps
SCALE_WEIGHT = 0.05  # arXiv 2005.10821, section 4
LARGEST_CROP = (512, 1024)  # height and width of the crop that is chosen for larger images


@dataclass(frozen=True)
class Mix:
    """Frequencies with which the crops of a training show samples and classes.

    class_uniform: share of the draws aimed at a class. auto_share: share of automatic labels; None leaves it to the
    samples' weights. auto_classes: names of the classes at which draws of automatic labels are aimed; None means all.
    auto_aimed: all automatic draws are aimed, and as many fewer of the others: class_uniform stays the share of all.
    fine_only_last: share of the training, at its end, that shows fine samples only. Raises ValueError.
    """

    class_uniform: float = 0.5
    auto_share: float | None = None
    auto_classes: tuple[str, ...] | None = None
    auto_aimed: bool = False
    fine_only_last: float = 0.0

    def __post_init__(self) -> None:
        for name in ("class_uniform", "auto_share", "fine_only_last"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name.replace('_', '-')} {value:g}: expected a number from 0 to 1")
        if self.auto_classes is not None and not self.auto_classes:
            raise ValueError("auto-classes is empty: name a class, or leave it out for all of them")
        if self.auto_aimed and self.auto_share is None:
            raise ValueError("auto-aimed needs an auto-share: give the share of automatic labels")
        if self.auto_aimed and self.auto_share is not None and self.auto_share > self.class_uniform:
            raise ValueError(
                f"auto-aimed with auto-share {self.auto_share:g}: only {self.class_uniform:g} of all crops are aimed,"
                " give at most that"
            )


@dataclass(frozen=True)
class TrainMachine:
    """The processes that compute a training. A training may go on with others: they change its rounding only."""

    workers: int = setting(1, "Processes that share every batch (Ray Train).", group="machine", metavar="N")
    address: str | None = setting(
        None, "Ray cluster to train on.", group="machine", unset="$RAY_ADDRESS with --workers, else none"
    )
    loaders: int | None = setting(
        None,
        "Processes that read crops, for each worker.",
        group="machine",
        metavar="N",
        unset="on a GPU up to 8, by its share of the cores; on a CPU 0",
    )
    compile: bool = setting(False, "Compile the network; the first step takes minutes.", group="rarely")

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}: expected 1 or more")
        if self.loaders is not None and self.loaders < 0:
            raise ValueError(f"loaders is {self.loaders}: expected 0 or more")
        if self.compile and self.workers > 1:
            raise ValueError(f"compile with workers {self.workers}: one process compiles, leave out one of the two")

    @property
    def uses_ray(self) -> bool:
        """True where Ray Train runs the training: with several workers, or on a cluster that is named."""
        return self.workers > 1 or self.address is not None


@dataclass(frozen=True)
class ScoreMachine:
    """The processes that share the images on which a checkpoint is scored; the scores do not depend on them."""

    workers: int = setting(
        1, "Processes that share the images, one per GPU, or per core without GPUs (Ray).", group="machine", metavar="N"
    )
    address: str | None = setting(
        None, "Ray cluster to score on.", group="machine", unset="$RAY_ADDRESS with --workers, else none"
    )

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}: expected 1 or more")

    @property
    def uses_ray(self) -> bool:
        """True where Ray's workers score: several, or on a cluster that is named."""
        return self.workers > 1 or self.address is not None


@dataclass(frozen=True)
class TrainJob:
    """A training: its data, its recipe and its machine. None means: chosen from the data or the optimizer.

    A step shows `batch_size` crops. They are split evenly over `machine.workers` processes, and over `accumulate`
    parts that each process computes one after the other. Batch norm sees one such part of all processes, so another
    number of workers changes rounding and dropout only, but another number of parts changes the training.
    Raises ValueError for settings that mean nothing.
    """

    manifest: Path
    val: Path
    out: Path
    _: KW_ONLY
    arch: str = setting(
        ARCH,
        "TRUNK_DECODER[_COMBINATION], timm:NAME such as timm:convnext_tiny, or smp:DECODER/ENCODER such as"
        " smp:Segformer/mit_b2; docs/networks.md lists them.",
        group="what",
    )
    init: Path | None = setting(  # noqa: RUF009
        None, "Start from this checkpoint, or from weights of the trunk; docs/networks.md.", group="what"
    )
    steps: int = setting(1000, "Changes of the weights.", group="what")
    seed: int = setting(0, "Start of every random number; another one gives another training.", group="rarely")
    batch_size: int = setting(4, "Crops of a step.", group="what")
    crop: tuple[int, int] | None = setting(
        None,
        "Height and width of a crop, in pixels.",
        group="what",
        metavar="HxW",
        parse=parse_pair("x", "HEIGHTxWIDTH in pixels, such as 320x480"),
        unset="the images' size, up to {}x{}".format(*LARGEST_CROP),
    )
    auto_share: float | None = setting(
        None, "Share of automatic labels in each epoch.", group="how", metavar="SHARE", unset="by weight"
    )
    auto_classes: tuple[str, ...] | None = setting(
        None,
        "Classes at which crops of automatic labels are aimed, separated by commas.",
        group="how",
        metavar="NAMES",
        parse=parse_names,
        unset="all",
    )
    auto_aimed: bool = setting(
        False,
        "Aim every crop of an automatic label at a class, and as many fewer of the fine ones; needs --auto-share.",
        group="how",
    )
    fine_only_last: float = setting(0.0, "Share of the steps, at the end, on fine labels.", group="how")
    loss: str = setting(
        LOSSES[0],
        "balanced and, slightly, image-weighted: rare classes weigh more. rmi: neighbouring pixels are judged together"
        " (arXiv 1910.12037).",
        group="how",
        choices=LOSSES,
    )
    weights: bool = setting(
        False,
        "Weigh each pixel of an automatic label by its probability; the run needs --keep-probability.",
        group="how",
    )
    noise: Path | None = setting(  # noqa: RUF009
        None,
        "Correct the loss on automatic labels for the errors that this audit.json counted (arXiv 1609.03683).",
        group="how",
        unset="no correction",
    )
    learning_rate: float | None = setting(
        None,
        "Highest learning rate.",
        group="how",
        unset=", ".join(f"{rate:g} for {name}" for name, rate in LEARNING_RATES.items()) + "; a third with --init",
    )
    ema: float | None = setting(
        None, "Score and keep averaged weights; 0.999 is usual.", group="how", metavar="DECAY", unset="no average"
    )
    precision: str = setting("auto", "auto, float32, bfloat16 or float16.", group="how")
    validations: int = setting(4, "Validations, spread evenly over the steps.", group="rarely")
    accumulate: int = setting(1, "Parts of a batch, computed one after the other.", group="rarely")
    optimizer: str = setting("adamw", "How gradients change weights.", group="rarely", choices=tuple(LEARNING_RATES))
    schedule: str = setting(SCHEDULES[0], "Fall of the learning rate.", group="rarely", choices=SCHEDULES)
    power: float = setting(POWER, "Exponent of poly.", group="rarely")
    warm_up: float = setting(
        WARM_UP, "Share of the steps over which the learning rate rises first.", group="rarely", metavar="SHARE"
    )
    scale_weight: float = setting(
        SCALE_WEIGHT, "Weight of the loss of each scale by itself.", group="rarely", metavar="WEIGHT"
    )
    published_crops: bool = setting(
        False,
        "Augment as the published code: uniform scale, bicubic, hue, colours in random order, black padding.",
        group="rarely",
    )
    blur: bool = setting(False, "Blur each crop, by a sigma of 0.15 to 1.3 pixels.", group="rarely")
    clip: float = setting(
        10.0, "Length (L2) to which longer gradients are clipped; 0 clips none.", group="rarely", metavar="LENGTH"
    )
    weight_decay: float | None = setting(
        None,
        "Weight decay of the optimizer.",
        group="rarely",
        unset=", ".join(f"{decay:g} for {name}" for name, decay in WEIGHT_DECAYS.items()),
    )
    log: tuple[str, ...] = setting(
        (),
        f"Trackers that follow the training, beside metrics.jsonl: {', '.join(TRACKERS)}, separated by commas.",
        group="machine",
        metavar="NAMES",
        parse=parse_names,
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps.", group="machine")
    machine: TrainMachine = field(default_factory=TrainMachine)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validations", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected 1 or more")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}: expected 0 to {(1 << 32) - 1}")
        require_choices(self)
        if isinstance(self.log, str) or not set(self.log) <= set(TRACKERS) or len(set(self.log)) < len(self.log):
            raise ValueError(f"log {self.log!r}: expected names of {', '.join(TRACKERS)}, every name once")
        doubts = [name for name in ("weights", "noise") if getattr(self, name)]
        if len(doubts) > 1:
            raise ValueError("weights and noise both answer for wrong labels: give one of the two")
        if doubts and self.loss == "rmi":
            raise ValueError(f"{doubts[0]} with loss rmi: it judges regions, not single pixels; give another loss")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise ValueError(f"learning rate {self.learning_rate:g}: expected a number in (0, 10)")
        if self.crop is not None and min(self.crop) < 32:
            raise ValueError(f"crop {self.crop[0]}x{self.crop[1]}: expected both sides to be 32 pixels or more")
        if not 0 < self.power <= 10:
            raise ValueError(f"power {self.power:g}: expected a number above 0, up to 10")
        if self.schedule != "poly" and self.power != POWER:
            raise ValueError(f"power {self.power:g} with schedule {self.schedule}: only poly has one")
        for name in ("warm_up", "scale_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name.replace('_', '-')} {getattr(self, name):g}: expected a number from 0 to 1")
        if not 0 <= self.clip < math.inf:
            raise ValueError(f"clip {self.clip:g}: expected a length above 0, or 0 for gradients as they are")
        if self.weight_decay is not None and not 0 <= self.weight_decay < 1:
            raise ValueError(f"weight decay {self.weight_decay:g}: expected a number from 0 to below 1")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema {self.ema:g}: expected a decay between 0 and 1, such as 0.999")
        parts = self.machine.workers * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"a batch of {self.batch_size} does not split evenly over workers {self.machine.workers} x accumulate"
                f" {self.accumulate}: give a batch size that {parts} divides"
            )
        if self.device == "mps" and self.machine.uses_ray:
            raise ValueError("device mps: Apple's GPU trains in one process, leave out --workers and --address")
        _ = self.mix  # raises ValueError for shares that mean nothing

    @property
    def mix(self) -> Mix:
        """The frequencies of samples and classes."""
        names = ("auto_share", "auto_classes", "auto_aimed", "fine_only_last")
        return Mix(**{name: getattr(self, name) for name in names})

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.learning_rate or LEARNING_RATES[self.optimizer] / (FINE_TUNING if self.init else 1)

    @property
    def decay(self) -> float:
        """The weight decay."""
        return WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay

    def recipe(self) -> dict[str, Any]:
        """The settings that decide the result, as JSON values: all but the folder, who follows, and the machine."""
        values = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("out", "log", "device", "machine")
        }
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
