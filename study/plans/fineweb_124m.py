"""The main question as the source asked it: GPT-2 124M on FineWeb-Edu, 2.6 billion tokens a run. Not run yet.

    python prepare_fineweb.py                      # data/fineweb_edu; then write its sha256 into study/data.py
    python -m study.run fineweb_124m --jobs 8      # one run a GPU; --jobs 4 on four

Estimated, not measured: 0.86 GFLOP a token at 45 % of an H100's 989 TFLOP/s are 0.52 M tokens/s, so 1.4 hours a run.
24 runs are 34 GPU-hours: 8.4 hours on four GPUs, 4.2 on eight, and about 85 dollars at 2.50 a GPU-hour on either.
"""

from study.data import FINEWEB_EDU
from study.plans.small import arms as all_arms
from study.plans.small import pairs as all_pairs
from study.scales import GPT2_124M

title = "Criterion × optimizer, GPT-2 124M, 2.6 billion tokens of FineWeb-Edu"
text, seeds = FINEWEB_EDU, (0, 1, 2)
base = GPT2_124M | dict(
    gradient_accumulation_steps=4,
    max_iters=10_000,
    warmup_iters=2000,
    spam_interval=1000,
    eval_interval=500,
    eval_iters=100,
)

WANTED = ("dense-adamw", "dense-adamwspam", "magnitude-adamw-50", "magnitude-adamwspam-50", "bitter7-adamw-50")
WANTED += ("bitter7-adamwspam-50", "magnitude-adamw-90", "bitter7-adamw-90")
arms = {name: all_arms[name] for name in WANTED}
pairs = [pair for pair in all_pairs if set(pair) <= set(arms)]
