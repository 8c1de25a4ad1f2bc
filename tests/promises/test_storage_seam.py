"""All files go through manifests/storage.py. If this fails, another kind of storage would miss some of them."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path
    for pattern in ("*.py", *(f"{room}/**/*.py" for room in ("manifests", "teacher", "pipeline", "student")))
    for path in ROOT.glob(pattern)
    if path.name not in ("storage.py", "bucket_storage.py", "bucket_clients.py", "local_storage.py", "local_locks.py")
)
MODULES = {"fcntl", "filelock", "glob", "mmap", "msvcrt", "shutil"}
# Of `os` only what touches no file, or no stored one.
OS_ALLOWED = {"PathLike", "_exit", "chdir", "cpu_count", "environ", "getcwd", "getpid", "path", "pathsep"}
OS_PATH_ALLOWED = {"commonpath", "normpath", "relpath"}
METHODS = {
    "chmod", "glob", "hardlink_to", "is_dir", "is_file", "iterdir", "lstat", "mkdir", "read_bytes", "read_text",
    "rename", "rglob", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text",
}  # fmt: skip
MODES = {"r", "w", "a", "x", "rb", "wb", "ab", "xb", "rb+", "r+b", "wt", "rt"}
ARROW_FILES = {"OSFile", "memory_map", "create_memory_map", "FileSystem", "LocalFileSystem"}
# Calls of other packages that open a file: the place of the file among the arguments. It has to be one that the storage
# has opened, or bytes in memory; a path would be opened by them, and a pipe or a device waited for.
OPENERS = {
    "Image.open": 0, "np.fromfile": 0, "np.genfromtxt": 0, "np.load": 0, "np.loadtxt": 0, "np.memmap": 0, "np.save": 0,
    "np.savetxt": 0, "np.savez": 0, "np.savez_compressed": 0, "pa.ipc.new_file": 0, "pa.ipc.new_stream": 0,
    "pa.ipc.open_file": 0, "pa.ipc.open_stream": 0, "pa.input_stream": 0, "pa.output_stream": 0, "pickle.dump": 1,
    "pickle.load": 0, "json.dump": 1, "json.load": 0, "tomllib.load": 0, "torch.load": 0, "torch.save": 1,
    "torch.export.save": 1, "torch.jit.load": 0, "torch.from_file": 0, "zarr.open": 0, "zarr.open_group": 0,
    "zarr.open_array": 0,
    "zarr.save": 0, "zarr.create_group": 0, "zarr.create_array": 0, "tarfile.open": 0, "gzip.open": 0,
    "zipfile.ZipFile": 0,
    "tarfile.TarFile": 0, "sqlite3.connect": 0, "click.File": 0, "click.open_file": 0, "pq.read_table": 0,
    "pq.write_table": 1, "pq.read_metadata": 0, "pq.read_schema": 0, "pq.ParquetFile": 0, "pq.ParquetWriter": 0,
    "pq.ParquetDataset": 0, "csv.read_csv": 0, "feather.read_table": 0, "pd.read_csv": 0, "pd.read_parquet": 0,
    "pd.read_json": 0, "pd.read_pickle": 0,
}  # fmt: skip
OPENERS_ANYWHERE = {  # methods and functions of whatever: their first argument is a file
    "save", "tofile", "to_csv", "to_parquet", "to_json", "to_pickle", "safe_open", "load_file", "save_file", "imread",
    "imwrite", "imsave", "File",
}  # fmt: skip
IN_MEMORY = {"io.BytesIO", "pa.BufferReader", "pa.BufferOutputStream", "MemoryStore"}
ALLOWED = {  # file: what it may use, and why
    ("manifests/cluster.py", "is_file"): "Ray's token lies in the home folder",
    ("manifests/machine.py", "read_text"): "Linux tells of processes in /proc, and when it was started",
    ("manifests/machine.py", "write_text"): "Linux tells of processes in /proc",
    ("manifests/tables.py", "pq.ParquetWriter"): "its sink seals a file of the storage",
    ("manifests/pages.py", "read_text"): "a template is a resource of the package",
    ("pipeline/units.py", "pa.ipc.open_file"): "a file that the storage has opened, or fetched",
    ("teacher/compiled.py", "shutil"): "it looks for a compiler",
}


def from_the_storage(value: ast.expr, names: Set[str]) -> bool:
    """True for a file that the storage has opened, bytes in memory, and a name that stands for such a thing."""
    if isinstance(value, ast.Call):
        return ast.unparse(value.func) in IN_MEMORY | {"storage.reading", "storage.writing", "storage.lending"}
    return isinstance(value, ast.Name) and value.id in names


def files_of_the_storage(tree: ast.FunctionDef) -> set[str]:
    """The names that stand for files of the storage, and for nothing else."""
    bound: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            bound.setdefault(node.optional_vars.id, []).append(node.context_expr)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    bound.setdefault(target.id, []).append(node.value)
    return {name for name, values in bound.items() if all(from_the_storage(value, set()) for value in values)}


def opened_by_others(tree: ast.AST, names: frozenset[str] = frozenset()) -> Iterator[tuple[int, str]]:
    """Line and name of every call of another package that opens a file itself."""
    if isinstance(tree, ast.FunctionDef):
        names = names | files_of_the_storage(tree)
    if isinstance(tree, ast.Call):
        name = ast.unparse(tree.func)
        place = OPENERS.get(name)
        if name != "save" and name.rpartition(".")[2] in OPENERS_ANYWHERE and (tree.args or tree.keywords):
            place = OPENERS.get(name, 0)  # safetensors' save gives bytes
        if place is not None and not (len(tree.args) > place and from_the_storage(tree.args[place], names)):
            yield tree.lineno, name
    for node in ast.iter_child_nodes(tree):
        yield from opened_by_others(node, names)


def forbidden(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that touches files past the storage."""
    yield from opened_by_others(tree)
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
        ("Image.open(path)", "Image.open"),
        ("torch.load(str(path), weights_only=True)", "torch.load"),
        ("torch.save(content, path)", "torch.save"),
        ("pq.read_table(run / 'a')", "pq.read_table"),
        ("pq.ParquetFile(source=path)", "pq.ParquetFile"),
        ("image.save(path, 'PNG')", "image.save"),
        ("safe_open(path, framework='pt')", "safe_open"),
        ("safetensors.torch.load_file(path)", "safetensors.torch.load_file"),
        ("zarr.open_group(path)", "zarr.open_group"),
        ("option('--policy', type=click.File('r'))", "click.File"),
        ("file = path\npq.read_table(file)", "pq.read_table"),
    ],
)
def test_a_file_that_is_touched_past_the_storage_is_noticed(code: str, name: str) -> None:
    assert Counter(found for _, found in forbidden(ast.parse(code)))[name] >= 1


@pytest.mark.parametrize(
    "code",
    [
        "storage.read(a)",
        "Run.open(run)",
        "text.replace(a, b)",
        "replace(job, out=a)",
        "os.getpid()",
        "io.BytesIO()",
        "Image.open(io.BytesIO(data))",
        "def f():\n    with storage.reading(path) as file:\n        torch.load(file)",
        "def f():\n    file = storage.reading(path)\n    pq.read_table(file)",
        "run.save()",
    ],
)
def test_other_calls_are_no_files(code: str) -> None:
    assert list(forbidden(ast.parse(code))) == []
