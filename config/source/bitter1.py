"""As the source ran it: bitter1 under AdamW.
No curve of it is published; its formula is the documents' (see pruning/criteria.py).

torchrun --nproc_per_node=4 train_gpt2.py config/source/bitter1.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_bitter1"

criterion = "bitter1"
schedule = "linear"  # documents
