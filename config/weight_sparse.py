"""The recipe of weight-sparse transformers (Gao et al. 2025, arXiv:2511.13653), as far as it fits: after each AdamW
step every matrix keeps the same share of its weights, the largest in magnitude, and that share is annealed over half of
the training.

What does not fit: there, a weight that was dropped goes on getting gradients and may come back, and embeddings, biases
and activations are sparse too. Here what is pruned stays so, in the matrices of attention and MLP. Their models keep
one weight in a thousand; a GPT-2 of this size learns little at that, so the target is 99 %. Tried small: 2 layers, 64
wide, 400 steps of 1,024 characters of TinyShakespeare, prune_end=200: every matrix ends at 99 %, val_loss 2.53.

python train_gpt2.py config/weight_sparse.py
"""

out_dir = "out/weight_sparse"

batch_size = 64
gradient_accumulation_steps = 8

criterion = "magnitude"
allocation = "uniform"
schedule = "linear"
target_sparsity = 0.99
prune_begin = 1
prune_end = 9536
prune_interval = 1
