"""A checkpoint as files for other programs: python -m gpt2.export OUT_DIR --format hf --to DIR

--format hf writes what transformers loads: config.json, generation_config.json, model.safetensors, the tokenizer's
files and a model card. --format bitmask writes one bit a weight and the values that are not zero (docs/bitmask.md).
Tensors are read, turned and written one at a time, so that memory stays at a few times the largest. The folder is whole
or not there.
"""

if __name__ == "__main__":
    import gpt2.early  # noqa: F401

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path

import torch

from gpt2 import bitmask, hf_tokenizer, hugging_face, load
from gpt2.errors import Parser, UserError, first_line, one_line_errors
from gpt2.files import new_folder, typed, write_atomically, write_json
from gpt2.model import GPT
from gpt2.model_card import model_card
from gpt2.writer import bytes_of, ordered, safetensors_header

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_lazily(path, entries, metadata):
    """Write a safetensors file, one tensor at a time; entries: (name, dtype, shape, function that gives the tensor)."""
    announced = {name: torch.empty(shape, dtype=dtype, device="meta") for name, dtype, shape, _ in entries}
    readers = {name: read for name, _, _, read in entries}
    with open(path, "wb") as file:
        file.write(safetensors_header(announced, metadata))
        for name, expected in ordered(announced):
            tensor = readers[name]()
            if tensor.dtype != expected.dtype or tensor.shape != expected.shape:
                raise UserError(f"{name} is {list(tensor.shape)}, where its config says {list(expected.shape)}")
            file.write(bytes_of(tensor))
        file.flush()
        os.fsync(file.fileno())


def shapes_of(sizes):
    """name -> shape of the parameters of a GPT of these sizes."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(sizes).tensors().items()}


def hugging_face_entries(found, dtype):
    """The entries of transformers' model.safetensors: its orientation, and biases of zeros where our model has none."""
    entries = []
    for name, shape in shapes_of(found.sizes).items():
        turned = name.endswith(hugging_face.TRANSPOSED)
        entries.append((name, dtype, shape[::-1] if turned else shape, converted(found, name, dtype, turned)))
        bias, width = name.replace(".weight", ".bias"), shape[0]
        if not found.sizes.bias and ".wte." not in name and ".wpe." not in name:
            entries.append((bias, dtype, (width,), lambda width=width: torch.zeros(width, dtype=dtype)))
    return entries


def converted(found, name, dtype, turned):
    def read():
        tensor = load.read(found, name).to(dtype)
        return tensor.t() if turned else tensor

    return read


def write_hugging_face(found, folder, words, dtype):
    """Write everything that transformers needs of `found` into `folder`."""
    end = words.end_of_text if hf_tokenizer.has_end(words) else None
    write_json(folder / "config.json", hugging_face.config_of(found.sizes, words.end_of_text, end, dtype))
    ends = {"bos_token_id": words.end_of_text, "eos_token_id": end, "pad_token_id": words.end_of_text}
    write_json(folder / "generation_config.json", ends)
    hf_tokenizer.write(folder, words, found.sizes.block_size)
    write_lazily(folder / hugging_face.WEIGHTS, hugging_face_entries(found, DTYPES[dtype]), {"format": "pt"})


def bitmask_entries(found, dtype, shapes):
    """(entries, shapes of the packed tensors): each tensor packed where that is smaller, as it is elsewhere.

    What counts as a value is any element whose bits are not all zero, so that -0.0 comes back as it was.
    """
    entries, packed = [], {}
    for name, shape in shapes.items():
        read = converted(found, name, dtype, turned=False)
        size, count = math.prod(shape), int(bits_set(read()).sum())
        if count * dtype.itemsize + -(-size // 8) >= size * dtype.itemsize:
            entries.append((name, dtype, shape, read))
            continue
        packed[name] = list(shape)
        entries.append((name + bitmask.MASK, torch.uint8, (-(-size // 8),), lambda read=read: pack(bits_set(read()))))
        entries.append((name + bitmask.VALUES, dtype, (count,), lambda read=read: values_of(read())))
    return entries, packed


def bits_set(tensor):
    """bool, flat: where the bits of an element are not all zero."""
    return tensor.contiguous().flatten().view(torch.int32 if tensor.element_size() == 4 else torch.int16) != 0


def values_of(tensor):
    return tensor.flatten()[bits_set(tensor)]


def pack(bits):
    """uint8: bit b of byte i, the lowest first, is place 8i + b of `bits`; the last byte is filled up with zeros."""
    padded = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def write_bitmask(found, folder, words, dtype):
    entries, packed = bitmask_entries(found, DTYPES[dtype], shapes_of(found.sizes))
    metadata = {"format": "bitmask-1", "shapes": json.dumps(packed)}
    write_lazily(folder / bitmask.FILE, entries, metadata)


WRITERS = {"hf": write_hugging_face, "bitmask": write_bitmask}


def export(source, form, to, dtype, licence):
    """Write the folder `to`; returns it. UserError where it is there already, cannot be written, or the source cannot
    be read."""
    found, to = load.find(source), Path(to)
    words = load.tokenizer_of(found)
    with new_folder(to, "--to") as beside:
        WRITERS[form](found, beside, words, dtype)
        write_json(beside / load.ORIGIN, load.origin_of(found, words))
        write_atomically(beside / "README.md", model_card(found, words, form, dtype, licence, to.name).encode())
    return to


def push(folder, name):
    """Upload the folder as the model USER/NAME of the Hugging Face hub, made where it is not there. Returns its
    address."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=name, commit_message="Weights, tokenizer and card")
    except Exception as error:  # its kinds change with its HTTP library
        raise UserError(
            f"--push {name}: {first_line(error)}; the export in {folder} is whole: "
            f"hf auth login, then hf upload {name} {typed(folder)}"
        ) from None
    return address


def name_of_licence(text):
    """A licence's name, which stands in the model card's YAML."""
    if not re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"expected the hub's name of a licence, as in apache-2.0, not {text!r}")
    return text


def main(arguments):
    parser = Parser(prog="python -m gpt2.export", description=__doc__.partition(":")[0])
    parser.add_argument(
        "source",
        metavar="OUT_DIR",
        help="folder of a run (its newest checkpoint), of one checkpoint, an export or Hugging Face's GPT-2",
    )
    parser.add_argument("--format", choices=tuple(WRITERS), default="hf", help="for transformers, or docs/bitmask.md's")
    parser.add_argument("--to", required=True, help="folder to write; must not be there")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the weights; zeros stay zeros")
    parser.add_argument(
        "--license", type=name_of_licence, default="mit", help="for the model card, as the hub names licences"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="upload the folder to the Hugging Face hub")
    with one_line_errors(parser.prog):
        args = parser.parse_args(arguments)
        folder = export(args.source, args.format, args.to, args.dtype, args.license)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size:,} bytes")
        if args.push:
            print(push(folder, args.push))


if __name__ == "__main__":
    main(sys.argv[1:])
