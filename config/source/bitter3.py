"""As the source ran it: bitter3 under AdamW.
No curve of it is published; its formula is the documents' (see pruning/criteria.py).

torchrun --nproc_per_node=4 train_gpt2.py config/source/bitter3.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_bitter3"

criterion = "bitter3"
schedule = "cubic"  # documents
max_iters = 13_000  # documents (+30 %)
