"""Models, optimizers and reference answers that the pruning tests share."""

import numpy as np
import torch
import torch.nn as nn

from pruning.layers import find_layers
from pruning.ranks import full


def linears(*shapes, dtype=torch.float32):
    """A model of Linear layers of the given [out, in] shapes, without biases."""
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(columns, rows, bias=False, dtype=dtype) for rows, columns in shapes)


def adam_with(model, **states):
    """An AdamW over `model` whose states are as given: name -> list of tensors, one a parameter."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        given = {name: tensors[number].clone() for name, tensors in states.items()}
        optimizer.state[parameter] = {"step": torch.tensor(3.0)} | zeros | given
    return optimizer


def by_exp_avg(exp_avg):
    """A criterion whose scores a test can choose freely."""
    return exp_avg


def lowest(scores, pruned, k, caps=None):
    """The reference: booleans of the k first weights in the order (not pruned, score, position), none beyond its
    layer's cap.

    scores, pruned: lists of flat arrays, one a layer.
    """
    layer = np.concatenate([np.full(len(s), i) for i, s in enumerate(scores)])
    score, before = np.concatenate(scores) + 0.0, np.concatenate(pruned)
    order = np.lexsort((np.arange(len(score)), score, ~before))
    chosen = np.zeros(len(score), bool)
    left = list(caps) if caps is not None else [len(s) for s in scores]
    for place in order:
        if k and left[layer[place]]:
            chosen[place] = True
            left[layer[place]] -= 1
            k -= 1
    return chosen


def zeros_of(model):
    """Booleans of all the model's prunable weights, in order: which are zero."""
    return np.concatenate([(full(layer.parameter.detach()) == 0).flatten().numpy() for layer in find_layers(model)])


def one_step(pruner):
    """A step of the pruner's optimizer, whatever gradients there are, and then the pruner's."""
    pruner.scores.optimizer.step()
    return pruner.step()
