"""The public transformations, once, for every test that walks over them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a public factory, and what is true of it.

    Attributes:
      name: Its test id.
      make: Builds the transformation.
      descends: Whether its updates decrease a loss by themselves.
      moments: The names of the moments in its state.
      needs_params: Whether `update` must be given the parameters.
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    moments: tuple[str, ...]
    descends: bool = True
    needs_params: bool = False


def _inverse(count: jax.Array) -> jax.Array:
    return 1.0 / (count + 1).astype('float32')


def _halved(count: jax.Array) -> jax.Array:
    return 0.025 + 0.025 * _inverse(count)


def _decay(count: jax.Array) -> jax.Array:
    return 0.99 - 0.5 * _inverse(count)


CENTERED = ('mu', 'var')
CASES = (
    Case('scale_by_rms', rmsprop_jax.scale_by_rms, ('nu',), descends=False),
    Case(
        'scale_by_rms-outside-corrected',
        lambda: rmsprop_jax.scale_by_rms(0.99, 1e-3, 1.0, False, True),
        ('nu',),
        descends=False,
    ),
    Case('scale_by_stddev', rmsprop_jax.scale_by_stddev, CENTERED, descends=False),
    Case(
        'scale_by_stddev-outside-corrected',
        lambda: rmsprop_jax.scale_by_stddev(0.99, 1e-3, 1.0, False, True),
        CENTERED,
        descends=False,
    ),
    Case('trace', lambda: rmsprop_jax.trace(0.9), ('trace',), descends=False),
    Case('trace-nesterov', lambda: rmsprop_jax.trace(0.9, True), ('trace',), descends=False),
    Case('rmsprop', lambda: rmsprop_jax.rmsprop(0.05), ('nu',)),
    Case('rmsprop-momentum', lambda: rmsprop_jax.rmsprop(0.01, momentum=0.9), ('nu', 'trace')),
    Case(
        'rmsprop-everything',
        lambda: rmsprop_jax.rmsprop(
            _halved,
            _decay,
            eps=lambda count: 1e-4 * _inverse(count),
            initial_scale=1.0,
            centered=True,
            momentum=optax.linear_schedule(0.0, 0.9, 50),
            nesterov=True,
            bias_correction=True,
            weight_decay=1e-3,
            mask=lambda params: jax.tree.map(lambda p: jnp.ndim(p) > 0, params),
        ),
        (*CENTERED, 'trace'),
        needs_params=True,
    ),
    Case(
        'inject_hyperparams',
        lambda: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(
            _halved, decay=0.99, momentum=0.5, bias_correction=True
        ),
        ('nu', 'trace'),
    ),
    Case(
        'optax.inject_hyperparams',
        lambda: optax.inject_hyperparams(rmsprop_jax.rmsprop, hyperparam_dtype='float32')(
            0.05, decay=_decay, centered=True, weight_decay=1e-3
        ),
        CENTERED,
        needs_params=True,
    ),
)
