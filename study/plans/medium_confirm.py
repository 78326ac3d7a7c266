"""The recipe that small_confirm confirmed, at nine times the parameters: beside magnitude and dense at its rates."""

from study.plans.small_confirm import arms as all_arms
from study.plans.small_confirm import pairs as all_pairs
from study.scales import MEDIUM, MEDIUM_TEXT

title = "The recipe on fresh seeds, 4.1 M parameters"
text, base, seeds = MEDIUM_TEXT, MEDIUM, (200, 201, 202, 203, 204)

# held-quarter-90 joined after the first seed, whose density_lr had not done what it did in small.
WANTED = ("held-magnitude-90", "held-quarter-density_lr-90", "held-dense", "held-quarter-90")
arms = {name: all_arms[name] for name in WANTED}
pairs = [pair for pair in all_pairs if set(pair) <= set(arms)]
