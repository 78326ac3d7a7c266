"""Text from a checkpoint: python -m gpt2.sample OUT_DIR --prompt "In the beginning" """

import argparse
import sys

import torch

from gpt2 import parallel, tokenizer
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.evaluate import load_run
from gpt2.shards import read_meta


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature, top_k, generator):
    """Tokens [1, time] int64 continued by max_new_tokens: [1, time + max_new_tokens]. temperature 0 takes the likeliest."""
    for _ in range(max_new_tokens):
        hidden = model.features(tokens[:, -model.config.block_size :])
        logits = model.head(hidden[:, -1:])[:, 0].float()
        if temperature == 0:
            following = logits.argmax(-1, keepdim=True)
        else:
            if 0 < top_k < logits.shape[-1]:
                logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def sample(args):
    """Print args.num_samples continuations of the prompt."""
    world = parallel.start(args.device)
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.temperature < 0 or args.top_k < 0:
        raise UserError("expected --num_samples and --max_new_tokens >= 1, --temperature and --top_k >= 0")
    config, model = load_run(args.out_dir, world.device)
    meta = read_meta(config.data_dir)
    words = tokenizer.load(meta)
    if words.vocab_size > config.vocab_size:
        raise UserError(
            f"{config.data_dir}: its tokenizer has {words.vocab_size} tokens, the model {config.vocab_size}; was the data prepared anew?"
        )
    prompt = torch.tensor([words.encode(args.prompt).tolist() or [words.end_of_text]], device=world.device)
    generator = torch.Generator(world.device).manual_seed(args.seed)
    dtype = parallel.compute_dtype(config.dtype, world.device)
    for number in range(args.num_samples):
        with parallel.autocast(world.device, dtype):
            tokens = generate(model, prompt, args.max_new_tokens, args.temperature, args.top_k, generator)
        print(
            words.decode(tokens[0].tolist()) + ("\n---------------" if number + 1 < args.num_samples else ""),
            flush=True,
        )


def main(arguments):
    parser = Parser(
        prog="python -m gpt2.sample",
        description=__doc__.partition(":")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out_dir", help="folder of a run (its newest checkpoint) or of one checkpoint")
    parser.add_argument("--prompt", default="", help="the text to continue; empty: a new document")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, default=200, help="draw among this many likeliest tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--device", default="auto")
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        sample(args)


if __name__ == "__main__":
    main(sys.argv[1:])
