"""The loss without its logits: a linear layer and its cross entropy, a block of rows at a time.

With 50,257 tokens the logits of a batch are the largest tensor of training by far, and cross entropy reads and writes
them about ten times. Here the gradients are made in the forward pass, while a block of rows is at hand (Hsu et al.
2024, "Liger Kernel", arXiv:2410.10989), in the place of its logits: one buffer serves every block, and what is kept for
the backward pass has the size of the inputs.

torch 2.13's F.linear_cross_entropy does the same; here it took 10 to 20 % longer at its best options, three times as
long at its defaults (AVX2, float32), and older versions lack it.
"""

import torch
import torch.nn.functional as F

from gpt2 import kernels

BYTES = 4096  # of a column of logits in a block, 206 MB with GPT-2's vocabulary; half of it takes 5 % longer on AVX2
LARGE_VOCABULARY = 8192  # below it, the logits are small beside the rest of the model
IGNORED = -1  # the target of a position that does not count


def chunking_pays(vocab_size, device):
    """Whether `linear_cross_entropy` beats the logits: not where torch.compile fuses those for a GPU."""
    return vocab_size >= LARGE_VOCABULARY and not (device.type == "cuda" and torch.compiler.is_compiling())


@torch._disable_dynamo  # torch.compiler.disable, which imports two seconds of code at once, when it is needed
def linear_cross_entropy(x, weight, targets, rows=None):
    """Mean cross entropy, in nats, of the logits x @ weight.T against `targets`, those of -1 left out.

    x: [rows, width]; weight: [vocabulary, width]; targets: int64 [rows]. The products are computed in autocast's dtype
    where that is on, the rest in float32 (float64 for float64 inputs), `rows` at a time. NaN where no target counts, as
    F.cross_entropy. Differentiable once.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = rows or BYTES // dtype.itemsize
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return LinearCrossEntropy.apply(x, weight, targets, dtype, rows)
        x, weight, total = x.to(dtype), weight.to(dtype), 0
        for part, logits, _ in blocks(x, weight, rows):
            logits = logits.to(torch.promote_types(dtype, torch.float32))
            total = total + F.cross_entropy(logits, targets[part], ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, dtype, rows):
        low_x, low_weight = x.to(dtype), weight.to(dtype)
        counts, targets = (targets != IGNORED).unsqueeze(1), in_bounds(targets, len(weight)).unsqueeze(1)
        number = counts.sum()
        wide = torch.promote_types(dtype, torch.float32)
        shares = (counts / number.clamp(min=1)).to(wide)  # of each row in the mean
        losses = torch.empty(len(x), 1, dtype=wide, device=x.device)
        grad_x = torch.empty_like(x)
        grad_weight = torch.empty(padded(len(weight)), x.shape[1], dtype=wide, device=x.device)
        cross_entropy_ = kernels.cross_entropy_ if kernels.usable(low_x) else plain_cross_entropy_
        for part, logits, with_padding in blocks(low_x, low_weight, rows):
            losses[part] = cross_entropy_(logits, targets[part], shares[part])
            grad_x[part] = torch.mm(logits, low_weight)
            add_product(grad_weight, with_padding.t(), low_x[part], first=part.start == 0)
        ctx.save_for_backward(grad_x, grad_weight[: len(weight)].to(weight.dtype))
        return (losses * counts).sum() / number

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        return (grad * grad_x).to(grad_x.dtype), (grad * grad_weight).to(grad_weight.dtype), None, None, None


def blocks(x, weight, rows):
    """(slice of rows, their logits, the same with columns of zeros to a multiple of 64), block by block, in a buffer
    that the next block overwrites. Without a row, one block without one.

    With odd numbers of columns, these products take 1.2 to 1.4 times as long on a CPU.
    """
    buffer = torch.empty(min(rows, len(x)), padded(len(weight)), dtype=x.dtype, device=x.device)
    buffer[:, len(weight) :] = 0
    for begin in range(0, max(len(x), 1), rows):
        part = slice(begin, min(begin + rows, len(x)))
        block = buffer[: part.stop - begin]
        yield part, torch.mm(x[part], weight.t(), out=block[:, : len(weight)]), block


def padded(vocabulary):
    """The next multiple of 64."""
    return vocabulary + -vocabulary % 64


def in_bounds(targets, vocabulary):
    """`targets` with 0 for those that do not count. IndexError where one is no token; on a GPU an assertion there."""
    if targets.device.type == "cpu" and targets.numel() and not IGNORED <= targets.min() <= targets.max() < vocabulary:
        raise IndexError(f"a target is not in [0, {vocabulary}), nor {IGNORED}")
    return targets.clamp(min=0)


def plain_cross_entropy_(logits, targets, shares):
    """kernels.cross_entropy_, by torch's own operations."""
    wide = logits.to(shares.dtype)
    highest = wide.amax(1, keepdim=True)
    of_target = wide.gather(1, targets) - highest
    exps = wide.sub_(highest).exp_()
    sums = exps.sum(1, keepdim=True)
    exps.scatter_(1, targets, of_target.exp() - sums)  # (softmax - 1 at the target), times sums
    logits.copy_(exps.mul_(shares / sums))
    return sums.log() - of_target


def add_product(total, a, b, first):
    """total += a @ b, in place, or, at the first product, total = a @ b; total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)
