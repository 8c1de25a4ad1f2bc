"""The README and docs tell the truth. If this fails, a stranger types a command that does not exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from conftest import ROOT
from test_arrows import MAY_IMPORT, commands

from autolabel.cli import main
from autolabel.manifests.focus import Focus, FocusCertificate
from autolabel.manifests.label_space import CAMVID
from autolabel.manifests.policy import SCALES

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PAGES = {
    path: path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("docs/**/*.md")])
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
    words = shlex.split(re.sub(r" > [\w./]+$", "", line.strip()))[1:]
    monkeypatch.chdir(tmp_path)
    for before, word in zip(["", *words], words, strict=False):
        if word.endswith(".toml"):  # an empty policy is one that changes nothing
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text('classes.road = ["road"]' if before == "--classes" else "")
    Path("classes.json").write_text(CAMVID.to_json())
    FocusCertificate(Focus(0.25, (1.0,), (6.0,)), "", SCALES, False, "network", ("road",), 1, 1).write(
        Path("focus.json")
    )
    context = click.Context(command, info_name="autolabel", **command.context_settings)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None
        command = found
        if isinstance(command, click.Group):
            context = click.Context(command, context, name, **command.context_settings)
    command.make_context(line, words, context)  # parses every option and argument, runs nothing


def test_every_command_is_in_the_tutorial() -> None:
    tutorial = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    leaves = [" ".join(path) for path in commands(main) if path not in (("manifest",), ("teacher",))]
    assert [name for name in leaves if f"autolabel {name}" not in tutorial and f"make {name}" not in README] == []


def test_the_tree_in_contributing_has_every_file_of_the_rooms_and_no_other() -> None:
    tree = CONTRIBUTING[CONTRIBUTING.index("## The tree") :].split("```")[1]
    listed = set(re.findall(r"[\w]+(?:\.html)?\.(?:py|j2|css|js|typed|safetensors)\b", tree))
    files = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.*") if "__pycache__" not in path.parts]
    rooms = {path.name for path in files if path.suffix != ".json"} - {"__init__.py"}  # a table has its name
    top = {path.name for path in ROOT.glob("*.py")} - {"__init__.py"}
    assert (sorted((rooms | top) - listed), sorted(listed - rooms - top)) == ([], [])  # missing, superfluous


def test_the_readme_has_at_most_130_lines() -> None:
    assert len(README.splitlines()) <= 130


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page != "index.md" and f"({page})" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    links = [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r"^\[[^]]+\]: (\S+)", text, flags=re.MULTILINE)]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if ":" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
            broken.append(link)
    assert broken == []


def test_every_page_that_the_program_names_exists() -> None:
    rooms = [path for room in MAY_IMPORT for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".j2", ".js")]
    named = {
        page
        for path in (*ROOT.glob("*.py"), *rooms)
        for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def anchors(page: Path) -> list[str]:
    """The anchors that a forge gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
