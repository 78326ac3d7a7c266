"""The training loops that benchmarks time: this project's, step by step, and nanoGPT's, on a GPT of the same size."""

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from gpt2 import kernels, parallel
from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.memory import keep_freed
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from pruning import Pruner

SIZES = {  # of the GPT that is trained, by kind of device
    "cpu": dict(block_size=256, n_layer=6, n_head=8, n_embd=256),
    "cuda": dict(block_size=1024, n_layer=12, n_head=12, n_embd=768),  # GPT-2 124M
}
VOCABULARIES = {"cpu": [65, 50257], "cuda": [50257]}


def share_of_peak(vocab_size, name):
    """What a token/s of GPT-2 124M is of the peak of the GPU `name`; None where that is not known."""
    peak = parallel.peak_flops(name)
    if peak is None:
        return None
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=vocab_size, bias=False, **SIZES["cuda"])).flops_per_token() / peak


def device():
    """The device of this process, as both loops set it up."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # nanoGPT allows TF32 by an older name of the same switch
    return torch.device("cuda")


def ours(
    vocab_size, fused=True, wait=False, logits=False, keep=True, own_kernels=True, dtype="auto", compile="auto", prune=0
):
    """The step of this loop, from (inputs, targets) to the loss; by default as it chooses for this machine.

    fused: AdamW in one kernel. wait: read the loss in each step. logits: make them all. keep: freed memory, on a CPU.
    own_kernels: of GELU and attention, on a CPU. prune: steps from one update by bitter7 to the next; 0 is never.
    """
    here = device()
    if keep and here.type == "cpu":
        keep_freed()
    if not own_kernels:
        kernels.usable = lambda x: False
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, bias=False, **SIZES[here.type])
    model = GPT(GPTConfig(**sizes)).to(here)
    dtype = parallel.compute_dtype(dtype, here)
    fast = torch.compile(model) if parallel.should_compile(compile, here) else model
    optimizer = make_optimizer(model, Config(**sizes))
    for group in optimizer.param_groups:
        group["fused"] = fused or None  # not False: on a GPU torch would then take the tensors one by one
    pruner = Pruner(model, optimizer, "bitter7", 0.5, begin=1, end=10_001, interval=prune) if prune else None

    def step(inputs, targets):
        with parallel.autocast(here, dtype):
            loss = fast(inputs.to(here), targets.to(here), logits)[1]
        loss.backward()
        if pruner:
            pruner.mask_gradients()
        finish(model, optimizer)
        if pruner:
            pruner.step()
        if wait:
            loss.item()
        return loss

    return step


def nanogpt(vocab_size, path):
    """What nanoGPT's train.py does in a step, with the model.py and the optimizer of the checkout at `path`.

    As its README says for the device: on a CPU float32 without compiling, on CUDA bfloat16 autocast and compiled, its
    vocabulary padded to a multiple of 64, as its default is."""
    here, theirs = device(), load_module(Path(path) / "model.py")
    torch.manual_seed(0)
    cuda = here.type == "cuda"
    sizes = dict(vocab_size=vocab_size + (-vocab_size % 64 if cuda else 0), dropout=0.0, bias=False, **SIZES[here.type])
    model = theirs.GPT(theirs.GPTConfig(**sizes)).to(here)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), here.type)
    fast = torch.compile(model) if cuda else model

    def step(inputs, targets):
        with torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext():
            loss = fast(inputs.to(here), targets.to(here))[1]
        loss.backward()
        finish(model, optimizer)
        return loss

    return step


def finish(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def require_checkout(path):
    """UserError where a path is given at which no checkout of nanoGPT lies."""
    if path and not (Path(path) / "model.py").is_file():
        raise UserError(f"{path}: holds no model.py: expected a checkout of nanoGPT")


def load_module(path):
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module
