"""Silent faults: a memory or an arithmetic unit that errs without a word, of which a large run meets some.

Every `check_interval` steps replicas compare the bits of what must be the same on all of them, which finds a rank that
went its own way; and each rank computes its last micro-batch twice more, which finds a rank whose arithmetic does not
give the same twice, also where all ranks share that.
"""

import math
from collections import Counter

import torch
import torch.distributed as dist

from gpt2.errors import UserError
from gpt2.placement import averaging
from pruning.ranks import is_distributed, local

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
KEY = 0x1E3779B97F4A7C15  # odd


def check(last, model, fast, loss_of, batch, exact, grad_norm):
    """Look for silent faults after an update, with no gradients there. UserError, on every rank, names the faulty one.

    last: the step of the last check, or of the run's start; loss_of: (*batch) -> the loss of a micro-batch of the step
    batch[0] under the model `fast`; exact: whether its gradients are the same bits each time on this device, else the
    loss alone is compared; grad_norm: the step's, which is the same on all ranks, as are weights that are not sharded.
    """
    step = batch[0]
    once, again = (replay(model, fast, loss_of, batch, exact) for _ in range(2))
    replicated = {name: p for name, p in model.tensors().items() if not is_distributed(p)}
    replicated["the gradient's norm"] = grad_norm
    differs = once != again
    verdict = 2 * differs[:1] + differs.any()  # 2 or more where the loss differs: sharded gradients differ on all ranks
    mine = torch.cat([verdict.long(), fingerprint(replicated.values())])
    ranks = all_gather(mine).tolist()
    since = f"the last check that found nothing was at step {last}: go on from a checkpoint up to there"
    if worst := max(verdict for verdict, *_ in ranks):
        faulty = [rank for rank, (verdict, *_) in enumerate(ranks) if verdict == worst]
        raise UserError(
            f"step {step}: {named(faulty)} computed a micro-batch twice, with different results: a fault of memory or "
            f"arithmetic, or an operation that is not deterministic; {since}, without the machine, or, where the "
            "operation is to stay, with --check_interval=0",
            shared=True,
        )
    for place, name in enumerate(replicated, 1):
        if odd := odd_ones([numbers[place] for numbers in ranks]):
            raise UserError(
                f"step {step}: {named(odd)} {'differ' if len(odd) > 1 else 'differs'} from other replicas in {name}: "
                f"a fault of memory or arithmetic; {since}, without the machine",
                shared=True,
            )


def replay(model, fast, loss_of, batch, exact):
    """int64 numbers of a micro-batch's loss and gradients; leaves no gradients."""
    with averaging(fast, on=False):
        loss = loss_of(*batch)
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    numbers = fingerprint([loss.detach(), *(gradients if exact else ())])
    for parameter in model.parameters():
        parameter.grad = None
    return numbers


@torch.no_grad()
def fingerprint(tensors):
    """int64 [number of tensors]: a sum over the bits of each that any one element changes; of a shard, this rank's."""
    sums = []
    for tensor in tensors:
        mine = local(tensor)
        rows = (
            mine.reshape(len(mine) if mine.dim() else 1, math.prod(mine.shape[1:]))
            .view(BITS[mine.element_size()])
            .sum(1, dtype=torch.int64)
        )
        odd = (2 * torch.arange(len(rows), device=mine.device) + 1) * KEY
        sums.append((rows * odd).sum())
    return torch.stack(sums)


def all_gather(numbers):
    """[ranks, len(numbers)]."""
    if not dist.is_initialized():
        return numbers[None]
    parts = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, numbers)
    return torch.stack(parts)


def odd_ones(values):
    """The ranks whose value is not the most frequent one; all of them where two values are equally frequent."""
    (value, most), *others = Counter(values).most_common()
    if others and others[0][1] == most:
        return list(range(len(values)))
    return [rank for rank, theirs in enumerate(values) if theirs != value]


def named(ranks):
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
