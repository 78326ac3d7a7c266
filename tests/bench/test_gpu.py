"""The plan of bench/gpu.sh, which nobody could run on a GPU: all phases are there, what they call takes its options."""

import importlib
import os
import subprocess

import pytest

from bench import gpu
from gpt2.config import load_config
from gpt2.errors import UserError
from pruning.criteria import CRITERIA


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


@pytest.mark.parametrize("words", ["train", "numbers {} a --to {}", "cut {} a", "same {} a a --to {}", "cut {} b"])
def test_what_a_run_has_not_left_is_one_line(words, tmp_path, monkeypatch):
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["bench.gpu", *words.replace("{}", str(tmp_path)).split()])
    with pytest.raises(UserError):
        gpu.main()
