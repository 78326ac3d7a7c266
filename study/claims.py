"""The ledger: what was claimed, by whom, and which comparison decides it. The plans' pairs precede their runs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """`text` holds if the loss of `arm` is lower than that of `against` in `plan`; same: if no difference shows."""

    text: str
    by: str
    plan: str
    arm: str
    against: str
    same: bool = False


CLAIMS = (
    Claim(
        "bitter7 under AdamW ends below magnitude under AdamWSPAM at 50 % (37.28 against 44.15)",
        "source",
        "small",
        "bitter7-adamw-50",
        "magnitude-adamwspam-50",
    ),
    Claim(
        "that is bitter7's doing: so it is under AdamW alone",
        "source",
        "small",
        "bitter7-adamw-50",
        "magnitude-adamw-50",
    ),
    Claim(
        "that is the optimizer's doing: magnitude under AdamW ends below magnitude under AdamWSPAM",
        "this project, from the source's curves",
        "small",
        "magnitude-adamw-50",
        "magnitude-adamwspam-50",
    ),
    Claim("AdamW ends below AdamWSPAM without any pruning", "this project", "small", "dense-adamw", "dense-adamwspam"),
    Claim(
        "on the source's ramp bitter7 ends below magnitude at 50 %",
        "source",
        "small_source",
        "bitter7-adamw-50-source_ramp",
        "magnitude-adamw-50-source_ramp",
    ),
    *(
        Claim(
            f"bitter7 beats magnitude at {s} % under AdamW", by, "small", f"bitter7-adamw-{s}", f"magnitude-adamw-{s}"
        )
        for s, by in ((75, "this project"), (90, "this project, from its pilot"))
    ),
    *(
        Claim(
            f"variance_quarter, bitter7 without its absolute eps, beats magnitude at {s} %",
            "this project",
            "small",
            f"variance_quarter-adamw-{s}",
            f"magnitude-adamw-{s}",
        )
        for s in (50, 75, 90)
    ),
    Claim(
        "a longer memory of v is what bitter7 needs: beta2 0.999 beats 0.99 at 90 %",
        "source",
        "small_source",
        "bitter7-90-beta2_999",
        "bitter7-90-beta2_99",
    ),
    Claim(
        "the small model pruned to 90 % ends below a dense one of the same average size",
        "Jin et al. 2025",
        "small_systems",
        "magnitude-90",
        "dense-average-90",
    ),
    Claim("movement beats magnitude at 90 %", "source", "small_source", "movement-adamw-90", "magnitude-adamw-90"),
    Claim(
        "bitter9's second term points backwards: turned, it ends below",
        "this project",
        "small_systems",
        "bitter9_turned-90",
        "bitter9-90",
    ),
    Claim(
        "held until the ramp ends, then straight to zero, the learning rate ends below half a cosine, at 90 %",
        "this project",
        "small_confirm",
        "held-magnitude-90",
        "magnitude-90",
    ),
    Claim(
        "what is left of a matrix wants a higher rate: density_lr=4 ends below the held rate alone, at 90 %",
        "Dey et al. 2024, for static sparsity",
        "small_confirm",
        "held-magnitude-density_lr-90",
        "held-magnitude-90",
    ),
    Claim(
        "so does the dense model, so it is not sparsity that wants it",
        "a sceptic",
        "small_confirm",
        "held-dense-same_rates",
        "held-dense",
    ),
    *(
        Claim(f"variance_quarter beats magnitude at 90 % {when}", "this project", "small_confirm", ours, theirs)
        for when, ours, theirs in (
            ("with the held rate too", "held-quarter-90", "held-magnitude-90"),
            ("with density_lr too", "held-quarter-density_lr-90", "held-magnitude-density_lr-90"),
        )
    ),
    *(
        Claim(f"at nine times the size{longer}: {text}", by, plan, ours, theirs)
        for plan, longer in (("medium", ""), ("medium_long", " and three times the steps"))
        for text, by, ours, theirs in (
            (
                "bitter7 under AdamW ends below magnitude under AdamWSPAM at 50 %",
                "source",
                "bitter7-adamw-50",
                "magnitude-adamwspam-50",
            ),
            ("so it is under AdamW alone", "source", "bitter7-adamw-50", "magnitude-adamw-50"),
            ("so is magnitude under AdamW", "this project", "magnitude-adamw-50", "magnitude-adamwspam-50"),
            ("bitter7 beats magnitude at 90 %", "this project", "bitter7-adamw-90", "magnitude-adamw-90"),
            (
                "variance_quarter beats magnitude at 90 %",
                "this project",
                "variance_quarter-adamw-90",
                "magnitude-adamw-90",
            ),
        )
    ),
    *(
        Claim(f"at nine times the size: the recipe ends below {text}, at 90 %", "this project", "medium_confirm", *pair)
        for text, *pair in (
            ("magnitude with its schedule", "held-quarter-density_lr-90", "held-magnitude-90"),
            ("the dense model with it", "held-quarter-density_lr-90", "held-dense"),
        )
    ),
    Claim("magnitude beats random (planted)", "everybody", "small", "magnitude-adamw-90", "random-adamw-90"),
    Claim(
        "magnitude by two names is one (A/A)",
        "everybody",
        "small",
        "magnitude-adamw-90-again",
        "magnitude-adamw-90",
        same=True,
    ),
)
