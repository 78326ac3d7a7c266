"""Which weights an update prunes: the lowest of all layers together, or of each layer its share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pruning.scores import NotFiniteError, Scores
from pruning.select import Threshold, leave_first, search, thresholds
from pruning.settings import name_of


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
        layer = scores.layer_with_nan(i for which, _ in wanted for i in which)
        raise NotFiniteError(
            f"{layer}: the criterion {name_of(scores.criterion)} gave NaN; nothing was pruned"
        ) from None


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
    taken = below + served_in_order(ties, part.ties_taken)
    return [i for i, number in zip(part.which, taken.tolist()) if number > caps[i]]


def places(scores: Scores, parts: Sequence[Lowest]) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(layer, rows, live) of chunks on this rank; live is 0 at weights of `parts`, else 1.

    First comes what lies below the thresholds, and ties are counted on the way. Where a part takes only some of them,
    the chunks that give some come once more: few, unless very many weights score the same.
    """
    tied, ties = list[tuple[int, int, slice]](), list[torch.Tensor]()
    for number, part in enumerate(parts):
        partly = part.ties_taken < part.threshold.ties
        for i in part.which:
            for rows in scores.chunks(i):
                live, equal = scores.divide(i, rows, part.threshold.key, partly)
                if equal is not None:
                    tied.append((number, i, rows))
                    ties.append(equal)
                yield i, rows, live
    for (number, i, rows), share in zip(tied, shares_of_ties(scores, parts, tied, ties)):
        if share:
            yield i, rows, leave_first(scores.keys(i, rows) == parts[number].threshold.key, share)


def shares_of_ties(
    scores: Scores, parts: Sequence[Lowest], tied: Sequence[tuple[int, int, slice]], ties: list[torch.Tensor]
) -> list[int]:
    """How many of its ties each chunk gives: those that come first in the full tensors do. A collective where sharded.

    tied: (part, layer, rows) of the chunks of this rank that may give some; ties: how many there are in each.
    """
    wanted = [n for n, part in enumerate(parts) if part.ties_taken < part.threshold.ties]
    if not wanted:
        return []
    groups = {(n, i): place for place, (n, i) in enumerate((n, i) for n in wanted for i in parts[n].which)}
    counts = torch.zeros(len(groups), dtype=torch.int64, device=scores.device)
    for (n, i, _), number in zip(tied, ties):
        counts[groups[n, i]] += number
    on_ranks = scores.ranks.all_gather(counts).tolist() if scores.ranks.sharded else [counts.tolist()]
    rank = scores.ranks.rank if scores.ranks.sharded else 0
    left, mine = {n: parts[n].ties_taken for n in wanted}, {}
    for (n, i), place in groups.items():
        for there, counts_there in enumerate(on_ranks):
            given = min(left[n], counts_there[place])
            left[n] -= given
            if there == rank:
                mine[n, i] = given
    shares = []
    for (n, i, _), number in zip(tied, torch.stack(ties).tolist() if ties else []):
        shares.append(min(mine[n, i], number))
        mine[n, i] -= shares[-1]
    return shares


def count(scores: Scores, part: Lowest) -> torch.Tensor:
    """(keys below the threshold, keys equal to it), each int64 [layers], on the CPU. A collective."""
    counts = torch.zeros(2, len(part.which), dtype=torch.int64, device=scores.device)
    for place, key in scores.counted(part.which):
        counts[0, place] += (key < part.threshold.key).sum()
        counts[1, place] += (key == part.threshold.key).sum()
    return scores.ranks.all_reduce(counts).cpu()


def served_in_order(counts: torch.Tensor, quota: int) -> torch.Tensor:
    """What each of `counts` (int64, 1-d) may take of `quota` when they are served in order."""
    return torch.minimum((quota - (counts.cumsum(0) - counts)).clamp(min=0), counts)
