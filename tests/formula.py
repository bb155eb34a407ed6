"""One step of RMSProp from its formula in double precision, and how far float32 may be from it.

The bounds are those of rounding: a sum of non-negative terms is as right as its terms, a sum of
both signs as right as its largest term, and what depends on one of these inherits its error. All of
it is entry by entry.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from forms import Form, Numbers

EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)
# The smallest positive number of formats, and the largest that bytes keep.
SMALLEST = {'bfloat16': 2.0**-118, 'uint8': 2.0**-80}
END = 2.0**54


class Near(NamedTuple):
    """A number and how far from it the float32 one may be: anywhere where that is infinite."""

    value: np.ndarray
    slack: np.ndarray


class Range(NamedTuple):
    """What a non-negative number lies between."""

    low: np.ndarray
    high: np.ndarray

    def near(self) -> Near:
        """Its middle; an end at which float32 overflows makes it unknown."""
        same = self.low == self.high
        value = np.where(same | ~np.isfinite(self.high), self.high, self.low / 2 + self.high / 2)
        slack = np.where(same | np.isnan(value), 0, self.high / 2 - self.low / 2)
        return Near(value, slack)


def step(
    form: Form, numbers: Numbers, count: int, g: np.ndarray, before: dict[str, np.ndarray]
) -> dict[str, Near]:
    """The update and the statistics after a step, decoded, of those before it."""
    with np.errstate(all='ignore'):
        found = _step(form, form.at(numbers, count), g, before)
    # What is infinite or NaN is exactly that.
    return {
        name: Near(x, np.where(np.isnan(slack), 0, slack)) for name, (x, slack) in found.items()
    }


def _step(
    form: Form, n: dict[str, float], g: np.ndarray, before: dict[str, np.ndarray]
) -> dict[str, Near]:
    decay, rest = n['decay'], 1 - n['decay']
    old = float(before.get('weight', 1.0))
    weight = decay * old + rest if form.corrected else 1.0
    found: dict[str, Near] = {}
    if form.corrected:
        found['weight'] = Near(np.float64(weight), np.float64(4 * EPS * weight))
    unit = np.float64(1.0)
    if 'unit' in before:
        # Exactly that of float32.
        shrunk = float(np.float32(before['unit']) * np.float32(decay))
        unit = np.float64(1.0 if shrunk < TINY else 2 * np.frexp(shrunk)[0])
        found['unit'] = Near(unit, np.float64(0.0))

    if form.centered:
        mu, var = before['mu'], before['var']
        # Of the terms of which the mean is the sum.
        size = rest * abs(g) + abs(mu)
        mean = mu + rest * (g - mu)
        found['mu'] = Near(mean, 4 * EPS * size + 2 * TINY)
        moment = _variance(decay, old, weight, g, mu, var, size)
        averaged = _over(moment, weight)
        if form.formats['var'] == 'uint8':
            # At the end of its window nobody knows the variance, and the squared mean is added.
            saturated = var >= END * before['unit'] * (1 - EPS)
            centre, wrong = abs(mean) / weight, 8 * EPS * size / weight
            more = _float32(
                Range(np.maximum(centre - wrong, 0) ** 2, (centre + wrong) ** 2), 4 * EPS
            )
            whole = _float32(Range(averaged.low + more.low, averaged.high + more.high), EPS)
            ends = zip(whole, averaged, strict=True)
            averaged = Range(*(np.where(saturated, x, y) for x, y in ends))
    else:
        square = _float32(Range(abs(g) ** 2, abs(g) ** 2), 2 * EPS)
        low, high = (decay * before['nu'] + rest * x for x in square)
        # Three roundings; factors take more, and three products may underflow.
        moment = _float32(Range(low, high), (24 if form.kept == 'factored' else 6) * EPS)
        averaged = _over(moment, weight)
    found['var' if form.centered else 'nu'] = moment.near()

    update = _scaled(_direction(form, g, averaged, n['eps']), -n['rate'])
    if form.velocity != 'none':
        found['trace'] = _plus(update, n['momentum'], Near(before['trace'], np.zeros(g.shape)))
        ahead = form.velocity == 'nesterov'
        update = _plus(update, n['momentum'], found['trace']) if ahead else found['trace']
    found['update'] = _narrowed(update, form.dtype)
    return {name: kept(form, name, near, unit) for name, near in found.items()}


def _float32(x: Range, relative: float) -> Range:
    """Sums and products of float32 numbers, which are rounded, underflow and overflow."""
    low, high = x.low * (1 - relative) - 3 * TINY, x.high * (1 + relative) + 2.0**-140
    # Products may be zero exactly, and a NaN stays one.
    low, high = np.maximum(low, 0), np.where(x.high == 0, 0, high)
    return Range(*(np.where(end > LARGEST, np.inf, end) for end in (low, high)))


def _variance(
    decay: float,
    old: float,
    weight: float,
    g: np.ndarray,
    mu: np.ndarray,
    var: np.ndarray,
    size: np.ndarray,
) -> Range:
    # The deviation from the mean after the step, whose rounding is that of the mean, and that of
    # the difference.
    shrink = decay * old / weight
    share = (1 - decay) / shrink if shrink else 0.0
    deviation = shrink * abs(g - mu / old) if shrink else 0 * abs(g)
    wrong = 8 * EPS * size / weight + EPS * deviation + 2 * TINY
    spread = share * (2 * deviation * wrong + wrong**2)
    exact = decay * var + share * deviation**2
    return _float32(Range(np.maximum(exact - spread, 0), exact + spread), 6 * EPS)


def _over(moment: Range, weight: float) -> Range:
    return moment if weight == 1 else _float32(Range(*(x / weight for x in moment)), 4 * EPS)


def _direction(form: Form, g: np.ndarray, moment: Range, eps: float) -> Near:
    def root(x: np.ndarray, eps: float) -> np.ndarray:
        square = x + eps if form.eps_in_sqrt else x
        whole = np.where(square < TINY, 0, np.sqrt(square)) + (0 if form.eps_in_sqrt else eps)
        return np.where(whole < TINY, 0, whole)

    low, high = root(moment.low, eps * (1 - EPS)), root(moment.high, eps * (1 + EPS))
    size = abs(g)
    # No root no step; a root that may have underflown is at least that of the smallest number.
    least = np.where(low == 0, np.sqrt(TINY), low)
    longest = np.where(high == 0, 0, size / least)
    shortest = np.where(low == 0, 0, size / np.where(high == 0, 1, high))
    sign = g / np.where(size == 0, 1, size)
    slack = (longest - shortest) / 2 + 4 * EPS * longest + TINY
    return Near(sign * (longest + shortest) / 2, np.where(np.isfinite(slack), slack, 0))


def _scaled(x: Near, factor: float) -> Near:
    return Near(factor * x.value, abs(factor) * x.slack + 2 * EPS * abs(factor * x.value) + TINY)


def _plus(x: Near, factor: float, y: Near) -> Near:
    product = _scaled(y, factor)
    size = abs(x.value) + abs(product.value)
    slack = x.slack + product.slack + 2 * EPS * size + TINY
    return Near(x.value + product.value, slack)


def _narrowed(x: Near, dtype: str) -> Near:
    """Rounded to the dtype of gradients."""
    kind = jnp.finfo(dtype)
    largest = abs(x.value) + x.slack
    slack = x.slack + float(kind.eps) * largest + float(kind.smallest_subnormal) + TINY
    return Near(x.value, np.where(largest > float(kind.max) * (1 - 2.0**-6), np.inf, slack))


def kept(form: Form, name: str, x: Near, unit: np.float64) -> Near:
    """What encoding and decoding make of a statistic: one grid point to either side."""
    choice = form.formats.get(name, 'float32')
    if choice == 'factored':
        return _factored(form, x)
    if choice == 'float32':
        return x
    if name not in ('nu', 'var'):
        unit = np.float64(1.0)
    size, least, grid = abs(x.value), SMALLEST[choice] * unit, 2.0**-7
    value, slack = x
    if choice == 'uint8':
        # Four numbers to an octave in the middle, of which both sides must be sure.
        fine = (size > 2.0**-39 * unit) & (size < unit / 2)
        grid = np.where(fine, 0.25, 1.0)
        # Whatever is beyond the end is kept as the end.
        value = np.minimum(value, END * unit)
        slack = np.where(np.isfinite(slack), slack, 0)
    slack = slack + (grid + 4 * EPS) * (abs(value) + slack) + 2 * least
    # At the largest numbers of float32 a rounding may overflow.
    slack = np.where((abs(value) + slack > LARGEST) & np.isfinite(value), np.inf, slack)
    # A zero stays one, as an infinity does.
    return Near(value, np.where((size == 0) & (x.slack == 0) | ~np.isfinite(value), 0, slack))


def _factored(form: Form, x: Near) -> Near:
    ends = form.split(np.maximum(x.value - x.slack, 0)), form.split(x.value + x.slack)
    parts = [
        Range(low, high) if low.ndim < 2 or not low.size else _product(low, high)
        for low, high in zip(*ends, strict=True)
    ]
    near = [part.near() for part in parts]
    return Near(*(np.concatenate([np.ravel(part[i]) for part in near]) for i in (0, 1)))


def _product(low: np.ndarray, high: np.ndarray) -> Range:
    """Means over rows and columns, multiplied."""
    many = sum(low.shape) * EPS

    def factors(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        row, col = x.mean(-1)[..., :, None], x.mean(-2)[..., None, :]
        return row, col, row.mean(-2, keepdims=True)

    (row, col, total), (upper_row, upper_col, upper_total) = factors(low), factors(high)
    vanishes = total * (1 - many) < TINY
    least = np.where(vanishes, 0, row * col / np.where(vanishes, 1, upper_total))
    most = upper_row * upper_col / np.where(vanishes, TINY, total)
    most = np.where(upper_total * (1 + many) < TINY, 0, most)
    return _float32(Range(least, most), 8 * EPS + 4 * many)
