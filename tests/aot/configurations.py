"""The configurations whose compiled step is looked at, drawn as products of their options."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import optax

import rmsprop_jax
from rmsprop_jax import dialects

# The formats of rmsprop_jax.storage whose configurations are compiled; float32 is the default.
FORMATS = ('float32', 'bfloat16', 'uint8')


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One optimizer and its test id; `moments` is the number of arrays kept for each parameter."""

    name: str
    make: Callable[[], optax.GradientTransformation]
    moments: int

    def kernels(self, target: str) -> int:
        """How many kernels the step on one leaf may have."""
        # What the random bits of a row have in common is a kernel of its own.
        return 1 + ('storage=' in self.name) + math.ceil(self.beyond(target) / 8)

    def beyond(self, target: str) -> int:
        """Bytes a parameter that the step may move beside the minimum, where a TPU's compiler
        writes the direction or the velocity out; it then takes a leaf of temporary memory."""
        kind, _, generation = target.partition('-')
        longest = ('storage=uint8', 'centered=True', 'nesterov=True')
        if kind == 'tpu' and all(part in self.name for part in longest):
            return 8
        return SPLIT.get(self.name, {}).get(generation, 0)


# A velocity in bfloat16 after a square root, a quotient and one more choice or quotient: these TPUs
# write it out in float32 and read it again.
SPLIT = {
    'rmsprop-storage=bfloat16-centered=True-momentum=0.9-bias_correction=True-eps_in_sqrt=True': {
        'v5p': 8,
        '7x': 8,
    },
    (
        'rmsprop-storage=bfloat16-centered=True-momentum=0.9-bias_correction=True-eps_in_sqrt=True'
        '-nesterov=True'
    ): {'7x': 14},
    'torch-storage=bfloat16-momentum=0.9': {'7x': 8},
    'torch-storage=bfloat16-centered=True-momentum=0.9': {'7x': 8},
}


# What formats other than float32 are combined with: the rest does not touch the moments.
COMBINED = {'bias_correction', 'centered', 'momentum'}


def _products(**options: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    for storage in FORMATS:
        drawn = {
            name: values if storage == 'float32' or name in COMBINED else values[:1]
            for name, values in options.items()
        }
        for values in itertools.product(*drawn.values()):
            yield {'storage': storage, **dict(zip(drawn, values, strict=True))}


def _named(
    factory: Callable[..., Any],
    options: dict[str, Any],
    *args: Any,
    moments: int | None = None,
) -> Configuration:
    shown = [f'{k}={v}' for k, v in options.items() if v not in (None, False, 0, 'float32')]
    if moments is None:
        moments = 1 + bool(options.get('centered')) + bool(options.get('momentum'))
    given = {k: v for k, v in options.items() if k != 'storage'}
    if (storage := options.get('storage', 'float32')) != 'float32':
        given['storage'] = _format(storage)
    return Configuration(
        '-'.join([factory.__name__, *shown]), lambda: factory(*args, **given), moments
    )


def _format(name: str) -> Any:
    chosen = getattr(rmsprop_jax.storage, name)()
    # Some hold no numbers that have a sign.
    holds_all = {'mu', 'trace'} <= set(chosen.holds)
    return chosen if holds_all else rmsprop_jax.storage.per_statistic(nu=chosen, var=chosen)


def _rmsprop() -> Iterator[Configuration]:
    for options in _products(
        centered=(False, True),
        momentum=(None, 0.9),
        bias_correction=(False, True),
        eps_in_sqrt=(True, False),
        weight_decay=(0.0, 1e-4),
    ):
        yield _named(rmsprop_jax.rmsprop, options, 1e-3)
        if options['momentum']:
            yield _named(rmsprop_jax.rmsprop, {**options, 'nesterov': True}, 1e-3)


def _frameworks() -> Iterator[Configuration]:
    both = {'centered': (False, True)}
    momentum = {**both, 'momentum': (0.0, 0.9)}
    for options in _products(**momentum, weight_decay=(0.0, 1e-4), maximize=(False, True)):
        yield _named(dialects.torch, options)
    for options in _products(
        **momentum, weight_decay=(None, 1e-4), clipvalue=(None, 1.0), loss_scale_factor=(None, 8.0)
    ):
        yield _named(dialects.keras, options)
    for options in _products(**momentum, clipvalue=(None, 1.0), decay=(0.0, 1e-3)):
        yield _named(dialects.keras_legacy, options)
    for options in _products(**both):
        options['momentum'] = 0.9
        yield _named(dialects.tensorflow, options, 1e-3)
    for options in _products(
        **momentum, weight_decay=(0.0, 1e-4), decoupled_decay=(False, True), lr_in_momentum=(0, 1)
    ):
        yield _named(dialects.timm, {**options, 'lr_in_momentum': bool(options['lr_in_momentum'])})
    for options in _products(**momentum, weight_decay=(0.0, 1e-4)):
        yield _named(dialects.stable_baselines3, options)
    for factory in (dialects.mxnet, dialects.mxnet1):
        for options in _products(
            **both, wd=(0.0, 1e-4), clip_gradient=(None, 1.0), clip_weights=(None, 10.0)
        ):
            # Momentum is used, and kept, only when centered.
            yield _named(factory, options, moments=3 if options['centered'] else 1)
    for options in _products():
        yield _named(dialects.graves, options, moments=3)
        yield _named(dialects.hinton, options, 1e-3, moments=1)


CONFIGURATIONS = (*_rmsprop(), *_frameworks())


@dataclasses.dataclass(frozen=True)
class Bounded:
    """A configuration that cannot do with one pass, or that a compiler splits.

    Attributes:
      name: Its test id.
      make: Builds it.
      moments: The number of arrays kept for each parameter.
      beyond: Bytes a float32 parameter that its step may move beside the minimum, by platform.
      kernels: Kernels that its step on one leaf may have, likewise.
      temporary: Temporary memory that it may need, in leaves, likewise.
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    moments: int
    beyond: dict[str, float]
    kernels: dict[str, int]
    temporary: dict[str, float] = dataclasses.field(default_factory=dict)


# A norm needs every gradient before the first update: gradients are read twice. GPUs sum in two
# steps.
TWICE: dict[str, Any] = {'beyond': {'tpu': 4, 'cuda': 4}, 'kernels': {'tpu': 2, 'cuda': 3}}
# The share of entries left is known only when all have been looked at; which ones they are is kept
# in a byte each, in fast memory where it fits.
CAUTION: dict[str, Any] = {
    'beyond': {'tpu': 6, 'cuda': 6},
    'kernels': {'tpu': 2, 'cuda': 3},
    'temporary': {'tpu': 0.26, 'cuda': 0.26},
}
# Whether a row is zero is known only when all of it has been looked at.
SPARSE: dict[str, Any] = {'beyond': {'tpu': 4, 'cuda': 4}, 'kernels': {'tpu': 2, 'cuda': 2}}
# TPUs run a conditional, which splits the step and returns updates as an array; GPUs choose between
# both of its branches element by element.
ACCUMULATION: dict[str, Any] = {
    'beyond': {'tpu': 16, 'cuda': 0},
    'kernels': {'tpu': 4, 'cuda': 1},
    'temporary': {'tpu': 1.01},
}
BOUNDED = (
    Bounded(
        'torch_clip_grad_norm',
        lambda: optax.chain(dialects.torch_clip_grad_norm(0.5), dialects.torch()),
        moments=1,
        **TWICE,
    ),
    Bounded(
        'optax.clip_by_global_norm',
        lambda: optax.chain(
            optax.clip_by_global_norm(1.0), rmsprop_jax.rmsprop(1e-3, centered=True, momentum=0.9)
        ),
        moments=3,
        **TWICE,
    ),
    Bounded('keras-clipnorm', lambda: dialects.keras(clipnorm=1.0), moments=1, **TWICE),
    Bounded(
        'keras-global_clipnorm', lambda: dialects.keras(global_clipnorm=1.0), moments=1, **TWICE
    ),
    # The average of the parameters is one more array; it costs no second pass.
    Bounded(
        'keras-use_ema',
        lambda: dialects.keras(momentum=0.9, use_ema=True),
        moments=3,
        beyond={'tpu': 0, 'cuda': 0},
        kernels={'tpu': 1, 'cuda': 1},
    ),
    # A TPU's compiler writes the update out before it is overwritten.
    Bounded(
        'keras-ema_overwrite_frequency',
        lambda: dialects.keras(momentum=0.9, use_ema=True, ema_overwrite_frequency=3),
        moments=3,
        beyond={'tpu': 12, 'cuda': 0},
        kernels={'tpu': 2, 'cuda': 1},
        temporary={'tpu': 1.01},
    ),
    Bounded(
        'keras-gradient_accumulation_steps',
        lambda: dialects.keras(gradient_accumulation_steps=2),
        moments=2,
        **ACCUMULATION,
    ),
    Bounded(
        'keras-everything',
        lambda: dialects.keras(
            momentum=0.5,
            centered=True,
            weight_decay=1e-3,
            global_clipnorm=10.0,
            use_ema=True,
            ema_overwrite_frequency=3,
            loss_scale_factor=2.0,
            gradient_accumulation_steps=2,
        ),
        moments=5,
        beyond={'tpu': 24, 'cuda': 8},
        kernels={'tpu': 5, 'cuda': 3},
        temporary={'tpu': 1.01},
    ),
    Bounded(
        'timm-caution',
        lambda: dialects.timm(momentum=0.9, caution=True),
        moments=2,
        **CAUTION,
    ),
    Bounded(
        'timm-caution-centered',
        lambda: dialects.timm(momentum=0.9, centered=True, caution=True),
        moments=3,
        **CAUTION,
    ),
    Bounded(
        'tensorflow-sparse',
        lambda: dialects.tensorflow(1e-3, momentum=0.9, sparse=True),
        moments=2,
        **SPARSE,
    ),
    Bounded(
        'keras_legacy-sparse',
        lambda: dialects.keras_legacy(1e-3, momentum=0.9, sparse=True),
        moments=2,
        **SPARSE,
    ),
    Bounded(
        'tensorflow-sparse-centered',
        lambda: dialects.tensorflow(1e-3, momentum=0.9, centered=True, sparse=True),
        moments=3,
        **SPARSE,
    ),
)
