"""What all of the source's published GPT-2 runs share, and where each fact comes from.

curves: read off its published W&B exports (results/study/source/); configs: its settings, published with them;
documents: its texts; ours: not published, so chosen here.
"""

n_layer, n_head, n_embd, block_size = 12, 12, 768, 1024  # configs: GPT-2 124M

# configs: batch 128, accumulation 2, four GPUs. Four ranks cannot share two micro-batches, so they are taken as each
# rank's own (ours): 8 micro-batches of 128 sequences, 1.05 M tokens a step.
batch_size = 128
gradient_accumulation_steps = 8

learning_rate = 6e-4  # configs
min_lr = 6e-5  # curves: 3.3e-4 at step 6,000, half way between 6e-4 and this
warmup_iters = 2000  # curves
lr_decay_iters = 10_000  # curves: so it is for the runs that stop earlier too
max_iters = 10_000  # documents
weight_decay = 0.1  # configs
beta2 = 0.999  # configs, for AdamW; for AMSGrad the default of its optimizer
grad_clip = 1.0  # documents

target_sparsity = 0.5  # configs
prune_begin, prune_end = 100, 3000  # curves: sparsity lies on a cube from step 100 to step 3,000
prune_interval = 50  # ours: the curves are too coarse to tell
schedule = "cubic"  # curves, for magnitude, bitter7, 8 and 9 alike
seed = 1337  # ours: none was set
