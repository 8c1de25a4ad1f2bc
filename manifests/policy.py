"""The settings that turn predictions into a label: scales, their combination, and the policy that decides.

This module is light to import and knows no network: the command line, the teacher and the run's record all name these
numbers. A policy is data: a TOML file that anyone can read, copied into `run.json`. pipeline/rules.py applies it.
"""

from __future__ import annotations

import difflib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.area import Area as Area
from autolabel.manifests.documents import BadDocument, name_of, plain_json, read_toml
from autolabel.manifests.evidence import BESIDE_WEIGHT, POLYGON_WEIGHT, Factors, PolygonCounts, PolygonEvidence
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import location

SCALES = (0.5, 1.0, 2.0)  # the inference scales of arXiv 2005.10821, section 4
COMBINE = ("network", "average")  # combine scales as the network has learnt to, or average their logits
THRESHOLD = 0.5  # as in the article and the published code; the paper's text says 0.9
COARSE_RULES = ("ignore", "agree", "union", "human-wins", "teacher-wins")
LEVELS = (2, 32)  # fewest and most levels of confidence that can be kept
# Thresholds that are worth keeping beside those in force: the likeliest to be asked for comes first.
_WORTH_KEEPING = (
    *(0.5, 0.9, 0.7, 0.8, 0.95, 0.6, 0.3, 0.99, 0.4, 0.85, 0.75, 0.65, 0.98, 0.2, 0.55, 0.45, 0.35, 0.97, 0.25, 0.1),
    *(0.96, 0.92, 0.88, 0.82, 0.78, 0.72, 0.68, 0.62, 0.15, 0.05, 0.995),
)


def check_scales(scales: Sequence[float]) -> tuple[float, ...]:
    """Return the scales ascending. Raises ValueError unless they are distinct, in (0, 4], and 1 is among them."""
    distinct = tuple(sorted({float(s) for s in scales}))
    if 1.0 not in distinct or len(distinct) != len(tuple(scales)) or not all(0 < s <= 4 for s in distinct):
        given = ",".join(f"{s:g}" for s in scales)
        raise ValueError(f"scales {given}: expected distinct numbers in (0, 4] with 1 among them, such as 0.5,1,2")
    return distinct


def check_threshold(threshold: float) -> float:
    """Return the threshold. Raises ValueError unless it is a probability that a pixel can exceed."""
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold {threshold:g}: expected a probability in [0, 1), such as {THRESHOLD:g}")
    return threshold


@dataclass(frozen=True)
class Policy:
    """Every rule that turns confidences into a label. Rules are applied in the order below. The first rule that drops a
    pixel of the teacher gives the pixel its fate; the coarse label comes last and may decide any pixel anew.

    1. area: outside it the teacher does not count.
    2. temperature, polygons, threshold, thresholds: a pixel keeps its top class if the class's probability,
       softmax(logits / temperature), exceeds the threshold, or the class's own in `thresholds`.
    3. boundary: pixels at most so many rows and columns away from another top class are dropped.
    4. smallest_piece: pieces of the teacher's label (4-connected, one class) with fewer pixels are dropped.
    5. coarse, coarse_rules (by class): the use of the human coarse label where it names a class.
       ignore        It is not used.
       agree         The teacher's class is dropped where the two differ, if either of the two classes has this rule.
       union         In images where the teacher predicts the human's class somewhere inside the area, the pixel gets
                     that class if the teacher's confidence there exceeds its threshold; else the pixel is dropped.
       human-wins    The pixel gets the human's class.
       teacher-wins  The pixel gets the human's class where the teacher has none.

    polygons: the evidence of what lies around people's polygons. Where they named nothing, in images in which they
    named something, all p become p(c)^teacher_weight · (A[n, d, c] / A[c])^polygon_weight · exp(bias of c), normalised,
    before the threshold is asked (manifests/evidence.py). Polygons of no class stay without a class.

    Raises ValueError, naming the value.
    """

    name: str = ""
    threshold: float = THRESHOLD
    thresholds: dict[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    area: Area | None = None
    boundary: int = 0
    smallest_piece: int = 0
    coarse: str = COARSE_RULES[0]
    coarse_rules: dict[str, str] = field(default_factory=dict)
    polygons: PolygonEvidence | None = None

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        for name, threshold in self.thresholds.items():
            try:
                check_threshold(threshold)
            except ValueError as error:
                raise ValueError(f"class {name!r}: {error}") from error
        if not 0.05 <= self.temperature <= 20:
            raise ValueError(f"temperature {self.temperature:g}: expected a number from 0.05 to 20")
        for name, most in (("boundary", 64), ("smallest_piece", 1 << 20)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)}: expected 0 to {most} pixels")
        for rule in (self.coarse, *self.coarse_rules.values()):
            if rule not in COARSE_RULES:
                raise ValueError(f"coarse rule {rule!r}: expected one of {', '.join(COARSE_RULES)}")
        if not self.name:
            object.__setattr__(self, "name", f"threshold {self.threshold:g}")

    def require(self, space: LabelSpace) -> None:
        """Raise ValueError if a rule names a class that the label space does not have, or counts are missing."""
        self.require_counts()
        if self.polygons is not None:
            try:
                self.polygons.require(space)
            except ValueError as error:
                raise ValueError(f"policy {self.name!r}: {error}") from error
        for name in (*self.thresholds, *self.coarse_rules):
            if name not in space.names:
                close = difflib.get_close_matches(name, space.names, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(space.names)}"
                raise ValueError(f"policy {self.name!r}: {name!r} is no class of label space {space.name!r}: {hint}")

    def evidence(self, space: LabelSpace) -> Factors | None:
        """The evidence of polygons in numbers; None if the policy weighs none. Raises ValueError as `require`."""
        if self.polygons is None:
            return None
        return Factors(self.polygons.factors(space), self.polygons.teacher_weight)

    def require_counts(self) -> None:
        """Raise ValueError if the policy weighs polygons and nobody has named counts of them."""
        if self.polygons is not None:
            try:
                self.polygons.counted()
            except ValueError as error:
                raise ValueError(f"policy {self.name!r}: {error}") from error

    def class_thresholds(self, space: LabelSpace) -> list[float]:
        """The threshold of every class, by train id."""
        return [self.thresholds.get(name, self.threshold) for name in space.names]

    def edges(self, space: LabelSpace, keep_confidence: int | None = None) -> tuple[float, ...]:
        """The edges between levels of confidence, ascending: this policy's thresholds, and more for `keep_confidence`.

        n edges make n + 1 levels. Raises ValueError if the thresholds alone need more levels than `keep_confidence`.
        """
        needed = set(self.class_thresholds(space))
        if keep_confidence is None:
            return tuple(sorted(needed))
        if keep_confidence <= len(needed):
            raise ValueError(
                f"keep-confidence {keep_confidence}: policy {self.name!r} has {len(needed)} different thresholds,"
                f" which need {len(needed) + 1} levels or more"
            )
        for edge in _WORTH_KEEPING:
            if len(needed) + 1 < keep_confidence and all(abs(edge - other) > 0.004 for other in needed):
                needed.add(edge)
        return tuple(sorted(needed))

    def to_dict(self) -> dict[str, Any]:
        """Return every rule in the form that `run.json` holds."""
        polygons = None if self.polygons is None else self.polygons.to_dict()
        return dict(plain_json(asdict(replace(self, polygons=None)) | {"polygons": polygons}))

    def counted(self, counts: PolygonCounts) -> Policy:
        """Return the policy with counts of polygons. Raises ValueError for a policy that weighs none.

        Where a teacher was asked too, polygons get the weight that is usual then, unless the policy names one.
        """
        if self.polygons is None:
            raise ValueError(f"policy {self.name!r} does not weigh polygons: give --policy dense with --polygons")
        usual = counts.beside_teacher and self.polygons.polygon_weight == POLYGON_WEIGHT
        weight = BESIDE_WEIGHT if usual else self.polygons.polygon_weight
        return replace(self, polygons=replace(self.polygons, counts=counts, polygon_weight=weight))

    def to_toml(self, comments: dict[str, str] | None = None, *, counts: str = "") -> str:
        """Return the text of a file that `load_policy` reads, without the rules that change nothing.

        comments: by class, a comment on its threshold. counts: the name of the file with the counts of polygons.
        """
        plain = Policy()
        lines = [f"name = {_quoted(self.name)}", f"threshold = {self.threshold!r}"]
        lines += [
            f"{key} = {getattr(self, key)!r}" for key in _NUMBERS[1:] if getattr(self, key) != getattr(plain, key)
        ]
        if self.coarse != plain.coarse:
            lines.append(f"coarse = {_quoted(self.coarse)}")
        lines += _toml_table("thresholds", self.thresholds, comments)
        if self.area:
            lines += ["", "[area]", f"unit = {_quoted(self.area.unit)}", f"rows = {list(self.area.rows)}"]
            lines.append(f"columns = {list(self.area.columns)}")
        lines += _toml_table("coarse_rules", self.coarse_rules)
        if self.polygons is not None:
            lines += ["", "[polygons]", *([f"counts = {_quoted(counts)}"] if counts else [])]
            lines += [f"{key} = {getattr(self.polygons, key)!r}" for key in ("teacher_weight", "polygon_weight")]
            lines += _toml_table("polygons.biases", self.polygons.biases)
        return "\n".join(lines) + "\n"


_NUMBERS = ("threshold", "temperature", "boundary", "smallest_piece")
_KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "threshold": (int, float),
    "thresholds": (dict,),
    "temperature": (int, float),
    "area": (dict,),
    "boundary": (int,),
    "smallest_piece": (int,),
    "coarse": (str,),
    "coarse_rules": (dict,),
    "polygons": (dict,),
}
_POLYGON_KEYS: dict[str, tuple[type, ...]] = {
    "counts": (str, dict),
    "teacher_weight": (int, float),
    "polygon_weight": (int, float),
    "biases": (dict,),
}
_WORDS = {str: "a text", dict: "a table", float: "a number", int: "a whole number", list: "a list"}


def _quoted(value: str | float) -> str:
    return json.dumps(value, ensure_ascii=False)


def _toml_table(key: str, table: Mapping[str, str | float], comments: Mapping[str, str] | None = None) -> list[str]:
    """The lines of a table, every entry below its comment; no lines for an empty table."""
    lines = ["", f"[{key}]"] if table else []
    for name, value in table.items():
        lines += [f"# {comments[name]}"] if comments and name in comments else []
        lines.append(f"{_quoted(name)} = {_quoted(value)}")
    return lines


def policy_of(document: dict[str, Any], *, folder: Path = Path()) -> Policy:
    """Make a policy from `Policy.to_dict` or a parsed TOML file. Raises ValueError, naming key and expectation.

    folder: where the file of the counts of polygons is looked for.
    """
    _require_keys(document, _KEYS, "")
    for name, value in document.get("thresholds", {}).items():
        _require_type(value, (int, float), f"thresholds.{name}")
    area = document.get("area")
    if area is not None:
        _require_keys(area, {"rows": (list,), "columns": (list,), "unit": (str,)}, "area.")
        missing = [key for key in ("rows", "columns") if key not in area]
        if missing:
            raise ValueError(f"area has no {missing[0]}: expected rows and columns, such as rows = [15, 840]")
        for key in ("rows", "columns"):
            if len(area[key]) != 2:
                raise ValueError(f"area.{key} {area[key]}: expected two numbers")
            for value in area[key]:
                _require_type(value, (int, float), f"area.{key}")
        document = document | {"area": Area(**{**area, **{k: tuple(area[k]) for k in ("rows", "columns")}})}
    if document.get("polygons") is not None:
        document = document | {"polygons": _evidence(document["polygons"], folder)}
    rules = [f"coarse_rules.{name}" for name, rule in document.get("coarse_rules", {}).items() if type(rule) is not str]
    if rules:
        raise ValueError(f"{rules[0]}: expected one of {', '.join(COARSE_RULES)}")
    return Policy(**document)


def _evidence(table: dict[str, Any], folder: Path) -> PolygonEvidence:
    if table.get("counts") is None:
        table = {key: value for key, value in table.items() if key != "counts"}
    _require_keys(table, _POLYGON_KEYS, "polygons.")
    for name, bias in table.get("biases", {}).items():
        _require_type(bias, (int, float), f"polygons.biases.{name}")
    counts = table.get("counts")
    if isinstance(counts, str):
        table = table | {"counts": PolygonCounts.read(folder / counts)}
    elif counts is not None:
        table = table | {"counts": PolygonCounts.from_dict(counts)}
    return PolygonEvidence(**table)


def _require_keys(table: dict[str, Any], known: dict[str, tuple[type, ...]], prefix: str) -> None:
    for key, value in table.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(known)}"
            raise ValueError(f"unknown key {prefix + key!r}: {hint}")
        if not (key in ("area", "polygons") and value is None):
            _require_type(value, known[key], prefix + key)


def _require_type(value: Any, types: tuple[type, ...], where: str) -> None:
    if type(value) not in types or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{where} = {value!r}: expected {_WORDS[types[-1]]}")


def load_policy(name_or_file: str) -> Policy:
    """Return a preset by its name, or read a policy from a TOML file, whose name is the file's unless it says another.

    Raises ValueError naming file, key and expectation.
    """
    if name_or_file in PRESETS:
        return PRESETS[name_or_file]
    path = location(name_or_file)
    if not storage.exists(path):
        raise ValueError(f"policy {name_or_file!r} is neither a preset ({', '.join(PRESETS)}) nor a file that exists")
    document = {"name": name_of(path)} | read_toml(path)
    try:
        return policy_of(document, folder=path.parent)
    except BadDocument:
        raise
    except ValueError as error:
        raise BadDocument(f"{path}: {error}") from error


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The rules in which two policies in the form of `to_dict` differ: (key, before, now). Names may differ.

    Rules of polygons are told one by one where both policies weigh them. Their counts are told by the number of images
    and a checksum.
    """
    for key in _KEYS:
        old, new = before.get(key), now.get(key)
        if key == "polygons" and old is not None and new is not None:
            for rule in _POLYGON_KEYS:
                if old.get(rule) != new.get(rule):
                    yield f"polygons.{rule}", *(_in_brief(rule, x.get(rule)) for x in (old, new))
        elif key != "name" and old != new:
            yield key, *(_in_brief(key, value) for value in (old, new))


def _in_brief(key: str, value: Any) -> Any:
    if key == "polygons" and value is not None:
        return _in_brief("counts", value.get("counts"))
    if key != "counts" or value is None:
        return value
    images = sum(value["sizes"].values())
    return f"counts of {images} images ({zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x})"


PAPER = Policy("paper")
# The rules of the published training code for its own dump of predictions (the loader of NVIDIA's
# semantic-segmentation, 2020), which compares 8-bit probabilities after the union, in rows 15..839 and columns 14..2029
# of 1024 x 2048.
REFERENCE = Policy(
    "reference",
    area=Area((15 / 1024, 840 / 1024), (14 / 2048, 2030 / 2048), "fractions"),
    coarse_rules=dict.fromkeys(("truck", "bus", "train"), "union"),
)
# People are sure of their polygons. The teacher fills in the rest, which holds the difficult pixels, so its threshold
# is higher. Measured by benchmarks/dense.py.
HUMAN_FIRST = Policy("human-first", 0.7, coarse="human-wins")
# The same, and what lies around polygons is counted evidence; `Policy.counted` adds the counts.
DENSE = Policy("dense", coarse="human-wins", polygons=PolygonEvidence())
PRESETS = {policy.name: policy for policy in (PAPER, REFERENCE, HUMAN_FIRST, DENSE)}
