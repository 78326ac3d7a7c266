"""Straight-through pruning: the forward pass sees masked weights, the optimizer keeps training the dense ones
(Bengio et al. 2013, arXiv:1308.3432; for sparsity Zhou et al. 2021, arXiv:2102.04010)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn

from pruning.pruner import Pruner
from pruning.ranks import load_rows, local
from pruning.zeros import live_of, zero_dead


class StraightThrough(Pruner):
    """A Pruner whose pruned weights go on learning, unseen, and come back when an update ranks them high enough.

    Between `step` and `mask_gradients` the model's weights are the masked ones, so forward, backward, evaluation and
    checkpoints of the model see the sparse network; between `mask_gradients` and `step`, where the optimizer steps,
    they are the dense ones. Costs 5 bytes a prunable parameter: the dense weights (in state_dict's buffers) and a mask.
    Optimizer states are not touched; updates rank the dense weights anew, so pruned sets are not nested.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.dense = [layer.parameter.detach().clone() for layer in self.layers]
        self.live = [torch.ones_like(local(dense), dtype=torch.bool) for dense in self.dense]
        self.masks_shown = True  # whether the model's weights are the masked ones
        self.shown_at = 0  # the optimizer's steps when they became so
        self.mask_as_shown()

    def mask_as_shown(self) -> None:
        """Take the zeros of the masked layers for their mask."""
        for layer, live in zip(self.layers, self.live):
            if layer in self.masked:
                live.copy_(live_of(local(layer.parameter)))

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Put the dense weights back, where they are masked, for the optimizer; the gradients stay as they are."""
        self.counter.before_step()
        self.show_dense()

    @torch.no_grad()
    def step(self, number: int | None = None) -> bool:
        """Choose the mask anew, among the dense weights, when an update is due, and show the model its masked
        weights. RuntimeError where the optimizer has stepped those."""
        if self.masks_shown and self.masked and (self.steps if number is None else number) > self.shown_at:
            raise RuntimeError(
                "the optimizer has stepped the masked weights instead of the dense ones: call mask_gradients() after "
                f"backward and before {type(self.scores.optimizer).__name__}.step()"
            )
        if self.masks_shown and self.steps > self.seen:  # after an update that failed
            self.show_dense()
        for layer, dense in zip(self.layers, self.dense):
            if not (self.masks_shown and layer in self.masked):
                local(dense).copy_(local(layer.parameter))
        try:
            due = super().step(number)
        except BaseException:  # of an update that was stopped half way nothing stays
            for layer, dense in zip(self.layers, self.dense):
                local(layer.parameter).copy_(local(dense))
            self.masks_shown = False
            self.show_masks()
            raise
        self.show_masks()
        return due

    def show_dense(self) -> None:
        """Let the model's weights be the dense ones; what was done to those that are not masked stays."""
        for layer, dense, live in zip(self.layers, self.dense, self.live):
            if layer in self.masked and self.masks_shown:
                weight = local(layer.parameter)
                torch.where(live, weight, local(dense), out=weight)
        self.masks_shown = False
        self.counter.overlook(self.layers[0].parameter)

    def show_masks(self) -> None:
        """Let the model's weights be the masked ones."""
        for layer, live in zip(self.layers, self.live):
            if layer in self.masked and not self.masks_shown:
                zero_dead(local(layer.parameter), live)
        self.masks_shown, self.shown_at = True, self.steps
        self.counter.overlook(self.layers[0].parameter)

    def prune_to(self, sparsity: float) -> None:
        """Choose the mask anew, of as many weights as the sparsity asks for, and of no fewer than are masked."""
        super().prune_to(max(sparsity, self.claimed / self.prunable))
        self.mask_as_shown()

    def zero(self, i: int, rows: slice, live: torch.Tensor) -> None:
        zero_dead(local(self.layers[i].parameter)[rows], live)

    def zero_states(self) -> None:
        """Nothing: the dense weights go on learning."""

    def go_on_after(self, step: int) -> None:
        super().go_on_after(step)
        self.shown_at = step

    def came_back(self, zeros: int | None = None) -> int:
        """None: pruned weights may come back."""
        return 0

    def buffer_bytes(self) -> int:
        return super().buffer_bytes() + sum(local(d).nbytes + live.nbytes for d, live in zip(self.dense, self.live))

    def buffers(self) -> dict[str, torch.Tensor]:
        return super().buffers() | {f"{layer.name}.dense": dense for layer, dense in zip(self.layers, self.dense)}

    def state_dict(self, whole: bool = True) -> dict[str, Any]:
        if self.masked and not self.masks_shown:
            raise RuntimeError("between mask_gradients() and step() the weights are the dense ones: save after step()")
        return super().state_dict(whole)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for layer, dense in zip(self.layers, self.dense):
            name = f"{layer.name}.dense"
            if name not in state["buffers"]:
                raise ValueError(f"the saved state lacks {name}: it is not of StraightThrough")
            load_rows(layer, local(dense), state["buffers"][name])
        self.masks_shown = True
        self.mask_as_shown()
