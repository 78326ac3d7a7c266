"""A character GPT of 0.8 million parameters that learns the King James Bible and is pruned to 50 % on the way: a
minute or two on two CPU cores, and everything that a large run does."""

out_dir = "out/quickstart"
data_dir = "data/quickstart"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 400
learning_rate = 8e-3
warmup_iters = 40
lr_schedule = "linear"  # held until the pruning ends
lr_decay_begin = 300
min_lr = 0.0
beta2 = 0.99

criterion = "bitter7"
target_sparsity = 0.5

eval_interval = 100
checkpoint_interval = 100
