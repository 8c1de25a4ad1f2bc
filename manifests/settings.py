"""Settings of a job: dataclass fields that carry their own help, choices and place among the options of a command.

A job (LabelJob, TrainJob) declares each field once, with `setting`. The command line makes its options from these
fields, so that a default, its choices and its help stand in one place. Nothing here knows the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_type_hints

GROUPS = {"what": "What", "how": "How", "machine": "On which machine", "rarely": "Rarely needed"}
_KEY = "setting"

Job = TypeVar("Job")


@dataclass(frozen=True)
class Setting:
    """The words about one field of a job.

    help: one sentence for the option's help. group: a key of GROUPS. choices: the allowed values, if they are few.
    metavar: the name of the value in the help, such as "HxW". parse: reads the typed text; raises ValueError that says
    what was expected. flag: the option, such as "--only"; empty for the field's name. unset: the meaning of None.
    """

    help: str
    group: str
    choices: tuple[str, ...] = ()
    metavar: str = ""
    parse: Callable[[str], Any] | None = None
    flag: str = ""
    unset: str = ""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"group {self.group!r}: expected {', '.join(GROUPS)}")


def setting(
    default: Any,
    help: str,
    *,
    group: str,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    parse: Callable[[str], Any] | None = None,
    flag: str = "",
    unset: str = "",
) -> Any:
    """Return a dataclass field with this default and these words; see `Setting` for the parameters.

    Example: `limit: int | None = setting(None, "Label the first N samples only.", group="what", metavar="N")`
    """
    words = Setting(help, group, choices, metavar, parse, flag, unset)
    return dataclasses.field(default=default, metadata={_KEY: words})


@dataclass(frozen=True)
class JobField:
    """One setting of a job class.

    path: the names that lead to it, such as ("portion", "limit") for a field of a nested dataclass.
    """

    path: tuple[str, ...]
    type: Any
    default: Any
    words: Setting

    @property
    def name(self) -> str:
        """The name of the field itself."""
        return self.path[-1]

    @property
    def flag(self) -> str:
        """The option on the command line."""
        return self.words.flag or "--" + self.name.replace("_", "-")

    @property
    def kind(self) -> Any:
        """The type of a value that is given: `int` for `int | None`."""
        kinds = (
            [kind for kind in get_args(self.type) if kind is not NoneType] if isinstance(self.type, UnionType) else []
        )
        return kinds[0] if kinds else self.type

    @property
    def help(self) -> str:
        """The help with the default in words; a switch that is off by default needs none."""
        value = self.default
        text = ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
        text = self.words.unset if value is None else "" if self.kind is bool else text
        return f"{self.words.help} [default: {text}]" if text else self.words.help


def job_fields(job: type[Any]) -> Iterator[JobField]:
    """Yield the settings of a job class in the order of its fields, those of nested dataclasses where they stand."""
    types = get_type_hints(job)
    for field in dataclasses.fields(job):
        if _KEY in field.metadata:
            yield JobField((field.name,), types[field.name], field.default, field.metadata[_KEY])
        elif dataclasses.is_dataclass(types[field.name]):
            for nested in job_fields(types[field.name]):
                yield dataclasses.replace(nested, path=(field.name, *nested.path))


def build_job(job: type[Job], values: dict[str, Any]) -> Job:
    """Make a job from values by field name; those of nested dataclasses are given flat, by their own names.

    Fields without a value keep their defaults. Raises ValueError as the job does, TypeError for an unknown name.
    """
    types, mine, rest = get_type_hints(job), {}, dict(values)
    for field in dataclasses.fields(job):  # type: ignore[arg-type]
        if field.name in rest:
            mine[field.name] = rest.pop(field.name)
        elif dataclasses.is_dataclass(types[field.name]):
            names = {nested.name for nested in job_fields(types[field.name])}
            inner = {name: rest.pop(name) for name in list(rest) if name in names}
            if inner:
                mine[field.name] = build_job(types[field.name], inner)
    return job(**mine, **rest)


def require_choices(job: Any) -> None:
    """Raise ValueError, naming field and choices, if a setting of this job has a value that is none of its choices."""
    for field in dataclasses.fields(job):
        words, value = field.metadata.get(_KEY), getattr(job, field.name)
        if words and words.choices and value not in words.choices:
            raise ValueError(f"{field.name.replace('_', ' ')} {value!r}: expected {' or '.join(words.choices)}")


# --- readers of typed text: their errors say what was expected; the caller names the option -------------------------


def parse_numbers(text: str) -> tuple[float, ...]:
    """Read "0.5,1,2" as numbers. Raises ValueError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError("expected numbers separated by commas, such as 0.5,1,2") from error


def parse_names(text: str) -> tuple[str, ...]:
    """Read "pole, traffic sign" as names."""
    return tuple(name.strip() for name in text.split(","))


def parse_pair(separator: str, expected: str) -> Callable[[str], tuple[int, int]]:
    """Return a reader of two whole numbers such as "320x480" or "2/8"; it raises ValueError with these words."""

    def parse(text: str) -> tuple[int, int]:
        try:
            first, second = (int(part) for part in text.lower().split(separator))
        except ValueError as error:
            raise ValueError(f"expected {expected}") from error
        return first, second

    return parse


def parse_share(text: str) -> float:
    """Read "5%" or "0.05" as a share between 0 and 1. Raises ValueError."""
    with contextlib.suppress(ValueError):
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < share < 1:
            return share
    raise ValueError("expected a share between 0 and 1, such as 5% or 0.05")
