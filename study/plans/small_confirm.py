"""The candidates of small_recipe on fresh seeds, alone and together: what is lower here is a finding."""

from study.scales import SMALL, SMALL_TEXT

title = "Candidates on fresh seeds, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (200, 201, 202, 203, 204)

QUARTER = dict(criterion="variance_quarter")
FASTER = {"power": 0.5, "most": 2.0}
CANDIDATES = {
    "magnitude": dict(criterion="magnitude"),
    "held-magnitude": dict(criterion="magnitude", change=("hold_linear", {})),
    "quarter": QUARTER,
    "density_lr": QUARTER | {"change": ("density_lr", FASTER)},
    "held-quarter": QUARTER | {"change": ("hold_linear", {})},
    "together": QUARTER | {"change": ("held_density_lr", FASTER)},
}
arms = {
    "dense": {},
    "held-dense": {"change": ("hold_linear", {})},
    **{
        f"{name}-{round(100 * s)}": own | {"target_sparsity": s}
        for s in (0.9, 0.75)
        for name, own in CANDIDATES.items()
    },
}
pairs = [
    ("held-dense", "dense"),
    *((f"{name}-{percent}", f"magnitude-{percent}") for percent in (90, 75) for name in ("quarter", "density_lr")),
    *(
        (f"{name}-{percent}", f"held-magnitude-{percent}")
        for percent in (90, 75)
        for name in ("held-quarter", "together")
    ),
]
