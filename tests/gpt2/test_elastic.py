"""Under torchrun: a rank or machine that dies is replaced and nothing changes; what dies again and again is stopped."""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from gpt2.errors import UserError
from gpt2.restarts import count_restart
from tests.conftest import PRUNED, SMALL, files_of, metrics_of, run_anew, start
from tests.zygote import port as free_port

RUN = [*SMALL, *PRUNED, "--gradient_accumulation_steps=4"]


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_dies_or_stands_still_is_replaced_and_the_run_ends_bitwise_the_same(
    zygote, data_dir, tmp_path, fault
):
    assert zygote.run(*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'whole'}", ranks=2).codes == [0, 0]
    program = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3 train_gpt2.py"
    arguments = [*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'broken'}", "--dist_timeout_s=8"]
    done = run_anew(program, *arguments, env={"ADAMWPRUNE_FAULT": f"in_update:15:{fault}:1"})
    assert "continued from" in done.stdout + done.stderr
    assert files_of(tmp_path / "broken", 30) == files_of(tmp_path / "whole", 30)
    whole, broken = (metrics_of(tmp_path / name) for name in ("whole", "broken"))
    assert [line["train_loss"] for line in whole] == [line["train_loss"] for line in broken]


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True


def lose(machine):
    """Kill torchrun and its ranks, as a machine that loses its power does."""
    ranks = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
    for process in (machine.pid, *map(int, ranks)):
        os.kill(process, signal.SIGKILL)
    machine.wait()


def test_a_machine_that_is_lost_and_comes_back_changes_nothing(zygote, data_dir, tmp_path):
    assert zygote.run(*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'whole'}", ranks=2).codes == [0, 0]
    port, lines = free_port(), tmp_path / "lost" / "metrics.jsonl"
    program = (
        "-m torch.distributed.run --nnodes=2 --nproc_per_node=1 --max-restarts=3 --rdzv-backend=c10d --rdzv-id=two "
        f"--rdzv-endpoint=127.0.0.1:{port} --rdzv-conf=keep_alive_interval=1 --local-addr=127.0.0.1 train_gpt2.py"
    )
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    arguments = [*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'lost'}", "--dist_timeout_s=60"]
    first = start(program, *arguments, env=environment)
    wait_until(lambda: listens(port))
    second = start(program, *arguments, env=environment | {"ADAMWPRUNE_FAULT": "in_update:15:hang"})
    wait_until(lambda: lines.exists() and '"step": 14,' in lines.read_text())
    lose(second)
    again = start(program, *arguments, env=environment)
    outputs = ["".join(machine.communicate(timeout=300)) for machine in (first, again)]
    assert [first.returncode, again.returncode] == [0, 0], outputs
    assert "continued from" in "".join(outputs)
    assert files_of(tmp_path / "lost", 30) == files_of(tmp_path / "whole", 30)


def test_the_third_restart_at_one_step_is_refused(tmp_path, monkeypatch):
    def start(restart, step):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restart))
        count_restart(tmp_path, step)

    for restart, step in ((0, 0), (1, 0), (2, 0), (3, 10), (4, 10), (5, 20), (6, 20)):
        start(restart, step)
    with pytest.raises(UserError, match="restarted 3 times at step 20"):
        start(7, 20)
    start(0, 20)
    assert not list(tmp_path.iterdir()), "the same command given again starts to count anew"
    (tmp_path / ".restarts.json").write_text("[[")
    start(1, 20)
    assert json.loads((tmp_path / ".restarts.json").read_text())["restarts"] == 1
