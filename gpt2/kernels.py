"""GELU, causal attention and cross entropy of a training step on a CPU, by kernels of this project (kernels.cpp).

torch's tanh GELU computes a tanh in each direction. Here one pass, x * sigmoid(2c(x + ax³)), leaves GELU's slope too,
so that the gradient is one product. Attention reads q, k and v where the projection left them and writes their gradient
in one piece, so nothing is split, transposed or joined; what it multiplies stays in the cache. Cross entropy goes over
each row of logits once, in the cache too. bfloat16 is computed in float32, and rounded where it is stored.

Where there is no compiler, on other devices, and under torch.compile, which fuses by itself, torch's own operations are
used.
"""

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from gpt2.native import compiled, pointer

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}


@functools.cache
def library():
    """The kernels, compiled once a machine; None where they cannot be."""
    return compiled(Path(__file__).with_suffix(".cpp"))


def usable(x):
    """Whether the kernels can be used for x."""
    plain = x.device.type == "cpu" and x.dtype in C_TYPES and not torch.compiler.is_compiling()
    return plain and library() is not None


def gelu(x):
    """GELU in its tanh form, as GPT-2 has it. Differentiable once where the kernels are used."""
    return Gelu.apply(x) if usable(x) else F.gelu(x, approximate="tanh")


class Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        call("gelu", (x, y, slope), x.numel())
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope


class Attention(torch.autograd.Function):
    """Causal attention without dropout: qkv, [batch, time, 3 * width], to [batch, time, width], with `heads` heads.

    Only where `usable`. Differentiable once.
    """

    @staticmethod
    def forward(ctx, qkv, heads):
        batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        qkv, ctx.sizes = qkv.contiguous(), (batch, time, heads, width // heads)
        y, lse = qkv.new_empty(batch, time, width), qkv.new_empty(batch, heads, time, dtype=wide(qkv.dtype))
        call("attention", (qkv, y, lse), *ctx.sizes)
        ctx.save_for_backward(qkv, y, lse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, y, lse = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        call("attention_backward", (qkv, y, lse, grad.contiguous(), grad_qkv), *ctx.sizes)
        return grad_qkv, None


def cross_entropy_(logits, targets, shares):
    """The losses of rows of logits, [rows, 1], whose gradient then stands in the place of the logits: that of the sum
    of the losses times `shares`.

    logits: [rows, columns], rows may lie apart; targets: int64 [rows, 1], each a column; shares: [rows, 1]. Losses and
    shares are float32, with float64 logits float64. Only where `usable`.
    """
    losses = torch.empty(len(logits), 1, dtype=wide(logits.dtype))
    call("cross_entropy", (logits, targets, shares, losses), logits.stride(0), *logits.shape)
    return losses


def wide(dtype):
    """The dtype in which a kernel computes what is stored in `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def call(name, tensors, *sizes):
    """Call the kernel `name` for the dtype of the first tensor."""
    kernel = getattr(library(), f"{name}_{C_TYPES[tensors[0].dtype]}")
    kernel(*map(pointer, tensors), *map(ctypes.c_int64, sizes))
