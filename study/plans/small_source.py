"""What else the source's runs differ in, at the small scale: its ramp, its beta2, its reset interval not scaled."""

from study.scales import SMALL, SMALL_TEXT, crossed

title = "The source's ramp, beta2 and reset interval, 0.46 M parameters"
text, base, seeds = SMALL_TEXT, SMALL, (0, 1, 2, 3, 4)

# Its published sparsities lie on a cube from step 100 to step 3,000 of 10,000.
RAMP = dict(schedule="cubic", prune_begin=6, prune_end=168)
AT_90 = {
    f"{criterion}-90-beta2_{beta2}": dict(criterion=criterion, target_sparsity=0.9, beta2=float(f"0.{beta2}"))
    for beta2 in ("95", "99", "999")
    for criterion in ("magnitude", "bitter7")
}
arms = {
    **{
        f"{arm}-source_ramp": own | RAMP
        for arm, own in crossed(("magnitude", "bitter7"), ("adamw", "adamwspam"), (0.5,)).items()
    },
    "dense-adamwspam-unscaled": dict(optimizer="adamwspam", spam_interval=1000),
    "dense-adamwspam": dict(optimizer="adamwspam"),
    "dense-adamwadv": dict(optimizer="adamwadv"),
    "dense-adamw": dict(optimizer="adamw"),
    "dense-adamwspam-beta2_999": dict(optimizer="adamwspam", beta2=0.999),
    "dense-adamw-beta2_999": dict(optimizer="adamw", beta2=0.999),
    **AT_90,
    **crossed(("magnitude", "movement"), ("adamw",), (0.5, 0.9)),
    **crossed(("random",), ("adamw",), (0.5,)),
}
pairs = [
    ("bitter7-adamw-50-source_ramp", "magnitude-adamw-50-source_ramp"),
    ("bitter7-adamwspam-50-source_ramp", "magnitude-adamwspam-50-source_ramp"),
    ("magnitude-adamwspam-50-source_ramp", "magnitude-adamw-50-source_ramp"),
    ("bitter7-adamw-50-source_ramp", "magnitude-adamwspam-50-source_ramp"),
    ("dense-adamwspam", "dense-adamw"),
    ("dense-adamwspam-unscaled", "dense-adamw"),
    ("dense-adamwadv", "dense-adamw"),
    ("dense-adamwspam-beta2_999", "dense-adamw-beta2_999"),
    ("dense-adamw-beta2_999", "dense-adamw"),
    *((f"bitter7-90-beta2_{beta2}", f"magnitude-90-beta2_{beta2}") for beta2 in ("95", "99", "999")),
    ("bitter7-90-beta2_999", "bitter7-90-beta2_99"),
    ("bitter7-90-beta2_95", "bitter7-90-beta2_99"),
    ("movement-adamw-50", "magnitude-adamw-50"),
    ("movement-adamw-90", "magnitude-adamw-90"),
    ("random-adamw-50", "magnitude-adamw-50"),
]
