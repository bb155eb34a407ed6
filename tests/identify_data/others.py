"""Runs of optimizers that are not the RMSProp they may be taken for; NumPy only.

Each optimizer is a function that takes its options, and returns the function that makes a direction
of a gradient and the parameters: `p <- p - learning_rate * direction`, in the dtype of the run.
Gradients, start and learning rates are those of `draws.draw`, with all leaves in one array.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from identify_data.draws import draw

Array = np.ndarray
Options = Mapping[str, Any]
Direction = Callable[[Array, Array], Array]


def sgd(*, momentum: float = 0.0, nesterov: bool = False, dampening: float = 0.0) -> Direction:
    """PyTorch's; with no dampening also Optax's. The first gradient is not dampened."""
    buffer: Any = None

    def direction(g: Array, p: Array) -> Array:
        nonlocal buffer
        buffer = g if buffer is None else momentum * buffer + (1 - dampening) * g
        return g + momentum * buffer if nesterov else buffer

    return direction


def adam(*, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Direction:
    mean, square, count = 0.0, 0.0, 0

    def direction(g: Array, p: Array) -> Array:
        nonlocal mean, square, count
        count += 1
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * g**2
        return mean / (1 - b1**count) / (np.sqrt(square / (1 - b2**count)) + eps)

    return direction


def adagrad(*, start: float = 0.1, eps: float = 1e-7) -> Direction:
    total = start

    def direction(g: Array, p: Array) -> Array:
        nonlocal total
        total = total + g**2
        return g / np.sqrt(total + eps)

    return direction


def adadelta(*, rho: float = 0.9, eps: float = 1e-6) -> Direction:
    square, moved = 0.0, 0.0

    def direction(g: Array, p: Array) -> Array:
        nonlocal square, moved
        square = rho * square + (1 - rho) * g**2
        made = np.sqrt(moved + eps) / np.sqrt(square + eps) * g
        moved = rho * moved + (1 - rho) * made**2
        return made

    return direction


def rprop(*, size: float, down: float = 0.5, up: float = 1.2) -> Direction:
    """Optax's, whose learning rate is the first step size; here the step sizes in its units."""
    last, sizes = None, None

    def direction(g: Array, p: Array) -> Array:
        nonlocal last, sizes
        if last is None:
            last, sizes = np.zeros_like(g), np.full_like(g, size)
        agreement = np.sign(g * last)
        sizes = sizes * np.choose(agreement.astype(int) + 1, [down, 1.0, up]).astype(g.dtype)
        sizes = np.clip(sizes, 1e-6, 50.0)
        used = np.where(agreement < 0, np.zeros_like(g), g)
        last = used
        return np.sign(used) * sizes

    return direction


def sign_sgd() -> Direction:
    return lambda g, p: np.sign(g)


def signum(*, momentum: float = 0.9) -> Direction:
    """The sign of the average."""
    inner = sgd(momentum=momentum)
    return lambda g, p: np.sign(inner(g, p))


def lion(*, b1: float = 0.9, b2: float = 0.99) -> Direction:
    mean = 0.0

    def direction(g: Array, p: Array) -> Array:
        nonlocal mean
        made = np.sign(b1 * mean + (1 - b1) * g)
        mean = b2 * mean + (1 - b2) * g
        return made

    return direction


def rmsprop(*, decay: float = 0.9, eps: float = 1e-8, momentum: float = 0.0) -> Direction:
    """PyTorch's."""
    square, inner = 0.0, sgd(momentum=momentum)

    def direction(g: Array, p: Array) -> Array:
        nonlocal square
        square = decay * square + (1 - decay) * g**2
        return inner(g / (np.sqrt(square) + eps), p)

    return direction


def clipped_by_norm(inner: Direction, most: float) -> Direction:
    def direction(g: Array, p: Array) -> Array:
        return inner(g * min(1.0, most / float(np.linalg.norm(g))), p)

    return direction


def clipped_by_value(inner: Direction, most: float) -> Direction:
    return lambda g, p: inner(np.clip(g, -most, most), p)


def noisy(inner: Direction, noise: float, rng: np.random.Generator) -> Direction:
    """With gradients that differ from the recorded ones by this part of themselves."""
    return lambda g, p: inner((g * (1 + noise * rng.normal(size=g.shape))).astype(g.dtype), p)


def decaying(inner: Direction, weight_decay: float, decoupled: bool) -> Direction:
    if decoupled:
        return lambda g, p: inner(g, p) + weight_decay * p
    return lambda g, p: inner(g + weight_decay * p, p)


def trajectory(direction: Direction, start: Array, gradients: Array, rates: Array) -> Array:
    """The parameters before the first step and after each one."""
    seen = [start]
    for g, rate in zip(gradients, rates, strict=True):
        p = seen[-1]
        seen.append((p - float(rate) * direction(g, p)).astype(p.dtype))
    return np.stack(seen)


@dataclasses.dataclass(frozen=True)
class Other:
    """A run, what the user says of it, and whether it is RMSProp but for its gradients."""

    name: str
    trace: dict[str, Array]
    told: dict[str, Any]
    truth: dict[str, str]


PLAIN = ('sgd', 'momentum', 'nesterov', 'dampened', 'rate_first', 'sign_sgd', 'signum', 'lion')
ADAPTIVE = ('adam', 'adamw', 'adagrad', 'adadelta', 'rprop')
SPOILT = ('clipped_by_norm', 'clipped_by_value', 'noisy')
NAMES = (*PLAIN, *ADAPTIVE, *SPOILT)


def other(number: int) -> Other:
    """One drawn run; every name comes once in `len(NAMES)` numbers."""
    name = NAMES[number % len(NAMES)]
    made = draw(name, number)
    rng = np.random.default_rng([number, 1])
    start = np.concatenate([p.ravel() for p in made.params.values()])
    steps = len(made.learning_rate)
    gradients = np.concatenate([g.reshape(steps, -1) for g in made.gradients.values()], axis=1)
    gradients, rates = gradients.astype(made.dtype), made.learning_rate
    options = _options(name, rng, made.eps, made.decay, rates[0])
    weight_decay = float(f'{10 ** rng.uniform(-2.5, -0.5):.3g}')
    undecayed = name in (*SPOILT, 'rprop', 'rate_first')
    decays = name == 'adamw' or (not undecayed and rng.random() < 0.4)
    direction = _spoilt(name, options, rng, gradients) or MAKERS[name](**options)
    if decays:
        direction = decaying(direction, weight_decay, name == 'adamw' or rng.random() < 0.5)
    if name == 'rate_first':
        # As Keras has it: what the momentum gathers is already multiplied by the learning rate.
        scaled = gradients * rates[:, None].astype(gradients.dtype)
        seen = trajectory(direction, start, scaled, np.ones_like(rates))
    elif name == 'rprop':
        seen, rates = trajectory(direction, start, gradients, np.ones_like(rates)), rates[:1]
    else:
        seen = trajectory(direction, start, gradients, rates)
    names = {'b2': 'decay', 'rho': 'decay', 'decay': 'decay', 'eps': 'eps', 'momentum': 'momentum'}
    told = {names[n]: v for n, v in options.items() if n in names and rng.random() < 0.3}
    if decays or rng.random() < 0.2:
        told['weight_decay'] = 'fit'
    trace = {'params': seen, 'gradients': gradients, 'learning_rate': rates}
    return Other(f'{name}/{number}', trace, told, _truth(options) if name in SPOILT else {})


MAKERS: dict[str, Callable[..., Direction]] = {
    'sgd': sgd,
    'momentum': sgd,
    'nesterov': sgd,
    'dampened': sgd,
    'rate_first': sgd,
    'sign_sgd': sign_sgd,
    'signum': signum,
    'lion': lion,
    'adam': adam,
    'adamw': adam,
    'adagrad': adagrad,
    'adadelta': adadelta,
    'rprop': rprop,
}


def _options(
    name: str, rng: np.random.Generator, eps: float, decay: float, rate: float
) -> dict[str, Any]:
    momentum = round(float(rng.uniform(0.3, 0.95)), 3)
    b1 = float(rng.choice([0.5, 0.8, 0.9, 0.95]))
    return {
        'sgd': {},
        'momentum': {'momentum': momentum},
        'nesterov': {'momentum': momentum, 'nesterov': True},
        'dampened': {'momentum': momentum, 'dampening': float(rng.choice([0.1, 0.5, momentum]))},
        'rate_first': {'momentum': momentum, 'nesterov': bool(rng.random() < 0.5)},
        'sign_sgd': {},
        'signum': {'momentum': momentum},
        'lion': {'b1': b1, 'b2': decay},
        'adam': {'b1': b1, 'b2': decay, 'eps': eps},
        'adamw': {'b1': b1, 'b2': decay, 'eps': eps},
        'adagrad': {'start': float(rng.choice([0.0, 0.1, 1.0])), 'eps': eps},
        'adadelta': {'rho': decay, 'eps': eps},
        'rprop': {'size': float(rate)},
    }.get(name, {'decay': decay, 'eps': eps, 'momentum': float(rng.choice([0.0, momentum]))})


def _spoilt(
    name: str, options: Options, rng: np.random.Generator, gradients: Array
) -> Direction | None:
    """RMSProp whose gradients are changed after they were recorded, on about half of the steps."""
    if name == 'clipped_by_norm':
        most = float(np.median(np.linalg.norm(gradients, axis=1)))
        return clipped_by_norm(rmsprop(**options), most)
    if name == 'clipped_by_value':
        return clipped_by_value(rmsprop(**options), float(np.median(np.abs(gradients))))
    if name == 'noisy':
        return noisy(rmsprop(**options), float(10 ** rng.uniform(-3, -0.5)), rng)
    return None


def _truth(options: Options) -> dict[str, str]:
    return {
        'epsilon': 'outside the root',
        'start': 'zero',
        'bias_correction': 'no',
        'centered': 'no',
        'momentum': 'heavy ball' if options['momentum'] else 'none',
        'learning_rate': 'after momentum' if options['momentum'] else 'no momentum',
        'weight_decay': 'none',
    }
