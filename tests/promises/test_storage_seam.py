"""All files go through manifests/storage.py. If this fails, another kind of storage would miss some of them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for pattern in ("*.py", *(f"{room}/**/*.py" for room in ("manifests", "teacher", "pipeline", "student")))
    for path in ROOT.glob(pattern)
    if path.name not in ("storage.py", "local_storage.py")
)
MODULES = {"fcntl", "filelock", "glob", "mmap", "msvcrt", "shutil"}
# Of `os` only what touches no file, or no stored one.
OS_ALLOWED = {"PathLike", "_exit", "chdir", "cpu_count", "environ", "getcwd", "getpid", "path"}
OS_PATH_ALLOWED = {"commonpath", "normpath", "relpath"}
METHODS = {
    "chmod", "glob", "hardlink_to", "is_dir", "is_file", "iterdir", "lstat", "mkdir", "read_bytes", "read_text",
    "rename", "rglob", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
MODES = {"r", "w", "a", "x", "rb", "wb", "ab", "xb", "rb+", "r+b", "wt", "rt"}
ARROW_FILES = {"OSFile", "memory_map", "create_memory_map", "FileSystem", "LocalFileSystem"}
ALLOWED = {  # file: what it may use, and why
    ("manifests/cluster.py", "is_file"): "Ray's token lies in the home folder",
    ("manifests/machine.py", "read_text"): "Linux tells of processes in /proc",
    ("manifests/machine.py", "write_text"): "Linux tells of processes in /proc",
    ("manifests/pages.py", "read_text"): "a template is a resource of the package",
}


def forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that touches files past the storage."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in MODULES)
            if isinstance(node, ast.ImportFrom) and node.module in ("os", "os.path", "io"):
                yield from ((node.lineno, x.name) for x in node.names if x.name not in OS_ALLOWED)
        elif isinstance(node, ast.Name) and node.id == "open":
            yield node.lineno, "open"
        elif isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            past = {
                "os": node.attr not in OS_ALLOWED,
                "os.path": node.attr not in OS_PATH_ALLOWED,
                "io": node.attr in ("open", "FileIO"),
                "storage": False,
            }
            if past.get(of, node.attr in METHODS | ARROW_FILES):
                yield node.lineno, node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open":
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            if not values or any(isinstance(value, ast.Constant) and value.value in MODES for value in values):
                yield node.lineno, "open"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_reads_writes_locks_or_lists_files_itself(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    found = forbidden(ast.parse(path.read_text(encoding="utf-8")))
    assert [(line, used) for line, used in found if (name, used) not in ALLOWED] == []


def test_every_exception_is_needed() -> None:
    used = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in SOURCES
        for _, name in forbidden(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert ALLOWED.keys() <= used


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import fcntl", "fcntl"),
        ("from shutil import copyfile", "shutil"),
        ("from os import replace", "replace"),
        ("os.replace(a, b)", "replace"),
        ("os.path.exists(a)", "exists"),
        ("open(a, 'w')", "open"),
        ("io.open(a)", "open"),
        ("path.open('rb')", "open"),
        ("path.open()", "open"),
        ("(run / 'a').rename(b)", "rename"),
        ("run.path.write_bytes(b)", "write_bytes"),
        ("pa.OSFile(a)", "OSFile"),
    ],
)
def test_a_file_that_is_touched_past_the_storage_is_noticed(code: str, name: str) -> None:
    assert Counter(found for _, found in forbidden(ast.parse(code)))[name] >= 1


@pytest.mark.parametrize(
    "code",
    ["storage.read(a)", "Run.open(run)", "text.replace(a, b)", "replace(job, out=a)", "os.getpid()", "io.BytesIO()"],
)
def test_other_calls_are_no_files(code: str) -> None:
    assert list(forbidden(ast.parse(code))) == []
