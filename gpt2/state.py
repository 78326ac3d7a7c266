"""The pieces of a run that a checkpoint holds: model, optimizer, and what works around them."""

from dataclasses import asdict

from gpt2 import checkpoint
from gpt2.guard import finite
from gpt2.placement import at_rest


def save(writer, config, step, val_loss, data, model, optimizer, spam, guard, pruner):
    """Have the checkpoint of `step` written; every rank takes part. data: what the manifest says of the data."""
    at_rest(model)  # a stop may have come in the middle of it
    parameters, state = model.tensors(), pruner.state_dict(whole=False) if pruner else {"buffers": {}}
    states = checkpoint.optimizer_tensors(optimizer, parameters)
    states |= {f"pruner.{name}": tensor for name, tensor in state.pop("buffers").items()}
    states |= {f"spam.{name}": tensor for name, tensor in spam.state_dict().items()} if spam else {}
    states |= {f"guard.{name}": tensor for name, tensor in guard.state_dict().items()}
    files = {"model.safetensors": parameters, "optimizer.safetensors": states}
    writer.save(step, files, config=asdict(config), **data, val_loss=finite(val_loss), pruner=state)


def restore(path, manifest, model, optimizer, spam, guard):
    """Load what `save` wrote at `path`, but for the pruner's part; returns its step."""
    checkpoint.load_model(model, checkpoint.open_tensors(path, "model.safetensors"))
    tensors = checkpoint.open_tensors(path, "optimizer.safetensors")
    checkpoint.load_optimizer(optimizer, model.tensors(), tensors)
    for owner, piece in (("spam.", spam), ("guard.", guard)):
        if piece:
            piece.load_state_dict({name: tensor[...] for name, tensor in checkpoint.owned(tensors, owner).items()})
    return manifest["step"]
