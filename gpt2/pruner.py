"""The run's Pruner: as the config asks for it, as a checkpoint left it, and what is said of it."""

from gpt2.errors import UserError
from pruning import Pruner


def make_pruner(model, optimizer, config):
    """The Pruner that the config asks for; without a criterion, one that keeps the zeros of the weights that init_from
    named; or None. UserError where the options do not fit these weights."""
    if config.criterion == "none":
        loaded = config.init_from not in ("auto", "scratch", "resume")
        return keeper(model, optimizer) if loaded and config.keep_zeros else None
    ramp = (config.target_sparsity, config.schedule, config.prune_begin, config.prune_end, config.prune_interval)
    options = dict(allocation=config.allocation, keep_zeros=config.keep_zeros)
    try:
        return Pruner(model, optimizer, config.criterion, *ramp, **options)
    except ValueError as error:
        raise UserError(str(error)) from None


def keeper(model, optimizer):
    """A Pruner that prunes nothing and keeps the zeros there are, or None where there are none."""
    pruner = Pruner(model, optimizer, target_sparsity=0.0)
    return pruner if pruner.masked else None


def continue_pruner(pruner, model, optimizer, config, manifest, buffers):
    """The run's Pruner, or None, as it goes on from a checkpoint whose weights the model has: its zeros stay zeros, also
    where it was pruned and there is no criterion now. UserError where what the config asks for cannot follow."""
    saved = manifest["pruner"]
    pruned_then, pruning_now = manifest["config"]["criterion"] != "none", config.criterion != "none"
    if pruner is None and config.keep_zeros and saved.get("pruned"):
        pruner = keeper(model, optimizer)
    if pruner is None:
        return None
    try:
        if saved and pruned_then == pruning_now:
            pruner.load_state_dict(saved | {"buffers": buffers})
        else:
            pruner.continue_from(manifest["step"])
    except ValueError as error:
        raise UserError(f"{config.out_dir}: {error}") from None
    return pruner


def description(pruner):
    """What is prunable, what will be pruned when, and what is zero already; empty without a Pruner."""
    if pruner is None:
        return ""
    return f"{pruner.describe()}; left out: embeddings and the head tied to them, biases, normalisation"


def shares(pruner):
    """' at 80.00% sparsity (54.61% of all parameters)', counted; empty without a Pruner. A collective where sharded."""
    if pruner is None:
        return ""
    pruned = pruner.pruned
    return f" at {pruned / pruner.prunable:.2%} sparsity ({pruned / pruner.parameters:.2%} of all parameters)"
