"""GPT-2 124M, dense, on 10 billion tokens of FineWeb-Edu: the options' defaults, with the micro-batch for 80 GB.

torchrun --nproc_per_node=8 train_gpt2.py config/gpt2_124m.py
"""

out_dir = "out/gpt2_124m"

batch_size = 64
gradient_accumulation_steps = 8
