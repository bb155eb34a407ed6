"""Draws configurations over dialects and their options, and writes them as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from golden.configurations import declared

STEPS = 24
Options = dict[str, Any]


class Draw:
    """Random options; each draw is a Python number or boolean, as a user would write it."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.uniform() < probability)

    def between(self, low: float, high: float) -> float:
        """A number of three digits, uniform in its logarithm."""
        return float(f'{np.exp(self.rng.uniform(np.log(low), np.log(high))):.3g}')

    def decay(self) -> float:
        return float(f'{1 - self.between(1e-3, 0.5):.4f}')

    def choice(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def some(self, **options: Any) -> Options:
        """About half of the options."""
        return {name: value for name, value in options.items() if self.chance()}

    def schedule(self) -> Options:
        return {
            'peak': self.between(1e-3, 0.3),
            'warmup': int(self.rng.integers(1, 6)),
            'every': int(self.rng.integers(1, 9)),
            'factor': self.between(0.2, 1.5),
        }

    def shared(self, decay: str, eps: str) -> Options:
        """What nearly every framework has, under its own names."""
        return self.some(
            **{decay: self.decay(), eps: self.between(1e-10, 1.0)},
            momentum=self.decay(),
            centered=True,
        )


class ExactDraw(Draw):
    """Numbers whose decimals are few and exact.

    MXNet reads its numbers from text, and misses the last digit of float32 now and then.
    """

    def between(self, low: float, high: float) -> float:
        """A multiple of an eighth of a power of two, not so small that it needs an exponent."""
        mantissa, exponent = np.frexp(max(super().between(low, high), 2.0**-9))
        return float(np.ldexp(np.round(8 * mantissa) / 8, exponent))

    def decay(self) -> float:
        return 1 - 2.0 ** -float(self.rng.integers(1, 10))

    def schedule(self) -> Options:
        steps = {'warmup': self.choice(1, 2, 4), 'every': self.choice(6, 8, 12)}
        return {'peak': self.between(2.0**-5, 0.3), 'factor': 0.5, **steps}


def torch(draw: Draw) -> Options:
    options = draw.shared('alpha', 'eps') | draw.some(
        weight_decay=draw.between(1e-3, 1.0), maximize=True, foreach=draw.chance()
    )
    extra: Options = {'problem': draw.choice('normal', 'normal', 'complex')}
    if draw.chance(0.3):
        order = draw.choice(2.0, 'inf', 1.0, draw.between(0.5, 5.0))
        extra['clip'] = {'max_norm': draw.between(0.01, 10.0), 'norm_type': order}
    return {'options': options, **extra}


def timm(draw: Draw) -> Options:
    options = draw.shared('alpha', 'eps') | draw.some(
        weight_decay=draw.between(1e-3, 1.0),
        decoupled_decay=True,
        corrected_weight_decay=True,
        lr_in_momentum=False,
        caution=True,
        foreach=draw.chance(),
    )
    return {'options': options}


def stable_baselines3(draw: Draw) -> Options:
    decay = draw.some(weight_decay=draw.between(1e-3, 1.0))
    return {'options': draw.shared('alpha', 'eps') | decay}


def keras(draw: Draw) -> Options:
    options = draw.shared('rho', 'epsilon') | draw.some(
        weight_decay=draw.between(1e-3, 1.0), loss_scale_factor=draw.between(0.1, 1e4)
    )
    if draw.chance():
        options[draw.choice('clipnorm', 'clipvalue', 'global_clipnorm')] = draw.between(0.01, 10.0)
    if draw.chance():
        options |= {'use_ema': True, **draw.some(ema_momentum=draw.decay())}
        options |= draw.some(ema_overwrite_frequency=int(draw.rng.integers(1, 6)))
    if draw.chance():
        options['gradient_accumulation_steps'] = int(draw.rng.integers(2, 6))
    return {'options': options} | draw.some(exclude=['scalar'])


def keras_legacy(draw: Draw) -> Options:
    options = draw.shared('rho', 'epsilon') | draw.some(
        decay=draw.between(1e-3, 1.0), clipvalue=draw.between(0.01, 10.0)
    )
    if draw.chance():
        options[draw.choice('clipnorm', 'global_clipnorm')] = draw.between(0.01, 10.0)
    # It clips the values of repeated indices one by one, unlike their sum when dense.
    return {'options': options, 'problem': draw.choice('normal', 'sparse without repetitions')}


def tf_keras(draw: Draw) -> Options:
    options = draw.shared('rho', 'epsilon') | draw.some(
        weight_decay=draw.between(1e-3, 1.0), clipvalue=draw.between(0.01, 10.0)
    )
    if draw.chance():
        options[draw.choice('clipnorm', 'global_clipnorm')] = draw.between(0.01, 10.0)
    if draw.chance():
        options |= {'use_ema': True, **draw.some(ema_momentum=draw.decay())}
        options |= draw.some(ema_overwrite_frequency=draw.choice(None, 0, 1, 2, 3, 4, 5))
    return {'options': options} | draw.some(exclude=['scalar'])


def tensorflow(draw: Draw) -> Options:
    problem = draw.choice('normal', 'sparse')
    return {'options': draw.shared('decay', 'epsilon'), 'problem': problem}


def mxnet(draw: Draw) -> Options:
    return {'options': draw.shared('rho', 'epsilon') | _mxnet_common(draw)}


def mxnet1(draw: Draw) -> Options:
    options = draw.shared('gamma1', 'epsilon') | _mxnet_common(draw)
    if 'momentum' in options:
        options['gamma2'] = options.pop('momentum')
    return {'options': options}


def _mxnet_common(draw: Draw) -> Options:
    return draw.some(
        wd=draw.between(1e-3, 1.0),
        rescale_grad=draw.between(1e-2, 10.0),
        clip_gradient=draw.between(0.01, 10.0),
        clip_weights=draw.between(0.1, 10.0),
    )


def paddle(draw: Draw) -> Options:
    decay = draw.some(weight_decay=draw.between(1e-3, 1.0))
    return {'options': draw.shared('rho', 'epsilon') | decay}


def chainer(draw: Draw) -> Options:
    eps = draw.between(1e-8, 1.0)
    return {'options': draw.some(alpha=draw.decay(), eps=eps, eps_inside_sqrt=True)}


def chainer_graves(draw: Draw) -> Options:
    eps = draw.between(1e-8, 1.0)
    return {'options': draw.some(alpha=draw.decay(), momentum=draw.decay(), eps=eps)}


def mlx(draw: Draw) -> Options:
    return {'options': draw.some(alpha=draw.decay(), eps=draw.between(1e-8, 1.0))}


def bitsandbytes(draw: Draw) -> Options:
    options = draw.some(
        alpha=draw.decay(),
        eps=draw.between(1e-8, 1.0),
        momentum=draw.decay(),
        weight_decay=draw.between(1e-3, 1.0),
    )
    return {'options': options, 'dtype': 'float32'}


# How to draw, how many times, and what the learning rate is called.
DRAWS: dict[str, tuple[Callable[[Draw], Options], int, str]] = {
    'torch': (torch, 50, 'lr'),
    'timm': (timm, 50, 'lr'),
    'stable_baselines3': (stable_baselines3, 25, 'lr'),
    'keras': (keras, 60, 'learning_rate'),
    'keras_legacy': (keras_legacy, 40, 'learning_rate'),
    'tensorflow': (tensorflow, 40, 'learning_rate'),
    'mxnet': (mxnet, 20, 'learning_rate'),
    'mxnet_unfused': (mxnet, 20, 'learning_rate'),
    'mxnet1': (mxnet1, 25, 'learning_rate'),
    'sonnet': (tensorflow, 15, 'learning_rate'),
    'paddle': (paddle, 15, 'learning_rate'),
    'chainer': (chainer, 8, 'lr'),
    'chainer_graves': (chainer_graves, 8, 'lr'),
    'mlx': (mlx, 8, 'learning_rate'),
    'bitsandbytes': (bitsandbytes, 8, 'lr'),
    'tf_keras': (tf_keras, 40, 'learning_rate'),
    **declared('DRAWS'),
}
# Whose learning rate cannot change.
CONSTANT_RATE = {'mlx'}


def configurations(seed: int) -> list[dict[str, Any]]:
    """All draws; a seed gives the same ones on every machine."""
    found = []
    for index, (framework, (function, count, rate)) in enumerate(DRAWS.items()):
        draw = (ExactDraw if function in (mxnet, mxnet1) else Draw)(seed, index)
        for number in range(count):
            drawn = function(draw)
            one = {
                'name': f'{framework}: draw {number}',
                'framework': framework,
                'problem': 'normal',
                'dtype': 'float64',
                'steps': STEPS,
                'seed': int(draw.rng.integers(2**31)),
                'schedule': None,
                **drawn,
            }
            if framework not in CONSTANT_RATE and draw.chance():
                one['schedule'] = draw.schedule()
            else:
                one['options'][rate] = draw.between(1e-3, 0.3)
            found.append(one)
    return found


if __name__ == '__main__':
    target, *seed = sys.argv[1:]
    drawn = configurations(int(seed[0]) if seed else 0)
    Path(target).write_text(json.dumps(drawn))
    print(f'{len(drawn)} configurations drawn')
