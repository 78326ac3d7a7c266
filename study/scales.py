"""The scales at which plans compare: model, data, batch, steps. Shared by the plans of a scale, and by nothing else."""

from study.data import NOVELS, TINY_SHAKESPEARE

# 0.46 M parameters, characters, 0.57 M tokens: 40 seconds of one idle AVX2 thread, 60 on a busy machine.
SMALL_TEXT = TINY_SHAKESPEARE
SMALL = dict(
    n_layer=4,
    n_head=4,
    n_embd=96,
    block_size=64,
    bias=False,
    batch_size=16,
    gradient_accumulation_steps=1,
    max_iters=560,
    learning_rate=6e-3,
    warmup_iters=56,
    beta2=0.99,
    prune_interval=10,
    eval_interval=80,
    eval_iters=40,
    checkpoint_interval=280,
    device="cpu",
    # the source resets every 1,000 of its 10,000 steps
    spam_theta=50.0,
    spam_interval=56,
)

# 4.1 M parameters, characters of novels that are seen once, as many tokens a step as the small scale.
MEDIUM_TEXT = NOVELS
MEDIUM = SMALL | dict(
    n_head=6, n_embd=288, block_size=128, batch_size=8, learning_rate=3e-3, eval_iters=20, checkpoint_interval=140
)

# GPT-2 124M as in config/gpt2_124m.py; bfloat16 and compiled, for all runs of a plan alike.
GPT2_124M = dict(
    batch_size=64,
    gradient_accumulation_steps=2,
    learning_rate=6e-4,
    eval_iters=20,
    checkpoint_interval=500,
    spam_theta=50.0,
    device="cuda",
    dtype="bfloat16",
    compile=True,
)


def crossed(criteria, optimizers, sparsities):
    """Arms "CRITERION-OPTIMIZER-PERCENT" of every combination."""
    return {
        f"{criterion}-{optimizer}-{round(100 * sparsity)}": dict(
            criterion=criterion, optimizer=optimizer, target_sparsity=sparsity
        )
        for sparsity in sparsities
        for optimizer in optimizers
        for criterion in criteria
    }
