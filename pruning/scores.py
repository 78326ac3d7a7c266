"""The prunable weights as a stream of ordered keys, chunk by chunk, from the weights and what the optimizer keeps of them."""

import inspect
import math
import warnings

import torch

from pruning.criteria import magnitude
from pruning.layers import local, nonzero
from pruning.select import EXCLUDED, PRUNED, order_key, score_of

CHUNK = {"cpu": 2**18, "cuda": 2**22}  # weights scored at a time: what fits into a CPU's cache, what fills a GPU
SAMPLED = 2**22  # from so many weights on, a sample of them saves a pass over all
NOT_STATES = ("weight", "initial_weight", "position", "step", "beta1", "mean_exp_avg_sq")
MATRIX_OPTIMIZERS = (
    "Muon",
    "Shampoo",
    "DistributedShampoo",
    "SOAP",
)  # with which zero gradients do not keep a weight at zero


class NotFiniteError(ValueError):
    """A weight, an optimizer state or a score is NaN or infinite, so nothing was pruned; the message names the parameter."""


class Scores:
    """The scores of `layers` under `criterion`, on this rank.

    ValueError where the optimizer does not hold a layer, would move a weight that is zero, or spreads its states over
    ranks.
    """

    def __init__(self, layers, ranks, optimizer, criterion, pattern):
        self.layers, self.ranks, self.optimizer, self.criterion, self.pattern = (
            layers,
            ranks,
            optimizer,
            criterion,
            pattern,
        )
        self.device = local(layers[0].parameter).device
        self.needs = tuple(
            name for name, given in inspect.signature(criterion).parameters.items() if given.default is given.empty
        )
        self.states = [
            "exp_avg_sq" if need == "mean_exp_avg_sq" else need
            for need in self.needs
            if need not in NOT_STATES or need == "mean_exp_avg_sq"
        ]
        self.group_of = check_optimizer(optimizer, layers)
        self.initial = [layer.parameter.detach().clone() for layer in layers] if "initial_weight" in self.needs else []
        self.fallback, self.means = False, []

    # ---- before an update ----

    def prepare(self):
        """Look at weights and states once before an update reads them. ValueError where one is not usable, not finite ones included."""
        self.check_finite()
        missing = [
            state for state in self.states if not any(state in self.state_of(i) for i in range(len(self.layers)))
        ]
        if missing:
            self.check_not_factored(missing[0])
        if missing and not self.fallback:
            warnings.warn(f"the optimizer keeps no {missing[0]}: scores are abs(weight) while that is so", stacklevel=4)
        self.fallback = bool(missing)
        if "mean_exp_avg_sq" in self.needs and not missing:
            self.means = self.mean_states()

    def check_finite(self):
        """NotFiniteError, on every rank, that names the layer and tensor in which a value is NaN or infinite."""
        tensors = [(i, tensor) for i in range(len(self.layers)) for tensor in self.tensors_of(i)]
        if not self.ranks.sharded:  # replicas are the same: each rank looks at its turn of them
            tensors = tensors[self.ranks.rank :: self.ranks.size]
        sums = [tensor.sum(dtype=torch.float32) for _, tensor in tensors]
        finite = torch.stack(sums).isfinite().tolist() if sums else []
        suspects = [place for place, fine in enumerate(finite) if not fine]
        bad = [i for i, tensor in (tensors[place] for place in suspects) if not tensor.isfinite().all()]
        anywhere = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        anywhere[bad] = 1
        if self.ranks.all_reduce(anywhere).any():
            names = ", ".join(self.layers[i].name for i in anywhere.nonzero().flatten().tolist())
            raise NotFiniteError(f"{names}: a weight or its optimizer state is NaN or infinite; nothing was pruned")

    def check_not_factored(self, missing):
        for i, layer in enumerate(self.layers):
            for name, state in self.state_of(i).items():
                if torch.is_tensor(state) and state.dim() and state.shape != layer.parameter.shape:
                    raise ValueError(
                        f"{layer.name}: the criterion needs {missing}, but the optimizer keeps {name} of shape {tuple(state.shape)} "
                        f"for a weight of {layer.shape}; use a criterion of the weights alone, or an optimizer like AdamW"
                    )

    def mean_states(self):
        """Of each layer, the mean of exp_avg_sq over the full tensor; the smallest float instead of zero."""
        sums = torch.stack(
            [
                local(self.state_of(i)["exp_avg_sq"]).sum(dtype=torch.float64)
                if "exp_avg_sq" in self.state_of(i)
                else torch.zeros((), dtype=torch.float64, device=self.device)
                for i in range(len(self.layers))
            ]
        )
        if self.ranks.sharded:
            self.ranks.all_reduce(sums)
        sizes = torch.tensor([layer.size for layer in self.layers], device=self.device)
        return (sums / sizes).float().clamp(min=torch.finfo(torch.float32).tiny)

    # ---- the stream ----

    def counted(self, which):
        """(place in `which`, keys) of each chunk that this rank counts: its shards, or its turn of the replicated chunks."""
        turn = 0
        for place, i in enumerate(which):
            for rows in self.chunks(i):
                if self.ranks.sharded or turn % self.ranks.size == self.ranks.rank:
                    yield place, self.keys(i, rows)
                turn += 1

    def sample(self, which):
        """(keys of every 64th row of the layers `which`, for `search`; how many weights they have). None where it does not pay."""
        size = sum(self.layers[i].size for i in which)
        if self.device.type != "cpu" or self.pattern or size < SAMPLED:
            return None
        mine = which if self.ranks.sharded else which[self.ranks.rank :: self.ranks.size]
        return (self.keys(i, slice(0, local(self.layers[i].parameter).shape[0], 64)) for i in mine), size

    def chunks(self, i):
        """Slices of this rank's rows of layer i: the same ones in every pass and on every rank that holds these rows."""
        layer = self.layers[i]
        rows = local(layer.parameter).shape[0]
        size = max(1, CHUNK.get(self.device.type, 2**20) // max(1, layer.row_size))
        if self.pattern and layer.input_dim == 0:
            size = math.ceil(size / self.pattern[1]) * self.pattern[1]
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def keys(self, i, rows):
        """int32 keys of these rows of layer i, in the order in which weights are pruned; pruned ones come first."""
        # the largest int32 for a live weight, PRUNED for a zero
        highest = nonzero(self.argument("weight", i, rows)).neg_().bitwise_xor_(PRUNED)
        key = torch.minimum(order_key(self.score(i, rows)), highest)
        return self.within_pattern(key, self.layers[i].input_dim) if self.pattern else key

    def above(self, i, rows, key):
        """int32, 1 where the key of a weight is above `key`, else 0; either at pruned weights, which stay zero anyhow."""
        if self.pattern or key in (PRUNED, EXCLUDED):
            keys = self.keys(i, rows)
            return torch.gt(keys, key, out=keys)
        return torch.gt(score := self.score(i, rows), score_of(key), out=torch.empty_like(score, dtype=torch.int32))

    def score(self, i, rows):
        """float32 scores of these rows of layer i."""
        if self.fallback:
            return magnitude(self.argument("weight", i, rows))
        arguments = {name: self.argument(name, i, rows) for name in self.needs}
        score, weight = self.criterion(**arguments), local(self.layers[i].parameter)[rows]
        if not torch.is_tensor(score) or score.shape != weight.shape:
            given = f"a tensor of shape {tuple(score.shape)}" if torch.is_tensor(score) else repr(score)
            raise ValueError(
                f"{self.layers[i].name}: the criterion gave {given} for weights of shape {tuple(weight.shape)}; expected a score for each"
            )
        return score.float()

    def argument(self, name, i, rows):
        """What the criterion's argument `name` stands for (see criteria.py), on these rows of layer i."""
        layer, state = self.layers[i], self.state_of(i)
        if name == "weight":
            return local(layer.parameter)[rows].float()
        if name == "initial_weight":
            return local(self.initial[i])[rows].float()
        if name == "position":
            first = layer.first + (layer.row + rows.start) * layer.row_size
            shape = (rows.stop - rows.start, *layer.shape[1:])
            return torch.arange(first, first + math.prod(shape), device=self.device).view(shape)[:: rows.step]
        if name == "beta1":
            return self.group_of[i]["betas"][0]
        if name == "mean_exp_avg_sq":
            return self.means[i]
        if name == "step":
            return state.get("step", 0)
        if name not in state:  # a weight that has had no gradient yet
            return torch.zeros_like(self.argument("weight", i, rows))
        return local(state[name])[rows].float()

    def within_pattern(self, key, dim):
        """`key`, with all but the n lowest of every m along `dim` excluded."""
        n, m = self.pattern
        groups = key.unflatten(dim, (-1, m))
        rank = groups.argsort(dim=dim + 1, stable=True).argsort(dim=dim + 1)
        return torch.where(rank < n, groups, EXCLUDED).view_as(key)

    # ---- what the optimizer keeps ----

    def state_of(self, i):
        return self.optimizer.state.get(self.layers[i].parameter, {})

    def tensors_of(self, i):
        """Layer i's weights, and those of its optimizer states that have their shape, as this rank holds them."""
        parameter = self.layers[i].parameter
        states = [s for s in self.state_of(i).values() if torch.is_tensor(s) and s.dim() and s.shape == parameter.shape]
        if any(not s.is_floating_point() for s in states):
            raise ValueError(
                f"{self.layers[i].name}: the optimizer keeps quantised states, which cannot be set to zero by element"
            )
        return [local(tensor) for tensor in (parameter, *states)]

    def layer_with_nan(self, which):
        """The name of a layer of `which` in which this rank's scores hold a NaN."""
        for i in which:
            if any(self.score(i, rows).isnan().any() for rows in self.chunks(i)):
                return self.layers[i].name
        return "a layer on another rank"

    # ---- buffers ----

    def load_buffers(self, tensors):
        for layer, initial in zip(self.layers, self.initial):
            name, mine = f"{layer.name}.initial_weight", local(initial)
            if name not in tensors:
                raise ValueError(f"the saved state lacks {name}, which the criterion {self.criterion.__name__} needs")
            mine.copy_(tensors[name][layer.row : layer.row + mine.shape[0]])


def check_optimizer(optimizer, layers):
    """The param group of each layer. ValueError where zero weights would not stay zero, or states lie on other ranks."""
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer keeps each state on one rank only, where the others cannot rank weights by it: use FSDP2 "
            "(fully_shard) to shard states and weights alike, or a plain optimizer under DDP"
        )
    if type(optimizer).__name__ in MATRIX_OPTIMIZERS:
        raise ValueError(
            f"{type(optimizer).__name__} moves each weight by the gradients of its whole matrix, so pruned weights would not stay zero: "
            "use an optimizer that works element by element, such as AdamW, for the prunable weights"
        )
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        if id(layer.parameter) not in group_of:
            raise ValueError(
                f"{layer.name} is not among the optimizer's parameters: make the Pruner after the model is wrapped or sharded, and the "
                "optimizer from that model; or leave the layer out with prunable="
            )
        if group_of[id(layer.parameter)].get("eps") == 0:
            raise ValueError(
                f"{layer.name}: with eps=0 the optimizer divides 0 by 0 at pruned weights: expected eps > 0"
            )
    return [group_of[id(layer.parameter)] for layer in layers]
