"""What a run promises: the same result whatever the ranks, restarts and evaluations; and errors of one line."""

import json
import random
import re
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load

import train_gpt2
from gpt2 import initial
from gpt2.config import differences, load_config
from gpt2.errors import UserError
from tests.conftest import PRUNED, ROOT, SMALL, files_of, metrics_of, refused, run, run_anew, shared_data, write_shard


def train(data_dir, out_dir, *arguments, **options):
    return run("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, *arguments, **options)


@pytest.fixture(scope="module")
def undisturbed(data_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("run") / "undisturbed"
    run_anew("train_gpt2.py", f"--data_dir={data_dir}", f"--out_dir={out_dir}", *SMALL, *PRUNED)
    return out_dir


def zeros(out_dir, step=30):
    """(zero weights, weights) of all prunable tensors in the checkpoint."""
    tensors = load(files_of(out_dir, step)[0])
    prunable = [t for name, t in tensors.items() if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name)]
    return sum(int((t == 0).sum()) for t in prunable), sum(t.size for t in prunable)


def test_a_run_leaves_what_it_promises(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints", "training.png"}
    steps = [p.name for p in sorted((undisturbed / "checkpoints").iterdir())]
    assert steps == ["step-00000020", "step-00000030"]
    manifest = json.loads((undisturbed / "checkpoints" / "step-00000030" / "manifest.json").read_text())
    assert manifest["step"] == 30 and set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
    lines = metrics_of(undisturbed)
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert {
        "train_loss",
        "learning_rate",
        "grad_norm",
        "sparsity",
        "tokens",
        "tokens_per_second",
        "step_ms",
        "prune_ms",
    } <= set(lines[0])
    assert [line["step"] for line in lines if "val_loss" in line] == [10, 20, 30]
    assert lines[-1]["tokens"] == 30 * 2 * 12 * 16
    assert lines[-1]["train_loss"] < 0.8 * lines[0]["train_loss"]
    names = set(load(files_of(undisturbed, 30)[0]))
    assert (
        "transformer.wte.weight" in names
        and "lm_head.weight" not in names
        and not any("_orig_mod" in n or "module." in n for n in names)
    )


def test_sparsity_is_exact_and_pruned_states_are_zero(undisturbed):
    pruned, prunable = zeros(undisturbed)
    assert pruned == round(0.5 * prunable)
    assert metrics_of(undisturbed)[-1]["sparsity"] == pruned / prunable
    model, states = (load(data) for data in files_of(undisturbed, 30))
    for name, weight in model.items():
        if re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            assert (
                not states[f"{name}.exp_avg"][weight == 0].any() and not states[f"{name}.exp_avg_sq"][weight == 0].any()
            )


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(ranks, undisturbed, data_dir, tmp_path):
    train(data_dir, tmp_path / "run", *PRUNED, ranks=ranks)
    for one, many in zip(metrics_of(undisturbed), metrics_of(tmp_path / "run"), strict=True):
        assert many["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
        assert many["sparsity"] == one["sparsity"]
        if "val_loss" in one:
            assert many["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert zeros(tmp_path / "run") == zeros(undisturbed)


def test_evaluation_changes_nothing(undisturbed, data_dir, tmp_path):
    train(data_dir, tmp_path / "run", *PRUNED, "--eval_interval=1000")
    assert files_of(tmp_path / "run", 30) == files_of(undisturbed, 30)


def test_a_dense_run_is_one_without_the_pruner(data_dir, tmp_path):
    train(data_dir, tmp_path / "dense")
    source = (ROOT / "train_gpt2.py").read_text()
    without = source.replace("pruner = make_pruner(model, optimizer, config)", "pruner = None")
    without = without.replace("from pruning import NotFiniteError\n", "NotFiniteError = FloatingPointError\n")
    assert "pruner = None" in without and "Pruner(" not in without
    (tmp_path / "without.py").write_text(without)
    run(str(tmp_path / "without.py"), f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'without'}", *SMALL)
    assert files_of(tmp_path / "dense", 30) == files_of(tmp_path / "without", 30)


def test_compiled_and_eager_agree(data_dir, tmp_path):
    losses = []
    for compile in (True, False):
        train(
            data_dir,
            tmp_path / str(compile),
            *PRUNED,
            f"--compile={compile}",
            "--max_iters=20",
            "--prune_end=15",
            "--gradient_accumulation_steps=2",
        )
        losses.append([line["train_loss"] for line in metrics_of(tmp_path / str(compile))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_dropout_is_a_function_of_seed_step_and_micro_batch(data_dir, tmp_path):
    train(data_dir, tmp_path / "one", "--dropout=0.2", "--max_iters=8")
    train(data_dir, tmp_path / "two", "--dropout=0.2", "--max_iters=8", ranks=2)
    one, two = ([line["train_loss"] for line in metrics_of(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


def test_killed_at_any_moment_and_resumed_it_ends_bitwise_the_same(zygote, data_dir, tmp_path):
    """20 runs killed with SIGKILL after a random time, a checkpoint at every step so that many die while writing
    one."""
    generator, often = random.Random(0), ["--checkpoint_interval=1", "--gradient_accumulation_steps=2"]
    common = [f"--data_dir={data_dir}", *SMALL, *PRUNED, *often]
    seconds = zygote.run(*common, f"--out_dir={tmp_path / 'undisturbed'}").seconds
    for number in range(20):
        out_dir = tmp_path / str(number)
        arguments, after = [*common, f"--out_dir={out_dir}"], generator.uniform(0, seconds)
        while zygote.run(*arguments, kill=(after, "SIGKILL")).codes != [-signal.SIGKILL]:
            shutil.rmtree(out_dir)  # it had ended before: this one does not count
            after /= 2
        done = zygote.run(*arguments)
        assert done.codes == [0], done  # also where it was killed after its last checkpoint
        left = [p.name for p in (out_dir / "checkpoints").iterdir() if p.name.startswith(".")]
        assert not left and files_of(out_dir, 30) == files_of(tmp_path / "undisturbed", 30)
        assert [line["step"] for line in metrics_of(out_dir)] == list(range(1, 31))


def test_a_damaged_checkpoint_is_skipped_loudly(undisturbed, data_dir, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000030" / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    done = train(data_dir, tmp_path / "run", *PRUNED)
    assert "skipping the damaged checkpoint" in done.stderr and "step-00000030" in done.stderr
    assert files_of(tmp_path / "run", 30) == files_of(undisturbed, 30)


def test_the_best_checkpoint_is_kept_beside_the_newest(data_dir, tmp_path, monkeypatch):
    losses = iter((3.0, 2.0, 1.0, 4.0, 5.0, 6.0))
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *arguments: next(losses))
    options = ["--eval_interval=5", "--checkpoint_interval=5", "--keep_checkpoints=1", f"--out_dir={tmp_path / 'run'}"]
    train_gpt2.train(load_config([*SMALL, f"--data_dir={data_dir}", *options], {}))
    assert {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-00000015", "step-00000030"}


def test_a_finished_or_different_run_is_left_alone(undisturbed, data_dir):
    before = {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}
    done = train(data_dir, undisturbed, *PRUNED)
    assert "is finished (30 of 30 steps) at 50.00% sparsity" in done.stdout and not done.stderr
    assert ", val_loss " in done.stdout
    for arguments, expected in (
        (["--init_from=scratch"], "holds a run already"),
        (["--n_layer=3"], "n_layer is 2 there, 3 here"),
        (["--learning_rate=2e-2"], "learning_rate is 0.01 there, 0.02 here"),
    ):
        lines = refused(train(data_dir, undisturbed, *PRUNED, *arguments, check=False))
        assert len(lines) == 1 and expected in lines[0] and "--out_dir" in lines[0]
    assert before == {p: p.read_bytes() for p in undisturbed.rglob("*") if p.is_file()}


def test_a_finished_run_can_be_trained_on(undisturbed, data_dir, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    train(data_dir, tmp_path / "run", *PRUNED, "--max_iters=34", "--init_from=resume")
    assert metrics_of(tmp_path / "run")[-1]["step"] == 34 and zeros(tmp_path / "run", 34) == zeros(undisturbed)


@pytest.mark.parametrize("theirs, ours", [("adamw", "sgd"), ("sgd", "adamw"), ("adamw", "adamwspam")])
def test_the_states_of_another_optimizer_are_refused(theirs, ours, data_dir, tmp_path):
    train(data_dir, tmp_path / "run", f"--optimizer={theirs}", "--max_iters=10")
    done = train(data_dir, tmp_path / "run", f"--optimizer={ours}", "--max_iters=20", "--init_from=resume", check=False)
    assert f"optimizer is {theirs} there, {ours} here" in refused(done)[0]


def test_of_the_same_run_in_other_micro_batches_an_evaluation_of_other_windows_is_a_warning(
    undisturbed, data_dir, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "run")
    batches, warning = ["--batch_size=1", "--gradient_accumulation_steps=24"], "their losses do not compare"
    assert warning in train(data_dir, tmp_path / "run", *PRUNED, *batches).stderr
    assert warning not in train(data_dir, tmp_path / "run", *PRUNED, *batches, "--eval_iters=6").stderr
    other = train(data_dir, tmp_path / "run", *PRUNED, "--batch_size=1", "--eval_iters=6", check=False)
    assert "batch_size is 2 there, 1 here" in refused(other)[0]


def test_a_run_that_began_from_weights_resumes_at_their_sizes(undisturbed, data_dir, tmp_path):
    sizes = ("--n_layer", "--n_head", "--n_embd", "--block_size")
    given = [argument for argument in SMALL if not argument.startswith(sizes)]
    for start, steps in ((undisturbed, 10), ("resume", 20), ("resume", 30)):
        arguments = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", f"--init_from={start}"]
        run("train_gpt2.py", *given, *arguments, f"--max_iters={steps}")
    assert metrics_of(tmp_path / "run")[-1]["step"] == 30


def test_a_run_starts_from_another_checkpoints_weights(undisturbed, data_dir, tmp_path):
    train(data_dir, tmp_path / "run", f"--init_from={undisturbed}", "--max_iters=2", "--learning_rate=1e-9")
    assert metrics_of(tmp_path / "run")[-1]["val_loss"] == pytest.approx(
        metrics_of(undisturbed)[-1]["val_loss"], rel=1e-3
    )


@pytest.mark.parametrize("name, use", [("toy_train_000009.bin", "trained"), ("toy_val_000000.bin", "evaluated")])
def test_changed_shards_are_noticed(name, use, undisturbed, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    write_shard(tmp_path / "data" / name, [1, 2, 3] * 100)
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000030")
    lines = refused(train(tmp_path / "data", tmp_path / "run", *PRUNED, check=False))
    assert len(lines) == 1 and name in lines[0] and f"was {use} on" in lines[0]


def test_divergence_stops_the_run_and_keeps_its_checkpoints(data_dir, tmp_path):
    lines = refused(
        train(
            data_dir,
            tmp_path / "run",
            "--learning_rate=1e30",
            "--grad_clip=0",
            "--decay_lr=False",
            "--weight_decay=0",
            check=False,
        )
    )
    assert len(lines) == 1 and "step" in lines[0] and "--learning_rate" in lines[0]


@pytest.mark.parametrize("ranks", [None, 2])
def test_all_option_errors_are_said_at_once_in_one_line_each(ranks, data_dir, tmp_path):
    config = tmp_path / "typo.py"
    config.write_text("import os\nn_layr = 3\nbatch_size = 'two'\n")
    done = run_anew(
        "train_gpt2.py",
        config,
        "--learning_rat=1e-3",
        "--n_layer=two",
        "--target_sparsity=1.2",
        "--criterion=bitter77",
        "--n_embd=10",
        "--n_head=3",
        f"--data_dir={data_dir}",
        f"--out_dir={tmp_path / 'run'}",
        "--gradient_accumulation_steps=7",
        ranks=ranks,
        check=False,
    )
    if ranks:
        assert (
            done.returncode and "exitcode  : 2" in done.stderr and done.stderr.count("Traceback") <= 1
        )  # torchrun's own
    lines = (
        refused(done) if not ranks else [line for line in done.stderr.splitlines() if "train_gpt2.py: error:" in line]
    )
    expected = [
        "learning_rate?",
        "n_layer?",
        "batch_size='two'",
        "n_layer='two'",
        "target_sparsity=1.2",
        "bitter7?",
        "n_embd=10",
    ]
    expected += ["gradient_accumulation_steps=7"] if ranks else []
    assert len(lines) == len(expected), lines
    for words in expected:
        assert sum(words in line for line in lines) == 1, (words, lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argument", ["--n_layer=two", f"--seed={2**64}", "--min_lr=1", "--max_iters=1e3"])
def test_one_wrong_option_is_one_line_and_no_other_is_blamed(argument, data_dir):
    lines = refused(run("train_gpt2.py", argument, f"--data_dir={data_dir}", check=False))
    assert len(lines) == 1 and f"error: {argument.partition('=')[0][2:]}=" in lines[0]


@pytest.mark.parametrize("name", ["out_dir", "data_dir", "init_from"])
def test_a_place_without_a_name_is_one_line(name):
    with pytest.raises(UserError) as error:
        load_config([f"--{name}="], {}, initial.sizes)
    assert str(error.value).startswith(f"{name}='': expected a name, as in") and "\n" not in str(error.value)
    with pytest.raises(UserError, match=rf"^{name}='a.x00b': expected a name"):
        load_config([f"--{name}=a\0b"], {}, initial.sizes)


def test_the_largest_seed_is_one():
    assert load_config([f"--seed={2**63 - 1}"], {}).seed == 2**63 - 1


def test_an_empty_value_that_differs_can_be_seen():
    changed = differences({"pattern": "", "seed": 1}, {"pattern": "2:4", "seed": 2}, ["pattern", "seed"])
    assert changed == ["pattern is '' there, 2:4 here", "seed is 1 there, 2 here"]


def bad_data(kind, folder):
    """A data_dir with one thing wrong, and words of the error that names it."""
    tokens = np.arange(500) % 50
    write_shard(folder / "x_val_000000.bin", tokens)
    path = folder / "x_train_000001.bin"
    write_shard(path, tokens)
    (folder / "meta.json").write_text('{"tokenizer": "byte", "vocab_size": 50}')
    if kind == "empty":
        for file in folder.iterdir():
            file.unlink()
        return "holds no train shard"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
        return "x_train_000001.bin: 2014 bytes, expected 2024"
    if kind == "magic":
        path.write_bytes(tokens.astype(np.uint16).tobytes())
        return "x_train_000001.bin: not a token shard"
    if kind == "token":
        write_shard(path, [*tokens, 50])
        return "x_train_000001.bin: holds token 50, but vocab_size=50"
    if kind == "short":
        write_shard(path, tokens[:16])
        return "block_size=16 is larger than the data"
    assert kind == "json"
    (folder / "meta.json").write_text("{")
    return "meta.json: cannot be read as JSON"


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "truncated", "magic", "token", "short", "json"])
def test_bad_data_is_one_line(kind, tmp_path):
    words = "no such folder" if kind == "missing" else None
    data = tmp_path / "data"
    if kind == "file":
        data.write_text("in the way")
        words = "is a file, expected the folder of the token shards"
    elif kind != "missing":
        data.mkdir()
        words = bad_data(kind, data)
    lines = refused(train(data, tmp_path / "run", check=False))
    assert len(lines) == 1 and words in lines[0], lines


def test_an_out_dir_that_cannot_be_written_is_one_line(data_dir, tmp_path):
    (tmp_path / "file").write_text("in the way")
    lines = refused(train(data_dir, tmp_path / "file" / "run", check=False))
    assert len(lines) == 1 and "cannot be written" in lines[0]


def test_wandb_resumes_under_the_same_id(data_dir, tmp_path):
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    logged = ["--wandb_log=True", "--wandb_project=test", *PRUNED]
    train(data_dir, tmp_path / "run", *logged, "--max_iters=30", env=offline)
    first = (tmp_path / "run" / "wandb_id").read_text()
    train(data_dir, tmp_path / "run", *logged, "--max_iters=32", "--init_from=resume", env=offline)
    assert (tmp_path / "run" / "wandb_id").read_text() == first
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first}"))) == 2


def test_the_recipe_runs_on_four_ranks_and_real_tokens(tmp_path):
    text = shared_data("tinyshakespeare/input.txt")
    run(
        "prepare_fineweb.py",
        "--input",
        text,
        "--out_dir",
        tmp_path / "data",
        "--val_tokens",
        30000,
        env={"TIKTOKEN_CACHE_DIR": str(shared_data("tiktoken"))},
    )
    run_anew(
        "train_gpt2.py",
        "config/bitter7.py",
        "--n_layer=2",
        "--n_embd=64",
        "--n_head=2",
        "--block_size=64",
        "--batch_size=2",
        "--max_iters=8",
        "--gradient_accumulation_steps=4",
        "--eval_iters=2",
        "--prune_interval=1",
        "--log_interval=1",
        "--compile=False",
        f"--data_dir={tmp_path / 'data'}",
        f"--out_dir={tmp_path / 'run'}",
        ranks=4,
    )
    last = metrics_of(tmp_path / "run")[-1]
    assert last["step"] == 8 and last["sparsity"] == 0.5 and last["train_loss"] < 10.9


def test_help_lists_every_option_with_its_default():
    text = run("train_gpt2.py", "--help").stdout
    for line in ("--learning_rate=0.0006", "--criterion=none", "--keep_checkpoints=2", "--parallel=ddp"):
        assert line in text
