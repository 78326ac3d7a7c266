"""Writes checkpoints while training goes on: the tensors are copied to host memory, and a thread writes the copy.

    with Writer(out_dir, keep=2) as writer:
        writer.save(1000, {"model.safetensors": {name: tensor}, "optimizer.safetensors": {...}}, config=..., ...)

`save` is called by every rank with the same names. A sharded tensor (DTensor) is gathered whole, which is a collective,
one tensor at a time in the order of the names, and is copied to the main rank's host memory before the next one is: no
device ever holds more than one whole tensor. Only the main rank writes. What a save that fails costs is that save.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import threading
from pathlib import Path

import torch

from gpt2 import checkpoint
from gpt2.errors import UserError
from gpt2.faults import point
from gpt2.files import sync, write_json
from pruning.ranks import full

CHUNK = 8 << 20  # bytes hashed and written at a time
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def ordered(tensors):
    """(name, tensor) in the order of the file: the widest dtype first, so that all are aligned, then by name."""
    return sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))


def safetensors_header(tensors, metadata=None):
    """The bytes before the data: 8 of length (little endian), then JSON: name -> dtype, shape, offsets in the data.

    metadata: str -> str, kept under __metadata__."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in ordered(tensors):
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_safetensors(path, tensors):
    """Write name -> tensor (on the CPU) to `path` and sync it; returns {"bytes", "sha256"} of what was written.

    The bytes are hashed on their way to the disk, never read again.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in (safetensors_header(tensors), *(bytes_of(tensor) for _, tensor in ordered(tensors))):
            for first in range(0, len(piece), CHUNK):
                chunk = piece[first : first + CHUNK]
                point("in_write")
                digest.update(chunk)
                size += file.write(chunk)
        file.flush()
        point("before_fsync")
        os.fsync(file.fileno())
        point("after_fsync")
    return {"bytes": size, "sha256": digest.hexdigest()}


def bytes_of(tensor):
    """The memory of a CPU tensor, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write_checkpoint(folder, step, files, facts):
    """Make `folder` and write a checkpoint's files into it, the manifest last.

    files: file -> {name: tensor on the CPU}; facts: what else the manifest holds.
    """
    folder.mkdir(exist_ok=True)
    point("before_write")
    written = {name: write_safetensors(folder / name, tensors) for name, tensors in files.items()}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    manifest = {"format": checkpoint.FORMAT, "step": step, **facts, "versions": versions, "files": written}
    point("before_manifest")
    write_json(folder / "manifest.json", manifest | {"checksum": checkpoint.checksum(manifest)})


class Snapshot:
    """Copies of tensors in host memory, pinned where they come from a GPU; the next snapshot uses the memory again."""

    def __init__(self):
        self.files, self.copied = {}, None

    def take(self, files):
        """files: file -> {name: tensor}. On a GPU the copies are only queued: `wait` before reading them."""
        old, self.files, self.copied, on_gpu = self.files, {}, None, False
        for file, tensors in files.items():
            self.files[file] = {}
            for name, tensor in ordered(tensors):
                tensor = full(tensor.detach())
                buffer = old.get(file, {}).pop(name, None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffer.copy_(tensor, non_blocking=tensor.is_cuda)
                self.files[file][name] = buffer
                on_gpu |= tensor.is_cuda
        if on_gpu:
            self.copied = torch.cuda.Event()
            self.copied.record()

    def wait(self):
        if self.copied:
            self.copied.synchronize()


class Writer:
    """Writes the checkpoints of the run in `out_dir`; deletes those neither among the `keep` newest nor the best.

    before: called before each is written; an OSError of it is one of the disk."""

    def __init__(self, out_dir, keep, before=lambda: None):
        self.folder, self.keep, self.before = Path(out_dir) / "checkpoints", keep, before
        self.is_main = int(os.environ.get("RANK", 0)) == 0
        self.snapshot, self.thread = Snapshot(), None
        self.step = self.failure = self.bug = None  # the last step given to `save`; why it is not on the disk

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Let the checkpoint under way be finished, whatever ends the run."""
        if self.thread:
            self.thread.join()

    def save(self, step, files, **facts):
        """Write the checkpoint of `step`; every rank calls it, and may change the tensors as soon as it returns.

        files: file -> {name: tensor}, tensors on any device, sharded or not; facts: what else the manifest holds.
        """
        self.wait()
        self.step = step
        if not self.is_main:
            for tensors in files.values():
                for _, tensor in ordered(tensors):
                    full(tensor.detach())
            return
        point("before_snapshot")
        self.snapshot.take(files)
        point("after_snapshot")
        self.thread = threading.Thread(target=self.write, args=(step, facts), name="checkpoint writer")
        self.thread.start()

    def wait(self):
        """Wait until the last `save` is on the disk, or has failed and said so."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.bug:
            raise self.bug

    def finish(self):
        """Wait for the last checkpoint; UserError where it could not be written."""
        self.wait()
        if self.failure:
            raise UserError(
                f"{self.failure}; mend that and give the same command again: it continues from the one before"
            )

    def write(self, step, facts):
        """What the thread does. A disk that is full or cannot be written is a warning: the next save tries again."""
        try:
            self.snapshot.wait()
            self.write_folder(step, facts)
            self.failure = None
            self.delete_outdated()
        except OSError as error:
            self.failure = f"the checkpoint of step {step} could not be written: {error}"
            print(f"warning: {self.failure}; training goes on, the next save tries again", file=sys.stderr, flush=True)
        except BaseException as error:  # for the training thread to raise
            self.bug = error

    def write_folder(self, step, facts):
        final, beside = self.folder / f"step-{step:08d}", self.folder / f".step-{step:08d}.tmp"
        self.before()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        self.check_space()
        try:
            write_checkpoint(beside, step, self.snapshot.files, facts)
            if final.exists():
                checkpoint.set_aside(final)
            with contextlib.suppress(FileNotFoundError):
                sync(self.folder.parent / "metrics.jsonl")  # its lines up to here are not measured again
            point("before_rename")
            beside.rename(final)
            point("after_rename")
        except OSError:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        sync(self.folder)
        point("after_sync")

    def check_space(self):
        """OSError (ENOSPC) where the disk has less room than the checkpoint takes: a part would only be in the way."""
        size = sum(tensor.nbytes for tensors in self.snapshot.files.values() for tensor in tensors.values())
        free = shutil.disk_usage(self.folder).free
        if free < size + (1 << 20):
            reason = f"it takes {size / 1e6:,.0f} MB, the disk has {free / 1e6:,.0f} MB left"
            raise OSError(errno.ENOSPC, reason, str(self.folder))

    def delete_outdated(self):
        for path in checkpoint.outdated(self.folder, self.keep):
            point("before_delete")
            try:
                shutil.rmtree(path)
            except OSError as error:
                print(f"warning: an old checkpoint could not be deleted: {error}", file=sys.stderr, flush=True)
