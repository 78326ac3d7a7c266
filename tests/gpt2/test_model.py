import math

import pytest
import torch
import torch.nn.functional as F

from gpt2 import load
from gpt2.model import GPT, GPTConfig


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=24, vocab_size=101, n_layer=3, n_head=3, n_embd=30) | changes))


def test_the_default_is_gpt2_small():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    assert model.lm_head.weight is model.transformer.wte.weight


def test_hugging_face_weights_give_hugging_face_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=101, n_positions=24, n_embd=30, n_layer=3, n_head=3)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for parameter in theirs.parameters():  # biases and norms start at 0 and 1, where a mix-up would not show
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load.build(load.find(tmp_path), torch.device("cpu"))
    idx = torch.randint(0, 101, (2, 24))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        logits, loss = ours(idx[:, :-1], idx[:, 1:])
        assert torch.allclose(ours(idx)[0], expected.logits, atol=1e-4, rtol=0)
        assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)


def test_initialisation_is_scaled_for_the_residual_stream():
    model = small(n_embd=240, n_layer=8)
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert parameter.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]


def test_no_token_sees_a_later_one():
    model, idx = small().eval(), torch.randint(0, 101, (1, 24))
    changed = idx.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 101
    with torch.no_grad():
        before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.allclose(before[:, 12:], after[:, 12:])


def test_padding_the_vocabulary_changes_neither_loss_nor_gradients(monkeypatch):
    """What the GPU's padded product computes, on the CPU."""
    model, idx, targets = small(), torch.randint(0, 101, (2, 24)), torch.randint(0, 101, (2, 24))
    targets[0, :5] = -1
    _, loss = model(idx, targets)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(GPT, "padding", lambda self, device: -self.config.vocab_size % 64)
    logits, padded = model(idx, targets)
    padded.backward()
    assert logits.shape == (2, 24, 101) and logits.stride(1) == 128
    assert padded.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-7), name


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = small(), torch.randint(0, 101, (1, 24)), torch.randint(0, 101, (1, 24))
    logits, _ = model(idx)
    targets[0, 3:] = -1
    assert model(idx, targets)[1].item() == pytest.approx(
        F.cross_entropy(logits[0, :3], targets[0, :3]).item(), rel=1e-6
    )


def test_too_long_a_context_is_refused():
    with pytest.raises(ValueError, match="block_size=24"):
        small()(torch.zeros(1, 25, dtype=torch.long))
