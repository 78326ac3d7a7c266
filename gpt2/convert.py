"""nanoGPT's checkpoint as one of ours: python -m gpt2.convert out/ckpt.pt --to DIR

A ckpt.pt is a pickle; it is read with torch.load(weights_only=True), which rebuilds tensors and plain values and
refuses anything that could run code. DIR is then a checkpoint like any: --init_from=DIR trains on, gpt2.evaluate,
gpt2.sample and gpt2.export take it. The weights alone are kept, not the optimizer.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from gpt2 import hugging_face, tokenizer
from gpt2.config import Config, checked, out_of_range
from gpt2.errors import Parser, UserError, first_line, one_line_errors
from gpt2.files import new_folder, typed
from gpt2.load import sizes_in
from gpt2.metrics import is_number
from gpt2.model import GPT
from gpt2.writer import write_checkpoint

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def read_nanogpt(path):
    """(name -> tensor, {option: value}, step, val_loss or None) of a ckpt.pt. UserError where it is none."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    kept = read_plain_values(path)
    if not isinstance(kept, dict) or not all(isinstance(kept.get(part), dict) for part in ("model", "model_args")):
        raise UserError(f"{path}: not nanoGPT's checkpoint: expected a dict with model and model_args")
    if lacking := [name for name in SIZES if type(kept["model_args"].get(name)) is not int]:
        raise UserError(f"{path}: not nanoGPT's checkpoint: its model_args lack {', '.join(lacking)}, a whole number")
    tensors = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in kept["model"].items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".attn.bias")}  # the causal mask
    options = kept["config"] if isinstance(kept.get("config"), dict) else {}
    try:
        step = max(0, int(kept.get("iter_num", 0)))
        val_loss = None if kept.get("best_val_loss") is None else float(kept["best_val_loss"])
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{path}: iter_num or best_val_loss is no number: {first_line(error)}") from None
    return tensors, options | kept["model_args"], step, val_loss if is_number(val_loss) else None


def read_plain_values(path):
    """What torch.save put into a file, whose checksums torch.load does not look at; UserError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in file.infolist())
            if not stored or file.testzip():
                raise ValueError("it is damaged, or compressed, which torch.save's files are not")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle that means harm may raise anything
        raise UserError(f"{path}: cannot be read as tensors and plain values: {first_line(error)}") from None


def config_from(options):
    """The Config with those of nanoGPT's options that have the same name and type here, and a value in range."""
    same = {}
    for name, value in options.items():
        good = checked({name: value}, "", [])
        if good and not out_of_range(Config(**good), {}):
            same |= good
    for name in ("out_dir", "init_from", "device", "dtype", "compile"):
        same.pop(name, None)
    return Config(**same)


def words_for(config, characters):
    """The tokenizer: the characters of a text file, or GPT-2's, where the vocabulary has its size or is padded beyond
    it."""
    if characters:
        try:
            text = Path(characters).read_text()
        except (OSError, ValueError) as error:
            raise UserError(f"--characters {characters}: cannot be read as text: {error}") from None
        words = tokenizer.load("char", "".join(sorted(set(text))))
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
    tensors, options, step, val_loss = read_nanogpt(path)
    config = config_from(options)
    hugging_face.require_plausible(sizes_in(config), path)
    head = tensors.pop("lm_head.weight", None)
    check(tensors, head, config, path)
    words = words_for(config, characters)
    facts = {"config": asdict(config), "data": [], "tokenizer": words.describe(), "val_loss": val_loss, "pruner": None}
    with new_folder(to, "--to") as beside:
        write_checkpoint(beside, step, {"model.safetensors": tensors, "optimizer.safetensors": {}}, facts)
    return words


def check(tensors, head, config, path):
    """UserError where these are not the weights of a GPT of the config's sizes, or its head, or None, is not tied."""
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in GPT(sizes_in(config)).tensors().items()}
    wrong = [
        name
        for name in expected.keys() | tensors.keys()
        if not (is_plain(tensors.get(name)) and expected.get(name) == tensors[name].shape)
    ]
    if wrong:
        raise UserError(
            f"{path}: {sorted(wrong)[0]} is not as in a GPT of its model_args ({len(wrong)} tensors are not)"
        )
    if head is not None and not (is_plain(head) and torch.equal(head, tensors["transformer.wte.weight"])):
        raise UserError(f"{path}: its head has weights of its own, and only a head tied to the embedding is supported")


def is_plain(tensor):
    """Whether this is a tensor whose numbers lie in memory one after the other, as it says."""
    plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    return plain and tensor.dtype in DTYPES and tensor.is_contiguous() and not tensor.is_neg()


def main(arguments):
    parser = Parser(prog="python -m gpt2.convert", description=__doc__.partition(":")[0])
    parser.add_argument("checkpoint", help="nanoGPT's ckpt.pt")
    parser.add_argument("--to", required=True, help="folder to write; must not be there")
    parser.add_argument(
        "--characters", metavar="FILE", help="the text that a character model was trained on (input.txt)"
    )
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        words = convert(args.checkpoint, args.to, args.characters)
        print(f"{args.to}: a checkpoint with the tokenizer {words.name}; train on with --init_from={typed(args.to)}")


if __name__ == "__main__":
    main(sys.argv[1:])
