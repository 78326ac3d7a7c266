"""What training with pruning costs in memory: measured on tensors, predicted before the first step, or by the table.

An account is a dict of bytes: weights, gradients, states (the optimizer's), buffers (the pruning method's), total.
"""

import torch

from pruning.settings import named

OPTIMIZERS = {  # bytes a parameter of optimizer state, in float32
    "sgd": 4,
    "adam": 8,
    "adamw": 8,
    "adamwadv": 12,
    "adamwspam": 12,
    "adamwprune": 8,
}
STATES = {  # of torch's optimizers but Adam's kin: states of a parameter's size, scalars beside it, options apart
    "SGD": (0, 0),
    "RMSprop": (1, 1),
    "Adagrad": (1, 1),
    "ASGD": (1, 3),
    "NAdam": (2, 2),
}
METHODS = {  # bytes a prunable parameter, beside weights, gradients and states
    "none": 0,
    "magnitude": 0,
    "state": 0,
    "regrow": 0,
    "movement": 4,  # initial weights
    "straight_through": 5,  # dense weights and a boolean mask
    "source_movement": 12,  # scores, initial weights and masks, each float32
    "source_mask": 1,  # a boolean mask
}


def account(parameters, prunable=None, optimizer="adamw", method="none"):
    """The account of `parameters` float32 weights, of which `prunable` (default all) can be pruned.

    optimizer: a name of OPTIMIZERS; method: a name of METHODS; ValueError for others. The source's tables leave
    gradients out: 61,750 parameters with AdamW and source_movement are 1,482,000 bytes without them.
    """
    prunable = parameters if prunable is None else prunable
    return with_total(
        weights=4 * parameters,
        gradients=4 * parameters,
        states=named(optimizer, OPTIMIZERS, "optimizer") * parameters,
        buffers=named(method, METHODS, "method") * prunable,
    )


def measure(model, optimizer, pruner=None, spam=None):
    """The account of what is allocated now on this rank. The optimizer's step counters count among the states, and so
    do the norms that `spam` remembers."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    states = [s for p in parameters for s in optimizer.state.get(p, {}).values() if torch.is_tensor(s)]
    states += [spam.norms, spam.seen, spam.spikes] if spam else []
    return with_total(
        weights=bytes_of(parameters),
        gradients=bytes_of(gradients),
        states=bytes_of(states),
        buffers=pruner.buffer_bytes() if pruner else 0,
    )


def predict(weights, trained, optimizer, buffers):
    """The account after the first step of a torch optimizer over the `trained` parameters of a model of `weights`
    bytes, on this rank, with `buffers` bytes beside. Adafactor, and optimizers that are not torch's, are taken for
    Adam."""
    gradients = bytes_of(trained)
    copies, scalars = STATES.get(type(optimizer).__name__, (2, 1))
    copies += sum(bool(optimizer.defaults.get(option)) for option in ("momentum", "centered", "amsgrad"))
    states = copies * gradients + 4 * scalars * len(trained)
    return with_total(weights=weights, gradients=gradients, states=states, buffers=buffers)


def bytes_of(tensors):
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in tensors)


def with_total(**items):
    return items | {"total": sum(items.values())}


def table(accounts):
    """Text: a line for each {name: account}, in kB and as multiples of the weights."""
    items = list(next(iter(accounts.values())))
    lines = [f"{'':28}" + "".join(f"{item:>22}" for item in items)]
    for name, account in accounts.items():
        cells = (f"{account[item] / 1000:,.0f} kB {account[item] / account['weights']:5.2f}x" for item in items)
        lines.append(f"{name:28}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)
