"""Sparse tensors in a safetensors file: one bit a weight and the values that are not zero.

    tensors = load(path)      # name -> dense tensor

docs/bitmask.md has the layout. This file needs torch and safetensors alone: copy it to where the model is used.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open

FILE, MASK, VALUES = "model.bitmask.safetensors", ".bitmask", ".nonzero"


def load(path, device="cpu"):
    """name -> dense tensor, bit for bit as it was packed; path: a file of this layout, or the folder that holds it.

    ValueError where the file is of another layout or does not fit together.
    """
    file = open_file(path)
    return {name: read(file, name).to(device) for name in names(file)}


def open_file(path):
    path = Path(path)
    file = safe_open(path / FILE if path.is_dir() else path, "pt")
    if (file.metadata() or {}).get("format") != "bitmask-1":
        raise ValueError(f"{path}: not a bitmask file: its metadata lacks format=bitmask-1")
    return file


def names(file):
    """The names of the tensors that the open file holds, packed or not."""
    return [name.removesuffix(MASK) for name in file.keys() if not name.endswith(VALUES)]


def read(file, name):
    """One tensor of the open file, dense."""
    try:
        shapes = json.loads(file.metadata()["shapes"])
    except RecursionError:
        raise ValueError("its shapes are nested too deep") from None
    if name not in shapes:
        return file.get_tensor(name)
    values, size = file.get_tensor(name + VALUES), math.prod(shapes[name])
    bits = unpack(file.get_tensor(name + MASK), size)
    if bits.numel() != size or int(bits.sum()) != values.numel():
        raise ValueError(f"{name}: {values.numel()} values for {int(bits.sum())} bits that are set, of {size}")
    dense = torch.zeros(size, dtype=values.dtype)
    dense[bits] = values
    return dense.view(shapes[name])


def unpack(mask, size):
    """bool [size] of the uint8 `mask`: bit b of byte i, the lowest first, stands for place 8i + b."""
    return (mask[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten()[:size].bool()
