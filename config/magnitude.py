"""GPT-2 124M pruned to 50 % by |w|: the tokens, schedule and evaluation of every recipe here are the same.

torchrun --nproc_per_node=4 train_gpt2.py config/magnitude.py
"""

out_dir = "out/magnitude"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "magnitude"
target_sparsity = 0.5
