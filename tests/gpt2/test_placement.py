"""FSDP2 trains and prunes as one process does; a checkpoint of any world goes on in any other."""

import contextlib
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.numpy import load
from torch.distributed.tensor import DTensor

from gpt2 import checkpoint, parallel
from gpt2.config import Config
from gpt2.errors import UserError
from gpt2.guard import Guard
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import make_optimizer
from gpt2.placement import at_rest, place
from tests.conftest import SMALL, files_of, metrics_of, run
from tests.gpt2.placement_worker import END, HALF, KINDS, SIZES
from tests.zygote import port

OPTIONS = [
    *SMALL,
    "--criterion=bitter7",
    "--prune_begin=2",
    "--prune_end=6",
    "--prune_interval=2",
    "--lr_decay_iters=6",
    "--eval_interval=3",
    "--checkpoint_interval=2",
    "--keep_checkpoints=1",
]
WORLDS = [(kind, size) for kind in KINDS for size in SIZES]


@pytest.fixture(scope="module")
def runs(data_dir, tmp_path_factory):
    """The folder in which placement_worker.py left its runs."""
    folder = tmp_path_factory.mktemp("worlds")
    given = json.dumps(([port() for _ in range(7)], str(folder), str(data_dir), OPTIONS))
    run("tests/gpt2/placement_worker.py", given, ranks=4, env={"WORLDS": str(folder)})
    return folder


def check_same(run, reference):
    """The losses and the sparsity of two runs agree, and the pruned sets at their end are the same."""
    lines, expected = metrics_of(run), metrics_of(reference)
    assert [line["step"] for line in lines] == list(range(1, END + 1))
    for mine, theirs in zip(lines, expected, strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
        assert mine.get("val_loss", 0) == pytest.approx(theirs.get("val_loss", 0), rel=1e-4)
        assert mine["sparsity"] == theirs["sparsity"]
    (weights, _), (others, _) = (map(load, files_of(out_dir, END)) for out_dir in (run, reference))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            assert ((weight == 0) == (others[name] == 0)).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_over_three_ranks_that_divide_nothing_and_with_the_loss_by_blocks_it_trains_as_one_process(kind, runs):
    check_same(runs / f"blocks-{kind}-3", runs / "whole")


def test_blocks_computed_again_change_nothing(runs):
    check_same(runs / "recomputed", runs / "whole")


@pytest.mark.parametrize("kind, size", WORLDS)
def test_before_the_stop_every_world_has_the_losses_of_one_process(kind, size, runs):
    lines = metrics_of(runs / f"{kind}-{size}")
    assert [line["train_loss"] for line in lines] == pytest.approx(
        [line["train_loss"] for line in metrics_of(runs / "whole")[:HALF]], rel=1e-4
    )


@pytest.mark.parametrize("kind, size", WORLDS)
def test_a_checkpoint_goes_on_in_every_world(kind, size, runs):
    for other, ranks in WORLDS:
        check_same(runs / f"{kind}-{size}-to-{other}-{ranks}", runs / "whole")
    same = runs / f"{kind}-{size}-to-{kind}-{size}"
    one = runs / f"{kind}-{size}-to-ddp-1"
    assert set(load(files_of(same, END)[1])) == set(load(files_of(one, END)[1])), "all states are in every checkpoint"


def test_one_process_goes_on_to_the_same_bits(runs):
    for kind in ("ddp", "fsdp"):
        resumed, whole = (files_of(runs / name, END) for name in (f"{kind}-1-to-{kind}-1", "whole"))
        for mine, theirs in zip(map(load, resumed), map(load, whole)):
            assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_loss_on_one_rank_is_seen_by_all_before_the_update(kind, runs):
    lines = metrics_of(runs / f"{kind}-one-loss-infinite")
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 0, 1, 1, 1, 1]
    assert "train_loss" not in lines[2] and all("train_loss" in line for line in lines[3:])
    assert [line["sparsity"] for line in lines] == [line["sparsity"] for line in metrics_of(runs / "whole")]
    weights, states = (load(data) for data in files_of(runs / f"{kind}-one-loss-infinite", END))
    assert all(np.isfinite(tensor).all() for tensor in (*weights.values(), *states.values()))
    assert states["transformer.wte.weight.step"] == END - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_does_not_compute_the_same_twice_is_named_on_all(kind, runs):
    for rank in range(2):
        message = (runs / f"{kind}-not-the-same-twice-{rank}.txt").read_text()
        assert message.startswith("step 2: rank 1 computed a micro-batch twice") and "up to there" in message


def test_a_replica_whose_weight_lost_a_bit_is_named(runs):
    for rank in range(4):
        message = (runs / f"ddp-flipped-bit-{rank}.txt").read_text()
        assert message.startswith("step 2: rank 2 differs from other replicas in transformer."), message


SIZES_OF_MODEL = dict(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def alone():
    """A process group of this process, for FSDP2 without torchrun."""
    yield parallel.start("cpu", alone=True)
    torch.distributed.destroy_process_group()


def placed(world, **options):
    """(model, optimizer) of a small run, the model sharded."""
    config = dataclasses.replace(Config(), parallel="fsdp", **SIZES_OF_MODEL, **options)
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES_OF_MODEL))
    place(model, config, world, torch.float32, False)
    return model, make_optimizer(model, config)


def gradients(model):
    tokens = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()


def test_left_in_the_middle_of_a_block_it_has_its_shards_alone_again(alone):
    model, optimizer = placed(alone)
    gradients(model)
    optimizer.step()
    before = {name: parameter.full_tensor().clone() for name, parameter in model.tensors().items()}

    def leave(module, arguments):
        raise KeyboardInterrupt

    handle = model.transformer.h[1].mlp.register_forward_pre_hook(leave)
    with contextlib.suppress(KeyboardInterrupt):
        gradients(model)
    handle.remove()
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    at_rest(model)
    for name, parameter in model.tensors().items():
        assert isinstance(parameter, DTensor) and torch.equal(parameter.full_tensor(), before[name])
    states = checkpoint.optimizer_tensors(optimizer, model.tensors())
    assert len(states) == 3 * len(before), "every parameter is the optimizer's"


@pytest.mark.parametrize("name", ["adamw", "adamwspam", "sgd"])
def test_a_wrong_step_leaves_nothing_in_shards(alone, name):
    model, optimizer = placed(alone, optimizer=name)
    guard = Guard(optimizer, 0.0, 10, alone.device)
    for wrong in (True, False, True):
        before = {key: t.full_tensor().clone() for key, t in model.tensors().items()}
        gradients(model)
        guard.step(torch.tensor(torch.nan if wrong else 1.0))
        same = [torch.equal(t.full_tensor(), before[key]) for key, t in model.tensors().items()]
        assert all(same) if wrong else not any(same)
    assert guard.skipped == 2


@pytest.mark.parametrize("lost", ["transformer.ln_f.weight.exp_avg", "transformer.wte.weight.step", "all"])
def test_an_optimizer_does_not_start_anew_in_silence(alone, lost):
    model, optimizer = placed(alone)
    gradients(model)
    optimizer.step()
    states = checkpoint.optimizer_tensors(optimizer, model.tensors())
    states = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in states.items()}
    fresh, its_optimizer = placed(alone, seed=2)
    checkpoint.load_optimizer(its_optimizer, fresh.tensors(), states)
    for key, tensor in checkpoint.optimizer_tensors(its_optimizer, fresh.tensors()).items():
        assert torch.equal(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor, states[key])
    states = {} if lost == "all" else {key: tensor for key, tensor in states.items() if key != lost}
    with pytest.raises(UserError, match="lacks states of the optimizer"):
        checkpoint.load_optimizer(its_optimizer, fresh.tensors(), states)


def test_the_first_weights_do_not_depend_on_how_the_model_is_spread(alone):
    model, _ = placed(alone, seed=5)
    with torch.device("meta"):
        plain = GPT(GPTConfig(**SIZES_OF_MODEL))
    place(plain, dataclasses.replace(Config(), seed=5), alone, torch.float32, False)
    for name, parameter in plain.tensors().items():
        assert torch.equal(parameter, model.tensors()[name].full_tensor())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    assert 0.018 < plain.transformer.wte.weight.std() < 0.022 and plain.transformer.ln_f.weight.eq(1).all()
