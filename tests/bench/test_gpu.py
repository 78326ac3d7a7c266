"""The plan of bench/gpu.sh, which nobody could run on a GPU: all phases are there, what they call takes its options."""

import importlib
import json
import os
import subprocess

import pytest

from bench import gpu, ladder, loops
from gpt2.config import load_config
from gpt2.errors import UserError
from pruning.criteria import CRITERIA
from tests.bench.test_turns import Here
from tests.pretended_gpu import Gpu


def plan(phase, *options):
    """The commands of a phase, as lists of words, from the script with `echo` in python's place."""
    env = os.environ | {"PYTHON": "echo", "TOKENS": "tokens", "RESULTS": os.devnull, "NANOGPT": "nanoGPT"}
    script = 'mkdir() { :; }; source bench/gpu.sh "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bench/gpu.sh", phase, *options], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


class Asked(Exception):
    """A command has come to its arguments."""


def stop(asked, parser):
    asked.append(parser)
    raise Asked


@pytest.mark.parametrize("options", [[], ["--dry"]])
def test_the_plan_is_whole_and_its_options_exist(options, monkeypatch):
    commands = plan("all", *options)
    modules = [words[1] for words in commands]
    assert set(modules) == {"bench.gpu", "bench.train", "bench.ladder", "bench.prune", "bench.select"}
    assert [words[2] for words in commands if words[1] == "bench.gpu"] == [
        *("train", "train", "numbers"),
        *("train", "train", "cut", "train", "same"),
    ]
    for _, module, *words in commands:
        if words[0] == "train":
            load_config(words[1:], {"criterion": ("none", *CRITERIA)})
            continue
        asked = []
        with monkeypatch.context() as patch, pytest.raises(Asked):
            patch.setattr("argparse.ArgumentParser.parse_args", lambda parser, asked=asked: stop(asked, parser))
            patch.setattr("sys.argv", [module, *words])
            importlib.import_module(module).main()
        asked[0].parse_args(words)


def test_on_a_gpu_every_rung_of_the_ladder_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.turns.Loop", Here)
    monkeypatch.setattr("torch.compile", lambda model, **options: model)  # which would ask for a driver
    monkeypatch.setitem(loops.SIZES, "cuda", dict(block_size=16, n_layer=1, n_head=2, n_embd=32))
    monkeypatch.setattr("sys.argv", "ladder --rounds 1 --batch_size 2 --vocab_size 65 --to".split() + [str(tmp_path)])
    with Gpu():
        ladder.main()
        shown = (tmp_path / "speed.md").read_text()
    (found,) = [json.loads(file.read_text()) for file in (tmp_path / "speed").iterdir()]
    losses = [row["loss"] for row in found["tables"]["65"]["rows"].values()]  # KeyError where one failed
    assert found["machine"] in shown and shown.count("MFU") == len(losses) >= 6 and "kernels" not in shown
    assert max(losses) - min(losses) < 0.01


@pytest.mark.parametrize("words", ["train", "numbers {} a --to {}", "cut {} a", "same {} a a --to {}", "cut {} b"])
def test_what_a_run_has_not_left_is_one_line(words, tmp_path, monkeypatch):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["bench.gpu", *words.replace("{}", str(tmp_path)).split()])
    with pytest.raises(UserError):
        gpu.main()
