"""The main question at nine times the parameters, on text that is seen once: what small.py answered, and no more."""

from study.plans.small import arms as all_arms
from study.plans.small import pairs as all_pairs
from study.scales import MEDIUM, MEDIUM_TEXT

title = "Criterion × optimizer at 50 %, criterion at 90 %, 4.1 M parameters"
text, base, seeds = MEDIUM_TEXT, MEDIUM, (0, 1, 2, 3, 4)

WANTED = ("magnitude-adamw-50", "magnitude-adamwspam-50", "bitter7-adamw-50")
WANTED += ("magnitude-adamw-90", "bitter7-adamw-90", "variance_quarter-adamw-90")
arms = {name: all_arms[name] for name in WANTED}
pairs = [pair for pair in all_pairs if set(pair) <= set(arms)]
