"""The source project's optimizers, from pieces over torch.optim: AMSGrad AdamW with cosine and clipping, SPAM, pruning.

training = adamwspam(model.parameters(), lr=1e-3, max_steps=1000)
loss.backward()
training.step()              # masks, clips, looks for spikes, steps, decays the rate, prunes, and clears the gradients

A loop of one's own takes the pieces instead: `base_optimizer`, and `Spam` around its step.
"""

import math

import torch

from pruning.pruner import Pruner
from pruning.ranks import local
from pruning.settings import named

OPTIMIZERS = ("adamw", "adam", "sgd", "adamwadv", "adamwspam")


def base_optimizer(name, parameters, lr, weight_decay=0.01, betas=(0.9, 0.999), fused=None):
    """The torch optimizer under a name of OPTIMIZERS; eps is 1e-8.

    adamw decays decoupled from the gradient; adamwadv and adamwspam are it with AMSGrad. adam and sgd add
    weight_decay · w to the gradient; betas[0] is sgd's momentum. ValueError for another name.
    """
    named(name, dict.fromkeys(OPTIMIZERS), "optimizer")
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=betas[0], weight_decay=weight_decay, fused=fused)
    if name == "adam":
        return torch.optim.Adam(parameters, lr, betas, weight_decay=weight_decay, fused=fused)
    return torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, amsgrad=name != "adamw", fused=fused)


def adamwadv(parameters, lr, max_steps, clip=1.0):
    """AdamW with AMSGrad, weight decay 0.01, betas 0.9 and 0.999, eps 1e-8; cosine to 0 over `max_steps`; gradients
    clipped to the norm `clip`. Returns a Training."""
    optimizer = base_optimizer("adamwadv", parameters, lr)
    return Training(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps), clip)


def adamwspam(parameters, lr, max_steps, clip=1.0, **spam):
    """adamwadv with spike-aware momentum: see Spam for its options. Returns a Training."""
    training = adamwadv(parameters, lr, max_steps, clip)
    training.spam = Spam(training.optimizer, **spam)
    return training


def adamwprune(
    model, lr, max_steps, base="adamw", variant="bitter0", target_sparsity=0.5, begin=1, end=None, spam=(), **pruning
):
    """AdamW (lr, weight decay 0.01), or adamwspam with the options `spam`, whose own states prune `model` by the
    criterion `variant`. begin, end (default: max_steps) and the rest are Pruner's. Returns a Training."""
    named(base, dict.fromkeys(("adamw", "adamwspam")), "base")
    if base == "adamwspam":
        training = adamwspam(model.parameters(), lr, max_steps, **dict(spam))
    else:
        training = Training(base_optimizer("adamw", model.parameters(), lr))
    training.pruner = Pruner(
        model, training.optimizer, variant, target_sparsity, begin=begin, end=end or max_steps, **pruning
    )
    return training


class Training:
    """An optimizer with what surrounds its step. schedule, clip, spam, pruner: None where there is none."""

    def __init__(self, optimizer, schedule=None, clip=None, spam=None, pruner=None):
        self.optimizer, self.schedule, self.clip, self.spam, self.pruner = optimizer, schedule, clip, spam, pruner

    def step(self):
        """One optimizer step from the gradients that are there; clears them. Waits for the device only where the pruner
        updates or looks."""
        if self.pruner:
            self.pruner.mask_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.clip or self.spam:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        if self.spam:
            self.spam.before_step(norm)
        self.optimizer.step()
        if self.schedule:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.pruner:
            self.pruner.step()

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
    """Spike-aware momentum (Huang et al. 2025, arXiv:2501.06842, with the source project's z-score) over an Adam.

    A step whose gradient norm lies more than `z` standard deviations above the mean of the last `window` finite norms,
    of which there must be `least`, is a spike: exp_avg × 0.5, exp_avg_sq × 0.9. Norms that are not finite count for
    nothing. The norms and the verdict stay on the parameters' device: nothing here waits for it.

    theta:         clip each element of the gradient at sqrt(theta · exp_avg_sq), where that is above zero; 0: do not
    interval:      every so many steps, reset both moments (AMSGrad's maximum too) and the bias correction; 0: never
    warmup_steps:  after such a reset, raise the learning rate to its own value along half a cosine
    """

    def __init__(self, optimizer, z=2.0, window=100, least=10, theta=0.0, interval=0, warmup_steps=0):
        self.optimizer, self.z, self.least, self.theta = optimizer, z, least, theta
        self.interval, self.warmup_steps, self.steps, self.rates = interval, warmup_steps, 0, []
        device = optimizer.param_groups[0]["params"][0].device
        self.norms = torch.zeros(window, device=device)  # a ring: the k-th finite norm lies at k % window
        self.seen = torch.zeros((), dtype=torch.int64, device=device)
        self.spikes = torch.zeros((), dtype=torch.int64, device=device)
        optimizer.register_step_post_hook(self.after_step)

    @property
    def resets(self):
        """How often a reset of the moments was due so far."""
        return max(0, self.steps - 1) // self.interval if self.interval else 0

    @torch.no_grad()
    def before_step(self, norm, wrong=None):
        """Look at the gradients, whose norm (before clipping) is the tensor `norm`, before the optimizer uses them.

        wrong: a bool tensor, whether the step will be left out: then the states stay, and a reset is left out too.
        """
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        spike = self.is_spike(norm) if wrong is None else self.is_spike(norm) & ~wrong
        self.spikes += spike
        self.scale(exp_avg=torch.where(spike, 0.5, 1.0), exp_avg_sq=torch.where(spike, 0.9, 1.0))
        self.remember(norm)
        if self.interval and self.steps and self.steps % self.interval == 0:
            kept = 0.0 if wrong is None else wrong.float()
            self.scale(exp_avg=kept, exp_avg_sq=kept, max_exp_avg_sq=kept, step=kept)
        if self.theta:
            self.clip()
        self.give_back()  # of a step that was left out, as by a GradScaler
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self.warmup()

    def after_step(self, *hook):
        """Give the learning rates back as they were; the optimizer calls it at the end of its step."""
        self.steps += bool(self.rates)  # a step that calls its base class's runs the hooks of both
        self.give_back()

    def give_back(self):
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate
        self.rates = []

    def warmup(self):
        """The share of the learning rate that the coming step takes."""
        since = self.steps % self.interval + 1 if self.interval and self.steps >= self.interval else math.inf
        return (1 - math.cos(math.pi * since / self.warmup_steps)) / 2 if since < self.warmup_steps else 1.0

    def is_spike(self, norm):
        """A bool tensor. The deviation counts as a millionth of the mean at least, for norms equal but for rounding."""
        known = torch.arange(len(self.norms), device=self.norms.device) < self.seen
        count = known.sum().clamp(min=1)
        mean = self.norms.sum() / count
        deviation = (((self.norms - mean) * known).square().sum() / count).sqrt()
        above = norm - mean > self.z * torch.maximum(deviation, 1e-6 * mean)
        return above & norm.isfinite() & (self.seen >= self.least)

    def remember(self, norm):
        place = self.seen.remainder(len(self.norms)).view(1)
        self.norms.scatter_(
            0, place, torch.where(norm.isfinite(), norm, self.norms[place]).view(1).to(self.norms.dtype)
        )
        self.seen += norm.isfinite()

    def scale(self, **factors):
        """Multiply the states of these names, of all parameters, by numbers or tensors of one element."""
        for name, factor in factors.items():
            if tensors := [local(state[name]) for state in self.optimizer.state.values() if name in state]:
                torch._foreach_mul_(tensors, factor)

    def clip(self):
        for parameter, state in self.optimizer.state.items():
            if parameter.grad is not None and "exp_avg_sq" in state:
                limit = (self.theta * local(state["exp_avg_sq"])).sqrt()
                limit.masked_fill_(limit == 0, torch.inf)
                local(parameter.grad).clamp_(-limit, limit)

    def state_dict(self):
        """name -> tensor."""
        return dict(norms=self.norms, seen=self.seen, spikes=self.spikes, steps=torch.tensor(self.steps))

    def load_state_dict(self, state):
        """Go on from the tensors that state_dict gave."""
        for name in ("norms", "seen", "spikes"):
            getattr(self, name).copy_(state[name])
        self.steps = int(state["steps"])
