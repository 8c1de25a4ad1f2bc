"""An import that is asked for: what its result depends on, whether it was done before, and where it may be written."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.corrected import CorrectedFolder
from autolabel.manifests.documents import read_json
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.samples import open_manifest
from autolabel.manifests.tables import BadTable
from autolabel.manifests.walk import files_under
from autolabel.pipeline.imported import KEY, Imported

_FORMAT = "autolabel-import/1"


@dataclass(frozen=True)
class Terms:
    """The meaning of what comes back.

    partial: pixels without a class are as the machine had them; only the others are a person's. only_changed: images in
    which nothing was changed are left out; else they are confirmed. label_ids: what PNGs hold, None to find out.
    suffix: the end of their names that is no part of the images'.
    """

    partial: bool = False
    only_changed: bool = False
    label_ids: str | None = None
    suffix: str = ""


def require_place(out: Path, paths: Sequence[Path]) -> None:
    """Raise ValueError for an output in a run or in what is imported, and for a path that is not there."""
    require_outside_runs(out.parent)
    for place, path in enumerate(paths):
        if not (storage.is_folder(path) or storage.exists(path)):
            raise ValueError(f"{path} does not exist: expected a file or a folder of corrected labels")
        if out.resolve().is_relative_to(path.resolve()):
            raise ValueError(f"-o {out} lies in {path}, which is to be imported: choose another place")
        if path.resolve() in [other.resolve() for other in paths[:place]]:
            raise ValueError(f"{path} is named twice: name every path once")


def request_of(reads: str, paths: Sequence[Path], *, run: Run, terms: Terms) -> dict[str, Any]:
    """Everything that the result depends on, as JSON values: two calls with an equal request give the same bytes."""
    recipe = hashlib.sha256(storage.json_bytes(run.recipe.to_dict())).hexdigest()
    files = [{"path": str(path.absolute()), **_digest(path)} for path in paths]
    return {"recipe_sha256": recipe, "input_sha256": run.input_sha256, "reads": reads, **asdict(terms), "files": files}


def _digest(path: Path) -> dict[str, Any]:
    """Number of files, and sha256: of a file, or of the lines of sha256sum for several files, in order of their names.

    Masks lie in a folder beside a panoptic file of COCO, under its name.
    """
    beside = path.with_suffix("") if path.suffix.lower() == ".json" else path
    if not storage.is_folder(beside):
        return {"number": 1, "sha256": storage.sha256(path)}
    digest, files = hashlib.sha256(), [*([path] if beside != path else []), *files_under(beside)]
    root = path if beside == path else path.parent
    with ThreadPoolExecutor(cores()) as pool:
        for file, sha256 in zip(files, ahead(pool, storage.sha256, files, 4 * cores()), strict=True):
            digest.update(f"{sha256}  {file.relative_to(root).as_posix()}\n".encode(errors="surrogateescape"))
    return {"number": len(files), "sha256": digest.hexdigest()}


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    """A request without what may differ between equal ones: date, places of the files, and what was found."""
    files = [{key: value for key, value in entry.items() if key != "path"} for entry in record.get("files", ())]
    return {key: value for key, value in record.items() if key not in ("date", "found", "format")} | {"files": files}


def done_before(out: Path, request: dict[str, Any]) -> Imported:
    """The corrections that were imported before. Raises ValueError if they are others."""
    try:
        imported, earlier = Imported.read(out), open_manifest(out).provenance[KEY]
    except BadTable as error:
        raise ValueError(f"-o {out} exists and holds no corrections: choose another name") from error
    if _comparable(earlier) != _comparable(request):
        raise ValueError(
            f"-o {out} holds corrections of other files, or asked for differently: choose another name;"
            " `autolabel manifest fuse` takes several manifests"
        )
    return imported


def claim(folder: CorrectedFolder, request: dict[str, Any]) -> dict[str, Any]:
    """Make the folder this import's. Raises ValueError if it holds something else."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"format": _FORMAT, **request, "date": now}
    if storage.exists(folder.record):
        earlier: dict[str, Any] = read_json(folder.record, dict[str, Any])
        if _comparable(earlier) == _comparable(request):
            return earlier  # a call that was killed
        raise ValueError(
            f"{folder.path} holds the beginning of another import, which was stopped: remove it, or choose another -o"
        )
    if storage.list(folder.path):
        raise ValueError(f"{folder.path}, where the labels would go, is not empty: choose another -o")
    if not storage.create(folder.record, storage.json_bytes(record)):
        raise ValueError(f"another import writes to {folder.path}: wait for it, or choose another -o")
    return record
