"""The candidates of small_recipe at nine times the parameters: the arms and pairs of small_confirm.py."""

from study.plans.small_confirm import arms, pairs  # noqa: F401
from study.scales import MEDIUM, MEDIUM_TEXT

title = "Candidates on fresh seeds, 4.1 M parameters"
text, base, seeds = MEDIUM_TEXT, MEDIUM, (200, 201, 202, 203, 204)
