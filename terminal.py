"""The terminal: all that a person sees of a command, its text, its progress and its end.

Everything goes through `echo`. Names are data there: control characters and reversals of the reading direction are
shown as escapes, and an output that cannot show a character gets ASCII. Errors that a user can cause or mend become one
line; anything else is a mistake of ours, and its line names a written traceback.
"""

from __future__ import annotations

import codecs
import contextlib
import dis
import errno
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from autolabel.manifests import notes, storage
from autolabel.manifests.settings import GROUPS
from autolabel.manifests.wording import Shown, as_ascii, duration, plain

INPUT_ERROR, QUARANTINED, MISTAKE, INTERRUPTED = 2, 3, 70, 130  # exit codes beside 0
_PACKAGE = str(Path(__file__).parent)
_UNENCODABLE = "autolabel.ascii"  # how a stream that cannot show a character handles it


def _spell(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return as_ascii(error.object[error.start : error.end]), error.end


codecs.register_error(_UNENCODABLE, _spell)


# --- text -------------------------------------------------------------------------------------------------------------


def echo(*lines: str, err: bool = False, bold: bool = False) -> None:
    """Print lines as they are, but for characters that would command the terminal or that it cannot show."""
    shown = "\n".join(map(plain, lines))
    # A stream that is named is written to in its own encoding; click would send UTF-8 to an ASCII terminal.
    click.echo(click.style(shown, bold=True) if bold else shown, file=sys.stderr if err else sys.stdout)


def show(result: Shown) -> None:
    """Print what a result says of itself."""
    for line in result.lines():
        echo(line)
    for table in result.tables():
        echo("", table.title, bold=True)
        echo(*table.lines())


class Reporter:
    """Shows how far a long work is, when it is called with (done, total, note, rate); `say` prints a line between."""

    def __init__(self, show: Callable[[int, int, str], None], say: Callable[[str], None]) -> None:
        self._show, self.say = show, say
        self._started, self._first = time.monotonic(), -1

    def __call__(self, done: int, total: int, note: str = "", rate: float | None = None) -> None:
        self._first = done if self._first < 0 else self._first
        elapsed = time.monotonic() - self._started
        pace = rate or ((done - self._first) / elapsed if elapsed > 0.5 else 0.0)
        eta = f"{duration((total - done) / pace)} left" if pace and done < total else ""
        self._show(done, total, "  ".join(part for part in (eta, plain(note)) if part))


@contextlib.contextmanager
def progress(title: str) -> Iterator[Reporter]:
    """Show a bar with the time that is left on a terminal, and a plain line every 20 s elsewhere."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        last, finished = time.monotonic(), False

        def line(done: int, total: int, text: str) -> None:
            nonlocal last, finished
            if (done >= total and not finished) or time.monotonic() - last > 20:
                last, finished = time.monotonic(), done >= total
                echo(f"{title}: {done}/{total}  {text}".rstrip(), err=True)

        yield Reporter(line, lambda text: echo(f"{title}: {text}", err=True))
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars, note = Progress(*columns, console=console), Text(no_wrap=True, overflow="ellipsis")
    task = bars.add_task(title, total=None)

    def bar(done: int, total: int, text: str) -> None:
        note.plain = f"  {text}"
        bars.update(task, completed=done, total=total)

    with Live(Group(bars, note), console=console):  # the note below the bar: side by side they would not fit 80 columns
        yield Reporter(bar, lambda text: console.print(plain(text), markup=False, highlight=False))


# --- errors and help --------------------------------------------------------------------------------------------------


class Failure(click.ClickException):
    """One clear line on stderr, exit code 2."""

    exit_code = INPUT_ERROR


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


class StatsCommand(Command):
    """A command that names another one to those who look for it here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raise Failure for `stats polygons …`, unless there is a run of that name."""
        if args[:1] == ["polygons"] and not storage.is_folder(Path("polygons")):
            raise Failure(
                "there is no run 'polygons'; `autolabel polygons FINE_WITH_COARSE -o polygons.json` counts polygons"
            )
        return super().parse_args(ctx, args)


class Commands(click.Group):
    """A group whose commands end in success, or in one line on stderr."""

    command_class = Command
    group_class = type  # click's word for: groups in this group are of its own class

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which a newcomer needs them."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that is named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise click.Abort from error
        except EOFError as error:  # click would take it for a Ctrl-D
            raise RuntimeError("a file ended too early") from error

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run the command that is named and leave with its exit code; not standalone, return it and raise errors."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **more)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors=_UNENCODABLE)
        try:
            with notes.heard(lambda note: echo(f"note: {note}", err=True)):
                code = run(*args, standalone_mode=False, **more)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            code = INPUT_ERROR
        except Exception as error:
            code = _end(error)
        sys.exit(code if isinstance(code, int) else 0)


def foreseen(error: BaseException) -> bool:
    """True for an error that a user can cause or mend: the system's, one of our classes, a ValueError that we raise.

    A ValueError that a library raises, or an operation such as `int`, is a mistake of ours: nobody has said what to do.
    """
    if isinstance(error, (click.ClickException, click.Abort)) or type(error).__module__.startswith("autolabel."):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    if isinstance(error, RuntimeError) and "out of memory" in str(error):  # torch reports a lack of memory so
        return True
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if not isinstance(error, (ValueError, OSError)) or trace is None:
        return False
    code = trace.tb_frame.f_code
    said = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    return said and code.co_filename.startswith(_PACKAGE)


def _end(error: Exception) -> int:
    """Print the line of an error; return the exit code."""
    if isinstance(error, click.Abort):
        echo("autolabel: interrupted; everything finished so far is kept, run the same again", err=True)
        return INTERRUPTED
    if foreseen(error):
        echo(f"autolabel: {_one_line(error)}", err=True)
        return INPUT_ERROR
    kind, words = type(error).__name__, ""
    with contextlib.suppress(Exception):
        words = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        line = "out of memory; give this process more, or fewer --workers, or a smaller batch or crop"
    else:
        line = f"a mistake in autolabel, {kind}{f': {words}' if words else ''}; please report it"
    story = _story(error)
    place = _write(story)
    echo(f"autolabel: {line}; traceback {f'in {place}' if place else 'follows'}", err=True)
    if not place:
        echo(*story.splitlines(), err=True)
    return MISTAKE


def _one_line(error: BaseException) -> str:
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "autolabel"
        message = " ".join(error.format_message().split()).removesuffix(".").replace(". Did you", "; did you")
        message = message[:1].lower() + message[1:] + ("" if message.endswith("?") else ";")
        return f"{message} `{path} --help` lists the options"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, storage.BucketError):
        place = f": {error.filename}" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; free some space and run the same again, finished work is kept" if full else ""
        return f"{error.strerror}{place}{advice}"
    return " ".join((error.format_message() if isinstance(error, click.ClickException) else str(error)).split())


def _story(error: Exception) -> str:
    """The arguments, the versions, and the traceback."""
    asked = " ".join(map(repr, sys.argv))
    try:
        told = "".join(traceback.format_exception(error))
    except Exception as further:  # nothing may hide that the command failed
        told = f"{type(error).__name__}, whose traceback cannot be shown ({type(further).__name__})\n"
    return f"{asked}\nPython {sys.version}\n{platform.platform()}\n{told}"


def _write(story: str) -> str:
    """Write a file of its own into the system's temporary folder; return its name, empty if that is impossible."""
    try:
        with tempfile.NamedTemporaryFile(prefix="autolabel-traceback-", suffix=".txt", delete=False) as file:
            file.write(story.encode(errors="backslashreplace"))
        return file.name
    except OSError:
        return ""


def run_command(command: click.Group) -> None:
    """Run the command line. A command that was stopped does not wait for threads that still work on an image."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # those of libraries are lines of Python, which help nobody here
    try:
        command(prog_name="autolabel")
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
