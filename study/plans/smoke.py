"""The machinery in a minute: two criteria, one planted difference, an A/A pair, on the King James Bible. No finding."""

from study.data import KING_JAMES

title = "Smoke test: does the machinery see a planted difference, and none where there is none?"
text = KING_JAMES
base = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=16,
    gradient_accumulation_steps=1,
    max_iters=60,
    learning_rate=1e-2,
    warmup_iters=6,
    beta2=0.99,
    eval_interval=20,
    eval_iters=8,
    checkpoint_interval=20,
    prune_interval=5,
    device="cpu",
)
arms = {
    "magnitude": dict(criterion="magnitude", target_sparsity=0.8),
    "magnitude_again": dict(criterion="bitter1", target_sparsity=0.8),
    "random": dict(criterion="random", target_sparsity=0.8),
}
seeds = (0, 1, 2)
pairs = [("random", "magnitude"), ("magnitude_again", "magnitude")]
