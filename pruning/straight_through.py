"""Straight-through pruning: the forward pass sees masked weights, the optimizer keeps training the dense ones
(Bengio et al. 2013, arXiv:1308.3432; for sparsity Zhou et al. 2021, arXiv:2102.04010)."""

import torch

from pruning.layers import keep, local, nonzero
from pruning.pruner import Pruner


class StraightThrough(Pruner):
    """A Pruner whose pruned weights go on learning, unseen, and come back when an update ranks them high enough.

    Between `step` and `mask_gradients` the model's weights are the masked ones, so forward, backward, evaluation and
    checkpoints of the model see the sparse network; between `mask_gradients` and `step`, where the optimizer steps,
    they are the dense ones. Costs 5 bytes a prunable parameter: the dense weights (in state_dict's buffers) and a mask.
    Optimizer states are not touched; updates rank the dense weights anew, so pruned sets are not nested.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.dense = [layer.parameter.detach().clone() for layer in self.layers]
        self.live = [torch.ones_like(local(dense), dtype=torch.bool) for dense in self.dense]

    @torch.no_grad()
    def mask_gradients(self):
        """Put the dense weights back for the optimizer; the gradients stay as they are."""
        if self.pruned:
            for layer, dense in zip(self.layers, self.dense):
                local(layer.parameter).copy_(local(dense))

    @torch.no_grad()
    def step(self):
        """Count one optimizer step, choose the mask anew when an update is due, and show the model its masked weights."""
        for layer, dense in zip(self.layers, self.dense):
            local(dense).copy_(local(layer.parameter))
        before, self.pruned = self.pruned, 0 if self.due(self.steps + 1) else self.pruned
        try:
            due = super().step()
        finally:
            self.pruned = self.pruned or before
        for layer, live in zip(self.layers, self.live):
            if due:
                live.copy_(nonzero(local(layer.parameter)))
            elif self.pruned:
                keep(local(layer.parameter), live)
        return due

    def zero(self, i, rows, live):
        keep(local(self.layers[i].parameter)[rows], live)

    def buffer_bytes(self):
        return super().buffer_bytes() + sum(local(d).nbytes + live.nbytes for d, live in zip(self.dense, self.live))

    def buffers(self):
        return super().buffers() | {f"{layer.name}.dense": dense for layer, dense in zip(self.layers, self.dense)}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        for layer, dense, live in zip(self.layers, self.dense, self.live):
            name, mine = f"{layer.name}.dense", local(dense)
            if name not in state["buffers"]:
                raise ValueError(f"the saved state lacks {name}: it is not of StraightThrough")
            mine.copy_(state["buffers"][name][layer.row : layer.row + mine.shape[0]])
            live.copy_(nonzero(local(layer.parameter)))
