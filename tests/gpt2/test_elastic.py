"""Under torchrun: a rank that dies is replaced and nothing changes; what dies again at the same step is stopped."""

import json

import pytest

from gpt2.errors import UserError
from gpt2.restarts import count_restart
from tests.conftest import PRUNED, SMALL, files_of, metrics_of, run_anew

RUN = [*SMALL, *PRUNED, "--gradient_accumulation_steps=4"]


def test_a_killed_rank_is_replaced_and_the_run_ends_bitwise_the_same(zygote, data_dir, tmp_path):
    assert zygote.run(*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'whole'}", ranks=2).codes == [0, 0]
    program = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3 train_gpt2.py"
    arguments = [*RUN, f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'killed'}"]
    done = run_anew(program, *arguments, env={"ADAMWPRUNE_FAULT": "in_update:15:SIGKILL:1"})
    assert "continued from" in done.stdout + done.stderr
    assert files_of(tmp_path / "killed", 30) == files_of(tmp_path / "whole", 30)
    whole, killed = (metrics_of(tmp_path / name) for name in ("whole", "killed"))
    assert [line["train_loss"] for line in whole] == [line["train_loss"] for line in killed]


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
