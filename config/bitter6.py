"""GPT-2 124M pruned to 50 % by bitter6 (see pruning/criteria.py): all else as in the other recipes here.

torchrun --nproc_per_node=4 train_gpt2.py config/bitter6.py
"""

out_dir = "out/bitter6"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "bitter6"
target_sparsity = 0.5
