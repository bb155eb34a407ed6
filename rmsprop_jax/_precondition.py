"""`scale_by_rms`: gradients divided by the root of a running second moment or variance."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag, checked_state
from rmsprop_jax._core import moments
from rmsprop_jax._core.edge import public
from rmsprop_jax._core.leaves import Statistic, map_leaves
from rmsprop_jax._types import (
    Hyperparameter,
    RmsState,
    ScalarOrSchedule,
    cast,
    constant,
    decay_rate,
    is_normal,
    rounded,
)
from rmsprop_jax.storage._choice import Storage, check_storage, rounds
from rmsprop_jax.storage._rounding import next_unit


@public
def scale_by_rms(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divides gradients by the root of a running average of their squares.

    The arithmetic is in float32 or wider, whatever the dtype of parameters and gradients::

        nu <- decay nu + (1 - decay) |g|^2
        u   = g / sqrt(nu + eps)              with eps_in_sqrt, else  g / (sqrt(nu) + eps)

    `centered` replaces `nu` by the variance. Other libraries subtract `mu^2` from `nu`, and turn
    NaN when gradients hardly change. Here the variance itself is carried, as a sum of non-negative
    terms::

        var <- decay (var + (1 - decay) (c / c') |g - mu / c|^2)
        mu  <- mu + (1 - decay) (g - mu)
        u    = g / sqrt(var / c' + eps)

    Without bias correction, `c = c' = 1`. `bias_correction` divides the averages by `c'`, the sum
    of their weights. This is `1 - decay^t` while the decay is constant, and stays right when the
    decay changes::

        c'   = decay c + (1 - decay)          from c = 0

    A centered, bias-corrected first step from a zero start has variance zero, so it is `g /
    sqrt(eps)` (or `g / eps`). Give a positive `initial_scale` to avoid that. Where the root
    underflows to zero, the update is zero, so `eps=0` is safe.

    Args:
      decay: Weight of the past in the running averages, in [0, 1]. For a Python number, `1 - decay`
        is formed in double precision. A float32 array holds 0.999 to 3e-8, so `1 - decay` is right
        only to 3e-5.
      eps: Non-negative; in the squared unit of the gradient inside the root, in the unit of the
        gradient outside it.
      initial_scale: Start value of `nu` or `var`, non-negative, in the squared unit of the
        gradient.
      eps_in_sqrt: Whether `eps` is added inside the root (TensorFlow 1, Keras, Optax) or outside it
        (PyTorch).
      bias_correction: Whether to divide the averages by the sum of their weights, as in Adam.
      centered: Whether to divide by the standard deviation (Graves) rather than by the root mean
        square.
      storage: How the statistics are kept in memory: a format of `rmsprop_jax.storage`, or a choice
        of formats made with its `per_statistic`, `per_leaf` or `large_leaves`. None means float32.
        The step divides by the moment before it is rounded.

    `decay` and `eps` may be Python floats, scalar arrays (traced ones too) or schedules of the
    0-based step count.

    Under `jax.shard_map`, a leaf is one device's share of an array. Give `update` the argument
    `partition_specs`, a tree of `PartitionSpec`s like the parameters: formats that round then draw
    the random bits of the whole array. Without it, they draw the same bits for every share.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `RmsState`. Updates have the
      dtype of the gradients.

    Raises:
      ValueError: If a concrete hyperparameter is out of range, or gradients do not fit the state.
      TypeError: If a leaf is integer or boolean, the decay is narrower than float32, or the state
        is not an `RmsState`.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> tx = rmsprop_jax.scale_by_rms(decay=0.9, eps=0.0, bias_correction=True)
      >>> params = {'w': jnp.array([3.0, -4.0])}
      >>> updates, state = tx.update({'w': jnp.array([0.5, -8.0])}, tx.init(params))
      >>> print(updates['w'])  # the first corrected step has unit size
      [ 1. -1.]
      >>> print(optax.tree.get(state, 'nu')['w'].round(3))
      [0.025 6.4  ]

    References:
      Hinton, Srivastava and Swersky, Neural Networks for Machine Learning, lecture 6e, 2012.
      Graves, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850, equations 38 to
      41 (centered).

      West, Updating Mean and Variance Estimates: An Improved Method, CACM 22(9), 1979 (the
      variance recurrence).
    """
    return rms_step(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=centered, storage=storage
    )


def rms_step(
    decay: ScalarOrSchedule,
    eps: ScalarOrSchedule,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
    storage: Storage | None = None,
    of_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_rms` for our chains; `of_pairs` treats complex arrays as pairs of reals."""
    decay_, eps_ = decay_rate('decay', decay), Hyperparameter('eps', eps)
    start_value = constant('initial_scale', initial_scale)
    is_positive = is_normal(eps_.value)
    eps_in_sqrt = checked_flag('eps_in_sqrt', eps_in_sqrt)
    bias_correction = checked_flag('bias_correction', bias_correction)
    centered = checked_flag('centered', centered)
    if bias_correction and not isinstance(decay_.value, jax.Array) and decay_.value == 1:
        raise ValueError('decay must be below 1 with bias_correction: at 1, weights add up to 0.')

    statistics = ('var', 'mu') if centered else ('nu',)
    check_storage(storage, *statistics)
    has_unit = rounds(storage, statistics[0])
    first, *others = (Statistic(name, name != 'mu', storage, of_pairs) for name in statistics)

    def init(params: optax.Params) -> Any:
        magnitude = first.init(params, start_value)
        # One scalar serves every leaf, in the precision of the widest.
        dtypes = [first.dtype('params', x) for x in jax.tree.leaves(params)]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.float32)
        return RmsState(
            count=jnp.zeros([], jnp.int32),
            nu=None if centered else magnitude,
            mu=others[0].init(params, 0.0) if centered else None,
            var=magnitude if centered else None,
            weight=jnp.zeros([], widest) if bias_correction else None,
            unit=jnp.ones([], jnp.float32) if has_unit else None,
        )

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        partition_specs: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        _check_configuration(checked_state(state, RmsState), centered, bias_correction, has_unit)
        decay, one_minus_decay = decay_.with_complement_at(state.count)
        eps = eps_.at(state.count)
        weights = None
        if state.weight is not None:
            dtype = state.weight.dtype
            after = moments.averaging_weight(
                state.weight, cast(decay, dtype), cast(one_minus_decay, dtype)
            )
            weights = (state.weight, after)

        unit = None if state.unit is None else next_unit(state.unit, decay)

        def step(
            way: moments.Arithmetic, g: jax.Array, magnitude: jax.Array, *mean: jax.Array
        ) -> tuple[jax.Array, ...]:
            dtype = magnitude.dtype
            by = moments.Scalars(
                decay=rounded(decay, dtype),
                complement=rounded(one_minus_decay, dtype),
                eps=cast(eps, dtype),
                weights=weights and (weights[0].astype(dtype), weights[1].astype(dtype)),
                unit=1 if state.unit is None else state.unit,
            )
            if centered:
                return moments.centered_step(
                    g, magnitude, mean[0], by, eps_in_sqrt, is_positive, way
                )
            return moments.plain_step(g, magnitude, by, eps_in_sqrt, is_positive, way)

        trees = [(x, getattr(state, x.name)) for x in (first, *others)]
        new_updates, magnitude, *mean = map_leaves(
            step,
            updates,
            trees,
            count=state.count,
            units=(state.unit, unit),
            params=params,
            specs=partition_specs,
        )
        return new_updates, RmsState(
            count=optax.safe_increment(state.count),
            nu=None if centered else magnitude,
            mu=mean[0] if centered else None,
            var=magnitude if centered else None,
            weight=None if weights is None else weights[1],
            unit=unit,
        )

    return optax.GradientTransformationExtraArgs(init, update)


@public
def scale_by_stddev(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    storage: Storage | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_rms(..., centered=True)`, under Optax's name.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.scale_by_stddev(initial_scale=1.0)
      >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(u), 4) for u in updates]  # 2 / sqrt(0.9 (1 + 0.1 * 4) + 1e-8)
      [0.0, 1.7817]
    """
    return scale_by_rms(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=True, storage=storage
    )


def _check_configuration(
    state: RmsState, centered: bool, bias_correction: bool, has_unit: bool
) -> None:
    wanted = {'nu': not centered, 'mu': centered, 'var': centered, 'weight': bias_correction}
    if (state.unit is not None) != has_unit:
        raise ValueError(
            'state was made with another storage: storage.convert converts it to the new one.'
        )
    # A tree without leaves may itself be None, so only surplus fields are a sure sign.
    surplus = [
        n for n, expected in wanted.items() if not expected and getattr(state, n) is not None
    ]
    if surplus or (bias_correction and state.weight is None):
        raise ValueError(
            f'state was made by another configuration: with centered={centered} and '
            f'bias_correction={bias_correction} it must hold '
            f'{", ".join(n for n, expected in wanted.items() if expected)} and nothing else'
            f'{", but it has " + ", ".join(surplus) if surplus else ""}.'
        )
