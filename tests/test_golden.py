"""The losses of a 20-step run, written down: a change of numbers is seen, whatever caused it.

After a change that is meant to move them: UPDATE_GOLDEN=1 pytest tests/test_golden.py, and say so in CHANGELOG.md.
"""

import json
import os
from pathlib import Path

import pytest

import train_gpt2
from gpt2.config import load_config
from gpt2.files import write_json
from tests.conftest import PRUNED, SMALL, metrics_of

GOLDEN = Path(__file__).with_name("golden_losses.json")
TOLERANCE = 2e-4  # relative: machines differ by their order of summation, about 1e-6 a step


def losses(data_dir, out_dir, *options):
    arguments = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, *PRUNED, "--gradient_accumulation_steps=4"]
    train_gpt2.train(load_config([*arguments, "--max_iters=20", "--prune_end=15", "--dropout=0.1", *options], {}))
    lines = metrics_of(out_dir)
    return {name: [line[name] for line in lines if name in line] for name in ("train_loss", "val_loss", "sparsity")}


@pytest.mark.parametrize("name, options", [("adamw", []), ("sgd", ["--optimizer=sgd", "--criterion=magnitude"])])
def test_losses_are_those_written_down(data_dir, tmp_path, name, options):
    found = losses(data_dir, tmp_path / "run", *options)
    if os.environ.get("UPDATE_GOLDEN"):
        written = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        write_json(GOLDEN, written | {name: found})
    golden = json.loads(GOLDEN.read_text())[name]
    for curve in golden:
        assert found[curve] == pytest.approx(golden[curve], rel=TOLERANCE), curve


def test_a_learning_rate_one_percent_higher_would_be_seen(data_dir, tmp_path):
    found, golden = (
        losses(data_dir, tmp_path / "run", "--learning_rate=1.01e-2"),
        json.loads(GOLDEN.read_text())["adamw"],
    )
    assert found["train_loss"] != pytest.approx(golden["train_loss"], rel=TOLERANCE)
