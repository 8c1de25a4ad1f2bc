"""Load a teacher by its name: a checkpoint, a model of another library, or several of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from autolabel.manifests import notes
from autolabel.manifests.class_map import ClassMap
from autolabel.manifests.label_space import MAX_CLASSES, LabelSpace
from autolabel.manifests.policy import COMBINE
from autolabel.manifests.teachers import (
    CHECKPOINT,
    EXPORTED,
    ONNX,
    PYTHON,
    TRANSFORMERS,
    AnyTeacher,
    BadTeacher,
    TeacherName,
    TeacherPlace,
)
from autolabel.teacher.around import Ensemble, ForeignNetwork, MappedNetwork, Network
from autolabel.teacher.checkpoints import load_network, read_checkpoint, silent
from autolabel.teacher.device import pick_device, pick_precision, require_precision, tell_of_slow_precision
from autolabel.teacher.fold import cast_convolutions, fold_batch_norm
from autolabel.teacher.networks.fields import Size
from autolabel.teacher.predict import Teacher, own_network

_MODULES = {TRANSFORMERS: "transformers", EXPORTED: "exported", ONNX: "onnx", PYTHON: "python"}


@dataclass(frozen=True)
class _Member:
    """One teacher, loaded. names, label_space and the marks of trained_on are None where nobody says them."""

    place: TeacherPlace
    network: Network
    names: tuple[str, ...] | None
    label_space: LabelSpace | None
    trained_on: Callable[[], Tensor | None]  # it may read many images, which no label needs


def load_teacher(
    teacher: AnyTeacher,
    *,
    device: str = "auto",
    precision: str = "float32",
    combine: str = COMBINE[0],
    window: Size | None = None,
    class_map: ClassMap | None = None,
    space: LabelSpace | None = None,
    compile: bool = False,
) -> Teacher:
    """Load a teacher: a checkpoint, another model of docs/teachers.md, or several, whose probabilities are averaged.

    Batch norms of our networks are folded, their weights cast. device, precision: see `pick_device` and
    `pick_precision`; combine: see `Teacher`. window: height and width of the overlapping windows that a model of
    another library looks at, one after the other. space: the classes that the teacher is to name, or None for its own;
    a `class_map` says how, and is needed only where the names differ. With several teachers it counts for those whose
    classes are not these. compile: let torch compile our networks, see `compiled`. Raises BadTeacher and BadCheckpoint
    (both ValueErrors), ValueError, FileNotFoundError, CompilationFailed.
    """
    name = TeacherName.of(teacher)
    device = pick_device(device)
    precision = pick_precision(precision, device)
    require_precision(precision, device)
    tell_of_slow_precision(precision, device)
    if window is not None and name.all_ours:
        raise ValueError(
            f"window {window[0]}x{window[1]}: {name} is a network of ours, which looks at whole images; leave it out"
        )
    require_compilable(name, compile=compile)
    digest = name.digest()
    members = [
        _load(place, device=device, precision=precision, combine=combine, window=window, compile=compile)
        for place in name.places
    ]
    space = space or (members[0].label_space if len(members) > 1 else None)
    networks, own = list[Network](), members[0].label_space
    for member in members:
        targets = _targets(member, space, class_map, several=len(members) > 1)
        if targets is None or space is None:
            networks.append(member.network)
            if space is not None and member.names == space.names and member.place.kind != CHECKPOINT:
                own = space  # the same names: its ids and colours count
        else:
            networks.append(MappedNetwork(member.network, targets, classes=len(space), device=torch.device(device)))
            own = space
    if len({network.classes for network in networks}) > 1:
        raise BadTeacher(f"{name} predict different numbers of classes: map them onto one label space with --classes")
    if own is None and members[0].names is not None:
        raise BadTeacher(
            f"{name} has {len(members[0].names)} classes, and a label holds {MAX_CLASSES}: map them with --classes"
        )
    return Teacher(
        networks[0] if len(networks) == 1 else Ensemble(networks),
        own,
        trained_on=partial(_seen, members),
        device=device,
        precision=precision,
        name=name,
        digest=digest,
        combine=combine,
        window=window,
        class_map=class_map,
        compile=compile,
    )


def require_compilable(name: TeacherName, *, compile: bool) -> None:
    """Raise ValueError if networks of other libraries are to be compiled."""
    if compile and not name.all_ours:
        raise ValueError(f"--compile: {name} is no checkpoint of ours, and only those are compiled; leave it out")


def classes_of(teacher: TeacherName) -> LabelSpace | None:
    """Return the classes that a teacher names, or None if it names none; weights are not loaded where that can be.

    Those of the first teacher, if there are several. Raises BadTeacher, BadCheckpoint, FileNotFoundError.
    """
    place = teacher.places[0]
    place.require_files()
    if place.kind == CHECKPOINT:
        return read_checkpoint(place.path).label_space
    classes = _module(place).classes(place)
    return classes if isinstance(classes, LabelSpace) else _named(place, tuple(classes))


def names_of(place: TeacherPlace) -> tuple[str, ...] | None:
    """Return the names of a teacher's classes by channel, however many, or None. Raises as `classes_of`."""
    if place.kind == CHECKPOINT:
        space = read_checkpoint(place.path).label_space
        return None if space is None else space.names
    classes = _module(place).classes(place)
    return classes.names if isinstance(classes, LabelSpace) else tuple(classes)


def seen_by(teacher: TeacherName) -> Tensor | None:
    """Return the marks of the images that a teacher has seen, or None where nobody knows. Raises as `load_teacher`."""
    seen = []
    for place in teacher.places:
        if place.kind == CHECKPOINT:
            seen.append(read_checkpoint(place.path).trained_on)
        else:
            seen.append(_module(place).load(place.near(), device=torch.device("cpu")).trained_on)
    return _joined(teacher.places, seen)


def _load(
    place: TeacherPlace, *, device: str, precision: str, combine: str, window: Size | None, compile: bool
) -> _Member:
    if place.kind == CHECKPOINT:
        checkpoint = read_checkpoint(place.path)
        network = load_network(place.path, checkpoint)
        fold_batch_norm(network)
        cast_convolutions(network, precision, device=device)
        if compile:
            from autolabel.teacher.compiled import compile_network

            compile_network(network, precision, device=device, subject=str(place))
        own, space = own_network(network, torch.device(device), combine=combine), checkpoint.label_space
        seen = checkpoint.trained_on
        return _Member(place, own, space.names if space else None, space, lambda: seen)
    model = _module(place).load(place.near(), device=torch.device(device))
    around = ForeignNetwork(model, name=str(place), window=window)
    space = model.classes if isinstance(model.classes, LabelSpace) else _named(place, around.names)
    return _Member(place, around, around.names, space, lambda: model.trained_on)


def _module(place: TeacherPlace) -> ModuleType:
    return importlib.import_module(f"autolabel.teacher.foreign.{_MODULES[place.kind]}")


def _named(place: TeacherPlace, names: tuple[str, ...]) -> LabelSpace | None:
    return LabelSpace.named(place.path.stem, names) if len(names) <= MAX_CLASSES else None


def _targets(
    member: _Member, space: LabelSpace | None, class_map: ClassMap | None, *, several: bool
) -> tuple[int, ...] | None:
    """The train id in `space` of each class of a teacher; None if they are its own, or nobody can tell."""
    if class_map is not None and not (several and space and member.names == space.names):
        if space is None:
            raise ValueError(f"{class_map.where}: name the label space that it leads to, with --label-space")
        if member.names is None:
            raise ValueError(f"{class_map.where}: {member.place} does not name its classes, so nobody can map them")
        return class_map.indices(member.names, space, teacher=str(member.place))
    if space is None or member.names in (None, space.names):
        return None
    if member.names is not None and sorted(member.names) == sorted(space.names):
        return tuple(space.names.index(name) for name in member.names)
    if several:
        raise BadTeacher(
            f"{member.place} predicts other classes than those of label space {space.name!r}: map them with --classes"
        )
    return None


def _seen(members: Sequence[_Member]) -> Tensor | None:
    return _joined([member.place for member in members], [member.trained_on() for member in members])


def _joined(places: Sequence[TeacherPlace], seen: Sequence[Tensor | None]) -> Tensor | None:
    """The marks of all teachers that say what they have seen; None if none does. A note names the others."""
    known = [marks for marks in seen if marks is not None]
    for place, marks in zip(places, seen, strict=True):
        if known and marks is None:
            notes.tell(silent(place))
    return torch.unique(torch.cat(known)) if len(known) > 1 else known[0] if known else None
