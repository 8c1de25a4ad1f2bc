"""Write docs/cli.md: the help of every command, as the program prints it. Run it after a change of an option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from autolabel.cli import main

PAGE = Path(__file__).with_name("cli.md")
_HEAD = """# Every command and its options

`autolabel COMMAND --help` prints the same. This page is made from the program by `python docs/make_cli.py`.
"""


def page() -> str:
    """Return the page as Markdown."""
    return _HEAD + "".join(f"\n## {path}\n\n```\n{text}\n```\n" for path, text in _help(main, "autolabel", None))


def _help(command: click.Command, name: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    context = click.Context(command, parent, name, terminal_width=110, **command.context_settings)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            yield from _help(command.commands[child], child, context)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
