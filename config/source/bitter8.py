"""As the source ran it: bitter8 under AdamW.
Curves: 2,000 steps are published.

torchrun --nproc_per_node=4 train_gpt2.py config/source/bitter8.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_bitter8"

criterion = "bitter8"
# the run stops before its ramp to 50 % at step 3,000 does: there the cube stands at 28.34 %
target_sparsity = 0.2834
prune_end = 2_500
max_iters = 2_500  # documents
