"""A class of one's own as a teacher: `my_teacher.py:Teacher`. It runs code, so it is asked for by that spelling only.

The class is made as `Teacher(device)` or `Teacher()` and has what `teacher.model.Model` says: `classes` and `predict`;
`gives`, `fixed_size` and `trained_on` have defaults, and `trained_on` may be the path of a manifest. Modules beside the
file can be imported while it loads. The file's sha256 belongs to the recipe; that of what it imports or reads does not.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from autolabel.manifests import storage
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.samples import fingerprints, load_manifest
from autolabel.manifests.teachers import BadTeacher, TeacherPlace
from autolabel.manifests.wording import kind_and_reason
from autolabel.teacher.checkpoints import fingerprint_tensor
from autolabel.teacher.memory import is_memory_error
from autolabel.teacher.model import Gives, Model
from autolabel.teacher.networks.fields import Field, Size

_LOADING = threading.RLock()  # the search path for modules belongs to the process
_LOADED: dict[tuple[Path, str], ModuleType] = {}  # by file and digest: code runs once in a process
_BESIDE: dict[str, Path] = {}  # modules that lay beside a teacher, and their folder


@dataclass(frozen=True)
class PythonModel(Model):
    """An object of the user's class, checked."""

    place: TeacherPlace
    own: Any
    classes: tuple[str, ...] | LabelSpace
    gives: Gives
    fixed_size: Size | None
    trained_on: Tensor | None

    def predict(self, images: Tensor) -> Tensor | Field:
        """Call the user's method. Raises BadTeacher with file and line of an exception in it."""
        try:
            return self.own.predict(images)  # type: ignore[no-any-return]
        except (torch.AcceleratorError, BadTeacher):
            raise
        except Exception as error:
            if isinstance(error, (RuntimeError, MemoryError)) and is_memory_error(error):
                raise
            raise _failed(self.place, "cannot predict an image", error) from error


def classes(place: TeacherPlace) -> LabelSpace | tuple[str, ...]:
    """Return the classes that the user's class names: its own, or else those of an object of it. Raises BadTeacher."""
    kind = _kind(place)
    own = getattr(kind, "classes", None)
    if not isinstance(own, (LabelSpace, list, tuple)):
        own = getattr(_made(place, kind, torch.device("cpu")), "classes", None)
    return _classes(place, own)


def load(place: TeacherPlace, *, device: torch.device) -> Model:
    """Run the file and make an object of the class. Raises BadTeacher, one line, for whatever is wrong with it."""
    own = _made(place, _kind(place), device)
    if not callable(getattr(own, "predict", None)):
        raise BadTeacher(f"{place} has no method predict: expected predict(images), see docs/teachers.md")
    gives = getattr(own, "gives", "logits")
    if gives not in get_args(Gives):
        raise BadTeacher(f"{place} gives {gives!r}: expected {', '.join(map(repr, get_args(Gives)))}")
    names = _classes(place, getattr(own, "classes", None))
    trained_on = _trained_on(place, getattr(own, "trained_on", None))
    fixed_size = _fixed_size(place, getattr(own, "fixed_size", None))
    return PythonModel(place, own, names, cast(Gives, gives), fixed_size, trained_on)


def _classes(place: TeacherPlace, own: object) -> LabelSpace | tuple[str, ...]:
    if isinstance(own, LabelSpace):
        return own
    if own is None:
        raise BadTeacher(f"{place} has no classes: expected their names by channel, such as classes = ['road', 'car']")
    if isinstance(own, str) or not isinstance(own, Sequence) or not all(isinstance(name, str) for name in own):
        raise BadTeacher(f"classes of {place} is {_short(own)}: expected names by channel, such as ['road', 'car']")
    if not own:
        raise BadTeacher(f"{place} names no classes: expected their names by channel, such as ['road', 'car']")
    twice = next((name for place_, name in enumerate(own) if name in own[:place_]), None)
    if twice is not None:
        raise BadTeacher(f"{place} names the class {twice!r} twice: expected each name once")
    return tuple(own)


def _fixed_size(place: TeacherPlace, own: object) -> Size | None:
    if own is None:
        return None
    if isinstance(own, (list, tuple)) and len(own) == 2 and all(type(side) is int and side > 0 for side in own):
        return own[0], own[1]
    raise BadTeacher(f"fixed_size of {place} is {_short(own)}: expected height and width in pixels, or None")


def _trained_on(place: TeacherPlace, own: object) -> Tensor | None:
    """The marks of the images that the teacher has seen: its own tensor, or those of the manifest that it names."""
    if own is None:
        return None
    if isinstance(own, (str, Path)):
        path = place.path.parent / own
        try:
            return fingerprint_tensor(fingerprints(load_manifest(path).samples))
        except (ValueError, OSError) as error:
            raise BadTeacher(f"{place} was trained on {path}, which cannot be read: {error}") from error
    if isinstance(own, Tensor) and own.dtype == torch.int64 and own.ndim == 1:
        return torch.unique(own.cpu()) if len(own) else None
    raise BadTeacher(
        f"trained_on of {place} is {_short(own)}: expected the path of a manifest, int64 marks of shape (N,), or None"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _made(place: TeacherPlace, kind: type[Any], device: torch.device) -> Any:
    """An object of the user's class, on a device."""
    try:
        parameters = [p for p in inspect.signature(kind).parameters.values() if p.kind != p.VAR_KEYWORD]
    except (TypeError, ValueError):
        parameters = []
    required = [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL]
    named = next((p for p in parameters if p.name == "device"), None)
    if len(required) > 1 or (required and named is not None and required != ["device"]):
        raise BadTeacher(
            f"{place} needs {', '.join(required)} to be made: expected {place.name}(device) or {place.name}()"
        )
    try:
        with _beside(place.path.parent):
            own = kind(device=device) if named is not None else kind(device) if required else kind()
            return own.to(device).eval() if isinstance(own, nn.Module) else own
    except (Exception, SystemExit) as error:
        if isinstance(error, (RuntimeError, MemoryError)) and is_memory_error(error):
            raise
        raise _failed(place, "cannot be made", error) from error


def _kind(place: TeacherPlace) -> type[Any]:
    """The user's class. Raises BadTeacher if there is no such file or class, or the file cannot be run."""
    if not storage.exists(place.path):
        raise BadTeacher(f"{place.path} does not exist: expected a file of Python with the class {place.name or '…'}")
    source = storage.read(place.path)
    try:
        tree = ast.parse(source, str(place.path))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise BadTeacher(f"{place.path} is no Python of this version: {str(error).splitlines()[0]}{line}") from error
    known = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    if not place.name:
        example = known[0] if known else "Teacher"
        raise BadTeacher(f"{place.path} is code, which runs only if a class is named: type {place.path}:{example}")
    found = getattr(_module(place, source), place.name, None)
    if not isinstance(found, type):
        close = difflib.get_close_matches(place.name, known, n=1) or known
        hint = f"did you mean {place.path}:{close[0]}?" if close else "expected a class with classes and predict"
        raise BadTeacher(f"{place.path} has no class {place.name!r}: {hint}")
    return found


def _module(place: TeacherPlace, source: bytes) -> ModuleType:
    """Run a file, once in this process, as a module whose name nobody else has."""
    path, digest = place.path.absolute(), place.digest()
    with _LOADING:
        if (path, digest) in _LOADED:
            return _LOADED[path, digest]
        module = ModuleType(f"_autolabel_teacher_{digest[:12]}_{len(_LOADED)}")
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        try:
            with _beside(path.parent):
                exec(compile(source, str(path), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module.__name__]
            raise _failed(place, "cannot be loaded", error) from error
        _LOADED[path, digest] = module
        return module


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[None]:
    """Meanwhile modules in a folder can be imported, and those beside another teacher are out of the way."""
    folder = folder.absolute()
    with _LOADING:
        for name, other in list(_BESIDE.items()):
            if other != folder:
                sys.modules.pop(name, None)
                del _BESIDE[name]
        before = set(sys.modules)
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path.remove(str(folder))
            for name in set(sys.modules) - before:
                file = getattr(sys.modules[name], "__file__", None)
                if file and folder in Path(file).parents and not name.startswith("_autolabel_teacher_"):
                    _BESIDE[name] = folder


def _failed(place: TeacherPlace, what: str, error: BaseException) -> BadTeacher:
    """One line for an exception of the user's code: its kind, its first line, and the user's own file and line."""
    return BadTeacher(
        f"{place} {what}: {kind_and_reason(error)}{_where(error.__traceback__, place.path.parent.absolute())}"
    )


def _where(trace: TracebackType | None, folder: Path) -> str:
    """The innermost line of a traceback in files of a folder, as " (FILE, line N)"; empty if there is none."""
    where = ""
    while trace is not None:
        file = Path(trace.tb_frame.f_code.co_filename)
        if folder in file.parents and "site-packages" not in file.parts:
            where = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return where
