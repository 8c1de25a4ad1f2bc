"""The place of a run folder: it lies in no other run, and no link leads out of it."""

from __future__ import annotations

from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.locations import BucketPath
from autolabel.manifests.run.labels import LAYERS

RUN = "run.json"
KIND = "autolabel-run/"  # begins the format in every version of that file


def require_outside_runs(folder: Path) -> None:
    """Raise ValueError if a folder is a run or lies in one: a run looks after all that is in it."""
    for place in (folder.absolute(), *folder.absolute().parents, *folder.resolve().parents):
        record = place / RUN
        if storage.stat(record) and KIND.encode() in storage.read(record, at_most=storage.SMALL):
            raise ValueError(f"{place} is a run: choose an --out outside it")


def require_no_links(run: Path) -> None:
    """Raise ValueError for a link among the files of a run, or among those of its folders.

    The folders of PNG labels may be large and deep: `storage.inside` looks at each label's way instead. A bucket has
    no links, and its objects are not listed for them.
    """
    if isinstance(run, BucketPath):
        return
    for path in storage.list(run):
        storage.require_no_link(path)
        if storage.is_folder(path) and path.name not in LAYERS:
            for below in storage.list(path):
                storage.require_no_link(below)
