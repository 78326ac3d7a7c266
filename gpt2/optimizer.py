"""The optimizer of a run and its learning rate."""

import math

from pruning.optim import Spam, base_optimizer


def make_optimizer(model, config):
    """The optimizer that the config asks for, fused; matrices decay, biases and normalisation do not."""
    fused = not (config.optimizer == "sgd" and config.parallel == "fsdp")  # torch has no fused SGD of sharded tensors
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return base_optimizer(config.optimizer, groups, config.learning_rate, config.weight_decay, betas, fused)


def make_spam(optimizer, config):
    """The Spam around the steps of adamwspam, or None."""
    if config.optimizer != "adamwspam":
        return None
    return Spam(
        optimizer, theta=config.spam_theta, interval=config.spam_interval, warmup_steps=config.spam_warmup_steps
    )


def learning_rate(step, config):
    """Linear warm-up to learning_rate, held to lr_decay_begin, then down to min_lr at lr_decay_iters, along half a
    cosine or a straight line. Steps count from 1."""
    if not config.decay_lr:
        return config.learning_rate
    if step <= config.warmup_iters:
        return config.learning_rate * step / (config.warmup_iters + 1)
    begin = max(config.warmup_iters, config.lr_decay_begin)
    progress = min(1.0, max(0, step - begin) / max(1, config.lr_decay_iters - begin))
    left = 1 - progress if config.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (config.learning_rate - config.min_lr) * left


def set_learning_rate(optimizer, step, config):
    """Give every group the learning rate of `step`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config)
