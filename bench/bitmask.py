"""Size of a pruned GPT-2 as a dense file, compressed with zstd, and as a bitmask: python -m bench.bitmask

Weights are normal numbers, of which the smallest in magnitude are zero: zeros and exponents compress, mantissas are
noise, as in a trained model. Through the export's own code, in bfloat16; zstd at its default level and
at 10.
"""

import tempfile
import time
from pathlib import Path

import pyarrow
import torch

from gpt2 import bitmask, export, load
from gpt2.errors import Parser, one_line_errors
from gpt2.model import GPTConfig

SIZES = GPTConfig(n_layer=2, vocab_size=7400)  # embeddings are 31 % of it, as of GPT-2 small
PRUNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def pruned(shape, sparsity, seed):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02)
    if sparsity:
        tensor[tensor.abs() <= tensor.abs().flatten().kthvalue(round(sparsity * tensor.numel())).values] = 0
    return tensor.to(torch.bfloat16)


def measure(sparsity, shapes, folder):
    """(bytes as zstd -3, bytes as zstd -10, bytes as bitmask, seconds to load it) of tensors of these shapes, and the
    dense bytes."""
    tensors = {
        name: pruned(shape, sparsity if name.endswith(PRUNED) else 0, i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    dense = b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    compressed = [len(pyarrow.Codec("zstd", compression_level=level).compress(dense)) for level in (3, 10)]
    found = load.Found(folder, "checkpoint", SIZES, {name: lambda t=t: t for name, t in tensors.items()})
    entries, packed = export.bitmask_entries(found, torch.bfloat16, shapes)
    export.write_lazily(folder / bitmask.FILE, entries, {"format": "bitmask-1", "shapes": export.json.dumps(packed)})
    start = time.perf_counter()
    back = bitmask.load(folder)
    seconds = time.perf_counter() - start
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    return len(dense), *compressed, (folder / bitmask.FILE).stat().st_size, seconds


def main():
    Parser(prog="python -m bench.bitmask", description=__doc__).parse_args()
    shapes = export.shapes_of(SIZES)
    matrices = {name: shape for name, shape in shapes.items() if name.endswith(PRUNED)}
    print("| sparsity | tensors | dense, 16 bit | zstd -3 | zstd -10 | bitmask | dense / bitmask | load |")
    print("|---|---|---|---|---|---|---|---|")
    for sparsity in (0.5, 0.9):
        for what, chosen in (("pruned matrices", matrices), ("whole model", shapes)):
            with tempfile.TemporaryDirectory() as folder:
                dense, *sizes, seconds = measure(sparsity, chosen, Path(folder))
            cells = [f"{size / 1e6:.1f} MB" for size in (dense, *sizes)]
            print(
                f"| {sparsity:.0%} | {what} | {' | '.join(cells)} | {dense / sizes[-1]:.2f}x | {seconds:.2f} s |",
                flush=True,
            )


if __name__ == "__main__":
    with one_line_errors("python -m bench.bitmask"):
        main()
