"""As the source ran it: GPT-2 124M dense.
Documents: the base of the comparison; no curve of it is published.

torchrun --nproc_per_node=4 train_gpt2.py config/source/dense.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_dense"

criterion = "none"
del target_sparsity, schedule, prune_begin, prune_end, prune_interval  # noqa: F821
