"""The main question at the small scale: of "bitter7 beats magnitude by 15.6 %", what is criterion, what optimizer?"""

from study.scales import SMALL, SMALL_TEXT, crossed

title = "Criterion × optimizer × sparsity, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (0, 1, 2, 3, 4)

CRITERIA, OPTIMIZERS, SPARSITIES = (
    ("magnitude", "bitter7", "variance_quarter"),
    ("adamw", "adamwspam"),
    (0.5, 0.9, 0.75),
)
arms = {
    "dense-adamw": dict(optimizer="adamw"),
    "dense-adamwspam": dict(optimizer="adamwspam"),
    **crossed(CRITERIA, OPTIMIZERS, SPARSITIES),
    "random-adamw-90": dict(criterion="random", target_sparsity=0.9),
    # a thousandth more weight decay does nothing, but the rounding takes another course
    "magnitude-adamw-90-again": dict(criterion="magnitude", target_sparsity=0.9, weight_decay=0.1001),
}
pairs = [
    # the criterion, under one optimizer
    *(
        (f"{criterion}-{optimizer}-{percent}", f"magnitude-{optimizer}-{percent}")
        for percent in (50, 75, 90)
        for optimizer in OPTIMIZERS
        for criterion in ("bitter7", "variance_quarter")
    ),
    # the optimizer, under one criterion
    ("dense-adamwspam", "dense-adamw"),
    *(
        (f"{criterion}-adamwspam-{percent}", f"{criterion}-adamw-{percent}")
        for percent in (50, 75, 90)
        for criterion in ("magnitude", "bitter7")
    ),
    # the source's headline, in small: both at once
    ("bitter7-adamw-50", "magnitude-adamwspam-50"),
    # does the machinery see what is there, and nothing where nothing is?
    ("random-adamw-90", "magnitude-adamw-90"),
    ("magnitude-adamw-90-again", "magnitude-adamw-90"),
]
