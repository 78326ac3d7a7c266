"""GPT-2 124M pruned to 50 % by bitter2 (see pruning/criteria.py): all else as in the other recipes here.

torchrun --nproc_per_node=4 train_gpt2.py config/bitter2.py
"""

out_dir = "out/bitter2"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "bitter2"
target_sparsity = 0.5
