"""Programs of torch.export, `net.pt2`, as teachers. docs/teachers.md says what loading one can execute: nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.manifests.wording import reason
from autolabel.teacher.foreign.archive import clean
from autolabel.teacher.foreign.ports import fit
from autolabel.teacher.foreign.sidecar import read_sidecar

if TYPE_CHECKING:
    import torch

    from autolabel.teacher.model import Model

_LOGGERS = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")
_SWITCHES = ("train", "training", "dropout_p")  # arguments of operators that draw random numbers only in training
_one_at_a_time = threading.Lock()  # torch keeps the program that it reads in a global


def classes(place: TeacherPlace) -> LabelSpace | tuple[str, ...]:
    """The classes that the sidecar names. Raises BadTeacher."""
    return read_sidecar(place.path).classes


def load(place: TeacherPlace, *, device: torch.device) -> Model:
    """Read the program, as data, for a device. Raises BadTeacher with one line."""
    import torch
    from torch.utils import _pytree as pytree

    from autolabel.teacher.foreign.network_file import NetworkFile
    from autolabel.teacher.memory import is_memory_error

    if torch.torch_version.TorchVersion(torch.__version__) < "2.9":
        raise BadTeacher(f"{place.path} needs torch 2.9 or newer, whose files hold weights as bytes: install that")
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
            if isinstance(error, RuntimeError) and is_memory_error(error):
                raise
            shape = " x ".join(map(str, numbers.shape))
            raise BadTeacher(f"{place.path} cannot take images of {shape}: {_briefly(error)}") from error
        tensor: torch.Tensor = pytree.tree_leaves(result)[index]
        return tensor

    return NetworkFile(settled, run, device=device)


def _require_repeatable(place: TeacherPlace, exported: Any) -> None:
    """Raise BadTeacher for a program that changes itself or draws random numbers, as in training."""
    import torch

    signature = exported.graph_signature
    own = {*signature.inputs_to_parameters, *signature.inputs_to_buffers, *signature.inputs_to_lifted_tensor_constants}
    for module in exported.graph_module.modules():
        for node in module.graph.nodes:
            operator = node.target
            if not isinstance(operator, torch._ops.OpOverload):
                continue
            arguments = operator._schema.arguments
            given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
            changed = [given.get(argument.name) for argument in arguments if argument.is_write]
            if any(getattr(value, "name", "") in own for value in changed):
                raise BadTeacher(
                    f"{place.path} changes its own weights or statistics ({operator}), as in training: export it after"
                    " module.eval()"
                )
            if torch.Tag.nondeterministic_seeded in operator.tags:
                switches = [name for name in _SWITCHES if any(name == argument.name for argument in arguments)]
                if not switches or any(given.get(name, name != "dropout_p") for name in switches):
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
    return lines[0][:300] if lines and not isinstance(error, KeyError) else reason(error)
