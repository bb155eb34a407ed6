"""RMSProp from its definition, in NumPy's extended precision, written without a look at our code.

Instead of recurrences it forms, at every step, the weights that an exponential average gives to
each past gradient, and takes the weighted mean, mean square or variance. It is quadratic in the
number of steps and cannot cancel.
"""

from collections.abc import Sequence

import numpy as np

Wide = np.longdouble


def average_weights(decays: Sequence[float] | np.ndarray) -> tuple[np.ndarray, Wide]:
    """The weight of each past gradient, oldest first, and the weight left on the start value."""
    decay = np.asarray(decays, Wide)
    left = np.cumprod(decay[::-1])[::-1]
    later = np.append(left[1:], Wide(1))
    return (1 - decay) * later, left[0]


def directions(
    gradients: np.ndarray,
    decays: float | Sequence[float] = 0.9,
    eps: float | Sequence[float] = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    centered: bool = False,
) -> np.ndarray:
    """`g / root` at every step, for gradients of shape (steps, ...); real or complex."""
    steps = len(gradients)
    decay, small = (np.broadcast_to(np.asarray(x, Wide), steps) for x in (decays, eps))
    wide = np.clongdouble if np.iscomplexobj(gradients) else Wide
    g = np.asarray(gradients, wide)
    out = np.empty_like(g)
    for t in range(steps):
        weights, left = average_weights(decay[: t + 1])
        w = weights.reshape(-1, *([1] * (g.ndim - 1)))
        total = weights.sum() if bias_correction else Wide(1)
        past = g[: t + 1]
        if centered:
            mean = (w * past).sum(0) / total
            moment = (w * np.abs(past - mean) ** 2).sum(0) + left * initial_scale
            if not bias_correction:
                moment = moment + left * np.abs(mean) ** 2
        else:
            moment = (w * np.abs(past) ** 2).sum(0) + left * initial_scale
        moment = moment / total
        root = np.sqrt(moment + small[t]) if eps_in_sqrt else np.sqrt(moment) + small[t]
        out[t] = np.where(root == 0, 0, g[t] / np.where(root == 0, 1, root))
    return out


def velocities(
    inputs: np.ndarray, momenta: float | Sequence[float] | None, nesterov: bool
) -> np.ndarray:
    """What momentum makes of a sequence of inputs; None leaves them as they are."""
    if momenta is None:
        return inputs
    decay = np.broadcast_to(np.asarray(momenta, Wide), len(inputs))
    trace, out = np.zeros_like(inputs[0]), np.empty_like(inputs)
    for t, x in enumerate(inputs):
        trace = x + decay[t] * trace
        out[t] = x + decay[t] * trace if nesterov else trace
    return out


def rmsprop_updates(
    gradients: np.ndarray,
    learning_rates: float | Sequence[float],
    momentum: float | Sequence[float] | None = None,
    nesterov: bool = False,
    **options: object,
) -> np.ndarray:
    """The updates of RMSProp with the learning rate inside the momentum."""
    u = directions(gradients, **options)  # pyright: ignore[reportArgumentType]
    return with_momentum(u, learning_rates, momentum, nesterov)


def with_momentum(
    u: np.ndarray,
    learning_rates: float | Sequence[float],
    momentum: float | Sequence[float] | None,
    nesterov: bool,
) -> np.ndarray:
    """The updates that follow from RMSProp's directions, the learning rate inside the momentum."""
    rate = np.broadcast_to(np.asarray(learning_rates, Wide), len(u))
    return velocities(-rate.reshape(-1, *([1] * (u.ndim - 1))) * u, momentum, nesterov)
