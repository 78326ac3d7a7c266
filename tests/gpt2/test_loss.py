"""The loss in blocks of rows against F.cross_entropy on all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from gpt2 import kernels
from gpt2 import loss as loss_module
from gpt2.loss import linear_cross_entropy
from gpt2.model import GPT, GPTConfig


def problem(rows=37, width=12, vocabulary=101, dtype=torch.float32, ignored=0.2):
    torch.manual_seed(rows + vocabulary)
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(vocabulary, width, dtype=dtype)
    targets = torch.randint(vocabulary, (rows,)).masked_fill(torch.rand(rows) < ignored, -1)
    return x.requires_grad_(), weight.requires_grad_(), targets


def plain(x, weight, targets):
    return F.cross_entropy((x @ weight.t()).float(), targets, ignore_index=-1)


def results(function, x, weight, targets, *options):
    """[loss, gradient of x, gradient of weight], of three times the loss."""
    loss = function(x, weight, targets, *options)
    return [loss.detach(), *torch.autograd.grad(3 * loss, (x, weight))]


@pytest.fixture(params=["kernels", "no kernels"])
def ways(request, monkeypatch):
    """With this project's kernels, where they can be compiled, and without."""
    if request.param == "no kernels":
        monkeypatch.setattr(kernels, "library", lambda: None)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("vocabulary", [1, 64, 101])
@pytest.mark.parametrize("size, block", [(1, 8), (8, 8), (37, 8), (37, 64)])
def test_loss_and_gradients_are_the_plain_ones(vocabulary, size, block):
    inputs = problem(size, vocabulary=vocabulary, ignored=0.2 if size > 1 else 0)
    for found, expected in zip(results(linear_cross_entropy, *inputs, block), results(plain, *inputs)):
        assert found.dtype == expected.dtype and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(linear_cross_entropy(*inputs, block), plain(*inputs), rtol=1e-6)


@pytest.mark.usefixtures("ways")
def test_extreme_logits_neither_overflow_nor_lose_the_loss():
    x, weight, targets = problem()
    with torch.no_grad():
        x *= 1000
    expected = plain(x.double(), weight.double(), targets)
    assert expected > 100 and linear_cross_entropy(x, weight, targets, 8).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.usefixtures("ways")
def test_gradcheck_in_float64():
    x, weight, targets = problem(7, 3, 5, torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: linear_cross_entropy(x, weight, targets, 3), (x, weight))


@pytest.mark.usefixtures("ways")
def test_bfloat16_is_as_near_to_float32_as_the_plain_way_in_bfloat16():
    inputs = problem(64, 32, 1000)
    exact = results(plain, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(linear_cross_entropy, *inputs, 24), results(plain, *inputs)
    for found, rival, expected in zip(ours, theirs, exact):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 1.2 * (rival - expected).norm() + 1e-6


@pytest.mark.usefixtures("ways")
def test_no_target_at_all():
    x, weight, _ = problem()
    loss, *gradients = results(linear_cross_entropy, x, weight, torch.full((37,), -1), 8)
    assert loss.isnan() and all((g == 0).all() for g in gradients)


@pytest.fixture
def dirty_memory():
    """Deterministic algorithms fill new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("ways", "dirty_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1, 8, 9])
def test_nothing_of_the_memorys_contents_is_in_a_gradient(size, dtype):
    x, weight = torch.randn(size, 12, dtype=dtype, requires_grad=True), torch.randn(101, 12, dtype=dtype)
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, torch.zeros(size, dtype=torch.int64), 8)
    for gradient in torch.autograd.grad(loss, (x, weight), torch.tensor(float(size > 0))):
        assert gradient.isfinite().all() and (size or not gradient.any())


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("wrong", [-2, 101])
def test_a_target_that_is_no_token_is_an_error(wrong):
    x, weight, targets = problem()
    targets[5] = wrong
    with pytest.raises(IndexError, match=r"not in \[0, 101\)"):
        linear_cross_entropy(x, weight, targets, 8)


@pytest.fixture
def chunked(monkeypatch):
    """Blocks of 16 rows for every vocabulary."""
    monkeypatch.setattr(loss_module, "LARGE_VOCABULARY", 0)
    monkeypatch.setattr(linear_cross_entropy, "__defaults__", (16,))


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=24, vocab_size=101, n_layer=2, n_head=3, n_embd=30) | changes))


def gradients(model, idx, targets, with_logits):
    model.zero_grad()
    logits, loss = model(idx, targets, with_logits)
    loss.backward()
    return logits, loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_model_with_a_tied_head_without_its_logits(chunked, compiled):
    model, idx = small(), torch.randint(0, 101, (2, 24))
    targets = torch.randint(0, 101, (2, 24))
    targets[1, 5:] = -1
    logits, expected, gradient = gradients(model, idx, targets, True)
    assert logits.shape == (2, 24, 101)
    fast = torch.compile(model, backend="eager") if compiled else model
    logits, loss, found = gradients(fast, idx, targets, False)
    assert logits is None and loss == pytest.approx(expected, rel=1e-6)
    for name, value in gradient.items():
        assert torch.allclose(
            found[name.replace("transformer", "_orig_mod.transformer") if compiled else name], value, atol=1e-6
        )


def test_characters_keep_the_plain_loss():
    model, idx = small(), torch.randint(0, 101, (2, 24))
    assert gradients(model, idx, idx, False)[0] is None
    for with_logits in (True, False):
        assert torch.equal(model(idx, idx, with_logits)[1], F.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten()))
