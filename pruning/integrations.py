"""Pruning inside other people's training loops: transformers.Trainer."""

from transformers import TrainerCallback

from pruning.pruner import Pruner


class PruningCallback(TrainerCallback):
    """Prunes what a `transformers.Trainer` trains: Trainer(..., callbacks=[PruningCallback(criterion="bitter7", target_sparsity=0.5)]).

    Takes Pruner's arguments after model and optimizer; begin and end default to 25 % and 75 % of the Trainer's steps.
    Gradients are masked as they are accumulated, so before the Trainer clips them. A run that the Trainer resumes goes on
    from the zeros of its weights. ValueError on resuming with a criterion that keeps buffers, which the Trainer's
    checkpoints do not hold.
    """

    def __init__(self, **options):
        self.options, self.pruner, self.hooks = options, None, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **others):
        begin = max(1, state.max_steps // 4)
        defaults = dict(begin=begin, end=max(begin, state.max_steps * 3 // 4))
        self.pruner = Pruner(model, getattr(optimizer, "optimizer", optimizer), **(defaults | self.options))
        if state.global_step:
            if self.pruner.scores.initial:
                raise ValueError(
                    f"the criterion {self.pruner.criterion_name} keeps the initial weights, which the Trainer's checkpoint lacks"
                )
            self.pruner.steps = state.global_step
            self.pruner.pruned = sum(self.pruner.zeros()) if state.global_step >= self.pruner.begin else 0
        mask = lambda parameter: self.pruner.mask_gradients([parameter])
        self.hooks = [layer.parameter.register_post_accumulate_grad_hook(mask) for layer in self.pruner.layers]

    def on_optimizer_step(self, args, state, control, **others):
        self.pruner.step()

    def on_log(self, args, state, control, logs=None, **others):
        if self.pruner:
            for entry in (logs or {}, state.log_history[-1]):
                entry["sparsity"] = self.pruner.sparsity

    def on_train_end(self, args, state, control, **others):
        for hook in self.hooks:
            hook.remove()
