"""Silent faults are seen: one flipped bit, one different gradient, one replica apart from the others."""

import pytest
import torch

from gpt2 import silent
from gpt2.errors import UserError
from gpt2.model import GPT, GPTConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_flipped_bit_changes_the_fingerprint(dtype):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (1,), (7,), (5, 3), (16, 9), (2, 3, 4), (0, 4)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    before = silent.fingerprint(tensors)
    assert torch.equal(before, silent.fingerprint([tensor.clone() for tensor in tensors]))
    bits = silent.BITS[tensors[0].element_size()]
    for _ in range(100):
        which = int(torch.randint(len(shapes) - 1, (), generator=generator))
        flat = tensors[which].view(-1).view(bits)
        place = int(torch.randint(flat.numel(), (), generator=generator))
        bit = int(torch.randint(8 * tensors[0].element_size(), (), generator=generator))
        flipped = flat[place] ^ torch.tensor(1 << bit if bit < 63 else -(2**63)).to(bits)
        kept, flat[place] = flat[place].clone(), flipped
        differs = silent.fingerprint(tensors) != before
        assert differs.nonzero().flatten().tolist() == [which]
        flat[place] = kept


def test_rows_in_another_order_change_it():
    tensor = torch.arange(12.0).view(4, 3)
    assert silent.fingerprint([tensor]) != silent.fingerprint([tensor[[1, 0, 2, 3]]])


def model_and_loss():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16))
    tokens = torch.randint(11, (2, 9))
    return model, lambda step: model(tokens[:, :-1], tokens[:, 1:])[1]


def look(model, loss_of, exact=True):
    silent.check(30, model, model, loss_of, (40,), exact, torch.tensor(1.0))


def test_a_healthy_machine_passes_and_no_gradients_stay():
    model, loss_of = model_and_loss()
    look(model, loss_of)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_micro_batch_that_differs_the_second_time_is_said(what):
    model, loss_of = model_and_loss()
    times = iter(range(9))
    weight = model.transformer.h[1].mlp.c_fc.weight

    def other_loss(step):
        loss = loss_of(step)
        return loss + 1e-6 * next(times)

    def other_gradient(gradient):
        gradient = gradient.clone()
        gradient[3, 5] *= 1 + 1e-6 * next(times)
        return gradient

    if what == "gradient":
        weight.register_hook(other_gradient)
        look(model, loss_of, exact=False)
    with pytest.raises(UserError, match=r"step 40: rank 0 computed a micro-batch twice.*step 30"):
        look(model, other_loss if what == "loss" else loss_of)


@pytest.mark.parametrize(
    "values, odd", [([5, 5, 7, 5], [2]), ([7, 5, 5], [0]), ([5, 7], [0, 1]), ([5, 5, 7, 7], [0, 1, 2, 3]), ([5], [])]
)
def test_the_replica_that_is_alone_is_the_odd_one(values, odd):
    assert silent.odd_ones(values) == odd
