"""What a training step on a CPU computes beside matrix products, by kernels of this project (kernels.cpp).

torch's tanh GELU computes a tanh in each direction. Here one pass, x * sigmoid(2c(x + ax³)), leaves GELU's slope too,
so that the gradient is one product. Attention reads q, k and v where the projection left them and writes their gradient
in one piece, so nothing is split, transposed or joined; what it multiplies stays in the cache. Layer normalisation
writes autocast's dtype itself. Cross entropy goes over each row of logits once, in the cache too. bfloat16 is computed
in float32, and rounded where it is stored; where the processor multiplies it, attention rounds the weights of a softmax
for that, and their gradient.

Where there is no compiler, on other devices, and under torch.compile, which fuses by itself, torch's own operations are
used.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from pruning import native

C_TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}


@functools.cache
def library():
    """The kernels, compiled once a machine; None where they cannot be."""
    return native.compiled(Path(__file__).with_suffix(".cpp"))


def usable(x):
    """Whether the kernels can be used for x."""
    return native.has_memory(x) and x.dtype in C_TYPES and library() is not None


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


def layer_norm(x, weight, bias, epsilon):
    """F.layer_norm over the last dimension of x; bias may be None.

    Under autocast to bfloat16, where the kernels are used, the result is bfloat16, to which the product behind it would
    round it anyway; that saves a pass in each direction. In float32 torch's own takes no longer.
    """
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    fits = lambda p: p is None or p.dtype == torch.float32 and p.shape == x.shape[-1:]
    if low and x.dtype == torch.float32 and fits(weight) and fits(bias) and usable(x):
        return LayerNorm.apply(x, weight, bias, epsilon, torch.bfloat16)
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


class LayerNorm(torch.autograd.Function):
    """F.layer_norm with its result in `dtype`; x and weight are of wide(dtype).

    Only where `usable`. Differentiable once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, epsilon, dtype):
        x, rows, epsilon = x.contiguous(), x.numel() // x.shape[-1], float(epsilon)
        weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()
        y, means, inverses = torch.empty_like(x, dtype=dtype), x.new_empty(rows), x.new_empty(rows)
        call("layer_norm", (y, x, weight, bias, means, inverses), rows, x.shape[-1], epsilon)
        ctx.save_for_backward(x, weight, means, inverses)
        ctx.sizes, ctx.with_bias = (rows, x.shape[-1]), bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, means, inverses = ctx.saved_tensors
        threads = torch.get_num_threads()
        grad_x, shares = torch.empty_like(x), x.new_zeros(threads, 2, x.shape[-1])
        tensors = grad.contiguous(), x, weight, means, inverses, grad_x, shares
        call("layer_norm_backward", tensors, *ctx.sizes, threads)
        of_weight, of_bias = shares.sum(0)
        return grad_x, of_weight, of_bias if ctx.with_bias else None, None, None


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
    native.call(getattr(library(), f"{name}_{C_TYPES[tensors[0].dtype]}"), *tensors, *sizes)
