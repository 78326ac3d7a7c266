"""As the source ran it: bitter7 under AdamW.
Curves: all 7,000 steps are published.

torchrun --nproc_per_node=4 train_gpt2.py config/source/bitter7.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_bitter7"

criterion = "bitter7"
max_iters = 7_000  # documents
