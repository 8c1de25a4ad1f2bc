"""Networks compiled by torch for images of any height and width, with a cache on disk.

What is compiled is the network at one scale, `SegmentationNet.predict`: the rest is a small part of the work. Kernels
that are compiled round otherwise than torch's own, so all workers of a run use one kind: what cannot be compiled raises
`CompilationFailed`, and nothing falls back. A process computes on a CPU with one thread, for kernels differ by that.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autolabel.manifests import storage
from autolabel.manifests.wording import kind_and_reason
from autolabel.teacher.device import autocast
from autolabel.teacher.networks.combine import ScaleOutput
from autolabel.teacher.networks.decoders import SegmentationNet

_FOLDER = "TORCHINDUCTOR_CACHE_DIR"  # torch's name for the folder of its compiled code; a person's choice stands
_FIRST = (512, 1024)  # height and width that are compiled first, so that every worker has the same kernels
_VARIANTS = 64  # for kinds of sizes between which torch chooses other kernels; it would stop at 8
_COMPILING = threading.Lock()


class CompilationFailed(RuntimeError):
    """Torch cannot compile a network here; the message says why, in one line, and what to do."""


def compile_network(network: SegmentationNet, precision: str, *, device: str, subject: str) -> None:
    """Let torch compile `predict` of a network that is ready to label, in place, for images of any size.

    The first compilation takes place here, at one size for all, or is taken from the cache. precision: a name in
    PRECISIONS. subject: the network's name in messages. Raises CompilationFailed.
    """
    place = torch.device(device)
    _require_compiler(place)
    keep_compiled_code(place)
    compiled = _CompiledPredict(network.predict, subject, place)
    images = torch.zeros(1, 3, *_FIRST, device=place).contiguous(memory_format=torch.channels_last)
    if torch._dynamo.config.disable:
        raise CompilationFailed(f"{subject} was not compiled: torch is told not to, as by TORCH_COMPILE_DISABLE=1")
    with torch.inference_mode(), autocast(place, precision):
        compiled(images)
    assert compiled.made, "torch computed without compiling"
    network.predict = compiled  # type: ignore[method-assign]


class _CompiledPredict:
    """`predict`, compiled. Its calls raise CompilationFailed where a size needs kernels that cannot be compiled.

    made: number of kinds of sizes for which there are kernels.
    """

    def __init__(self, predict: Callable[..., ScaleOutput], subject: str, device: torch.device) -> None:
        self.made, self.subject, self.device = 0, subject, device
        self._run: Any = torch.compile(predict, dynamic=True, fullgraph=True, backend=self._backend)

    def _backend(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.made += 1
        return backend()(graph, inputs, **options)

    def __call__(self, images: Tensor, *, context: Tensor | None = None) -> ScaleOutput:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        with _one_thread(self.device), torch._dynamo.config.patch(recompile_limit=_VARIANTS):
            try:
                output: ScaleOutput = self._run(images, context=context)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                cause = getattr(error, "inner_exception", None) or error
                raise CompilationFailed(
                    f"{self.subject} cannot be compiled for images of {images.shape[-1]} x {images.shape[-2]} on"
                    f" {self.device.type} ({kind_and_reason(cause)}): leave out --compile, for a run of its own"
                ) from error
        return output


def backend() -> Callable[..., Any]:
    """Return torch's own compiler."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Let this thread compute on one core of a CPU meanwhile: compiled kernels depend on the number."""
    before = torch.get_num_threads() if device.type == "cpu" else 1
    if before != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before != 1:
            torch.set_num_threads(before)


def _require_compiler(device: torch.device) -> None:
    """Raise CompilationFailed if a CPU's kernels cannot be built for want of a C++ compiler."""
    if device.type != "cpu":
        return
    from torch._inductor.config import cpp

    names = [name for name in ((cpp.cxx,) if isinstance(cpp.cxx, str) else cpp.cxx) if name]
    if not any(shutil.which(name) for name in names):
        raise CompilationFailed(
            f"--compile needs a C++ compiler on a CPU, and there is no {names[-1]}: install one, or name it in CXX"
        )


def keep_compiled_code(device: torch.device) -> Path:
    """Name the folder of compiled code to torch; return it. Raises CompilationFailed if nobody can write there.

    It is one for this torch, kind of device and kind of CPU, so that code of another machine is never run. A folder
    that TORCHINDUCTOR_CACHE_DIR names is taken instead.
    """
    folder = Path(os.environ.get(_FOLDER) or cache_folder() / _kind_of_machine(device))
    mark = folder / f".autolabel-{os.getpid()}"
    try:
        storage.write(mark, b"", durable=False)
        storage.remove(mark)
    except OSError as error:
        raise CompilationFailed(
            f"compiled code cannot be kept in {folder} ({error.strerror}): name another folder in {_FOLDER}"
        ) from error
    os.environ[_FOLDER] = str(folder)
    return folder


def cache_folder() -> Path:
    """Return the folder of compiled code in this person's cache, of all machines that see it."""
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    elif sys.platform == "darwin":
        root = Path.home() / "Library/Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "autolabel" / "compiled"


def _kind_of_machine(device: torch.device) -> str:
    """The torch, the device and the CPU that compiled code is good for, as the name of a folder."""
    kinds = [platform.machine(), platform.python_version(), torch.backends.cpu.get_cpu_capability()]
    abilities = {name: value for name, value in torch.cpu.get_capabilities().items() if isinstance(value, (bool, str))}
    kinds += [f"{name} {value}" for name, value in sorted(abilities.items())]
    if device.type == "cuda":
        kinds += [torch.cuda.get_device_name(device), str(torch.version.cuda or torch.version.hip)]
    digest = hashlib.sha256("\n".join(kinds).encode()).hexdigest()[:12]
    return f"torch-{torch.__version__.replace('+', '-')}-{device.type}-{digest}"
