"""A BERT pruned while it is fine-tuned: python examples/bert_finetune.py [MODEL]

MODEL is a name or folder for from_pretrained ("bert-base-uncased"); without one, a small BERT starts from nothing, so
that the example needs no network. The task is made up: is one certain token among the others, wherever it stands?
"""

import sys

import torch
import transformers

from pruning import Pruner

WANTED = 5


def batch(size, length, vocab_size, generator):
    """(tokens [size, length], labels [size]): every other row holds the token WANTED, somewhere."""
    ids = torch.randint(WANTED + 1, vocab_size, (size, length), generator=generator)
    labels = torch.arange(size) % 2
    places = torch.randint(length, (size,), generator=generator)
    ids[labels == 1, places[labels == 1]] = WANTED
    return ids, labels


def make_model(name):
    if name:
        return transformers.AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = transformers.BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)
    return transformers.BertForSequenceClassification(config)


def in_encoder(name, parameter):
    """The matrices of the encoder; the head and the pooler are new and small: they stay dense."""
    return ".encoder." in name and "LayerNorm" not in name and not name.endswith("bias")


def main(name=None, steps=300):
    torch.manual_seed(0)
    model, generator = make_model(name), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5 if name else 1e-3, weight_decay=0.01)
    when = dict(begin=steps // 4, end=steps * 3 // 4, interval=10)
    pruner = Pruner(model, optimizer, "bitter7", target_sparsity=0.6, prunable=in_encoder, **when)
    for step in range(1, steps + 1):
        ids, labels = batch(32, 16, model.config.vocab_size, generator)
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        pruner.mask_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        if step % max(1, steps // 6) == 0:
            right = (output.logits.argmax(1) == labels).float().mean()
            print(f"step {step}: loss {output.loss.item():.3f}  accuracy {right:.2f}  sparsity {pruner.sparsity:.2f}")
    return model


if __name__ == "__main__":
    main(*sys.argv[1:2])
