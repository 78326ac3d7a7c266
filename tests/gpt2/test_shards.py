"""Shards of other projects are read, ours are theirs, and what is no shard is named."""

import hashlib
import json
import os
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpt2.data import Windows
from gpt2.errors import UserError
from gpt2.shards import find_shards, read_meta
from tests.conftest import refused, run

TOKENS = np.random.default_rng(0).integers(0, 50257, 3000).astype(np.uint16)


def write_like_llmc(path, tokens):
    """As llm.c's data_common.py describes it: 256 little-endian int32 (magic, version, count, zeros), then uint16."""
    path.write_bytes(
        struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)
    )


def read_like_modded_nanogpt(path):
    """Its loader's checks: magic, version, and as many tokens as the header says, which fill the file."""
    with open(path, "rb") as file:
        header = struct.unpack("<256i", file.read(1024))
        assert header[0] == 20240520 and header[1] == 1
        data = file.read()
    assert len(data) == 2 * header[2]
    return np.frombuffer(data, "<u2")


@pytest.mark.parametrize(
    "name", ["edu_fineweb_train_000001.bin", "fineweb_train_000001.bin", "tiny_shakespeare_train.bin"]
)
def test_shards_of_llmc_and_modded_nanogpt_are_read(name, tmp_path):
    write_like_llmc(tmp_path / name, TOKENS)
    inputs, targets = Windows(find_shards(tmp_path, "train"), 100, 50257)[[0, 7]]
    assert inputs[1].tolist() == TOKENS[700:800].tolist() and targets[1].tolist() == TOKENS[701:801].tolist()


def test_our_shards_are_read_by_theirs(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be, " * 50)
    run(
        "prepare_fineweb.py",
        "--input",
        tmp_path / "a.txt",
        "--out_dir",
        tmp_path / "out",
        "--tokenizer",
        "byte",
        "--val_tokens",
        11,
    )
    tokens = np.concatenate(
        [
            read_like_modded_nanogpt(path)
            for path in sorted((tmp_path / "out").glob("*.bin"), key=lambda path: path.name[-10:])
        ]
    )
    assert tokens[0] == 256 and bytes(tokens[1:].astype(np.uint8)).decode() == "to be or not to be, " * 50


def test_files_without_a_header_are_read_when_asked_for(tmp_path):
    (tmp_path / "train.bin").write_bytes(TOKENS.tobytes())
    inputs, _ = Windows(find_shards(tmp_path, "train", "raw"), 100, 50257)[[0]]
    assert inputs[0].tolist() == TOKENS[:100].tolist()
    with pytest.raises(UserError, match="train.bin: not a token shard.*--data_format=raw"):
        find_shards(tmp_path, "train")
    (tmp_path / "train.bin").write_bytes(TOKENS.tobytes()[:-1])
    with pytest.raises(UserError, match="train.bin: 5999 bytes, expected two a token"):
        find_shards(tmp_path, "train", "raw")
    write_like_llmc(tmp_path / "train.bin", TOKENS)
    with pytest.raises(UserError, match="train.bin: has the header of a shard"):
        find_shards(tmp_path, "train", "raw")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_nanogpts_data_trains_and_its_pickle_is_left_alone(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes((TOKENS % 65).tobytes())
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    arguments = (
        f"--data_dir={tmp_path}",
        f"--out_dir={tmp_path}/run",
        "--n_layer=1",
        "--n_head=1",
        "--n_embd=16",
        "--block_size=16",
        "--batch_size=2",
        "--gradient_accumulation_steps=1",
        "--max_iters=2",
        "--device=cpu",
        "--compile=False",
        "--vocab_size=65",
    )
    run("train_gpt2.py", *arguments, "--data_format=raw")
    assert not (tmp_path / "exploded").exists()
    lines = refused(run("train_gpt2.py", *arguments, f"--out_dir={tmp_path}/other", check=False))
    assert len(lines) == 1 and "--data_format=raw" in lines[0]


def in_use(folder, meta=True):
    """Windows on one shard of TOKENS, beside the meta.json that lists it; one window was read."""
    path = folder / "x_train_000001.bin"
    write_like_llmc(path, TOKENS)
    if meta:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        listed = {"name": path.name, "tokens": len(TOKENS), "documents": 1, "sha256": digest}
        (folder / "meta.json").write_text(json.dumps({"shards": [listed]}))
    windows = Windows(find_shards(folder, "train"), 100, 50257)
    windows[[0]]
    return path, windows


@pytest.mark.parametrize(
    "fault, message",
    [
        ("gone", "cannot be read any more: No such file"),
        ("shrunk", "was changed while in use: 2024 bytes, not 7024"),
        ("empty", "was changed while in use: 0 bytes"),
        ("grown", "was changed while in use: 7026 bytes"),
        ("other tokens", "its time of change is new, and its sha256 is not that of meta.json"),
        ("another file", "its time of change is new, and its sha256 is not that of meta.json"),
        ("a folder", "x_train_000001.bin: "),
    ],
)
def test_a_shard_that_does_not_stay_what_it_was_is_named(fault, message, tmp_path):
    path, windows = in_use(tmp_path)
    data = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    elif fault in ("shrunk", "empty"):
        os.truncate(path, 2024 if fault == "shrunk" else 0)
    elif fault == "grown":
        path.write_bytes(data + b"xx")
    elif fault == "other tokens":
        data[5000] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
    elif fault == "another file":
        data[5000] ^= 1
        (tmp_path / "beside").write_bytes(data)
        os.utime(tmp_path / "beside", ns=(2, 2))
        os.replace(tmp_path / "beside", path)
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(UserError, match=f"x_train_000001.bin.*{message}" if fault != "a folder" else message) as error:
        windows[[28]]
    assert "\n" not in str(error.value)


def test_a_shard_that_shrinks_in_the_midst_of_a_read_is_named(tmp_path, monkeypatch):
    path, windows = in_use(tmp_path)
    monkeypatch.setattr("gpt2.shards.Shard.check", lambda shard: None)  # it was looked at before
    os.truncate(path, 6000)
    with pytest.raises(UserError, match="x_train_000001.bin: was changed while in use: it ends before token 3000"):
        windows.shards[0].read(2900, 100)


def test_a_shard_that_was_only_touched_is_read_on_where_its_hash_is_known(tmp_path):
    path, windows = in_use(tmp_path)
    os.utime(path, ns=(3, 3))
    assert windows[[7]][0][0].tolist() == TOKENS[700:800].tolist()
    (tmp_path / "meta.json").unlink()
    os.utime(path, ns=(4, 4))
    with pytest.raises(UserError, match="time of change is new, and no meta.json tells"):
        windows[[7]]


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", "[" * 100_000, '{"shards": 1}', '{"shards": [{"name": "../x"}]}', '{"vocab_size": "x"}', "\xff"],
)
def test_a_meta_json_that_is_none_is_one_line(text, tmp_path):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="meta.json") as error:
        read_meta(tmp_path)
    assert "\n" not in str(error.value)


def test_two_threads_that_read_more_shards_than_are_held_open_each_get_their_own(tmp_path):
    for number in range(100):
        write_like_llmc(tmp_path / f"numbered_train_{number:06d}.bin", [number] * 8)
    shards, wrong = find_shards(tmp_path, "train"), []

    def read(seed):
        for number in np.random.default_rng(seed).integers(0, 100, 20_000):
            tokens = np.empty(8, "<u2")
            shards[number].fill(tokens, 0)
            if (tokens != number).any():
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(read, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
