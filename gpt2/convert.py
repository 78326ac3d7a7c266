"""nanoGPT's checkpoint as one of ours: python -m gpt2.convert out/ckpt.pt --to DIR

A ckpt.pt is a pickle; it is read with torch.load(weights_only=True), which rebuilds tensors and plain values and
refuses anything that could run code. DIR is then a checkpoint like any: --init_from=DIR trains on, gpt2.evaluate,
gpt2.sample and gpt2.export take it. The weights alone are kept, not the optimizer.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import pickle
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from gpt2 import tokenizer
from gpt2.config import FIELDS, Config
from gpt2.errors import Parser, UserError, one_line_errors
from gpt2.files import sync
from gpt2.load import sizes_in
from gpt2.model import GPT
from gpt2.writer import Writer


def read_nanogpt(path):
    """(name -> tensor, {option: value}, step, val_loss or None) of a ckpt.pt. UserError where it is none."""
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path}: cannot be read as tensors and plain values: {str(error).splitlines()[0]}") from None
    if not isinstance(kept, dict) or not {"model", "model_args"} <= kept.keys():
        raise UserError(f"{path}: not nanoGPT's checkpoint: expected a dict with model and model_args")
    tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in kept["model"].items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}  # the causal mask
    tensors.pop("lm_head.weight", None)  # tied to transformer.wte.weight
    options = {**(kept.get("config") or {}), **kept["model_args"]}
    val_loss = kept.get("best_val_loss")
    return tensors, options, int(kept.get("iter_num", 0)), None if val_loss is None else float(val_loss)


def config_from(options):
    """The Config with those of nanoGPT's options that have the same name and type here."""
    same = {name: value for name, value in options.items() if name in FIELDS and type(value) is FIELDS[name].type}
    for name in ("out_dir", "init_from", "device", "dtype", "compile"):
        same.pop(name, None)
    return Config(**same)


def words_for(config, characters):
    """The tokenizer: the characters of a text file, or GPT-2's, where the vocabulary has its size or is padded beyond
    it."""
    if characters:
        words = tokenizer.load("char", "".join(sorted(set(Path(characters).read_text()))))
        if config.vocab_size not in (words.vocab_size, words.vocab_size - 1):  # nanoGPT's has no end-of-text
            raise UserError(
                f"--characters {characters}: {words.vocab_size - 1} characters, the model has {config.vocab_size}"
            )
        return words
    if config.vocab_size < 50257:
        raise UserError(f"the model has {config.vocab_size} tokens, not GPT-2's: name its text with --characters FILE")
    return tokenizer.load("gpt2")


def convert(path, to, characters=None):
    """Write the checkpoint at `path` as ours into the new folder `to`. UserError where one of them is wrong."""
    to = Path(to)
    if to.exists():
        raise UserError(f"--to {to}: is there already; remove it or name another folder")
    tensors, options, step, val_loss = read_nanogpt(path)
    config = config_from(options)
    words = words_for(config, characters)
    check(tensors, config, path)
    facts = {"config": asdict(config), "data": [], "tokenizer": words.describe(), "val_loss": val_loss, "pruner": None}
    to.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=to.absolute().parent, prefix=f".{to.name}.") as beside:
        with Writer(beside, keep=1) as writer:
            writer.save(step, {"model.safetensors": tensors, "optimizer.safetensors": {}}, **facts)
            writer.finish()
        (Path(beside) / "checkpoints" / f"step-{step:08d}").rename(to)
    sync(to.absolute().parent)
    return words


def check(tensors, config, path):
    """UserError where names or shapes are not those of a GPT of the config's sizes."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in GPT(sizes_in(config)).tensors().items()}
    wrong = [
        name
        for name in expected.keys() | tensors.keys()
        if expected.get(name) != getattr(tensors.get(name), "shape", 0)
    ]
    if wrong:
        raise UserError(
            f"{path}: {sorted(wrong)[0]} is not as in a GPT of its model_args ({len(wrong)} tensors differ)"
        )


def main(arguments):
    parser = Parser(prog="python -m gpt2.convert", description=__doc__.partition(":")[0])
    parser.add_argument("checkpoint", help="nanoGPT's ckpt.pt")
    parser.add_argument("--to", required=True, help="folder to write; must not be there")
    parser.add_argument(
        "--characters", metavar="FILE", help="the text that a character model was trained on (input.txt)"
    )
    with one_line_errors(parser.prog, OSError):
        args = parser.parse_args(arguments)
        words = convert(args.checkpoint, args.to, args.characters)
        print(f"{args.to}: a checkpoint with the tokenizer {words.name}; train on with --init_from={args.to}")


if __name__ == "__main__":
    main(sys.argv[1:])
