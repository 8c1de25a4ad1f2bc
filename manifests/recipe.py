"""Everything that a run's labels depend on, and the machine that computes them.

`run.json` holds the recipe. A call may go on with a run only if its own recipe is equal; so a new setting that changes
labels belongs here, and nothing else has to be told. The machine may change from call to call.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.documents import plain_json, shaped
from autolabel.manifests.focus import Focus
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.policy import Policy, differences, policy_of
from autolabel.manifests.settings import require_choices, setting

STORES = ("zarr", "png")
ENGINES = ("auto", "local", "ray")


@dataclass(frozen=True)
class Recipe:
    """Two calls with equal recipes make the same labels from the same images.

    `focus` is the share of the rows that the highest scale sees, None for all, with the swings by which pixels are
    counted as certified. `confidence_edges` are the kept levels' edges, ascending, or None where no confidence is kept.
    `keep_probability`: every label has its probabilities beside it. `device` is a kind of device ("cpu", "cuda",
    "mps"), `batch_pixels` the pixels at all scales together that a GPU computes at once (0 on a CPU, where a batch is
    one image), `unit_size` the number of samples in a unit. `window` is the height and width of the windows that a
    model of another library looks at, `class_map` what its classes mean; None without either. `compile`: torch has
    compiled the network, and its labels then differ a little. `teacher_sha256` is empty where no teacher is known.
    """

    teacher_sha256: str
    window: tuple[int, int] | None
    class_map: ClassMap | None
    scales: tuple[float, ...]
    flip: bool
    combine: str
    focus: Focus | None
    policy: Policy
    confidence_edges: tuple[float, ...] | None
    keep_probability: bool
    precision: str
    device: str
    batch_pixels: int
    store: str
    unit_size: int
    compile: bool
    label_space: LabelSpace

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote. Raises ValueError for anything else."""
        shape = get_type_hints(cls) | {"policy": dict, "label_space": dict, "class_map": dict | None}
        shape["focus"] = dict | None
        missing = [name for name in shape if name not in document]
        if missing:
            raise ValueError(f"its recipe has no {missing[0]!r}")
        values = {name: shaped(kind, document[name], f"its recipe, {name!r},") for name, kind in shape.items()}
        space = LabelSpace.of(values["label_space"], where="its recipe")
        class_map = None if values["class_map"] is None else ClassMap.of(values["class_map"], where="its recipe")
        focus = None if values["focus"] is None else Focus.of(values["focus"])
        read = {"policy": policy_of(values["policy"]), "label_space": space, "class_map": class_map, "focus": focus}
        return cls(**values | read)

    @property
    def share(self) -> float | None:
        """The share of the rows that the highest scale sees; None for all."""
        return None if self.focus is None else self.focus.share

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON values."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        class_map = None if self.class_map is None else self.class_map.to_dict()
        focus = None if self.focus is None else self.focus.to_dict()
        space, policy = self.label_space.to_dict(), self.policy.to_dict()
        own = {"policy": policy, "label_space": space, "class_map": class_map, "focus": focus}
        return dict(plain_json(values | own))

    def changes(self, now: Recipe) -> list[str]:
        """The settings in which another recipe differs, each with both values. A policy's name does not count."""
        before, after = self.to_dict(), now.to_dict()
        before["focus"], after["focus"] = _focus(self.focus), _focus(now.focus)
        rules = [(f"policy: {key}", *values) for key, *values in differences(before.pop("policy"), after.pop("policy"))]
        settings = [(_WORDS.get(key, key), old, after[key]) for key, old in before.items() if old != after[key]]
        return [f"{name} was {_short(old)}, now {_short(new)}" for name, old, new in settings + rules]


_WORDS = {"teacher_sha256": "teacher"}


def _focus(focus: Focus | None) -> float | str | None:
    if focus is None or focus.within is None:
        return None if focus is None else focus.share
    swings = zlib.crc32(repr((focus.within, focus.beyond)).encode())
    return f"{focus.share:g}, certified by {swings:08x}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…" + text[-4:]


_WORKERS = "expected a number, or MIN..MAX such as 2..8"


def _parse_workers(text: str) -> int | tuple[int, int]:
    least, range_of, most = text.partition("..")
    try:
        return (int(least), int(most)) if range_of else int(text)
    except ValueError as error:
        raise ValueError(_WORKERS) from error


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


@dataclass(frozen=True)
class Machine:
    """The engine, the workers and the cluster of a call; labels do not depend on it. Raises ValueError.

    workers: a number, or (least, most), which asks for Ray: the call begins with the least, and takes up to the most
    while machines come and go.
    """

    engine: str = setting(
        ENGINES[0],
        "Compute in this process or on Ray; auto takes Ray for several GPUs or workers, or a cluster.",
        group="machine",
        choices=ENGINES,
    )
    workers: int | tuple[int, int] | None = setting(
        None, "Number of workers; MIN..MAX begins with MIN of Ray's and takes up to MAX as machines come and go.",
        group="machine", metavar="N|MIN..MAX", parse=_parse_workers, unset="one per GPU, or one per core without GPUs",
    )  # fmt: skip
    address: str | None = setting(
        None, "Ray cluster to use.", group="machine", unset="$RAY_ADDRESS, else a private Ray on this machine"
    )

    def __post_init__(self) -> None:
        require_choices(self)
        self._check_workers()
        if self.engine == ENGINES[1] and self.address:
            raise ValueError(f"engine local and address {self.address!r}: a cluster needs engine ray, or auto")

    def _check_workers(self) -> None:
        workers = self.workers
        if isinstance(workers, (tuple, list)):
            if len(workers) != 2 or not all(map(_whole, workers)) or not 1 <= workers[0] <= workers[1]:
                given = "..".join(map(str, workers))
                raise ValueError(f"workers {given}: expected MIN..MAX with MIN from 1 to MAX, such as 2..8")
            if self.engine == ENGINES[1]:
                raise ValueError(
                    f"workers {workers[0]}..{workers[1]} and engine local: workers that come and go are Ray's; give"
                    " engine ray, or one number"
                )
            object.__setattr__(self, "workers", tuple(workers))
            object.__setattr__(self, "engine", ENGINES[2])
        elif workers is not None:
            if not _whole(workers):
                raise ValueError(f"workers {workers!r}: {_WORKERS}")
            if workers < 1:
                raise ValueError(f"workers {workers}: expected 1 or more")

    @property
    def least(self) -> int | None:
        """The number of workers that a range begins with; None without a range: then the first one begins."""
        return self.workers[0] if isinstance(self.workers, tuple) else None

    @property
    def most(self) -> int | None:
        """The number of workers to ask for; None for as many as there is room for."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers
