"""The commands. A command makes a job from its options, calls one function of a room, and prints the result.

Rooms are imported inside the commands, so that help is quick. Options come from the fields of the jobs: their defaults,
choices and help stand there.
"""

from __future__ import annotations

import functools
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from autolabel.manifests.evidence import PolygonCounts
from autolabel.manifests.formats.known import WRITTEN
from autolabel.manifests.formats.style import IMAGES, Style
from autolabel.manifests.label_space import BUILT_IN, LabelSpace, load_label_space
from autolabel.manifests.locations import BucketPath, location
from autolabel.manifests.policy import PAPER, PRESETS, Policy, load_policy
from autolabel.manifests.settings import JobField, build_job, job_fields, parse_numbers, parse_pair, parse_share
from autolabel.manifests.teachers import TeacherName
from autolabel.manifests.wording import duration, listed
from autolabel.pipeline.job import LabelJob
from autolabel.pipeline.review.effort import Effort, Pace
from autolabel.student.job import ScoreMachine, TrainJob
from autolabel.terminal import (
    QUARANTINED,
    Commands,
    Failure,
    Reporter,
    StatsCommand,
    echo,
    foreseen,
    progress,
    run_command,
    show,
)

if TYPE_CHECKING:
    from autolabel.manifests.account import Account
    from autolabel.pipeline.progress import Counters
    from autolabel.pipeline.run import Labelling

HELP = ["-h", "--help"]
F = TypeVar("F", bound=Callable[..., Any])


# --- options ----------------------------------------------------------------------------------------------------------


class Place(click.Path):
    """A path of this machine, or an address such as s3://bucket/key."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            place = location(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return place if isinstance(place, BucketPath) else super().convert(place, param, ctx)


FILE = Place(path_type=Path, dir_okay=False)
FOLDER = Place(path_type=Path, file_okay=False)
PLACE = Place(path_type=Path)
MANIFEST = PLACE  # a folder is refused where it is opened, with the way to make a manifest of it


class Option(click.Option):
    """An option that stands in a group of the help."""

    def __init__(self, *names: Any, group: str = "", show_default: bool = True, **more: Any) -> None:
        super().__init__(*names, **{"show_default": show_default, **more})
        self.group = group


def text(parse: Callable[[str], Any], metavar: str = "TEXT") -> dict[str, Any]:
    """Return the arguments of an option whose text is read by `parse`, which raises ValueError with what it expects."""

    def read(_: click.Context, option: click.Parameter, value: Any) -> Any:
        if not isinstance(value, str):  # the default is a value already
            return value
        try:
            return parse(value)
        except ValueError as error:
            if not foreseen(error):
                raise
            raise Failure(f"{option.opts[0]} {value}: {error}") from error

    return {"type": click.UNPROCESSED, "callback": read, "metavar": metavar}


option = functools.partial(click.option, cls=Option)


def job_options(job: type[Any], *, only: Sequence[str] = (), but: Sequence[str] = ()) -> Callable[[F], F]:
    """Give a command an option for every setting of a job class: `only` some of them, or all `but` some."""

    def decorate(command: F) -> F:
        for field in reversed(list(job_fields(job))):
            if field.name not in but and (not only or field.name in only):
                command = option(field.flag, field.name, **_option_of(field))(command)
        return command

    return decorate


def _option_of(field: JobField) -> dict[str, Any]:
    """Return the arguments of `option` for a setting."""
    words = field.words
    made = {"group": words.group, "help": field.help, "default": field.default, "show_default": False}
    if field.kind is bool:
        return {**made, "is_flag": True}
    if words.parse:
        return {**made, **text(words.parse, words.metavar or "TEXT")}
    kind = click.Choice(words.choices) if words.choices else FILE if field.kind is Path else field.kind
    return {**made, "type": kind, "metavar": words.metavar or None}


def pairs(form: str, convert: Callable[[str], Any]) -> dict[str, Any]:
    """Return the arguments of an option that is given several times as NAME=VALUE, every name once."""

    def read(_: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, equals, value in (text.partition("=") for text in texts):
            try:
                if not (name and value) or name in values:
                    raise ValueError
                values[name] = convert(value)
            except ValueError:
                raise Failure(f"{option.opts[0]} {name}{equals}{value}: expected {form}, every name once") from None
        return values

    return {"multiple": True, "callback": read, "metavar": form}


output_manifest = option("-o", "--output", type=FILE, required=True, help="Manifest to write.")
policy_option = option(
    "--policy", **text(load_policy, "POLICY"), group="what",
    help=f"A preset ({', '.join(PRESETS)}) or a TOML file; see docs/policy.md. [default: {PAPER.name}]",
)  # fmt: skip
polygons_option = option(
    "--polygons", type=FILE, group="what",
    help="Counts of polygons, for a policy that weighs them; `autolabel polygons` makes them.",
)  # fmt: skip
space_help = f"The classes: {', '.join(BUILT_IN)}, or a JSON file; see docs/words-and-files.md."
space_option = option("--label-space", **text(load_label_space, "SPACE"), help=space_help)
moved_teacher = option("--teacher", **text(TeacherName.of, "TEACHER"), help="The run's teacher, if it has been moved.")


@click.group("autolabel", cls=Commands, context_settings={"help_option_names": HELP, "max_content_width": 110})
@click.version_option(package_name="autolabel", prog_name="autolabel")
def main() -> None:
    """Label street images with a trained teacher, and train better students on the labels.

    Start with `autolabel demo`. With images and a checkpoint of your own: generate, stats, report. The whole way:
    manifest scan, train, generate, stats, audit, report, manifest fuse, train, compare.
    """
    # Read when torch is imported: its threads sleep while they wait. Beside other work they are 5 to 20 times as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# --- manifest ---------------------------------------------------------------------------------------------------------


@main.group()
def manifest() -> None:
    """Make, join and look at lists of images and labels."""


@manifest.command()
@click.argument("folder", type=PLACE)
@output_manifest
@option("--layout", type=click.Choice(("auto", "cityscapes", "mapillary", "folder")), default="auto",
        help="cityscapes and mapillary: the data sets as unzipped. folder: any folder of images.")  # fmt: skip
@option("--split", "splits", multiple=True, help="Take only this split of a data set; may be given several times.")
@option("--labels", type=PLACE, help="Folder of fine labels: PNGs with the images' relative paths and stems.")
@option("--coarse", type=PLACE, help="Folder of coarse labels, likewise.")
@space_option
@option("--suffix", default="", metavar="TEXT", show_default=False,
        help="The labels' names are longer by this, such as _mask.")  # fmt: skip
@option("--pairs", type=FILE, help="CSV with the columns image,label or image,label,coarse instead.")
@option("--label-ids", type=click.Choice(("train", "source", "color")),
        help="The PNGs hold train ids, source ids of the label space, or its colours. [default: train]")  # fmt: skip
@option("--strict", is_flag=True, help="Write nothing if anything is suspicious.")
def scan(folder: Path, output: Path, strict: bool, **options: Any) -> None:
    """Find and check the images and labels in FOLDER, and list them.

    Ends with the classes in the labels, what was left aside and why, and what is suspicious.

    \b
    autolabel manifest scan data/cityscapes --split train_extra -o coarse.parquet
    autolabel manifest scan data/vistas --split training -o fine.parquet
    autolabel manifest scan drive/ --label-space cityscapes -o drive.parquet
    autolabel manifest scan camvid/images --labels camvid/labels --label-space camvid -o fine.parquet
    """
    from autolabel.manifests.samples import save_manifest
    from autolabel.manifests.scan import scan

    with progress("checking files") as update:
        samples, account = scan(folder, progress=update, **options)
    show(account)
    if strict:
        account.require_plausible()
    save_manifest(output, samples)
    echo(f"wrote {output}")


@manifest.command()
@click.argument("manifests", type=MANIFEST, nargs=-1, required=True)
@output_manifest
@option("--weight", "weights", **pairs("SOURCE=NUMBER", float),
        help="Draw the samples of a source so often, such as auto=0.5; may be given several times.")  # fmt: skip
@option("--leak-check", type=MANIFEST, help="Refuse if an image is also in this (validation) manifest.")
@option("--drop", type=FILE, metavar="FILE", help="Leave out the samples whose ids FILE lists, one a line.")
@option("--only", type=FILE, metavar="FILE", help="Take only the samples whose ids FILE lists, one a line.")
@option("--drop-worst", **text(parse_share, "SHARE"), help="Leave out the least trusted, such as 5%.")
@option("--keep-if", metavar="CONDITION", help="Leave out images that do not meet it; see docs/statistics.md.")
def fuse(manifests: tuple[Path, ...], output: Path, **options: Any) -> None:
    """Join the labelled samples of several MANIFESTS to train on.

    Where they share an image, a fine label stands before a corrected one, and that before an automatic one; of one
    source, the one given later. --drop-worst and --keep-if leave out images of runs, by their statistics.

    \b
    autolabel manifest fuse fine.parquet runs/auto/manifest.parquet -o fused.parquet --leak-check val.parquet
    autolabel manifest fuse fine.parquet runs/auto/manifest.parquet -o fused.parquet --drop-worst 5%
       --keep-if 'agreement_with_coarse > 0.8'
    autolabel manifest fuse runs/auto/manifest.parquet fixed.parquet -o fused.parquet --drop rejected.txt
    """
    from autolabel.manifests.fuse import fuse

    show(fuse(manifests, output, **options))


@manifest.command()
@click.argument("path", metavar="MANIFEST", type=MANIFEST)
@option("--folds", type=int, default=2, help="Number of parts; groups stay whole.")
@option("-o", "--output", type=FOLDER, required=True, help="Folder for the manifests part-N and rest-N.")
def fold(path: Path, folds: int, output: Path) -> None:
    """Cut a MANIFEST into parts, to label each by a teacher that has not seen it.

    A teacher that is trained on rest-N labels part-N; see docs/errors.md.

    autolabel manifest fold fine.parquet --folds 3 -o folds
    """
    from autolabel.manifests.fold import fold

    show(fold(path, output, folds=folds))


@manifest.command("coarsen")
@click.argument("fine", type=MANIFEST)
@output_manifest
@option("--hand", type=click.Choice(("even", "rough", "crossing")), default="rough",
        help="even: one margin everywhere. rough: each piece its own. crossing: 3 % of the pixels wrong.")  # fmt: skip
@option("--seed", type=int, default=0, help="Another seed, other polygons.")
def coarsen_fine_labels(fine: Path, output: Path, **options: Any) -> None:
    """Draw coarse labels, like those of people, out of the fine labels of a manifest.

    They are PNGs in a folder beside the manifest that is written, which names the fine labels too: it is both what to
    label and the truth to audit it with. See docs/words-and-files.md.

    autolabel manifest coarsen fine.parquet -o coarse.parquet --hand rough
    """
    from autolabel.manifests.coarsen import coarsen_manifest

    with progress("drawing polygons") as update:
        drawn = coarsen_manifest(fine, output, progress=update, **options)
    show(drawn)


@manifest.command("show")
@click.argument("path", metavar="MANIFEST", type=MANIFEST)
def show_manifest(path: Path) -> None:
    """Print what a MANIFEST holds."""
    from autolabel.manifests.samples import load_manifest

    show(load_manifest(path))


# --- train, evaluate --------------------------------------------------------------------------------------------------


@main.command()
@click.argument("manifest", type=MANIFEST)
@option("--val", type=MANIFEST, required=True, group="what", help="Manifest to validate on; it shares no image.")
@option("--out", type=FOLDER, required=True, group="what", help="Folder of the training; started again, it goes on.")
@job_options(TrainJob)
def train(**values: Any) -> None:
    """Train a network on a MANIFEST: a teacher, or a student.

    Half of the crops are aimed at a class, and all classes get equally many. A step shows --batch-size crops, whatever
    the number of workers.

    \b
    autolabel train fine.parquet --val val.parquet --out teacher
    autolabel train fine.parquet --val val.parquet --out teacher --batch-size 16 --workers 4
    """
    from autolabel.student.train import train

    job = build_job(TrainJob, values)
    with progress(f"training {job.arch}") as update:
        scores = train(
            job,
            lambda step: update(step.step, job.steps, step.note(), step.images_per_s / job.batch_size),
            progress=lambda done, total: update(0, job.steps, f"reading labels {done}/{total}"),
            on_note=update.say,
        )
    show(scores)
    echo(f"checkpoint {job.out / 'best.pt'}   metrics {job.out / 'metrics.jsonl'}   scores {job.out / 'scores.json'}")


@main.command()
@click.argument("checkpoint")
@click.argument("manifest", type=MANIFEST)
@option("-o", "--output", type=FILE, help="Write the scores as JSON too.")
@option("--pictures", type=FOLDER, help="Draw the worst images here: photograph, truth, prediction, errors.")
@option("--allow-overlap", is_flag=True, help="Score on images that the checkpoint was trained on.")
@option("--scales", **text(parse_numbers, "S,S,..."),
        help="Sizes at which the network looks at an image. [default: those that it trains with]")  # fmt: skip
@option("--focus", type=float, metavar="SHARE",
        help="Share of the rows that the highest scale sees, as it labels; then at scales 0.5,1,2.")  # fmt: skip
@job_options(LabelJob, only=("flip", "combine", "window", "class_map"))
@job_options(TrainJob, only=("device",))
@job_options(ScoreMachine)
def evaluate(
    checkpoint: str, manifest: Path, output: Path | None, pictures: Path | None, workers: int, address: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Score a CHECKPOINT, or any other teacher, on a MANIFEST of fine labels.

    Prints IoU and boundary F by class, and the worst images. Workers change no digit of them.

    \b
    autolabel evaluate teacher/best.pt val.parquet -o scores.json
    autolabel evaluate teacher/best.pt val.parquet --scales 0.5,1,2 --flip --pictures worst
    """
    name = familiar([checkpoint])

    from autolabel.student.evaluate import evaluate

    with progress("scoring") as update:
        machine = ScoreMachine(workers, address)
        scores = evaluate(name, manifest, pictures=pictures, machine=machine, progress=update, **options)
    if output:
        scores.write(output)
    show(scores)
    if pictures:
        echo(f"pictures in {pictures}: photograph, truth, prediction, errors (blue right, orange wrong)")


@main.command("export-model")
@click.argument("checkpoint", type=FILE)
@option("-o", "--output", type=FILE, required=True, help="File to write: NAME.onnx or NAME.pt2; NAME.toml beside it.")
@option("--size", **text(parse_pair("x", "HxW, such as 512x1024"), "HxW"),
        help="Take images of this height and width only. [default: any]")  # fmt: skip
@option("--batch", type=int, help="Take so many images at once only. [default: any number]")
@option("--scales", **text(parse_numbers, "S,S,..."),
        help="Sizes at which the network looks at an image. [default: those that it trains with]")  # fmt: skip
@option("--give", "gives", type=click.Choice(("logits", "probabilities", "classes")), default="logits",
        help="What the file gives for each pixel.")  # fmt: skip
@option("--label-space", **text(load_label_space, "SPACE"), help="The classes, if the checkpoint does not name them.")
def export_model(checkpoint: Path, output: Path, **options: Any) -> None:
    """Write a CHECKPOINT for other programs: as .onnx, or as .pt2 of torch.export.

    The file is compared with the checkpoint before it is written. It is a teacher, too.

    \b
    autolabel export-model student/best.pt -o student.onnx
    autolabel export-model student/best.pt -o student.onnx --size 512x1024 --batch 1 --give classes
    """
    from autolabel.teacher.export import export_model

    with progress("exporting") as update:
        exported = export_model(checkpoint, output, progress=update, **options)
    show(exported)


@main.command()
@click.argument("source", type=PLACE)
@option("--teacher", "teachers", metavar="TEACHER", required=True, multiple=True, group="what",
        help="A checkpoint, or another model (docs/teachers.md); several are averaged.")  # fmt: skip
@option("--out", type=FOLDER, required=True, group="what", help="Run folder; started again, it does what is left.")
@policy_option
@polygons_option
@option("--threshold", type=float, group="what",
        help=f"Keep a class where its probability exceeds this. [default: {PAPER.threshold:g}]")  # fmt: skip
@option("--label-space", **text(load_label_space, "SPACE"), group="what",
        help="The classes, for a folder and a teacher that does not name them.")  # fmt: skip
@job_options(LabelJob)
@option("--dry-run", is_flag=True, group="what", help="Label nothing; say what there is to do, and how long it takes.")
def generate(
    source: Path, teachers: tuple[str, ...], policy: Policy | None, polygons: Path | None, threshold: float | None,
    label_space: LabelSpace | None, dry_run: bool, **values: Any,
) -> None:  # fmt: skip
    """Label the images of SOURCE, a folder or a manifest.

    \b
    autolabel generate drive/ --teacher teacher/best.pt --out runs/auto
    autolabel generate coarse.parquet --teacher teacher/best.pt --out runs/auto --policy human-first
    autolabel generate coarse.parquet --teacher teacher/best.pt --out runs/auto --policy dense --polygons polygons.json
    autolabel generate drive/ --teacher segformer/ --label-space cityscapes --classes ade20k.toml --out runs/auto
    """
    policy = with_counts(_policy_of(policy, threshold), polygons)
    teacher = familiar(teachers)

    from autolabel.pipeline.preview import preview
    from autolabel.pipeline.run import generate
    from autolabel.pipeline.source import manifest_of

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if dry_run else values["out"]
        accounts: list[Account] = []
        with progress("checking files") as update:
            manifest = manifest_of(
                source, place, teacher=teacher, label_space=label_space, mapped=values["class_map"] is not None,
                part=values["part"], progress=update, on_account=accounts.append,
            )  # fmt: skip
        for account in accounts:
            show(account)
        job = build_job(LabelJob, values | {"manifest": manifest, "policy": policy, "teacher": teacher})
        if dry_run:
            with progress("labelling a few on trial") as update:
                estimate = preview(job, progress=update)
            show(estimate)
            return
        with progress("labelling") as update:
            result = generate(job, on_progress=_counters(update), on_note=update.say)
    _end(result, job.max_quarantined)


def familiar(teachers: Sequence[str]) -> TeacherName:
    """Return the name of a teacher that may be used, before torch is loaded."""
    from autolabel.teacher.strangers import require_familiar

    name = TeacherName.of(teachers)
    require_familiar(name)
    return name


def _policy_of(policy: Policy | None, threshold: float | None) -> Policy:
    """The policy of --policy or --threshold, else the default one."""
    if threshold is not None and policy is not None:
        raise Failure(f"--threshold {threshold:g} and --policy: write the threshold into the policy")
    return policy or (PAPER if threshold in (None, PAPER.threshold) else Policy(threshold=threshold))


def with_counts(policy: Policy, polygons: Path | None) -> Policy:
    """The policy with counts of polygons from a file, if one is named. Raises ValueError where it lacks them."""
    if polygons is not None:
        policy = policy.counted(PolygonCounts.read(polygons))
    policy.require_counts()
    return policy


def _counters(update: Reporter) -> Callable[[Counters], None]:
    return lambda now: update(now.before + now.done, now.before + now.wanted, now.note(), now.images_per_s)


def _end(result: Labelling, max_quarantined: float) -> None:
    """Print the accounts of a labelling run; leave as its outcome demands."""
    show(result)
    run, accounts = result.require_success(), result.accounts
    if accounts.quarantined > max_quarantined * accounts.asked:
        echo(
            f"autolabel: {accounts.quarantined} of {accounts.asked} samples are quarantined, more than"
            f" --max-quarantined {max_quarantined:g}; reasons in {run.quarantine_path}",
            err=True,
        )
        click.get_current_context().exit(QUARANTINED)


@main.command()
@click.argument("pngs", type=FOLDER)
@option("--manifest", type=MANIFEST, required=True, group="what", help="Manifest of the images that they belong to.")
@option("--out", type=FOLDER, required=True, group="what", help="Run folder; started again, it does what is left.")
@policy_option
@polygons_option
@option("--threshold", type=float, group="what", help="Keep a class where its confidence exceeds this.")
@option("--confidence", type=FOLDER, group="what",
        help="Folder of 8-bit PNGs of the same names: probabilities, 0 to 255. [default: 1 everywhere]")  # fmt: skip
@option("--label-ids", type=click.Choice(("train", "source", "color")), default="train", group="how",
        help="The PNGs hold train ids, source ids of the label space, or its colours.")  # fmt: skip
@option("--label-space", "space", **text(load_label_space, "SPACE"), group="how",
        help="The classes of the PNGs, if --classes maps them. [default: those of the manifest]")  # fmt: skip
@option("--suffix", default="", metavar="TEXT", show_default=False, group="how",
        help="The PNGs' names are longer by this, such as _pred.")  # fmt: skip
@job_options(
    LabelJob, only=("class_map", "keep_confidence", "keep_probability", "store", "unit_size", "max_quarantined")
)
@option("--workers", type=int, group="machine", help="Number of threads. [default: one per core]")
def adopt(
    pngs: Path, manifest: Path, out: Path, policy: Policy | None, polygons: Path | None, threshold: float | None,
    confidence: Path | None, label_ids: str, space: LabelSpace | None, suffix: str, **values: Any,
) -> None:  # fmt: skip
    """Take the PNGS of any other tool over as a run, whose teacher is not known.

    PNGS holds 8-bit PNGs of class ids with the images' relative paths and stems. All are checked before anything is
    written. What works on a run works on this one too.

    \b
    autolabel adopt predictions/ --manifest drive.parquet --out runs/adopted
    autolabel adopt predictions/ --manifest drive.parquet --out runs/adopted --confidence probabilities/
       --keep-confidence 8 --policy human-first
    """
    from autolabel.pipeline.adopt import Pngs, adopt, adopting_job

    job = adopting_job(manifest, out, with_counts(_policy_of(policy, threshold), polygons), **values)
    with progress("adopting") as update:
        result = adopt(
            Pngs(pngs, confidence, label_ids, space, suffix), job, progress=update,
            on_progress=_counters(update), on_note=update.say,
        )  # fmt: skip
    _end(result, job.max_quarantined)


@main.command()
@click.argument("run", type=FOLDER)
@option("--policy", **text(load_policy, "POLICY"), required=True,
        help=f"A preset ({', '.join(PRESETS)}) or a TOML file; see docs/policy.md.")  # fmt: skip
@polygons_option
@option("--out", type=FOLDER, required=True, help="New run folder; started again, it does what is left.")
@option("--workers", type=int, help="Number of threads. [default: one per core]")
@job_options(LabelJob, only=("keep_probability",))
def relabel(run: Path, policy: Policy, polygons: Path | None, out: Path, **options: Any) -> None:
    """Label a RUN again by another policy, without the teacher.

    The run must have been generated with --keep-confidence.

    \b
    autolabel relabel runs/auto --policy suggested.toml --out runs/auto2
    autolabel relabel runs/auto --policy dense --polygons polygons.json --out runs/dense
    """
    from autolabel.manifests.run.folder import Run
    from autolabel.pipeline.relabel import relabel

    with progress("relabelling") as update:
        result = relabel(
            Run.open(run), with_counts(policy, polygons), out=out, on_progress=_counters(update), on_note=update.say,
            **options,
        )  # fmt: skip
    _end(result, LabelJob.max_quarantined)


@main.command("import")
@click.argument("reads", metavar="FORMAT")
@click.argument("paths", type=Place(path_type=Path), nargs=-1, required=True)
@option("--run", type=FOLDER, required=True, help="The run whose labels were corrected.")
@option("-o", "--output", "out", type=FILE, required=True, help="Manifest to write; labels go into a folder beside it.")
@option("--partial", is_flag=True, help="Pixels without a class were not looked at: the machine's stay there.")
@option("--only-changed", is_flag=True, help="Leave out images that came back as they were; else they are confirmed.")
@option("--label-ids", type=click.Choice(("train", "source", "color")),
        help="The PNGs hold train ids, source ids, or colours. [default: what they look like]")  # fmt: skip
@option("--suffix", default="", metavar="TEXT", show_default=False, help="The PNGs' names are longer by this.")
def import_(reads: str, paths: tuple[Path, ...], **options: Any) -> None:
    """Take labels back that people have corrected: PATHS in one FORMAT, png, cvat, coco or label-studio.

    Prints what was changed, and how sure the machine had been. Where two PATHS change a pixel, the later one stands.

    \b
    autolabel import png masks/ --run runs/auto -o fixed.parquet
    autolabel import cvat anna.zip ben.zip --run runs/auto -o fixed.parquet
    autolabel import png runs/auto/labels --run runs/auto -o fixed.parquet
    """
    from autolabel.pipeline.corrections import import_corrections

    with progress("importing") as update:
        imported = import_corrections(reads, paths, progress=update, **options)
    show(imported)
    if imported.new:
        echo("", f"wrote {imported.path}, labels and their origin in {imported.path.with_suffix('')}")


@main.command()
@click.argument("run", type=FOLDER)
@option("--repair", is_flag=True, help="Put damaged units back to undone; `generate` then labels them again.")
@option("--imported", type=MANIFEST, multiple=True, metavar="MANIFEST",
        help="Corrections that hold what was changed by hand: --repair may undo it.")  # fmt: skip
def verify(run: Path, repair: bool, imported: tuple[Path, ...]) -> None:
    """Read a RUN and its images again and compare them with what was committed.

    Labels that people have changed in place are told from damage, and --repair leaves them alone.

    \b
    autolabel verify runs/auto
    autolabel verify runs/auto --repair --imported fixed.parquet
    """
    from autolabel.pipeline.verify import verify

    with progress("verifying") as update:
        verification = verify(run, repair=repair, imported=imported, progress=update)
    show(verification)
    if verification.advice:
        raise Failure(verification.advice)


# --- teacher ----------------------------------------------------------------------------------------------------------


@main.group()
def teacher() -> None:
    """Look at teachers before they label."""


@teacher.command("show")
@click.argument("teacher_name", metavar="TEACHER")
@option("--against", **text(load_label_space, "SPACE"), help="Draft a class map onto these classes, as TOML.")
def show_teacher(teacher_name: str, against: LabelSpace | None) -> None:
    """Print what a TEACHER says of itself: kind, classes, images that it has seen, sha256.

    \b
    autolabel teacher show teacher/best.pt
    autolabel teacher show segformer/ --against cityscapes > map.toml
    """
    from autolabel.teacher.show import draft_map, show_teacher

    card = show_teacher(teacher_name)
    if against is None:
        show(card)
    else:
        echo(*draft_map(card, against).splitlines())


@teacher.command()
@click.argument("network", type=FILE)
@option("--classes", **text(load_label_space, "SPACE"), help="The classes that it predicts, if a label space has them.")
def describe(network: Path, classes: LabelSpace | None) -> None:
    """Draft the sidecar of a NETWORK, a file of torch.export or ONNX.

    \b
    autolabel teacher describe net.onnx > net.toml
    autolabel teacher describe net.pt2 --classes cityscapes > net.toml
    """
    from autolabel.teacher.foreign.describe import describe

    echo(*describe(network, classes=classes))


# --- stats, audit, report ---------------------------------------------------------------------------------------------


@main.command(cls=StatsCommand)
@click.argument("run", type=FOLDER)
@option("--threshold", type=float, help="Say what another threshold would have kept: a multiple of 0.05.")
def stats(run: Path, threshold: float | None) -> None:
    """Sum up the labels of a RUN, class by class.

    \b
    autolabel stats runs/auto
    autolabel stats runs/auto --threshold 0.7
    """
    from autolabel.pipeline.analysis.stats import at_threshold, summarise

    summary = summarise(run)
    if not summary.images:
        raise Failure(f"{run} has no labelled image: nothing to show; reasons may be in {run / 'quarantine.parquet'}")
    show(summary if threshold is None else at_threshold(summary, threshold))


@main.command()
@click.argument("source", metavar="RUN_OR_MANIFEST", type=PLACE)
@option("--to", type=click.Choice(WRITTEN), required=True, group="what", help="The format; see docs/export-labels.md.")
@option("-o", "--output", type=FOLDER, required=True, group="what", help="Folder to write; asked again, it goes on.")
@option("--worst", type=click.IntRange(min=1), group="what", help="So many images of runs, the least trusted first.")
@option("--ids", type=FILE, group="what", help="The images that a file names: one id a line, or a CSV.")
@option("--keep-if", metavar="CONDITION", group="what",
        help="The images that meet it, such as 'mean_confidence < 0.8 and split == \"val\"'.")  # fmt: skip
@option("--label-ids", type=click.Choice(("train", "source", "color")), default="train", group="how",
        help="PNGs of train ids, of source ids, or of train ids with a palette of the classes' colours.")  # fmt: skip
@option("--flat", is_flag=True, group="how", help="Put all images into one folder.")
@option("--images", type=click.Choice(IMAGES), default="copy", group="how",
        help="Copy the photographs, link to them, or send labels alone.")  # fmt: skip
def export(source: Path, to: str, output: Path, label_ids: str, flat: bool, images: str, **selection: Any) -> None:
    """Send labels out in the form of another tool.

    Ends with the account of all samples, and what the format cannot say.

    \b
    autolabel export runs/auto --to png -o to_train
    autolabel export runs/auto --to cvat --worst 50 -o to_fix
    autolabel export fused.parquet --to hf -o dataset
    """
    from autolabel.pipeline.export import export

    with progress("exporting") as update:
        exported = export(source, to, output, style=Style(label_ids, flat, images), progress=update, **selection)
    show(exported)
    if exported.faults:
        click.get_current_context().exit(QUARANTINED)


@main.command()
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
def diff(run_a: Path, run_b: Path) -> None:
    """Compare the labels of two runs over the same images.

    autolabel diff runs/auto runs/strict
    """
    from autolabel.pipeline.analysis.diff import compare

    with progress("comparing") as update:
        difference = compare(run_a, run_b, progress=update)
    show(difference)


@main.command()
@click.argument("manifest", metavar="FINE_WITH_COARSE", type=MANIFEST)
@option("-o", "--output", type=FILE, required=True, group="what", help="File to write, such as polygons.json.")
@option(
    "--page", is_flag=True, group="what", help="Draw the counts too, as a page beside the file, such as polygons.html."
)
@option("--teacher", "teachers", metavar="TEACHER", multiple=True, group="what",
        help="Fit the weights of this teacher too, and write a policy, polygons.toml; may be repeated.")  # fmt: skip
@option("--target-precision", type=float, group="what",
        help="Suggest thresholds that give every class this precision where nobody named one.")  # fmt: skip
@job_options(LabelJob, only=("scales", "flip", "combine", "window", "class_map", "device", "precision"))
@option("--workers", type=int, group="machine", help="Number of threads that count. [default: one per core]")
def polygons(
    manifest: Path, output: Path, page: bool, workers: int | None, teachers: tuple[str, ...],
    target_precision: float | None, **values: Any,
) -> None:  # fmt: skip
    """Count what lies how far outside people's polygons, for the policy dense.

    FINE_WITH_COARSE lists images that have fine and coarse labels. With --teacher, a policy beside the file says how
    much teacher and polygons count: docs/polygons.md.

    \b
    autolabel manifest scan data/cityscapes --split train -o fine.parquet
    autolabel polygons fine.parquet -o polygons.json
    autolabel polygons fine.parquet -o polygons.json --teacher teacher/best.pt --target-precision 0.95
    """
    if target_precision is not None and not teachers:
        raise Failure(f"--target-precision {target_precision:g}: thresholds are of a teacher, name it with --teacher")
    more = {"teacher": familiar(teachers), "manifest": manifest, "out": output.parent} if teachers else None

    from autolabel.pipeline.analysis.polygon_weights import weigh_polygons
    from autolabel.pipeline.analysis.polygons import count_polygons
    from autolabel.pipeline.report.page import write_counts_page

    with progress("counting") as update:
        result = (
            weigh_polygons(
                build_job(LabelJob, values | more), target_precision, output=output, workers=workers, progress=update
            )
            if more
            else count_polygons(manifest, output=output, workers=workers, progress=update)
        )
    pages = [write_counts_page(output, result.counts, manifest)] if page else []
    show(result)
    echo("", f"wrote {listed([*map(str, (*result.written(output), *pages))])}")


@main.command("focus")
@click.argument("manifest", type=MANIFEST)
@option("-o", "--output", type=FILE, required=True, group="what", help="File to write, such as focus.json.")
@option("--teacher", "teachers", metavar="TEACHER", multiple=True, required=True, group="what",
        help="The teacher that is to label with this focus.")  # fmt: skip
@option("--focus", "share", type=float, default=0.25, metavar="SHARE", group="how",
        help="Share of the rows that the highest scale sees.")  # fmt: skip
@option("--limit", type=int, default=100, metavar="N", group="what", help="Look at N images, evenly over the groups.")
@job_options(LabelJob, only=("scales", "flip", "combine", "class_map", "device", "precision"))
def try_focus(
    manifest: Path, output: Path, teachers: tuple[str, ...], share: float, limit: int, **values: Any
) -> None:  # fmt: skip
    """Try a focus on images of a MANIFEST, and measure its certificate.

    The teacher looks at each image whole and with the focus. Says how much time it saves and how many labels differ;
    with fine labels, what happens to mean IoU. `generate --focus focus.json` then certifies labels: docs/focus.md.

    \b
    autolabel focus drive.parquet --teacher teacher/best.pt -o focus.json
    autolabel focus val.parquet --teacher teacher/best.pt --focus 0.5 -o focus.json
    """
    named = {"teacher": familiar(teachers), "manifest": manifest, "out": output.parent}

    from autolabel.pipeline.analysis.focus import try_focus

    with progress("looking twice") as update:
        summary = try_focus(build_job(LabelJob, values | named), share, output=output, limit=limit, progress=update)
    show(summary)
    echo("", f"wrote {output}")


@main.command()
@click.argument("runs", type=FOLDER, nargs=-1, required=True)
@option("--truth", type=MANIFEST, required=True, help="Manifest with fine labels of images that the runs labelled.")
@option("--target-precision", type=float, default=0.95,
        help="Suggest thresholds that give every class's label this precision.")  # fmt: skip
@option("--fit-temperature", is_flag=True, help="Scale the teacher's logits so that its confidences come true.")
@option("--allow-leak", is_flag=True, help="Accept truth that the teacher was trained on; the audit records it.")
@moved_teacher
def audit(runs: tuple[Path, ...], truth: Path, **options: Any) -> None:
    """Hold the labels of RUNS against fine labels.

    Prints precision, borders and calibration, and writes a policy with a threshold for each class. Several runs become
    one table, beside the coarse labels.

    \b
    autolabel audit runs/auto --truth held_out.parquet
    autolabel audit runs/paper runs/dense --truth held_out.parquet
    """
    from autolabel.pipeline.analysis.audit import audit
    from autolabel.pipeline.analysis.side_by_side import SideBySide

    results = []
    for run in runs:
        with progress("auditing") as update:
            results.append(audit(run, truth, progress=update, **options))
    show(results[0] if len(runs) == 1 else SideBySide.of(truth, runs, results))
    for run, result in zip(runs, results, strict=True):
        echo(f"wrote {run / 'audit.json'}" + (f" and {run / 'suggested.toml'}" if result.reliability else ""))


@main.command()
@click.argument("source", metavar="RUN_OR_MANIFEST", type=PLACE)
@option("--run", "runs", type=FOLDER, multiple=True,
        help="A run that has labelled images of the manifest; may be given several times.")  # fmt: skip
@option("-o", "--output", type=FOLDER, required=True, help="Folder for errors.parquet, errors.csv and ids.txt.")
@option("--coarse", is_flag=True, help="Judge the coarse labels, also where there are fine ones.")
@option("--worst", type=int, help="List so many images at most. [default: all]")
@option("--pictures", type=int, default=0, help="Draw so many regions: photograph, human label, teacher.")
@option("--border", type=int, help="Pixels so near to the class that the teacher says do not count."
        " [default: 0.5 % of the diagonal]")  # fmt: skip
@option("--min-pixels", type=int, help="Size of the smallest region. [default: 0.03 % of the image]")
@option("--workers", type=int, help="Number of threads. [default: one per core]")
def errors(source: Path, output: Path, **options: Any) -> None:
    """Find likely mistakes in human labels, fine or coarse.

    Runs judge them that have kept their confidence, best those of teachers that have not seen the images.

    \b
    autolabel errors runs/auto -o errors
    autolabel errors fine.parquet --run runs/part-1 --run runs/part-2 -o errors
    """
    from autolabel.pipeline.analysis.errors import find_errors

    with progress("looking for mistakes") as update:
        ranking = find_errors(source, output, progress=update, **options)
    show(ranking)
    echo("", f"wrote {output}: errors.parquet, errors.csv, ids.txt")


@main.command()
@click.argument("run", type=FOLDER)
@option("--images", type=click.IntRange(min=1), default=100, help="Number of images, worst first.")
@option("--sample", "chosen", multiple=True, metavar="ID", help="Show this sample too; may be given several times.")
@option("--attention", is_flag=True, help="Draw what the teacher sees at each scale, and how much it counts.")
@option("--specks", type=click.IntRange(min=1), default=64, metavar="PX",
        help="Mark pieces of fewer pixels, or what the policy's smallest_piece has dropped.")  # fmt: skip
@moved_teacher
def report(
    run: Path, images: int, chosen: tuple[str, ...], teacher: TeacherName | None, attention: bool, specks: int
) -> None:
    """Write RUN/report/index.html: a gallery to decide in, then plots.

    Zoom, layers, marks and notes: docs/report.md.

    autolabel report runs/auto
    """
    from autolabel.pipeline.report.write import write_report

    with progress("drawing") as update:
        page = write_report(
            run, images=images, samples=chosen, teacher=teacher, attention=attention, specks=specks, progress=update
        )
    echo(f"open {page}")


@main.command()
@click.argument("run", type=FOLDER)
@option("--budget", **text(Effort.of, "BUDGET"), required=True,
        help="A number of images, such as 50, or a time for regions, such as 30min.")  # fmt: skip
@option("-o", "--output", "out", type=FOLDER, required=True, help="Folder for the lists, and for the export.")
@option("--to", type=click.Choice(WRITTEN), help="Export these images too, as `export --to` does.")
@option("--seconds", "pace", **text(Pace.of, "S,S,S"), default=Pace(),
        help="Time to open an image, for a region, and for each pixel of its boundary. [default: 10,5,0.1]",
        show_default=False)  # fmt: skip
@option("--audit", type=FILE, help="Another run's audit.json of the same teacher. [default: the run's own, if any]")
@option("--student", type=FILE, help="Scores that `evaluate -o` wrote: what the student gets wrong counts for more.")
@option("--done", type=FILE, help="Ids of images that people have done: neither they nor what repeats them come again.")
def review(run: Path, budget: Effort, out: Path, **options: Any) -> None:
    """Choose what in a RUN is worth a person's time.

    Writes ids.txt and review.parquet: the images or regions whose correction is expected to gain most label IoU.

    \b
    autolabel review runs/auto --budget 50 -o fix
    autolabel review runs/auto --budget 30min -o fix --to cvat --audit runs/audited/audit.json
    """
    from autolabel.pipeline.review.review import review

    with progress("reading confidence") as update:
        result = review(run, budget, out=out, progress=update, **options)
    show(result)


# --- compare ----------------------------------------------------------------------------------------------------------


@main.command()
@option("--fine", type=MANIFEST, required=True, group="what", help="Manifest of fine labels.")
@option("--arm", "further", **pairs("NAME=PATH", Path), group="what",
        help="Train an arm on fine labels and those of a run or a manifest; may be given several times.")  # fmt: skip
@option("--coarse", type=MANIFEST, group="what", help="The arm coarse: a manifest of coarsely labelled images.")
@option("--auto", type=FOLDER, group="what", help="The arm auto: a run.")
@option("--val", type=MANIFEST, required=True, group="what", help="Manifest to score on.")
@option("--out", type=FOLDER, required=True, group="what", help="Folder of the comparison; started again, it goes on.")
@option("--seeds", type=click.IntRange(min=1), default=1, group="what",
        help="Trainings per arm; a verdict needs two or more.")  # fmt: skip
@option("--added-share", type=float, default=0.5, group="how",
        help="Share of the draws that show the labels which an arm adds to the fine ones.")  # fmt: skip
@job_options(TrainJob, but=("seed", "auto_share", "auto_classes", "auto_aimed"))
def compare(
    fine: Path, further: dict[str, Path], coarse: Path | None, auto: Path | None, seeds: int, added_share: float,
    **values: Any,
) -> None:  # fmt: skip
    """Train students on different labels, and compare them.

    The students differ in their labels only; class by class, the command says which learnt more, or that it is open.

    \b
    autolabel compare --fine fine.parquet --arm auto=runs/auto --val val.parquet --out compare --seeds 3
    autolabel compare --fine fine.parquet --coarse coarse.parquet --auto runs/auto --val val.parquet --out compare
       --seeds 3 --arm human-first=runs/human-first
    """
    from autolabel.student.comparison.compare import all_arms, compare

    arms = all_arms(coarse, auto, further)
    template = build_job(TrainJob, values | {"manifest": fine})
    with progress("training students") as update:
        comparison = compare(
            fine, arms, template=template, seeds=range(seeds), added_share=added_share,
            on_progress=lambda now: update(now.done, now.total, f"{now.arm}, seed {now.seed}: {now.note}"),
            on_note=update.say,
        )  # fmt: skip
    show(comparison)
    echo(f"wrote {template.out / 'compare.json'}   open {template.out / 'index.html'}")


# --- demo -------------------------------------------------------------------------------------------------------------

_DEMO = """
manifest scan {out}/city --split train -o {out}/fine.parquet
polygons {out}/fine.parquet --teacher {out}/teacher.safetensors -o {out}/polygons.json
manifest scan {out}/city --split train_extra -o {out}/coarse.parquet
generate {out}/coarse.parquet --teacher {out}/teacher.safetensors --policy {out}/polygons.toml --keep-confidence 8
 --out {out}/runs/auto
stats {out}/runs/auto
report {out}/runs/auto --images 24
relabel {out}/runs/auto --policy paper --out {out}/runs/paper
relabel {out}/runs/auto --policy human-first --out {out}/runs/human-first
manifest scan {out}/city/leftImg8bit/train_extra --labels {out}/truth --label-space cityscapes --label-ids source
 -o {out}/truth.parquet
audit {out}/runs/paper {out}/runs/human-first {out}/runs/auto --truth {out}/truth.parquet
"""
_DEMO_STUDENTS = """\
manifest scan {out}/city --split val -o {out}/val.parquet
compare --fine {out}/fine.parquet --coarse {out}/coarse.parquet --auto {out}/runs/auto --val {out}/val.parquet
 --out {out}/compare --steps 120 --batch-size 8 --crop 64x96 --ema 0.97 --seeds 3 --precision float32
"""


@main.command()
@option("--out", type=FOLDER, default="demo")
@option("--seed", type=int, default=0, help="Seed of the city. The teacher has seen other cities.")
@option("--students", is_flag=True, help="Compare students too: nine trainings, estimated at ten minutes or more.")
def demo(out: Path, seed: int, students: bool) -> None:
    """Label a drawn city with the small teacher that comes along, on a CPU, within a minute.

    Draws streets in the layout of Cityscapes, then runs the commands that you would type, and prints each.
    """
    from autolabel.manifests import storage
    from autolabel.manifests.scenes import write_city
    from autolabel.pipeline.analysis.audit_record import Audit
    from autolabel.teacher.checkpoints import DRAWN_STREETS

    started = time.monotonic()
    marker = out / f"seed-{seed}"
    if not storage.exists(marker) and storage.list(out):
        raise Failure(f"{out} is not empty and holds no demo of seed {seed}: choose another --out")
    storage.write_json(marker, seed)
    storage.remove_leftovers(out / "city", recursive=True)
    storage.remove_leftovers(out / "truth", recursive=True)
    if not storage.exists(out / "teacher.safetensors"):  # it is written behind the city
        with progress("drawing a city") as update:
            write_city(out / "city", seed, fine=24, coarse=48, val=0, truth=out / "truth", progress=update)
        storage.copy(DRAWN_STREETS, out / "teacher.safetensors")
    if students and not storage.exists(out / "val.parquet"):
        with progress("drawing more of it") as update:
            write_city(out / "city", seed, fine=0, coarse=0, val=20, progress=update)
    for line in (_DEMO + _DEMO_STUDENTS * students).replace("\n ", " ").split("\n")[1:-1]:
        command = line.format(out=shlex.quote(out.as_posix()))
        echo("", f"$ autolabel {command}", bold=True)
        code = main.main(args=shlex.split(command), prog_name="autolabel", standalone_mode=False)
        if code:
            click.get_current_context().exit(code)
    echo("", f"Done in {duration(time.monotonic() - started)}.", bold=True)
    echo(" ".join(Audit.read(out / "runs" / "auto" / "audit.json").summary()))
    echo(f"Open {out}/runs/auto/report/index.html in a browser: every image with its labels.")


def run() -> None:
    """Run the command line."""
    run_command(main)


if __name__ == "__main__":
    run()
