"""The names of teachers: which kind each is, which files it consists of, and what tells it from others.

    teacher.pt, teacher.safetensors    a checkpoint of ours, or a published one
    FOLDER, hf:FOLDER                  a model of transformers
    hf:ORG/NAME, hf:ORG/NAME@REVISION  the same from the hub of Hugging Face
    net.pt2                            a program of torch.export
    net.onnx                           a network for onnxruntime
    my_teacher.py:Teacher              a class of one's own, which is run

Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from os import PathLike
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, read_toml
from autolabel.manifests.label_space import BUILT_IN
from autolabel.manifests.locations import BucketPath, location
from autolabel.manifests.onnx_file import read_onnx
from autolabel.manifests.policy import SCALES
from autolabel.manifests.wording import reason

CHECKPOINT, TRANSFORMERS, EXPORTED, ONNX, PYTHON = "checkpoint", "transformers", "torch.export", "onnx", "python"
_HUB = "hf:"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_READ = (".json", ".safetensors")  # the ends of all files of transformers that are read
_WORDS = "merges.txt"  # but for this one, of some tokenizers


class BadTeacher(ValueError):
    """A teacher that cannot be used; the message names it, what was expected and what to do."""


@dataclass(frozen=True)
class TeacherPlace:
    """One teacher: its kind, its file or folder, and for a class of one's own the name of the class.

    revision: of a model on the hub, whose path is its name there; "" for files of one's own.
    """

    kind: str
    path: Path
    name: str = ""
    revision: str = ""

    @classmethod
    def of(cls, spelling: str | PathLike[str]) -> TeacherPlace:
        """The place that a person has typed, whether there is anything or not."""
        text = str(spelling)
        if text.startswith(_HUB):
            path = location(text.removeprefix(_HUB))
            name, _, revision = text.removeprefix(_HUB).partition("@")
            if _HUB_NAME.fullmatch(name) and not storage.is_folder(path):
                return cls(TRANSFORMERS, Path(name), revision=revision or "main")
            return cls(TRANSFORMERS, path)
        file, colon, name = text.rpartition(":")
        if colon and file.endswith(".py"):
            return cls(PYTHON, location(file), name)
        path = location(text)
        if storage.is_folder(path):
            return cls(TRANSFORMERS, path)
        return cls({".pt2": EXPORTED, ".onnx": ONNX, ".py": PYTHON}.get(path.suffix, CHECKPOINT), path)

    def __str__(self) -> str:
        if self.kind == PYTHON and self.name:
            return f"{self.path}:{self.name}"
        if self.revision:
            return f"{_HUB}{self.path.as_posix()}@{self.revision}"
        return f"{_HUB}{self.path}" if self.kind == TRANSFORMERS else str(self.path)

    def absolute(self) -> TeacherPlace:
        """Return it with an absolute path, or pinned to the commit that its revision stands for. Raises BadTeacher."""
        if self.revision:
            return replace(self, revision=self.folder().name)
        return replace(self, path=self.path.absolute())

    def folder(self) -> Path:
        """The folder with the files of a model of transformers; those of the hub are fetched. Raises BadTeacher."""
        return _snapshot(self.path.as_posix(), self.revision) if self.revision else self.path

    def near(self) -> TeacherPlace:
        """Return it where libraries can open it: files in a bucket are copied to this machine, once in a process."""
        return replace(self, path=_copied(self)) if isinstance(self.path, BucketPath) else self

    def files(self) -> list[Path]:
        """The files on which its labels depend, sorted; empty if there is no such teacher."""
        if self.kind == TRANSFORMERS:
            return [path for path in storage.list(self.folder()) if path.suffix in _READ or path.name == _WORDS]
        beside = _beside(self.path) if self.kind in (EXPORTED, ONNX) else []
        weights = _weights(self.path) if self.kind == ONNX else []
        return [path for path in sorted({self.path, *beside, *weights}) if storage.exists(path)]

    def require_files(self) -> list[Path]:
        """Return `files`. Raises BadTeacher if there are none."""
        files = self.files()
        if not files:
            if storage.is_folder(self.path):
                raise BadTeacher(
                    f"{self} has no config.json: expected a folder that save_pretrained of transformers wrote"
                )
            like_on_hub = self.kind == CHECKPOINT and len(self.path.parts) == 2
            on_hub = f"; a model on the hub of Hugging Face is hf:{self}" if like_on_hub else ""
            raise BadTeacher(
                f"{self} does not exist: expected a checkpoint, or another teacher of docs/teachers.md{on_hub}"
            )
        return files

    def digest(self) -> str:
        """The sha256 of its file, or of the names and sha256 of its files. Raises BadTeacher if there are none."""
        files = self.require_files()
        if self.kind in (CHECKPOINT, PYTHON):
            return storage.sha256(files[0])
        return _joint(f"{path.name} {storage.sha256(path)}" for path in files)


@dataclass(frozen=True)
class TeacherName:
    """A teacher as it is named: one place, or several, whose probabilities are averaged."""

    places: tuple[TeacherPlace, ...]

    @classmethod
    def of(cls, teacher: AnyTeacher) -> TeacherName:
        """The name that a person has typed: one spelling, or several."""
        if isinstance(teacher, TeacherName):
            return teacher
        spellings = [teacher] if isinstance(teacher, str | PathLike) else list(teacher)
        return cls(tuple(TeacherPlace.of(spelling) for spelling in spellings))

    def __str__(self) -> str:
        return " + ".join(self.spellings)

    @property
    def spellings(self) -> list[str]:
        """Its places as a person types them."""
        return [str(place) for place in self.places]

    def absolute(self) -> TeacherName:
        """Return it with absolute paths."""
        return TeacherName(tuple(place.absolute() for place in self.places))

    @property
    def all_ours(self) -> bool:
        """True if all of its networks are ours."""
        return all(place.kind == CHECKPOINT for place in self.places)

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales at which it labels unless others are asked for; only our own networks are made for several."""
        return SCALES if self.all_ours else (1.0,)

    @property
    def runs_code(self) -> bool:
        """True if it has a class of one's own, which runs only where a person names it."""
        return any(place.kind == PYTHON for place in self.places)

    def exists(self) -> bool:
        """True if all of its files and folders are there."""
        return all(place.files() for place in self.places)

    def digest(self) -> str:
        """The digest of one teacher, or that of the digests of several; "" for none. Raises BadTeacher."""
        if not self.places:
            return ""
        digests = [place.digest() for place in self.places]
        return digests[0] if len(digests) == 1 else _joint(digests)


def _beside(network: Path) -> list[Path]:
    """Sidecar and label space of a network; not the list of what it was trained on, on which no label depends."""
    sidecar = network.with_suffix(".toml")
    try:
        classes = read_toml(sidecar).get("classes")
    except (BadDocument, OSError):  # whoever loads the network says so
        return [sidecar]
    if not isinstance(classes, str) or classes in BUILT_IN or "\0" in classes:
        return [sidecar]
    return [sidecar, sidecar.parent / classes]


@lru_cache
def _snapshot(name: str, revision: str) -> Path:
    """Return the folder of one commit, which bears the commit's name, in the cache of huggingface_hub."""
    where = f"{_HUB}{name}@{revision}"
    try:
        hub, bars = importlib.import_module("huggingface_hub"), importlib.import_module("huggingface_hub.utils")
    except ImportError as error:
        raise BadTeacher(f"{where}: needs the package huggingface_hub: pip install 'autolabel[hf]'") from error
    shown = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        wanted = [*(f"*{end}" for end in _READ), _WORDS]
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # no network, no such name, no permission, a full disk: each has errors of its own
        raise BadTeacher(
            f"{where}: there is no folder {name}, and the hub of Hugging Face does not give a model of that name:"
            f" {reason(error)}"
        ) from error
    finally:
        if shown:
            bars.enable_progress_bars()


_scratch: list[tempfile.TemporaryDirectory[str]] = []  # removed when this process ends


@lru_cache(8)
def _copied(place: TeacherPlace) -> Path:
    """The place of copies of all files of a teacher. Raises BadTeacher if there are none."""
    _scratch.append(tempfile.TemporaryDirectory(prefix="autolabel-teacher-"))
    folder = place.path if storage.is_folder(place.path) else place.path.parent
    here = Path(_scratch[-1].name)
    for file in place.require_files():
        storage.copy(file, here / file.relative_to(folder).as_posix())
    return here if folder == place.path else here / place.path.name


def _weights(network: Path) -> list[Path]:
    """Files in a network's folder that hold weights of it; whoever loads it refuses others."""
    try:
        return [storage.inside(network.parent, name) for name in read_onnx(network).external]
    except (ValueError, OSError):
        return []


AnyTeacher = TeacherName | str | PathLike[str] | Iterable[str | PathLike[str]]  # what a person or a caller may name


def _joint(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
