"""Schedules: how the share of the target sparsity rises with progress, from 0 to 1, along the ramp.

Any function of progress that does not fall, with values in [0, 1], is a schedule. A Pruner's ramp starts one interval
before its first update, so that update i of n has progress i / n where the interval divides the ramp: the first takes
its step and none jumps.
"""


def linear(progress):
    """p."""
    return progress


def cubic(progress):
    """p³: slow at first, fastest at the end, when little time is left to recover (the source's)."""
    return progress**3


def gmp(progress):
    """1 − (1 − p)³: fast at first, slow at the end (Zhu and Gupta 2017, arXiv:1710.01878)."""
    return 1 - (1 - progress) ** 3


def oneshot(progress):
    """All at once, at `begin`."""
    return 1.0


SCHEDULES = {function.__name__: function for function in (linear, cubic, gmp, oneshot)}


def sparsity_at(step, schedule, target, begin, end):
    """Sparsity after `step` of a ramp: 0 before `begin`, target · schedule(progress) until `end`, then target, where
    progress is (step - begin) / (end - begin).

    ValueError where the schedule gives something else than a share.
    """
    if step < begin:
        return 0.0
    if step >= end:
        return target
    progress = (step - begin) / (end - begin)
    share = float(schedule(progress))
    if not 0 <= share <= 1:
        raise ValueError(f"the schedule gave {share} at progress {progress:g}: expected a number in [0, 1]")
    return target * share
