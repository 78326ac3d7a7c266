"""Whole runs that are compared: what is said of each is what it wrote, dense or pruned."""

from bench.train import compare_runs


def test_of_each_run_its_loss_sparsity_and_tokens_are_told(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"line {number} of a text\n" for number in range(3000)))
    short = ["--max_iters=4", "--warmup_iters=1", "--n_layer=1", "--n_embd=32", "--eval_iters=1", "--batch_size=3"]
    short += ["--lr_decay_begin=0"]
    pruned = ["--prune_begin=1", "--prune_end=4", "--prune_interval=1"]
    recipes = {"dense": [*short, "--criterion=none"], "pruned": [*short, *pruned]}
    found = compare_runs(tmp_path / "text.txt", None, recipes)
    assert {name: row["sparsity"] for name, row in found.items()} == {"dense": 0.0, "pruned": 0.5}
    assert all(row["tokens"] == 4 * 3 * 64 and 0 < row["val_loss"] < 10 for row in found.values())
