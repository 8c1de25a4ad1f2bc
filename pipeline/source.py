"""The input of a labelling run: a manifest, or a folder of images, whose manifest is then kept in the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from autolabel.manifests import storage
from autolabel.manifests.account import Account
from autolabel.manifests.label_space import BUILT_IN, LabelSpace
from autolabel.manifests.run.folder import RunFolder
from autolabel.manifests.samples import Manifest, save_manifest
from autolabel.manifests.scan import scan
from autolabel.manifests.teachers import TeacherName
from autolabel.manifests.wording import Progress
from autolabel.pipeline.lock import Lock
from autolabel.teacher.loading import classes_of


def manifest_of(
    source: Path,
    out: Path,
    *,
    teacher: TeacherName,
    label_space: LabelSpace | None = None,
    mapped: bool = False,
    part: tuple[int, int] | None = None,
    progress: Progress | None = None,
    on_account: Callable[[Account], None] = lambda account: None,
) -> Path:
    """Return the manifest to label: `source` itself, or for a folder the manifest of its images, written into `out`.

    The classes are `label_space`, or those that the teacher names, unless they are `mapped` onto others. A folder is
    scanned again by every call, so that images which it has gained are labelled too; but not while another part of the
    run is at work. on_account: called with what the scan of a folder found and left aside. Raises ValueError for a
    source that does not exist, is a run, or cannot be scanned, and if nobody names the classes.
    """
    if storage.exists(source):
        if label_space is not None:
            raise ValueError(f"--label-space is for a folder of images: the manifest {source} names its own classes")
        return source
    if not storage.is_folder(source):
        raise ValueError(f"{source} does not exist: expected a folder of images, or a manifest")
    if RunFolder(source).exists():
        raise ValueError(
            f"{source} is a run: expected a folder of images, or a manifest such as {RunFolder(source).manifest_path}"
        )
    folder = RunFolder(out)
    folder.require_new_or_run()
    space = label_space or _classes_of(teacher, source, mapped=mapped)
    manifest, account = scan(source, label_space=space, progress=progress)
    on_account(account)
    with Lock(out, part).held() as lock:
        if lock.alone or not storage.exists(folder.input_path):
            folder.claim()
            save_manifest(folder.input_path, _rooted(manifest, source.absolute()))
    return folder.input_path


def _classes_of(teacher: TeacherName, source: Path, *, mapped: bool) -> LabelSpace:
    if mapped:
        raise ValueError(f"--classes leads to a label space: name it with --label-space to label {source}")
    space = classes_of(teacher)
    if space is None:
        raise ValueError(
            f"{teacher} does not name its classes: give --label-space ({', '.join(BUILT_IN)}, or a JSON file) to label"
            f" {source}"
        )
    return space


def _rooted(manifest: Manifest, root: Path) -> Manifest:
    """The manifest with this root, which stays the same when the folder gains images in other folders of it."""
    return replace(manifest, image_root=root, label_root=root)
