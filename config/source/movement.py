"""As the source ran it: movement pruning.
Documents; no curve of it is published.

torchrun --nproc_per_node=4 train_gpt2.py config/source/movement.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_movement"

criterion = "movement"
schedule = "linear"  # documents
