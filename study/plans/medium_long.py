"""medium.py with three times the steps: there AMSGrad with resets had not left the plateau of the early losses yet."""

from study.plans.medium import arms, pairs  # noqa: F401
from study.scales import MEDIUM, MEDIUM_TEXT

title = "Criterion × optimizer at 50 %, criterion at 90 %, 4.1 M parameters, three times the steps"
# Warm-up, the resets of SPAM and the ramp keep their share of the run.
longer = {name: 3 * MEDIUM[name] for name in ("max_iters", "warmup_iters", "spam_interval", "eval_interval")}
text, base, seeds = MEDIUM_TEXT, MEDIUM | longer, (0, 1, 2)
