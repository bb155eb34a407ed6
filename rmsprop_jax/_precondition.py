"""`scale_by_rms`: gradients divided by the root of a running second moment or variance."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from rmsprop_jax import _moments
from rmsprop_jax._lift import init_like, map_leaves
from rmsprop_jax._types import (
    Hyperparameter,
    ScalarOrSchedule,
    cast,
    checked_flag,
    complement,
    constant,
    decay_rate,
)


class RmsState(NamedTuple):
    """State of `scale_by_rms`. Trees mirror the parameters; None marks what a configuration does
    not have.

    Attributes:
      count: Steps taken so far, int32 of shape (), staying at its largest value rather than
        wrapping.
      nu: The raw second moment, real, in the squared unit of the gradient. None when centered.
      mu: The mean gradient, in the unit of the gradient. None unless centered.
      var: The variance times `weight`, real, in the squared unit of the gradient. None unless
        centered.
      weight: The sum of the weights that the averages have given to gradients so far, of shape ().
        None unless bias-corrected; it is then what the averages are divided by.
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    nu: Any
    mu: Any
    var: Any
    weight: jax.Array | None


def scale_by_rms(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
    *,
    centered: bool = False,
) -> optax.GradientTransformation:
    r"""Divides gradients by the root of a running average of their squares.

    In float32 or wider, whatever the dtype of parameters and gradients::

        nu <- decay nu + (1 - decay) |g|^2
        u   = g / sqrt(nu + eps)              with eps_in_sqrt, else  g / (sqrt(nu) + eps)

    `centered` puts the variance in the place of `nu`. It is carried by itself, as a sum of
    non-negative terms, where other libraries subtract `mu^2` from `nu` and turn NaN when gradients
    hardly change::

        var <- decay (var + (1 - decay) (c / c') |g - mu / c|^2)
        mu  <- mu + (1 - decay) (g - mu)
        u    = g / sqrt(var / c' + eps)

    with `c = c' = 1`. `bias_correction` divides the averages by the sum of their weights instead,
    which is `1 - decay^t` while the decay is constant and stays right when it is not::

        c'   = decay c + (1 - decay)          from c = 0

    A centered, bias-corrected first step from a zero start has variance zero, so it is `g /
    sqrt(eps)` (or `g / eps`): give a positive `initial_scale` to avoid that. Where the root
    underflows to zero the update is zero, so that `eps=0` is safe.

    Args:
      decay: Weight of the past in the running averages, in [0, 1). A Python number is complemented
        in double precision; a float32 array holds 0.999 to 3e-8, so its complement is right to 3e-5
        only.
      eps: Non-negative; in the squared unit of the gradient inside the root, in the unit of the
        gradient outside it.
      initial_scale: Start value of `nu` or `var`, non-negative, in the squared unit of the
        gradient.
      eps_in_sqrt: Whether `eps` is added inside the root (TensorFlow 1, Keras, Optax) or outside it
        (PyTorch).
      bias_correction: Whether the averages are divided by the sum of their weights, as in Adam.
      centered: Whether to divide by the standard deviation (Graves) rather than by the root mean
        square.

    `decay` and `eps` may be Python floats, scalar arrays (traced ones too) or schedules of the
    0-based step count.

    Returns:
      An `optax.GradientTransformation` whose state is an `RmsState`. Updates have the dtype of the
      gradients.

    Raises:
      ValueError: For a concrete hyperparameter out of range, or gradients that do not fit the
        state.
      TypeError: For integer or boolean leaves, for a decay narrower than float32, for a foreign
        state.

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
    decay_, eps_ = decay_rate('decay', decay), Hyperparameter('eps', eps)
    start_value = constant('initial_scale', initial_scale)
    eps_in_sqrt = checked_flag('eps_in_sqrt', eps_in_sqrt)
    bias_correction = checked_flag('bias_correction', bias_correction)
    centered = checked_flag('centered', centered)

    def init(params: optax.Params) -> Any:
        start = init_like(params, start_value, real=True)
        mean = init_like(params, 0.0) if centered else None
        # One scalar serves every leaf, in the precision of the widest.
        dtypes = [x.dtype for x in jax.tree.leaves(start)]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.float32)
        return RmsState(
            count=jnp.zeros([], jnp.int32),
            nu=None if centered else start,
            mu=mean,
            var=start if centered else None,
            weight=jnp.zeros([], widest) if bias_correction else None,
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        _check_state(state, centered, bias_correction)
        decay, eps = decay_.at(state.count), eps_.at(state.count)
        rest = complement(decay)
        weights = None
        if state.weight is not None:
            dtype = state.weight.dtype
            after = _moments.averaging_weight(state.weight, cast(decay, dtype), cast(rest, dtype))
            weights = (state.weight, after)

        def step(g: jax.Array, magnitude: jax.Array, *mean: jax.Array) -> tuple[jax.Array, ...]:
            d, r, e = (cast(x, magnitude.dtype) for x in (decay, rest, eps))
            c = weights and (weights[0].astype(magnitude.dtype), weights[1].astype(magnitude.dtype))
            if centered:
                (mu,) = mean
                magnitude = _moments.variance(magnitude, mu, g, d, r, c)
                mean = (_moments.mean(mu, g, r),)
            else:
                magnitude = _moments.second_moment(magnitude, g, d, r)
            moment = magnitude if c is None else magnitude / c[1]
            return _moments.direction(g, moment, e, eps_in_sqrt), magnitude, *mean

        magnitudes, means = ((state.var,), (state.mu,)) if centered else ((state.nu,), ())
        new_updates, magnitude, *mean = map_leaves(
            step, updates, magnitudes=magnitudes, means=means, params=params
        )
        return new_updates, RmsState(
            count=optax.safe_increment(state.count),
            nu=None if centered else magnitude,
            mu=mean[0] if centered else None,
            var=magnitude if centered else None,
            weight=None if weights is None else weights[1],
        )

    return optax.GradientTransformation(init, update)


def scale_by_stddev(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: ArrayLike = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> optax.GradientTransformation:
    """`scale_by_rms(..., centered=True)`, under the name Optax gives it.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.scale_by_stddev(initial_scale=1.0)
      >>> updates, _ = tx.update(jnp.array([0.0, 2.0]), tx.init(jnp.zeros(2)))
      >>> [round(float(u), 4) for u in updates]  # 2 / sqrt(0.9 (1 + 0.1 * 4) + 1e-8)
      [0.0, 1.7817]
    """
    return scale_by_rms(decay, eps, initial_scale, eps_in_sqrt, bias_correction, centered=True)


def _check_state(state: Any, centered: bool, bias_correction: bool) -> None:
    if not isinstance(state, RmsState):
        raise TypeError(f'state must be the RmsState made by init, got {type(state).__name__}.')
    wanted = {'nu': not centered, 'mu': centered, 'var': centered, 'weight': bias_correction}
    # A tree of no leaves may be None itself, so only what should be absent and is not can be told
    # for sure.
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
