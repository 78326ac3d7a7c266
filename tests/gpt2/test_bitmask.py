"""The bitmask layout, packed by a reference written from docs/bitmask.md, and everything that a value can be."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpt2 import bitmask, export, load
from gpt2.errors import UserError
from tests.conftest import ROOT


def packed_by_reference(tensors, path, dtype=torch.float32):
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        flat = tensor.flatten().tolist()
        bits = "".join("1" if value else "0" for value in flat)
        bits += "0" * (-len(bits) % 8)
        mask = [int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)]
        stored[name + ".bitmask"] = torch.tensor(mask, dtype=torch.uint8)
        stored[name + ".nonzero"] = torch.tensor([value for value in flat if value], dtype=dtype)
        shapes[name] = list(tensor.shape)
    save_file(stored, path, metadata={"format": "bitmask-1", "shapes": json.dumps(shapes)})


def test_it_reads_what_the_documentation_describes(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.relu(torch.randn(5, 7)), "b": torch.relu(torch.randn(3)), "c.weight": torch.zeros(2, 2)}
    packed_by_reference(tensors, tmp_path / "x.safetensors")
    back = bitmask.load(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000])
def test_every_bit_comes_back(dtype, size):
    """Negative zero, denormals, infinities and NaN are values like others."""
    random = np.random.default_rng(size)
    special = torch.tensor([-0.0, 1e-40, float("inf"), float("nan"), 0.0, -1.0]).to(dtype)
    tensor = torch.from_numpy(random.normal(size=size)).to(dtype) * torch.from_numpy(random.integers(0, 2, size))
    tensor = torch.cat([tensor.to(dtype), special])
    mask, values = export.pack(export.bits_set(tensor)), export.values_of(tensor)
    bits = bitmask.unpack(mask, len(tensor))
    back = torch.zeros_like(tensor)
    back[bits] = values
    assert back.view(torch.uint8).tolist() == tensor.view(torch.uint8).tolist()
    assert int(bits.sum()) == len(values) and len(mask) == -(-len(tensor) // 8)


def test_other_files_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="not a bitmask file"):
        bitmask.load(tmp_path / "dense.safetensors")
    packed_by_reference({"a": torch.tensor([0.0, 1, 0, 2])}, tmp_path / "x.safetensors")
    stored = {"a.bitmask": torch.tensor([10], dtype=torch.uint8), "a.nonzero": torch.ones(3)}
    save_file(stored, tmp_path / "y.safetensors", metadata={"format": "bitmask-1", "shapes": '{"a": [4]}'})
    with pytest.raises(ValueError, match="3 values for 2 bits"):
        bitmask.load(tmp_path / "y.safetensors")


@pytest.mark.parametrize(
    "shapes", ["[" * 100_000, "{", '{"a": "x"}', '{"a": [1099511627776]}', '{"a": [-4]}', '{"a": [2, -2]}', '{"a": 4}']
)
def test_hostile_shapes_are_one_line(tmp_path, shapes):
    stored = {"a.bitmask": torch.tensor([10], dtype=torch.uint8), "a.nonzero": torch.ones(2)}
    save_file(stored, tmp_path / bitmask.FILE, metadata={"format": "bitmask-1", "shapes": shapes})
    read = partial(bitmask.read, bitmask.open_file(tmp_path), "a")
    with pytest.raises(UserError) as refused:
        load.read(load.Found(tmp_path, "bitmask", None, {"a": read}), "a")
    assert "\n" not in str(refused.value)


def test_the_loader_stands_alone(tmp_path):
    """At most 60 lines, and nothing beside torch and safetensors: the file alone, in another folder, reads a file."""
    source = (ROOT / "gpt2" / "bitmask.py").read_text()
    assert len(source.splitlines()) <= 60
    (tmp_path / "loader.py").write_text(source)
    packed_by_reference({"a": torch.tensor([0.0, 1, 0, 2])}, tmp_path / "x.safetensors")
    script = "import loader, sys; print(loader.load('x.safetensors')['a'].tolist(), 'gpt2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[0.0, 1.0, 0.0, 2.0] False\n", done.stderr
