"""What a checkpoint's writer promises: the file safetensors reads, hashed as written, a copy of the moment of saving,
and a failed save that costs that save alone."""

import errno
import os
import shlex
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from gpt2 import checkpoint, writer
from gpt2.errors import UserError
from gpt2.files import check_writable, typed, write_atomically
from tests.conftest import ROOT

CONFIG = {"config": {}, "val_loss": 1.0}


def tensors():
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(5, 7),
        "a.step": torch.tensor(3.0),
        "mask": torch.tensor([True, False, True]),
        "wide": torch.arange(3),
        "half": torch.randn(3, 3).bfloat16(),
        "turned": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 4),
    }


def files(step=0):
    return {name: {"w": torch.full((4,), float(step))} for name in checkpoint.FILES}


def test_the_file_is_the_one_safetensors_reads(tmp_path):
    facts = writer.write_safetensors(tmp_path / "x.safetensors", tensors())
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    assert facts["sha256"] == checkpoint.digest(tmp_path / "x.safetensors")
    assert facts["bytes"] == (tmp_path / "x.safetensors").stat().st_size


def test_the_bytes_do_not_depend_on_the_order_of_the_names(tmp_path):
    for name, items in (("x", tensors().items()), ("y", reversed(tensors().items()))):
        writer.write_safetensors(tmp_path / name, dict(items))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_tensors_may_change_as_soon_as_save_returns(tmp_path, monkeypatch):
    gate = writer.threading.Event()
    monkeypatch.setattr(writer.Snapshot, "wait", lambda self: gate.wait(10))
    with writer.Writer(tmp_path, keep=2) as out:
        given = files(step=1)
        out.save(1, given, **CONFIG)
        for parts in given.values():
            parts["w"].zero_()
        gate.set()
    path, manifest = checkpoint.newest(tmp_path)
    assert manifest["step"] == 1 and load_file(path / "model.safetensors")["w"].tolist() == [1.0] * 4


def test_the_next_snapshot_uses_the_memory_of_the_last(tmp_path):
    snapshot = writer.Snapshot()
    snapshot.take(files(1))
    first = snapshot.files["model.safetensors"]["w"].data_ptr()
    snapshot.take(files(2))
    assert snapshot.files["model.safetensors"]["w"].data_ptr() == first
    assert snapshot.files["model.safetensors"]["w"].tolist() == [2.0] * 4


def test_permissions_are_the_umasks(tmp_path):
    old = os.umask(0o027)
    try:
        with writer.Writer(tmp_path, keep=2) as out:
            out.save(1, files(), **CONFIG)
    finally:
        os.umask(old)
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG])
def test_a_failed_save_warns_keeps_the_old_one_and_the_next_is_tried(number, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(number, os.strerror(number))

    with writer.Writer(tmp_path, keep=2) as out:
        out.save(1, files(1), **CONFIG)
        out.wait()
        with monkeypatch.context() as patch:
            patch.setattr(writer.os, "fsync", full)
            out.save(2, files(2), **CONFIG)
            out.wait()
        assert "step 2 could not be written" in capfd.readouterr().err
        assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
        with pytest.raises(UserError, match="step 2"):
            out.finish()
        out.save(3, files(3), **CONFIG)
        out.finish()
    assert checkpoint.newest(tmp_path)[1]["step"] == 3


def test_no_part_is_written_where_the_disk_has_no_room(tmp_path, monkeypatch, capfd):
    usage = writer.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(writer, "write_safetensors", None)  # would fail in another way
    with writer.Writer(tmp_path, keep=2) as out:
        out.save(1, files(), **CONFIG)
        out.wait()
    assert "0 MB left" in capfd.readouterr().err and os.listdir(tmp_path / "checkpoints") == []


def test_an_error_that_is_no_disks_is_raised_in_the_training(tmp_path):
    with writer.Writer(tmp_path, keep=2) as out:
        out.save(1, files(), config=object())  # no JSON
        with pytest.raises(TypeError):
            out.wait()


def test_a_damaged_one_is_put_aside_by_a_run_and_left_by_a_command_that_reads(tmp_path, capfd):
    with writer.Writer(tmp_path, keep=3) as out:
        for step in (1, 2):
            out.save(step, files(step), **CONFIG)
    (tmp_path / "checkpoints" / "step-00000002" / "model.safetensors").write_bytes(b"")
    for put_aside, names in (
        (False, {"step-00000001", "step-00000002"}),
        (True, {"step-00000001", "damaged-step-00000002"}),
    ):
        assert checkpoint.newest(tmp_path, put_aside)[1]["step"] == 1
        assert "skipping the damaged checkpoint" in capfd.readouterr().err
        assert set(os.listdir(tmp_path / "checkpoints")) == names


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for text in (b"old", b"new"):
        write_atomically(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == text
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    check_writable(tmp_path / "pipe")
    write_atomically(tmp_path / "pipe", b"text")
    reader.join(10)
    assert read == [b"text"] and stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "target"]
    (tmp_path / "dangling").symlink_to(tmp_path / "new" / "target")
    check_writable(tmp_path / "dangling")
    write_atomically(tmp_path / "dangling", b"text")
    assert (tmp_path / "new" / "target").read_bytes() == b"text"


@pytest.mark.parametrize("mode", [">", ">>"])
def test_what_stdout_goes_to_is_written_behind_what_was_printed(mode, tmp_path):
    write = "write_atomically('/dev/stdout', b'two\\n')"
    program = f"from gpt2.files import write_atomically; print('one'); {write}; print('three')"
    command = f'{sys.executable} -c "{program}" {mode} {tmp_path / "log"}'
    (tmp_path / "log").write_text("before\n")
    subprocess.run(["sh", "-c", command], check=True, cwd=ROOT)
    assert (tmp_path / "log").read_text() == "before\n" * (mode == ">>") + "one\ntwo\nthree\n"


@pytest.mark.parametrize("path", ["-x", "a b", "plain/folder", "it's"])
def test_a_printed_path_can_be_typed(path):
    (given,) = shlex.split(typed(path))
    assert os.path.normpath(given) == path and not given.startswith("-")
