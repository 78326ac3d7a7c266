"""GPT-2 124M pruned to 50 % by bitter7, |w|·(v + 1e-8)^¼ with Adam's second moment v; all else as in the other recipes.

torchrun --nproc_per_node=4 train_gpt2.py config/bitter7.py
"""

out_dir = "out/bitter7"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "bitter7"
target_sparsity = 0.5
