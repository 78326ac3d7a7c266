"""Disks that fill up and folders that vanish in the middle of a run: it warns, goes on, and ends as it would have."""

import builtins
import contextlib
import errno
import os
import shutil
import subprocess
import sys
import threading

import pytest

import train_gpt2
from gpt2 import checkpoint, export, faults, log
from gpt2.config import load_config
from gpt2.errors import Heedless, UserError
from gpt2.lock import OnlyRunIn
from tests.conftest import PRUNED, SMALL, files_of, metrics_of

NAMES = {"criterion": ("none", "bitter7")}
ROOM = 4 << 20  # ten checkpoints of such a run


class At:
    """In the place of a fault: calls a function the `count`-th time that the point `name` is passed."""

    def __init__(self, name, count, function):
        self.name, self.left, self.function = name, count, function

    def pass_by(self, name):
        self.left -= name == self.name
        if name == self.name and self.left == 0:
            self.function()


@pytest.fixture(scope="module")
def train(data_dir):
    """Trains in this process, while what is given as (point, count, function) happens."""

    def run(out_dir, *happenings, draw=lambda out_dir: None):
        arguments = [*SMALL, *PRUNED, "--gradient_accumulation_steps=2", f"--data_dir={data_dir}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(faults, "aims", [At(*happening) for happening in happenings])
            patch.setattr(log, "draw", draw)
            train_gpt2.train(load_config([*arguments, f"--out_dir={out_dir}"], NAMES))

    return run


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """The out_dir of a run to which nothing happens."""
    out_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(out_dir)
    return out_dir


@pytest.fixture
def disk(tmp_path):
    """A small filesystem of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a filesystem needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder):
    """Write until nothing fits."""
    with open(folder / "ballast", "ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                pass


def make_room(folder):
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()
    (folder / "ballast").unlink()


@pytest.mark.parametrize("moment", [("in_update", 8), ("in_write", 20)])
def test_a_disk_that_is_full_for_a_while(moment, train, undisturbed, disk, capfd):
    full, room = (*moment, lambda: fill(disk)), ("in_update", 18, lambda: make_room(disk))
    train(disk / "run", full, room)
    said = capfd.readouterr().err
    assert said.count("the checkpoint of step 10 could not be written") == 1 and said.count("could not be") == 1
    assert said.count("metrics.jsonl cannot be written") <= 1
    assert files_of(disk / "run", 30) == files_of(undisturbed, 30)
    losses = [[line["train_loss"] for line in metrics_of(out_dir)] for out_dir in (disk / "run", undisturbed)]
    assert losses[0] == losses[1]
    names = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert names == ["step-00000020", "step-00000030"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EDQUOT, errno.ESTALE, errno.EIO])
def test_a_disk_that_takes_nothing_for_a_while(number, train, undisturbed, tmp_path, monkeypatch, capfd):
    """Remounted to be read alone, beyond its quota, or a server's that is gone for a moment."""
    opened = builtins.open

    def refuse(path, mode="r", *arguments, **options):
        if not set(mode) & set("wax+"):
            return opened(path, mode, *arguments, **options)
        raise OSError(number, os.strerror(number), str(path))

    refused = (("builtins.open", refuse), ("os.mkdir", lambda path, mode: refuse(path, "w")))
    begin = lambda: [monkeypatch.setattr(name, function) for name, function in refused]
    train(tmp_path / "run", ("in_update", 8, begin), ("in_update", 18, monkeypatch.undo))
    said = capfd.readouterr().err
    assert said.count("the checkpoint of step 10 could not be written") == said.count(os.strerror(number)) == 1
    assert files_of(tmp_path / "run", 30) == files_of(undisturbed, 30)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_disk_that_is_full_to_the_end_keeps_what_it_had(train, disk, capfd):
    with pytest.raises(UserError, match="step 30 could not be written.*give the same command again"):
        train(disk / "run", ("in_update", 15, lambda: fill(disk)))
    assert checkpoint.newest(disk / "run")[1]["step"] == 10
    assert capfd.readouterr().err.count("could not be written") == 2  # of steps 20 and 30
    make_room(disk)
    train(disk / "run")
    assert len(metrics_of(disk / "run")) == 30 and checkpoint.newest(disk / "run")[1]["step"] == 30


def test_a_picture_that_no_disk_takes_is_a_warning(train, disk, capfd):
    draw = log.draw
    train(disk / "run", draw=lambda out_dir: fill(disk) or draw(out_dir))
    said = capfd.readouterr()
    assert "training.png could not be written" in said.err and "finished 30 steps" in said.out
    assert sorted(path.name for path in (disk / "run").iterdir()) == ["checkpoints", "config.json", "metrics.jsonl"]


def test_a_log_on_a_full_disk_costs_its_lines_and_not_the_run(data_dir, tmp_path, monkeypatch):
    """As of `train_gpt2.py ... > log 2>&1`."""
    with open("/dev/full", "w") as full:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, full)
        train_gpt2.main([*SMALL, "--max_iters=3", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"])
        with contextlib.suppress(OSError):
            full.close()
    assert checkpoint.newest(tmp_path / "run")[1]["step"] == 3


def test_a_pipe_that_nobody_reads_is_noticed():
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), open(writing, "w") as stream:
        print("to nobody", file=Heedless(stream), flush=True)


def test_an_export_that_no_disk_takes_is_a_line_and_leaves_nothing(disk, finished_run, command):
    fill(disk)
    code, _, said = command(export, finished_run("char"), "--format", "hf", "--to", disk / "model")
    assert code == 2 and said.count("error:") == len(said.splitlines()) == 1
    assert [path.name for path in disk.iterdir()] == ["ballast"]


def test_an_out_dir_that_is_removed_begins_anew_and_can_be_continued(train, undisturbed, tmp_path, capfd):
    train(tmp_path / "run", ("in_update", 15, lambda: shutil.rmtree(tmp_path / "run")))
    assert capfd.readouterr().err.count("was removed") == 1
    assert files_of(tmp_path / "run", 30) == files_of(undisturbed, 30)
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(15, 31)), "what was written later"
    train(tmp_path / "run")
    with pytest.raises(UserError, match="another run"):
        train_gpt2.train(load_config([*SMALL, "--seed=3", f"--out_dir={tmp_path / 'run'}"], NAMES))


def test_an_out_dir_that_another_run_has_taken_is_left_to_it(train, tmp_path, capfd):
    other = OnlyRunIn(tmp_path / "run")

    def take():
        shutil.rmtree(tmp_path / "run")
        other.__enter__()

    with pytest.raises(UserError, match="another process is training there"):
        train(tmp_path / "run", ("in_update", 15, take))
    assert not (tmp_path / "run" / "checkpoints").exists()
    other.__exit__()
