"""Label PNGs that people have edited, or put, where a run keeps its own: nothing readable is overwritten unseen.

A labelling tool saves where it has read. So whoever writes a label PNG into a run looks first, where a file exists that
is not the run's own work: a picture that is whole goes into the folder `by-hand` before it is replaced. A picture that
is damaged was half written or has rotted, and nobody misses it.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from autolabel.manifests import storage
from autolabel.manifests.formats.png_back import decode_edited
from autolabel.manifests.headers import BadImage, pixels_only, read_header
from autolabel.manifests.images import PNG_END, decode_label
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.run.labels import LABELS, in_layer, take_over
from autolabel.manifests.run.shards import Label, crc32c
from autolabel.manifests.wording import counted, listed

BY_HAND = "by-hand"  # the folder in a run for labels that lay where the run wrote its own; then "by-hand-2", …
_FOLDER = re.compile(rf"{BY_HAND}(-[0-9]+)?")


def is_whole_picture(data: bytes) -> bool:
    """True if these are the bytes of a picture of any kind, whole to its end: some program has written them so."""
    try:
        header = read_header(io.BytesIO(data))
        pixels_only(data, header)  # compares the checksums of a PNG
    except BadImage:
        return False
    return header.format != "PNG" or PNG_END in data


def edited_label(data: bytes, space: LabelSpace, size: tuple[int, int]) -> Label | None:
    """The label (H, W) uint8 that a program has saved, maybe in colours; None for anything else, or another size."""
    try:
        label = decode_edited(data, space)
    except BadImage:
        return None
    return label if label.shape == size else None


def write_maps(run: RunFolder, place: str, maps: Mapping[str, bytes], known: Collection[int | None]) -> None:
    """Write the PNGs of a sample, by layer; `place` is that of its label in the run.

    A whole picture that lies in the label's place goes into `by-hand` first, unless it is the same, or the crc32c of
    its pixels is `known` to be the run's own.
    """
    for layer, data in maps.items():
        folder, _, name = in_layer(place, layer).rpartition("/")
        file = storage.inside(run.path, folder) / name
        if layer == LABELS:
            _write_label(run, place, file, data, known)
        else:
            storage.write(file, data)


def _write_label(run: RunFolder, place: str, file: Path, data: bytes, known: Collection[int | None]) -> None:
    if storage.stat(file) is not None and not storage.is_link(file):
        there = storage.read(file)
        if there == data:
            return
        checksum = _checksum(there)
        if is_whole_picture(there) and (checksum is None or checksum not in known):
            _set_aside(run, place, there)
    storage.write(file, data)


def _checksum(data: bytes) -> int | None:
    """The crc32c of a label's pixels, None of a picture that is no label."""
    try:
        return crc32c(decode_label(data, None))
    except BadImage:
        return None


def _set_aside(run: RunFolder, place: str, data: bytes) -> None:
    name = PurePosixPath(place).relative_to(LABELS)
    for number in itertools.count(1):  # another picture of this name goes into another folder, so that it is imported
        kept = PurePosixPath(BY_HAND if number == 1 else f"{BY_HAND}-{number}") / name
        file = storage.inside(run.path, kept.parent.as_posix()) / kept.name
        if storage.create(file, data) or storage.read(file) == data:
            return


def set_aside(run: RunFolder) -> str:
    """A sentence about the labels that were set aside in a run, empty if there are none."""
    folders = [path for path in storage.list(run.path) if _FOLDER.fullmatch(path.name)]
    folders.sort(key=lambda path: (len(path.name), path.name))
    count = sum(len(storage.list(folder, recursive=True)) for folder in folders)
    if not count:
        return ""
    return (
        f"{counted(count, 'label')} that this program had not written {'lies' if count == 1 else 'lie'} in"
        f" {listed([*map(str, folders)])}, from where the run has its own: {take_over(run.path, *folders)}"
    )
