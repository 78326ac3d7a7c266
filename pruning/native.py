"""C++ kernels that are compiled where they run, on first use."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

FLAGS: tuple[str, ...] = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")
if torch.backends.cpu.get_cpu_capability() == "AVX2":  # of the processor, or what ATEN_CPU_CAPABILITY leaves of it
    FLAGS += ("-mno-avx512f",)


def compiled(source: Path) -> ctypes.CDLL | None:
    """The C++ file `source` as a ctypes library; None where it cannot be compiled, and on other systems than Linux.

    That takes seconds, once a machine: the library is kept in torch's folder of extensions under a hash of its source,
    compiler and processor; where that takes no files, each process compiles anew. It is linked without an OpenMP of its
    own, so that it finds torch's, and shares its threads.
    """
    command = os.environ.get("CXX", "").split() or ["g++"]
    compiler = shutil.which(command[0])
    if compiler is None or sys.platform != "linux":
        return None
    try:
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
        facts = repr((source.read_text(), compiler, command[1:], FLAGS, processor()))
        library = folder / f"{source.stem}_{sha256(facts.encode()).hexdigest()[:16]}.so"
        try:
            return ctypes.CDLL(os.fspath(library))
        except OSError:  # it is not there, or damaged
            return compile_into(library, source, command)
    except subprocess.CalledProcessError:
        return None
    except (OSError, RuntimeError) as error:  # no home, or one that takes no files, or whose files cannot be run
        alone = compiled_anew(source, command)
        if alone:
            warnings.warn(
                f"{source.stem} are compiled for this process alone: {error}; TORCH_EXTENSIONS_DIR=FOLDER keeps them",
                stacklevel=2,
            )
        return alone


def compiled_anew(source: Path, command: list[str]) -> ctypes.CDLL | None:
    """The same library, kept nowhere: what a process has loaded needs its file no more."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return compile_into(Path(folder, f"{source.stem}.so"), source, command)
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """What the processor can do, as Linux lists it: a home folder may be shared by different machines."""
    with open("/proc/cpuinfo") as file:
        return next((line for line in file if line.startswith(("flags", "Features"))), "")


def compile_into(library: Path, source: Path, command: list[str]) -> ctypes.CDLL:
    """Compile, load, and put under its name what can be loaded: after a crash, whole or not at all."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unlinked, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        subprocess.run([*command, *FLAGS, "-c", source, "-o", unlinked], check=True, capture_output=True)
        subprocess.run([*command, "-shared", unlinked, "-o", linked], check=True, capture_output=True)
        loaded = ctypes.CDLL(os.fspath(linked))
        with open(linked, "rb") as file:
            os.fsync(file.fileno())
        os.replace(linked, library)
    return loaded


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a kernel can read the tensor: not where it is traced, on another device, or of a kind that need not have
    memory."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return plain and not torch.compiler.is_compiling()


def call(kernel: Any, *arguments: torch.Tensor | float | None) -> int:
    """Call a library's function with the addresses of the tensors, null pointers for None, and int64 and double for
    numbers. Returns what it returns, if that is anything."""
    return kernel(*map(as_c, arguments))


def as_c(value: torch.Tensor | float | None) -> Any:
    if isinstance(value, int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p(None if value is None else value.data_ptr())
