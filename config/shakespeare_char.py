"""nanoGPT's CPU quickstart, TinyShakespeare by characters, at its model's size: below its loss in 0.6 of its tokens,
and pruned to 50 % with bitter7.

python prepare_fineweb.py --input input.txt --tokenizer char --val_tokens 111539 --out_dir data/shakespeare_char
python train_gpt2.py config/shakespeare_char.py
"""

out_dir = "out/shakespeare_char"
data_dir = "data/shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
bias = False

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 460
learning_rate = 1.2e-2
warmup_iters = 50
lr_schedule = "linear"  # held until the pruning ends
lr_decay_begin = 300
min_lr = 0.0
beta2 = 0.99

criterion = "bitter7"
target_sparsity = 0.5
prune_begin = 50
prune_end = 300

eval_interval = 230
eval_iters = 50
log_interval = 20
