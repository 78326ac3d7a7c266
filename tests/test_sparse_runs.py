"""What starts from a sparse checkpoint stays sparse; what is said of sparsity is counted, and of what it is a share."""

import json
import re

import pytest
from safetensors.torch import load_file

import train_gpt2
from gpt2 import checkpoint
from gpt2.config import load_config
from gpt2.errors import UserError
from tests.conftest import SMALL

NAMES = {"criterion": ("none", "magnitude", "bitter7", "movement")}
PRUNED_BY_8 = ["--criterion=bitter7", "--prune_begin=2", "--prune_end=6", "--prune_interval=2", "--target_sparsity=0.8"]


def train(data_dir, out_dir, *options):
    train_gpt2.train(
        load_config([*SMALL, "--max_iters=8", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *options], NAMES)
    )


def weights(out_dir):
    path, _ = checkpoint.at(str(out_dir))
    return load_file(path / "model.safetensors")


def zeros(out_dir):
    """name -> booleans of the prunable weights."""
    return {name: w == 0 for name, w in weights(out_dir).items() if w.dim() == 2 and ".h." in name}


def kept(before, after):
    return all(after[name][zero].all() for name, zero in before.items())


def share(zeros):
    return sum(z.sum().item() for z in zeros.values()) / sum(z.numel() for z in zeros.values())


def metrics(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sparse_run(data_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("sparse") / "run"
    train(data_dir, out_dir, *PRUNED_BY_8)
    return out_dir


@pytest.fixture
def own_copy(sparse_run, tmp_path):
    import shutil

    return shutil.copytree(sparse_run, tmp_path / "run")


def test_the_run_says_what_share_of_what(data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / "run", *PRUNED_BY_8)
    printed = capsys.readouterr()
    said = printed.out + printed.err
    total = sum(w.numel() for w in weights(tmp_path / "run").values())
    prunable = sum(z.numel() for z in zeros(tmp_path / "run").values())
    assert f"{prunable:,} of {total:,} parameters" in said and "from step 2 to 6" in said
    assert "left out: embeddings and the head tied to them" in said
    assert f"at 80.00% sparsity ({round(0.8 * prunable) / total:.2%} of all parameters)" in said
    for line in metrics(tmp_path / "run"):
        assert ("layer_sparsity" in line) == ("val_loss" in line)
    layers = metrics(tmp_path / "run")[-1]["layer_sparsity"]
    assert layers == {name: pytest.approx(zero.float().mean().item()) for name, zero in zeros(tmp_path / "run").items()}


@pytest.mark.parametrize(
    "options", [(), ("--criterion=magnitude", "--target_sparsity=0.9", "--prune_begin=6", "--prune_end=8")]
)
def test_another_run_from_sparse_weights_keeps_their_zeros(options, sparse_run, data_dir, tmp_path, capsys):
    train(data_dir, tmp_path / "run", f"--init_from={sparse_run}", *options)
    before, after = zeros(sparse_run), zeros(tmp_path / "run")
    assert kept(before, after) and share(after) == pytest.approx(0.9 if options else 0.8, abs=1e-4)
    assert metrics(tmp_path / "run")[-1]["sparsity"] == pytest.approx(share(after))
    captured = capsys.readouterr()
    assert "are zero already and stay so" in captured.out + captured.err


def test_keep_zeros_false_lets_them_train(sparse_run, data_dir, tmp_path):
    train(data_dir, tmp_path / "run", f"--init_from={sparse_run}", "--keep_zeros=False")
    assert share(zeros(tmp_path / "run")) < 0.1


def test_continuing_without_the_criterion_keeps_the_zeros_and_with_it_goes_on(own_copy, data_dir):
    before = zeros(own_copy)
    train(data_dir, own_copy, "--init_from=resume", "--max_iters=12")
    assert kept(before, zeros(own_copy)) and share(zeros(own_copy)) == pytest.approx(0.8, abs=1e-4)
    train(data_dir, own_copy, "--init_from=resume", "--max_iters=14")
    assert kept(before, zeros(own_copy))
    more = ["--criterion=bitter7", "--target_sparsity=0.9", "--prune_begin=15", "--prune_end=17"]
    train(data_dir, own_copy, "--init_from=resume", "--max_iters=18", *more)
    assert kept(before, zeros(own_copy)) and share(zeros(own_copy)) == pytest.approx(0.9, abs=1e-4)


def test_continuing_may_raise_the_target(own_copy, data_dir):
    before = zeros(own_copy)
    more = ["--target_sparsity=0.9", "--prune_begin=10", "--prune_end=14", "--max_iters=16"]
    train(data_dir, own_copy, "--init_from=resume", "--criterion=bitter7", *more)
    assert kept(before, zeros(own_copy)) and share(zeros(own_copy)) == pytest.approx(0.9, abs=1e-4)
    assert metrics(own_copy)[-1]["sparsity"] == pytest.approx(share(zeros(own_copy)))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--target_sparsity=0.5"], "target_sparsity=0.5 is below the 80.00%"),
        (
            ["--target_sparsity=0.9", "--prune_begin=2", "--prune_end=6"],
            "step 8 is done and no update comes after end=6",
        ),
        (
            ["--criterion=movement", "--target_sparsity=0.8"],
            "criterion=bitter7, this Pruner has criterion=movement; --init_from",
        ),
    ],
)
def test_continuing_refuses_in_one_line_what_cannot_be(options, words, own_copy, data_dir):
    with pytest.raises(UserError, match=words) as refused:
        train(data_dir, own_copy, "--init_from=resume", "--max_iters=12", "--criterion=bitter7", *options)
    assert "\n" not in str(refused.value)


def test_a_target_below_the_zeros_there_are_is_refused(sparse_run, data_dir, tmp_path):
    with pytest.raises(UserError, match=r"target_sparsity=0.5 is below the 80.00%"):
        train(data_dir, tmp_path / "run", f"--init_from={sparse_run}", *PRUNED_BY_8, "--target_sparsity=0.5")


def test_zeros_that_a_pattern_rules_out_are_refused(sparse_run, own_copy, data_dir, tmp_path):
    patterned = ["--criterion=magnitude", "--pattern=7:8", "--target_sparsity=0.85"]
    for out_dir, *start in ((tmp_path / "other", f"--init_from={sparse_run}"), (own_copy, "--init_from=resume")):
        with pytest.raises(UserError, match="more than 7 of 8 weights are zero already") as line:
            train(data_dir, out_dir, *start, *patterned, "--max_iters=12", "--prune_end=10")
        assert "\n" not in str(line.value)


def test_a_dense_run_that_is_continued_may_begin_to_prune(data_dir, tmp_path):
    train(data_dir, tmp_path / "run")
    train(data_dir, tmp_path / "run", "--init_from=resume", "--max_iters=16", *PRUNED_BY_8, "--prune_end=14")
    assert share(zeros(tmp_path / "run")) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize(
    "files, typed, refused",
    [
        ("", ["--target_sparsity=0.8"], "target_sparsity=0.8"),
        ("", ["--prune_end=50", "--allocation=erk"], "allocation=erk, prune_end=50"),
        ("schedule = 'linear'", [], "schedule=linear"),
        ("target_sparsity = 0.8", ["--criterion=none"], "target_sparsity=0.8"),
        ("criterion = 'bitter7'\nprune_end = 70", ["--criterion=none", "--prune_begin=3"], "prune_begin=3"),
        ("criterion = 'bitter7'\nprune_end = 70", ["--criterion=none"], None),
        ("target_sparsity = 0.5\nprune_interval = 20\nprune_end = -1", ["--schedule=gmp"], None),
        ("criterion = 'bitter7'", ["--target_sparsity=0.8"], None),
    ],
)
def test_options_of_pruning_without_a_criterion_are_refused(files, typed, refused, tmp_path):
    (tmp_path / "recipe.py").write_text(files)
    arguments = [str(tmp_path / "recipe.py"), "--max_iters=100", *typed]
    if refused is None:
        load_config(arguments, {})
    else:
        with pytest.raises(UserError, match=f"^{re.escape(refused)}: without a criterion nothing is pruned"):
            load_config(arguments, {})


@pytest.mark.parametrize(
    "again",
    [
        ("--init_from=resume",),
        ("--init_from={}", "--out_dir={}2"),
        ("--init_from={}", "--out_dir={}2", "--criterion=magnitude", "--target_sparsity=0.995"),
    ],
)
def test_layers_that_were_pruned_away_stay_so(again, data_dir, tmp_path):
    run = tmp_path / "run"
    options = ["--criterion=magnitude", "--prune_interval=1", "--target_sparsity=0.99", "--n_embd=8", "--n_head=1"]
    train(data_dir, run, *options)
    before = zeros(run)
    with_weights = load_file(checkpoint.at(str(run))[0] / "model.safetensors")
    assert any(zero.all() for zero in before.values()), "else the test shows nothing"
    more = [option.format(run) for option in again]
    train(data_dir, run, "--n_embd=8", "--n_head=1", "--max_iters=12", *more)
    after = run if again[0] == "--init_from=resume" else tmp_path / "run2"
    assert kept(before, zeros(after)) and with_weights.keys() == weights(after).keys()


def test_what_begins_from_sparse_weights_may_learn_faster_without_a_criterion(sparse_run, data_dir, tmp_path):
    before = zeros(sparse_run)
    with pytest.raises(UserError, match="density_lr=4.0: without a criterion nothing is pruned"):
        train(data_dir, tmp_path / "dense", "--density_lr=4")
    for name, options in (("usual", []), ("faster", ["--density_lr=4"])):
        train(data_dir, tmp_path / name, f"--init_from={sparse_run}", "--max_iters=2", *options)
        assert kept(before, zeros(tmp_path / name))
    usual, faster = weights(tmp_path / "usual"), weights(tmp_path / "faster")
    assert any(not usual[name].equal(faster[name]) for name in usual)


def test_a_run_that_is_pruned_away_goes_on_so_without_its_criterion(data_dir, tmp_path):
    small = ["--n_embd=8", "--n_head=1"]
    train(data_dir, tmp_path / "run", "--criterion=magnitude", "--prune_interval=1", "--target_sparsity=0.9999", *small)
    assert share(zeros(tmp_path / "run")) == 1
    train(data_dir, tmp_path / "run", "--init_from=resume", "--max_iters=12", *small)
    assert share(zeros(tmp_path / "run")) == metrics(tmp_path / "run")[-1]["sparsity"] == 1
