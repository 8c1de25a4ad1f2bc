"""Real readers: packages that users read an export with, each in a virtual environment of its own, made once.

They want other versions of numpy, pandas and Pillow than we do, so they never share our environment, and a test calls
them as a subprocess. The environments lie in the folder that AUTOLABEL_READERS names, else in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

CACHE = Path(os.environ.get("AUTOLABEL_READERS") or Path.home() / ".cache" / "autolabel-readers")
SCRIPTS = Path(__file__).parent / "scripts"
_READY = "ready"  # the file that says that an environment is whole
_SECONDS = 600
_BIN = "Scripts" if sys.platform == "win32" else "bin"


@dataclass(frozen=True)
class RealReader:
    """A reader by name, and the packages that pip installs for it; none: it is a part of our own environment."""

    name: str
    packages: tuple[str, ...] = ()

    def python(self) -> Path:
        """The interpreter of its environment, which is made if it is not there, or was left half made."""
        if not self.packages:
            return Path(sys.executable)
        mark = hashlib.sha256(repr((self.packages, sys.version)).encode()).hexdigest()[:8]
        folder = CACHE / f"{self.name}-{mark}"
        CACHE.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(CACHE / f"{self.name}.lock"):
            if not (folder / _READY).exists():
                shutil.rmtree(folder, ignore_errors=True)
                called([sys.executable, "-m", "venv", str(folder)])
                called([str(folder / _BIN / "python"), "-m", "pip", "install", "--quiet", *self.packages])
                (folder / _READY).touch()
        return folder / _BIN / "python"

    def run(self, script: str, *arguments: object) -> tuple[Any, dict[str, np.ndarray]]:  # type: ignore[type-arg]
        """Call scripts/SCRIPT with a path and these arguments: what it prints last as JSON, the arrays it saves there.

        The path is that of an .npz file, which it may write. It sees nothing of our environment.
        """
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "arrays.npz"
            line = [str(self.python()), "-I", str(SCRIPTS / script), str(path), *map(str, arguments)]
            printed = called(line, cwd=scratch, HF_HOME=scratch, HF_HUB_OFFLINE="1")
            with np.load(path) if path.exists() else np.load(_empty(path)) as saved:
                arrays = {name: saved[name] for name in saved.files}
        last = printed.strip().splitlines()[-1:]
        return json.loads(last[0]) if last else None, arrays


def _empty(path: Path) -> Path:
    np.savez(path)
    return path


def called(line: list[str], *, cwd: str | None = None, **environment: str) -> str:
    """Run a command; its output. Fails with what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=cwd, env={**kept, **environment}, timeout=_SECONDS, check=False
    )
    assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}\n{done.stderr}"
    return done.stdout
