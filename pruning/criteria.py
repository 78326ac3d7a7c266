"""Criteria: plain functions of tensors that give each weight a score; the lowest scores are pruned first.

A criterion declares what it needs by the names of its arguments, and is called with chunks of equal shape, in float32:

    weight            the weights
    initial_weight    the weights when the Pruner was made (a buffer of 4 bytes a parameter)
    position          int64, the place of each weight among all prunable weights, the same under any sharding
    mean_exp_avg_sq   scalar: exp_avg_sq averaged over the weight's whole tensor
    step, beta1       scalars: optimizer steps taken, and the first of the optimizer's betas
    any other name    the optimizer's state of that name and of the weight's shape: exp_avg, momentum_buffer, ...

and returns a tensor of the weights' shape; it must not change its arguments, which may be the model's own memory.
Arguments with a default value are the criterion's own affair. Where the optimizer keeps no such state (SGD; before the
first step) the score is abs(weight). Built-in criteria use only operations that IEEE 754 rounds correctly (add,
multiply, divide, sqrt): a score is the same to the bit whatever chunk, thread or rank computes it, so v^0.25 is written
as a square root of a square root.

The names bitter0 ... bitter9 and their formulas, eps included, are the source project's (AdamWPrune), to the letter.
"""

EPS = 1e-8


def magnitude(weight):
    """|w| (Han et al. 2015, arXiv:1506.02626)."""
    return weight.abs()


def random(position):
    """A fixed random number in [0, 1) for each position: the baseline that every criterion must beat."""
    x = position * -7046029254386353131  # splitmix64's finaliser (Steele et al. 2014) in wrapping int64
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return ((x >> 40) & 0xFFFFFF).float() / 2**24


def movement(weight, initial_weight):
    """w · (w − w_initial): low where a weight moved towards zero (after Sanh et al. 2020, arXiv:2005.07683)."""
    return weight * (weight - initial_weight)


def bitter0(weight, exp_avg, exp_avg_sq):
    """|w·m| · |w| / (√v + eps)."""
    return (weight * exp_avg).abs() * (weight.abs() / (exp_avg_sq.sqrt() + EPS))


def bitter1(weight):
    """|w|: magnitude, by the source's name."""
    return magnitude(weight)


def bitter2(weight):
    """|w|: magnitude, which the source trains 21 % longer."""
    return magnitude(weight)


def bitter3(weight, exp_avg):
    """|w| · √(|m| + eps)."""
    return weight.abs() * (exp_avg.abs() + EPS).sqrt()


def bitter4(weight, exp_avg):
    """bitter3's score; the source combines it with layer-adaptive allocation."""
    return bitter3(weight, exp_avg)


def bitter5(weight, exp_avg, exp_avg_sq):
    """sign(w) · m / (√v + eps) + 0.1·|w|. Keeps what shrinks, contrary to its text: see bitter5_turned."""
    return _towards_zero(weight, exp_avg, exp_avg_sq) + 0.1 * weight.abs()


def bitter6(weight, exp_avg, exp_avg_sq):
    """|w| · √(|m| + eps) · √(m² / (v + eps))."""
    return bitter3(weight, exp_avg) * (exp_avg * exp_avg / (exp_avg_sq + EPS)).sqrt()


def bitter7(weight, exp_avg_sq):
    """|w| · (|v| + eps)^¼. With clipped gradients v is often below eps, and the score then nearly magnitude: see
    variance_quarter."""
    return exp_avg_sq.abs().add_(EPS).sqrt_().sqrt_().mul_(weight).abs_()  # in place: half the time, the same bits


def bitter8(weight, exp_avg, step, beta1):
    """|w| · √(|m / (1 − beta1^t + eps)| + eps): bitter3 on the bias-corrected first moment."""
    return weight.abs() * ((exp_avg / (1 - beta1**step + EPS)).abs() + EPS).sqrt()


def bitter9(weight, exp_avg, exp_avg_sq):
    """|w| · √(|m| + eps) + 0.1 · sign(w)·m / (√v + eps). Its second term points backwards: see bitter9_turned."""
    return bitter3(weight, exp_avg) + 0.1 * _towards_zero(weight, exp_avg, exp_avg_sq)


def bitter5_turned(weight, exp_avg, exp_avg_sq):
    """bitter5 with the sign turned: Adam steps along −m, so −sign(w)·m/√v is high where a weight grows, and that is
    kept."""
    return 0.1 * weight.abs() - _towards_zero(weight, exp_avg, exp_avg_sq)


def bitter9_turned(weight, exp_avg, exp_avg_sq):
    """bitter9 with the sign of its second term turned, as in bitter5_turned."""
    return bitter3(weight, exp_avg) - 0.1 * _towards_zero(weight, exp_avg, exp_avg_sq)


def variance_quarter(weight, exp_avg_sq):
    """|w| · v^¼, bitter7 without an absolute eps: scaling all gradients by a constant leaves the pruned set as it
    is."""
    return exp_avg_sq.sqrt().sqrt_().mul_(weight).abs_()  # in place, as bitter7


def variance_half(weight, exp_avg_sq):
    """|w| · √v: v estimates the diagonal of the Fisher information, so w²·v is the loss's second-order change (LeCun et
    al. 1989)."""
    return weight.abs() * exp_avg_sq.sqrt()


def variance_within(weight, exp_avg_sq, mean_exp_avg_sq):
    """|w| · (v / its layer's mean)^¼: what v says within layers, without what it says between them."""
    return weight.abs() * (exp_avg_sq / mean_exp_avg_sq).sqrt().sqrt()


def _towards_zero(weight, exp_avg, exp_avg_sq):
    return weight.sign() * exp_avg / (exp_avg_sq.sqrt() + EPS)


CRITERIA = {
    function.__name__: function
    for function in (
        magnitude,
        random,
        movement,
        bitter0,
        bitter1,
        bitter2,
        bitter3,
        bitter4,
        bitter5,
        bitter6,
        bitter7,
        bitter8,
        bitter9,
        bitter5_turned,
        bitter9_turned,
        variance_quarter,
        variance_half,
        variance_within,
    )
}
