"""Errors of the machine in one line that says what helps, and by how much: memory, ports, the network."""

import contextlib
import os
import re

import torch

from gpt2.errors import UserError, first_line, lost_a_peer

OUT_OF_MEMORY = "can't allocate memory|not enough memory|std::bad_alloc|out of memory"
PORT_IN_USE = "EADDRINUSE|address already in use"


@contextlib.contextmanager
def machine_errors(config):
    """Turn what the machine raises under a run of `config`, and the user can mend, into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        line = explanation(error, config)
        if line is None:
            raise
        raise UserError(line) from None


def explanation(error, config):
    """The line for an exception, or None where it is not one of the machine's."""
    if isinstance(cause := getattr(error, "inner_exception", None), UserError):  # as torch.compile wraps what is raised
        return str(cause)
    text = str(error)
    if isinstance(error, RuntimeError) and lost_a_peer(error):
        return None
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(OUT_OF_MEMORY, text):
        return f"out of memory{asked_for(text)}: {'; or '.join(ways_to_less_memory(config))}"
    if re.search(PORT_IN_USE, text, re.IGNORECASE):
        port = os.environ.get("MASTER_PORT", "")
        return (
            f"port {port} of this machine is in use, by another run perhaps: torchrun --standalone finds a free one, "
            "or give --master_port=ANOTHER"
        )
    if isinstance(error, torch.distributed.DistNetworkError) and "failed to connect" in text:
        there = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"the main rank at {there} cannot be reached: {first_line(error)}"
    if "connectFullMesh" in text:
        return f"the ranks cannot reach each other: {first_line(error)}; GLOO_SOCKET_IFNAME names the network to use"
    if isinstance(error, torch.distributed.DistBackendError) and "unhandled" in text:
        return f"NCCL failed: {first_line(error)}; NCCL_DEBUG=INFO says more"
    return None


def asked_for(text):
    """What an allocator says that it was asked for, as " (...)"."""
    found = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.IGNORECASE)
    return f" ({found[1]} more were asked for)" if found else ""


def ways_to_less_memory(config):
    """Changes of `config` that need less memory, each with what it saves."""
    ways, world_size = [], int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size > 1:
        part = next(n for n in range(2, config.batch_size + 1) if config.batch_size % n == 0)
        ways.append(
            f"--batch_size={config.batch_size // part} "
            f"--gradient_accumulation_steps={config.gradient_accumulation_steps * part} "
            f"--eval_iters={config.eval_iters * part} is the same global batch and evaluation with "
            f"{'half' if part == 2 else f'1/{part} of'} the activations"
        )
    if not config.activation_checkpointing:
        ways.append(
            "--activation_checkpointing=True keeps about 1/16 of the blocks' activations and takes a third more time"
        )
    if config.parallel == "ddp":
        whole = state_bytes(config) / 2**30
        ranks, how = (world_size, "") if world_size > 1 else (8, ", under torchrun with 8 ranks")
        ways.append(
            f"--parallel=fsdp{how} holds {whole / ranks:,.1f} GiB of weights, gradients and optimizer states a rank "
            f"instead of {whole:,.1f} GiB"
        )
    return ways or ["fewer tokens in --block_size, a smaller model, or more ranks"]


def state_bytes(config):
    """Bytes of weights, gradients and optimizer states, all float32."""
    width, layers = config.n_embd, config.n_layer
    parameters = ((config.vocab_size or 50257) + config.block_size + 2) * width + layers * (12 * width + 13) * width
    return 4 * parameters * (2 + {"sgd": 1, "adam": 2, "adamw": 2}.get(config.optimizer, 3))
