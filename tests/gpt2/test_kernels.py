"""The kernels of a training step against torch's own operations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from gpt2 import kernels
from gpt2.kernels import Attention, LayerNorm, gelu, layer_norm
from gpt2.model import GPT, GPTConfig

compiler = pytest.mark.skipif(kernels.library() is None, reason="needs a C++ compiler")
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture
def plain(monkeypatch):
    """A function that takes the kernels away."""
    return lambda: monkeypatch.setattr(kernels, "library", lambda: None)


def assert_near(found, expected, dtype):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and (one - other).norm() <= TOLERANCE[dtype] * other.norm()


def with_gradient(function, x, grad):
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, grad)


def attention_of_torch(qkv, heads):
    batch, time, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = (part.view(batch, time, heads, width // heads).transpose(1, 2) for part in qkv.split(width, 2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, time, width)


@compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 5, 3, 7), (2, 24, 2, 16), (3, 25, 2, 33), (1, 130, 3, 64)])
def test_attention_and_its_gradient_are_torchs(sizes, dtype):
    batch, time, heads, width = sizes
    torch.manual_seed(time)
    qkv = 2 * torch.randn(batch, time, 3 * heads * width, dtype=dtype, requires_grad=True)
    grad = torch.randn(batch, time, heads * width, dtype=dtype)
    found = with_gradient(lambda x: Attention.apply(x, heads), qkv, grad)
    assert_near(found, with_gradient(lambda x: attention_of_torch(x, heads), qkv, grad), dtype)


@compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1003])
def test_gelu_and_its_gradient_are_torchs(size, dtype):
    torch.manual_seed(size)
    x, grad = 3 * torch.randn(size, dtype=dtype, requires_grad=True), torch.randn(size, dtype=dtype)
    expected = with_gradient(lambda x: F.gelu(x, approximate="tanh"), x, grad)
    assert_near(with_gradient(gelu, x, grad), expected, dtype)


@compiler
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 5), (2, 5, 16), (4, 3, 33), (130, 64)])
def test_layer_normalisation_and_its_gradients_are_torchs(shape, dtype, biased):
    torch.manual_seed(shape[-1])
    x = (1 + 3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    weight, bias = torch.randn(2, shape[-1], dtype=dtype, requires_grad=True).unbind()
    inputs, grad = (x, weight, bias)[: 2 + biased], torch.randn(shape, dtype=dtype)
    bias = bias if biased else None
    ys = LayerNorm.apply(x, weight, bias, 1e-5, dtype), F.layer_norm(x, weight.shape, weight, bias)
    found, expected = ((y.detach(), *torch.autograd.grad(y, inputs, grad)) for y in ys)
    if shape[-1] > 1:  # of one number alone, what is left is rounding
        assert_near(found, expected, dtype)
    assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)


@compiler
def test_under_autocast_layer_normalisation_writes_bfloat16():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5, 40, 33, requires_grad=True), torch.randn(33), torch.randn(33)
    exact, grad = F.layer_norm(x, (33,), weight, bias), torch.randn(5, 40, 33).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer_norm(x, weight, bias, 1e-5)
    assert y.dtype == torch.bfloat16 and (y - exact).abs().max() <= 2**-8 * exact.abs().max()
    assert (y != exact.bfloat16()).float().mean() < 1e-3  # where float32's last digit turns the rounding
    assert_near(torch.autograd.grad(y, x, grad), torch.autograd.grad(exact, x, grad.float()), torch.float32)
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), exact)  # without it, to the bit


@pytest.mark.parametrize(
    "of_x, of_weight, to",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.bfloat16),
        (torch.float32, torch.float32, torch.float16),
    ],
)
def test_layer_normalisation_of_other_dtypes_is_torchs(of_x, of_weight, to):
    x, weight = torch.randn(4, 33, dtype=of_x), torch.randn(33, dtype=of_weight)
    with torch.autocast("cpu", to):
        assert torch.equal(layer_norm(x, weight, None, 1e-5), F.layer_norm(x, (33,), weight))


@pytest.mark.parametrize("weight", [torch.ones(33).bfloat16(), torch.ones(30)])
def test_layer_normalisation_refuses_what_torchs_does(weight):
    for given in ((weight, None), (torch.ones(33), weight)):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layer_norm(torch.randn(4, 33), *given, 1e-5)


def test_layer_normalisation_takes_strided_weights_and_any_epsilon():
    x, (weight, bias) = torch.randn(4, 33), torch.randn(33, 2).unbind(1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer_norm(x, weight, bias, 1)
    assert torch.allclose(y.float(), F.layer_norm(x, (33,), weight, bias, 1), rtol=2**-7, atol=1e-3)


@compiler
@pytest.mark.parametrize("threads", [1, 3, 9])
def test_gradients_of_a_norms_weights_are_those_of_all_threads(threads):
    before, inputs = torch.get_num_threads(), [torch.randn(size, requires_grad=True) for size in ((2000, 5), 5, 5)]
    grad = torch.randn(2000, 5)
    torch.set_num_threads(threads)
    try:
        found = torch.autograd.grad(LayerNorm.apply(*inputs, 1e-5, torch.float32), inputs, grad)
    finally:
        torch.set_num_threads(before)
    x, *weights = inputs
    assert_near(found, torch.autograd.grad(F.layer_norm(x, (5,), *weights), inputs, grad), torch.float32)


@compiler
@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 5, 3, 7), (2, 24, 2, 16), (3, 25, 2, 33), (1, 130, 3, 64)])
def test_attention_in_bfloat16_is_the_exact_one_rounded(sizes):
    batch, time, heads, width = sizes
    torch.manual_seed(time)
    qkv = torch.randn(batch, time, 3 * heads * width, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(batch, time, heads * width, dtype=torch.bfloat16)
    found = with_gradient(lambda x: Attention.apply(x, heads), qkv, grad)
    wide = qkv.detach().double().requires_grad_()
    expected = with_gradient(lambda x: attention_of_torch(x, heads), wide, grad.double())
    for one, other, rounding in zip(found, expected, (2**-8, 2**-7), strict=True):  # backward, y is rounded already
        assert one.dtype == torch.bfloat16 and (one - other).norm() <= rounding * other.norm()


@compiler
def test_attention_in_bfloat16_rounds_neither_up_nor_down_on_the_whole():
    torch.manual_seed(0)
    qkv = torch.randn(1, 130, 3 * 192, dtype=torch.bfloat16, requires_grad=True)
    grad, wide = torch.randn(1, 130, 192, dtype=torch.bfloat16), qkv.detach().double().requires_grad_()
    found = with_gradient(lambda x: Attention.apply(x, 3), qkv, grad)
    for one, exact in zip(found, with_gradient(lambda x: attention_of_torch(x, 3), wide, grad.double())):
        assert (one.double() * exact).sum() / exact.square().sum() == pytest.approx(1, abs=3e-4)


@compiler
@pytest.mark.parametrize("size", [0, 1, 7, 8, 1003])
def test_gelu_in_bfloat16_is_as_near_to_the_exact_one_as_torchs(size):
    torch.manual_seed(size)
    x = (3 * torch.randn(size)).bfloat16().requires_grad_()
    grad = torch.randn(size, dtype=torch.bfloat16)
    wide = x.detach().double().requires_grad_()
    exact = with_gradient(lambda x: F.gelu(x, approximate="tanh"), wide, grad.double())
    theirs = with_gradient(lambda x: F.gelu(x, approximate="tanh"), x, grad)
    for found, rival, expected, slack in zip(with_gradient(gelu, x, grad), theirs, exact, (1.01, 1.6), strict=True):
        assert found.dtype == torch.bfloat16  # the slope is rounded, and then the gradient
        assert (found - expected).norm() <= slack * (rival - expected).norm() + 2**-9 * expected.norm() * (size < 10)


@compiler
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 7), (3, 64), (9, 1003)])
def test_cross_entropy_and_its_gradient_are_torchs(rows, columns, dtype):
    torch.manual_seed(columns)
    wide = kernels.wide(dtype)
    logits = 5 * torch.randn(rows, columns + 3).to(dtype)[:, :columns]
    targets, shares = torch.randint(columns, (rows, 1)), torch.rand(rows, 1, dtype=wide)
    exact = logits.to(wide).requires_grad_()
    losses = F.cross_entropy(exact, targets.flatten(), reduction="none").unsqueeze(1)
    (gradient,) = torch.autograd.grad((losses * shares).sum(), exact)
    assert torch.allclose(kernels.cross_entropy_(logits, targets, shares), losses, rtol=1e-5, atol=1e-6)
    assert torch.allclose(logits.to(wide), gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)


@compiler
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.bfloat16])
def test_the_highest_logit_counts_wherever_it_is(dtype):
    logits, shares = torch.zeros(41, 41, dtype=dtype).fill_diagonal_(200), torch.ones(41, 1, dtype=kernels.wide(dtype))
    losses = kernels.cross_entropy_(logits, torch.arange(41).unsqueeze(1), shares)
    assert (losses == 0).all() and (logits.abs() < 1e-30).all()


@compiler
def test_cross_entropy_of_extreme_logits_and_of_what_is_not_a_number():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-200.0, 0.0, -300.0], [math.nan, 0.0, 0.0], [0.0, 0.0, math.nan]])
    targets = torch.tensor([[0], [0], [1], [1]])
    losses = kernels.cross_entropy_(logits, targets, torch.ones(4, 1))
    assert losses[:2].flatten().tolist() == [0.0, 200.0] and losses[2:].isnan().all()
    assert logits[:2].tolist() == [[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]] and logits[2:].isnan().any(1).all()


@compiler
def test_gradcheck_in_float64():
    x = torch.randn(2, 27, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x[0, :5]) and torch.autograd.gradcheck(lambda x: Attention.apply(x, 2), x)
    weight, bias = torch.randn(2, 18, dtype=torch.float64, requires_grad=True).unbind()
    assert torch.autograd.gradcheck(lambda *x: LayerNorm.apply(*x, 1e-5, torch.float64), (x[0, :3], weight, bias))


@compiler
def test_tensors_that_are_not_contiguous():
    torch.manual_seed(0)
    qkv, grad = torch.randn(30, 2, 24, requires_grad=True).transpose(0, 1), torch.randn(8, 30, 2).transpose(0, 2)
    found = with_gradient(lambda x: Attention.apply(x, 2), qkv, grad)
    assert_near(found, with_gradient(lambda x: attention_of_torch(x, 2), qkv, grad), torch.float32)
    x, grad = torch.randn(5, 9, requires_grad=True).t(), torch.randn(5, 9).t()
    assert_near(with_gradient(gelu, x, grad), with_gradient(lambda x: F.gelu(x, approximate="tanh"), x, grad), x.dtype)
    found = with_gradient(lambda x: LayerNorm.apply(x, torch.ones(5), None, 1e-5, x.dtype), x, grad)
    assert_near(found, with_gradient(lambda x: F.layer_norm(x, (5,)), x, grad), x.dtype)


@compiler
def test_extreme_scores_and_activations():
    torch.manual_seed(0)
    qkv, grad = 100 * torch.randn(1, 40, 48, requires_grad=True), torch.randn(1, 40, 16)
    exact = with_gradient(lambda x: attention_of_torch(x, 2), qkv.double(), grad.double())
    ours = with_gradient(lambda x: Attention.apply(x, 2), qkv, grad)
    theirs = with_gradient(lambda x: attention_of_torch(x, 2), qkv, grad)
    for found, rival, expected in zip(ours, theirs, exact):
        assert (found - expected).norm() <= 2 * (rival - expected).norm()
    x = torch.tensor([-1e6, -100.0, -30.0, -0.0, 0.0, 30.0, 100.0, 1e6])
    assert torch.allclose(gelu(x), F.relu(x), atol=1e-30)


@compiler
@pytest.mark.parametrize("part", range(3))
def test_what_is_not_a_number_stays_none(part):
    qkv = torch.randn(1, 50, 3, 2, 8)
    qkv[0, 20, part, 1, 3] = math.nan
    y = Attention.apply(qkv.flatten(2), 2).view(1, 50, 2, 8)
    expected = attention_of_torch(qkv.flatten(2), 2).view(1, 50, 2, 8)
    assert torch.equal(y[:, 20:].isnan(), expected[:, 20:].isnan()) and y.isnan().any()
    assert not (y.isnan() & ~expected.isnan()).any()  # tokens before it: some of torch's are none, by weights of zero
    assert gelu(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]
    x = torch.tensor([[1.0, math.nan], [math.inf, 0.0], [1.0, 2.0]])
    normal = LayerNorm.apply(x, torch.ones(2), None, 1e-5, torch.bfloat16)
    assert normal.isnan().tolist() == [[True, True], [True, True], [False, False]]


@compiler
def test_no_token_sees_a_later_one():
    qkv = torch.randn(1, 50, 48)
    before = Attention.apply(qkv, 2)
    qkv[:, 30:] *= 1000
    after = Attention.apply(qkv, 2)
    assert torch.equal(before[:, :30], after[:, :30]) and (after[:, 30:] != before[:, 30:]).all()
    qkv[:, 40] = math.nan
    y = Attention.apply(qkv.bfloat16(), 2)
    assert y[:, :32].isfinite().all() and y[:, 40:].isnan().all()  # of a block of keys, weights of zero times NaN


def small(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(block_size=40, vocab_size=101, n_layer=3, n_head=3, n_embd=30) | changes))


def results(model, batch=4, seed=0):
    """[loss, gradient of each parameter], of random tokens."""
    tokens = torch.randint(101, (batch, 41), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:], False)[1]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@compiler
@pytest.mark.parametrize("changes", [{}, dict(bias=False), dict(activation_checkpointing=True), dict(dropout=0.3)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_model_has_the_loss_and_the_gradients_of_torchs_operations(plain, changes, dtype):
    found = results(small(**changes).to(dtype))
    plain()
    torch.manual_seed(0)
    expected = results(small(**changes).to(dtype))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7 if dtype == torch.float32 else 1e-13)


@compiler
def test_the_kernels_are_used_where_they_can_be(monkeypatch):
    called = []
    monkeypatch.setattr(kernels, "call", lambda name, tensors, *sizes: called.append(name))
    model, idx = small(), torch.zeros(1, 40, dtype=torch.int64)
    with torch.no_grad():
        model(idx)
    assert called == ["attention", "gelu"] * 3
    called.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(idx)
    assert called == ["layer_norm", "attention", "layer_norm", "gelu"] * 3 + ["layer_norm"]
    called.clear()
    torch.compile(model, backend="eager")(idx)
    assert called == []


def test_tensors_without_memory_are_left_to_torch():
    with FakeTensorMode():
        assert gelu(torch.randn(9)).shape == (9,)


def test_without_a_compiler_torchs_operations_are_used(plain):
    plain()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_norm(torch.randn(4, 33), torch.ones(33), None, 1e-5).dtype == torch.float32
    x = torch.randn(9)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh")) and all(r.isfinite().all() for r in results(small()))


@compiler
def test_training_with_them_differs_by_less_than_a_tenth_of_what_two_seeds_do(plain):
    """After 200 steps, from the same weights and batches."""

    def last_loss(seed):
        model = small(n_layer=1)
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data += 0.01 * torch.randn(p.shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
        losses = []
        for step in range(200):
            losses.append(results(model, batch=2, seed=step % 5)[0].item())
            optimizer.step()
        return sum(losses[-5:]) / 5

    fast, other_seed = last_loss(1), last_loss(2)
    plain()
    assert abs(last_loss(1) - fast) <= abs(other_seed - fast) / 10
