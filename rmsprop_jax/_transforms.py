"""Small transformations that some dialect needs and Optax does not have."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import (
    check_alike,
    checked_mask,
    checked_params,
    checked_state,
    checked_steps,
    checked_transformation,
    whole_mask,
)
from rmsprop_jax._core.chains import in_accumulator_precision
from rmsprop_jax._core.edge import member, public
from rmsprop_jax._core.leaves import cast_like, init_like, widen
from rmsprop_jax._core.moments import componentwise, root_or_zero
from rmsprop_jax._core.wrapped import rms_states
from rmsprop_jax._parameters import check_does_not_round
from rmsprop_jax._types import (
    Optimizer,
    ScalarOrSchedule,
    Step,
    cast,
    constant,
    decay_rate,
    is_none_or_zero,
)
from rmsprop_jax.storage._formats import Means


class AverageState(NamedTuple):
    """State of `average_parameters`: calls so far, and the average, in float32 or wider."""

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    ema: Any


def average_parameters(
    momentum: ScalarOrSchedule,
    overwrite_frequency: int | None = None,
    every: int = 1,
    from_start: bool = False,
) -> Optimizer:
    """Averages the updated parameters as Keras does, and may replace them by the average.

    ::

        a <- momentum a + (1 - momentum) (p + u)          the first `every` calls: a <- p + u
        u <- a - p        where floor(call / every) + 1 is a multiple of overwrite_frequency

    With `from_start`, as in tf_keras, `a` starts at the first call's `p`, and no call copies.
    Must be the last transformation of a chain. Updates have the parameters' dtype.
    """
    weight = decay_rate('ema_momentum', momentum)
    copied = 0 if from_start else 1
    if overwrite_frequency is not None:
        overwrite_frequency = checked_steps('ema_overwrite_frequency', overwrite_frequency, least=1)

    def init(params: optax.Params) -> Any:
        return AverageState(count=jnp.zeros([], jnp.int32), ema=init_like(params, 0.0))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        check_alike(
            'params',
            checked_params('use_ema', updates, params),
            'the average in the state',
            checked_state(state, AverageState).ema,
        )
        step = state.count // every
        # Selected even if no call copies: XLA may round a constant differently from the same number
        # in the state of `inject_hyperparams`. Also, `interchange` measures at a step of -1.
        past = jnp.where(step < copied, 0.0, weight.at(state.count))
        wide, ema = widen(params), state.ema
        if from_start:
            # Not in `init`, where no value depends on a parameter.
            ema = jax.tree.map(lambda a, p: jnp.where(step == 0, p, a), ema, wide)
        target = jax.tree.map(jnp.add, wide, widen(updates))

        def average(a: jax.Array, p: jax.Array) -> jax.Array:
            w = cast(past, a.real.dtype)
            return componentwise(operator.mul, a, w) + componentwise(operator.mul, p, 1 - w)

        ema = jax.tree.map(average, ema, target)
        if overwrite_frequency is not None:
            due = (step + 1) % overwrite_frequency == 0
            target = jax.tree.map(lambda a, p: jnp.where(due, a, p), ema, target)
            updates = jax.tree.map(lambda t, p: t - p, target, wide)
        return cast_like(updates, params), AverageState(optax.safe_increment(state.count), ema)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_parameters(name: str, limit: ArrayLike) -> Optimizer:
    """Clips the updated parameters to `[-limit, limit]`. Must be last in a chain."""
    bound = constant(name, limit)

    def clip(updates: Any, params: Any) -> Any:
        wide = widen(checked_params(name, updates, params))

        def leaf(p: jax.Array, u: jax.Array) -> jax.Array:
            return jnp.clip(p + u, -cast(bound, p.dtype), cast(bound, p.dtype)) - p

        return cast_like(jax.tree.map(leaf, wide, widen(updates)), params)

    return optax.with_extra_args_support(optax.stateless(clip))


@public
def cautious(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Holds back the entries of an update whose sign does not oppose the gradient's.

    ::

        u <- inner(g)
        m  = 1 where u g < 0, else 0
        u <- u m / max(mean of m over the array, 0.001)

    The gradient is what this transformation is given, so clipping belongs before it. The state of
    `inner`, its velocity included, does not change. Without momentum and weight decay every update
    opposes its gradient, and only entries whose gradient is zero make a difference.

    Args:
      inner: A descent: an optimizer whose updates are added to the parameters.

    Returns:
      An `optax.GradientTransformationExtraArgs` with the state of `inner`. The mean is that of the
      whole array under `jit` on any mesh, and of one device's share under `jax.shard_map`.

    Raises:
      TypeError: For an `inner` that is not a transformation, or for complex gradients, which have
        no sign.
      ValueError: If `inner` rounds parameters: `round_parameters` belongs around this one.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.cautious(rmsprop_jax.rmsprop(0.1, momentum=0.9))
      >>> params = jnp.zeros(2)
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), tx.init(params))
      >>> updates, state = tx.update(jnp.array([1.0, -0.1]), state)
      >>> print(updates.round(2))  # the velocity of the second still points the other way
      [-1.03 -0.  ]

    Source: Liang et al., Cautious Optimizers, arXiv:2411.16085, as in timm 1.0.31's `caution`.
      Optax has it as a proposal only (optax#1690).
    """
    inner_ = member(checked_transformation('inner', inner))

    def init(params: optax.Params) -> Any:
        state = inner_.init(params)
        check_does_not_round(state, 'write round_parameters(cautious(...)).')
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        for path, g in tree_flatten_with_path(updates)[0]:
            if jnp.iscomplexobj(g):
                raise TypeError(f'updates{keystr(path)} is complex, and cautious needs a sign.')
        new, state = inner_.update(updates, state, params, **extra_args)

        def leaf(u: jax.Array, g: jax.Array) -> jax.Array:
            agrees = (u * g < 0).astype(u.dtype)
            return u * (agrees / jnp.maximum(agrees.mean(), 1e-3))

        return jax.tree.map(leaf, new, updates), state

    step = optax.GradientTransformationExtraArgs(init, update)
    return in_accumulator_precision(step, with_params=True)


def skip_zero_rows(inner: Step, mask: Any = True) -> Optimizer:
    """Skips rows whose gradient is exactly zero, in the parameters and in their statistics.

    Args:
      inner: A transformation whose moments have the shape of the parameters.
      mask: Which parameters it applies to: True for all, a tree of booleans, or a function that
        returns such a tree for the parameters (or gradients).
    """
    inner_ = member(inner)
    mask = checked_mask('sparse', mask)

    def untouched(updates: Any) -> Any:
        chosen = whole_mask('sparse', mask, updates)

        def leaf(g: jax.Array, is_sparse: bool) -> jax.Array:
            zero = g == 0
            rows = jnp.all(zero, axis=tuple(range(1, jnp.ndim(g))), keepdims=True)
            # Unlike a broadcast, this is sharded like the gradient on meshes with explicit axes.
            # The compiler removes it; `zero & rows` would be written to memory on GPUs.
            none = zero & False
            return none | rows if is_sparse else none

        return jax.tree.map(leaf, updates, chosen)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        _check_rows_can_be_held(state)
        new, after = inner_.update(updates, state, params, **extra_args)
        rows = untouched(updates)
        # Each statistic has the rows of its parameter; counts and weights go on.
        held = optax.tree.map_params(
            inner_, lambda _, r: r, state, rows, transform_non_params=lambda _: False
        )
        after = jax.tree.map(lambda h, a, b: jnp.where(h, b, a), held, after, state)
        return jax.tree.map(lambda r, u: jnp.where(r, 0, u), rows, new), after

    return optax.GradientTransformationExtraArgs(inner_.init, update)


def _check_rows_can_be_held(state: Any) -> None:
    """Raises for rounded averages, whose unit decays, and factored ones, which have no rows."""
    for node in rms_states(state):
        kept = jax.tree.leaves(node.nu, is_leaf=lambda x: isinstance(x, Means))
        if node.unit is not None or any(isinstance(x, Means) for x in kept):
            raise ValueError(
                'rows can be held still only in float32: with sparse, choose no other storage for '
                'nu and var.'
            )


class AccumulateState(NamedTuple):
    """State of `accumulate`.

    Attributes:
      mini_step: Calls since the last step, named as in `optax.MultiSteps`.
      total: The sum of their gradients, in float32 or wider.
      inner: The state of the wrapped transformation.
    """

    mini_step: ArrayLike
    total: Any
    inner: Any


def accumulate(inner: Step, every: int) -> Optimizer:
    """Passes the mean of `every` successive gradients to `inner`; calls in between return zeros.

    `optax.MultiSteps` casts its sum to one dtype for all leaves. That is wrong for complex
    parameters, and for float32 ones with `jax_enable_x64`.
    """
    inner_ = member(inner)

    def init(params: optax.Params) -> Any:
        state = inner_.init(params)
        return AccumulateState(jnp.zeros([], jnp.int32), init_like(params, 0.0), state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        checked_state(state, AccumulateState)
        check_alike('updates', updates, 'the state', state.total)
        total = jax.tree.map(jnp.add, state.total, widen(updates))

        def step() -> tuple[Any, Any]:
            mean = scaled(total, 1 / every)
            new, after = inner_.update(mean, state.inner, params, **extra_args)
            zero = jax.tree.map(jnp.zeros_like, total)
            return cast_like(new, updates), AccumulateState(jnp.zeros([], jnp.int32), zero, after)

        def wait() -> tuple[Any, Any]:
            zero = jax.tree.map(jnp.zeros_like, updates)
            return zero, AccumulateState(state.mini_step + 1, total, state.inner)

        return lax.cond(state.mini_step >= every - 1, step, wait)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_value(name: str, limit: ArrayLike) -> Step:
    """`g <- min(max(g, -limit), limit)`, entry by entry."""
    bound = constant(name, limit)

    def clip(g: jax.Array) -> jax.Array:
        return jnp.clip(g, -cast(bound, g.dtype), cast(bound, g.dtype))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def clip_each_norm(name: str, limit: ArrayLike) -> Step:
    """`g <- g limit / max(norm, limit)`, array by array."""
    bound = constant(name, limit)
    return optax.stateless(
        lambda updates, _: jax.tree.map(lambda g: _clipped_to_norm(g, bound), updates)
    )


def clip_global_norm(name: str, limit: ArrayLike) -> Step:
    """`g <- g limit / max(norm, limit)`, with the norm of all arrays together.

    As in TensorFlow, an infinite norm makes all of them NaN.
    """
    bound = constant(name, limit)

    def clip(updates: Any, _: Any) -> Any:
        clipped, norm = _clipped_to_norm(updates, bound), norm_of(updates)
        return jax.tree.map(lambda g: jnp.where(jnp.isfinite(norm), g, jnp.nan), clipped)

    return optax.stateless(clip)


def norm_of(updates: Any) -> jax.Array:
    """The norm of all arrays of a tree together, differentiable at zero."""
    return root_or_zero(jnp.asarray(optax.tree.norm(updates, squared=True)))


def _clipped_to_norm(updates: Any, bound: Any) -> Any:
    norm = norm_of(updates)
    bound = cast(bound, norm.dtype)
    return scaled(updates, bound / jnp.maximum(norm, bound))


def rescale(name: str, factor: ArrayLike) -> Step:
    """`g <- factor g`."""
    number = constant(name, factor)
    return optax.stateless(lambda updates, _: scaled(updates, number))


def unscale(name: str, factor: ArrayLike) -> Step:
    """`g <- g / factor`."""
    number = constant(name, factor)
    if is_none_or_zero(number):
        raise ValueError(f'{name} must not be zero.')

    def divide(g: jax.Array) -> jax.Array:
        return componentwise(operator.truediv, g, cast(number, g.real.dtype))

    return optax.stateless(lambda updates, _: jax.tree.map(divide, updates))


def scaled(updates: Any, factor: Any) -> Any:
    """Every array of a tree times a real scalar."""
    return jax.tree.map(
        lambda g: componentwise(operator.mul, g, cast(factor, g.real.dtype)), updates
    )
