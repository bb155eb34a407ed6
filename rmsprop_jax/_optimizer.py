"""`rmsprop`: preconditioner, learning rate, momentum and weight decay in Optax's order."""

import functools
import inspect
import math
import operator
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from rmsprop_jax._checks import (
    checked_flag,
    checked_mask,
    checked_params,
    checked_state,
    whole_mask,
)
from rmsprop_jax._core.chains import for_state, precise_chain
from rmsprop_jax._core.edge import compiled_alone, public
from rmsprop_jax._core.leaves import widen
from rmsprop_jax._core.moments import componentwise
from rmsprop_jax._core.programs import marked
from rmsprop_jax._momentum import trace_step
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._types import (
    Hyperparameter,
    Number,
    ScalarOrSchedule,
    cast,
    decay_rate,
    is_none_or_zero,
    rounded,
)
from rmsprop_jax.storage._choice import Storage

Factory = Callable[..., optax.GradientTransformation]


@public
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    *,
    weight_decay: ScalarOrSchedule | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp with Optax's argument names, order, defaults and results.

    `weight_decay` is decoupled. For L2 regularisation, which also enters the second moment, write::

        optax.chain(optax.add_decayed_weights(1e-4), rmsprop_jax.rmsprop(1e-3))

    `u` is the direction of `scale_by_rms`. The arithmetic is in float32 or wider, and only the
    final update is rounded::

        trace <- -learning_rate u + momentum trace         if momentum is given
        p     <- p + trace - learning_rate weight_decay p

    The learning rate enters before the momentum, as in TensorFlow, Keras and Optax. `nesterov` adds
    `-learning_rate u + momentum trace` instead of `trace`.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      decay: Weight of the past in the running averages, in [0, 1].
      eps: Non-negative; in the squared unit of the gradient inside the root, in the unit of the
        gradient outside it.
      initial_scale: Start value of the second moment: 0 in PyTorch and Keras, 1 in TensorFlow 1.
      eps_in_sqrt: Whether `eps` is added inside the root (TensorFlow 1, Keras, Optax) or outside it
        (PyTorch).
      centered: Whether to divide by the standard deviation rather than by the root mean square.
      momentum: Decay of the velocity, in [0, 1], or None for no velocity at all.
      nesterov: Whether momentum looks one step ahead. If `momentum` is None it has no effect, as in
        Optax, and a warning says so.
      bias_correction: Whether to divide the running averages by the sum of their weights.
      weight_decay: Share of a parameter that is subtracted at each step, times the learning rate.
        A Python zero (or None) means none; otherwise `update` needs `params`.
      mask: Which parameters decay: a tree of booleans like the parameters (or a prefix of it), or a
        function that returns such a tree for the parameters. None means all.
      storage: How the statistics are kept in memory: a format of `rmsprop_jax.storage`, or a choice
        of formats made with its `per_statistic`, `per_leaf` or `large_leaves`. None means float32.

    `learning_rate`, `decay`, `eps`, `momentum` and `weight_decay` may be Python floats, scalar
    arrays (traced ones too) or schedules of the 0-based step count.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the dtype of the gradients. Read the
      state by name: `optax.tree.get(state, 'nu')`, or `'mu'`, `'var'`, `'trace'`.

    Raises:
      ValueError: If a concrete hyperparameter is out of range, if gradients do not fit the state,
        or if weights decay and `params` are missing.
      TypeError: If a leaf is integer or boolean, a flag is not a boolean, or a decay or momentum is
        narrower than float32.

    Example:
      >>> import jax, jax.numpy as jnp, optax, rmsprop_jax
      >>> tx = rmsprop_jax.rmsprop(0.1, momentum=0.5)
      >>> loss = lambda x: jnp.sum(x**2)
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.01)
      True

    References:
      `optax.rmsprop`, whose results it reproduces where they are well-conditioned.
      Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    if checked_flag('nesterov', nesterov) and momentum is None:
        warnings.warn('nesterov has no effect if momentum is None.', stacklevel=2)
    steps = [
        rms_step(
            decay,
            eps,
            initial_scale,
            eps_in_sqrt,
            bias_correction,
            centered=centered,
            storage=storage,
        ),
        scale_by_learning_rate(learning_rate),
    ]
    if momentum is not None:
        steps.append(trace_step(decay_rate('momentum', momentum).value, nesterov, storage=storage))
    if weight_decay is not None and not is_none_or_zero(weight_decay):
        steps.append(subtract_decayed_weights(learning_rate, weight_decay, mask))
    return precise_chain(*steps)


def scale_by_learning_rate(learning_rate: ScalarOrSchedule) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, in the updates' precision whatever an array's dtype.

    The rate is marked for `diagnostics.learning_rates`, since a constant or a schedule is nowhere
    in the state.
    """
    rate = Hyperparameter('learning_rate', learning_rate, lower=-math.inf)
    is_scheduled = callable(learning_rate)

    def init(params: optax.Params) -> Any:
        del params
        if is_scheduled:
            return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        if is_scheduled:
            checked_state(state, optax.ScaleByScheduleState)
        number = marked(rate.at(state.count if is_scheduled else 0), updates)
        new_updates = jax.tree.map(
            lambda u: componentwise(operator.mul, u, -cast(number, u.real.dtype)), updates
        )
        if is_scheduled:
            state = optax.ScaleByScheduleState(count=optax.safe_increment(state.count))
        return new_updates, state

    return optax.GradientTransformation(init, update)


class DecoupledDecayState(NamedTuple):
    """State of `subtract_decayed_weights`: the number of steps so far, int32 of shape ()."""

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]


def subtract_decayed_weights(
    learning_rate: ScalarOrSchedule, weight_decay: ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformation:
    """`u <- u - learning_rate weight_decay p`, where `u` already includes its learning rate.

    `mask` chooses the parameters that decay, as in `optax.add_decayed_weights`; None means all.
    """
    rate = Hyperparameter('learning_rate', learning_rate, lower=-math.inf)
    strength = Hyperparameter('weight_decay', weight_decay)

    def init(params: optax.Params) -> Any:
        del params
        return DecoupledDecayState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        now = rate.at(state.count), strength.at(state.count)

        def leaf(u: jax.Array, p: jax.Array) -> jax.Array:
            lr, wd = (rounded(x, u.real.dtype) for x in now)
            return u - componentwise(operator.mul, p, lr * wd)

        new_updates = jax.tree.map(leaf, updates, params)
        return new_updates, DecoupledDecayState(count=optax.safe_increment(state.count))

    decay = optax.GradientTransformation(init, update)
    return _where(mask, decay, DecoupledDecayState, 'weight_decay')


def add_decayed_weights(
    weight_decay: ScalarOrSchedule, mask: Any = None, name: str = 'weight_decay'
) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`: `u <- u + weight_decay p`. Errors call the argument `name`."""
    strength = Hyperparameter(name, weight_decay)
    decay = optax.add_decayed_weights(strength.at if callable(weight_decay) else strength.at(0))
    return _where(mask, decay, type(decay.init({})), name)


def _where(
    mask: Any, decay: optax.GradientTransformation, kind: type, user: str
) -> optax.GradientTransformation:
    """A decay of weights whose state is a `kind`, for the parameters whose `mask` is true."""
    mask = checked_mask('mask', mask)
    inner = for_state(decay, kind)
    if mask is not None:
        masked = optax.masked(inner, lambda tree: whole_mask('mask', mask, tree))
        inner = for_state(masked, optax.MaskedState)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        wide = widen(checked_params(user, updates, params))
        return inner.update(updates, state, wide)

    return optax.GradientTransformation(inner.init, update)


_NONE_AT_ZERO = frozenset({'momentum', 'wd', 'weight_decay'})


def inject_hyperparams(
    inner_factory: Factory,
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: Any = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams` with settings that suit this package's factories.

    Hyperparameters are held in float32 (float64 with `jax_enable_x64`) even if parameters are
    narrower, since bfloat16 turns a decay of 0.999 into 1. For factories of this package there are
    three more differences:

    - Until a number is changed, the optimizer takes the same steps as without injection, bit for
      bit: `1 - decay` is formed from the Python number that was given. For a changed decay, it is
      formed from the float32 in the state, which is right to 3e-8. Under jit, the last bit may
      differ if a schedule multiplies and adds, if `sparse` rows are skipped, if an average replaces
      the parameters, or if gradients are scaled by a number that is not a power of two. XLA then
      rounds two operations once in one program and twice in the other.
    - Arguments that cannot be arrays, such as a `mask` or a number of accumulation steps, are not
      injected.
    - A Python zero for weight decay or momentum stays a Python zero, which means 'none' if the
      factory says so. Pass `jnp.array(0.0)` to be able to raise it later.

    Args:
      inner_factory: `rmsprop`, or any function that returns a gradient transformation.
      static_args: Names of further arguments that must stay static: functions that are not
        schedules.
      hyperparam_dtype: Another dtype for the injected numbers.

    Raises:
      TypeError: If the factory is not a function, a static argument is not a name, or the dtype is
        not floating.
      ValueError: If the factory does not have an argument that `static_args` names.

    Returns:
      A factory with the arguments of `inner_factory`. The state of the optimizer that it returns
      has a dictionary `hyperparams`.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> schedule = optax.linear_schedule(0.1, 0.0, 10)
      >>> tx = rmsprop_jax.inject_hyperparams(rmsprop_jax.rmsprop)(schedule, decay=0.99)
      >>> params = jnp.zeros(3, jnp.bfloat16)
      >>> state = tx.init(params)
      >>> _, state = tx.update(jnp.ones(3, jnp.bfloat16), state, params)
      >>> state.hyperparams['learning_rate'], state.hyperparams['decay']
      (Array(0.1, dtype=float32), Array(0.99, dtype=float32))
    """
    if not callable(inner_factory):
        raise TypeError(f'inner_factory must be a function, got {inner_factory!r}.')
    if hyperparam_dtype is not None:
        _check_floating('hyperparam_dtype', hyperparam_dtype)
    parameters = inspect.signature(inner_factory).parameters
    names, own = set(parameters), _is_own(inner_factory)
    static = _checked_static(static_args, names)
    if own:
        static |= {name for name, x in parameters.items() if not _is_hyperparameter(x.annotation)}

    @functools.wraps(inner_factory)
    def wrapped(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        factory, absent = inner_factory, set()
        if own:
            bound = inspect.signature(inner_factory).bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            absent = {name for name in _NONE_AT_ZERO & names if is_none_or_zero(given[name])}
            factory = _knowing(given, inner_factory)
        dtype = hyperparam_dtype or jax.dtypes.canonicalize_dtype(jnp.float64)
        tx = optax.inject_hyperparams(factory, static | absent, dtype)(*args, **kwargs)
        checked = for_state(tx, optax.InjectStatefulHyperparamsState)
        return checked._replace(update=compiled_alone(checked.update))

    return wrapped


def _is_hyperparameter(annotation: Any) -> bool:
    """Whether an argument of that type may be an array, and so may change during training."""
    return jax.Array in typing.get_args(annotation)


def _is_own(factory: Any) -> bool:
    """Whether a factory is from this package, so that its arguments are known."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    return str(getattr(factory, '__module__', '')).partition('.')[0] == __name__.partition('.')[0]


def _knowing(given: Mapping[str, Any], factory: Factory) -> Factory:
    """`factory`, which gets each number in the state along with the Python number given for it."""

    @functools.wraps(factory)
    def wrapped(**arguments: Any) -> optax.GradientTransformation:
        for name, number in given.items():
            held = arguments[name]
            if isinstance(number, float | np.floating) and isinstance(held, jax.Array):
                arguments[name] = Number.injected(held, float(number))
        return factory(**arguments)

    return wrapped


def _checked_static(static_args: Any, names: set[str]) -> set[str]:
    if not isinstance(static_args, Iterable):
        raise TypeError(f'static_args must be names of arguments, got {static_args!r}.')
    given = [static_args] if isinstance(static_args, str) else [*static_args]
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f'static_args must be names of arguments, got {name!r}.')
        if name not in names:
            raise ValueError(
                f'static_args names {name!r}, but inner_factory takes {", ".join(sorted(names))}.'
            )
    return set(given)


def _check_floating(name: str, dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f'{name} must be a floating dtype, got {dtype!r}.')
