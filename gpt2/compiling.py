"""torch.compile that cannot end a run: where the compiler fails, the model runs as it is, with one warning."""

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
            reason = f"{type(error).__name__}: {first_line(error)}"
            said.append(f"torch.compile failed and is left away, which is slower: {reason}")
            warn(*said)
        return graph.forward


def inductor_or_stop(graph, inputs):
    """A backend of torch.compile: inductor; UserError where that fails."""
    try:
        return inductor(graph, inputs)
    except Exception as error:
        raise UserError(f"compile=require: torch.compile failed: {type(error).__name__}: {first_line(error)}") from None


said = []  # the warning of inductor_or_eager, once it was given


def inductor(graph, inputs):
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)
