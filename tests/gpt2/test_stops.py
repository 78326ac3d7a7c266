"""A run that is asked to stop saves and ends with 0, and the same command ends where an undisturbed run would have."""

import errno
import fcntl
import os
import re
import shutil
import signal
import stat
import threading
import time

import pytest
import torch
import torch.distributed as dist

from gpt2 import checkpoint, lock, stops, watch
from gpt2.errors import UserError
from gpt2.lock import OnlyRunIn
from gpt2.parallel import World
from gpt2.stops import Stopped, Stops
from tests.conftest import PRUNED, ROOT, SMALL, files_of, metrics_of
from tests.zygote import port

RUN = [*SMALL, *PRUNED, "--gradient_accumulation_steps=4"]


@pytest.fixture(scope="module")
def undisturbed(zygote, data_dir, tmp_path_factory):
    """Number of ranks -> the files of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("stops")
    for ranks in (1, 2):
        done = zygote.run(*RUN, f"--data_dir={data_dir}", f"--out_dir={folder / str(ranks)}", ranks=ranks)
        assert done.codes == [0] * ranks
    return {ranks: files_of(folder / str(ranks), 30) for ranks in (1, 2)}


def stopped_and_continued(zygote, data_dir, out_dir, fault, **options):
    """The step after which a run stopped at that fault; then it is continued to its end."""
    arguments = [*RUN, "--checkpoint_interval=20", f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    done = zygote.run(*arguments, fault=fault, **options)
    ranks = options.get("ranks", 1)
    assert done.codes == [0] * ranks and "the same command continues" in done.output, done
    assert "Traceback" not in done.output
    steps = sorted((out_dir / "checkpoints").glob("step-*"))
    assert zygote.run(*arguments, **options).codes == [0] * ranks
    return int(steps[-1].name[5:]) if steps else 0


@pytest.mark.parametrize(
    "fault, step",
    [
        ("in_micro_step:1:SIGTERM", 0),
        ("in_micro_step:35:SIGTERM", 8),
        ("in_update:9:SIGINT", 9),
        ("in_update:19:SIGHUP", 19),
        ("in_evaluation:5:SIGUSR1", 20),
        ("in_evaluation:8:SIGTERM", 30),
        ("before_fsync:1:SIGTERM", 20),
    ],
)
def test_a_signal_costs_the_step_under_way(fault, step, zygote, undisturbed, data_dir, tmp_path):
    left = stopped_and_continued(zygote, data_dir, tmp_path / "run", fault)
    assert left == step or "fsync" in fault and left >= step
    assert files_of(tmp_path / "run", 30) == undisturbed[1]
    lines = metrics_of(tmp_path / "run")
    assert sorted({line["step"] for line in lines}) == list(range(1, 31))
    assert sorted({line["step"] for line in lines if "val_loss" in line}) == [10, 20, 30]
    assert checkpoint.newest(tmp_path / "run")[1]["val_loss"] == lines[-1]["val_loss"]
    again = zygote.run(*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}")
    assert "is finished" in again.output and metrics_of(tmp_path / "run") == lines


def test_three_ranks_that_are_stopped_end_with_the_same_bytes(zygote, data_dir, tmp_path):
    """Of three numbers a sum depends on the order, which DDP's buckets decide."""
    options = [*SMALL, *PRUNED, "--gradient_accumulation_steps=3", "--learning_rate=1e-2", f"--data_dir={data_dir}"]
    for name, fault in (("whole", None), ("stopped", "in_update:7:SIGTERM:0")):
        arguments = [*options, f"--out_dir={tmp_path / name}"]
        done = zygote.run(*arguments, ranks=3, **({"fault": fault} if fault else {}))
        assert done.codes == [0] * 3 and ("the same command continues" in done.output) == bool(fault)
    assert zygote.run(*arguments, ranks=3).codes == [0] * 3
    assert files_of(tmp_path / "stopped", 30) == files_of(tmp_path / "whole", 30)


def test_fewer_steps_than_were_taken_are_refused(zygote, data_dir, tmp_path):
    arguments = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", "--max_iters=20"]
    assert zygote.run(*arguments, fault="in_update:11:SIGTERM").codes == [0]
    lines = zygote.run(*arguments[:-1], "--max_iters=8", "--init_from=resume").refused()
    assert len(lines) == 1 and "max_iters=8" in lines[0] and "has taken 11 steps: give more" in lines[0]
    assert zygote.run(*arguments).codes == [0]


def test_a_stop_after_an_evaluation_measures_nothing_twice(zygote, undisturbed, data_dir, tmp_path):
    """In the first micro-step after step 10, which was evaluated, in three batches, and not saved."""
    assert stopped_and_continued(zygote, data_dir, tmp_path / "run", "in_micro_step:44:SIGTERM") == 10
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 30]
    assert files_of(tmp_path / "run", 30) == undisturbed[1]


@pytest.mark.parametrize(
    "fault",
    ["in_micro_step:1:SIGTERM:0", "in_micro_step:40:SIGTERM:1", "in_update:9:SIGINT:1", "after_rename:1:SIGUSR1:0"],
)
def test_two_ranks_agree_on_the_step_when_one_is_asked(fault, zygote, undisturbed, data_dir, tmp_path):
    stopped_and_continued(zygote, data_dir, tmp_path / "run", fault, ranks=2)
    assert files_of(tmp_path / "run", 30) == undisturbed[2]


def test_a_second_interrupt_leaves_at_once(zygote, data_dir, tmp_path):
    arguments = [*SMALL, "--max_iters=100_000", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    done = zygote.run(*arguments, fault="after_snapshot:1:SIGINT,before_fsync:1:SIGINT")
    assert done.codes == [130] and "left at once" in done.output


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_for_others_leaves_when_it_is_asked(rank, zygote, data_dir, tmp_path):
    """torchrun's other ranks may be dead by then, and it gives this one 30 seconds."""
    alone = dict(RANK=rank, LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port()))
    arguments = [*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    done = zygote.run(*arguments, env=alone, kill=(1, "SIGTERM"), timeout=25)
    assert done.codes == [0] and ("before its first step was done (SIGTERM)" in done.stderr) is (rank == "0")


def test_ranks_whose_torchrun_was_killed_are_asked_to_stop(monkeypatch):
    """Of several machines, one that has lost its torchrun is lost: the others wait for it to come back."""
    monkeypatch.setattr(watch, "shared_store", lambda timeout: dist.HashStore())
    monkeypatch.setattr(watch, "is_orphan", lambda: True)
    left = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: left.set())
    world = World(0, 2, torch.device("cpu"), "a start")
    with Stops() as listening:
        watch.Watch(world, lambda: 0, timeout=0.1)
        end = time.monotonic() + 20
        while not listening.reason and time.monotonic() < end:
            time.sleep(0.01)
        assert listening.reason == signal.SIGTERM and not left.is_set()
        monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
        watch.Watch(world, lambda: 0, timeout=0.1)
        assert left.wait(20)


def test_hangups_are_heeded_but_under_nohup(monkeypatch):
    monkeypatch.setattr(stops, "leave", lambda code, message: pytest.fail(message))
    for before, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        signal.signal(signal.SIGHUP, before)
        with Stops() as listening:
            os.kill(os.getpid(), signal.SIGHUP)
            assert (listening.reason == signal.SIGHUP) is asked
        assert signal.signal(signal.SIGHUP, signal.SIG_DFL) is before


def test_max_hours_stops_the_run_and_a_clock_that_is_set_does_not(monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    run, seen = Stops(max_hours=2), []
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert list(run.checked([1])) == [1]
    now += 7201
    with pytest.raises(Stopped):
        seen += run.checked([1])
    assert (
        run.asked and not seen and "after step 5 of 9 (max_hours=2); the same command continues" in run.message(5, 0, 9)
    )


def test_nothing_is_measured_by_a_clock_that_can_be_set():
    for path in (path for where in ("", "gpt2/", "pruning/", "lenet/") for path in ROOT.glob(f"{where}*.py")):
        assert not re.search(r"\btime\.time\(|datetime\.now|utcnow|from time import", path.read_text()), path


def test_checkpoints_by_the_clock(zygote, data_dir, tmp_path):
    arguments = [
        *SMALL,
        "--checkpoint_interval=1000",
        "--log_interval=1000",
        "--eval_interval=1000",
        "--checkpoint_minutes=1e-7",
    ]
    for ranks in (1, 2):
        out_dir = tmp_path / str(ranks)
        assert (
            zygote.run(*arguments, f"--data_dir={data_dir}", f"--out_dir={out_dir}", ranks=ranks).codes == [0] * ranks
        )
        assert len(list((out_dir / "checkpoints").glob("step-*"))) == 2


def test_two_runs_do_not_share_an_out_dir(zygote, data_dir, tmp_path):
    arguments = [*SMALL, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}"]
    with OnlyRunIn(tmp_path / "run"):
        lines = zygote.run(*arguments).refused()
        assert len(lines) == 1 and "another process is training there" in lines[0]
    assert not (tmp_path / "run").exists(), "an empty folder is not left behind"
    assert zygote.run(*arguments, fault="in_update:3:SIGKILL").codes == [-9]
    assert zygote.run(*arguments).codes == [0], "a dead process holds no lock"


def test_a_folder_that_another_run_removes_in_that_moment_is_made_anew(tmp_path, monkeypatch):
    """As one does that ends before it has written anything."""
    truly = lock.locked

    def locked(folder):
        held = truly(folder)
        if removals:
            removals.pop().rmdir()
        return held

    monkeypatch.setattr(lock, "locked", locked)
    removals = [tmp_path / "run"]
    with OnlyRunIn(tmp_path / "run"):
        with pytest.raises(UserError, match="another process is training there"), OnlyRunIn(tmp_path / "run"):
            pass


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path, monkeypatch, capfd):
    """As on NFS; and where nothing can be locked it is a warning."""

    def flock(descriptor, how):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or nothing:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        fcntl.flock(descriptor, how)

    monkeypatch.setattr(lock, "fcntl", type("Fcntl", (), dict(vars(fcntl), flock=staticmethod(flock))))
    nothing = False
    with OnlyRunIn(tmp_path / "run") as held:
        with pytest.raises(UserError, match="another process is training there"), OnlyRunIn(tmp_path / "run"):
            pass
        held.hold_again()
        shutil.rmtree(tmp_path / "run")
        held.hold_again()
        with pytest.raises(UserError, match="another process is training there"), OnlyRunIn(tmp_path / "run"):
            pass
    assert "was removed" in capfd.readouterr().err
    nothing = True
    with OnlyRunIn(tmp_path / "run"), OnlyRunIn(tmp_path / "run"):
        assert "its filesystem has no locks" in capfd.readouterr().err


def test_a_stop_in_the_moment_of_a_wrong_step(zygote, data_dir, tmp_path):
    wrong = [*SMALL, "--learning_rate=1e30", "--max_bad_steps=1000", f"--data_dir={data_dir}"]
    for name, fault in (("whole", None), ("stopped", "in_update:9:SIGTERM")):
        done = zygote.run(*wrong, f"--out_dir={tmp_path / name}", fault=fault)
        assert done.codes == [0] and "Traceback" not in done.output
    assert zygote.run(*wrong, f"--out_dir={tmp_path / 'stopped'}").codes == [0]
    assert files_of(tmp_path / "stopped", 30) == files_of(tmp_path / "whole", 30)
    skipped = [[line.get("skipped_steps") for line in metrics_of(tmp_path / name)] for name in ("whole", "stopped")]
    assert skipped[0] == skipped[1] and skipped[0][-1] > 20


@pytest.mark.parametrize("fault, words", [("SIGSTOP", "does not respond"), ("hang", "has come no further")])
def test_a_rank_that_stands_still_ends_the_run_and_is_named(fault, words, zygote, data_dir, tmp_path):
    arguments = [*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", "--dist_timeout_s=5"]
    done = zygote.run(*arguments, ranks=2, fault=f"in_micro_step:20:{fault}:1", timeout=60)
    lines = [line for line in done.output.splitlines() if "no step in 5 s (dist_timeout_s)" in line]
    assert done.codes[0] == 1 and len(lines) == 1 and "rank 1 (" in lines[0] and words in lines[0], done
    assert "Traceback" not in done.output and done.seconds < 60
