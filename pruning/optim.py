"""The source project's optimizers, from three pieces over torch.optim: AMSGrad AdamW with cosine and clipping, SPAM, pruning.

training = adamwspam(model.parameters(), lr=1e-3, max_steps=1000)
loss.backward()
training.step()              # masks, clips, looks for spikes, steps, decays the rate, prunes, and clears the gradients
"""

import math
import statistics
from collections import deque

import torch

from pruning.pruner import Pruner


def adamwadv(parameters, lr, max_steps, clip=1.0):
    """AdamW with AMSGrad, weight decay 0.01, betas 0.9 and 0.999, eps 1e-8; cosine to 0 over `max_steps`; gradients clipped
    to the norm `clip`. Returns a Training."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, amsgrad=True)
    return Training(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps), clip)


def adamwspam(parameters, lr, max_steps, clip=1.0, **spam):
    """adamwadv with spike-aware momentum: see Spam for its options. Returns a Training."""
    training = adamwadv(parameters, lr, max_steps, clip)
    training.spam = Spam(training.optimizer, **spam)
    return training


def adamwprune(
    model, lr, max_steps, base="adamw", variant="bitter0", target_sparsity=0.5, begin=1, end=None, spam=(), **pruning
):
    """AdamW (lr, weight decay 0.01), or adamwspam with the options `spam`, whose own states prune `model` by the criterion
    `variant`. begin, end (default: max_steps) and the rest are Pruner's. Returns a Training."""
    if base not in ("adamw", "adamwspam"):
        raise ValueError(f"base={base!r}: expected adamw or adamwspam")
    if base == "adamwspam":
        training = adamwspam(model.parameters(), lr, max_steps, **dict(spam))
    else:
        training = Training(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01))
    training.pruner = Pruner(
        model, training.optimizer, variant, target_sparsity, begin=begin, end=end or max_steps, **pruning
    )
    return training


class Training:
    """An optimizer with what surrounds its step. schedule, clip, spam, pruner: None where there is none."""

    def __init__(self, optimizer, schedule=None, clip=None, spam=None, pruner=None):
        self.optimizer, self.schedule, self.clip, self.spam, self.pruner = optimizer, schedule, clip, spam, pruner

    def step(self):
        """One optimizer step from the gradients that are there; clears them. Waits for the device once, where spam is on."""
        if self.pruner:
            self.pruner.mask_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip) if self.clip else None
        if self.spam:
            norm = (
                torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                if norm is None
                else norm
            )
            self.spam.before_step(norm.item())
        self.optimizer.step()
        if self.spam:
            self.spam.after_step()
        if self.schedule:
            self.schedule.step()
        if self.pruner:
            self.pruner.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self):
        """The states of all pieces, for load_state_dict of a Training made alike."""
        return {name: piece.state_dict() for name, piece in self.pieces()}

    def load_state_dict(self, state):
        """Go on from `state`; load the model's weights first."""
        for name, piece in self.pieces():
            piece.load_state_dict(state[name])

    def pieces(self):
        named = (
            ("optimizer", self.optimizer),
            ("schedule", self.schedule),
            ("spam", self.spam),
            ("pruner", self.pruner),
        )
        return [(name, piece) for name, piece in named if piece]


class Spam:
    """Spike-aware momentum (Huang et al. 2025, arXiv:2501.06842, with the source project's z-score) over an Adam optimizer.

    A step whose gradient norm lies more than `z` standard deviations above the mean of the last `window` finite norms, of
    which there must be `least`, is a spike: exp_avg × 0.5, exp_avg_sq × 0.9. Norms that are not finite count for nothing.

    clip_elements: clip each element of the gradient at sqrt(theta · exp_avg_sq), where that is above zero
    interval:      every so many steps, reset both moments (AMSGrad's maximum too) and the bias correction; 0: never
    warmup_steps:  after such a reset, raise the learning rate to its own value along half a cosine
    """

    def __init__(
        self, optimizer, z=2.0, window=100, least=10, clip_elements=False, theta=50.0, interval=0, warmup_steps=0
    ):
        self.optimizer, self.z, self.least, self.clip_elements, self.theta = optimizer, z, least, clip_elements, theta
        self.interval, self.warmup_steps = interval, warmup_steps
        self.norms = deque(maxlen=window)
        self.steps, self.spikes, self.resets, self.since_reset, self.rates = 0, 0, 0, None, []

    @torch.no_grad()
    def before_step(self, norm):
        """Look at the gradients, whose norm is the float `norm`, before the optimizer uses them."""
        if self.is_spike(norm):
            self.spikes += 1
            self.scale(exp_avg=0.5, exp_avg_sq=0.9)
        if math.isfinite(norm):
            self.norms.append(norm)
        if self.interval and self.steps and self.steps % self.interval == 0:
            self.resets += 1
            self.since_reset = 0
            self.scale(exp_avg=0, exp_avg_sq=0, max_exp_avg_sq=0, step=0)
        if self.clip_elements:
            self.clip()
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.since_reset is not None and self.since_reset < self.warmup_steps:
            self.since_reset += 1
            for group in self.optimizer.param_groups:
                group["lr"] *= (1 - math.cos(math.pi * self.since_reset / self.warmup_steps)) / 2

    def after_step(self):
        """Give the learning rates back as they were."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate
        self.steps += 1

    def is_spike(self, norm):
        if not math.isfinite(norm) or len(self.norms) < self.least:
            return False
        return norm - statistics.fmean(self.norms) > self.z * max(statistics.pstdev(self.norms), 1e-12)

    def scale(self, **factors):
        """Multiply the states of these names, of all parameters."""
        for name, factor in factors.items():
            if tensors := [state[name] for state in self.optimizer.state.values() if name in state]:
                torch._foreach_mul_(tensors, float(factor))

    def clip(self):
        for parameter, state in self.optimizer.state.items():
            if parameter.grad is not None and "exp_avg_sq" in state:
                limit = (self.theta * state["exp_avg_sq"]).sqrt()
                limit.masked_fill_(limit == 0, torch.inf)
                parameter.grad.clamp_(-limit, limit)

    def state_dict(self):
        return dict(
            norms=list(self.norms),
            steps=self.steps,
            spikes=self.spikes,
            resets=self.resets,
            since_reset=self.since_reset,
        )

    def load_state_dict(self, state):
        self.norms.clear()
        self.norms.extend(state["norms"])
        self.steps, self.spikes, self.resets, self.since_reset = (
            state[k] for k in ("steps", "spikes", "resets", "since_reset")
        )
