"""GPT-2 124M pruned to 50 % by movement (see pruning/criteria.py): all else as in the other recipes here.

torchrun --nproc_per_node=4 train_gpt2.py config/movement.py
"""

out_dir = "out/movement"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "movement"
target_sparsity = 0.5
