"""Devices and ranks: the one place that knows about CUDA, gloo and torchrun."""

import importlib.util
import os
import shutil
import sysconfig
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from gpt2.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among its peers, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def start(device="auto"):
    """The World of this process; joins the process group where torchrun set one up. UserError for a device not here."""
    local_rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.split(":")[0]):
        here = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"device={device}: not on this machine, which has {here}")
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {local_rank} of this node has no GPU: there are {torch.cuda.device_count()}; lower --nproc_per_node"
        )
    device = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None
        )
    return World(int(os.environ.get("RANK", 0)), size, device)


def stop():
    """Wait for the other ranks, then leave the process group."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def compute_dtype(dtype, device):
    """torch dtype of autocast: bfloat16 on request, or by itself on devices whose matrix units take it."""
    if dtype != "auto":
        return getattr(torch, dtype)
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else device.type == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_bf16():
    capable = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in capable)


def autocast(device, dtype):
    """The context of the forward pass; none in float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def should_compile(compile, device, vocab_size):
    """compile=auto: on CUDA always; on a CPU where the logits dominate, since the matrix products of a small vocabulary
    are as fast without and compiling would cost more than it brings; and never without a compiler."""
    if compile == "auto":
        return has_compiler(device) and (device.type == "cuda" or vocab_size >= 8192)
    if compile and device.type == "cpu" and not has_compiler(device):
        raise UserError(NO_COMPILER)
    return compile


NO_COMPILER = "compile: torch.compile needs a C++ compiler (g++, or what CXX names) and Python's headers (Python.h), and finds none: leave it away"


def has_compiler(device):
    """Whether torch.compile finds what it needs: Triton on CUDA, a C++ compiler and Python's headers on a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    if device.type != "cpu":
        return False
    headers = os.path.join(sysconfig.get_path("include"), "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and os.path.exists(headers)


def data_parallel(model, world):
    """The model under DDP where there are several ranks: gradients are averaged over them."""
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def averaging(model, on):
    """The context of a micro-step: gradients are averaged over the ranks in the last one only, one all-reduce a step."""
    return nullcontext() if on or not isinstance(model, DistributedDataParallel) else model.no_sync()


def all_reduce_sum(tensor):
    """Sum of `tensor` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(value, world):
    """The int `value` of rank 0, on every rank."""
    if world.size == 1:
        return value
    tensor = torch.tensor(value, device=world.device)
    dist.broadcast(tensor, src=0)
    return tensor.item()


PEAK_FLOPS = {  # dense bfloat16 FLOP/s of the makers' data sheets, by what torch calls the device
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "B200": 2250e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
}


def mfu(flops_per_second, world):
    """Share of the peak of all devices together that `flops_per_second` makes use of; None where the peak is not known."""
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    return flops_per_second / (peak * world.size) if peak else None
