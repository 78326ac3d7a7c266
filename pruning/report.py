"""What a Pruner says of itself: in a line, as a table, as numbers, and of a run before it begins."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pruning.memory import predict
from pruning.select import score_of

if TYPE_CHECKING:
    from pruning.pruner import Pruner


def describe(pruner: "Pruner") -> str:
    """One line: how many of how many parameters are prunable, and what is pruned from which step to which."""
    share = pruner.prunable / pruner.parameters
    said = f"{pruner.prunable:,} of {pruner.parameters:,} parameters ({share:.1%}) are prunable"
    if pruner.target_sparsity:
        steps = f"from step {pruner.begin} to {pruner.end}, every {pruner.interval}"
        ramp = f"{pruner.schedule_name} by {pruner.criterion_name} {steps}"
        said += f"; {pruner.target_sparsity:.2%} of these will be zero: {ramp}"
    return said + (f"; {pruner.claimed:,} are zero already and stay so" if pruner.masked else "")


def table(pruner: "Pruner") -> str:
    """Text: layer, parameters, pruned, sparsity, and their total; the threshold; weights that came back."""
    zeros = pruner.zeros()
    rows = [(layer.name, layer.size, count) for layer, count in zip(pruner.layers, zeros)]
    rows.append(("total", pruner.prunable, sum(zeros)))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'layer':{width}}  {'parameters':>13}  {'pruned':>13}  sparsity"]
    lines += [f"{name:{width}}  {size:13,}  {count:13,}  {count / size:8.2%}" for name, size, count in rows]
    if pruner.threshold is not None:
        lines.append(f"threshold: {pruner.criterion_name} <= {score_of(pruner.threshold):.6g}")
    if back := pruner.came_back(sum(zeros)):
        lines.append(f"not zero any more: {back:,} of {pruner.claimed:,} pruned weights")
    return "\n".join(lines)


def numbers(pruner: "Pruner") -> dict[str, float]:
    """{name: number}: overall sparsity, threshold, and each layer's sparsity."""
    zeros = pruner.zeros()
    named = {f"pruning/{layer.name}": count / layer.size for layer, count in zip(pruner.layers, zeros)}
    named["pruning/sparsity"] = sum(zeros) / pruner.prunable
    if pruner.threshold is not None:
        named["pruning/threshold"] = score_of(pruner.threshold)
    return named


def plan(pruner: "Pruner", max_steps: int) -> dict[str, Any]:
    """Updates, average parameters and memory of a run of `max_steps` optimizer steps."""
    optimizer = pruner.scores.optimizer
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    updates = [(step, pruner.scheduled(step)) for step in range(1, max_steps + 1) if pruner.due(step)]
    average = average_parameters(pruner.parameters, pruner.prunable, updates, max_steps)
    memory = predict(pruner.weight_bytes, trained, optimizer, pruner.buffer_bytes())
    return dict(updates=updates, average_parameters=average, memory=memory)


def average_parameters(parameters: int, prunable: int, updates: Sequence[tuple[int, float]], steps: int) -> float:
    """`parameters` less what is pruned of `prunable`, averaged over the forward passes of steps 1 to `steps`.

    updates: (step, sparsity) of each; it shows from the next step on."""
    sparsity_after = dict(updates)
    current = total = 0.0
    for step in range(1, steps + 1):
        total += current
        current = sparsity_after.get(step, current)
    return parameters - prunable * total / max(1, steps)
