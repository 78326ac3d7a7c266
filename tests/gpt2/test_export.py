"""What is exported is the same model elsewhere: logits, zeros and tokens; and the folder is whole or not there."""

import ast
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpt2 import bpe, convert, evaluate, export, hf_tokenizer, load, model_card, picture, report, tokenizer
from gpt2.bitmask import load as load_bitmask
from gpt2.config import Config, with_defaults_resolved
from gpt2.model import GPT, GPTConfig
from tests.conftest import ROOT, shared_data

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

TEXTS = [
    "the cat sat on the mat",
    " two  spaces\n\n\tand tabs ",
    "it's 3.14, don't",
    "Ünïcode 東京 🙂\x00\x7f",
    "<|endoftext|> is text here",
    "a" * 300,
    "",
]


def exported(command, source, to, *options):
    code, out, err = command(export, source, "--to", to, *options)
    assert code == 0, err
    return to


@pytest.mark.parametrize("name", ["char", "byte"])
def test_transformers_computes_the_same(finished_run, command, tmp_path, name):
    folder = exported(command, finished_run(name), tmp_path / "hf")
    found, ours = load.load_run(finished_run(name), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(0, ours.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, ours(tokens)[0], atol=1e-5, rtol=0)
    parameters = dict(theirs.named_parameters())
    for name, tensor in ours.tensors().items():
        there = (
            parameters[name].t()
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
            else parameters[name]
        )
        assert torch.equal(there == 0, tensor == 0) and torch.equal(there, tensor), name


@pytest.mark.parametrize("name", ["char", "byte", "gpt2"])
def test_auto_tokenizer_gives_the_same_tokens(tmp_path, name):
    words = tokenizer.load(name, "".join(sorted(set("".join(TEXTS)))))
    words.encode("")
    hf_tokenizer.write(tmp_path, words, 1024)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        tokens = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens == words.encode(text).tolist(), text
        assert theirs.decode(tokens) == words.decode(tokens) == text
    assert theirs.eos_token_id == words.end_of_text and len(theirs) == words.vocab_size
    assert theirs.decode([words.end_of_text], skip_special_tokens=True) == ""


def test_gpt2_tokens_of_a_whole_book(tmp_path):
    """The merges are recovered from tiktoken's ranks: a wrong one would show somewhere in a text this long."""
    text = shared_data("tinyshakespeare/input.txt").read_text()
    words = tokenizer.load("gpt2")
    made = hf_tokenizer.as_library_tokenizer(words)
    assert made.encode(text).ids == words.encode(text).tolist()
    vocabulary, merges = hf_tokenizer.gpt2_vocabulary()
    assert len(merges) == 50_000 and merges[0] == ("Ġ", "t")
    assert {left + right for left, right in merges} <= vocabulary.keys()


def test_a_model_without_biases(tmp_path):
    torch.manual_seed(0)
    sizes = GPTConfig(block_size=16, vocab_size=257, n_layer=2, n_head=2, n_embd=32, bias=False)
    model = GPT(sizes).eval()
    found = load.Found(tmp_path, "checkpoint", sizes, {n: lambda t=t: t.detach() for n, t in model.tensors().items()})
    export.write_hugging_face(found, tmp_path, tokenizer.load("byte"), "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.randint(0, 257, (2, 16))
    with torch.no_grad():
        assert torch.allclose(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=0)


def test_evaluation_there_and_here(finished_run, command, tmp_path):
    """Round trip: the exported folder, read by transformers and by us, has the perplexity of the run."""
    out_dir = finished_run("byte")
    folder = exported(command, out_dir, tmp_path / "hf")
    data = out_dir.parent / "data"
    losses = []
    for place in (out_dir, folder):
        code, out, err = command(evaluate, place, "--data_dir", data)
        assert code == 0, err
        losses.append(float(re.search(r"perplexity ([\d.]+)", out)[1]))
    (path,) = data.glob("*_val_*.bin")
    tokens = torch.from_numpy(np.fromfile(path, np.uint16)[512:].astype(np.int64))
    tokens = tokens[: (len(tokens) - 1) // 16 * 16 + 1]
    windows = torch.stack([tokens[at : at + 17] for at in range(0, len(tokens) - 1, 16)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert losses[0] == losses[1] == pytest.approx(loss.exp().item(), rel=2e-3)
    _, out, _ = command(evaluate, folder, "--data_dir", data, "--tokens", len(windows) * 16)
    assert float(re.search(r"perplexity ([\d.]+)", out)[1]) == pytest.approx(loss.exp().item(), abs=1e-4)


@pytest.mark.parametrize("form", ["hf", "bitmask"])
def test_bfloat16_keeps_zeros_and_only_those(finished_run, command, tmp_path, form):
    folder = exported(command, finished_run("char"), tmp_path / "out", "--format", form, "--dtype", "bfloat16")
    source, there = load.find(finished_run("char")), load.find(folder)
    for name in source.tensors:
        ours, theirs = source.tensors[name](), there.tensors[name]()
        assert theirs.dtype == torch.bfloat16 and torch.equal(theirs, ours.to(torch.bfloat16))
        assert torch.equal(theirs == 0, ours == 0), name


def test_bitmask_and_back_is_the_same_bytes(finished_run, command, tmp_path):
    folder = exported(command, finished_run("char"), tmp_path / "bm", "--format", "bitmask")
    (path,) = finished_run("char").glob("checkpoints/step-00000030/model.safetensors")
    dense, back = load_file(path), load_bitmask(folder)
    assert dense.keys() == back.keys()
    for name, tensor in dense.items():
        assert tensor.numpy().tobytes() == back[name].numpy().tobytes() and tensor.shape == back[name].shape, name


def test_the_card_says_what_was_done(finished_run, command, tmp_path):
    command(evaluate, finished_run("char"), "--tokens", 640)
    card = (exported(command, finished_run("char"), tmp_path / "my-model") / "README.md").read_text()
    for words in (
        "license: mit",
        "# my-model",
        "50.00%",
        "bitter7",
        "30 of 30",
        "bits_per_byte",
        "--criterion=bitter7",
        "--data_dir=data \\",
    ):
        assert words in card
    for words in (str(tmp_path), str(finished_run("char").parent), "--min_lr", "--vocab_size", "activation_check"):
        assert words not in card, words  # what follows from other options, and where it lay on this machine
    assert len(re.findall(r"\| [01] \|( [\d.]+% \|){4}", card)) == 2


def test_push_uploads_the_folder(finished_run, command, tmp_path, monkeypatch):
    import huggingface_hub

    done = []

    class Hub:
        def create_repo(self, name, exist_ok):
            done.append((name, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, folder_path, repo_id, commit_message):
            done.append((sorted(os.listdir(folder_path)), repo_id))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    code, out, _ = command(export, finished_run("char"), "--to", tmp_path / "hf", "--push", "me/sparse")
    assert code == 0 and "https://hub/me/sparse" in out
    assert done[0] == ("me/sparse", True) and "model.safetensors" in done[1][0] and done[1][1] == "me/sparse"
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    code, _, err = command(export, finished_run("char"), "--to", tmp_path / "again", "--push", "me/sparse")
    assert code == 2 and "no network" in err and (tmp_path / "again" / "config.json").exists()
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(TimeoutError()))
    code, _, err = command(export, finished_run("char"), "--to", tmp_path / "third", "--push", "me/sparse")
    assert code == 2 and f"TimeoutError; the export in {tmp_path / 'third'} is whole" in err


def test_what_is_there_is_not_touched(finished_run, command, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    code, _, err = command(export, finished_run("char"), "--to", tmp_path / "precious")
    assert code == 2 and "is there already" in err and os.listdir(tmp_path / "precious") == ["file"]


@pytest.mark.parametrize("form", ["hf", "bitmask"])
def test_a_full_disk_leaves_nothing(finished_run, command, tmp_path, monkeypatch, form):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = command(export, finished_run("char"), "--format", form, "--to", tmp_path / "out")
    assert code == 2 and "No space left" in err and len(err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_no_command_leaves_a_part_of_a_file_on_a_disk_that_takes_no_more(finished_run, command, tmp_path):
    """Files end at a limit of the system's, as on a full disk: one line, exit code 2, and what was there stays."""
    shutil.copytree(finished_run("char"), tmp_path / "run")
    sizes = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, bias=True, vocab_size=50257, dropout=0.0)
    torch.save({"model": GPT(GPTConfig(**sizes)).state_dict(), "model_args": sizes}, tmp_path / "ckpt.pt")
    calls = {
        60_000: [
            (export, tmp_path / "run", "--to", tmp_path / "out"),
            (export, tmp_path / "run", "--format", "bitmask", "--to", tmp_path / "out"),
            (convert, tmp_path / "ckpt.pt", "--to", tmp_path / "out"),
        ],
        100: [
            (report, tmp_path / "run", "--sample_tokens", 0, "--to", tmp_path / "out.html"),
            (picture, tmp_path / "run"),
            (evaluate, tmp_path / "run", "--tokens", 64),
        ],
    }
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit, commands in calls.items():
        for module, *arguments in commands:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
            try:
                code, _, err = command(module, *arguments)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            errors = [line for line in err.splitlines() if "window" not in line and line]
            assert code == 2 and len(errors) == 1 and "cannot be written: [Errno 27]" in errors[0], (module, err)
            assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_no_checkpoint_and_a_damaged_one_are_one_line(finished_run, command, tmp_path):
    code, _, err = command(export, tmp_path, "--to", tmp_path / "out")
    assert code == 2 and "holds no checkpoint" in err
    folder = exported(command, finished_run("char"), tmp_path / "bm", "--format", "bitmask")
    path = folder / "model.bitmask.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, _, err = command(export, folder, "--to", tmp_path / "out")
    assert code == 2 and len(err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 155 MB in float32 is exported within a third of its size beyond what the imports take."""
    script = f"""
import resource, sys
from pathlib import Path
import torch
from gpt2 import export, hf_tokenizer, load, tokenizer
from gpt2.model import GPT, GPTConfig
sizes = GPTConfig(block_size=64, vocab_size=257, n_layer=20, n_head=8, n_embd=400)
shapes = export.shapes_of(sizes)
total = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
def read(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).remainder_(2).view(shape)
found = load.Found(Path("."), "checkpoint", sizes, {{name: lambda s=shape: read(s) for name, shape in shapes.items()}})
words, folder = tokenizer.load("byte"), Path({str(tmp_path)!r})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
hf_tokenizer.as_library_tokenizer(words)
before = peak()
export.write_hugging_face(found, folder, words, "float32")
source = load.Found(folder, "hf", sizes, load.hugging_face.readers(folder, sizes))
(folder / "bm").mkdir()
export.write_bitmask(source, folder / "bm", words, "bfloat16")
print(total, peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, grown = map(int, done.stdout.split())
    assert total > 150e6 and grown < 0.3 * total, (total, grown)


@pytest.mark.parametrize("sparsity, smaller", [(0.5, 1.75), (0.9, 5.0)])
def test_size_of_pruned_matrices_in_16_bits(tmp_path, sparsity, smaller):
    torch.manual_seed(0)
    sizes = GPTConfig(block_size=8, vocab_size=8, n_layer=1, n_head=1, n_embd=256)
    tensors = {n: t.detach() for n, t in GPT(sizes).tensors().items() if n.endswith("c_fc.weight")}
    for tensor in tensors.values():
        tensor.flatten()[torch.randperm(tensor.numel())[: round(sparsity * tensor.numel())]] = 0
    found = load.Found(tmp_path, "checkpoint", sizes, {n: lambda t=t: t for n, t in tensors.items()})
    entries, _ = export.bitmask_entries(found, torch.bfloat16, {n: tuple(t.shape) for n, t in tensors.items()})
    size = sum(dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape, _ in entries)
    assert sum(2 * t.numel() for t in tensors.values()) / size >= smaller


def test_an_export_says_where_it_comes_from(finished_run, command, tmp_path):
    folder = exported(command, finished_run("char"), tmp_path / "bm", "--format", "bitmask")
    origin = json.loads((folder / "origin.json").read_text())
    assert origin["step"] == 30 and origin["config"]["criterion"] == "bitter7"
    assert origin["tokenizer"]["tokenizer"] == "char"
    assert origin["config"]["data_dir"] == "data" and origin["config"]["out_dir"] == "run"
    data = finished_run("char").parent / "data"
    assert command(evaluate, folder, "--data_dir", data, "--tokens", 64)[0] == 0
    for path in folder.iterdir():
        assert str(finished_run("char").parent).encode() not in path.read_bytes(), path.name


@pytest.mark.parametrize(
    "path, published",
    [("/home/me/books/", "books"), ("../../me/books", "books"), ("data/books", "data/books"), ("gpt2", "gpt2")],
)
def test_a_published_path_says_nothing_of_the_machine(path, published):
    assert load.public(path) == published


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_what_is_printed_is_one_line(finished_run):
    command = [sys.executable, "prepare_fineweb.py", "--verify", finished_run("char").parent / "data"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


def test_a_cards_command_names_what_makes_the_model_and_can_be_typed():
    config = replace(Config(), data_dir="my data", init_from="resume", max_hours=8.0, keep_checkpoints=3, n_layer=2)
    command = shlex.split(model_card.command(with_defaults_resolved(config)).replace("\\\n", ""))
    assert command == ["python", "train_gpt2.py", "--data_dir=my data", "--n_layer=2"]


def test_numbers_of_tokens_may_have_gaps(tmp_path):
    described = json.loads(bpe.train(["the cat sat on the mat"] * 9, 262))
    vocabulary = described["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 10
    words = tokenizer.load({"tokenizer": "bpe", "tokenizer_json": json.dumps(described)})
    assert words.vocab_size == 271
    hf_tokenizer.write(tmp_path, words, 16)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        tokens = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokens == words.encode(text).tolist(), text


def test_a_newline_that_stands_for_end_of_text_is_a_character_still(tmp_path):
    """As in nanoGPT's models of characters, which have no end-of-text."""
    words = replace(tokenizer.load({"tokenizer": "char", "characters": "\nab"}), vocab_size=3, end_of_text=0)
    assert hf_tokenizer.token_bytes(words)[:3] == [1, 1, 1]
    hf_tokenizer.write(tmp_path, words, 16)
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.decode(theirs("ab\nb")["input_ids"], skip_special_tokens=True) == "ab\nb"


@pytest.mark.parametrize("name", ['a"b', "two\nlines", "back\\slash", "{braces}"])
@pytest.mark.parametrize("form", ["hf", "bitmask"])
def test_a_cards_python_loads_a_folder_of_any_name(finished_run, command, tmp_path, name, form):
    folder = exported(command, finished_run("char"), tmp_path / name, "--format", form)
    card = (folder / "README.md").read_text()
    code = card.partition("```python")[2].partition("```")[0]
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert strings and set(strings) == {name} and f"# {' '.join(name.split())}\n" in card


def test_what_cannot_be_a_card_or_a_name_is_one_line(finished_run, command, tmp_path):
    for options, words in ((("--license", "foo: bar"), "licence"), (("--to", str(tmp_path / "to\udce9")), "UTF-8")):
        code, _, err = command(export, finished_run("char"), "--to", tmp_path / "to", *options)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
