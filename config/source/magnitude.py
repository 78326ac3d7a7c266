"""As the source ran it: the baseline of the 15.6 %: magnitude under AMSGrad with SPAM.
Curves: 5,000 steps are published, of 10,000.

torchrun --nproc_per_node=4 train_gpt2.py config/source/magnitude.py
"""

from config.source.common import *  # noqa: F403

out_dir = "out/source_magnitude"

criterion = "magnitude"
optimizer = "adamwspam"  # the folder's name: adamwspam_magnitude_50
spam_theta = 50.0  # configs
spam_interval = 1000  # configs
spam_warmup_steps = 0  # ours: not published
