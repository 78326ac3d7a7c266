"""What a Pruner says of its layers: a table, and the parameters of an average step."""

from collections.abc import Sequence

from pruning.layers import Layer


def table(layers: Sequence[Layer], zeros: Sequence[int]) -> str:
    """Text: layer, parameters, pruned, sparsity, and their total in the last line."""
    rows = [(layer.name, layer.size, count) for layer, count in zip(layers, zeros)]
    rows.append(("total", sum(layer.size for layer in layers), sum(zeros)))
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'layer':{width}}  {'parameters':>13}  {'pruned':>13}  sparsity"]
    lines += [f"{name:{width}}  {size:13,}  {count:13,}  {count / size:8.2%}" for name, size, count in rows]
    return "\n".join(lines)


def average_parameters(parameters: int, prunable: int, updates: Sequence[tuple[int, float]], steps: int) -> float:
    """`parameters` less what is pruned of `prunable`, averaged over the forward passes of steps 1 to `steps`.

    updates: (step, sparsity) of each; it shows from the next step on."""
    sparsity_after = dict(updates)
    current = total = 0.0
    for step in range(1, steps + 1):
        total += current
        current = sparsity_after.get(step, current)
    return parameters - prunable * total / steps
