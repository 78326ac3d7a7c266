"""How fast text is written on a CPU: python -m bench.decode [--nanogpt DIR] [--tokens N]

A model of GPT-2 124M's shape with random weights and random zeros, float32. Three questions, the ways of each in turn,
medians: the sparse model against the dense one at 50, 75 and 90 %, for --samples at once; the dense model, one sample,
at a context of 1,024 against the whole window read for every token, which is nanoGPT's way (its own model.py, where
--nanogpt names a checkout); and the share of the tied head, which no pruning makes faster.
"""

import copy
import statistics
import time
from pathlib import Path

import torch

from bench.loops import load_module, require_checkout
from gpt2.decode import generate
from gpt2.errors import Parser, UserError, one_line_errors, positive
from gpt2.memory import keep_freed
from gpt2.model import GPT, GPTConfig
from gpt2.sparse_linear import make_sparse


def pruned(model, sparsity):
    """A copy of `model` with random zeros in its blocks' matrices."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.transformer.h:
            for parameter in block.parameters():
                if parameter.dim() == 2:
                    parameter[torch.rand_like(parameter) < sparsity] = 0
    return model


def medians(ways, rounds=3):
    """name -> median seconds of a call of each of `ways`, in turn, after one of each that is not counted."""
    seconds = {name: [] for name in ways}
    for round in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if round:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare_sparse(dense, tokens, samples):
    prompt = torch.randint(0, 50257, (samples, 16))
    for sparsity in (0.0, 0.5, 0.75, 0.9):
        model = pruned(dense, sparsity)
        sparse = copy.deepcopy(model)
        start = time.perf_counter()
        replaced = make_sparse(sparse, rows=samples)
        setup = time.perf_counter() - start
        with torch.no_grad():
            error = (model(prompt[:, :1])[0] - sparse(prompt[:, :1])[0]).abs().max().item()
        way = lambda model: lambda: generate(model, prompt, tokens, temperature=0)
        both = medians({"dense": way(model), "sparse": way(sparse)})
        per_token = {name: 1000 * seconds / tokens for name, seconds in both.items()}
        print(
            f"{sparsity:.0%} zeros: dense {per_token['dense']:.1f} ms a token, sparse {per_token['sparse']:.1f} ms, "
            f"{both['dense'] / both['sparse']:.2f}x; {replaced} of 49 layers, measured in {setup:.1f} s; "
            f"logits differ by {error:.1e}",
            flush=True,
        )


def compare_head(dense):
    hidden, ours = torch.randn(1, 1, dense.config.n_embd), copy.deepcopy(dense)
    make_sparse(ours, always=True)
    way = lambda model: lambda: [model.head(hidden) for _ in range(20)]
    with torch.no_grad():
        torchs, kernel = (50 * seconds for seconds in medians({"torch": way(dense), "kernel": way(ours)}).values())
    print(f"the tied head alone: {torchs:.1f} ms a token, by the kernels {kernel:.1f} ms", flush=True)


def compare_windows(model, new, nanogpt):
    prompt = torch.randint(0, 50257, (1, 1024 - new))
    ways = {"ours": lambda: generate(model, prompt, new, top_k=200)}
    if nanogpt:
        theirs = load_module(Path(nanogpt) / "model.py")
        their = theirs.GPT(theirs.GPTConfig(vocab_size=50257, dropout=0.0)).eval()
        ways["nanoGPT"] = lambda: their.generate(prompt, new, top_k=200)
    else:
        ways["whole window"] = lambda: read_whole(model, prompt, new)
    seconds = medians(ways)
    ours, other = seconds.values()
    print(
        f"{new} tokens after {1024 - new}: {list(ways)[1]} {new / other:.2f} tokens/s, ours {new / ours:.2f} "
        f"(the prompt's reading included), {other / ours:.1f}x",
        flush=True,
    )


@torch.no_grad()
def read_whole(model, tokens, new):
    for _ in range(new):
        tokens = torch.cat([tokens, model(tokens)[0][:, -1:].argmax(-1)], dim=1)


def main():
    parser = Parser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--nanogpt", metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--tokens", type=positive, default=60, help="tokens of a timed sample")
    parser.add_argument("--samples", type=positive, default=1, help="texts at once, of the first question")
    parser.add_argument("--new", type=int, default=32, help="tokens written at the end of a full context; 0: none")
    args = parser.parse_args()
    require_checkout(args.nanogpt)
    if not 0 <= args.new < 1024:
        raise UserError(f"--new {args.new}: expected 0 to 1023, as the context is 1,024 tokens")
    keep_freed()
    torch.manual_seed(0)
    dense = GPT(GPTConfig()).eval()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    compare_head(dense)
    compare_sparse(dense, args.tokens, args.samples)
    if args.new:
        compare_windows(dense, args.new, args.nanogpt)


if __name__ == "__main__":
    with one_line_errors("python -m bench.decode"):
        main()
