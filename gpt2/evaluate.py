"""Loss of a checkpoint on its validation shards: python -m gpt2.evaluate OUT_DIR"""

import math
import sys

import torch

from gpt2 import checkpoint, parallel
from gpt2.config import Config, checked
from gpt2.data import Windows, evaluation_batches
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.faults import point
from gpt2.model import GPT, GPTConfig
from gpt2.shards import find_shards
from gpt2.stops import Stopped


@torch.no_grad()
def evaluate(model, windows, config, world, dtype, checked=iter):
    """Mean loss (nats a token) over the evaluation's fixed batches, shared out over the ranks. Draws nothing random.

    checked: Stops.checked, which goes through the batches and may stop in between; then there is no loss, but None.
    """
    model.eval()
    total = torch.zeros(2, device=world.device)
    try:
        for inputs, targets in checked(evaluation_batches(windows, config, world)):
            point("in_evaluation")
            with parallel.autocast(world.device, dtype):
                _, loss = model(inputs, targets, False)
            total[0] += loss * len(inputs)
            total[1] += len(inputs)
    except Stopped:
        return None
    finally:
        model.train()
    loss, sequences = parallel.all_reduce_sum(total).tolist()
    return loss / sequences


def load_run(path, device):
    """(config, model) of a checkpoint's folder or of the newest checkpoint in a run's; the model in eval mode on `device`."""
    path, manifest = checkpoint.at(path)
    problems = []
    config = Config(**checked(manifest["config"], f"{path}/manifest.json: ", problems))
    if problems:
        raise UserError("\n".join(problems))
    model = GPT(
        GPTConfig(config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd, bias=config.bias)
    )
    checkpoint.load_model(model, checkpoint.load_tensors(path, "model.safetensors"))
    return config, model.to(device).eval()


def main(arguments):
    parser = Parser(prog="python -m gpt2.evaluate", description=__doc__.partition(":")[0])
    parser.add_argument("out_dir", help="folder of a run (its newest checkpoint) or of one checkpoint")
    parser.add_argument("--data_dir", help="folder of the token shards (default: the run's)")
    parser.add_argument("--device", default="auto")
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        world = parallel.start(args.device)
        config, model = load_run(args.out_dir, world.device)
        validation = Windows(
            find_shards(args.data_dir or config.data_dir, "val", config.data_format),
            config.block_size,
            config.vocab_size,
        )
        loss = evaluate(model, validation, config, world, parallel.compute_dtype(config.dtype, world.device))
        if world.is_main:
            print(
                f"val_loss {loss:.4f}  perplexity {math.exp(loss):.3f}  sequences {min(len(validation), config.eval_iters * config.batch_size)}"
            )
        parallel.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
