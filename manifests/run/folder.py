"""A run folder: the name of every file in it, and the run that `run.json` describes.

docs/words-and-files.md lists the files. The commit records (manifests/run/ledger.py) are the only truth about what is
done; tables, manifest and quarantine list are derived from them when the run ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa

from autolabel.manifests import storage
from autolabel.manifests.documents import BadDocument, shaped
from autolabel.manifests.label_space import LabelSpace
from autolabel.manifests.locations import location
from autolabel.manifests.policy import Policy
from autolabel.manifests.recipe import Recipe
from autolabel.manifests.run.accounts import Accounts as Accounts
from autolabel.manifests.run.labels import (
    CONFIDENCE,
    KEEP_PROBABILITY,
    LABELS,
    PROBABILITY,
    SECOND,
    TOP,
    RunConfidence,
    RunLabels,
    committed_labels,
    zarr_folder,
)  # fmt: skip
from autolabel.manifests.run.ledger import UNITS
from autolabel.manifests.run.place import KIND, RUN, require_no_links, require_outside_runs
from autolabel.manifests.run.record import Fence, opened, sealed
from autolabel.manifests.run.to_torch import ToTorch
from autolabel.manifests.samples import ManifestFile, open_manifest
from autolabel.manifests.schemas import QUARANTINE_SCHEMA, STATISTICS
from autolabel.manifests.tables import BadTable, parts_of, read_pieces, read_table
from autolabel.manifests.teachers import AnyTeacher, TeacherName

FORMAT = f"{KIND}10"
_INPUT = "input.parquet"
PREPARING = "preparing"
_CLAIM = storage.json_bytes({"format": FORMAT, "state": PREPARING})  # `run.json` until the plan is there


@dataclass(frozen=True)
class RunFolder:
    """The names of the files in a run folder, whether they exist or not."""

    path: Path

    @property
    def record(self) -> Path:
        """The file that describes the run."""
        return self.path / RUN

    @property
    def input_path(self) -> Path:
        """The manifest of the images, where a folder was labelled."""
        return self.path / _INPUT

    @property
    def units(self) -> Path:
        """The folder of the commit records."""
        return self.path / UNITS

    @property
    def attempts(self) -> Path:
        """The folder of the notes about units under way."""
        return self.path / "attempts"

    @property
    def manifest_path(self) -> Path:
        """The manifest of the automatic labels."""
        return self.path / "manifest.parquet"

    @property
    def quarantine_path(self) -> Path:
        """The table of quarantined samples."""
        return self.path / "quarantine.parquet"

    @property
    def progress_path(self) -> Path:
        """The live counters."""
        return self.path / "progress.json"

    @property
    def audit_path(self) -> Path:
        """The result of `autolabel audit`."""
        return self.path / "audit.json"

    @property
    def suggested_path(self) -> Path:
        """The policy that an audit suggests."""
        return self.path / "suggested.toml"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.path / "report"

    def statistics_path(self, table: str) -> Path:
        """One of the statistics tables. Raises ValueError for an unknown one."""
        if table not in STATISTICS:
            raise ValueError(f"no statistics table {table!r}: expected one of {', '.join(STATISTICS)}")
        return self.path / "stats" / f"{table}.parquet"

    def layer(self, name: str) -> Path:
        """The Zarr group of a layer."""
        return self.path / zarr_folder(name)

    def table_paths(self) -> dict[str, Path]:
        """The published tables by their names in `run.json`."""
        paths = [self.manifest_path, self.quarantine_path, *map(self.statistics_path, STATISTICS)]
        return {path.relative_to(self.path).as_posix(): path for path in paths}

    @property
    def manifest(self) -> ManifestFile:
        """The manifest of the automatic labels. Raises BadTable until the run has published it."""
        return open_manifest(self.manifest_path)

    def statistics(self, table: str = "images", columns: Sequence[str] = ()) -> pa.Table:
        """One of the statistics tables ("images", "classes", "centroids", "review"). Raises BadTable."""
        return read_table(*self._statistics(table, columns))

    def stream_statistics(self, table: str, columns: Sequence[str] = ()) -> Iterator[pa.Table]:
        """Yield a statistics table piece by piece, however many rows there are. Raises BadTable."""
        yield from read_pieces(*self._statistics(table, columns))

    def _statistics(self, table: str, columns: Sequence[str]) -> tuple[Path, pa.Schema]:
        path = storage.inside(self.path, self.statistics_path(table).relative_to(self.path).as_posix())
        parts = parts_of(path)
        if not parts:
            raise BadTable(f"{path} does not exist: finish the run first with `autolabel generate`")
        for part in parts:
            storage.require_no_link(part)
        schema = STATISTICS[table]
        return path, pa.schema([schema.field(name) for name in columns or schema.names])

    def quarantine(self) -> pa.Table:
        """The quarantined samples with their reasons. Raises BadTable."""
        return read_table(self.quarantine_path, QUARANTINE_SCHEMA)

    def exists(self) -> bool:
        """True if the folder holds a run; a folder that is only claimed holds none yet."""
        return storage.exists(self.record) and storage.read(self.record, at_most=storage.SMALL) != _CLAIM

    def require_new_or_run(self) -> None:
        """Raise ValueError if the folder holds something that is not a run, or lies in another run."""
        if storage.exists(self.record):
            return
        require_outside_runs(self.path.parent)
        if any(not path.name.startswith(storage.LOCK) for path in storage.list(self.path)):
            raise ValueError(f"{self.path} is not empty and not a run (no {RUN}): choose another --out")

    def claim(self) -> None:
        """Make the folder a run's, before anything else is written into it; its holder calls this.

        A call that is killed afterwards, or finds the disk full, is simply made again: whatever it left lies in a run
        folder. Raises ValueError if the folder holds something that is not a run.
        """
        self.require_new_or_run()
        storage.create(self.record, _CLAIM)


@dataclass(frozen=True)
class Run(RunFolder, ToTorch):
    """A run as `run.json` describes it. Open one with `Run.open`.

    input_manifest: the manifest that was to be labelled, and its sha256. plan: name of the plan's file. teacher: its
    name at the time; None where predictions were adopted. source: the run whose kept confidence stood in for the
    teacher. engine: who labelled last. budgets: the memory that each kind of device had and needed. state: "preparing"
    (its stores are being made), "running", "partial" or "complete". tables: sha256 of every published table, by name.
    fence: keeps drivers apart.
    """

    recipe: Recipe
    input_manifest: Path
    input_sha256: str
    plan: str
    teacher: TeacherName | None
    engine: str
    versions: Mapping[str, str]
    machine: str
    source: Path | None = None
    budgets: tuple[Mapping[str, Any], ...] = ()
    state: str = "partial"
    accounts: Accounts | None = None
    tables_sha256: Mapping[str, str] | None = None
    fence: Fence = field(default_factory=Fence)

    @classmethod
    def open(cls, path: Run | str | Path) -> Run:
        """Read and check `run.json`; a run that is open already is returned.

        Raises FileNotFoundError if this is no run, ValueError if it cannot be trusted.
        """
        if isinstance(path, Run):
            return path
        file = RunFolder(location(path)).record
        if not storage.exists(file):
            raise FileNotFoundError(f"{path} is not a run: it has no {RUN}; make one with `autolabel generate`")
        require_no_links(location(path))
        run = cls.read(location(path))
        if run is None:
            raise FileNotFoundError(f"{path} holds no label yet: its command was stopped at once; run the same again")
        return run

    @classmethod
    def read(cls, path: Path) -> Run | None:
        """Read and check `run.json` alone; None for a folder that is only claimed. Raises as `open`."""
        file = RunFolder(path).record
        data = storage.read(file, at_most=storage.SMALL)
        return None if data == _CLAIM else cls._of(path, opened(data, file, format_=FORMAT))

    @classmethod
    def _of(cls, path: Path, document: dict[str, Any]) -> Run:
        try:
            shape = {name: kind for name, kind in get_type_hints(cls).items() if name != "path"}
            shape |= {"recipe": dict, "teacher": list[str] | None}
            missing = [name for name in shape if name not in document]
            if missing:
                raise BadDocument(f"it has no {missing[0]!r}")
            values = {name: shaped(kind, document[name], f"its {name!r}") for name, kind in shape.items()}
            teacher = None if values["teacher"] is None else TeacherName.of(values["teacher"])
            return cls(path, **{**values, "recipe": Recipe.of(values["recipe"]), "teacher": teacher})
        except ValueError as error:
            raise ValueError(f"{path / RUN} is damaged ({error}): restore it, or choose another --out") from error

    def data(self) -> bytes:
        """The content of `run.json`."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "path"}
        document = {
            "format": FORMAT,
            **values,
            "recipe": self.recipe.to_dict(),
            "input_manifest": str(self.input_manifest),
            "teacher": None if self.teacher is None else self.teacher.spellings,
            "source": None if self.source is None else str(self.source),
            "budgets": list(self.budgets),
            "accounts": None if self.accounts is None else asdict(self.accounts),
            "fence": asdict(self.fence),
        }
        return sealed(document)

    def save(self) -> None:
        """Write `run.json`, whoever else is at work; drivers save through their lock."""
        storage.write(self.record, self.data())

    def require_same(self, now: Recipe) -> None:
        """Raise ValueError, naming both values, if the labels were asked for by another recipe."""
        changes = self.recipe.changes(now)
        if changes:
            raise ValueError(
                f"{self.path} holds a run that was asked for differently ({'; '.join(changes)}):"
                " ask the same again to go on with it, or choose another --out"
            )

    def lines(self) -> list[str]:
        """The state of the run and the essence of its recipe, for a terminal or a notebook."""
        recipe, a = self.recipe, self.accounts
        numbers = (
            f"{a.asked:,} samples, {a.labelled:,} labelled, {a.quarantined:,} quarantined" if a else "no accounts yet"
        )
        scales = ", ".join(f"{scale:g}" for scale in recipe.scales)
        return [
            f"{self.path}: {self.state}; {numbers}",
            f"teacher {self.teacher or 'unknown'}, scales {scales}, policy {recipe.policy.name!r},"
            f" {len(recipe.label_space)} classes of label space {recipe.label_space.name!r}",
        ]

    @property
    def plan_path(self) -> Path:
        """The file of the plan."""
        return storage.inside(self.path, self.plan)

    @property
    def label_space(self) -> LabelSpace:
        """The classes of the labels."""
        return self.recipe.label_space

    @property
    def policy(self) -> Policy:
        """The policy that decided the labels."""
        return self.recipe.policy

    @property
    def labels(self) -> RunLabels:
        """The committed labels by sample id, finished or still being made."""
        return RunLabels(committed_labels(self.path, LABELS), self.label_space)

    @property
    def confidence(self) -> RunConfidence:
        """The teacher's kept top classes and levels of confidence. Raises ValueError if none were kept."""
        if self.recipe.confidence_edges is None:
            raise ValueError(f"{self.path} has kept no confidence: generate with --keep-confidence 8 does")
        kept = (RunLabels(committed_labels(self.path, layer), None) for layer in (TOP, CONFIDENCE, SECOND))
        return RunConfidence(*kept, edges=self.recipe.confidence_edges)

    @property
    def probability(self) -> RunLabels:
        """The probability of the class of every pixel's label, in 255ths: (H, W) uint8 by sample id.

        255 where people named it and the policy asks them, 0 where the label has no class. Raises ValueError if none
        were kept.
        """
        if not self.recipe.keep_probability:
            raise ValueError(f"{self.path} has kept no probabilities: {KEEP_PROBABILITY}")
        return RunLabels(committed_labels(self.path, PROBABILITY), None)

    def find_teacher(self, named: AnyTeacher | None = None) -> tuple[TeacherName | None, str]:
        """The teacher where it is now, or None and the reason. Raises ValueError if the user `named` another one."""
        name = self.teacher if named is None else TeacherName.of(named)
        digest = self.recipe.teacher_sha256
        if name is None or not digest:
            if named:
                raise ValueError(f"--teacher {named}: nobody knows the teacher of {self.path}, its labels were adopted")
            return None, "no teacher is known"
        if named is None and name.runs_code:  # a run may come from a stranger
            return None, f"{name} is code, which runs only if you name it"
        there = name.exists()
        if there and name.digest() == digest:
            return name, ""
        reason = "is not the teacher of this run (its sha256 differs)" if there else "does not exist"
        if named:
            raise ValueError(f"--teacher {name} {reason}: name the one whose sha256 is {digest}")
        return None, f"{name} {reason}"

    def zarr_layers(self) -> dict[str, dict[str, Any]]:
        """The attributes of the Zarr group of every layer that the run holds."""
        recipe = self.recipe.to_dict()
        space, edges = {"label_space": recipe["label_space"]}, recipe["confidence_edges"]
        layers: dict[str, dict[str, Any]] = {LABELS: {**space, "ignore": 255, "policy": recipe["policy"]}}
        if edges is not None:
            layers |= {TOP: space, CONFIDENCE: {"edges": edges}, SECOND: space}
        return layers | ({PROBABILITY: {"unit": "255ths"}} if recipe["keep_probability"] else {})
