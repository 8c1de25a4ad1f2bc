"""The PNGs that an adopted run is made of: which belongs to which sample, how they are read, whether they have changed.

adopted.parquet lists them, with a fingerprint of each: it stands beside the commit records, which know the images.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, json_of
from autolabel.manifests.images import BadImage, decode_label, require_size
from autolabel.manifests.label_space import IGNORE, LabelSpace
from autolabel.manifests.places import Places, places
from autolabel.manifests.reading import decode_photograph, read_coarse, read_file
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.run.shards import Label
from autolabel.manifests.samples import Sample
from autolabel.manifests.tables import BadTable, read_sealed, table_bytes
from autolabel.pipeline.posterior import KeptPosterior
from autolabel.pipeline.predictor import Decoded, Refused, Size
from autolabel.pipeline.records import Row, changed_images, identified
from autolabel.pipeline.units import Unit
from autolabel.teacher.counting import count
from autolabel.teacher.decide import Prediction, encode

TABLE = "adopted.parquet"
_KEY = b"adopted"
_FILE = [("name", pa.string()), ("bytes", pa.int64()), ("mtime_ns", pa.int64()), ("version", pa.string()),
         ("fingerprint", pa.string())]  # fmt: skip
_SCHEMA = pa.schema([("sample_id", pa.string()), ("png", pa.struct(_FILE)), ("confidence", pa.struct(_FILE)),
                     ("reason", pa.string())])  # fmt: skip


@dataclass(frozen=True)
class PngFile:
    """A file under one of the two folders: its path there, its stat, and a fingerprint of its content."""

    name: str
    bytes: int | None = None
    mtime_ns: int | None = None
    version: str | None = None
    fingerprint: str | None = None

    def as_row(self) -> Row:
        """Return its identity as a commit record has that of an image."""
        return Row(
            self.name, image_bytes=self.bytes, image_mtime_ns=self.mtime_ns, image_version=self.version,
            image_fingerprint=self.fingerprint,
        )  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A sample with its PNGs, None where there is none, and the reason why it cannot be labelled; empty if it can."""

    sample_id: str
    png: PngFile | None = None
    confidence: PngFile | None = None
    reason: str = ""

    def files(self) -> list[tuple[bool, PngFile]]:
        """Its files; True for the confidence."""
        return [(of, file) for of, file in ((False, self.png), (True, self.confidence)) if file is not None]


@dataclass(frozen=True)
class PngSource:
    """The folders of the PNGs and what their bytes mean.

    space, label_ids: the classes and the ids of the PNGs. targets: 256 bytes, the train id in the run's label space of
    every train id in `space`. confidence: folder of 8-bit confidences, None for 1 everywhere.
    """

    folder: Path
    space: LabelSpace
    label_ids: str
    targets: bytes
    confidence: Path | None = None

    def terms(self) -> dict[str, Any]:
        """Return, as JSON values, everything but the files that the labels depend on."""
        return {
            "label_ids": self.label_ids, "label_space": self.space.to_dict(), "confidence": self.confidence is not None,
        }  # fmt: skip

    def path(self, file: PngFile, *, confidence: bool) -> Path:
        """The place of a file. Raises ValueError for a name that leaves its folder."""
        return storage.under(self.confidence if confidence and self.confidence else self.folder, file.name)

    def read(self, entry: Entry, size: Size) -> tuple[Label, NDArray[np.float32], list[str]]:
        """Read a sample's PNGs: train ids (H, W) uint8, confidences (H, W) float32, and the files' fingerprints.

        Raises BadImage, naming the file, for another size, unknown ids, and what is no such PNG; OSError of the disk.
        """
        assert entry.png is not None
        label, mark = self._decoded(entry.png, size, space=self.space)
        ids = np.frombuffer(self.targets, np.uint8)[label]
        if self.confidence is None:
            return ids, np.ones(ids.shape, np.float32), [mark]
        if entry.confidence is None:
            raise BadImage(f"{self.path(entry.png, confidence=False)} has no confidence under {self.confidence}")
        levels, other = self._decoded(entry.confidence, size, space=None)
        return ids, levels.astype(np.float32) / np.float32(255), [mark, other]

    def _decoded(self, file: PngFile, size: Size, *, space: LabelSpace | None) -> tuple[Label, str]:
        path = self.path(file, confidence=space is None)
        try:
            data = read_file(path)
            pixels = decode_label(data, space, ids=self.label_ids if space else "train")
            require_size(pixels, size)
        except BadImage as error:
            error.args = (f"{path}: {error}", *error.args[1:])
            raise
        return pixels, storage.fingerprint_bytes(data)


def write_entries(run: RunFolder, source: PngSource, entries: Sequence[Entry]) -> None:
    """Write the table of a run, if it is another one than before."""
    rows = [
        {
            "sample_id": e.sample_id,
            "png": e.png and vars(e.png),
            "confidence": e.confidence and vars(e.confidence),
            "reason": e.reason,
        }
        for e in entries
    ]
    folders = {"folder": str(source.folder), "confidence_folder": source.confidence and str(source.confidence)}
    header = {_KEY: json.dumps({**folders, "terms": source.terms()}).encode()}
    data = table_bytes(pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata(header))
    path = run.path / TABLE
    if not storage.exists(path) or storage.read(path) != data:
        storage.write(path, data)


@dataclass(frozen=True)
class _Header:
    """The metadata of the table."""

    folder: Path
    confidence_folder: Path | None
    terms: dict[str, Any]


@dataclass(frozen=True)
class Adopted:
    """The table of a run: the samples by id, the two folders, and what the labels depend on beside the files."""

    entries: Mapping[str, Entry]
    folder: Path
    confidence: Path | None
    terms: Mapping[str, Any]

    @classmethod
    def of(cls, run: RunFolder) -> Adopted:
        """Read the table of a run. Raises BadTable if it is gone or damaged."""
        path = storage.inside(run.path, TABLE)
        if not storage.exists(path):
            raise BadTable(f"{path} does not exist: run the same `autolabel adopt` again")
        table = read_sealed(path, schema=_SCHEMA)
        try:
            header = json_of((table.schema.metadata or {}).get(_KEY, b""), _Header, name="its header")
        except BadDocument as error:
            raise BadTable(f"{path} is damaged ({error}): adopt into a new --out") from error
        entries = (
            Entry(row["sample_id"], _file(row["png"]), _file(row["confidence"]), row["reason"] or "")
            for row in table.to_pylist()
        )
        return cls({e.sample_id: e for e in entries}, header.folder, header.confidence_folder, header.terms)

    def changed(self, sample_ids: Iterable[str], *, read_all: bool) -> dict[Path, bool]:
        """The files of these samples that are others now, by path; False for one that is gone."""
        files: dict[str, Path] = {}
        rows: list[tuple[Path, Row]] = []
        for entry in (self.entries[name] for name in sample_ids if name in self.entries):
            for confidence, file in entry.files():
                folder = self.confidence if confidence and self.confidence else self.folder
                path = storage.under(folder, file.name)
                row = replace(file.as_row(), sample_id=f"{confidence}/{file.name}")
                files[row.sample_id] = path
                rows.append((path, row))
        return {files[name]: mark is not None for name, mark in changed_images(rows, read_all=read_all).items()}


def _file(values: dict[str, Any] | None) -> PngFile | None:
    return None if values is None else PngFile(**values)


class AdoptedPredictor:
    """PNGs of another tool as predictions, of confidence 1 or of that in other PNGs; no network is asked.

    Polygons are weighed from the confidence alone: what it leaves to other classes is spread over them evenly.
    """

    device = "cpu"

    def __init__(self, source: PngSource, entries: Mapping[str, Entry], recipe: Recipe) -> None:
        self.source, self.entries, self.recipe = source, entries, recipe
        edges = recipe.confidence_edges or recipe.policy.edges(recipe.label_space)
        self.edges = tuple(sorted({0.0, *edges}))  # level 0 is for pixels without a class
        evidence, sure = recipe.policy.polygons, np.arange(256) / 255
        sure[-1] = 1 - 1 / 1024  # all that rounds to 255 is not 1
        self._posterior: KeptPosterior | None = None
        if evidence is not None:
            self._posterior = KeptPosterior(evidence, recipe.label_space, sure, silent=True)

    def decode(self, sample: Sample, unit: Unit, row: Row) -> Decoded | Refused:
        """Read the photograph, which has to be one of the manifest's size, and the coarse label."""
        row = identified(row, sample.image)
        try:
            data = read_file(sample.image)
            row = replace(row, image_fingerprint=storage.fingerprint_bytes(data))
            decode_photograph(sample, data)
            space, weighed = self.recipe.label_space, self._posterior is not None
            coarse = read_coarse(sample, space, drawn_void=weighed)
            around = places(coarse, len(space)) if weighed and coarse is not None else None
        except BadImage as error:
            return Refused(row, str(error))
        except MemoryError:
            return Refused(row, "not enough memory to decode it")
        reason = self.entries[sample.sample_id].reason
        return Refused(row, reason) if reason else Decoded(row, coarse=coarse, places=around)

    def predict(self, batch: Sequence[Decoded]) -> list[Prediction]:
        """Read the PNGs. Raises BadImage if one cannot be used, or is another one than was checked."""
        return [self._prediction(decoded.row, decoded.places) for decoded in batch]

    def _prediction(self, row: Row, place: Places | None) -> Prediction:
        entry, classes = self.entries[row.sample_id], len(self.recipe.label_space)
        label, confidences, marks = self.source.read(entry, (row.height, row.width))
        for mark, (of_confidence, file) in zip(marks, entry.files(), strict=True):
            if mark != file.fingerprint:
                path = self.source.path(file, confidence=of_confidence)
                raise BadImage(f"{path} has changed since it was checked: run the same again")
        ignored = (label == IGNORE) | (confidences == 0)
        # A code has room for classes alone: the commonest one, at level 0, stands for none, and is not counted.
        commonest = int(np.bincount(label[~ignored], minlength=1).argmax())
        top = np.where(ignored, np.uint8(commonest), label)
        sure = np.where(ignored, np.float32(0), confidences)
        own = None
        if place is not None and self._posterior is not None:
            own = encode(torch.from_numpy(top), torch.from_numpy(sure), classes=classes, edges=self.edges).numpy()
            level = np.rint(sure * 255).astype(np.uint8)
            pixels, winners, p = self._posterior(top, level, place)
            top, sure = top.copy(), sure.copy()
            top.ravel()[pixels], sure.ravel()[pixels] = winners, p
        classes_of, confidence = torch.from_numpy(top), torch.from_numpy(sure)
        histogram, sums = count(classes_of, confidence, classes=classes)
        histogram[commonest, 0] -= int(ignored.sum())
        codes = encode(classes_of, confidence, classes=classes, edges=self.edges)
        probability = np.rint(255 * sure).astype(np.uint8) if self.recipe.keep_probability else None
        return Prediction(codes.numpy(), len(self.edges) + 1, histogram.numpy(), sums.numpy(), own, probability)

    def planned_batch(self, size: Size) -> int:
        """Samples are read one by one."""
        return 1

    def in_flight(self, size: Size, *, most: int) -> int:
        """Every thread may read one sample."""
        return most

    def budget(self) -> dict[str, Any]:
        """Say where the labels come from, and what is known of their confidence."""
        known = f"confidence of {self.source.confidence}" if self.source.confidence else "confidence 1 everywhere"
        return {"device": f"labels adopted from {self.source.folder}", "precision": known}
