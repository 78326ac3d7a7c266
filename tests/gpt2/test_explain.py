"""What the machine raises ends in one line that names the way out."""

import dataclasses
import socket

import pytest
import torch
import torch.distributed as dist

from gpt2 import parallel
from gpt2.config import Config
from gpt2.errors import UserError, lost_a_peer
from gpt2.explain import explanation, machine_errors, state_bytes
from gpt2.model import GPT, GPTConfig

CONFIG = dataclasses.replace(Config(), batch_size=12, gradient_accumulation_steps=8, vocab_size=50257)


def line_of(error, **options):
    with pytest.raises(UserError) as caught, machine_errors(dataclasses.replace(CONFIG, **options)):
        raise error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_out_of_memory_of_this_cpu_says_which_knobs_help_and_by_how_much():
    with pytest.raises(UserError) as caught, machine_errors(CONFIG):
        torch.empty(2**58, dtype=torch.uint8)
    line = str(caught.value)
    assert "288230376151711744 bytes more were asked for" in line and "\n" not in line
    assert "--batch_size=6 --gradient_accumulation_steps=16 --eval_iters=40 is the same global batch" in line
    assert "is the same global batch and evaluation with half the activations" in line
    assert "--activation_checkpointing=True" in line and "holds 0.2 GiB" in line and "instead of 1.9 GiB" in line


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.07 GiB."), MemoryError()]
)
def test_out_of_memory_of_a_gpu_and_of_python(error):
    line = line_of(error, batch_size=9)
    assert line.startswith("out of memory") and "--batch_size=3 --gradient_accumulation_steps=24" in line
    assert ("3.07 GiB more" in line) == (not isinstance(error, MemoryError))


def test_what_is_used_already_is_not_advised(monkeypatch):
    line = line_of(MemoryError(), batch_size=1, activation_checkpointing=True, parallel="fsdp")
    assert not any(option in line for option in ("--batch_size", "--activation", "--parallel"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "holds 0.5 GiB" in line_of(MemoryError())


def test_the_bytes_are_those_of_the_model():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    assert state_bytes(CONFIG) == 16 * parameters
    assert state_bytes(dataclasses.replace(CONFIG, optimizer="sgd")) == 12 * parameters


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in dict(
            RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken.getsockname()[1]
        ).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"port {taken.getsockname()[1]} .*--standalone"), machine_errors(CONFIG):
            parallel.start("cpu")


def test_the_network_and_nccl():
    assert "cannot be reached" in line_of(
        dist.DistNetworkError("The client socket has failed to connect to any address\n")
    )
    assert "NCCL_DEBUG=INFO" in line_of(dist.DistBackendError("unhandled system error (run with NCCL_DEBUG=INFO)\nx"))


def test_other_errors_stay_as_they_are():
    for error in (RuntimeError("shapes differ"), ValueError("x"), KeyError("x")):
        with pytest.raises(type(error)), machine_errors(CONFIG):
            raise error


def test_ranks_that_go_before_all_have_met_are_told_from_a_network_that_fails():
    """One that finds out_dir taken, or is killed, leaves the others at the store that it kept."""
    for error in (
        dist.DistStoreError("rank 0 has not come in 660 s"),
        dist.DistNetworkError("Connection reset by peer"),
        dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the server crash?"),
    ):
        assert lost_a_peer(error) and explanation(error, Config()) is None
    assert not lost_a_peer(dist.DistNetworkError("The client socket has failed to connect to a:1"))
