"""Pruning inside other people's training loops: transformers.Trainer."""

import warnings
from typing import Any

from transformers import TrainerCallback

from pruning.pruner import Pruner


class PruningCallback(TrainerCallback):
    """Prunes what a `transformers.Trainer` trains: Trainer(..., callbacks=[PruningCallback(criterion="bitter7",
    target_sparsity=0.5)]).

    Takes Pruner's arguments after model and optimizer; begin and end default to 25 % and 75 % of the Trainer's steps.
    Gradients are masked as they are accumulated, so before the Trainer clips them. Zeros of a model that is loaded, or
    was trained before, stay zeros; a run that the Trainer resumes goes on from them. ValueError on resuming with a
    criterion that keeps buffers, which the Trainer's checkpoints do not hold.

    The sparsity in the Trainer's log is counted. One warning at the end says when the model is less sparse than pruning
    left it, as `load_best_model_at_end` makes it with a checkpoint from before `end`.
    """

    def __init__(self, **options: Any):
        self.options = options
        self.hooks: list[Any] = []
        self.pruner: Pruner | None = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others):
        self.remove_hooks()  # of a run that ended in an error
        begin = max(1, state.max_steps // 4)
        defaults = dict(begin=begin, end=max(begin, state.max_steps * 3 // 4))
        self.pruner = pruner = Pruner(model, optimizer, **(defaults | self.options))
        if state.global_step:
            pruner.continue_from(state.global_step)
        mask = lambda parameter: pruner.mask_gradients([parameter])
        self.hooks = [layer.parameter.register_post_accumulate_grad_hook(mask) for layer in pruner.layers]

    def on_optimizer_step(self, args, state, control, **others):
        self.pruner.step()

    def on_log(self, args, state, control, logs=None, **others):
        if self.pruner:
            sparsity = self.pruner.sparsity
            for entry in (logs or {}, state.log_history[-1]):
                entry["sparsity"] = sparsity

    def on_train_end(self, args, state, control, **others):
        self.remove_hooks()
        if state.log_history:  # its last line was written before the best model was put back
            state.log_history[-1]["sparsity"] = self.pruner.sparsity
        if back := self.pruner.came_back():
            warnings.warn(
                f"the model is {self.pruner.sparsity:.2%} sparse: {back:,} of the {self.pruner.claimed:,} weights "
                "that were pruned are not zero. load_best_model_at_end puts back a checkpoint from before the last "
                f"update where that has the best metric (here {state.best_model_checkpoint})",
                stacklevel=2,
            )

    def remove_hooks(self):
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
