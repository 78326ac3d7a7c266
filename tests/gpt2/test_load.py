"""Models that come from elsewhere: Hugging Face's sizes and file layouts, nanoGPT's checkpoints, and training on from
them."""

import json
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import train_gpt2
from gpt2 import convert, evaluate, export, hugging_face, load, sample
from gpt2.model import GPT, GPTConfig
from tests.conftest import SMALL, metrics_of

transformers = pytest.importorskip("transformers")
SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 101, "n_positions": 24}


@pytest.fixture
def their_model():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES)).eval()
    for parameter in model.parameters():  # biases and norms start at 0 and 1, where a mix-up would not show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize(
    "n_layer, n_head, n_embd, parameters",
    [
        (12, 12, 768, 124_439_808),
        (24, 16, 1024, 354_823_168),
        (36, 20, 1280, 774_030_080),
        (48, 25, 1600, 1_557_611_200),
    ],
)
def test_the_four_published_sizes(n_layer, n_head, n_embd, parameters, tmp_path):
    """Names and shapes of transformers' models, on the meta device, are those that our reader expects."""
    theirs = transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict(), default=str))
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in transformers.GPT2LMHeadModel(theirs).named_parameters()}
    sizes = hugging_face.sizes_of(tmp_path)
    ours = {
        name: shape[::-1] if name.endswith(hugging_face.TRANSPOSED) else shape
        for name, shape in export.shapes_of(sizes).items()
    }
    assert ours == shapes
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == parameters


@pytest.mark.parametrize("layout", ["saved", "sharded", "hub"])
def test_folders_as_transformers_and_the_hub_lay_them_out(their_model, tmp_path, layout):
    their_model.save_pretrained(tmp_path, max_shard_size="20KB" if layout == "sharded" else "1GB")
    if layout == "hub":  # no prefix, and the causal masks as tensors
        tensors = {name.removeprefix("transformer."): t.contiguous() for name, t in their_model.state_dict().items()}
        tensors.pop("lm_head.weight")
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
        save_file(tensors, tmp_path / "model.safetensors")
    _, ours = load.load_run(tmp_path, "cpu")
    tokens = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        assert torch.allclose(ours(tokens)[0], their_model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "llama"}, "only GPT-2"),
        ({"activation_function": "relu"}, "activation_function is relu"),
        ({"n_inner": 7}, "n_inner is 7"),
        ({"n_layer": 3}, "lacks the parameter"),
        ({"n_layer": "2"}, "n_layer is '2', expected a whole number"),
        ({"n_embd": 0}, "n_embd is 0"),
        ({"n_head": 5}, "not divisible by n_head=5"),
        ([], "model_type is None"),
    ],
)
def test_other_architectures_are_one_line(their_model, command, tmp_path, change, words):
    their_model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change if change else change))
    code, _, err = command(export, tmp_path, "--to", tmp_path / "out")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1


def test_a_folder_without_safetensors_or_tokenizer(their_model, command, tmp_path):
    their_model.save_pretrained(tmp_path)
    code, _, err = command(export, tmp_path, "--to", tmp_path / "out")
    assert code == 2 and "tokenizer.json" in err
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    code, _, err = command(export, tmp_path, "--to", tmp_path / "out")
    assert code == 2 and "holds no model.safetensors" in err


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_of_weights_is_one_line(their_model, command, tmp_path, index):
    their_model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    code, _, err = command(export, tmp_path, "--to", tmp_path / "out")
    assert code == 2 and "index.json: does not name files" in err and len(err.strip().splitlines()) == 1


def trained_on(out_dir, source, *options):
    data = f"--data_dir={source.parent / 'data'}"
    train_gpt2.main([*SMALL, data, f"--out_dir={out_dir}", "--gradient_accumulation_steps=2", *options])


@pytest.mark.parametrize("form", ["run", "hf", "bitmask"])
def test_training_on_from_a_sparse_model(finished_run, command, tmp_path, form):
    source = start = finished_run("byte")
    if form != "run":
        start = tmp_path / "exported"
        assert command(export, source, "--format", form, "--to", start)[0] == 0
    trained_on(tmp_path / "run", source, f"--init_from={start}", "--max_iters=2", "--eval_interval=1")
    before, after = load.find(source).tensors, load.find(tmp_path / "run").tensors
    assert any((before[name]() != after[name]()).any() for name in before)
    for name in before:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            assert torch.equal(before[name]() == 0, after[name]() == 0), name
    expected = metrics_of(source)[-1]["val_loss"]
    assert metrics_of(tmp_path / "run")[0]["val_loss"] == pytest.approx(expected, abs=0.3)


NANOGPT = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, bias=False, dropout=0.0)


def weights_with(name, change):
    """The weights that nanogpt_checkpoint writes with a vocabulary of 300, one of them changed."""
    torch.manual_seed(0)
    weights = GPT(GPTConfig(**NANOGPT, vocab_size=300)).state_dict()
    return weights | {name: change(weights[name])}


def nanogpt_checkpoint(path, vocab_size, bias=False):
    """A ckpt.pt as nanoGPT's train.py writes it, from a model with its names: compiled, tied, with an optimizer."""
    torch.manual_seed(0)
    sizes = NANOGPT | {"bias": bias, "vocab_size": vocab_size}
    model = GPT(GPTConfig(**sizes)).eval()
    names = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    config = {"learning_rate": 1e-3, "max_iters": 5000, "batch_size": 12, "dataset": "shakespeare", "compile": True}
    kept = {"model": names, "optimizer": {}, "model_args": sizes, "iter_num": 250, "best_val_loss": torch.tensor(1.5)}
    torch.save(kept | {"config": config}, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_checkpoints(command, tmp_path, bias):
    model = nanogpt_checkpoint(tmp_path / "ckpt.pt", 50304, bias)
    code, out, err = command(convert, tmp_path / "ckpt.pt", "--to", tmp_path / "mine")
    assert code == 0, err
    found, ours = load.load_run(tmp_path / "mine", "cpu")
    tokens = torch.randint(0, 50304, (2, 16))
    with torch.no_grad():
        assert torch.equal(ours(tokens)[0], model(tokens)[0])
    assert found.origin["step"] == 250 and found.config.learning_rate == 1e-3 and found.origin["val_loss"] == 1.5


def test_nanogpt_characters_have_no_end_of_text(command, tmp_path):
    model = nanogpt_checkpoint(tmp_path / "ckpt.pt", 5)
    (tmp_path / "input.txt").write_text("abc\n dcba"[:7])
    arguments = [tmp_path / "ckpt.pt", "--to", tmp_path / "mine"]
    code, _, err = command(convert, *arguments)
    assert code == 2 and "--characters" in err
    code, _, err = command(convert, *arguments, "--characters", tmp_path / "input.txt")
    assert code == 2 and "6 characters" in err
    (tmp_path / "input.txt").write_text("ab\n cba")
    code, _, err = command(convert, *arguments, "--characters", tmp_path / "input.txt")
    assert code == 0, err
    code, out, err = command(sample, tmp_path / "mine", "--device", "cpu", "--max_new_tokens", 20)
    assert code == 0 and set(out) <= set("ab\n c"), err
    assert command(export, tmp_path / "mine", "--to", tmp_path / "hf")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs("cab")["input_ids"] == [4, 2, 3] and model.config.vocab_size == 5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model": [1]}, "not nanoGPT's checkpoint"),
        ({"model_args": {}}, "model_args lack n_layer, n_head"),
        ({"iter_num": "x"}, "iter_num"),
        ({"iter_num": float("inf")}, "iter_num"),
        ({"best_val_loss": torch.ones(2)}, "iter_num or best_val_loss"),
        ({"model": {}}, "is not as in a GPT of its model_args"),
        ({"model": {1: 2}}, "is not as in a GPT of its model_args"),
        ({"model": weights_with("transformer.wte.weight", lambda w: w.to_sparse())}, "wte.weight is not as in"),
        ({"model": weights_with("transformer.wte.weight", lambda w: w.to("meta"))}, "wte.weight is not as in"),
        ({"model": weights_with("transformer.wte.weight", lambda w: w.to(torch.float8_e4m3fn))}, "wte.weight is not"),
        ({"model": weights_with("transformer.wpe.weight", lambda w: w[:1, :1].expand(16, 32))}, "wpe.weight is not as"),
        ({"model": weights_with("lm_head.weight", lambda w: w + 1)}, "its head has weights of its own"),
        (None, "cannot be read as tensors and plain values"),
    ],
)
def test_what_is_no_checkpoint_of_nanogpt_is_one_line(command, tmp_path, change, words):
    path = tmp_path / "ckpt.pt"
    nanogpt_checkpoint(path, 300)
    if change is None:
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save(torch.load(path, weights_only=True) | change, path)
    code, _, err = command(convert, path, "--to", tmp_path / "mine")
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1 and not (tmp_path / "mine").exists()


def test_a_damaged_checkpoint_of_nanogpt_is_refused_or_does_not_matter(command, tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", 5)
    (tmp_path / "input.txt").write_text("ab\n cba")
    arguments = [tmp_path / "ckpt.pt", "--characters", tmp_path / "input.txt", "--to"]
    whole = (tmp_path / "ckpt.pt").read_bytes()
    assert command(convert, *arguments, tmp_path / "whole")[0] == 0
    expected = load.find(tmp_path / "whole").tensors
    refused, places = 0, random.Random(0).sample(range(len(whole)), 100)
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        to = tmp_path / str(place)
        code, _, err = command(convert, *arguments, to)
        assert code in (0, 2) and len(err.strip().splitlines()) == code // 2, (place, err)
        refused += code == 2
        assert code or all(torch.equal(load.find(to).tensors[name](), read()) for name, read in expected.items())
    assert refused > 80


def test_settings_of_nanogpt_that_are_none_here_are_left_out(command, tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", 50304)
    kept = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    kept["config"] |= {"learning_rate": -1.0, "eval_iters": 10**400, "seed": -1, "weight_decay": 1, 3: 4}
    torch.save(kept | {"best_val_loss": float("inf")}, tmp_path / "ckpt.pt")
    code, _, err = command(convert, tmp_path / "ckpt.pt", "--to", tmp_path / "mine")
    assert code == 0, err
    found = load.find(tmp_path / "mine")
    assert (found.config.learning_rate, found.config.seed, found.config.weight_decay) == (6e-4, 1337, 1.0)
    assert found.config.batch_size == 12 and "val_loss" not in found.origin


@pytest.mark.parametrize(
    "form, place, value",
    [
        ("bitmask", ("sizes", "n_embd"), 10**12),
        ("bitmask", ("sizes", "dropout"), None),
        ("bitmask", (), None),
        ("hf", ("step",), [[1]]),
        ("hf", ("val_loss",), "low"),
        ("hf", ("data",), [[], 3.5, ["a.bin"]]),
        ("hf", ("data",), float("nan")),
        ("hf", ("tokenizer", "tokenizer"), [1]),
        ("hf", ("config", "block_size"), -1),
        ("hf", ("config", "dtype"), "float8"),
        ("hf", (), None),
        ("hf", (), {}),
    ],
)
def test_an_origin_that_other_hands_have_changed(finished_run, command, tmp_path, form, place, value):
    """Each command does without what is wrong, or refuses it in a line."""
    folder = tmp_path / "exported"
    assert command(export, finished_run("char"), "--format", form, "--to", folder)[0] == 0
    origin = at = json.loads((folder / "origin.json").read_text())
    for name in place[:-1]:
        at = at[name]
    at.update({place[-1]: value} if place else {})
    (folder / "origin.json").write_text(json.dumps(origin if place else value))
    data = finished_run("char").parent / "data"
    for module, *arguments in (
        (sample, "--device", "cpu", "--max_new_tokens", 3),
        (evaluate, "--device", "cpu", "--data_dir", data, "--tokens", 32),
        (export, "--to", tmp_path / "again"),
    ):
        code, _, err = command(module, folder, *arguments)
        assert code in (0, 2) and len(err.splitlines()) == code // 2 and len(err) < 500, err


class Runs:
    def __reduce__(self):
        return (sys.exit, (77,))


def test_a_pickle_that_would_run_code_is_refused(command, tmp_path):
    torch.save({"model": Runs(), "model_args": {}}, tmp_path / "ckpt.pt")
    code, _, err = command(convert, tmp_path / "ckpt.pt", "--to", tmp_path / "mine")
    assert code == 2 and not (tmp_path / "mine").exists() and len(err.strip().splitlines()) == 1


def test_a_finished_run_moved_without_its_data(finished_run, command, tmp_path):
    import shutil

    shutil.copytree(finished_run("char"), tmp_path / "moved")
    data, elsewhere = finished_run("char").parent / "data", tmp_path / "elsewhere"
    data.rename(elsewhere)
    try:
        assert command(sample, tmp_path / "moved", "--device", "cpu", "--max_new_tokens", 5)[0] == 0
        assert command(export, tmp_path / "moved", "--to", tmp_path / "hf")[0] == 0
        for source, name in ((tmp_path / "moved", data), (tmp_path / "hf", "data")):  # an export tells no place
            code, _, err = command(evaluate, source)
            assert code == 2 and f"data_dir={name}: " in err and "with --data_dir" in err
            code, _, err = command(evaluate, source, "--data_dir", elsewhere, "--tokens", 64)
            assert code == 0, err
    finally:
        elsewhere.rename(data)


def test_a_2_4_run_has_the_pattern_of_sparse_tensor_cores(finished_run, tmp_path):
    """Two of every four weights of a row are zero in every matrix, and torch packs such a matrix without loss."""
    options = ["--criterion=magnitude", "--pattern=2:4", "--prune_begin=1", "--prune_end=6", "--max_iters=6"]
    trained_on(tmp_path / "run", finished_run("byte"), *options, "--target_sparsity=0.5", "--prune_interval=5")
    tensors = load.find(tmp_path / "run").tensors
    matrices = [tensors[name]() for name in tensors if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))]
    assert len(matrices) == 8
    for matrix in matrices:
        zeros = (matrix == 0).view(-1, 4).sum(1)
        assert (zeros >= 2).all() and np.mean((zeros == 2).numpy()) > 0.99
        packed, places = torch.sparse._semi_structured_conversions.sparse_semi_structured_from_dense_cutlass(
            matrix.half()
        )
        back = torch.sparse._semi_structured_conversions.sparse_semi_structured_to_dense_cutlass(packed, places)
        assert torch.equal(back, matrix.half()) and packed.numel() * 2 == matrix.numel()
