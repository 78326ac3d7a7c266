"""Decoding: a model's tokens one after the other, keys and values of those before kept rather than computed again."""

import torch

from gpt2.errors import UserError


class Past:
    """Keys and values of one layer for the tokens read so far, at most `size` of them."""

    def __init__(self, size):
        self.size, self.length, self.kept = size, 0, None

    def extend(self, k, v):
        """Add k and v, each [batch, heads, time, width]; returns those of all tokens so far.

        ValueError beyond `size`, and where several tokens follow others, which `attend` could not mask rightly."""
        start, end = self.length, self.length + k.shape[2]
        if end > self.size or start and k.shape[2] > 1:
            raise ValueError(
                f"tokens {start} to {end}: expected at most {self.size}, and one at a time after the first"
            )
        self.length = end
        if self.kept is None:
            self.kept = [new.new_empty(*new.shape[:2], self.size, new.shape[3]) for new in (k, v)]
        for old, new in zip(self.kept, (k, v)):
            old[:, :, start:end] = new
        return [old[:, :, :end] for old in self.kept]


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=0, generator=None):
    """Tokens [batch, time], int64, continued by max_new_tokens: [batch, time + max_new_tokens].

    temperature 0 takes the likeliest token; top_k: draw among so many likeliest ones, 0: among all. The model sees the
    last block_size tokens: while all fit, each is read once; beyond, where every token's position moves, the whole
    window is read for each. UserError for a model whose first logits are not finite, as after a training that diverged.
    """
    size, past = model.config.block_size, [Past(model.config.block_size) for _ in model.transformer.h]
    for number in range(max_new_tokens):
        fits = tokens.shape[1] <= size
        hidden = model.features(tokens[:, past[0].length :], past) if fits else model.features(tokens[:, -size:])
        logits = model.head(hidden[:, -1:])[:, 0, : model.config.vocab_size].float()
        if number == 0 and not logits.isfinite().all():
            raise UserError("the model's logits are not finite: its training diverged; take an earlier checkpoint")
        tokens = torch.cat([tokens, draw(logits, temperature, top_k, generator)], dim=1)
    return tokens


def draw(logits, temperature, top_k, generator):
    """A token [batch, 1] for each row of logits [batch, vocab_size], which may be changed."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if 0 < top_k < logits.shape[-1]:
        logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
    below = logits - logits.max(-1, keepdim=True).values  # so that no temperature makes the highest infinite
    return torch.multinomial((below / max(temperature, 1e-30)).softmax(-1), 1, generator=generator)
