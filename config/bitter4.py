"""GPT-2 124M pruned to 50 % by bitter4 (see pruning/criteria.py): all else as in the other recipes here.

torchrun --nproc_per_node=4 train_gpt2.py config/bitter4.py
"""

out_dir = "out/bitter4"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "bitter4"
target_sparsity = 0.5
allocation = "layer_adaptive"
