"""Whatever stands on the command line or in a config file: a Config that can be, or lines that say what is wrong."""

import dataclasses
import math
import os
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2.config import FIELDS, Config, load_config
from gpt2.errors import UserError
from pruning.allocation import ALLOCATIONS
from pruning.criteria import CRITERIA
from pruning.optim import OPTIMIZERS
from pruning.schedule import SCHEDULES
from tests.conftest import SMALL

NAMES = {
    "optimizer": ("adamw",),
    "criterion": ("none", "magnitude"),
    "schedule": ("gmp", "cubic"),
    "allocation": ("global",),
}
KEYS = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)
TEXTS = (
    st.text(max_size=20)
    | st.integers(-(2**70), 2**70).map(str)
    | st.floats().map(str)
    | st.sampled_from(
        ["", "True", "none", "1e400", "-0", "nan", "0x10", "1_000", "٣", "\x00", "gmp", "auto", "raw", "[", "=="]
    )
)
VALUES = TEXTS | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2)


EXAMPLES = int(os.environ.get("EXAMPLES", 300))  # more of them, by hand

# Of a small run: what people try, what is at an edge, and what is beyond it.
TRIED = {
    "n_layer": [1, 3],
    "n_head": [1, 4, 5],
    "n_embd": [8, 31, 2**40],
    "block_size": [1, 7, 1500, 5000, 2**40],
    "vocab_size": [99, 101, 70000, 2**40],
    "dropout": [0.1, 0.99],
    "bias": [False],
    "batch_size": [1, 3, 2**40],
    "gradient_accumulation_steps": [1, 3],
    "optimizer": [*OPTIMIZERS],
    "spam_theta": [0, 1e-9],
    "spam_interval": [0, 1, 2],
    "spam_warmup_steps": [1, 5],
    "learning_rate": [1e-9, 1e30, 1e-300],
    "min_lr": [0, 1e-3],
    "warmup_iters": [0, 1, 100],
    "lr_decay_iters": [0, 1, 100],
    "decay_lr": [False],
    "max_iters": [1, 2, 5],
    "weight_decay": [0, 1e30],
    "beta1": [0, 0.999999],
    "beta2": [0, 0.999999],
    "grad_clip": [0, 1e-30, 1e30],
    "skip_outliers": [1e-9, 6],
    "max_bad_steps": [1, 2],
    "criterion": ["none", *CRITERIA],
    "target_sparsity": [0, 1e-9, 0.75, 0.999999],
    "schedule": [*SCHEDULES],
    "allocation": [*ALLOCATIONS],
    "pattern": ["2:4", "1:2", "3:4", "31:32", "²:4"],
    "prune_begin": [0, 1, 3, 4],
    "prune_end": [1, 3, 4],
    "prune_interval": [1, 100],
    "keep_zeros": [False],
    "eval_interval": [1, 100],
    "eval_iters": [1, 500],
    "log_interval": [2, 100],
    "checkpoint_interval": [1, 100],
    "keep_checkpoints": [1, 100],
    "checkpoint_minutes": [0, 1e-9],
    "max_hours": [1e-9, 1e30],
    "dist_timeout_s": [1e-9, 1e30],
    "deterministic": [True],
    "check_interval": [0, 1, 2],
    "seed": [0, 2**63 - 1],
    "device": ["auto", "cpu:0", "cuda", "cpu:1", "xpu"],
    "dtype": ["auto"],
    "parallel": ["fsdp"],
    "activation_checkpointing": [True],
    "init_from": ["scratch", "resume", "nowhere"],
    "data_format": ["raw"],
}
PAIRS = st.sampled_from(sorted(TRIED)).flatmap(lambda key: st.tuples(st.just(key), st.sampled_from(TRIED[key])))


def loads(arguments):
    """The Config of these arguments, or the lines with which they are refused."""
    try:
        config = load_config(arguments, NAMES)
    except UserError as error:
        assert str(error).strip() and len(str(error)) < 20_000
        return None
    assert isinstance(config, Config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert not isinstance(value, float) or math.isfinite(value)
    return config


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(st.lists(st.tuples(KEYS, TEXTS).map(lambda pair: f"--{pair[0]}={pair[1]}") | st.text(max_size=10), max_size=5))
def test_300_command_lines(arguments):
    loads(arguments)


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), VALUES, max_size=4))
def test_300_config_files(tmp_path, values):
    path = tmp_path / "config.py"
    path.write_text(
        "".join(f"{key} = {value!r}\n" for key, value in values.items()), encoding="utf-8", errors="replace"
    )
    loads([str(path)])


@settings(max_examples=EXAMPLES // 20, deadline=None, derandomize=True, suppress_health_check=[*HealthCheck])
@given(st.lists(PAIRS, min_size=1, max_size=6), st.sampled_from([1, 1, 1, 2]))
def test_real_starts(zygote, data_dir, pairs, ranks):
    given_options = [f"--{key}={value}" for key, value in pairs]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"--data_dir={data_dir}",
            f"--out_dir={folder}/run",
            "--max_iters=4",
            "--gradient_accumulation_steps=2",
        ]
        done = zygote.run(*SMALL, *fixed, *given_options, ranks=ranks)
    assert "Traceback" not in done.output and set(done.codes) in ({0}, {2}), (given_options, ranks, done)
    assert set(done.codes) == {0} or "error:" in done.output


def test_a_device_that_cannot_be_is_among_the_problems_named_at_once():
    with pytest.raises(UserError) as refused:
        load_config(["--device=cuba", "--n_layer=0"], NAMES)
    expected = (
        "n_layer=0: expected n_layer >= 1",
        "device=cuba: expected one of auto, cpu, cuda, mps (did you mean cuda?)",
    )
    assert str(refused.value).splitlines() == list(expected)


@pytest.mark.parametrize("given, wrong", [("--prune_begin=100", False), ("--prune_end=5", True)])
def test_a_slip_elsewhere_neither_hides_nor_invents_what_is_wrong_with_the_ramp(given, wrong):
    with pytest.raises(UserError) as refused:
        load_config(["--criterion=magnitude", given, "--lr=1e-3"], NAMES)
    slip, *others = str(refused.value).splitlines()
    assert "unknown option 'lr'" in slip and [line.startswith("prune_begin=") for line in others] == [True] * wrong


def test_a_rate_that_cannot_be_hides_no_other_problem():
    with pytest.raises(UserError) as refused:
        load_config(["--beta1=1", "--min_lr=5"], NAMES)
    assert [line.partition("=")[0] for line in str(refused.value).splitlines()] == ["beta1", "min_lr"]


def test_an_out_dir_that_is_no_utf8_is_refused_before_the_run():
    with pytest.raises(UserError, match=r"out_dir='r.udce9s': expected a name in UTF-8, as in --out_dir=out"):
        load_config(["--out_dir=r\udce9s"], NAMES)
