"""The README and docs tell the truth. If this fails, a stranger types a command that does not exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from test_arrows import MAY_IMPORT, ROOT, commands

from autolabel.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TYPED = sorted(
    {
        line
        for text in PAGES.values()
        for line in re.findall(r"^autolabel [^#\n]+", text.replace("\\\n", " "), flags=re.MULTILINE)
    }
)


@pytest.mark.parametrize("line", TYPED)
def test_a_command_of_the_pages_is_one_that_the_program_understands(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command: click.Command = main
    words = shlex.split(line)[1:]
    monkeypatch.chdir(tmp_path)
    for policy in (Path(word) for word in words if word.endswith(".toml")):
        policy.parent.mkdir(parents=True, exist_ok=True)
        policy.touch()  # an empty one is one that changes nothing
    while isinstance(command, click.Group):
        _, found, words = command.resolve_command(click.Context(command), words)
        assert found is not None
        command = found
    command.make_context(line, words)  # parses every option and argument, runs nothing


def test_every_command_is_in_the_readme() -> None:
    groups = (("manifest",), ("manifest", "scan"), ("stats", "RUN"))  # the last is typed with a run's own name
    leaves = [" ".join(path) for path in commands(main) if path not in groups]
    assert [name for name in leaves if f"autolabel {name}" not in README and f"make {name}" not in README] == []


def test_every_file_of_the_rooms_is_in_the_tree() -> None:
    tree = README[README.index("## The tree") :]
    missing = [
        path.name
        for room in MAY_IMPORT
        for path in sorted((ROOT / room).iterdir())
        if path.suffix in (".py", ".j2") and path.name != "__init__.py" and path.name not in tree
    ]
    assert missing == []


def test_its_pictures_exist() -> None:
    for page, text in PAGES.items():
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert (page.parent / picture).is_file()
