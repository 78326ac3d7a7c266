"""LeNet-5 with batch normalisation, 61,750 parameters, written for speed: the usual layers, computed in an unusual
order.

A convolution followed by 2×2 max-pooling is computed as four phases: output pixels at (even, even), (even, odd), ...
rows and columns are four sets of channels of one convolution over the image, whose own pixels were sorted so too.
Pooling is then the maximum of four contiguous tensors. Batch normalisation and ReLU do not turn an order round, once a
negative scale is moved into the weights, so they come after pooling, on a quarter of the numbers. The function is the
same, up to rounding.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F


class LeNet5(nn.Module):
    """conv 1→6, conv 6→16 (5×5, each with batch norm, ReLU, 2×2 max-pooling), then 400→120→84→10 with ReLU.

    The input is [N, 1, 32, 32]; returns logits [N, 10]. (After LeCun et al. 1998; the batch norm is the source
    project's.)
    """

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 5), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, images):
        x = convolve_norm_relu_pool(to_phases(images), self.conv1, self.norm1)
        x = to_phases(x).contiguous(memory_format=torch.channels_last)  # faster for many channels, slower for few
        x = convolve_norm_relu_pool(x, self.conv2, self.norm2)
        x = F.relu(self.fc1(x.flatten(1)))
        return self.fc3(F.relu(self.fc2(x)))


def to_phases(x):
    """[N, C, 2H, 2W] -> [N, 4C, H, W]: channels (row parity, column parity, C)."""
    n, c, h, w = x.shape
    return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def phase_kernel(weight):
    """[O, C, 5, 5] -> [4O, 4C, 3, 3]: the kernel that gives from `to_phases(x)` the phases of the convolution of x by
    `weight`."""
    return torch.cat(
        [to_phases(F.pad(weight, (column, 1 - column, row, 1 - row))) for row in (0, 1) for column in (0, 1)]
    )


def convolve_norm_relu_pool(x, conv, norm):
    """max_pool2d(relu(norm(conv(x))), 2) of an image given as its phases; [N, 4C, H, W] -> [N, O, H - 2, W - 2]."""
    scale, sign = norm.weight.abs(), torch.where(norm.weight < 0, -1.0, 1.0).detach()
    weight = conv.weight * sign[:, None, None, None]
    if not norm.training:
        factor = scale * (norm.running_var + norm.eps).rsqrt()
        bias = (conv.bias - norm.running_mean) * sign * factor + norm.bias
        y = F.conv2d(x, phase_kernel(weight * factor[:, None, None, None]), bias.repeat(4))
        return y.unflatten(1, (4, -1)).amax(1).relu()
    kernel = phase_kernel(weight)
    with (
        torch.no_grad()
    ):  # the mean of a convolution is the convolution of the mean: subtracted as a bias, it costs no pass
        mean = F.conv2d(x.mean(0, keepdim=True), kernel).mean((2, 3)).view(4, -1).mean(0)
    y = F.conv2d(x, kernel, -mean.repeat(4))
    out, variance = NormReluPool.apply(y.unflatten(1, (4, -1)), scale, norm.bias, conv.bias, norm.eps)
    update_running(norm, mean * sign + conv.bias.detach(), variance, y.numel() // len(scale))
    return out


@torch.no_grad()
def update_running(norm, mean, variance, count):
    """The running statistics that evaluation uses, as BatchNorm2d keeps them: `variance` is biased, the running one is
    not."""
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    norm.num_batches_tracked += 1


class NormReluPool(torch.autograd.Function):
    """relu(bias + scale · y / sqrt(variance + eps)) of the largest phase, for y [N, 4, O, H, W] whose mean over all but
    O is zero, and scale >= 0; returns it [N, O, H, W] and the variance [O].

    The gradient for y is that of y before its mean was subtracted; among equal phases the first takes it, as in
    max_pool2d. The convolution's bias only moves the mean, so its gradient is zero.
    """

    @staticmethod
    def forward(ctx, y, scale, bias, conv_bias, eps):
        count = y.numel() // y.shape[2]
        variance = (y * y).sum((0, 1, 3, 4)) / count
        rstd = (variance + eps).rsqrt()
        top = torch.maximum(torch.maximum(y[:, 0], y[:, 1]), torch.maximum(y[:, 2], y[:, 3]))
        out = (top * per_channel(scale * rstd)).add_(per_channel(bias)).relu()  # torch 2.11 compiles relu_ wrong
        ctx.save_for_backward(y, top, out, scale, rstd)
        ctx.count = count
        ctx.mark_non_differentiable(variance)
        return out, variance

    @staticmethod
    def backward(ctx, grad, _):
        y, top, out, scale, rstd = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        grad_bias = grad.sum((0, 2, 3))
        grad_scale = (grad * top).sum((0, 2, 3)) * rstd
        factor = scale * rstd
        of_variance, of_mean = (
            per_channel(-factor * rstd * grad_scale / ctx.count),
            per_channel(-factor * grad_bias / ctx.count),
        )
        spread = spread_fused if torch.compiler.is_compiling() else spread_in_place
        return (
            spread(y, top, grad * per_channel(factor), of_variance, of_mean),
            grad_scale,
            grad_bias,
            torch.zeros_like(grad_bias),
            None,
        )


def spread_fused(y, top, left, slope, shift):
    """y · slope + shift, with `left` added to the first phase of `y` [N, 4, O, H, W] that equals `top`; one kernel once
    compiled."""
    phases = []
    for phase in range(4):
        taken = left * (y[:, phase] == top)
        left = left - taken
        phases.append(taken + y[:, phase] * slope + shift)
    return torch.stack(phases, 1)


def spread_in_place(y, top, left, slope, shift):
    """The same in few passes over memory, for when each operation is one. Overwrites `left`."""
    result, taken = (y * slope).add_(shift), torch.empty_like(top)
    for phase in range(4):
        torch.eq(y[:, phase], top, out=taken).mul_(left)
        result[:, phase] += taken
        left -= taken
    return result


def per_channel(x):
    return x[:, None, None]
