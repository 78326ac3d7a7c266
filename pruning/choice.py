"""Which weights an update prunes: the lowest of all layers together, or of each layer its share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pruning.scores import NotFiniteError, Scores
from pruning.select import Threshold, leave_ties, search, thresholds


@dataclass(frozen=True)
class Lowest:
    """The `k` lowest weights of the layers `which` together; `threshold` is that of the k-th."""

    which: Sequence[int]
    k: int
    threshold: Threshold

    @property
    def ties_taken(self) -> int:
        """How many of the weights that tie at the threshold are among the k; the first of the full tensors are."""
        return self.k - self.threshold.below


def lowest(scores: Scores, which: Sequence[int], k: int) -> Lowest:
    """The k lowest weights of the layers `which`. NotFiniteError where scores are NaN. A collective."""
    return lowest_of_each(scores, [(which, k)])[0]


def lowest_of_each(scores: Scores, wanted: Sequence[tuple[Sequence[int], int]]) -> list[Lowest]:
    """For each (which, k) the k lowest weights of the layers `which`: one wait for the device, however many."""
    found = []
    for which, k in wanted:
        keys = partial(scores.counted, which)
        sample = scores.sample(which)
        found.append(search(keys, k, len(which), scores.device, scores.ranks.all_reduce, sample))
    try:
        return [Lowest(which, k, threshold) for (which, k), threshold in zip(wanted, thresholds(found))]
    except FloatingPointError:
        name = getattr(scores.criterion, "__name__", repr(scores.criterion))
        layer = scores.layer_with_nan(i for which, _ in wanted for i in which)
        raise NotFiniteError(f"{layer}: the criterion {name} gave NaN; nothing was pruned") from None


def lowest_of_all(scores: Scores, total: int, caps: Sequence[int]) -> list[Lowest]:
    """The `total` lowest weights of all layers, of no layer more than its cap; what all layers share comes last.

    Layers that the common threshold takes beyond their cap give exactly the cap, and the rest of the total is selected
    anew among the others: that only raises the threshold, so what is capped once stays capped.
    """
    free, capped = list(range(len(caps))), list[Lowest]()
    while free:
        common = lowest(scores, free, total - sum(part.k for part in capped))
        over = beyond_cap(scores, common, caps)
        if not over:
            return [*capped, common]
        capped += lowest_of_each(scores, [([i], caps[i]) for i in over])
        free = [i for i in free if i not in over]
    return capped


def beyond_cap(scores: Scores, part: Lowest, caps: Sequence[int]) -> list[int]:
    """The layers of which `part` takes more than their cap."""
    if all(most <= caps[i] for i, most in zip(part.which, part.threshold.most)):
        return []
    below, ties = count(scores, part)
    taken = below.sum(1) + served_in_order(ties.sum(1), part.ties_taken)
    return [i for i, number in zip(part.which, taken.tolist()) if number > caps[i]]


def places(scores: Scores, part: Lowest) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(layer, rows, live) of each chunk on this rank; live, of integers, is 0 at the weights of `part`, else 1."""
    key, partly = part.threshold.key, part.ties_taken < part.threshold.ties
    quotas: list[Any] = tie_quotas(scores, part) if partly else [0] * len(part.which)
    for i, quota in zip(part.which, quotas):
        for rows in scores.chunks(i):
            if partly:
                live, taken = leave_ties(scores.keys(i, rows), key, quota)
                quota = quota - taken  # a tensor from here on, that nothing waits for
            else:
                live = scores.above(i, rows, key)
            yield i, rows, live


def tie_quotas(scores: Scores, part: Lowest) -> list[int]:
    """How many of the ties that this rank holds of each layer are taken."""
    _, ties = count(scores, part)
    if scores.ranks.sharded:
        return served_in_order(ties.flatten(), part.ties_taken).view_as(ties)[:, scores.ranks.rank].tolist()
    return served_in_order(ties.sum(1), part.ties_taken).tolist()


def count(scores: Scores, part: Lowest) -> torch.Tensor:
    """(keys below the threshold, keys equal to it), each int64 [layers, ranks], on the CPU. A collective."""
    counts = torch.zeros(2, len(part.which), dtype=torch.int64, device=scores.device)
    for place, key in scores.counted(part.which):
        counts[0, place] += (key < part.threshold.key).sum()
        counts[1, place] += (key == part.threshold.key).sum()
    return scores.ranks.all_gather(counts).permute(1, 2, 0).cpu()


def served_in_order(counts: torch.Tensor, quota: int) -> torch.Tensor:
    """What each of `counts` (int64, 1-d) may take of `quota` when they are served in order."""
    return torch.minimum((quota - (counts.cumsum(0) - counts)).clamp(min=0), counts)
