"""The machinery in a minute: a planted difference and an A/A pair, on the King James Bible. No finding."""

from study.data import KING_JAMES

title = "Smoke test: does the machinery see a planted difference, and none where there is none?"
text = KING_JAMES
base = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=12,
    gradient_accumulation_steps=1,
    max_iters=100,
    learning_rate=2e-2,
    warmup_iters=10,
    beta2=0.99,
    eval_interval=25,
    eval_iters=20,
    checkpoint_interval=25,
    prune_interval=5,
    device="cpu",
)
arms = {
    "magnitude": dict(criterion="magnitude", target_sparsity=0.8),
    # a thousandth more weight decay does nothing, but the rounding takes another course
    "magnitude_again": dict(criterion="magnitude", target_sparsity=0.8, weight_decay=0.1001),
    "slow": dict(criterion="magnitude", target_sparsity=0.8, learning_rate=2e-4),
}
seeds = (0, 1, 2)
pairs = [("slow", "magnitude"), ("magnitude_again", "magnitude")]
