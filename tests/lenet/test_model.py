"""The fast LeNet-5 is the plain one: same function, same gradients, same running statistics."""

import pytest
import torch
import torch.nn.functional as F

from gpt2.parallel import has_compiler
from lenet.model import LeNet5
from tests.lenet.plain import Plain


def pair():
    """A LeNet5 and a Plain with the same weights, in double precision; some scales of the normalisation are negative or
    zero."""
    torch.manual_seed(0)
    fast, plain = LeNet5().double(), Plain().double()
    with torch.no_grad():
        for norm in (fast.norm1, fast.norm2):
            norm.weight.copy_(torch.randn_like(norm.weight))
            norm.bias.copy_(torch.randn_like(norm.bias))
        fast.conv1.weight[2, 0, 1:3] = 0
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def test_it_has_61750_parameters():
    assert sum(p.numel() for p in LeNet5().parameters()) == 61_750


def test_training_takes_the_same_steps_as_the_plain_network():
    fast, plain = pair()
    optimizers = [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9) for model in (fast, plain)]
    for step in range(5):
        images, labels = torch.randn(64, 1, 32, 32, dtype=torch.float64), torch.randint(10, (64,))
        for model, optimizer in zip((fast, plain), optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        for (name, a), b in zip(fast.named_parameters(), plain.parameters()):
            if name not in ("conv1.bias", "conv2.bias"):  # zero but for rounding: the normalisation takes the mean away
                assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12), (step, name)
            else:
                assert a.grad.abs().max() < 1e-12 and b.grad.abs().max() < 1e-12
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(fast.state_dict().items(), plain.state_dict().values()):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name
    fast.eval(), plain.eval()
    images = torch.randn(9, 1, 32, 32, dtype=torch.float64)
    assert torch.allclose(fast(images), plain(images), rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler and Python's headers")
def test_compiled_it_takes_the_same_steps():
    fast, plain = pair()
    fast.conv1.weight.data[4] = 0  # all phases tie: the first takes the gradient
    plain.load_state_dict(fast.state_dict())
    images, labels = torch.randn(32, 1, 32, 32, dtype=torch.float64), torch.randint(10, (32,))
    for forward in (torch.compile(fast, dynamic=False), plain):
        F.cross_entropy(forward(images), labels).backward()
    for (name, a), b in zip(fast.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("training", [True, False])
def test_in_float32_they_agree_within_rounding(training):
    fast, plain = (model.float().train(training) for model in pair())
    images = torch.randn(128, 1, 32, 32)
    assert torch.allclose(fast(images), plain(images), rtol=1e-4, atol=1e-4)
