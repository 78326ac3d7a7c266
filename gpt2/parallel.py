"""Devices and ranks: the one place that knows about CUDA, gloo and torchrun."""

import importlib.util
import os
import re
import shutil
import sysconfig
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from glob import glob

import torch
import torch.distributed as dist

from gpt2.compiling import compiles_for
from gpt2.errors import UserError, warn
from gpt2.meeting import meeting_point
from gpt2.memory import keep_freed


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on; start: a name that the ranks of this start share."""

    rank: int
    size: int
    device: torch.device
    start: str = ""

    @property
    def is_main(self):
        return self.rank == 0


def start(device="auto", alone=False, deterministic=False, timeout=600.0):
    """The World of this process; joins the process group where torchrun set one up. UserError for a device not here.

    alone: without torchrun, make a process group of this process only, as sharding needs one.
    timeout: seconds that a collective may take; gpt2/watch.py, which can name the rank, waits less.
    deterministic: let torch use no operation whose result differs from run to run, at some cost in speed.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = device_of(device, int(os.environ.get("LOCAL_RANK", 0)), size)
    if device.type == "cpu":
        keep_freed()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if device.type == "cuda" and ("RANK" in os.environ or alone) and not dist.is_nccl_available():
        raise UserError("this torch has no NCCL, through which several GPUs talk: run one process, or --device=cpu")
    rank, name, store = int(os.environ.get("RANK", 0)), "", dist.HashStore()
    if "RANK" in os.environ:
        name, store = meeting_point(rank, size, timeout)
    if "RANK" in os.environ or alone:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            device_id=device if device.type == "cuda" else None,
            store=store,
            rank=rank,
            world_size=size,
        )
    return World(rank, size, device, name)


def device_of(device, local_rank, size):
    """The torch.device that the option `device` means on this rank of `size`. UserError for one that is not here."""
    check_driver(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind, colon, index = device.partition(":")
    numbered = index.isdecimal() and (kind == "cuda" or int(index) == 0)
    if not available.get(kind) or colon and not numbered:
        here = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"device={device}: not on this machine, which has {here}")
    if index and size > 1:
        raise UserError(f"device={device}: torchrun gives each rank a device of its own; write --device={kind}")
    if kind == "cuda" and int(index or local_rank) >= torch.cuda.device_count():
        whose = f"device={device}" if index else f"rank {local_rank} of this node has no GPU"
        raise UserError(
            f"{whose}: there are {torch.cuda.device_count()}; lower {'the number' if index else '--nproc_per_node'}"
        )
    return torch.device(f"cuda:{local_rank}" if device == "cuda" else device)


def check_driver(device):
    """UserError where torch was built for a GPU that is here, not hidden, and cannot use it: the CPU is no silent
    substitute."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    expected = device in ("auto", "cuda") and torch.version.cuda and glob("/dev/nvidia[0-9]*")
    if expected and not hidden and not torch.cuda.is_available():
        raise UserError(
            f"device={device}: this machine has an NVIDIA GPU, but torch {torch.__version__} cannot use it; its driver "
            f"is perhaps too old for CUDA {torch.version.cuda} (see nvidia-smi): update it, install a torch for it, "
            "or set --device=cpu"
        )


def stop():
    """Wait for the other ranks, then leave the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def compute_dtype(dtype, device):
    """torch dtype of autocast: bfloat16 on request, or by itself on devices whose matrix units take it.

    UserError for a GPU that would only emulate it.
    """
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else device.type == "cpu" and cpu_has_bf16()
    )
    if dtype == "bfloat16" and device.type == "cuda" and not native:
        raise UserError(f"dtype=bfloat16: {torch.cuda.get_device_name(device)} does not compute in it; --dtype=float32")
    if dtype == "bfloat16" and device.type == "cpu" and not native:
        warn("dtype=bfloat16 is emulated by this CPU, many times slower than float32")
    if dtype != "auto":
        return getattr(torch, dtype)
    return torch.bfloat16 if native else torch.float32


def cpu_has_bf16():
    """Whether this CPU multiplies bfloat16 matrices, and is not held back to less by ATEN_CPU_CAPABILITY."""
    capable = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    held_back = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    return not held_back and any(getattr(torch.cpu, name, lambda: False)() for name in capable)


def autocast(device, dtype):
    """The context of the forward pass; none in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def should_compile(compile, device):
    """compile=auto: on CUDA, where there is a compiler that works. On a CPU gpt2/kernels.py and gpt2/loss.py gain as
    much."""
    if compile == "auto":
        if device.type == "cuda" and not has_compiler(device):
            warn(f"{NO_COMPILER}: running without it, slower and in two to three times the memory")
            return False
        return device.type == "cuda" and compiles_for(device)
    if compile and device.type in ("cpu", "cuda") and not has_compiler(device):
        raise UserError(f"{NO_COMPILER}: leave it away")
    return compile


NO_COMPILER = (
    "compile: torch.compile needs a C++ compiler (g++, or what CXX names; on a GPU gcc or clang, or what CC names, and "
    "Triton) and Python's headers (Python.h), and does not find them"
)


def has_compiler(device):
    """Whether torch.compile finds what it needs.

    Python's headers and a compiler: of C++ on a CPU; on CUDA of C, with which Triton builds a stub for the driver.
    """
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        return False
    if device.type == "cuda":
        compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
    return device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is not None


def all_reduce_sum(tensor):
    """Sum of `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def agree(world, function, *arguments):
    """function(*arguments) on every rank; a UserError of any rank is raised on all of them, the first rank's."""
    mine, error = attempt(function, *arguments)
    errors = [error] * world.size
    if world.size > 1:
        dist.all_gather_object(errors, error)
    for error in errors:
        if error is not None:
            raise UserError(error, shared=world.size > 1)
    return mine


def on_main(world, function, *arguments):
    """function(*arguments) on rank 0 alone; what it returns, or its UserError, is every rank's."""
    outcome = [attempt(function, *arguments) if world.is_main else None]
    if world.size > 1:
        dist.broadcast_object_list(outcome, src=0, device=world.device)
    value, error = outcome[0]
    if error is not None:
        raise UserError(error, shared=world.size > 1)
    return value


def attempt(function, *arguments):
    """(what function(*arguments) returns, None), or (None, the message of the UserError it raised)."""
    try:
        return function(*arguments), None
    except UserError as error:
        return None, str(error)


def sum_over_ranks(tensor, world):
    """The sum over all ranks of a tensor on the CPU, on the CPU; float64 keeps its precision where a device has it."""
    return tensor if world.size == 1 else all_reduce_sum(tensor.to(world.device)).cpu()


PEAK_FLOPS = {  # dense bfloat16 FLOP/s of the makers' data sheets, by words of torch's name of the device; first match
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 6000 Ada": 364e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090 Ti": 80e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
}


def peak_flops(name):
    """The peak of the device that torch calls `name`; None where it is not known, as for a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", name)), None)


def mfu(flops_per_second, world):
    """Share of the peak of all devices together that `flops_per_second` is; None where the peak is not known."""
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    return flops_per_second / (peak * world.size) if peak else None
