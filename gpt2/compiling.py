"""torch.compile that cannot end a run: where the compiler fails, the model runs as it is, with one warning."""

import torch

from gpt2.errors import UserError, first_line, warn


def backend_of(compile):
    """The backend of torch.compile for the option `compile`."""
    return inductor_or_stop if compile == "require" else inductor_or_eager


def inductor_or_eager(graph, inputs):
    """A backend of torch.compile: inductor, or, where that fails, the graph as it is, with one warning."""
    try:
        return inductor(graph, inputs)
    except Exception as error:
        if not said:
            said.append(left_away(error))
            warn(*said)
        return graph.forward


def inductor_or_stop(graph, inputs):
    """A backend of torch.compile: inductor; UserError where that fails."""
    try:
        return inductor(graph, inputs)
    except Exception as error:
        raise UserError(f"compile=require: torch.compile failed: {type(error).__name__}: {first_line(error)}") from None


def compiles_for(device):
    """Whether inductor compiles for the device, with a warning where it fails.

    It is asked before the model is traced: a traced graph holds the logits, which the loss by blocks does without.
    """
    try:
        return torch.compile(lambda x: x + 1, backend=inductor)(torch.zeros(1, device=device)) is not None
    except Exception as error:
        warn(left_away(getattr(error, "inner_exception", error)))
        return False


def left_away(error):
    return f"torch.compile failed and is left away, which is slower: {type(error).__name__}: {first_line(error)}"


said = []  # the warning of inductor_or_eager, once it was given


def inductor(graph, inputs):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)
