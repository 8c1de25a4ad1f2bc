"""A run folder: what it was asked for, and whether that is still what is asked.

run.json            what was asked, with which versions; and, at the end, the accounts
plan-*.arrow        which sample belongs to which unit (pipeline/units.py)
labels.zarr/ or labels/    see manifests/run/labels.py
units/*.parquet     the commit records: the only truth about what is done (pipeline/records.py)
attempts/*.jsonl    units under way
stats/*.parquet, manifest.parquet, quarantine.parquet    derived from the records when the run ends
progress.json       live counters
audit.json, suggested.toml    what the labels are worth, and a policy from it (pipeline/analysis/audit.py)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import google_crc32c

from autolabel.manifests import storage
from autolabel.manifests.policy import differences

FORMAT = "autolabel-run/3"
RUN = "run.json"
About = dict[str, Any]


def read_about(run: Path) -> About:
    """`run.json`. Raises FileNotFoundError if this is no run, ValueError if it is damaged."""
    path = run / RUN
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run: it has no {RUN}; make one with `autolabel generate`")
    data = path.read_bytes()
    try:
        about = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: restore it, or choose another --out") from error
    if not isinstance(about, dict) or storage.json_bytes(about) != data:
        raise ValueError(f"{path} differs from what was written: restore it, or choose another --out")
    if about.get("format") != FORMAT:
        found = about.get("format")
        raise ValueError(f"{path} has format {found!r}, this program knows {FORMAT!r}: choose another --out")
    if about.pop("crc32c", None) != _checksum(about):
        raise ValueError(
            f"{path} differs from what was written (its checksum is another): restore it, or choose another --out"
        )
    return about


def write_about(run: Path, about: About) -> None:
    """Write `run.json` with a checksum of itself."""
    storage.write_json(run / RUN, {**about, "crc32c": _checksum(about)})


def _checksum(about: About) -> str:
    return f"{google_crc32c.value(json.dumps(about, sort_keys=True).encode()):08x}"


def find_teacher(about: About, named: Path | None) -> tuple[Path | None, str]:
    """The file of the run's teacher, or None and why. Raises ValueError if the user `named` another one."""
    path = named or Path(about["teacher"])
    if path.is_file() and storage.sha256(path) == about["teacher_sha256"]:
        return path, ""
    what = "is not the teacher of this run (its sha256 differs)" if path.is_file() else "does not exist"
    if named:
        raise ValueError(f"--teacher {path} {what}: name a file whose sha256 is {about['teacher_sha256']}")
    return None, f"{path} {what}"


def require_new_or_run(out: Path) -> None:
    """Raise ValueError if the folder holds something that is not a run."""
    ours = (storage.LOCK, "plan-", ".plan-")  # what a killed start may have left
    if not (out / RUN).is_file() and any(not child.name.startswith(ours) for child in out.iterdir()):
        raise ValueError(f"{out} is not empty and not a run (no {RUN}): choose another --out")


def require_same(out: Path, before: About, identity: About) -> None:
    """Raise ValueError, naming both values, if a run was asked for differently."""
    words = {"teacher_sha256": "teacher"}
    changes = [(words.get(k, k), before.get(k), v) for k, v in identity.items() if k != "policy" and before.get(k) != v]
    changes += [(f"policy: {key}", *values) for key, *values in differences(before["policy"], identity["policy"])]
    different = [f"{what} was {_short(old)}, now {_short(new)}" for what, old, new in changes]
    if different:
        raise ValueError(
            f"{out} holds a run that was asked for differently ({'; '.join(different)}):"
            " ask the same again to go on with it, or choose another --out"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "…" + text[-4:]
