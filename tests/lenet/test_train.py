"""What a run of lenet.train promises: exact sparsity, the same metrics again, honest memory, one line for what is
wrong."""

import gc
import json

import pytest
import torch

from gpt2.parallel import has_compiler
from lenet.data import load_digits
from lenet.model import LeNet5
from lenet.train import OPTIMIZERS, is_compiled, make_training, parse, train
from tests.conftest import refused, run
from tests.lenet.helpers import NAMES, write_mnist

SHORT = [
    "--epochs",
    "5",
    "--batch-size",
    "50",
    "--pruning-warmup",
    "5",
    "--device",
    "cpu",
]  # 60 steps, the ramp ends with the 48th


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder)
    return load_digits(folder)


def options(*arguments):
    return parse([*SHORT, *arguments])


def without_times(metrics):
    return metrics | {"seconds": 0, "epochs": [epoch | {"seconds": 0} for epoch in metrics["epochs"]]}


METHODS = [
    (optimizer, method)
    for optimizer in OPTIMIZERS
    for method in ("movement", "magnitude", "state", "random")
    if (optimizer, method) != ("sgd", "state")
]


@pytest.mark.parametrize("optimizer, method", METHODS)
def test_every_pruned_run_ends_exactly_at_its_target(optimizer, method, digits):
    model, metrics = train(
        options("--optimizer", optimizer, "--pruning-method", method, "--target-sparsity", "0.7"), digits
    )
    weights = [module.weight for name, module in model.named_children() if name.startswith(("conv", "fc"))]
    prunable = sum(w.numel() for w in weights)
    assert prunable == 61_470 and sum(int((w == 0).sum()) for w in weights) == round(0.7 * prunable)
    assert [epoch["sparsity"] for epoch in metrics["epochs"][-2:]] == pytest.approx([0.7, 0.7], abs=1e-5)
    assert metrics["nonzero_parameters"] == sum(int((p != 0).sum()) for p in model.parameters())
    assert (
        metrics["compression_ratio"] == metrics["parameters"] / metrics["nonzero_parameters"]
        and metrics["parameters"] == 61_750
    )
    assert metrics["layer_sparsity"]["fc1"] == pytest.approx(1 - int(model.fc1.weight.count_nonzero()) / 48_000)


def test_the_same_seed_gives_the_same_metrics(digits):
    arguments = ("--optimizer", "adamwspam", "--pruning-method", "magnitude", "--seed", "3")
    first, second = (without_times(train(options(*arguments), digits)[1]) for _ in range(2))
    other = without_times(train(options(*arguments[:-1], "4"), digits)[1])
    assert first == second and first["epochs"] != other["epochs"] and first["spikes"] is not None


def test_bitter4_prunes_later_layers_more(digits):
    sparsity = {}
    for variant in ("bitter3", "bitter4"):
        arguments = ("--optimizer", "adamwprune", "--pruning-method", "state", "--target-sparsity", "0.5")
        sparsity[variant] = train(options(*arguments, "--adamwprune-variant", variant), digits)[1]["layer_sparsity"]
    assert (
        list(sparsity["bitter4"].values()) == sorted(sparsity["bitter4"].values()) != list(sparsity["bitter3"].values())
    )


def test_it_learns(digits):
    _, metrics = train(
        options("--optimizer", "adamwprune", "--pruning-method", "state", "--adamwprune-variant", "bitter7"), digits
    )
    assert metrics["final_accuracy"] > 90 and metrics["config"]["criterion"] == "bitter7"


def test_with_adamwprune_movement_means_state(digits):
    movement, state = (
        train(options("--optimizer", "adamwprune", "--pruning-method", method, "--epochs", "2"), digits)[1]
        for method in ("movement", "state")
    )
    assert (
        movement["epochs"][-1]["test_loss"] == state["epochs"][-1]["test_loss"]
        and movement["config"]["criterion"] == "bitter0"
    )


def live_bytes():
    """{address: bytes} of the memory of every tensor that is alive."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return dict(filter(None, map(memory_of, tensors)))


def memory_of(tensor):
    """(address, bytes), or None for a tensor that has no memory, such as those that torch.compile traces with and
    keeps."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    except RuntimeError:
        return None


@pytest.mark.parametrize("steps_per_epoch, begin", [(118, 101), (8, 13), (1, 2)])
def test_pruning_begins_within_the_ramp_however_few_the_digits(steps_per_epoch, begin):
    training = make_training(parse(["--pruning-method", "magnitude"]), LeNet5(), steps_per_epoch)
    assert training.pruner.begin == begin <= training.pruner.end


@pytest.mark.parametrize("optimizer, method", [*((optimizer, "none") for optimizer in OPTIMIZERS), *METHODS])
def test_the_memory_account_is_what_is_allocated(optimizer, method, digits):
    from pruning.memory import measure

    before = live_bytes()
    model = LeNet5()
    training = make_training(options("--optimizer", optimizer, "--pruning-method", method), model, 12)
    for _ in range(2):
        torch.nn.functional.cross_entropy(model(digits.train_images[:50]), digits.train_labels[:50]).backward()
        account = measure(model, training.optimizer, training.pruner, training.spam)
        grown = {pointer: size for pointer, size in live_bytes().items() if pointer not in before}
        training.step()
    normalisation = sum(buffer.untyped_storage().nbytes() for buffer in model.buffers())
    assert account["total"] == sum(grown.values()) - normalisation
    assert account["total"] == sum(account[item] for item in ("weights", "gradients", "states", "buffers"))


def test_the_command_writes_its_metrics(tmp_path):
    write_mnist(tmp_path / "mnist", 300, 100)
    arguments = (
        "-m lenet.train",
        "--data-dir",
        tmp_path / "mnist",
        "--optimizer",
        "adamw",
        "--pruning-method",
        "magnitude",
        "--epochs",
        2,
        "--batch-size",
        30,
        "--pruning-warmup",
        3,
        "--json-output",
        tmp_path / "deep" / "m.json",
    )
    done = run(*arguments)
    metrics = json.loads((tmp_path / "deep" / "m.json").read_text())
    assert f"{metrics['final_accuracy']:.2f} %" in done.stdout.splitlines()[-1] and len(metrics["epochs"]) == 2
    assert metrics["data"] == "MNIST" and metrics["config"]["target_sparsity"] == 0.9
    run(*arguments)
    assert without_times(json.loads((tmp_path / "deep" / "m.json").read_text())) == without_times(metrics)


def test_long_runs_compile_by_themselves():
    assert [
        is_compiled(parse(["--epochs", epochs, *flag]), 60_000)
        for epochs, flag in (("10", []), ("1", []), ("10", ["--no-compile"]), ("1", ["--compile"]))
    ] == [has_compiler(torch.device("cpu")), False, False, True]


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler and Python's headers")
def test_compile_computes_the_same(digits):
    plain, compiled = (
        train(options("--optimizer", "adamw", "--epochs", "1", *flag), digits)[1]["epochs"][0]
        for flag in ([], ["--compile"])
    )
    assert plain["train_loss"] == pytest.approx(compiled["train_loss"], rel=1e-3)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--target-sparsity", "1.5"], "--target-sparsity 1.5: expected 0 <= s < 1"),
        (["--optimizer", "sgd", "--pruning-method", "state"], "--optimizer sgd does not keep"),
        (["--optimizer", "adagrad"], "invalid choice: 'adagrad'"),
        (["--epochs", "0"], "--epochs 0: expected at least 1"),
        (["--lr", "nan"], "--lr nan"),
        (["--optimzer", "sgd"], "--optimzer"),
        (["--pruning-method", "magnitude", "--pruning-warmup", "999999"], "--pruning-warmup 999999: expected below"),
        (["--device", "nowhere"], "--device nowhere"),
        (["--device", "meta"], "--device meta"),
        (["--seed", str(2**63)], "expected below 2**63"),
        (["--optimizer", "adamw", "--lr", "1e9", "--batch-size", "4"], "epoch 1: the loss is nan: lower --lr 1e+09"),
        (["--lr", "1e38"], "--lr 1e+38: expected a number above 0 and below 1e+10"),
        (["--json-output", "/proc/x.json"], "/proc/x.json: cannot be written"),
        (["--data-dir", "/nowhere"], "/nowhere: has no train-images"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path):
    write_mnist(tmp_path, 60, 20)
    lines = refused(
        run("-m lenet.train", "--data-dir", tmp_path, "--json-output", tmp_path / "m.json", *arguments, check=False)
    )
    assert len(lines) == 1 and message in lines[0]


def test_no_compiler_is_one_line_or_no_compilation(tmp_path):
    write_mnist(tmp_path, 60, 20)
    command = (
        "-m lenet.train",
        "--data-dir",
        tmp_path,
        "--json-output",
        tmp_path / "m.json",
        "--batch-size",
        "2",
        "--epochs",
        "34",
    )  # 1,020 steps
    run(*command, env={"CXX": "no-such-compiler"})
    assert json.loads((tmp_path / "m.json").read_text())["compiled"] is False
    lines = refused(run(*command, "--compile", env={"CXX": "no-such-compiler"}, check=False))
    assert len(lines) == 1 and "--compile: torch.compile needs a C++ compiler" in lines[0]


def test_a_truncated_file_is_one_line(tmp_path):
    write_mnist(tmp_path, 60, 20)
    path = tmp_path / NAMES[0]
    path.write_bytes(path.read_bytes()[:-5])
    lines = refused(run("-m lenet.train", "--data-dir", tmp_path, check=False))
    assert len(lines) == 1 and NAMES[0] in lines[0]


def test_help_names_every_flag_of_the_source():
    text = run("-m lenet.train", "--help").stdout
    for flag in (
        "optimizer",
        "pruning-method",
        "adamwprune-variant",
        "target-sparsity",
        "pruning-warmup",
        "spam-enable-clip",
        "spam-theta",
        "spam-interval",
        "spam-warmup-steps",
        "epochs",
        "batch-size",
        "lr",
        "seed",
        "data-dir",
        "json-output",
        "device",
        "compile",
    ):
        assert f"--{flag}" in text


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--adamwprune-variant=bitter7", "--target-sparsity", "0.9"], "--adamwprune-variant, --target-sparsity: of"),
        (["--pruning-method=magnitude", "--adamwprune-variant=bitter7", "--pruning-warmup=9"], "--adamwprune-variant:"),
        (["--pruning-method=state", "--adamwprune-variant=bitter7", "--spam-theta=4"], "--spam-theta: of no effect"),
        (["--target-sp", "0.9"], "--target-sparsity: of no effect"),
        (["--pruning-method=movement", "--adamwprune-variant=bitter7", "--target-sparsity=0.9"], ""),
        ([], ""),
    ],
)
def test_options_that_a_run_does_not_read_are_said(arguments, said, capsys):
    parse(["--optimizer=adamwprune", *arguments])
    lines = capsys.readouterr().err.splitlines()
    assert [said in line for line in lines] == [True] * bool(said)
