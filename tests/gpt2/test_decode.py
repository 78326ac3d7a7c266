"""Decoding gives what the whole model gives: with keys and values kept, and with non-zero weights alone."""

import pytest
import torch
import torch.nn as nn

from gpt2 import sparse_linear
from gpt2.decode import Past, draw, generate
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig
from pruning.native import compiled


def a_model(**sizes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**(dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16) | sizes))).eval()


@torch.no_grad()
def test_tokens_read_one_by_one_give_the_logits_of_the_whole_sequence():
    model, tokens = a_model(), torch.randint(0, 50, (3, 16))
    whole, past = model(tokens)[0], [Past(16) for _ in range(2)]
    pieces = [tokens[:, :5], *tokens[:, 5:].split(1, dim=1)]
    parts = torch.cat([model.head(model.features(piece, past)) for piece in pieces], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_past_refuses_what_it_cannot_hold_or_mask():
    model, past = a_model(), [Past(16) for _ in range(2)]
    model.features(torch.zeros(1, 15, dtype=torch.int64), past)
    with pytest.raises(ValueError, match="one at a time"):
        past[0].extend(torch.zeros(1, 2, 2, 8), torch.zeros(1, 2, 2, 8))
    model.features(torch.zeros(1, 1, dtype=torch.int64), past)
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model.features(torch.zeros(1, 1, dtype=torch.int64), past)


def test_samples_drawn_together_are_those_of_the_likeliest_tokens_drawn_alone():
    model, prompts = a_model(), torch.randint(0, 50, (3, 4))
    together = generate(model, prompts, 20, temperature=0)
    for prompt, sample in zip(prompts, together):
        assert torch.equal(generate(model, prompt[None], 20, temperature=0)[0], sample)


def pruned_linear(width, height, sparsity, bias=True):
    layer = nn.Linear(width, height, bias=bias)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < sparsity] = 0
        layer.weight[0] = 0  # a row without weights, and a full one
        layer.weight[-1] = 1
    return layer


def every_way(layer):
    """Every multiply(x) of a layer."""
    kernels = compiled(sparse_linear.SOURCE)
    found = {sparse_linear.sparse_ways(kernels), sparse_linear.whole_ways(kernels), sparse_linear.csr} - {None}
    return [multiply for ways_of in found for multiply in ways_of(layer)]


@pytest.mark.parametrize("width", [8, 24, 40, 37, 1, 128, 201])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95, 1.0])
@torch.no_grad()
def test_every_form_multiplies_as_the_dense_layer(width, sparsity):
    torch.manual_seed(0)
    layer, x = pruned_linear(width, 33, sparsity, bias=width != 24), torch.randn(3, width)
    for multiply in every_way(layer):
        sparse = sparse_linear.SparseLinear(layer, multiply, rows=2)
        torch.testing.assert_close(sparse(x[:2]), layer(x[:2]), rtol=1e-5, atol=1e-5)
        assert torch.equal(sparse(x), layer(x))  # more rows than it is made for: the dense product


@pytest.mark.parametrize("compiler", [True, False])
@torch.no_grad()
def test_a_sparse_model_gives_the_dense_ones_logits(compiler, monkeypatch):
    if not compiler:
        monkeypatch.setenv("CXX", "no-such-compiler")
    model, tokens = a_model(), torch.randint(0, 50, (2, 9))
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.dim() == 2:
            parameter[torch.rand_like(parameter) < 0.75] = 0
    dense = model(tokens)[0]
    assert sparse_linear.make_sparse(model, rows=20, always=True) == (9 if compiler else 8)  # the head has no zeros
    assert (model(tokens)[0] - dense).abs().max() < 1e-4
    assert (model(tokens[:1, :3].repeat(20, 1))[0] - dense[0, :3]).abs().max() < 1e-4  # more rows than it is made for


@torch.no_grad()
def test_columns_beyond_16_bits_are_kept_too():
    layer, x = nn.Linear(2**16 + 9, 3), torch.randn(2, 2**16 + 9)
    layer.weight[:, ::2] = 0
    for multiply in every_way(layer):
        torch.testing.assert_close(multiply(x), layer(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_sparse_layer_takes_other_dtypes_no_rows_and_parameters_that_move():
    layer, x = pruned_linear(256, 300, 0.5), torch.randn(2, 256)
    for multiply in every_way(layer):
        sparse = sparse_linear.SparseLinear(layer, multiply, rows=2)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sparse(x.bfloat16()), layer(x.bfloat16()))
        assert sparse(x[:0]).shape == (0, 300)
        sparse.double().float()  # gives weight and bias other memory
        taken = [torch.full((300,), 7e7) for _ in range(200)]
        torch.testing.assert_close(sparse(x), layer(x), rtol=1e-5, atol=1e-5)
        assert taken


def test_a_compiler_that_fails_leaves_torchs_own_form(tmp_path, monkeypatch):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    kernels = compiled(sparse_linear.SOURCE)
    assert sparse_linear.sparse_ways(kernels) == sparse_linear.csr and sparse_linear.whole_ways(kernels) is None
    assert not list((tmp_path / "extensions").iterdir())


def test_a_temperature_near_zero_draws_the_likeliest_token():
    logits = torch.tensor([[1.0, 3.0, 2.0], [90.0, -5.0, 0.0]])
    for temperature in (1e-3, 1e-40, 1e-300):
        assert draw(logits.clone(), temperature, 0, torch.Generator().manual_seed(0)).tolist() == [[1], [0]]


def test_a_model_whose_training_diverged_is_one_line():
    model = a_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.nan
    for temperature in (0, 0.8):
        with pytest.raises(UserError, match="logits are not finite"):
            generate(model, torch.zeros(1, 1, dtype=torch.int64), 3, temperature)
