"""What gpt2.evaluate says is what a plain computation says, whatever the tokenizer, the stride and the number of
ranks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import evaluate, export, load, report, sample
from tests.conftest import metrics_of
from tests.gpt2.test_hellaswag import ITEMS


def validation_tokens(out_dir):
    """The tokens of the run's validation shard, read here from the format's description."""
    (path,) = (out_dir.parent / "data").glob("*_val_*.bin")
    return torch.from_numpy(np.fromfile(path, np.uint16)[512:].astype(np.int64))


def losses_of(model, tokens, start, stop, context):
    """The losses (nats) of the targets start + 1 ... stop, given tokens from `context` on."""
    with torch.no_grad():
        logits = model(tokens[None, context:stop])[0][0]
    return F.cross_entropy(logits[start - context :], tokens[start + 1 : stop + 1], reduction="none").double()


def results_of(command, *arguments):
    code, out, err = command(evaluate, *arguments)
    assert code == 0, err
    (path,) = (line.removeprefix("kept in ") for line in out.splitlines() if line.startswith("kept in "))
    return json.loads(open(path).read())


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_the_whole_validation_set_is_every_target_once(finished_run, command, tokenizer):
    out_dir = finished_run(tokenizer)
    found, model = load.load_run(out_dir, "cpu")
    tokens = validation_tokens(out_dir)
    windows = [losses_of(model, tokens, at, min(at + 16, len(tokens) - 1), at) for at in range(0, len(tokens) - 1, 16)]
    losses = torch.cat(windows)
    facts = results_of(command, out_dir)["validation"]
    assert facts["tokens"] == len(losses) == len(tokens) - 1
    assert facts["val_loss"] == pytest.approx(losses.mean().item(), abs=1e-6)
    assert facts["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    words = load.tokenizer_of(found)
    text = tokens[1:] != words.end_of_text
    size = len(words.decode(tokens[1:].tolist()).encode())
    assert facts["bytes"] == size
    assert facts["bits_per_byte"] == pytest.approx(losses[text].sum().item() / math.log(2) / size, rel=1e-5)
    # of equally large windows the standard error is that of a mean; the last window is smaller, which changes little
    means = np.array([window.mean() for window in windows[:-1]])
    assert facts["val_loss_stderr"] == pytest.approx(means.std(ddof=1) / math.sqrt(len(means)), rel=0.05)


def test_as_many_tokens_as_the_run_evaluated_give_its_own_loss(finished_run, command):
    out_dir = finished_run("char")
    facts = results_of(command, out_dir, "--tokens", 3 * 2 * 16)["validation"]
    assert facts["val_loss"] == pytest.approx(metrics_of(out_dir)[-1]["val_loss"], abs=1e-6)
    assert facts["tokens"] == 96


def test_a_stride_gives_each_token_its_context(finished_run, command):
    out_dir = finished_run("char")
    tokens, (_, model) = validation_tokens(out_dir), load.load_run(out_dir, "cpu")
    losses = [losses_of(model, tokens, 0, 16, 0)]
    for start in range(16, len(tokens) - 1, 4):
        stop = min(start + 4, len(tokens) - 1)
        losses.append(losses_of(model, tokens, start, stop, start + 4 - 16))
    losses = torch.cat(losses)
    facts = results_of(command, out_dir, "--stride", 4)["strided"]
    assert facts["tokens"] == len(losses) == len(tokens) - 1
    assert facts["val_loss"] == pytest.approx(losses.mean().item(), abs=1e-6)


def test_what_was_measured_before_stays(finished_run, command):
    out_dir = finished_run("char")
    results_of(command, out_dir, "--stride", 8, "--tokens", 64)
    results = results_of(command, out_dir, "--tokens", 64)
    assert {"validation", "strided"} <= results.keys() and results["step"] == 30


def test_each_part_says_how_it_was_measured(finished_run, command, tmp_path):
    shutil.copytree(finished_run("char"), tmp_path / "run")
    results_of(command, tmp_path / "run", "--stride", 8, "--tokens", 64, "--dtype", "bfloat16")
    results = results_of(command, tmp_path / "run", "--tokens", 64, "--dtype", "float32")
    assert (results["strided"]["dtype"], results["validation"]["dtype"]) == ("bfloat16", "float32")
    assert all(results[part]["device"] == "cpu" and results[part]["torch"] for part in ("strided", "validation"))


@pytest.mark.parametrize("text", ["[]", "{", '{"lm_eval": 3, "strided": []}', '{"lm_eval": {"a": 3}, "strided": NaN}'])
def test_an_evaluation_that_cannot_be_read_is_in_nobodys_way(finished_run, command, tmp_path, text):
    shutil.copytree(finished_run("char"), tmp_path / "run")
    (path,) = tmp_path.glob("run/checkpoints/step-00000030")
    for module, *arguments in (
        (report, "--sample_tokens", 0, "--to", tmp_path / "report.html"),
        (export, "--to", tmp_path / "hf"),
        (evaluate, "--tokens", 16),
    ):
        (path / "evaluation.json").write_text(text)
        code, _, err = command(module, tmp_path / "run", *arguments)
        assert code == 0, err
    facts = json.loads((path / "evaluation.json").read_text())["validation"]
    assert facts["windows"] == 1 and "val_loss_stderr" not in facts  # of one window nobody knows the scatter


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--stride", "17"], "context of 16"),
        (["--tokens", "0"], "--tokens"),
        (["--data_dir", "nowhere"], "nowhere"),
        (["--hellaswag", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_requests_are_one_line(finished_run, command, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = command(evaluate, finished_run("char"), *arguments)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and len(lines) == 1 and words in lines[0] and "Traceback" not in err


def test_data_of_another_tokenizer_are_refused(finished_run, command):
    data = finished_run("byte").parent / "data"
    code, _, err = command(evaluate, finished_run("char"), "--data_dir", data)
    assert code == 2 and "tokenizer" in err


@pytest.fixture
def their_folder(finished_run, command, tmp_path):
    """Makes a folder as other tools leave it, whose tokenizer.json is of bytes, and changes that file."""

    def make(change=lambda model: None):
        code, _, err = command(export, finished_run("byte"), "--to", tmp_path / "hf")
        assert code == 0, err
        (tmp_path / "hf" / load.ORIGIN).unlink()
        model = pytest.importorskip("tokenizers").Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
        model = change(model) or model
        model.save(str(tmp_path / "hf" / "tokenizer.json"))
        return tmp_path / "hf"

    return make


def swapped(model):
    described = json.loads(model.to_str())
    vocabulary = described["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    return type(model).from_str(json.dumps(described))


def padded(model):
    model.add_special_tokens(["<pad>", "<mask>"])


def larger(model):
    model.add_tokens(["cat"])


def test_their_tokenizer_is_compared_with_that_of_the_data(finished_run, command, their_folder, tmp_path):
    data = finished_run("byte").parent / "data"
    folder = their_folder(padded)
    facts = results_of(command, folder, "--data_dir", data, "--tokens", 64)["validation"]
    assert facts["bits_per_byte"] > 0
    code, out, err = command(sample, folder, "--prompt", "the", "--max_new_tokens", 3)
    assert code == 0 and out.startswith("the"), err
    (folder / "tokenizer.json").unlink()
    facts = results_of(command, folder, "--data_dir", data, "--tokens", 64)["validation"]
    assert "bits_per_byte" not in facts
    (folder / "evaluation.json").unlink()
    code, _, err = command(evaluate, folder, "--data_dir", data, "--tokens", 64, "--hellaswag", tmp_path)
    assert code == 2 and "holds no tokenizer.json" in err
    assert not (folder / "evaluation.json").exists(), "measured first"


def test_data_of_other_tokens_than_their_tokenizers_are_refused(finished_run, command, their_folder):
    data = finished_run("byte").parent / "data"
    code, _, err = command(evaluate, their_folder(swapped), "--data_dir", data)
    assert code == 2 and "gives other tokens" in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("module, arguments", [(sample, ["--prompt", "the cat"]), (evaluate, ["--hellaswag", "items"])])
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_one_line(module, arguments, command, their_folder, tmp_path):
    (tmp_path / "items").write_text(json.dumps(ITEMS[0]) + "\n")
    arguments = [tmp_path / "items" if argument == "items" else argument for argument in arguments]
    code, _, err = command(module, their_folder(larger), *arguments)
    assert code == 2 and "gives tokens up to 257, and the model has 257" in err
    assert len(err.strip().splitlines()) == 1
