"""The commands. Each body imports its room and calls one function of it; nothing heavy is imported at the top."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from autolabel.manifests.policy import COMBINE, PAPER, PRESETS, SCALES, Policy, load_policy
from autolabel.manifests.recipe import ENGINES, STORES
from autolabel.manifests.settings import GROUPS, JobField, build_job, job_fields
from autolabel.manifests.wording import Shown, plain
from autolabel.pipeline.job import DEVICES, LabelJob

if TYPE_CHECKING:
    from autolabel.manifests.samples import Manifest
    from autolabel.manifests.scan import Account
    from autolabel.pipeline.progress import Counters
    from autolabel.pipeline.run import Labelling
    from autolabel.student.train import StepReport

INPUT_ERROR, QUARANTINED, INTERRUPTED = 2, 3, 130  # exit codes beside 0

F = TypeVar("F", bound=Callable[..., Any])
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)


# --- errors and help --------------------------------------------------------------------------------------------------


class Failure(click.ClickException):
    """One clear line on stderr, exit code 2."""

    exit_code = INPUT_ERROR

    def show(self, file: Any = None) -> None:
        """Print the line."""
        click.echo(f"autolabel: {self.format_message()}", err=True)


class Command(click.Command):
    """A command whose help shows its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for every group that has options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections.setdefault(getattr(param, "group", ""), []).append(record)
        for key, title in {**GROUPS, "": "Options"}.items():
            if key in sections:
                with formatter.section(title):
                    formatter.write_dl(sections[key])


class Commands(click.Group):
    """A group that turns errors which a user can cause or mend into one line; a traceback means a mistake of ours."""

    command_class = Command
    group_class = type  # click's word for: groups in this group are of its own class

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is named."""
        try:
            return super().invoke(ctx)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            path = error.ctx.command_path if error.ctx else ctx.command_path
            message = " ".join(error.format_message().split()).removesuffix(".").replace(". Did you", "; did you")
            message = message[:1].lower() + message[1:] + ("" if message.endswith("?") else ";")
            raise Failure(f"{message} `{path} --help` lists the options") from error
        except (ValueError, OSError) as error:
            raise Failure(_one_line(error)) from error
        except RuntimeError as error:
            # Our own errors about a run live in rooms that are not imported yet; torch reports a lack of memory so.
            if type(error).__module__.startswith("autolabel.") or "out of memory" in str(error):
                raise Failure(_one_line(error)) from error
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("autolabel: interrupted; everything finished so far is kept, run the same again", err=True)
            ctx.exit(INTERRUPTED)


class Otherwise(Commands):
    """A group with a command that is meant where no other is named: `stats RUN` beside `stats diff A B`.

    Its key is that command's first argument, so that help shows what to type.
    """

    def __init__(self, *arguments: Any, otherwise: str, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.otherwise = otherwise
        self.context_settings = {"ignore_unknown_options": True}  # they are that command's

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command, list[str]]:
        """Find the command that the arguments mean."""
        if args[0] in self.commands and args[0] != self.otherwise:
            return args[0], self.commands[args[0]], args[1:]
        return None, self.commands[self.otherwise], args


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run the same again, finished work is kept" if full else ""
        return f"{error.strerror or error}{place}{advice}"
    return " ".join(str(error).split())


@click.group(
    "autolabel", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="autolabel", prog_name="autolabel")
def main() -> None:
    """Label street images with a trained teacher, and train better students on the labels.

    Start with `autolabel demo`; for your own images: manifest scan, train (or bring a checkpoint), generate, stats,
    audit, report, manifest fuse, train, compare.
    """


# --- rendering --------------------------------------------------------------------------------------------------------


class Reporter:
    """Called with (done, total, note, rate) it shows how far a long work is; `say` prints a line between."""

    def __init__(self, show: Callable[[int, int, str], None], say: Callable[[str], None]) -> None:
        self._show, self.say = show, say
        self._started, self._first = time.monotonic(), -1

    def __call__(self, done: int, total: int, note: str = "", rate: float | None = None) -> None:
        self._first = done if self._first < 0 else self._first
        elapsed = time.monotonic() - self._started
        pace = rate or ((done - self._first) / elapsed if elapsed > 0.5 else 0.0)
        eta = f"ETA {_duration((total - done) / pace)}" if pace and done < total else ""
        self._show(done, total, "  ".join(part for part in (eta, note) if part))


@contextlib.contextmanager
def progress(title: str) -> Iterator[Reporter]:
    """A bar with ETA on a terminal; elsewhere a plain line every 20 s."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        last, finished = time.monotonic(), False

        def line(done: int, total: int, text: str) -> None:
            nonlocal last, finished
            if (done >= total and not finished) or time.monotonic() - last > 20:
                last, finished = time.monotonic(), done >= total
                click.echo(f"{title}: {done}/{total}  {text}".rstrip(), err=True)

        yield Reporter(line, lambda text: click.echo(f"{title}: {text}", err=True))
        return

    class WithNote(Progress):
        """The bar, and below it what there is to say: side by side they would not fit 80 columns."""

        note = ""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if self.note:
                yield Text(f"  {self.note}", no_wrap=True, overflow="ellipsis")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with WithNote(*columns, console=console) as bars:
        task = bars.add_task(title, total=None)

        def bar(done: int, total: int, text: str) -> None:
            bars.note = text
            bars.update(task, completed=done, total=total)

        yield Reporter(bar, lambda text: console.print(text, markup=False, highlight=False))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def show(result: Shown) -> None:
    """Print what a result says of itself."""
    for line in result.lines():
        click.echo(plain(line))
    for drawn in result.tables():
        click.secho(f"\n{plain(drawn.title)}", bold=True)
        click.echo("\n".join(drawn.lines()))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], last_is_total: bool = False) -> None:
    """Print a table: first column left, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=SIMPLE_HEAD)
    for place, name in enumerate(header):
        drawn.add_column(name, justify="right" if place else "left", no_wrap=True)
    for place, row in enumerate(rows):
        if last_is_total and place == len(rows) - 1:
            drawn.add_section()
        drawn.add_row(*row)
    # Off a terminal the width is unknown: never cut a number.
    console = Console()
    click.secho(f"\n{title}", bold=True)
    Console(width=None if console.is_terminal else 160).print(drawn)


def percent(value: float | None, digits: int = 1) -> str:
    """0.123 -> "12.3", and a dash where there is no number."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


# --- options ----------------------------------------------------------------------------------------------------------


class Option(click.Option):
    """An option that stands in a group of the help."""

    def __init__(self, *names: Any, group: str = "", **more: Any) -> None:
        super().__init__(*names, **more)
        self.group = group


def text(parse: Callable[[str], Any], metavar: str = "TEXT") -> dict[str, Any]:
    """Return the arguments of an option whose text is read by `parse`, which raises ValueError with what it expects."""

    def read(_: click.Context, option: click.Parameter, value: Any) -> Any:
        if not isinstance(value, str):  # the default is a value already
            return value
        try:
            return parse(value)
        except ValueError as error:
            raise Failure(f"{option.opts[0]} {value}: {error}") from error

    return {"type": click.UNPROCESSED, "callback": read, "metavar": metavar}


def option(*names: str, group: str = "", **more: Any) -> Callable[[F], F]:
    """Give a command an option; `group` is its place in the help."""
    return click.option(*names, cls=Option, group=group, **more)


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
    words, kind, default = field.words, field.type, field.default
    if isinstance(kind, UnionType):
        kind = next(part for part in get_args(kind) if part is not NoneType)
    shown = words.unset if default is None else "" if kind is bool else _as_text(default)
    made = {"group": words.group, "default": default, "help": words.help + (f" [default: {shown}]" if shown else "")}
    if kind is bool:
        return {**made, "is_flag": True}
    if words.parse:
        return {**made, **text(words.parse, words.metavar or "TEXT")}
    value = click.Choice(words.choices) if words.choices else FILE if kind is Path else kind
    return {**made, "type": value, "metavar": words.metavar or None}


def _as_text(default: Any) -> str:
    return ",".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)


def parse_scales(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """ "0.5,1,2" -> numbers, 1 among them."""
    if text is None:
        return None
    from autolabel.manifests.policy import check_scales

    try:
        return check_scales([float(part) for part in text.split(",")])
    except ValueError as error:
        raise Failure(f"--scales {text}: {error}") from error


def two_numbers(separator: str, expected: str) -> Callable[..., tuple[int, int] | None]:
    """Reads an option such as "320x480" or "2/8"."""

    def parse(_: click.Context, option: click.Parameter, text: str | None) -> tuple[int, int] | None:
        if text is None:
            return None
        try:
            first, second = (int(part) for part in text.lower().split(separator))
        except ValueError as error:
            raise Failure(f"{option.opts[0]} {text}: expected {expected}") from error
        return first, second

    return parse


parse_crop = two_numbers("x", "HEIGHTxWIDTH in pixels, such as 320x480")
parse_part = two_numbers("/", "I/N, such as 2/8 for the second of eight")


def parse_share(_: click.Context, option: click.Parameter, text: str | None) -> float | None:
    """ "5%" or "0.05" -> 0.05, between 0 and 1."""
    if text is None:
        return None
    with contextlib.suppress(ValueError):
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < share < 1:
            return share
    raise Failure(f"{option.opts[0]} {text}: expected a share between 0 and 1, such as 5% or 0.05")


def numbers(scales: Sequence[float]) -> str:
    """(0.5, 1, 2) -> "0.5,1,2"."""
    return ",".join(f"{s:g}" for s in scales)


output_manifest = click.option("-o", "--output", type=FILE, required=True, help="Manifest to write.")
arch_option = click.option(
    "--arch", default="hrnet18s_ocr_mscale", show_default=True, help="Or hrnet48_ocr_mscale; docs/teacher.md has all."
)
combine_option = click.option(
    "--combine", type=click.Choice(COMBINE), default=COMBINE[0], show_default=True,
    help="How scales are combined: as the network learnt to, or the mean of their logits.",
)  # fmt: skip


def parse_policy(_: click.Context, __: click.Parameter, text: str | None) -> Policy | None:
    """A preset or a file."""
    return None if text is None else load_policy(text)


policy_option = click.option(
    "--policy", metavar="P.toml", callback=parse_policy, help=f"Or a preset: {', '.join(PRESETS)}. See docs/policy.md."
)
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")


# --- manifest ---------------------------------------------------------------------------------------------------------


@main.group()
def manifest() -> None:
    """Lists of samples: make, join and look at them."""


@manifest.group()
def scan() -> None:
    """Find images and labels in a folder, and write a manifest."""


split_option = click.option("--split", "splits", multiple=True, help="Only this split; may be given several times.")


@scan.command("cityscapes")
@click.argument("root", type=Path)
@split_option
@output_manifest
def scan_cityscapes(root: Path, splits: tuple[str, ...], output: Path) -> None:
    """Cityscapes as unzipped: ROOT/leftImg8bit, ROOT/gtFine, ROOT/gtCoarse.

    autolabel manifest scan cityscapes data/cityscapes --split train_extra -o coarse.parquet
    """
    from autolabel.manifests import scan as layouts

    with progress("checking files") as update:
        found = layouts.scan_cityscapes(root, splits, update)
    _save_scan(output, *found)


@scan.command("mapillary")
@click.argument("root", type=Path)
@split_option
@output_manifest
def scan_mapillary(root: Path, splits: tuple[str, ...], output: Path) -> None:
    """Mapillary Vistas v1.2 or v2.0; the classes are read from its config.json.

    autolabel manifest scan mapillary data/vistas --split training -o fine.parquet
    """
    from autolabel.manifests import scan as layouts

    with progress("checking files") as update:
        found = layouts.scan_mapillary(root, splits, update)
    _save_scan(output, *found)


@scan.command("folder")
@click.option("--images", type=Path, required=True, help="Folder of png, jpg or webp images, searched recursively.")
@click.option("--labels", type=Path, help="Folder of fine labels: PNGs with the images' relative paths and stems.")
@click.option("--coarse", type=Path, help="Folder of coarse labels, likewise.")
@click.option("--label-space", required=True, help="cityscapes, camvid, or a JSON file with the classes.")
@click.option(
    "--label-ids",
    type=click.Choice(["train", "source"]),
    default="train",
    show_default=True,
    help="Whether the PNGs hold train ids or the label space's source ids.",
)
@output_manifest
def scan_folder(
    images: Path, labels: Path | None, coarse: Path | None, label_space: str, label_ids: str, output: Path
) -> None:
    """Any folder of images, with or without labels.

    autolabel manifest scan folder --images drive/ --label-space cityscapes -o drive.parquet
    """
    from autolabel.manifests import scan as layouts
    from autolabel.manifests.label_space import load_label_space

    space = load_label_space(label_space)
    with progress("checking files") as update:
        found = layouts.scan_folder(images, labels, coarse, space, label_ids, update)
    _save_scan(output, *found)


def _save_scan(output: Path, found: Manifest, account: Account) -> None:
    from autolabel.manifests.samples import save_manifest

    save_manifest(output, found)
    sources = account.sources
    sizes = ", ".join(f"{w} x {h} ({n})" for (h, w), n in account.sizes.most_common(4))
    more = f" and {len(account.sizes) - 4} other sizes" if len(account.sizes) > 4 else ""
    click.echo(f"{account.images} images, {len(found.label_space)} classes of label space {found.label_space.name!r}")
    click.echo(f"  with fine labels    {sources['fine']}")
    click.echo(f"  with coarse labels  {account.coarse} ({sources['coarse']} of them have no fine label)")
    click.echo(f"  without a label     {sources['none']}")
    click.echo(f"  sizes               {sizes or 'unknown'}{more}")
    click.echo("  unknown ids         none")
    click.echo(f"  unreadable images   {_examples(account.unreadable)}")
    click.echo(f"  labels without their image  {_examples([str(p) for p in account.without_image])}")
    click.echo(f"wrote {output}")


def _examples(found: Sequence[str]) -> str:
    if not found:
        return "none"
    return f"{len(found)}: {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")


@manifest.command()
@click.argument("manifests", type=FILE, nargs=-1, required=True)
@output_manifest
@click.option("--weight", "weights", multiple=True, help="SOURCE=NUMBER, e.g. auto=0.5: how often it is drawn.")
@click.option("--leak-check", type=FILE, help="Refuse if an image is also in this (validation) manifest.")
@click.option("--drop-worst", metavar="SHARE", callback=parse_share, help="Of each run's images, such as 5% or 0.05.")
@click.option("--keep-if", metavar="CONDITION", help="On the statistics of a run's images; docs/statistics.md.")
def fuse(
    manifests: tuple[Path, ...],
    output: Path,
    weights: tuple[str, ...],
    leak_check: Path | None,
    drop_worst: float | None,
    keep_if: str | None,
) -> None:
    """Join the labelled samples of several manifests into one to train on.

    --drop-worst and --keep-if leave images of runs out, by their statistics: the least trusted (stats/review.parquet),
    and those that do not meet a condition.

    \b
    autolabel manifest fuse fine.parquet runs/auto/manifest.parquet -o fused.parquet --leak-check val.parquet
    autolabel manifest fuse fine.parquet runs/auto/manifest.parquet -o fused.parquet --drop-worst 5%
       --keep-if 'agreement_with_coarse > 0.8'
    """
    from autolabel.manifests import fuse as joining
    from autolabel.manifests.schemas import SOURCES

    by_source = {}
    for text in weights:
        source, _, number = text.partition("=")
        try:
            by_source[source] = float(number)
        except ValueError:
            by_source[source] = -1.0
        if source not in SOURCES or not 0 <= by_source[source] < math.inf:
            raise Failure(f"--weight {text}: expected SOURCE=NUMBER, such as auto=0.5")
    fused = joining.fuse(
        manifests, output, weights=by_source, leak_check=leak_check, drop_worst=drop_worst, keep_if=keep_if
    )
    for line in fused.lines():
        click.echo(line)


@manifest.command("show")
@click.argument("path", metavar="M.parquet", type=FILE)
def show_manifest(path: Path) -> None:
    """Print what a manifest holds."""
    from autolabel.manifests.samples import load_manifest

    found = load_manifest(path)
    click.echo(f"{path}: " + "\n".join(found.lines()))
    for shown in found.tables():
        table(shown.title, shown.header, shown.rows)


# --- train, evaluate, compare -----------------------------------------------------------------------------------------


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """What a training is asked for besides its data, in the order of the help."""
    options = (
        arch_option,
        click.option("--steps", type=int, default=1000, show_default=True),
        click.option("--batch-size", type=int, default=4, show_default=True, help="Crops of a step."),
        click.option("--crop", callback=parse_crop, help="HxW. [default: the images' size, up to 512x1024]"),
        click.option(
            "--loss", type=click.Choice(["cross-entropy", "balanced", "image-weighted", "rmi"]),
            default="cross-entropy", show_default=True, help="balanced and, slightly, image-weighted: rare classes"
            " weigh more. rmi: neighbouring pixels are judged together (arXiv 1910.12037).",
        ),
        click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw", show_default=True),
        click.option(
            "--learning-rate", type=float,
            help="Peak. [default: 0.003 for adamw, 0.01 for sgd; a third with --init]",
        ),
        click.option(
            "--schedule", type=click.Choice(["poly", "cosine"]), default="poly", show_default=True,
            help="How the learning rate falls, after 5 % of warm-up.",
        ),
        click.option("--power", type=float, default=0.9, show_default=True, help="Exponent of poly."),
        click.option(
            "--ema", type=float, metavar="DECAY", help="Score and keep averaged weights, with 0.999 for example."
        ),
        click.option(
            "--init", type=FILE, help="Start from this checkpoint, or from weights of the trunk; docs/teacher.md."
        ),
        click.option(
            "--fine-only-last", type=float, default=0.0, show_default=True,
            help="Share of the steps, at the end, on fine labels.",
        ),
        click.option("--precision", default="auto", show_default=True, help="auto, float32, bfloat16 or float16."),
        click.option("--compile", is_flag=True, help="Compile the network; the first step takes minutes."),
        click.option(
            "--accumulate", type=int, default=1, show_default=True, help="Parts of a batch, one after the other."
        ),
        click.option(
            "--workers", type=int, default=1, show_default=True, help="Processes that share every batch (Ray Train)."
        ),
        click.option(
            "--address", help="Ray cluster to train on. [default: $RAY_ADDRESS with --workers, else none]"
        ),
        device_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@click.argument("manifest_path", metavar="MANIFEST", type=FILE)
@click.option("--val", type=FILE, required=True, help="Manifest to validate on; it shares no image with MANIFEST.")
@click.option("--out", type=FOLDER, required=True, help="Folder of the training; started again, it goes on.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--auto-share", type=float, help="Share of automatic labels in each epoch. [default: by weight]")
@click.option(
    "--auto-classes",
    callback=lambda ctx, option, value: value and tuple(name.strip() for name in value.split(",")),
    metavar="NAMES",
    help="Classes that crops of automatic labels are aimed at, comma-separated. [default: all]",
)
@training_options
def train(manifest_path: Path, **options: Any) -> None:
    """Train a teacher on fine labels, or a student on a fused manifest.

    Half of the crops are aimed at a class, every class as often as the next. A step shows --batch-size crops, whatever
    the number of workers.

    \b
    autolabel train fine.parquet --val val.parquet --out teacher
    autolabel train fine.parquet --val val.parquet --out teacher --batch-size 16 --workers 4
    """
    from autolabel.student import train as training
    from autolabel.student.job import TrainJob

    job = build_job(TrainJob, {"manifest": manifest_path, **options})
    with progress(f"training {job.arch}") as update:

        def on_step(report: StepReport) -> None:
            update(report.step, job.steps, _step_note(report), report.images_per_s / job.batch_size)

        def on_label(done: int, total: int) -> None:
            update(0, job.steps, f"reading labels {done}/{total}")

        scores = training.train(job, on_step, progress=on_label, on_note=update.say)
    show(scores)
    click.echo(f"checkpoint {job.out / 'best.pt'}   curves {job.out / 'curves.csv'}   scores {job.out / 'scores.json'}")


def _step_note(report: StepReport) -> str:
    miou = f"  mIoU {percent(report.miou)}" if report.miou is not None else ""
    return f"loss {report.loss:.3f}  {report.images_per_s:.1f} images/s{miou}"


@main.command()
@click.argument("checkpoint", type=FILE)
@click.argument("manifest_path", metavar="MANIFEST", type=FILE)
@click.option("-o", "--output", type=FILE, help="Write the scores as JSON too.")
@click.option("--scales", callback=parse_scales, help="[default: those that it trains with]")
@click.option("--flip", is_flag=True, help="Average with the mirrored image.")
@combine_option
@click.option(
    "--pictures", type=FOLDER, help="Draw the worst images into this folder: photograph, truth, prediction, errors."
)
@click.option("--allow-overlap", is_flag=True, help="Score on images that the checkpoint was trained on.")
@device_option
def evaluate(
    checkpoint: Path,
    manifest_path: Path,
    output: Path | None,
    scales: tuple[float, ...] | None,
    flip: bool,
    combine: str,
    pictures: Path | None,
    allow_overlap: bool,
    device: str,
) -> None:
    """Print per-class IoU, boundary F and the worst images of a checkpoint on a manifest with fine labels.

    \b
    autolabel evaluate teacher/best.pt val.parquet -o scores.json
    autolabel evaluate teacher/best.pt val.parquet --scales 0.5,1,2 --flip --pictures worst
    """
    from autolabel.student.evaluate import evaluate as run_evaluation

    with progress("scoring") as update:
        scores = run_evaluation(
            checkpoint, manifest_path, scales=scales, device=device, allow_overlap=allow_overlap, combine=combine,
            progress=update, flip=flip, pictures=pictures,
        )  # fmt: skip
    if output:
        scores.write(output)
    show(scores)
    if pictures:
        click.echo(f"pictures: {pictures} has photograph, truth, prediction, errors (blue right, orange wrong)")


def parse_arms(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, Path]:
    """("clean=runs/clean",) -> {"clean": Path("runs/clean")}."""
    arms = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path) or name in arms:
            raise Failure(f"--arm {text}: expected NAME=MANIFEST.parquet or NAME=RUN, every name once")
        arms[name] = Path(path)
    return arms


@main.command()
@click.option("--fine", type=FILE, required=True, help="Manifest of fine labels.")
@click.option("--coarse", type=FILE, required=True, help="Manifest of the coarsely labelled images.")
@click.option("--auto", "run", type=FOLDER, required=True, help="Run that labelled the same images.")
@click.option(
    "--arm", "further", multiple=True, metavar="NAME=PATH", callback=parse_arms,
    help="One more arm, from a manifest or a run; may be given several times.",
)  # fmt: skip
@click.option("--val", type=FILE, required=True, help="Manifest to score on.")
@click.option("--out", type=FOLDER, required=True)
@click.option("--seeds", type=int, default=1, show_default=True, help="Trainings per arm; verdicts need 2 or more.")
@click.option(
    "--added-share", type=float, default=0.5, show_default=True,
    help="Share of the draws of every arm but fine that are of the labels it adds.",
)  # fmt: skip
@training_options
def compare(
    fine: Path,
    coarse: Path,
    run: Path,
    further: dict[str, Path],
    seeds: int,
    added_share: float,
    **options: Any,
) -> None:
    """Train students, alike but for their labels, and say class by class who learnt more.

    \b
    autolabel compare --fine fine.parquet --coarse coarse.parquet --auto runs/auto --val val.parquet --out compare
       --seeds 3 --arm human-first=runs/human-first
    """
    from autolabel.student.comparison import compare as students
    from autolabel.student.job import TrainJob

    if seeds < 1:
        raise Failure(f"--seeds {seeds}: expected 1 or more")
    template = build_job(TrainJob, {"manifest": fine, **options})
    arms = students.arm_names(further)
    total = template.steps * seeds * len(arms)
    with progress("training students") as update:

        def tell(arm: str, seed: int, step: int, note: str) -> None:
            trainings = seed * len(arms) + arms.index(arm)
            update(trainings * template.steps + step, total, f"{arm}, seed {seed}: {note}")

        def on_step(arm: str, seed: int, report: StepReport) -> None:
            tell(arm, seed, report.step, _step_note(report))

        def on_label(arm: str, seed: int, done: int, count: int) -> None:
            tell(arm, seed, 0, f"reading labels {done}/{count}")

        found = students.compare(
            fine, coarse, run, template, range(seeds), on_step, further, on_label, update.say, added_share
        )
    show(found)
    click.echo(f"wrote {template.out / 'compare.json'}   open {template.out / 'index.html'}")


# --- generate, stats, report ------------------------------------------------------------------------------------------


@main.command()
@click.argument("manifest_path", metavar="SOURCE", type=Path)
@click.option("--teacher", type=FILE, required=True, help="Checkpoint of `autolabel train`, or a published one.")
@click.option("--out", type=FOLDER, required=True, help="Run folder; started again, it does what is left.")
@click.option("--scales", default=numbers(SCALES), show_default=True, callback=parse_scales)
@click.option("--flip", is_flag=True, help="Average with the mirrored image.")
@combine_option
@click.option("--threshold", type=float, help=f"Keep a label where p exceeds it. [default: {PAPER.threshold:g}]")
@policy_option
@click.option("--keep-confidence", type=int, metavar="LEVELS", help="Keep it too, in so many levels, for `relabel`.")
@click.option("--store", type=click.Choice(STORES), default=STORES[0], show_default=True)
@click.option("--engine", type=click.Choice(ENGINES), default=ENGINES[0], show_default=True)
@click.option("--address", help="Ray cluster to use. [default: $RAY_ADDRESS, else a private Ray on this machine]")
@click.option("--device", type=click.Choice(DEVICES), default=DEVICES[0], show_default=True, help="auto: GPUs if any.")
@click.option("--workers", type=int, help="[default: one per GPU, or one per core without GPUs]")
@click.option("--limit", type=int, help="Label the first N samples only; the rest is left for later.")
@click.option("--only", metavar="GLOB", help="Label the samples whose id fits, such as 'aachen_*'.")
@click.option("--part", "part", metavar="I/N", callback=parse_part, help="Every N-th unit, from the I-th.")
@click.option("--retry-quarantined", is_flag=True, help="Try quarantined images again, such as on a larger GPU.")
@click.option("--unit-size", type=int, default=LabelJob.unit_size, show_default=True, help="Samples of a unit.")
@click.option("--precision", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--max-quarantined", type=float, default=LabelJob.max_quarantined, show_default=True, help="Share.")
@click.option("--dry-run", is_flag=True, help="Label nothing; tell what there is to do and how long it would take.")
def generate(
    manifest_path: Path,
    threshold: float | None,
    policy: Policy | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Label the images of a manifest.

    autolabel generate coarse.parquet --teacher teacher/best.pt --out runs/auto
    """
    from autolabel.pipeline.run import generate as run_labelling

    if policy is not None and threshold is not None:
        raise Failure(f"--threshold {threshold:g} and --policy: write the threshold into the policy")
    if policy is None:
        policy = PAPER if threshold in (None, PAPER.threshold) else Policy(threshold=threshold)
    job = build_job(LabelJob, {"manifest": manifest_path, "policy": policy, **options})
    if dry_run:
        from autolabel.pipeline.preview import preview

        show(preview(job))
        return
    with progress("labelling") as update:
        result = run_labelling(job, on_progress=_labelling_note(update), on_note=update.say)
    _show_result(result, job.max_quarantined)


def _labelling_note(update: Reporter) -> Callable[[Counters], None]:
    def report(now: Counters) -> None:
        parts = [f"{now.images_per_s:.1f} images/s"] if now.images_per_s else []
        parts += [f"{percent(now.coverage)} % kept, {now.classes} classes"] if now.coverage is not None else []
        parts += [f"{now.quarantined} quarantined"] if now.quarantined else []
        parts += [f"{now.workers} worker{'s' if now.workers > 1 else ''}"] if now.workers else []
        update(now.before + now.done, now.before + now.wanted, "  ".join(parts), now.images_per_s)

    return report


def _show_result(result: Labelling, max_quarantined: float) -> None:
    """Print the accounts of a labelling run; leave as its outcome demands."""
    show(result)
    accounts = result.accounts
    if result.stopped:
        raise KeyboardInterrupt
    if result.failed:
        name, why = next(iter(result.failed.items()))
        raise Failure(f"{len(result.failed)} units failed (the first, {name}: {why}); run the same again to retry them")
    if accounts.quarantined > max_quarantined * accounts.asked:
        click.echo(
            f"autolabel: {accounts.quarantined} of {accounts.asked} samples are quarantined, more than"
            f" --max-quarantined {max_quarantined:g}; reasons in {result.run.quarantine_path}",
            err=True,
        )
        click.get_current_context().exit(QUARANTINED)


@main.command()
@click.argument("run", type=FOLDER)
@policy_option
@click.option("--out", type=FOLDER, required=True, help="New run folder; started again, it does what is left.")
@click.option("--workers", type=int, help="Threads. [default: one per core]")
def relabel(run: Path, policy: Policy | None, out: Path, workers: int | None) -> None:
    """Label a run's images again by another policy, from its kept confidence, without the teacher.

    autolabel relabel runs/auto --policy suggested.toml --out runs/auto2
    """
    from autolabel.manifests.run.folder import Run
    from autolabel.pipeline.relabel import relabel as relabel_run

    if policy is None:
        raise Failure("missing --policy: expected a preset or a TOML file")
    with progress("relabelling") as update:
        result = relabel_run(
            Run.open(run), policy, out=out, workers=workers, on_progress=_labelling_note(update), on_note=update.say
        )
    _show_result(result, LabelJob.max_quarantined)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--repair", is_flag=True, help="Put damaged units back to undone; `generate` then labels them again.")
def verify(run: Path, repair: bool) -> None:
    """Read everything in a run again and compare it with what was committed.

    autolabel verify runs/auto
    """
    from autolabel.pipeline.verify import verify as verify_run

    with progress("verifying") as update:
        found = verify_run(run, repair=repair, progress=update)
    show(found)
    if found.faults and repair:
        click.echo(f"units put back to undone: {found.undone}; run the same `autolabel generate` again to label them")
    elif found.faults:
        raise Failure(f"{run} is damaged: `autolabel verify {run} --repair`, then the same generate again")


@main.group(cls=Otherwise, otherwise="RUN")
def stats() -> None:
    """What a run's labels look like, how two runs differ, and what people outlined.

    `autolabel stats RUN --help`, and `diff` or `outlined` in its place, have the options.
    """


@stats.command("RUN")
@click.argument("run", type=FOLDER)
@click.option("--threshold", type=float, help="What another threshold would have kept: a multiple of 0.05.")
def stats_run(run: Path, threshold: float | None) -> None:
    """Print what a run's labels look like, coarse and auto side by side.

    \b
    autolabel stats runs/auto
    autolabel stats runs/auto --threshold 0.7
    """
    from autolabel.pipeline.analysis.stats import at_threshold, summarise

    summary = summarise(run)
    if not summary.images:
        raise Failure(f"{run} has no labelled image: nothing to show; reasons may be in {run / 'quarantine.parquet'}")
    show(summary if threshold is None else at_threshold(summary, threshold))


@stats.command("outlined")
@click.argument("run", type=FOLDER)
@click.option("-o", "--output", type=FILE, required=True, help="The run's policy with these shares, for `generate`.")
def stats_outlined(run: Path, output: Path) -> None:
    """Count how much of each class people outline, and write a policy that makes use of it.

    \b
    autolabel generate coarse.parquet --teacher teacher/best.pt --out trial --policy human-first --limit 500
    autolabel stats outlined trial -o outlined.toml
    autolabel generate coarse.parquet --teacher teacher/best.pt --out runs/auto --policy outlined.toml
    """
    from autolabel.pipeline.analysis.stats import outlined

    counts = outlined(run, output=output)
    show(counts)
    click.echo(f"wrote {output}: policy {counts.policy.name!r}, to be used where these people labelled")


@stats.command("diff")
@click.argument("run_a", type=FOLDER)
@click.argument("run_b", type=FOLDER)
def stats_diff(run_a: Path, run_b: Path) -> None:
    """Compare the labels of two runs over the same manifest, pixel by pixel.

    autolabel stats diff runs/auto runs/strict
    """
    from autolabel.pipeline.analysis.diff import compare

    with progress("comparing") as update:
        difference = compare(run_a, run_b, progress=update)
    show(difference)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--truth", type=FILE, required=True, help="Manifest with fine labels of images that the run labelled.")
@click.option("--target-precision", type=float, default=0.95, show_default=True, help="Of every class's label.")
@click.option("--fit-temperature", is_flag=True, help="Scale the teacher's logits so that its confidences come true.")
@click.option("--allow-leak", is_flag=True, help="Also with truth that the teacher was trained on; it is recorded.")
@click.option("--teacher", type=FILE, help="Where the run's teacher is now. [default: where it was]")
def audit(run: Path, truth: Path, target_precision: float, fit_temperature: bool, allow_leak: bool,
          teacher: Path | None) -> None:  # fmt: skip
    """Hold a run's labels against truth: precision, borders, calibration, and a threshold for each class.

    autolabel audit runs/auto --truth held_out.parquet
    """
    from autolabel.pipeline.analysis.audit import audit as audit_run

    with progress("auditing") as update:
        result = audit_run(
            run, truth, target_precision=target_precision, fit_temperature=fit_temperature, allow_leak=allow_leak,
            teacher=teacher, progress=update,
        )  # fmt: skip
    show(result)
    click.echo(f"\nwrote {run / 'audit.json'}" + (f" and {run / 'suggested.toml'}" if result.reliability else ""))


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--images", type=click.IntRange(min=1), default=100, show_default=True, help="How many, worst first.")
@click.option("--sample", "chosen", multiple=True, help="Show this sample id; may be given several times.")
@click.option("--teacher", type=FILE, help="Where the run's teacher is now. [default: where it was]")
@click.option("--attention", is_flag=True, help="Show too what the teacher sees at each scale, and how much it counts.")
def report(run: Path, images: int, chosen: tuple[str, ...], teacher: Path | None, attention: bool) -> None:
    """Write RUN/report/index.html: plots, and a gallery that opens from disk."""
    from autolabel.pipeline.report.write import write_report

    with progress("drawing") as update:
        page = write_report(run, images=images, samples=chosen, teacher=teacher, attention=attention, progress=update)
    click.echo(f"open {page}")


# --- demo -------------------------------------------------------------------------------------------------------------

# Sizes at which two cores need a few minutes.
_DEMO_STEPS = """
manifest scan cityscapes {out}/city --split train -o {out}/fine.parquet
manifest scan cityscapes {out}/city --split train_extra -o {out}/coarse.parquet
manifest scan cityscapes {out}/city --split val -o {out}/val.parquet
train {out}/fine.parquet --val {out}/val.parquet --out {out}/teacher --steps 250
 --batch-size 8 --crop 96x128 --seed {seed}
generate {out}/coarse.parquet --teacher {out}/teacher/best.pt --out {out}/runs/auto --unit-size 16
 --keep-confidence 8
stats {out}/runs/auto
manifest fuse {out}/fine.parquet {out}/runs/auto/manifest.parquet -o {out}/fused.parquet --leak-check {out}/val.parquet
compare --fine {out}/fine.parquet --coarse {out}/coarse.parquet --auto {out}/runs/auto --val {out}/val.parquet
 --out {out}/compare --init {out}/teacher/best.pt --steps 190 --batch-size 8 --crop 64x96 --ema 0.98
report {out}/runs/auto
""".replace("\n ", " ")


@main.command()
@click.option("--out", type=FOLDER, default="demo", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """Everything below on generated street scenes, on a CPU, in minutes.

    Draws a small city in the layout of Cityscapes, then runs the real commands on it and prints each.
    """
    from autolabel.manifests.scenes import write_city

    started = time.monotonic()
    marker = out / f"seed-{seed}"
    if not marker.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise Failure(f"{out} is not empty and holds no demo of seed {seed}: choose another --out")
        click.secho("\nA city to drive in: streets drawn from a seed, labelled like Cityscapes.", bold=True)
        with progress("drawing scenes") as update:
            write_city(out / "city", seed, fine=24, coarse=80, val=20, on_scene=update)
        marker.touch()
    for line in _DEMO_STEPS.strip().splitlines():
        command = line.format(out=out, seed=seed)
        click.secho(f"\n$ autolabel {command}", bold=True)
        main.main(args=shlex.split(command), prog_name="autolabel", standalone_mode=False)
    click.secho(f"\nDone in {_duration(time.monotonic() - started)}.", bold=True)
    click.echo(
        f"Open {out}/runs/auto/report/index.html in a browser: classes before and after, every image with its labels.\n"
        f"\nOn your own images:\n"
        f"  autolabel manifest scan folder --images IMAGES --coarse COARSE --label-space cityscapes -o coarse.parquet\n"
        f"  autolabel generate coarse.parquet --teacher CHECKPOINT --out runs/auto\n"
        f"  autolabel report runs/auto"
    )


def run() -> None:
    """The command. When it is stopped, threads that are still at an image are not waited for."""
    try:
        main(prog_name="autolabel")
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    run()
