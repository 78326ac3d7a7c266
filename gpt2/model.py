"""GPT-2 (Radford et al. 2019), with the parameter names of nanoGPT and the numbers of the published model."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from gpt2 import kernels
from gpt2.loss import IGNORED, chunking_pays, linear_cross_entropy, padded


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model; the defaults are GPT-2 small, 124,439,808 parameters.

    activation_checkpointing: keep the input of each block alone, and compute the rest of the block again backward.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    activation_checkpointing: bool = False


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} is not divisible by n_head={config.n_head}")
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, past=None):
        qkv, dropout = self.c_attn(x), self.dropout if self.training else 0.0
        if not (past and past.length) and not dropout and kernels.usable(qkv):
            if past:
                past.extend(*self.heads(qkv)[1:])
            return self.c_proj(kernels.Attention.apply(qkv, self.n_head))
        q, k, v = self.heads(qkv)
        if past:
            k, v = past.extend(k, v)
        y = attend(q, k, v, dropout)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(x.shape)), self.dropout, self.training)

    def heads(self, qkv):
        """q, k and v, each [batch, heads, time, width of a head]."""
        shape = (*qkv.shape[:2], self.n_head, qkv.shape[2] // (3 * self.n_head))
        return [part.view(shape).transpose(1, 2) for part in qkv.split(qkv.shape[2] // 3, dim=2)]


def attend(q, k, v, dropout):
    """Causal attention of q, k, v, each [batch, heads, time, width of a head]; q may be the last token alone.

    The CPU's bfloat16 kernel takes up to four times as long backward as the float32 one on short contexts (torch 2.13,
    AVX-512), so there, attention alone is computed in float32.
    """
    causal = q.shape[2] > 1
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.shape[2] <= 512:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), dropout_p=dropout, is_causal=causal
            ).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(kernels.gelu(self.c_fc(x)))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.recompute = config.activation_checkpointing

    def forward(self, x, past=None):
        if self.recompute and self.training:
            return checkpoint(self.compute, x, use_reentrant=False)
        return self.compute(x, past)

    def compute(self, x, past=None):
        x = x + self.attn(self.ln_1(x), past)
        return x + self.mlp(self.ln_2(x))


def initialise(module, n_layer, generator=None):
    """GPT-2's: normal, std 0.02, and for what writes to the residual stream 0.02 / sqrt(number of such layers)."""
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2:
            residual = name.endswith("c_proj.weight")
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * n_layer) if residual else 0.02, generator=generator)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)


class GPT(nn.Module):
    """`GPT(config)(idx, targets=None) -> (logits, loss)`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        initialise(self, config.n_layer)

    def materialise(self, seed):
        """Give a model that was made on the meta device its weights, drawn from `seed`, in host memory.

        Yields each part (an embedding, a block, the last normalisation) as soon as it has them: who shards it then
        never holds two blocks whole. The numbers are the same on every device and however the model is spread.
        """
        generator = torch.Generator().manual_seed(seed)
        wte, wpe, blocks, ln_f = self.transformer.values()
        for part in (wte, wpe, *blocks, ln_f):
            part.to_empty(device="cpu")
            initialise(part, self.config.n_layer, generator)
            if part is wte:
                self.lm_head.weight = wte.weight
            yield part

    def forward(self, idx, targets=None, with_logits=True):
        """idx: int64 [batch, time], time <= block_size; targets: the same shape, -1 where none is to be predicted.

        Returns (logits, loss): logits [batch, time, vocab_size] in the dtype of the computation, loss the mean cross
        entropy in nats as a float32 scalar, or None without targets. ValueError where time > block_size.
        with_logits=False gives (None, loss), which saves time and memory: the logits are the largest tensor of
        training, and as an output of a compiled model they would cost a gradient of zeros besides.
        """
        x = self.features(idx)
        if not with_logits and chunking_pays(self.config.vocab_size, x.device):
            return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        return logits if with_logits else None, loss

    def features(self, idx, past=None):
        """The final hidden states, [batch, time, n_embd], that `head` turns into logits.

        past: a decode.Past a block, of the tokens before idx; then idx is their first tokens, or one more.
        """
        first = past[0].length if past else 0
        if first + idx.shape[1] > self.config.block_size:
            raise ValueError(f"{first + idx.shape[1]} tokens do not fit into block_size={self.config.block_size}")
        position = torch.arange(first, first + idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)
        x = F.dropout(x, self.config.dropout, self.training)
        for block, its_past in zip(self.transformer.h, past or [None] * len(self.transformer.h)):
            x = block(x, its_past)
        return self.transformer.ln_f(x)

    def head(self, x):
        """Logits of the hidden states x, [..., n_embd] -> [..., vocab_size].

        GPU matrix units want multiples of 64 columns, so there the vocabulary is padded, for this product alone: no
        parameter, gradient, loss or file ever sees the padding.
        """
        padding = self.padding(x.device)
        if not padding:
            return self.lm_head(x)
        return F.linear(x, F.pad(self.lm_head.weight, (0, 0, 0, padding)))[..., : self.config.vocab_size]

    def padding(self, device):
        return padded(self.config.vocab_size) - self.config.vocab_size if device.type == "cuda" else 0

    def flops_per_token(self):
        """Of a training step (forward and backward): 6 a weight, position embedding aside, and 12·width·context a layer
        for attention (Chowdhery et al. 2022, PaLM, appendix B). Pruned weights count: dense kernels multiply zeros too.
        """
        weights = sum(p.numel() for p in self.parameters()) - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size

    def tensors(self):
        """name -> parameter, the tied head once (as transformer.wte.weight): what a checkpoint holds."""
        return dict(self.named_parameters())
