"""Every system of the source once, and what the library has beside them, at the small scale."""

from study.scales import SMALL, SMALL_TEXT

title = "All criteria, allocations, schedules and methods, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (0, 1, 2)

ALONE = (
    "bitter0",
    "bitter3",
    "bitter5",
    "bitter5_turned",
    "bitter6",
    "bitter7",
    "bitter8",
    "bitter9",
    "bitter9_turned",
)
ALONE += ("variance_quarter", "variance_half", "variance_within", "movement", "random")
SYSTEMS = {
    "magnitude": dict(criterion="magnitude"),
    **{criterion: dict(criterion=criterion) for criterion in ALONE},
    "bitter4": dict(criterion="bitter4", allocation="layer_adaptive", schedule="cubic"),
    "uniform": dict(criterion="magnitude", allocation="uniform"),
    "erk": dict(criterion="magnitude", allocation="erk"),
    "linear": dict(criterion="magnitude", schedule="linear"),
    "cubic": dict(criterion="magnitude", schedule="cubic"),
    "oneshot": dict(criterion="magnitude", schedule="oneshot"),
    "regrow": dict(criterion="magnitude", change=("regrow", {})),
    "straight_through": dict(criterion="magnitude", change=("straight_through", {})),
}
arms = {
    "dense": {},
    # as many parameters as the pruned runs have on average over their steps (Jin et al. 2025, arXiv:2501.12486)
    "dense-average-50": dict(n_embd=80),
    "dense-average-90": dict(n_embd=64),
    **{f"{name}-{round(100 * s)}": own | {"target_sparsity": s} for s in (0.9, 0.5) for name, own in SYSTEMS.items()},
}
pairs = [
    *((f"{name}-{percent}", f"magnitude-{percent}") for percent in (90, 50) for name in SYSTEMS if name != "magnitude"),
    *((f"magnitude-{percent}", f"dense-average-{percent}") for percent in (90, 50)),
    *((f"{name}_turned-{percent}", f"{name}-{percent}") for percent in (90, 50) for name in ("bitter5", "bitter9")),
]
