"""Under torchrun a refusal, whichever rank meets it, reaches every rank before one of them leaves."""

import json
import shutil

import pytest

from tests.conftest import SMALL, run, run_anew, write_shard


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("finished") / "run"
    run("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, "--max_iters=2")
    return out_dir


def cases(data_dir, finished, folder):
    """name -> (arguments, those of rank 1 where they are others, words of the refusal)."""
    other = folder / "other"
    shutil.copytree(data_dir, other)
    write_shard(other / "toy_train_000009.bin", [1, 2, 3] * 100)
    (folder / "damaged").mkdir()
    (folder / "damaged" / "manifest.json").write_text("{")
    on = f"--data_dir={data_dir}"
    new = f"--out_dir={folder / 'new'}"
    old = f"--out_dir={finished}"
    return {
        "scratch": ([on, old, "--init_from=scratch"], None, "holds a run already"),
        "architecture": ([on, old, "--n_layer=3"], None, "n_layer is 2 there, 3 here"),
        "settings": ([on, old, "--weight_decay=0.2"], None, "weight_decay is 0.1 there"),
        "finished": ([on, old, "--init_from=resume", "--weight_decay=0.2"], None, "is finished (2 of 2 steps), and"),
        "nothing to resume": ([on, new, "--init_from=resume"], None, "holds no run"),
        "other data": ([f"--data_dir={other}", old, "--max_iters=3", "--init_from=resume"], None, "toy_train_000009"),
        "no data": ([f"--data_dir={folder / 'nowhere'}", new], None, "no such folder"),
        "no data on one machine": ([on, new], [f"--data_dir={folder / 'nowhere'}", new], "nowhere: no such folder"),
        "vocabulary": ([on, new, "--vocab_size=7"], None, "vocab_size=7"),
        "weights": ([on, new, f"--init_from={folder / 'damaged'}"], None, "damaged"),
    }


def test_every_refusal_reaches_every_rank(data_dir, finished, tmp_path):
    expected = cases(data_dir, finished, tmp_path)
    small = [*SMALL, "--max_iters=2"]
    listed = [[name, small + arguments, other and small + other] for name, (arguments, other, _) in expected.items()]
    (tmp_path / "cases.json").write_text(json.dumps(listed))
    run("tests/gpt2/refusals_worker.py", tmp_path, ranks=2)
    of_rank = [json.loads((tmp_path / f"refusals-{rank}.json").read_text()) for rank in range(2)]
    for name, (_, _, words) in expected.items():
        assert of_rank[0][name] == of_rank[1][name] and of_rank[0][name], name
        shared, message = of_rank[0][name]
        assert shared and words in message and "\n" not in message, (name, message)
    assert not (tmp_path / "new").exists()


def test_under_torchrun_a_refusal_is_one_line_once(data_dir, finished):
    done = run_anew(
        "train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={finished}", *SMALL, "--n_layer=3", ranks=2, check=False
    )
    lines = [line for line in done.stderr.splitlines() if "train_gpt2.py: error:" in line]
    assert len(lines) == 1 and "n_layer is 2 there" in lines[0]
    assert "exitcode  : 2" in done.stderr and "gloo" not in done.stderr
    assert done.stderr.count("Traceback") <= 1  # the launcher's own
