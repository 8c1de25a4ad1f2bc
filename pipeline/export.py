"""Labels sent out in the form of another tool: `autolabel export`.

Images leave in chunks. A chunk is done when its record lies in the folder; a killed export goes on behind the last one,
and what it wrote of the next is written again. The files that list all images come last, from the records.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from autolabel.manifests import storage
from autolabel.manifests.ahead import ahead
from autolabel.manifests.documents import BadDocument, read_json
from autolabel.manifests.formats.exchange import Format, Outgoing, Packing
from autolabel.manifests.formats.known import known_format
from autolabel.manifests.formats.style import Style
from autolabel.manifests.images import BadImage
from autolabel.manifests.locations import location
from autolabel.manifests.machine import cores
from autolabel.manifests.run.folder import Run
from autolabel.manifests.run.place import require_outside_runs
from autolabel.manifests.samples import Sample
from autolabel.manifests.wording import Progress, Shown, counted
from autolabel.pipeline.outgoing import BadLabel, LabelSource
from autolabel.pipeline.selection import UNREADABLE, Choice, Selection, choose

FORMAT = "autolabel-export/1"
RECORD, LEFT_OUT = "export.json", "left_out.csv"
_CHUNKS = ".export"  # the records of the chunks, until all are done
_CHUNK = 64  # images
_MOST_BYTES = 1 << 30  # of a record: 64 images of many pieces in run lengths
DAMAGED, WAITING = "changed or damaged label", "not labelled yet"
_KINDS_OF_FAULT = (DAMAGED, UNREADABLE)


@dataclass(frozen=True)
class Export(Shown):
    """An export and its account: samples = written + not_selected + left_out.

    samples: how many the source has. not_selected: how many were not asked for, by the option that leaves them out.
    left_out: how many were asked for and could not be sent, by the reason; left_out.csv names each. notes: sentences
    about what the format cannot say. repeated: it was complete before.
    """

    path: Path
    format: str
    samples: int
    written: int
    not_selected: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    repeated: bool = False

    def balanced(self) -> bool:
        """True if no sample is lost and none is counted twice."""
        return self.samples == self.written + sum(self.not_selected.values()) + sum(self.left_out.values())

    @property
    def faults(self) -> int:
        """The number of samples whose label or photograph is damaged."""
        return sum(self.left_out.get(kind, 0) for kind in _KINDS_OF_FAULT)

    def lines(self) -> list[str]:
        """The account for a terminal."""
        lines = [f"{self.path} was complete before: nothing to do"] if self.repeated else []
        lines.append(
            f"{counted(self.samples, 'sample')}: {self.written:,} written,"
            f" {sum(self.not_selected.values()):,} not asked for, {sum(self.left_out.values()):,} left out"
        )
        for title, counts in (("not asked for", self.not_selected), ("left out", self.left_out)):
            if counts:
                lines.append(f"  {title}: {'; '.join(f'{name} {count:,}' for name, count in counts.items())}")
        if self.left_out:
            lines[-1] += f" ({self.path / LEFT_OUT} names each)" if set(self.left_out) != {WAITING} else ""
        return [*lines, *(f"note: {note}" for note in self.notes), f"wrote {self.path}: {self.format}"]


def export(
    source: Run | str | Path,
    to: str,
    out: str | Path,
    *,
    style: Style | None = None,
    worst: int | None = None,
    ids: str | Path | None = None,
    keep_if: str | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write the labels of a run or manifest into the folder `out`, in the format `to`.

    worst, ids, keep_if: see `Selection`. A call that was killed is made again, and goes on; `progress` counts images.
    Raises ValueError for a format or style that is not known, for a selection that leaves nothing, and for a folder
    that holds something else or an export that was asked for differently; OSError for a disk that is full.
    """
    style, folder = style or Style(), location(out).absolute()
    labels = LabelSource.open(source)
    writer = known_format(to).writer(labels.space, style)
    selection = Selection(worst, None if ids is None else location(ids), keep_if)
    _require_place(folder)
    choice = choose(labels, selection, in_one_folder=style.flat)
    request = {
        "to": to, **asdict(style), "label_space": labels.space.to_dict(), "samples": choice.samples,
        "asked": choice.count, "samples_and_labels": choice.digest,
    }  # fmt: skip
    with storage.hold(folder) as held:

        def on_image(done: int, total: int) -> None:
            held.require()
            if progress:
                progress(done, total)

        _require_place(folder)
        account = _claimed(folder, request)
        if account is None:
            storage.remove_leftovers(folder, recursive=True)
            result = _write(_Work(folder, labels, choice, writer, style.images != "none"), to, request, on_image)
        else:
            result = Export(folder, to, **account | {"notes": tuple(account["notes"])}, repeated=True)
        storage.remove_folder(folder / _CHUNKS)
    return result


def _require_place(folder: Path) -> None:
    """Raise ValueError if the folder holds something that is no export, or lies in a run."""
    if storage.exists(folder):
        raise ValueError(f"{folder} is a file: expected a new folder, or one that an export has begun")
    if not storage.exists(folder / RECORD):
        require_outside_runs(folder)
        others = [path.name for path in storage.list(folder) if not path.name.startswith(storage.LOCK)]
        if others:
            raise ValueError(f"{folder} holds something else ({others[0]}, no {RECORD}): choose another folder")


def _claimed(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """Make a folder this export's, or go on with it; return the account if it is complete.

    Raises ValueError, naming what differs, for an export that was asked for differently.
    """
    record = folder / RECORD
    if not storage.exists(record):
        storage.write_json(record, {"format": FORMAT, "request": request, "state": "begun"})
        return None
    try:
        document = read_json(record, dict[str, Any])
    except BadDocument as error:
        raise ValueError(f"{error}; choose another folder") from error
    if document.get("format") != FORMAT or not isinstance(document.get("request"), dict):
        raise ValueError(f"{record} is none of {FORMAT!r}: choose another folder")
    held = document["request"]
    changes = [
        f"{key.replace('_', ' ')} {_brief(held.get(key))} before, {_brief(value)} now"
        for key, value in request.items()
        if held.get(key) != value
    ]
    if changes:
        raise ValueError(
            f"{folder} holds an export that was asked for differently ({changes[0]}): ask the same again to go on with"
            " it, or choose another folder"
        )
    return document["account"] if document.get("state") == "complete" else None


def _brief(value: Any) -> str:
    text = str(value.get("name") if isinstance(value, dict) else value)
    return text if len(text) < 40 else f"{text[:8]}…"


@dataclass(frozen=True)
class _Work:
    """An export under way."""

    folder: Path
    source: LabelSource
    choice: Choice
    writer: Format
    photographs: bool  # are sent too

    def record(self, number: int) -> Path:
        """The record of the n-th chunk."""
        return self.folder / _CHUNKS / f"{number:06d}.json"

    @property
    def records(self) -> list[Path]:
        """The records of all chunks, in order."""
        return [self.record(number) for number in range(-(-self.choice.count // _CHUNK))]

    def send(self, sample: Sample) -> dict[str, Any]:
        """Write one sample: its id with what the format says of it, or with the reason why it is left out."""
        try:
            label, confidence, score = self.source.load(sample)
            if self.photographs and sample.run is not None:
                self.source.maps[sample.run].require_same_photograph(sample)
            item = Outgoing(sample, self.choice.name(sample), label, confidence, score)
            return {"id": sample.sample_id, "entry": self.writer.write(item, self.folder)}
        except BadLabel as error:
            return {"id": sample.sample_id, "kind": DAMAGED, "why": str(error)}
        except BadImage as error:
            return {"id": sample.sample_id, "kind": UNREADABLE, "why": str(error)}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The results of `send`, of all samples in order."""
        for path in self.records:
            yield from read_json(path, list[dict[str, Any]], at_most=_MOST_BYTES)


class _Entries:
    """The words of a format about the images, in order, as often as it asks."""

    def __init__(self, work: _Work) -> None:
        self._work = work

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row["entry"] for row in self._work.rows() if "entry" in row)


def _write(work: _Work, to: str, request: dict[str, Any], progress: Progress | None) -> Export:
    work.source.prepare()
    undone = {number for number, path in enumerate(work.records) if not storage.exists(path)}
    done = work.choice.count - sum(min(_CHUNK, work.choice.count - _CHUNK * number) for number in undone)

    def waiting() -> Iterator[Sample]:
        for place, sample in enumerate(work.choice.chosen()):
            if place // _CHUNK in undone:
                yield sample

    with contextlib.closing(_sent(work, waiting())) as rows:
        for number in sorted(undone):
            chunk = []
            for _ in range(min(_CHUNK, work.choice.count - _CHUNK * number)):
                chunk.append(next(rows))
                done += 1
                if progress:
                    progress(done, work.choice.count)
            storage.write_json(work.record(number), _packed(work, number, chunk))
    if not any(True for _ in _Entries(work)):
        first = next(work.rows())
        raise ValueError(
            f"none of {counted(work.choice.count, 'label')} can be sent; of {first['id']!r}: {first['why']}"
        )
    work.writer.finish(work.folder, _Entries(work))
    account = _account(work)
    result = Export(work.folder, to, **account | {"notes": tuple(account["notes"])})
    assert result.balanced(), account
    storage.write_json(
        work.folder / RECORD, {"format": FORMAT, "request": request, "state": "complete", "account": account}
    )
    return result


def _sent(work: _Work, samples: Iterator[Sample]) -> Generator[dict[str, Any], None, None]:
    with ThreadPoolExecutor(cores()) as pool:
        yield from ahead(pool, work.send, samples, 2 * cores())


def _packed(work: _Work, number: int, chunk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(work.writer, Packing):
        return chunk
    entries = iter(work.writer.pack(work.folder, number, [row["entry"] for row in chunk if "entry" in row]))
    return [{**row, "entry": next(entries)} if "entry" in row else row for row in chunk]


def _account(work: _Work) -> dict[str, Any]:
    """Count all samples, and write the list of those that are left out."""
    choice, written = work.choice, 0
    kinds = Counter(kind for _, kind, _ in choice.left_out)
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(("sample_id", "kind", "reason"))
    lines.writerows(choice.left_out)
    for row in work.rows():
        if "entry" in row:
            written += 1
        else:
            kinds[row["kind"]] += 1
            lines.writerow((row["id"], row["kind"], row["why"]))
    if kinds:
        storage.write(work.folder / LEFT_OUT, table.getvalue().encode(errors="backslashreplace"))
    if choice.waiting:
        kinds[WAITING] = choice.waiting
    return {
        "samples": choice.samples,
        "written": written,
        "not_selected": {name: count for name, count in choice.aside.items() if count},
        "left_out": dict(kinds),
        "notes": [*([choice.note] if choice.note else []), *work.writer.notes],
    }
