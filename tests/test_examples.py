"""Every example, in a short form: it ends, and what it says it prunes is pruned."""

import pytest
import torch
import torch.distributed as dist

from examples import accelerate_loop, bert_finetune, fsdp2, hugging_face_trainer, plain_loop, resnet_images
from tests.conftest import ROOT


def share_of_zeros(model, of=lambda name: True):
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    weights = [
        m.weight
        for name, m in model.named_modules()
        if isinstance(m, kinds) or type(m).__name__ == "Conv1D"
        if of(name)
    ]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def test_plain_loop_in_twenty_lines():
    assert share_of_zeros(plain_loop.main(steps=40)) == pytest.approx(0.9, abs=1e-4)
    source = (ROOT / "examples" / "plain_loop.py").read_text()
    body = [
        line for line in source.partition("def main")[2].partition("if __name__")[0].splitlines()[1:] if line.strip()
    ]
    assert len(body) <= 20


def test_hugging_face_trainer(tmp_path):
    model = hugging_face_trainer.main(steps=16, folder=str(tmp_path))
    weights = [m.weight for m in model.transformer.h.modules() if type(m).__name__ == "Conv1D"]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == round(0.7 * sum(weight.numel() for weight in weights))


def test_accelerate():
    assert share_of_zeros(accelerate_loop.main(steps=24)) == pytest.approx(0.8, abs=1e-4)


def test_resnet_learns_at_90_percent():
    accuracy, model = resnet_images.train("bitter7", seed=0, epochs=3)
    assert share_of_zeros(model) == pytest.approx(0.9, abs=1e-4)
    assert accuracy > 0.5


def test_fsdp2():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sparsity, zeros = fsdp2.main(steps=20)
    finally:
        dist.destroy_process_group()
    assert sparsity == pytest.approx(0.8, abs=1e-4) and zeros == round(0.8 * (3 * 64 * 64 + 64 * 8))


def test_bert_keeps_its_head_dense():
    model = bert_finetune.main(steps=60)
    ids, labels = bert_finetune.batch(64, 16, 60, torch.Generator().manual_seed(2))
    assert (model.eval()(input_ids=ids).logits.argmax(1) == labels).float().mean() > 0.9
    assert share_of_zeros(model.bert.encoder) == pytest.approx(0.6, abs=1e-4)
    assert share_of_zeros(model, lambda name: not name.startswith("bert.encoder")) == 0
