"""nanoGPT's CPU quickstart, TinyShakespeare by characters, at its model's size and pruned to 50 % with bitter7.

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

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 1000
learning_rate = 6e-3
warmup_iters = 100
beta2 = 0.99

criterion = "bitter7"
target_sparsity = 0.5
prune_begin = 100
prune_end = 600

eval_interval = 500
eval_iters = 100
log_interval = 50
