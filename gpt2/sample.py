"""Text from a checkpoint: python -m gpt2.sample OUT_DIR --prompt "In the beginning" """

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import argparse
import math
import sys

import torch

from gpt2 import load, parallel
from gpt2.decode import generate
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.sparse_linear import make_sparse


def sample(args):
    """Print args.num_samples continuations of the prompt."""
    world = parallel.start(args.device)
    if args.num_samples < 1 or args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf or args.top_k < 0:
        raise UserError("expected --num_samples and --max_new_tokens >= 1, --temperature and --top_k >= 0")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: expected 0 <= seed < 2**63")
    found = load.find(args.out_dir)
    words, model = load.tokenizer_of(found, args.data_dir), load.build(found, world.device)
    prompt = words.encode(args.prompt).tolist() or [words.end_of_text]
    if prompt[0] >= found.sizes.vocab_size:
        raise UserError("--prompt: is empty, and the model has no end-of-text token to begin with: give it a text")
    prompt = torch.tensor([prompt], device=world.device)
    generator = torch.Generator(world.device).manual_seed(args.seed)
    dtype = torch.float32 if args.sparse else parallel.compute_dtype(found.dtype, world.device)
    if args.sparse is not False and dtype == torch.float32 and world.device.type == "cpu":
        make_sparse(model, rows=args.num_samples, always=bool(args.sparse))
    elif args.sparse:
        raise UserError(
            f"--sparse: sparse weights are for CPUs, the device is {world.device}; leave it away or add --device=cpu"
        )
    with parallel.autocast(world.device, dtype):
        tokens = generate(
            model, prompt.repeat(args.num_samples, 1), args.max_new_tokens, args.temperature, args.top_k, generator
        )
    print("\n---------------\n".join(words.decode(row) for row in tokens.tolist()), flush=True)


def main(arguments):
    parser = Parser(prog="python -m gpt2.sample", description=__doc__.partition(":")[0])
    parser.add_argument("out_dir", help="a run, a checkpoint, an exported folder, or a Hugging Face GPT-2 folder")
    parser.add_argument("--prompt", type=str, default="", help="the text to continue; empty: a new document")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="tokens of each, after the prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, default=200, help="draw among this many likeliest tokens; 0: among all")
    parser.add_argument("--seed", type=int, default=1337, help="of what is drawn")
    parser.add_argument(
        "--data_dir", help="the run's data, for a checkpoint of earlier versions, without its tokenizer"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: cuda where there is one, else cpu")
    parser.add_argument(
        "--sparse",
        action=argparse.BooleanOptionalAction,
        help="read the non-zero weights alone, in float32 on a CPU; by default where the model is computed so anyway, "
        "in the layers that this makes faster",
    )
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        sample(args)


if __name__ == "__main__":
    main(sys.argv[1:])
