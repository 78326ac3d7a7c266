"""GPT-2 124M pruned to 50 % by the recipe that loses least so far; docs/study.md grades the evidence: read it first.

|w|·v^¼ without an absolute eps, ranked over all layers, on the gmp ramp from 25 % to 75 % of the training, under AdamW.
What is known comes from models of 0.5 M parameters; nothing here has been confirmed at 124 M yet. Where the evidence
is "no difference shown", magnitude is as good: --criterion=magnitude.

torchrun --nproc_per_node=4 train_gpt2.py config/recommended.py
"""

out_dir = "out/recommended"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "variance_quarter"
target_sparsity = 0.5
schedule = "gmp"
allocation = "global"
