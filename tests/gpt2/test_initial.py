"""init_from: published weights from the hub's cache, folders of transformers, other runs; contexts cut short."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_gpt2
from gpt2 import initial
from gpt2.config import Config, load_config
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from tests.conftest import SMALL, refused, run

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100}


def write_hugging_face(folder, prefix=""):
    """A GPT-2 of SIZES and 64 positions, as the hub has it; returns our names -> tensor."""
    torch.manual_seed(5)
    ours = GPT(GPTConfig(block_size=64, **SIZES)).tensors()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    theirs = {
        name.replace("transformer.", prefix): (p.t() if name.endswith(conv1d) else p).detach().contiguous()
        for name, p in ours.items()
    }
    folder.mkdir(parents=True)
    save_file(theirs, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_positions": 64, **SIZES}))
    return ours


def write_cache(home, name):
    """A cache of the hub, under HF_HOME, that holds the published model `name` alone."""
    repository = home / "hub" / f"models--openai-community--{name}"
    ours = write_hugging_face(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return ours


def test_gpt2_is_the_hubs_and_not_the_folder_of_that_name(data_dir, tmp_path):
    ours = write_cache(tmp_path / "home", "gpt2")
    arguments = [a for a in SMALL if not a.startswith(("--n_", "--max_iters"))]  # sizes come from the weights
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    common = [*arguments, "--init_from=gpt2", f"--data_dir={data_dir}", "--max_iters=1", "--learning_rate=1e-12"]
    run("train_gpt2.py", *common, f"--out_dir={tmp_path / 'run'}", env=env)
    tensors = load_file(tmp_path / "run" / "checkpoints" / "step-00000001" / "model.safetensors")
    assert tensors["transformer.wpe.weight"].shape == (16, 32)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, ours[name][: len(tensor)].detach(), atol=1e-6, rtol=0)
    # The run goes on without the weights that it began from; a new one does not begin.
    env["HF_HOME"] = str(tmp_path / "nowhere")
    assert "is finished" in run("train_gpt2.py", *common, f"--out_dir={tmp_path / 'run'}", env=env).stdout
    lines = refused(run("train_gpt2.py", *common, f"--out_dir={tmp_path / 'new'}", env=env, check=False))
    assert len(lines) == 1 and "cannot be reached" in lines[0] and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "openai-community/gpt2-xl"])
def test_published_models_are_found_in_the_cache(name, tmp_path, monkeypatch):
    write_cache(tmp_path, name.removeprefix("openai-community/"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = load_config([f"--init_from={name}", "--block_size=8"], {}, initial.sizes)
    assert (config.n_layer, config.n_embd, config.vocab_size, config.block_size) == (2, 32, 100, 8)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_shorter_context_takes_the_first_positions(prefix, tmp_path):
    ours = write_hugging_face(tmp_path / "hf", prefix)
    config = replace(Config(), init_from=str(tmp_path / "hf"), block_size=16)
    model = GPT(GPTConfig(block_size=16, **SIZES))
    initial.load_into(model, config, None)
    longer = GPT(GPTConfig(block_size=64, **SIZES))
    longer.load_state_dict(ours, strict=False)
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens)[0], longer(tokens)[0])


def test_a_folder_of_save_pretrained_gives_its_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, n_positions=64)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    config = load_config([f"--init_from={tmp_path / 'hf'}"], {}, initial.sizes)
    assert config.block_size == 64
    model = GPT(GPTConfig(block_size=64, **SIZES)).eval()
    initial.load_into(model, config, None)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "argument, words",
    [
        ("--n_layer=3", "n_layer=3: the weights .* have 2: leave it away"),
        ("--bias=False", "bias=False"),
        ("--block_size=65", "block_size=65: .* have 64"),
        ("--vocab_size=7", "vocab_size=7"),
    ],
)
def test_sizes_that_do_not_fit_the_weights_are_refused(argument, words, tmp_path):
    write_hugging_face(tmp_path / "hf")
    with pytest.raises(UserError, match=words):
        load_config([f"--init_from={tmp_path / 'hf'}", argument], {}, initial.sizes)


def test_data_of_more_tokens_than_the_weights_have_are_the_datas_fault(tmp_path):
    write_hugging_face(tmp_path / "hf")
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": "byte", "vocab_size": 257}))
    config = load_config([f"--init_from={tmp_path / 'hf'}", f"--data_dir={tmp_path}"], {}, initial.sizes)
    with pytest.raises(UserError, match="its tokenizer has 257 tokens, the weights of init_from=.* 100: prepare"):
        train_gpt2.open_data(config, None)
    with pytest.raises(UserError, match="vocab_size=7 is smaller than the 257 .*; leave it away"):
        train_gpt2.open_data(replace(config, init_from="auto", vocab_size=7), None)


def test_a_misspelt_start_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"init_from=scrach: no such folder \(did you mean scratch\?\)"):
        load_config(["--init_from=scrach", f"--out_dir={tmp_path}"], {}, initial.sizes)


@pytest.mark.parametrize("words, warned", [({"tokenizer": "char", "characters": "ab"}, True), (None, False)])
def test_another_tokenizer_is_a_warning(words, warned, tmp_path, capsys, monkeypatch):
    write_hugging_face(tmp_path / "hf")
    monkeypatch.setattr(initial, "tokenizer_of", lambda found: {"tokenizer": "gpt2"})
    model = GPT(GPTConfig(block_size=64, **SIZES))
    initial.load_into(model, replace(Config(), init_from=str(tmp_path / "hf"), block_size=64), words)
    assert ("another tokenizer (gpt2)" in capsys.readouterr().err) == warned


def test_a_run_on_data_without_words_keeps_those_of_the_weights_it_began_from(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh\n" * 400)
    run("prepare_fineweb.py", f"--input={tmp_path}/text.txt", "--tokenizer=char", f"--out_dir={tmp_path}/own")
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes((np.arange(2000, dtype=np.uint16) % 9).tobytes())
    common = ("--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2", "--eval_iters=1")
    common += ("--gradient_accumulation_steps=1", "--device=cpu", "--compile=False")
    run("train_gpt2.py", *common, f"--data_dir={tmp_path}/own", f"--out_dir={tmp_path}/first", "--max_iters=1")
    second = [*common[3:], f"--data_dir={tmp_path}", "--data_format=raw", f"--out_dir={tmp_path}/second"]
    for steps, start in ((1, tmp_path / "first"), (2, "resume")):
        run("train_gpt2.py", *second, f"--init_from={start}", f"--max_iters={steps}")
        manifest = json.loads((tmp_path / f"second/checkpoints/step-{steps:08d}/manifest.json").read_text())
        assert manifest["tokenizer"]["tokenizer"] == "char" and "abc" in manifest["tokenizer"]["characters"]
    assert run("-m gpt2.sample", f"{tmp_path}/second", "--max_new_tokens=5", "--prompt=ab").stdout.startswith("ab")
