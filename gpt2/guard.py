"""A step whose numbers went wrong changes nothing: the verdict is made and kept on the device, before the update.

Wrong are a loss or a gradient norm that is not finite, on any rank, and, where `skip_outliers` asks for it, a norm far
above what is usual. Such a step is skipped and counted; it still is a step: the batch, the learning rate and the
schedule of pruning depend on the step's number alone, while the optimizer's own counters stand still.
"""

import math

import torch

from gpt2.errors import UserError
from pruning.ranks import local

MEMORY = 0.99  # of the running mean and variance of the gradient norm: about the last hundred steps
LEAST = 50  # norms that must have been seen before one can be an outlier


def weight_of(loss_sum, micro_steps):
    """What a micro-step's loss counts in the step's: 1 / micro_steps, or NaN where the losses so far are not finite.

    The loss is differentiated with this weight, so a loss that is not finite on one rank makes the averaged gradient
    NaN on all of them, also where its own gradient is finite: the verdict needs no exchange of its own.
    """
    return 1 / micro_steps + 0 * loss_sum


class Guard:
    """Steps the optimizer where the numbers are right. Never waits for the device, except in `read`.

    skip_outliers: a gradient norm this many standard deviations above its running mean is wrong too; 0: none is.
    max_bad_steps: after so many wrong steps in a row `read` raises UserError.
    """

    def __init__(self, optimizer, skip_outliers, max_bad_steps, device):
        self.optimizer, self.skip_outliers, self.max_bad_steps = optimizer, skip_outliers, max_bad_steps
        # Wrong steps: all, those of the row that is not over yet, and of the longest row since the last `read`.
        self.skipped, self.row, self.longest = (torch.zeros((), device=device) for _ in range(3))
        self.seen, self.mean, self.square = (torch.zeros((), device=device) for _ in range(3))

    @torch.no_grad()
    def step(self, grad_norm, spam=None):
        """optimizer.step(), unless the tensor `grad_norm`, the same on all ranks, says that the step is wrong.

        spam: the Spam around it, which leaves the states alone then too.
        """
        wrong = ~torch.isfinite(grad_norm)
        if self.skip_outliers:
            wrong |= self.is_outlier(grad_norm)
        self.skipped += wrong
        self.row.add_(1).mul_(wrong)
        torch.maximum(self.longest, self.row, out=self.longest)
        if spam:
            spam.before_step(grad_norm, wrong)
        step_unless(wrong, self.optimizer)

    def is_outlier(self, norm):
        """Whether the norm is one. It is remembered, an outlier as the highest that is none: the mean can follow."""
        part = 1 - MEMORY**self.seen  # what a mean that starts at 0 has of the numbers
        mean, square = self.mean / part, self.square / part
        highest = mean + self.skip_outliers * (square - mean * mean).clamp(min=0).sqrt()
        outlier = (norm > highest) & (self.seen >= LEAST)
        used = torch.where(outlier, highest, norm)
        finite = torch.isfinite(norm)
        for total, value in ((self.mean, used), (self.square, used * used)):
            total.lerp_(torch.where(finite, value, total), 1 - MEMORY)
        self.seen += finite
        return outlier

    def read(self, step, train_loss, grad_norm):
        """(loss, norm, steps skipped so far, whether this one was) as numbers, waiting for the device once.

        UserError where max_bad_steps in a row were wrong.
        """
        numbers = torch.stack([train_loss, grad_norm, self.skipped, self.row, self.longest])
        train_loss, grad_norm, skipped, row, longest = numbers.tolist()
        self.longest.copy_(self.row)
        if longest >= self.max_bad_steps:
            raise UserError(
                f"step {step}: {longest:.0f} steps in a row went wrong (the last loss {train_loss:.4g}, gradient norm "
                f"{grad_norm:.3g}) and were skipped, max_bad_steps={self.max_bad_steps}; checkpoints before them are "
                "good: lower --learning_rate and go on with --init_from=resume, or start from one of them with "
                "--init_from=FOLDER --out_dir=ANOTHER",
                shared=True,
            )
        return train_loss, grad_norm, int(skipped), row > 0

    def state_dict(self):
        return {name: getattr(self, name) for name in ("skipped", "row", "longest", "seen", "mean", "square")}

    def load_state_dict(self, state):
        """Go on from the tensors that state_dict gave, those of earlier versions without `longest`; {} is a run's
        start."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
        if "longest" not in state:
            self.longest.copy_(self.row)


@torch.no_grad()
def step_unless(wrong, optimizer):
    """optimizer.step(), of which nothing is left where the boolean tensor `wrong` is true. The host does not wait."""
    if all(group.get("fused") for group in optimizer.param_groups) and wrong.device.type in ("cpu", "cuda"):
        first = not optimizer.state
        optimizer.grad_scale, optimizer.found_inf = None, wrong.float()  # its kernels look, as for torch.amp.GradScaler
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        if first:  # the states were made of memory to which, perhaps, nothing was written
            for (_, state), tensor in tensors_of(optimizer).items():
                if state:
                    tensor.copy_(torch.where(wrong, torch.zeros_like(tensor), tensor))
        return
    before = {key: tensor.clone() for key, tensor in tensors_of(optimizer).items()}
    optimizer.step()
    for key, tensor in tensors_of(optimizer).items():
        tensor.copy_(torch.where(wrong, before[key] if key in before else torch.zeros_like(tensor), tensor))


def tensors_of(optimizer):
    """(parameter, name of a state, or "") -> this rank's part of it."""
    tensors = {(p, ""): p for group in optimizer.param_groups for p in group["params"]}
    states = {(p, name): s for p, _ in tensors for name, s in optimizer.state.get(p, {}).items() if torch.is_tensor(s)}
    return {key: local(t) for key, t in (tensors | states).items()}


def finite(number):
    """The number, or None where it is NaN or infinite: JSON knows neither."""
    return number if number is not None and math.isfinite(number) else None
