"""What small_recipe found, on fresh seeds: a rate held until the ramp ends, and one that grows as matrices thin out.

Written after the tuning seeds 100 and 101, before any of these runs. The dense model has the held rate too, and once
the very rates that the matrices of a run to 90 % get: is it sparsity that wants them, or every model?
"""

from study.scales import SMALL, SMALL_TEXT

title = "Candidates on fresh seeds, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (200, 201, 202, 203, 204)

CRITERIA = {"magnitude": dict(criterion="magnitude"), "quarter": dict(criterion="variance_quarter")}
HELD = dict(lr_schedule="linear", lr_decay_begin=420, min_lr=0.0)  # prune_end, in all arms
DENSITY = {"change": ("density_lr", {"power": 1.0, "most": 4.0})}
arms = {
    "held-dense": HELD,
    "held-dense-same_rates": HELD | {"change": ("scheduled_lr", {"target": 0.9, "power": 1.0, "most": 4.0})},
    **{f"held-{name}-density_lr-90": own | HELD | DENSITY | {"target_sparsity": 0.9} for name, own in CRITERIA.items()},
    **{f"held-{name}-90": own | HELD | {"target_sparsity": 0.9} for name, own in CRITERIA.items()},
    "dense": {},
    **{f"{name}-90": own | {"target_sparsity": 0.9} for name, own in CRITERIA.items()},
    **{
        f"held-{name}-density_lr-75": own | HELD | DENSITY | {"target_sparsity": 0.75} for name, own in CRITERIA.items()
    },
    **{f"held-{name}-75": own | HELD | {"target_sparsity": 0.75} for name, own in CRITERIA.items()},
}
pairs = [
    ("held-dense", "dense"),
    ("held-magnitude-90", "magnitude-90"),
    ("quarter-90", "magnitude-90"),
    ("held-dense-same_rates", "held-dense"),
    ("held-quarter-density_lr-90", "held-dense"),
    *((f"held-quarter-{percent}", f"held-magnitude-{percent}") for percent in (90, 75)),
    *((f"held-magnitude-density_lr-{percent}", f"held-magnitude-{percent}") for percent in (90, 75)),
    *((f"held-quarter-density_lr-{percent}", f"held-magnitude-{percent}") for percent in (90, 75)),
    *((f"held-quarter-density_lr-{percent}", f"held-magnitude-density_lr-{percent}") for percent in (90, 75)),
]
