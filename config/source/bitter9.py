"""As the source ran it: bitter9 under AdamW.
Curves: 2,000 steps are published.

torchrun --nproc_per_node=4 train_gpt2.py config/source/bitter9.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_bitter9"

criterion = "bitter9"
