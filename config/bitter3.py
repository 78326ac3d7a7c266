"""GPT-2 124M pruned to 50 % by bitter3 (see pruning/criteria.py): all else as in the other recipes here.

torchrun --nproc_per_node=4 train_gpt2.py config/bitter3.py
"""

out_dir = "out/bitter3"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "bitter3"
target_sparsity = 0.5
