"""Replays of recorded configurations with this package, and how far apart two traces are."""

import functools
import importlib
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden.configurations import declared, golden_configurations
from golden.problems import flat, learning_rates, problem, recorded_steps

from rmsprop_jax import dialects, rmsprop
from rmsprop_jax._transforms import skip_zero_rows
from rmsprop_jax.dialects._record import functions

Configuration = dict[str, Any]

# What these frameworks hold as float32 numbers even for float64 parameters. Ours is given the same
# numbers, and the rest of the arithmetic is float64 on both sides.
FLOAT32_HYPERPARAMETERS: dict[str, set[str]] = declared('FLOAT32')


def sonnet(
    learning_rate: Any,
    decay: Any = 0.9,
    momentum: Any = 0.0,
    epsilon: Any = 1e-10,
    centered: bool = False,
    *,
    sparse: Any = False,
) -> Any:
    step = rmsprop(learning_rate, decay, epsilon, momentum=momentum, centered=centered)
    return skip_zero_rows(step, sparse) if sparse else step


def chainer(lr: Any = 0.01, alpha: Any = 0.99, eps: Any = 1e-8, eps_inside_sqrt: bool = False):
    return rmsprop(lr, alpha, eps) if eps_inside_sqrt else dialects.torch(lr, alpha, eps)


def chainer_graves(lr: Any = 1e-4, alpha: Any = 0.95, momentum: Any = 0.9, eps: Any = 1e-4):
    return dialects.graves(lr, alpha, momentum, eps)


def paddle(
    learning_rate: Any,
    rho: Any = 0.95,
    epsilon: Any = 1e-6,
    momentum: Any = 0.0,
    centered: bool = False,
    weight_decay: float = 0.0,
) -> Any:
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        rmsprop(learning_rate, rho, epsilon, momentum=momentum, centered=centered),
    )


def mlx(learning_rate: Any, alpha: Any = 0.99, eps: Any = 1e-8) -> Any:
    return dialects.torch(learning_rate, alpha, eps)


def bitsandbytes(
    lr: Any = 1e-2, alpha: Any = 0.99, eps: Any = 1e-8, weight_decay: Any = 0, momentum: Any = 0
) -> Any:
    del momentum  # As in bitsandbytes.
    return dialects.torch(lr, alpha, eps, weight_decay)


FACTORIES: dict[str, Callable[..., Any]] = {
    **functions(),
    'mxnet_unfused': dialects.mxnet,
    'sonnet': sonnet,
    'chainer': chainer,
    'chainer_graves': chainer_graves,
    'paddle': paddle,
    'mlx': mlx,
    'bitsandbytes': bitsandbytes,
}
# How the framework runs an update, which is no business of ours.
EXECUTION = {'foreach'}


def transformation(configuration: Configuration) -> optax.GradientTransformationExtraArgs:
    """Ours, for a recorded configuration."""
    name = configuration['framework']
    factory, options = FACTORIES[name], configuration['options']
    parameters = inspect.signature(factory).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    given = {n: _as_held(name, n, o) for n, o in (defaults | options).items() if n not in EXECUTION}
    rates = learning_rates(configuration)
    if rates is not None:
        table = _as_held(name, 'schedule', rates)
        given['lr' if 'lr' in parameters else 'learning_rate'] = lambda t: jnp.asarray(table)[t]
        if options.get('corrected_weight_decay'):
            given['max_lr'] = configuration['schedule']['peak']
    if 'exclude' in configuration:
        excluded = configuration['exclude']
        given['mask'] = lambda params: {n: n not in excluded for n in params}
    if configuration['problem'].startswith('sparse') and 'sparse' in parameters:
        given['sparse'] = {'table': True, 'vector': False}
    tx = factory(**given)
    clip = configuration.get('clip')
    return optax.chain(_clip_grad_norm(**clip), tx) if clip else tx


def _as_held(framework: str, name: str, value: Any) -> Any:
    """A number, or a table of them, as the framework's arithmetic sees it."""
    held = FLOAT32_HYPERPARAMETERS.get(framework, set())
    if name not in held or not isinstance(value, float | np.ndarray):
        return value
    return np.asarray(value, np.float32).astype(np.float64)[()]


def _clip_grad_norm(max_norm: float, norm_type: float | str = 2.0) -> Any:
    return dialects.torch_clip_grad_norm(
        max_norm, math.inf if norm_type == 'inf' else float(norm_type)
    )


def replay(configuration: Configuration) -> np.ndarray:
    """Ours, at the steps and in the order of a recorded trace."""
    given = problem(configuration)
    tx = transformation(configuration)

    def step(carry: Any, gradients: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        average = optax.tree.get(state, 'ema')
        averages = {} if average is None else {f'average {n}': a for n, a in average.items()}
        return (params, state), params | averages

    params, gradients = jax.tree.map(jnp.asarray, (given.params, given.gradients))
    _, after = jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, gradients)
    trees = [
        {n: np.asarray(x[s - 1]) for n, x in after.items()} for s in recorded_steps(configuration)
    ]
    return np.stack([flat(tree) for tree in trees])


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the parameter or, where it passes near zero, to one.

    Parameters start as standard normal numbers, so that one is their unit: a step rounds them in
    that unit also on their way through zero.
    """
    return float(np.max(np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))))


# The recorded traces

GOLDEN = Path(__file__).parent / 'golden'
CONFIGURATIONS = {c['name']: c for c in golden_configurations()}


@functools.cache
def recorded() -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """All traces by name, and what each file says about itself."""
    traces, about = {}, []
    for path in sorted(GOLDEN.glob('*.npz')):
        with np.load(path) as file:
            about.append(json.loads(str(file['about'])) | {'family': path.stem})
            traces |= {name: file[name] for name in file.files if name != 'about'}
    return traces, about


def trace(name: str) -> np.ndarray:
    return recorded()[0][name]


def enable_x64(on: bool) -> Any:
    """`jax.enable_x64`, which has another place before JAX 0.8."""
    home = jax if hasattr(jax, 'enable_x64') else importlib.import_module('jax.experimental')
    return home.enable_x64(on)


def golden_error(name: str) -> tuple[float, float]:
    """How far the replay of a recorded configuration is from the trace, and the bound of that.

    In float64 it is the same to 1e-12 after every number of steps, which leaves rounding only: a
    step of a thousand rounds by 1e-16, and where errors add up they reach 1e-14.

    In float32 we are as close to the framework's float64 as its own float32 is. Two walks of a
    thousand roundings each have a root mean square that differs by chance, hence the factor. Where
    there is no float64, roundings of 2^-24 of the parameter add up as a random walk does: four
    deviations.

    Where gradients hardly change, a mean is rounded by 2^-24 of itself, and deviations from it are
    1e-5: there we are as close to our own float64, and frameworks turn NaN.
    """
    configuration = CONFIGURATIONS[name]
    wide = configuration['dtype'] == 'float64'
    with enable_x64(wide):
        ours = replay(configuration)
    if ours.shape != trace(name).shape or not np.isfinite(ours).all():
        return math.inf, 1.0
    if wide:
        return difference(ours, trace(name)), 1e-12
    if configuration['problem'] == 'nearly constant':
        with enable_x64(True):
            exact = replay(configuration | {'dtype': 'float64', 'float32 inputs': True})
        return difference(ours, exact), 2.0**-24 / 1e-5
    if not name.endswith(' in float32'):
        return difference(ours, trace(name)), 4 * 2.0**-24 * configuration['steps'] ** 0.5
    exact = trace(name.removesuffix(' in float32'))
    ours, theirs = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (ours, trace(name)))
    # Ours is not exact: that would say that it was not computed in float32.
    return (ours if ours > 0 else math.inf), 1.5 * theirs
