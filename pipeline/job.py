"""The request for a labelling run: which images, which teacher, which labels, how much of it, on which machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from autolabel.manifests.class_map import ClassMap, load_class_map
from autolabel.manifests.focus import Focus, FocusCertificate, focus_of, parse_focus
from autolabel.manifests.policy import COMBINE, LEVELS, PAPER, PRESETS, SCALES, Policy, check_scales
from autolabel.manifests.recipe import STORES, Machine
from autolabel.manifests.settings import parse_numbers, parse_pair, require_choices, setting
from autolabel.manifests.teachers import TeacherName

_DEVICE = re.compile(r"auto|cpu|cuda|cuda:\d+|mps")


@dataclass(frozen=True)
class Portion:
    """The samples of a manifest that a call is to label; the rest is left for later calls."""

    limit: int | None = setting(None, "Label the first N samples only.", group="what", metavar="N")
    only: str | None = setting(
        None, "Label the samples whose id fits, such as 'aachen_*'.", group="what", metavar="GLOB"
    )
    part: tuple[int, int] | None = setting(
        None, "Label every N-th unit, from the I-th: N machines without Ray share a run.",
        group="machine", metavar="I/N", parse=parse_pair("/", "I/N, such as 2/8 for the second of eight"),
    )  # fmt: skip
    retry_quarantined: bool = setting(False, "Try quarantined images again, such as on a larger GPU.", group="rarely")

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit}: expected 1 or more")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise ValueError(f"part {self.part[0]}/{self.part[1]}: expected I/N with I from 1 to N")


@dataclass(frozen=True)
class LabelJob:
    """One call of `autolabel generate`. Raises ValueError naming field, value and what was expected."""

    manifest: Path
    teacher: TeacherName
    out: Path
    scales: tuple[float, ...] | None = setting(
        None, "Sizes at which the teacher looks at an image.", group="how", metavar="S,S,...", parse=parse_numbers,
        unset=f"{','.join(f'{scale:g}' for scale in SCALES)}; 1 for models of other libraries",
    )  # fmt: skip
    flip: bool = setting(False, "Average with the mirrored image.", group="how")
    combine: str = setting(
        COMBINE[0], "Combine scales as the network learnt to, or average their logits.", group="how", choices=COMBINE
    )
    focus: Focus | FocusCertificate | None = setting(  # noqa: RUF009
        None, "Compute the highest scale in a band of this share of the rows, where it may change most: half the time;"
        " or the file of `autolabel focus`. docs/focus.md.", group="how", metavar="SHARE|FILE", parse=parse_focus,
        unset="all rows",
    )  # fmt: skip
    window: tuple[int, int] | None = setting(
        None, "Let a model of another library look at overlapping windows of this height and width.", group="how",
        metavar="HxW", parse=parse_pair("x", "HEIGHTxWIDTH in pixels, such as 1024x1024"),
        unset="whole images, or as the model's own settings say",
    )  # fmt: skip
    class_map: ClassMap | None = setting(  # noqa: RUF009
        None, "What the teacher's classes mean: a TOML file, or a built-in map; docs/class-maps.md.", group="how",
        metavar="MAP", parse=load_class_map, flag="--classes", unset="the teacher's own names",
    )  # fmt: skip
    policy: Policy = PAPER
    keep_confidence: int | None = setting(
        None, "Keep the confidence too, in so many levels, for `relabel`.", group="what", metavar="LEVELS"
    )
    keep_probability: bool = setting(
        False, "Keep the probability of every label's class too, for `train --weights`.", group="what"
    )
    store: str = setting(STORES[0], "Format of the labels.", group="what", choices=STORES)
    device: str = setting(
        "auto", "auto, cpu, cuda, cuda:N (one GPU of several, in this process) or mps.", group="machine"
    )
    precision: str = setting(
        "auto", "float32, bfloat16 or float16; auto takes bfloat16 on GPUs that have it.", group="rarely"
    )
    compile: bool = setting(
        False, "Let torch compile the network, which takes minutes once; docs/networks.md.", group="rarely"
    )
    unit_size: int = setting(64, "Samples in a unit: they are committed together.", group="rarely")
    max_quarantined: float = setting(  # Cityscapes itself ships one broken image
        0.001, "Share of quarantined samples above which the call ends with exit code 3.", group="rarely"
    )
    portion: Portion = field(default_factory=Portion)
    machine: Machine = field(default_factory=Machine)

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", TeacherName.of(self.teacher))
        if self.scales is not None:
            object.__setattr__(self, "scales", check_scales(self.scales))
        object.__setattr__(self, "focus", focus_of(self.focus))
        if self.window is not None and min(self.window) < 32:
            raise ValueError(f"window {self.window[0]}x{self.window[1]}: expected both sides to be 32 pixels or more")
        require_choices(self)
        if not _DEVICE.fullmatch(self.device):
            raise ValueError(f"device {self.device!r}: expected auto, cpu, cuda, cuda:N or mps")
        machine = self.machine
        workers = machine.engine == "auto" and (machine.most or 1) > 1
        if self.one_gpu and (machine.engine == "ray" or machine.address or workers):
            raise ValueError(
                f"device {self.device!r}: it is one GPU, and Ray gives each worker its own: give --device cuda, or"
                " leave out --engine ray, --workers and --address"
            )
        if self.keep_confidence is not None and not LEVELS[0] <= self.keep_confidence <= LEVELS[1]:
            raise ValueError(f"keep-confidence {self.keep_confidence}: expected {LEVELS[0]} to {LEVELS[1]} levels")
        if not 1 <= self.unit_size <= 4096:
            raise ValueError(f"unit size {self.unit_size}: expected 1 to 4096")
        if not 0 <= self.max_quarantined <= 1:
            raise ValueError(f"max quarantined {self.max_quarantined:g}: expected a share in [0, 1]")

    @property
    def asks_of_confidence(self) -> str:
        """The first wish that class ids without probabilities cannot grant, in words; "" for none.

        The one threshold of a preset asks for nothing: every id counts as sure.
        """
        policy = self.policy
        if self.keep_confidence:
            return "--keep-confidence"
        if self.keep_probability:
            return "--keep-probability"
        if policy.thresholds or (policy.threshold != PAPER.threshold and policy not in PRESETS.values()):
            return f"policy {policy.name!r}, which has thresholds,"
        if policy.polygons is not None:
            return f"policy {policy.name!r}, which weighs polygons,"
        if policy.temperature != 1:
            return f"policy {policy.name!r}, which needs the probabilities of all classes,"
        return ""

    @property
    def one_gpu(self) -> bool:
        """True if the device is one GPU that only this process reaches: "cuda:1", or Apple's."""
        return ":" in self.device or self.device == "mps"
