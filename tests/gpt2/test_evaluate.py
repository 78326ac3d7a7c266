"""What gpt2.evaluate says is what a plain computation says, whatever the tokenizer, the stride and the number of
ranks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2 import evaluate, export, load, report
from tests.conftest import metrics_of


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
