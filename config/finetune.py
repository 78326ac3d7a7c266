"""GPT-2 small fine-tuned on a text of one's own and pruned to 50 % on the way; of a sparse model the zeros stay.

python prepare_fineweb.py --input input.txt --val_tokens 30_000 --out_dir data/finetune
python train_gpt2.py config/finetune.py                                # from Hugging Face's gpt2
python train_gpt2.py config/finetune.py --init_from=out/bitter7        # from a run, a checkpoint, an export
python train_gpt2.py config/finetune.py --init_from=gpt2-xl
"""

init_from = "gpt2"
out_dir = "out/finetune"
data_dir = "data/finetune"

batch_size = 4
gradient_accumulation_steps = 8
max_iters = 400
learning_rate = 3e-5
warmup_iters = 20
dropout = 0.1

criterion = "bitter7"
target_sparsity = 0.5

eval_interval = 50
checkpoint_interval = 100
