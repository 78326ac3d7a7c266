"""Where a number was measured: what every file under results/ that holds a speed says of itself."""

import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

from gpt2 import parallel
from gpt2.errors import UserError
from gpt2.files import check_writable, read_json, write_atomically

RESULTS = Path(__file__).parent.parent / "results"
# hold a CPU back to AVX2, for torch's own kernels and its two libraries
STAND_INS = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def facts(device):
    """{"machine": the class that bounds the speed, "device", "threads", "torch", "python", "commit", ...}."""
    found = {
        "machine": kind(device),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device.type == "cuda":
        return found | {"cuda": torch.version.cuda}
    return found | {name: os.environ[name] for name in STAND_INS if name in os.environ}


def commit():
    """The commit of this checkout, "-changed" where files other than results differ from it."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-changed" if changed else "")


def git(*words):
    """What git says of this checkout; nothing where there is no git, or no repository."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except FileNotFoundError:
        return ""


def kind(device):
    """The class of machine: a GPU's name, or a CPU's vector instructions and the dtype that training takes there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    dtype = str(parallel.compute_dtype("auto", device)).removeprefix("torch.")
    return f"CPU {'AMX' if amx else torch.backends.cpu.get_cpu_capability()} {dtype}"


def processor():
    """This CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def heading(found):
    """The facts in one line, as every table begins; "load" is the system's when a measurement began, where known."""
    held_back = {name: found[name] for name in STAND_INS if name in found}
    stand_in = f"; a stand-in: the processor can do more, and was held back by {held_back}" if held_back else ""
    busy = f"; load {found['load']:.1f} when it began" if found.get("load", 0) > 1 else ""
    return (
        "{machine} ({device}, {threads} threads); torch {torch}, Python {python}; commit {commit}".format(**found)
        + stand_in
        + busy
    )


def path_of(found, topic, to=RESULTS):
    """The file of a machine's numbers on a topic, results/TOPIC/MACHINE.json. UserError where it cannot be written."""
    path = Path(to) / topic / f"{found['machine'].lower().replace(' ', '-')}.json"
    check_writable(path)
    return path


def read(path):
    """What `write` wrote to the path, {} where there is nothing. UserError where it is something else."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}): remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no measurement: remove it")
    return found


def write(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(numbers, indent=1) + "\n").encode())


def peak_memory(device):
    """Bytes: the peak of torch's allocator on CUDA, else of this process.

    Not by getrusage on Linux: a process that was just started counts the peak of the one that started it as its own.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (peak := peak_of("self")) is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(pid):
    """Highest resident set of a process in bytes; None once it is gone, or where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def alone(function, *arguments):
    """function(*arguments) in a process of its own, whose peak is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
