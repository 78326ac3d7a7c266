"""The prunable weights as a stream of ordered keys, from the weights and what the optimizer keeps of them."""

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pruning.criteria import magnitude
from pruning.layers import Layer
from pruning.ranks import Ranks, load_rows, local
from pruning.select import EXCLUDED, PRUNED, divide, order_keys, score_of
from pruning.settings import name_of
from pruning.stepping import check_optimizer, group_of

CHUNK = {"cpu": 2**18, "cuda": 2**22}  # weights scored at a time: what fits into a CPU's cache, what fills a GPU
KEPT = 2**23  # weights whose keys, 32 MiB, are kept through an update rather than made in each of its passes
SAMPLED = 2**18  # weights that are sampled, where that saves a pass over four times as many or more
NOT_STATES = ("weight", "initial_weight", "position", "step", "beta1")
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)  # no *args, no **options
STATE_BEHIND = {"mean_exp_avg_sq": "exp_avg_sq"}  # the state from which an argument is computed, where names differ


class NotFiniteError(ValueError):
    """A weight, an optimizer state or a score is NaN or infinite, so nothing was pruned; the message names the
    parameter."""


def needs_of(criterion: Callable[..., torch.Tensor]) -> list[str]:
    """The names of the arguments that a criterion needs. ValueError where it has none."""
    try:
        parameters = inspect.signature(criterion).parameters
    except (TypeError, ValueError):  # a builtin
        parameters = {}  # type: ignore[assignment]
    needs = [name for name, given in parameters.items() if given.default is given.empty and given.kind in NAMED]
    if not needs:
        raise ValueError(
            f"criterion={name_of(criterion)}: expected a function whose arguments, without defaults, say by their "
            "names what it scores by: weight, exp_avg_sq, ... (pruning/criteria.py)"
        )
    return needs


class Scores:
    """The scores of `layers` under `criterion`, on this rank.

    What the optimizer owns (states, groups) is looked up when it is read. ValueError where it does not hold a
    layer, would move a weight that is zero, spreads its states over ranks, or keeps none that the criterion needs.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        ranks: Ranks,
        optimizer: torch.optim.Optimizer,
        criterion: Callable[..., torch.Tensor],
        pattern: tuple[int, int] | None,
    ):
        self.layers, self.ranks, self.optimizer = layers, ranks, optimizer
        self.size = sum(layer.size for layer in layers)
        self.criterion, self.pattern = criterion, pattern
        self.device = local(layers[0].parameter).device
        self.needs = needs_of(criterion)
        self.states = [STATE_BEHIND.get(name, name) for name in self.needs if name not in NOT_STATES]
        check_optimizer(optimizer, layers, self.states)
        self.check_not_factored()
        self.initial = [layer.parameter.detach().clone() for layer in layers] if "initial_weight" in self.needs else []
        self.kept: dict[tuple[int, int], torch.Tensor] | None = None  # (layer, first row) -> the keys of a chunk
        self.fallback = False  # whether scores are abs(weight) for want of states
        self.warned_of_some = False  # whether it was said that only some layers have states
        self.means: torch.Tensor | None = None
        self.zeros: Sequence[int] = [0] * len(layers)

    # ---- before an update ----

    def prepare(self, zeros: Sequence[int]) -> None:
        """Look at weights and states once before an update reads them; zeros: how many weights of each layer are.
        ValueError where a weight or a state is not usable, not finite ones included."""
        self.zeros = zeros
        self.check_finite()
        self.check_not_factored()
        missing = self.missing_states()
        if missing and not self.fallback:
            near = difflib.get_close_matches(missing[0], [*NOT_STATES, *self.held_states()], n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            warnings.warn(
                f"the optimizer keeps no {missing[0]}{hint}: scores are abs(weight) while that is so", stacklevel=5
            )
        self.fallback = bool(missing)
        if not (missing or self.warned_of_some):
            self.warn_of_stateless()
        if "mean_exp_avg_sq" in self.needs and not missing:
            self.means = self.mean_states()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within, while neither weights nor states change but for what an update sets to zero, the keys of a small
        model are made once."""
        self.kept = {} if self.size <= KEPT else None
        try:
            yield
        finally:
            self.kept = None

    def warn_of_stateless(self) -> None:
        """A warning, the first time that the optimizer keeps of some layers alone what the criterion needs."""
        lacking = [
            layer.name
            for i, layer in enumerate(self.layers)
            if not all(torch.is_tensor(self.state_of(i).get(name)) for name in self.states)
        ]
        if lacking:
            self.warned_of_some = True
            warnings.warn(
                f"{', '.join(lacking)}: the optimizer keeps no {' and '.join(self.states)} there, as before a first "
                "gradient: zero is taken for it, which most criteria prune first: leave them out with prunable=, or "
                "begin later",
                stacklevel=6,
            )

    def held_states(self) -> set[str]:
        """The names of what the optimizer keeps of some layer."""
        states = [self.state_of(i) for i in range(len(self.layers))]
        return {name for state in states for name, value in state.items() if torch.is_tensor(value) or name == "step"}

    def missing_states(self) -> list[str]:
        """What the criterion needs of the optimizer, and that keeps for no layer: states, steps or betas."""
        held = self.held_states()
        if all("betas" in group for group in self.optimizer.param_groups):
            held.add("beta1")
        wanted = [*self.states, *(name for name in ("step", "beta1") if name in self.needs)]
        return [name for name in wanted if name not in held]

    def check_finite(self) -> None:
        """NotFiniteError, on every rank, that names the layer and tensor in which a value is NaN or infinite.

        By sums, which one read of the device's memory and one wait for it give; only where a sum is not finite, as that
        of huge values is too, each value is looked at."""
        bad = self.layers_where(lambda those: ~torch.stack([x.sum(dtype=torch.float32) for x in those]).isfinite())
        bad = bad and self.layers_where(lambda those: ~torch.stack([x.isfinite().all() for x in those]))
        if bad:
            raise NotFiniteError(
                f"{', '.join(bad)}: a weight or its optimizer state is NaN or infinite; nothing was pruned"
            )

    def layers_where(self, bad: Callable[[list[torch.Tensor]], torch.Tensor]) -> list[str]:
        """The names of the layers with a tensor that is bad, on any rank; one wait for the device. bad: gives a boolean
        for each tensor of a list."""
        tensors = [(layer.name, tensor) for i, layer in enumerate(self.layers) for tensor in self.tensors_of(i)]
        turn = slice(None) if self.ranks.sharded else slice(self.ranks.rank, None, self.ranks.size)
        counts = torch.zeros(len(tensors), dtype=torch.int64, device=self.device)
        if mine := [tensor for _, tensor in tensors[turn]]:  # replicas are the same: each rank looks at some
            counts[turn] = bad(mine).long()
        found = self.ranks.all_reduce(counts).tolist()
        return list(dict.fromkeys(name for (name, _), count in zip(tensors, found) if count))

    def check_not_factored(self) -> None:
        """ValueError where the optimizer keeps other states than one value a weight, as what the criterion needs or
        instead of it."""
        missing = self.missing_states()
        for i, layer in enumerate(self.layers):
            for name, state in self.state_of(i).items():
                if not torch.is_tensor(state) or state.shape == layer.parameter.shape:
                    continue
                wanted = name if name in self.states else missing[0] if missing and state.dim() else None
                if wanted:
                    raise ValueError(
                        f"{layer.name}: the criterion needs {wanted}, but the optimizer keeps {name} of shape "
                        f"{tuple(state.shape)} "
                        f"for a weight of {layer.shape}; use a criterion of the weights alone, or an optimizer like "
                        "AdamW"
                    )

    def mean_states(self) -> torch.Tensor:
        """Of each layer, the mean of exp_avg_sq over the full tensor; the smallest float instead of zero."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS lacks
        sums = torch.zeros(len(self.layers), dtype=wide, device=self.device)
        for i in range(len(self.layers)):
            if "exp_avg_sq" in self.state_of(i):
                sums[i] = local(self.state_of(i)["exp_avg_sq"]).sum(dtype=wide)
        if self.ranks.sharded:
            self.ranks.all_reduce(sums)
        sizes = torch.tensor([layer.size for layer in self.layers], device=self.device)
        return (sums / sizes).float().clamp(min=torch.finfo(torch.float32).tiny)

    # ---- the stream ----

    def counted(self, which: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """(place in `which`, keys) of each chunk that this rank counts: its shards, or its turn of the replicated
        chunks."""
        turn = 0
        for place, i in enumerate(which):
            for rows in self.chunks(i):
                if self.ranks.sharded or turn % self.ranks.size == self.ranks.rank:
                    yield place, self.keys(i, rows)
                turn += 1

    def sample(self, which: Sequence[int]) -> tuple[Iterator[torch.Tensor], int, int] | None:
        """(keys of every so many rows of the layers `which`, for `search`; how many weights they have; how many of
        these are zero), where that pays."""
        size = sum(self.layers[i].size for i in which)
        zeros = sum(self.zeros[i] for i in which)
        apart = min(size // SAMPLED, 64)
        if self.device.type != "cpu" or self.pattern or apart < 4:
            return None
        mine = which if self.ranks.sharded else which[self.ranks.rank :: self.ranks.size]
        if self.kept is not None:
            of = lambda i, rows: self.keys(i, rows)[-rows.start % apart :: apart]  # the same rows as without
            return (of(i, rows) for i in mine for rows in self.chunks(i)), size, zeros
        every = lambda i: slice(0, local(self.layers[i].parameter).shape[0], apart)
        return (self.new_keys(i, every(i)) for i in mine), size, zeros

    def chunks(self, i: int) -> list[slice]:
        """Slices of this rank's rows of layer i: the same ones in every pass and on every rank that holds these
        rows."""
        layer = self.layers[i]
        rows = local(layer.parameter).shape[0]
        size = max(1, CHUNK.get(self.device.type, 2**20) // max(1, layer.row_size))
        if self.pattern and layer.input_dim == 0:
            size = math.ceil(size / self.pattern[1]) * self.pattern[1]
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]

    def keys(self, i: int, rows: slice) -> torch.Tensor:
        """int32 keys of these rows of layer i, in the order in which weights are pruned; pruned ones come first."""
        if self.kept is None:
            return self.new_keys(i, rows)
        if (i, rows.start) not in self.kept:
            self.kept[i, rows.start] = self.new_keys(i, rows)
        return self.kept[i, rows.start]

    def new_keys(self, i: int, rows: slice) -> torch.Tensor:
        key = order_keys(self.score(i, rows), self.zero_where_pruned(i, rows))
        return self.within_pattern(key, self.layers[i].input_dim, self.pattern) if self.pattern else key

    def divide(self, i: int, rows: slice, key: int, ties_live: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(live, ties): live is 0 where the key of a weight of these rows is below `key`, or equal to it unless
        `ties_live`, else 1; at pruned weights, which stay zero anyhow, it may be either. ties: how many are equal, an
        integer scalar, where `ties_live`."""
        if self.pattern or self.kept is not None or key in (PRUNED, EXCLUDED):
            return divide(self.keys(i, rows), key, ties_live)
        return divide(self.score(i, rows), score_of(key), ties_live, self.zero_where_pruned(i, rows))

    def score(self, i: int, rows: slice) -> torch.Tensor:
        """float32 scores of these rows of layer i."""
        if self.fallback:
            return magnitude(self.argument("weight", i, rows))
        arguments = {name: self.argument(name, i, rows) for name in self.needs}
        score, weight = self.criterion(**arguments), local(self.layers[i].parameter)[rows]
        if not torch.is_tensor(score) or score.shape != weight.shape:
            given = f"a tensor of shape {tuple(score.shape)}" if torch.is_tensor(score) else repr(score)
            raise ValueError(
                f"{self.layers[i].name}: the criterion gave {given} for weights of shape {tuple(weight.shape)}; "
                "expected a score for each"
            )
        return score.float()

    def zero_where_pruned(self, i: int, rows: slice) -> torch.Tensor:
        """float32, zero where the weights of these rows are, and there alone: a float64 weight that is not may be too
        small for float32."""
        weight = local(self.layers[i].parameter)[rows]
        return weight.ne(0).float() if weight.dtype == torch.float64 else weight.float()

    def argument(self, name: str, i: int, rows: slice) -> Any:
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
            return group_of(self.optimizer, layer)["betas"][0]  # type: ignore[index]
        if name == "mean_exp_avg_sq":
            return self.means[i]  # type: ignore[index]
        if name == "step":
            return state.get("step", 0)
        if not torch.is_tensor(state.get(name)):  # a weight that has had no gradient yet
            return torch.zeros_like(self.argument("weight", i, rows))
        return local(state[name])[rows].float()

    def within_pattern(self, key: torch.Tensor, dim: int, pattern: tuple[int, int]) -> torch.Tensor:
        """`key`, with all but the n lowest of every m along `dim` excluded, and but those that are pruned already."""
        n, m = pattern
        groups = key.unflatten(dim, (-1, m))
        rank = groups.argsort(dim=dim + 1, stable=True).argsort(dim=dim + 1)
        return torch.where((rank < n) | (groups == PRUNED), groups, EXCLUDED).view_as(key)

    # ---- what the optimizer keeps ----

    def state_of(self, i: int) -> Mapping[str, Any]:
        return self.optimizer.state.get(self.layers[i].parameter, {})

    def tensors_of(self, i: int) -> list[torch.Tensor]:
        """Layer i's weights, and those of its optimizer states that have their shape, as this rank holds them."""
        parameter = self.layers[i].parameter
        states = [s for s in self.state_of(i).values() if torch.is_tensor(s) and s.dim() and s.shape == parameter.shape]
        if any(not s.is_floating_point() for s in states):
            raise ValueError(
                f"{self.layers[i].name}: the optimizer keeps quantised states, which cannot be set to zero by element"
            )
        return [local(tensor) for tensor in (parameter, *states)]

    def layer_with_nan(self, which: Iterable[int]) -> str:
        """The name of a layer of `which` in which this rank's scores hold a NaN."""
        for i in which:
            if any(self.score(i, rows).isnan().any() for rows in self.chunks(i)):
                return self.layers[i].name
        return "a layer on another rank"

    # ---- buffers ----

    def load_buffers(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for layer, initial in zip(self.layers, self.initial):
            name = f"{layer.name}.initial_weight"
            if name not in tensors:
                raise ValueError(f"the saved state lacks {name}, which the criterion {name_of(self.criterion)} needs")
            load_rows(layer, local(initial), tensors[name])
