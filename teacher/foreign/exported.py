"""Programs of torch.export, `net.pt2`, as teachers. docs/teachers.md says what loading one can execute: nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.teacher.foreign.archive import clean
from autolabel.teacher.foreign.ports import fit
from autolabel.teacher.foreign.sidecar import read_sidecar

if TYPE_CHECKING:
    import torch

    from autolabel.teacher.model import Model

_LOGGERS = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")
_DETERMINISTIC = ("train", "training")
_one_at_a_time = threading.Lock()  # torch keeps the program that it reads in a global


def classes(place: TeacherPlace) -> LabelSpace | tuple[str, ...]:
    """The classes that the sidecar names. Raises BadTeacher."""
    return read_sidecar(place.path).classes


def load(place: TeacherPlace, *, device: torch.device) -> Model:
    """Read the program, as data, for a device. Raises BadTeacher with one line."""
    import torch
    from torch.utils import _pytree as pytree

    from autolabel.teacher.foreign.network_file import NetworkFile

    described = read_sidecar(place.path)
    program = clean(place.path)
    settled = fit(place.path, described, program.inputs, program.outputs)
    index = program.places[settled.place]
    try:
        with _one_at_a_time, _quiet():
            exported = torch.export.load(program.archive)
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            exported = move_to_device_pass(exported, str(device))
        module = exported.module()
    except Exception as error:  # torch raises whatever a graph that is wrong makes it stumble over
        raise BadTeacher(f"{place.path}: torch {torch.__version__} cannot load it: {_briefly(error)}") from error
    _require_repeatable(place, exported)

    def run(numbers: torch.Tensor) -> torch.Tensor:
        try:
            result = module(**{program.keyword: numbers}) if program.keyword else module(numbers)
        except (RuntimeError, AssertionError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or "memory" in str(error):
                raise
            shape = " x ".join(map(str, numbers.shape))
            raise BadTeacher(f"{place.path} cannot take images of {shape}: {_briefly(error)}") from error
        tensor: torch.Tensor = pytree.tree_leaves(result)[index]
        return tensor

    return NetworkFile(settled, run, device=device)


def _require_repeatable(place: TeacherPlace, exported: Any) -> None:
    """Raise BadTeacher for a program that draws random numbers, as dropout in training does."""
    import torch

    for module in exported.graph_module.modules():
        for node in module.graph.nodes:
            operator = node.target
            if isinstance(operator, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in operator.tags:
                names = [argument.name for argument in operator._schema.arguments]
                given = dict(zip(names, node.args, strict=False)) | node.kwargs
                off = [given.get(name, not given) for name in (*_DETERMINISTIC, "dropout_p") if name in names]
                if not off or any(off):
                    raise BadTeacher(
                        f"{place.path} draws random numbers ({operator}), as in training: export it after module.eval()"
                    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from logging tracebacks of what becomes one line here."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _briefly(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]
