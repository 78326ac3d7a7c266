"""The main question at nine times the parameters, on text that is seen once: the arms and pairs of small.py."""

from study.plans.small import arms, pairs  # noqa: F401
from study.scales import MEDIUM, MEDIUM_TEXT

title = "Criterion × optimizer × sparsity, 4.1 M parameters"
text, base, seeds = MEDIUM_TEXT, MEDIUM, (0, 1, 2, 3, 4)
