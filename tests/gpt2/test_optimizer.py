"""Each optimizer in the loop: goes on exactly from a checkpoint, keeps its groups' share of the rate, never waits."""

import shutil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_gpt2
from gpt2.config import Config, load_config
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from gpt2.optimizer import learning_rate, make_optimizer, make_spam, set_learning_rate
from pruning.optim import OPTIMIZERS
from tests.conftest import PRUNED, SMALL, files_of, metrics_of

TINY = GPTConfig(block_size=8, vocab_size=20, n_layer=1, n_head=2, n_embd=16)


def train(data_dir, out_dir, *arguments):
    arguments = [f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, *arguments]
    train_gpt2.train(load_config(arguments, {}))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_goes_on_exactly_from_a_checkpoint(optimizer, data_dir, tmp_path):
    options = [f"--optimizer={optimizer}", "--gradient_accumulation_steps=1", "--max_iters=24", *PRUNED]
    options += [
        "--prune_end=20",
        "--spam_interval=8",
        "--spam_warmup_steps=5",
        "--spam_theta=4",
        "--density_lr=3",
        "--lr_schedule=linear",
        "--lr_decay_begin=16",
        "--checkpoint_interval=12",
    ]
    train(data_dir, tmp_path / "whole", *options)
    part = tmp_path / "part"
    shutil.copytree(tmp_path / "whole", part)
    shutil.rmtree(part / "checkpoints" / "step-00000024")
    train(data_dir, part, *options)
    assert files_of(part, 24) == files_of(tmp_path / "whole", 24)
    losses = {line["step"]: line["train_loss"] for line in metrics_of(tmp_path / "whole")}
    assert len(losses) == 24 and losses[24] < losses[1]


def test_an_unknown_optimizer_names_the_nearest():
    with pytest.raises(UserError, match="optimizer=adamspam.*did you mean adamwspam"):
        load_config(["--optimizer=adamspam"], {"optimizer": OPTIMIZERS})


def test_groups_decay_matrices_alone_and_share_the_rate():
    config = Config(warmup_iters=4, lr_decay_iters=10, min_lr=1e-5, max_iters=10)
    optimizer = make_optimizer(GPT(TINY), config)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [config.weight_decay, 0.0]
    assert {p.dim() for p in optimizer.param_groups[1]["params"]} == {1}
    for step in (1, 4, 7, 10):
        set_learning_rate(optimizer, step, config)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [learning_rate(step, config)] * 2


def test_the_rate_is_held_and_then_falls_along_its_line():
    held = dict(warmup_iters=4, lr_decay_begin=60, lr_decay_iters=100, learning_rate=1.0, min_lr=0.2)
    line, cosine = Config(**held, lr_schedule="linear"), Config(**held)
    for config in (line, cosine):
        assert [learning_rate(step, config) for step in (2, 5, 60, 100, 120)] == [0.4, 1.0, 1.0, 0.2, 0.2]
    assert learning_rate(70, line) == pytest.approx(0.8)
    assert learning_rate(70, cosine) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert learning_rate(80, line) == pytest.approx(learning_rate(80, cosine)) == pytest.approx(0.6)


def test_a_rate_that_is_held_beyond_its_end_is_refused():
    with pytest.raises(UserError, match="lr_decay_begin=30: expected at most lr_decay_iters=20"):
        load_config(["--max_iters=20", "--warmup_iters=2", "--lr_decay_begin=30"], {"optimizer": OPTIMIZERS})
    with pytest.raises(UserError, match="lr_schedule=wsd: expected one of cosine, linear"):
        load_config(["--lr_schedule=wsd"], {"optimizer": OPTIMIZERS})


class NoWaiting(TorchDispatchMode):
    """Fails at every operation that would wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"), name
        return function(*arguments, **(options or {}))


def test_spam_never_waits_for_the_device():
    config = Config(optimizer="adamwspam", spam_interval=3, spam_warmup_steps=2, block_size=8, vocab_size=20)
    model = GPT(TINY)
    optimizer = make_optimizer(model, config)
    spam = make_spam(optimizer, config)
    for _ in range(8):
        model(*torch.randint(0, 20, (2, 2, 8)))[1].backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with NoWaiting():
            spam.before_step(norm)
        optimizer.step()
    assert spam.resets == 2 and int(spam.seen) == 8
    assert make_spam(optimizer, Config()) is None


@pytest.mark.parametrize(
    "options, said",
    [(["--max_iters=70"], "10% of 0.001"), (["--max_iters=701"], ""), (["--max_iters=70", "--decay_lr=False"], "")],
)
def test_a_warm_up_that_outlasts_the_run_is_said(options, said, capfd):
    load_config(["--learning_rate=1e-3", *options], {})
    assert capfd.readouterr().err == (
        f"warning: warmup_iters=700 are not over after max_iters=70: the learning rate gets to {said}\n" if said else ""
    )
