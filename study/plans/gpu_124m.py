"""The main question at GPT-2's size, on the novels' GPT-2 tokens, in calls of ten minutes. Not run yet.

    python -m study.run gpu_124m --minutes 9 --jobs 1      # again and again, until it has nothing to do

39 M tokens a run, two epochs of the novels. Estimated, not measured: about 3 minutes of an H100 a run, three a call.
"""

from study.data import NOVELS_GPT2
from study.plans.small import arms as all_arms
from study.plans.small import pairs as all_pairs
from study.scales import GPT2_124M

title = "Criterion × optimizer × sparsity, GPT-2 124M, two epochs of the novels"
text, seeds = NOVELS_GPT2, (0, 1, 2)
base = GPT2_124M | dict(max_iters=300, warmup_iters=30, spam_interval=30, eval_interval=60, checkpoint_interval=60)

KEPT = ("dense-", "magnitude-", "bitter7-", "variance_quarter-")
arms = {
    name: own for name, own in all_arms.items() if name.startswith(KEPT) and "-75" not in name and "again" not in name
}
pairs = [pair for pair in all_pairs if set(pair) <= set(arms)]
