"""The search for a recipe that beats magnitude + gmp at the small scale, one change at a time. Seeds 100 to 102 tune;
what looks best is confirmed by small_confirm on fresh ones."""

from study.scales import SMALL, SMALL_TEXT

title = "One change at a time, tuning seeds, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (100, 101, 102)

QUARTER = dict(criterion="variance_quarter")
HELD = {"change": ("hold_linear", {})}
HELD_AND = {
    "rate-2": HELD | dict(learning_rate=1.2e-2),
    "density_lr-half-2": {"change": ("held_density_lr", {"power": 0.5, "most": 2.0})},
    "density_lr-one-4": {"change": ("held_density_lr", {"power": 1.0, "most": 4.0})},
}
CHANGES = {
    "magnitude": dict(criterion="magnitude"),
    "quarter": QUARTER,
    "half": dict(criterion="variance_half"),
    "density_lr-half-2": QUARTER | {"change": ("density_lr", {"power": 0.5, "most": 2.0})},
    "density_lr-half-4": QUARTER | {"change": ("density_lr", {"power": 0.5, "most": 4.0})},
    "density_lr-one-4": QUARTER | {"change": ("density_lr", {"power": 1.0, "most": 4.0})},
    # is it the criterion, or the rate alone? and is a higher rate for everything as good?
    "magnitude-density_lr-one-4": dict(criterion="magnitude") | {"change": ("density_lr", {"power": 1.0, "most": 4.0})},
    "magnitude-rate-2": dict(criterion="magnitude", learning_rate=1.2e-2),
    "quarter-rate-2": QUARTER | dict(learning_rate=1.2e-2),
    "held-magnitude": dict(criterion="magnitude") | HELD,
    "held-quarter": QUARTER | HELD,
    # held, and together with another change
    **{
        f"held-{name}-{change}": criterion | own
        for name, criterion in (("magnitude", dict(criterion="magnitude")), ("quarter", QUARTER))
        for change, own in HELD_AND.items()
    },
    "averaged": QUARTER | {"change": ("averaged", {})},
    "extra_decay": QUARTER | {"change": ("extra_decay", {"decay": 1.0})},
    "regrow-1": QUARTER | {"change": ("regrow", {"drop_fraction": 0.01})},
    "regrow-5": QUARTER | {"change": ("regrow", {"drop_fraction": 0.05})},
    "floor-5": QUARTER | {"change": ("density_floor", {"floor": 0.05})},
    "ramp-early": QUARTER | dict(prune_begin=56, prune_end=280),
    "ramp-late": QUARTER | dict(prune_begin=140, prune_end=504),
    "interval-2": QUARTER | dict(prune_interval=2),
    "interval-40": QUARTER | dict(prune_interval=40),
}
arms = {
    "dense": {},
    "dense-rate-2": dict(learning_rate=1.2e-2),
    "held-dense": HELD,
    "held-dense-rate-2": HELD | dict(learning_rate=1.2e-2),
    **{f"{name}-{round(100 * s)}": own | {"target_sparsity": s} for s in (0.9, 0.75) for name, own in CHANGES.items()},
}
OF_MAGNITUDE = ("quarter", "half", "magnitude-density_lr-one-4", "magnitude-rate-2")
HELD_MAGNITUDE = [name for name in CHANGES if name.startswith("held-") and name != "held-magnitude"]
OF_QUARTER = [name for name in CHANGES if name not in ("magnitude", *OF_MAGNITUDE) and not name.startswith("held-")]
pairs = [
    ("dense-rate-2", "dense"),
    ("held-dense", "dense"),
    ("held-dense-rate-2", "held-dense"),
    *((f"density_lr-one-4-{percent}", f"magnitude-density_lr-one-4-{percent}") for percent in (90, 75)),
    *(
        (f"{name}-{percent}", f"{against}-{percent}")
        for percent in (90, 75)
        for names, against in ((OF_MAGNITUDE, "magnitude"), (OF_QUARTER, "quarter"), (HELD_MAGNITUDE, "held-magnitude"))
        for name in names
    ),
]
