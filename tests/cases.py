"""The public transformations, once, for every test that walks over them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import rmsprop_jax
from rmsprop_jax import dialects, storage
from rmsprop_jax.dialects._record import functions


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of a public factory, and what is true of it.

    Attributes:
      name: Its test id.
      make: Builds the transformation.
      descends: Whether its updates decrease a loss by themselves.
      moments: The names of the moments in its state.
      needs_params: Whether `update` must be given the parameters.
      elementwise: Whether each entry is treated by itself, so that leaves and shards may be split.
      real_only: Whether it makes no sense for complex arrays.
      rewrites_params: Whether its updates lead to parameters of its own, in their dtype.
      rounds_params: Whether it rounds bfloat16 parameters, to which its updates lead in float32.
      every: How many calls make a step.
      compact: Whether its state is kept in other formats than float32.
    """

    name: str
    make: Callable[[], optax.GradientTransformation]
    moments: tuple[str, ...]
    descends: bool = True
    needs_params: bool = False
    elementwise: bool = True
    real_only: bool = False
    rewrites_params: bool = False
    rounds_params: bool = False
    every: int = 1
    compact: bool = False

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """One for all tests, so that its compiled step is too."""
        return self.make()


def _inverse(count: ArrayLike) -> jax.Array:
    return 1.0 / (1.0 + jnp.asarray(count, 'float32'))


def _halved(count: ArrayLike) -> jax.Array:
    return 0.025 + 0.025 * _inverse(count)


def _decay(count: ArrayLike) -> jax.Array:
    return 0.99 - 0.5 * _inverse(count)


def _with_four_statistics(**options: Any) -> optax.GradientTransformation:
    """A mean, a variance, their sum of weights and a velocity."""
    return rmsprop_jax.rmsprop(
        _halved,
        _decay,
        initial_scale=1.0,
        centered=True,
        momentum=0.5,
        bias_correction=True,
        **options,
    )


def _usual(name: str) -> Case:
    """A dialect with the options that most have."""
    parameters = inspect.signature(functions()[name]).parameters
    options = {'momentum': 0.5, 'weight_decay': 1e-3, 'lr': _halved, 'learning_rate': _halved}
    given = {n: x for n, x in options.items() if n in parameters}
    return Case(
        name,
        functools.partial(functions()[name], **given),
        ('nu', 'trace') if 'momentum' in given else ('nu',),
        needs_params='weight_decay' in given,
    )


def masking(rate: float, decay: float) -> dict[str, Callable[[Any], optax.GradientTransformation]]:
    """The dialects that take a mask, each as a function of it: it decays, or holds still, what the
    mask chooses."""
    found = {}
    for name, function in functions().items():
        parameters = inspect.signature(function).parameters
        options = {n: decay for n in ('weight_decay', 'wd') if n in parameters}
        argument = 'mask' if 'mask' in parameters else 'sparse' if 'sparse' in parameters else None
        if argument is not None:
            made = functools.partial(function, rate, **(options or {'momentum': 0.5}))
            found[name] = lambda mask, made=made, argument=argument: made(**{argument: mask})
    return found


CENTERED = ('mu', 'var')
_EVERY_BYTE = storage.per_leaf(lambda path, shape: storage.uint8())
_CASES = (
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
        lambda: optax.inject_hyperparams(
            rmsprop_jax.rmsprop, hyperparam_dtype=jnp.dtype('float32')
        )(0.05, decay=_decay, centered=True, weight_decay=1e-3),
        CENTERED,
        needs_params=True,
    ),
    Case(
        'torch',
        lambda: dialects.torch(_halved, weight_decay=1e-2, momentum=0.9, centered=True),
        (*CENTERED, 'trace'),
        needs_params=True,
    ),
    Case(
        'torch_clip_grad_norm',
        lambda: dialects.torch_clip_grad_norm(0.5),
        (),
        descends=False,
        elementwise=False,
    ),
    Case(
        'keras',
        lambda: dialects.keras(
            _halved,
            momentum=0.5,
            weight_decay=1e-3,
            clipnorm=10.0,
            use_ema=True,
            ema_momentum=0.5,
            ema_overwrite_frequency=3,
            loss_scale_factor=2.0,
            gradient_accumulation_steps=2,
        ),
        ('nu', 'trace'),
        needs_params=True,
        elementwise=False,
        real_only=True,
        rewrites_params=True,
        every=2,
    ),
    Case(
        'keras_legacy',
        lambda: dialects.keras_legacy(_halved, clipvalue=2.0, decay=1e-3),
        ('nu',),
        real_only=True,
    ),
    Case(
        'tf_keras',
        lambda: dialects.tf_keras(
            _halved,
            momentum=0.5,
            weight_decay=1e-3,
            use_ema=True,
            ema_momentum=0.5,
            ema_overwrite_frequency=3,
        ),
        ('nu', 'trace'),
        needs_params=True,
        real_only=True,
        rewrites_params=True,
    ),
    Case(
        'tensorflow',
        lambda: dialects.tensorflow(0.02, momentum=0.5, centered=True, sparse=True),
        (*CENTERED, 'trace'),
    ),
    Case(
        'timm',
        lambda: dialects.timm(
            _halved,
            weight_decay=1e-3,
            momentum=0.9,
            decoupled_decay=True,
            corrected_weight_decay=True,
            lr_in_momentum=False,
            caution=True,
            max_lr=0.05,
        ),
        ('nu', 'trace'),
        needs_params=True,
        elementwise=False,
        real_only=True,
    ),
    Case(
        'stable_baselines3',
        lambda: dialects.stable_baselines3(0.02, momentum=0.5),
        ('nu', 'trace'),
    ),
    Case(
        'mxnet',
        lambda: dialects.mxnet(0.02, clip_weights=5.0, wd=1e-3, clip_gradient=3.0),
        ('nu',),
        needs_params=True,
        rewrites_params=True,
        real_only=True,
    ),
    Case('mxnet1', lambda: dialects.mxnet1(0.02, centered=True), (*CENTERED, 'trace')),
    Case(
        'rmsprop-bfloat16',
        lambda: _with_four_statistics(
            storage=storage.large_leaves(storage.bfloat16(), min_size=1, min_ndim=0)
        ),
        (*CENTERED, 'trace'),
        elementwise=False,
        real_only=True,
        compact=True,
    ),
    Case(
        'inject_hyperparams-uint8',
        lambda: rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(0.02, storage=_EVERY_BYTE),
        ('nu',),
        elementwise=False,
        compact=True,
    ),
    Case(
        'torch-factored',
        lambda: dialects.torch(0.02, storage=storage.large_leaves(storage.factored(), min_size=1)),
        ('nu',),
        elementwise=False,
        compact=True,
    ),
    Case(
        'skip_nonfinite-coordinate',
        lambda: rmsprop_jax.skip_nonfinite(_with_four_statistics()),
        (*CENTERED, 'trace'),
        # Its count is of the shard.
        elementwise=False,
    ),
    Case(
        'skip_nonfinite-leaf-uint8',
        lambda: rmsprop_jax.skip_nonfinite(
            rmsprop_jax.rmsprop(0.02, storage=_EVERY_BYTE), 'leaf', storage=_EVERY_BYTE
        ),
        ('nu',),
        elementwise=False,
        compact=True,
    ),
    Case(
        'cautious',
        lambda: rmsprop_jax.cautious(rmsprop_jax.rmsprop(_halved, momentum=0.9)),
        ('nu', 'trace'),
        elementwise=False,
        real_only=True,
    ),
    Case(
        'round_parameters',
        lambda: rmsprop_jax.round_parameters(
            rmsprop_jax.rmsprop(_halved, momentum=0.5, weight_decay=1e-3)
        ),
        ('nu', 'trace'),
        needs_params=True,
        rounds_params=True,
    ),
    Case('graves', lambda: dialects.graves(0.01), (*CENTERED, 'trace')),
    Case('hinton', lambda: dialects.hinton(0.02), ('nu',)),
)
CASES = (*_CASES, *map(_usual, sorted(functions().keys() - {case.name for case in _CASES})))
