"""Imports go one way, and help is quick. If this fails, the rooms grow together and every command starts slowly."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from click import Command, Group
from conftest import ROOT, autolabel

from autolabel.cli import main

MAY_IMPORT = {
    "manifests": {"manifests"},
    "teacher": {"teacher", "manifests"},
    "student": {"student", "teacher", "manifests"},
    "pipeline": {"pipeline", "teacher", "manifests"},
}
HEAVY = ("torch", "ray", "zarr", "pandas", "numpy", "pyarrow", "PIL")


def imported(path: Path) -> set[str]:
    """Every module name that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith("autolabel.")}
        assert rooms <= MAY_IMPORT[room], path.name


def test_no_class_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = {}
    for path in (
        ROOT / "cli.py",
        ROOT / "terminal.py",
        *(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py")),
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_ray_is_imported_in_six_files_and_nowhere_else() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for path in (ROOT / room).rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert users == {
        "manifests/cluster.py", "manifests/ray_source.py", "pipeline/ray_engine.py", "pipeline/ray_worker.py",
        "student/distributed.py", "student/score_workers.py",
    }  # fmt: skip


def test_the_root_holds_no_python_file_but_the_face_and_the_commands() -> None:
    # Every Python file of the root is installed as a part of the package.
    assert sorted(path.name for path in ROOT.glob("*.py")) == ["__init__.py", "__main__.py", "cli.py", "terminal.py"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_the_face_or_the_commands(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert not imported(path) & {"autolabel", "autolabel.cli", "autolabel.terminal"}, path.name


def test_the_commands_load_nothing_heavy_before_they_run() -> None:
    code = f"import sys, autolabel.cli; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.strip() == "[]"


def commands(group: Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found.append((*path, name))
        if isinstance(command, Group):
            found += commands(command, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(main), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    result = autolabel(*path, "--help")
    assert result.exit_code == 0
    command: Command = main
    for name in path:
        assert isinstance(command, Group)
        command = command.commands[name]
    assert command.help
