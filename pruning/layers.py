"""Which of a model's parameters are prunable."""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn as nn

Prunable = Callable[[str, nn.Parameter], bool]
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module")  # submodules that are no part of a name
ENOUGH = 0.9  # share of a model's matrix weights below which the default rule says what it leaves out


@dataclass(eq=False)
class Layer:
    """One prunable parameter.

    parameter: as the optimizer holds it, perhaps a DTensor; shape: of the full tensor; input_dim: along which N:M
    patterns run, guessed where not `input_known`; first: place of its first weight among all prunable ones; row: first
    row of the full tensor that this rank holds.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    input_dim: int
    first: int = 0
    row: int = 0
    input_known: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def row_size(self) -> int:
        return math.prod(self.shape[1:])


def find_layers(model: nn.Module, prunable: Prunable | None = None) -> list[Layer]:
    """The prunable parameters of `model` as Layers, in the model's order, each once.

    prunable: (name, parameter) -> bool, asked about every named parameter, names without the marks of wrappers. By
    default `matrices` of each module, but for frozen ones and what is tied to an embedding; one warning says so where
    these are under 90 % of the model's matrix weights. ValueError for what `prunable` asks for and cannot have, and for
    a model without a prunable weight.
    """
    chosen = asked_for(model, prunable) if prunable else by_default(model)
    layers, first, sideways = [], 0, input_first(model)
    known = {id(parameter) for module in model.modules() for parameter in matrices(module)} | convolved(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in chosen and parameter.numel():
            shape = tuple(parameter.shape)
            input_known = len(shape) == 2 or id(parameter) in known
            along = 0 if id(parameter) in sideways else 1
            layers.append(Layer(clean(name), parameter, shape, along, first, input_known=input_known))
            first += layers[-1].size
    if not layers and prunable:
        raise ValueError(
            "no prunable weight: prunable=, which is called with (name, parameter), chose none of the model's"
        )
    if not layers:
        raise ValueError(
            "the model has no prunable weight: no Linear, attention or convolution that trains and is not tied to an "
            "embedding; prunable=lambda name, parameter: ... can choose others"
        )
    check_names(model, layers)
    if not prunable:
        warn_of_what_is_left_out(model, chosen)
    return layers


def check_model(model: nn.Module, prunable: Prunable | None) -> None:
    """ValueError where this is no module, `prunable` no function, and where FSDP's first version holds weights, which
    are pieces of flat ones there."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, not {type(model).__name__}")
    if not (prunable is None or callable(prunable)):
        raise ValueError(f"prunable={prunable!r}: expected a function (name, parameter) -> bool")
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise ValueError(
            "FullyShardedDataParallel cuts weights into flat pieces, which cannot be ranked by layer: shard the model "
            "with FSDP2 (torch.distributed.fsdp.fully_shard)"
        )


def check_names(model: nn.Module, layers: list[Layer]) -> None:
    """ValueError where another parameter has a layer's name once the marks of wrappers are left out."""
    named: dict[str, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(clean(name), set()).add(id(parameter))
    for layer in layers:
        if len(named[layer.name]) > 1:
            raise ValueError(
                f"{layer.name}: {len(named[layer.name])} weights are called so once {', '.join(WRAPPERS)} are left out "
                "of their names, as the marks of wrappers: give the submodule of such a name another"
            )


def matrices(module: nn.Module) -> Iterator[nn.Parameter]:
    """The rule: the weight of a Linear, a convolution or transformers' Conv1D, and the projections of an attention."""
    names = ["weight"] if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or is_conv1d(module) else []
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a Linear of its own
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    for name in names:
        if isinstance(parameter := getattr(module, name, None), nn.Parameter):
            yield parameter


def convolved(model: nn.Module) -> set[int]:
    """The ids of what convolutions that are not transposed hold, as it may be under another name and parametrised."""
    convolutions = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    return {id(parameter) for module in convolutions for parameter in module.parameters()}


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a Linear whose weight is [in, out]."""
    weight = getattr(module, "weight", None) if type(module).__name__ == "Conv1D" else None
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def by_default(model: nn.Module) -> set[int]:
    """The ids of what the rule covers."""
    ruled = {id(p) for module in model.modules() for p in matrices(module) if p.requires_grad and p.is_floating_point()}
    return ruled - embedded(model)


def asked_for(model: nn.Module, prunable: Prunable) -> set[int]:
    """The ids of what the user's function chooses; a parameter of several names is asked about under each."""
    chosen, sparse = set(), {id(m.weight) for m in embeddings(model) if m.sparse}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not prunable(clean(name), parameter):
            continue
        trouble = None
        if parameter.dim() < 2:
            trouble = "it has no two dimensions: let prunable= say no, as with `parameter.dim() >= 2 and ...`"
        elif not parameter.requires_grad:
            trouble = "it is frozen (requires_grad=False)"
        elif not parameter.is_floating_point():
            trouble = f"it holds {parameter.dtype}"
        elif id(parameter) in sparse:
            trouble = "its embedding has sparse=True, and gradients that cannot be masked"
        if trouble:
            raise ValueError(f"{clean(name)}: prunable= asks for it, but {trouble}")
        chosen.add(id(parameter))
    return chosen


def embedded(model: nn.Module) -> set[int]:
    """The ids of the embeddings' weights, and so of what is tied to one."""
    return {id(m.weight) for m in embeddings(model)}


def embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]


def input_first(model: nn.Module) -> set[int]:
    """The ids of weights whose input dimension is the first one."""
    transposed = [m for m in model.modules() if is_conv1d(m) or isinstance(m, nn.modules.conv._ConvTransposeNd)]
    return {id(m.weight) for m in transposed}


def warn_of_what_is_left_out(model: nn.Module, chosen: set[int]) -> None:
    """One warning where the rule covers too little of the model's matrices, embeddings aside."""
    aside = embedded(model)
    all_matrices = [(n, p) for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in aside]
    total = sum(p.numel() for _, p in all_matrices)
    covered = sum(p.numel() for _, p in all_matrices if id(p) in chosen)
    if covered >= ENOUGH * total:
        return
    left = sorted(((n, p) for n, p in all_matrices if id(p) not in chosen), key=lambda pair: -pair[1].numel())
    named = [clean(name) + ("" if parameter.requires_grad else " (frozen)") for name, parameter in left]
    more = f" and {len(named) - 5} more" if len(named) > 5 else ""
    warnings.warn(
        f"{covered:,} of {total:,} matrix weights ({covered / total:.0%}) are prunable, embeddings aside; left out: "
        f"{', '.join(named[:5])}{more}; prunable=lambda name, parameter: ... can choose them if they train",
        stacklevel=4,
    )


def clean(name: str) -> str:
    """A parameter's name without the marks of wrappers (DDP, torch.compile, activation checkpointing)."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
