"""Names that command the terminal, output that cannot show a character, and errors that nobody has foreseen.

If this fails, a traceback, or a stranger's escape sequence, reaches the terminal.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click import Group
from click.testing import CliRunner, Result
from conftest import ROOT, autolabel
from PIL import Image

from autolabel import terminal
from autolabel.manifests.images import BadImage
from autolabel.manifests.wording import as_ascii, plain
from autolabel.terminal import Commands, Reporter, echo, progress

MISTAKE = re.compile(r"autolabel: (?P<what>.*); traceback in (?P<place>\S+)\n")


def ending(fail: Callable[[], object], **more: object) -> Result:
    """The end of a command that does this."""

    @click.group(cls=Commands)
    def main() -> None:
        pass

    @main.command()
    def work() -> None:
        fail()

    return CliRunner(**more).invoke(main, ["work"])  # type: ignore[arg-type]


def deep(levels: int = 0) -> int:
    return deep(levels + 1) + 1


def full_memory() -> None:
    raise MemoryError


def bare() -> None:
    raise Exception("the node did not come up\nin time")


UNFORESEEN = {
    "RecursionError": deep,
    "OverflowError": lambda: float(10**400),
    "TypeError": lambda: len(5),  # type: ignore[arg-type]
    "KeyError": lambda: {}["a"],
    "AttributeError": lambda: None.nothing,  # type: ignore[attr-defined]
    "ValueError": lambda: int("x"),
    "JSONDecodeError": lambda: json.loads("{"),
    "UnidentifiedImageError": lambda: Image.open(__import__("io").BytesIO(b"x")),
    "Exception": bare,
    "AssertionError": lambda: (_ for _ in ()).throw(AssertionError("no")),
}


@pytest.mark.parametrize("kind", UNFORESEEN)
def test_an_error_that_nobody_has_foreseen_is_one_line_that_names_a_traceback(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = ending(UNFORESEEN[kind])
    assert result.exit_code == 70
    told = MISTAKE.fullmatch(result.stderr)
    assert told, result.stderr
    assert told["what"].startswith(f"a mistake in autolabel, {kind}")
    assert told["what"].endswith("; please report it")
    assert [str(path) for path in tmp_path.iterdir()] == [told["place"]]
    story = Path(told["place"]).read_text(encoding="utf-8")
    assert "Traceback (most recent call last)" in story and kind in story and f"Python {sys.version}" in story


def test_a_lack_of_memory_is_one_line_with_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = ending(full_memory)
    assert result.exit_code == 70
    told = MISTAKE.fullmatch(result.stderr)
    assert told
    assert told["what"] == "out of memory; give this process more, or fewer --workers, or a smaller batch or crop"


@pytest.mark.parametrize("place", ["missing", "file"])
def test_a_traceback_that_cannot_be_written_follows_the_line(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / place))
    result = ending(UNFORESEEN["KeyError"])
    assert result.exit_code == 70
    line, *story = result.stderr.splitlines()
    assert line == "autolabel: a mistake in autolabel, KeyError: 'a'; please report it; traceback follows"
    assert story[-1] == "KeyError: 'a'"


def test_an_error_while_the_traceback_is_made_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise TypeError("no words")

    def fail() -> None:
        raise Odd

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = ending(fail)
    assert result.exit_code == 70
    assert "a mistake in autolabel, Odd; please report it" in result.stderr


def test_errors_that_a_user_can_mend_keep_their_line_and_their_code() -> None:
    def missing() -> None:
        Path("/nowhere/file").read_bytes()

    def ours() -> None:
        raise BadImage("image a.png: the file is empty")

    def ours_from_theirs() -> None:
        try:
            int("x")
        except ValueError as error:
            raise terminal.Failure("number x: expected one") from error

    for fail, line in (
        (missing, "No such file or directory: /nowhere/file"),
        (ours, "image a.png: the file is empty"),
        (ours_from_theirs, "number x: expected one"),
    ):
        result = ending(fail)
        assert (result.exit_code, result.stderr) == (2, f"autolabel: {line}\n")


def test_a_file_that_ends_too_early_is_no_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise EOFError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = ending(fail)
    assert result.exit_code == 70
    assert "a file ended too early" in result.stderr


def test_ctrl_c_is_one_line_and_130() -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    result = ending(fail)
    assert result.exit_code == 130
    assert result.stderr == "autolabel: interrupted; everything finished so far is kept, run the same again\n"


def test_a_wrong_option_before_the_command_is_one_line_too() -> None:
    result = autolabel("--nothing")
    assert result.exit_code == 2
    assert result.stderr == "autolabel: no such option '--nothing'; `autolabel --help` lists the options\n"


# --- names are data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),  # sets the title of the window
        ("\x1b[2J", r"\x1b[2J"),  # wipes the screen
        ("\x9b31m", r"\x9b31m"),  # the same as ESC [ in one character
        ("a\rb\nc\x08", r"a\rb\nc\x08"),
        ("gpj\u202e.exe", r"gpj\u202e.exe"),  # reads from right to left
        ("a\u2066b\u200f", r"a\u2066b\u200f"),
        ("line\u2028end", r"line\u2028end"),
        ("stra\udcdfe", r"stra\xdfe"),  # a byte that is not UTF-8
        ("[red]lane[/red] [/x]", "[red]lane[/red] [/x]"),
        ("图像 é ﷺ 🚗", "图像 é ﷺ 🚗"),
        ("wide\u3000space", "wide\u3000space"),
    ],
)
def test_what_would_command_a_terminal_is_shown_as_an_escape_and_the_rest_as_it_is(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plain(name) == shown
    echo(f"<{name}>", f"sample {name}", err=True)
    assert capsys.readouterr().err == f"<{shown}>\nsample {shown}\n"


def test_progress_shows_names_as_they_are_and_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("labelling") as update:
        update(1, 1, "[/x] \x1b[2J")
        update.say("waits for [red]a[/red] \x1b]0;x\x07")
    assert capsys.readouterr().err.splitlines() == [
        r"labelling: 1/1  [/x] \x1b[2J",
        r"labelling: waits for [red]a[/red] \x1b]0;x\x07",
    ]


def test_a_bar_shows_names_as_they_are_and_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress("labelling") as update:
        assert isinstance(update, Reporter)
        update(1, 2, "[/x] \x1b[99m")
        update.say("waits for [red]a[/red] \x1b[98m \u202e")
    told = capsys.readouterr().err
    assert r"[/x] \x1b[99m" in told and r"waits for [red]a[/red] \x1b[98m \u202e" in told
    assert "\x1b[99m" not in told and "\x1b[98m" not in told and "\u202e" not in told


def test_names_in_a_command_are_escaped_wherever_they_occur(tmp_path: Path) -> None:
    evil = "lane \x1b[31m[/red]\u202e"
    (tmp_path / "space.json").write_text(json.dumps({"labels": [{"name": evil, "color": [1, 2, 3]}]}))
    folder = tmp_path / "pictures \x1b[2J [bold]"
    folder.mkdir()
    Image.new("RGB", (8, 6)).save(folder / "a\x1b[5m[x].png")
    manifest = tmp_path / "m [/b].parquet"
    made = autolabel("manifest", "scan", folder, "--label-space", tmp_path / "space.json", "-o", manifest)
    shown = autolabel("manifest", "show", manifest)
    wrong = autolabel("manifest", "show", tmp_path / "none \x1b[2J [/x]")
    option = autolabel("manifest", "show", manifest, "--\x1b[2J")
    assert (made.exit_code, shown.exit_code, wrong.exit_code, option.exit_code) == (0, 0, 2, 2)
    for result in (made, shown, wrong, option):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", result.output)
    assert r"lane \x1b[31m[/red]\u202e" in shown.stdout and r"a\x1b[5m[x]" in shown.stdout
    assert f"{tmp_path}/pictures " in made.stdout and r"pictures \x1b[2J [bold]" in made.stdout
    assert r"none \x1b[2J [/x]" in wrong.stderr
    assert r"no such option '--\x1b[2J'" in option.stderr


def uses(path: Path) -> set[str]:
    """Everything in a file that could write to the terminal past `echo`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return names & {
        "print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write", "Console", "warnings.warn",
        "click.confirm", "click.prompt", "logging.warning", "traceback.print_exc",
    }  # fmt: skip


def test_one_file_writes_to_the_terminal() -> None:
    rooms = ("manifests", "teacher", "pipeline", "student")
    files = [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).rglob("*.py"))]
    assert {path.name: uses(path) for path in files if uses(path)} == {
        "terminal.py": {"click.echo", "Console"},
        "__init__.py": {"warnings.warn"},  # who calls from Python has no terminal of ours
    }


def test_no_reason_is_only_the_class_of_an_error() -> None:
    """Words of an error come from wording.py, which never gives its class alone."""
    found = set()
    for room in ("manifests", "teacher", "pipeline", "student"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node).endswith(").__name__"):
                    found.add((path.relative_to(ROOT).as_posix(), ast.unparse(node)))
    assert found == {
        ("manifests/wording.py", "type(error).__name__"),
        ("pipeline/ray_engine.py", "type(error).__name__"),  # with the first or the last line of Ray's own
        # The types of values.
        ("student/parallel.py", "type(module).__name__"),
        ("teacher/around.py", "type(scores).__name__"),
        ("teacher/checkpoints.py", "type(trained_on).__name__"),
        ("teacher/foreign/python.py", "type(value).__name__"),
        ("teacher/foreign/transformers.py", "type(network).__name__"),
    }


# --- ASCII ------------------------------------------------------------------------------------------------------------


def test_what_ascii_lacks_is_spelt() -> None:
    assert as_ascii("– − ─ … × → é 图") == r"- - - ... x -> \xe9 \u56fe"


def all_help(group: Group, path: tuple[str, ...] = ()) -> str:
    parts = [autolabel(*path, "--help").output]
    for name, command in group.commands.items():
        parts.append(
            all_help(command, (*path, name)) if isinstance(command, Group) else autolabel(*path, name, "-h").output
        )
    return "".join(parts)


def test_all_help_is_ascii() -> None:
    from autolabel.cli import main

    assert all_help(main).isascii()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_every_output_encoding_gets_tables_and_messages(encoding: str, tmp_path: Path) -> None:
    """A terminal of 1980, a pipe on Windows, and names that neither can show."""
    (tmp_path / "drive").mkdir()
    for name in ("图", "é"):
        Image.new("RGB", (8, 6)).save(tmp_path / "drive" / f"{name}.png")
    asked: list[tuple[int, list[str | Path]]] = [
        (0, ["manifest", "scan", tmp_path / "drive", "--label-space", "camvid", "-o", tmp_path / "m.parquet"]),
        (0, ["manifest", "show", tmp_path / "m.parquet"]),
        (2, ["manifest", "show", tmp_path / "图.parquet"]),
    ]
    output = b""
    for code, words in asked:
        done = subprocess.run(
            [sys.executable, "-m", "autolabel", *map(str, words)],
            env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        output += done.stdout + done.stderr
    text = output.decode(encoding)
    assert text.isascii() == (encoding == "ascii")
    assert ("─" in text, "图.parquet" in text) == (encoding == "utf-8",) * 2
    if encoding != "utf-8":
        assert r"\u56fe.parquet" in text and " ------" in text
