"""MNIST-like files, written from the description of the IDX format, with digits that a network learns in seconds."""

import gzip
import struct

import numpy as np

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array):
    """Bytes of an IDX file: two zeros, type 8 (unsigned bytes), number of dimensions, big-endian sizes, values."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_mnist(folder, train=600, test=200, compress=False):
    """Four IDX files of noisy class templates; returns their arrays."""
    random = np.random.default_rng(0)
    templates = random.integers(0, 2, (10, 7, 7)).repeat(4, 1).repeat(4, 2) * 200
    arrays = []
    for count in (train, test):
        labels = np.arange(count) % 10
        images = np.clip(templates[labels] + random.normal(20, 20, (count, 28, 28)), 0, 255).astype(np.uint8)
        arrays += [images, labels.astype(np.uint8)]
    folder.mkdir(exist_ok=True)
    for name, array in zip(NAMES, arrays):
        path = folder / (name + (".gz" if compress else ""))
        path.write_bytes(gzip.compress(idx(array)) if compress else idx(array))
    return arrays
