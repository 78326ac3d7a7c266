"""The run's Pruner: as the config asks for it, as a checkpoint left it, and what is said of it."""

from gpt2 import checkpoint
from gpt2.errors import UserError
from gpt2.files import typed
from gpt2.initial import STARTS
from pruning import Pruner
from pruning.pruner import BY_CHANCE


def make_pruner(model, optimizer, config):
    """The Pruner that the config asks for; without a criterion, one that keeps the zeros of the weights that init_from
    named; or None. Made when the model has its weights. UserError where the options do not fit them."""
    if config.criterion == "none":
        return keeper(model, optimizer) if keeps_zeros(config) else None
    ramp = (config.target_sparsity, config.schedule, config.prune_begin, config.prune_end, config.prune_interval)
    options = dict(allocation=config.allocation, pattern=config.pattern or None, keep_zeros=config.keep_zeros)
    try:
        pruner = Pruner(model, optimizer, config.criterion, *ramp, **options)
        return with_whole_layers(pruner, has_many_zeros(pruner)) if keeps_zeros(config) else pruner
    except ValueError as error:
        raise UserError(str(error), shared=True) from None


def keeps_zeros(config):
    """Whether the run keeps the zeros of weights that it begins from."""
    return config.keep_zeros and config.init_from not in STARTS


def keeper(model, optimizer):
    """A Pruner that prunes nothing and keeps the zeros there are, or None where there are none."""
    pruner = Pruner(model, optimizer, target_sparsity=0.0)
    return with_whole_layers(pruner, has_many_zeros(pruner)) if pruner.masked else None


def has_many_zeros(pruner):
    """Whether layers that are not zero altogether have more zeros than come by chance, so that they were pruned."""
    return pruner.claimed > BY_CHANCE * pruner.prunable


def with_whole_layers(pruner, pruned):
    """The Pruner, which also keeps layers that are zero altogether where the weights were `pruned` before."""
    if pruned and not pruner.pattern:
        pruner.keep_what_is_zero(updated=True)
    return pruner


def continue_pruner(pruner, model, optimizer, config, path, manifest):
    """The run's Pruner, or None, as it goes on from the checkpoint at `path`, whose weights the model has.

    Their zeros stay zeros, also where they were pruned and there is no criterion now. UserError where what the config
    asks for cannot follow."""
    saved = manifest["pruner"]
    if pruner is None and config.keep_zeros and saved.get("pruned"):
        pruner = Pruner(model, optimizer, target_sparsity=0.0)
    if pruner is None:
        return None
    then, now = manifest["config"]["criterion"], config.criterion
    pruned_then, pruning_now = then != "none", now != "none"
    try:
        if saved and pruned_then == pruning_now:
            tensors = checkpoint.open_tensors(path, "optimizer.safetensors")
            pruner.load_state_dict(saved | {"buffers": checkpoint.owned(tensors, "pruner.")})
        else:
            pruner.continue_from(manifest["step"])
            with_whole_layers(pruner, config.keep_zeros and saved.get("pruned"))
    except ValueError as error:
        elsewhere = f"; --init_from={typed(config.out_dir)} with another --out_dir prunes on from its weights"
        raise UserError(f"{config.out_dir}: {error}{elsewhere if then != now else ''}", shared=True) from None
    return pruner


def description(pruner):
    """What is prunable, what will be pruned when, and what is zero already; empty without a Pruner."""
    if pruner is None:
        return ""
    return f"\n{pruner.describe()}; left out: embeddings and the head tied to them, biases, normalisation"


def sparsities(pruner, by_layer):
    """What metrics.jsonl says of a Pruner, counted now: the share of the prunable weights that is zero, that of all
    parameters, and by_layer that of each layer. A collective where sharded; waits for the device once."""
    if pruner is None:
        return {}
    layers, zeros = pruner.layers, pruner.zeros()
    pruner.check_none_came_back(sum(zeros))
    shares = dict(sparsity=sum(zeros) / pruner.prunable, sparsity_of_all=sum(zeros) / pruner.parameters)
    if by_layer:
        shares["layer_sparsity"] = {layer.name: count / layer.size for layer, count in zip(layers, zeros)}
    return shares
