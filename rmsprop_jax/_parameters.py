"""Stochastic rounding of updated parameters, so that bfloat16 training needs no float32 copy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike

from rmsprop_jax._checks import (
    check_alike,
    checked_params,
    checked_state,
    checked_transformation,
)
from rmsprop_jax._core.edge import member, public
from rmsprop_jax._core.leaves import widen
from rmsprop_jax._types import by_path, canonical
from rmsprop_jax.storage._formats import bfloat16
from rmsprop_jax.storage._rounding import random_bits, salt

# What errors call the updates that `inner` returns.
RESULT = "inner's updates"


class RoundParametersState(NamedTuple):
    """State of `round_parameters`.

    Attributes:
      count: Steps taken so far, int32 of shape (). It stays at its largest value instead of
        wrapping around.
      inner_state: The state of the wrapped transformation.
    """

    count: ArrayLike  # pyright: ignore[reportIncompatibleMethodOverride]
    inner_state: Any


@public
def round_parameters(
    inner: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters without a float32 copy: updated parameters are rounded
    stochastically.

    ::

        u <- inner(g, p)                                in float32, from the gradient on
        t  = a random one of the two bfloat16 numbers around p + u, on average p + u
        u <- t - p                                      in float32

    With round-to-nearest, a bfloat16 parameter of 1 does not move at all under updates of 0.001.
    Here it moves by the sum of its updates, on average.

    `inner` gets bfloat16 parameters and their gradients in float32, so that nothing is rounded
    before the end. Everything that changes an update therefore belongs inside: clipping, weight
    decay, a dialect that averages or clips parameters. Such an average is taken of `p + u`, before
    rounding. If `inner` clips to a number that bfloat16 does not have, a parameter may end on the
    next bfloat16 number. Wrappers that pass updates on unchanged or replace them by zero belong
    outside: `optax.MultiSteps`, `optax.masked`, `skip_nonfinite`. (`optax.apply_if_finite` belongs
    inside: its skipped updates have the dtype of the gradients.)

    Leaves of other dtypes, float16 included, are not rounded.

    Apply updates with `optax.apply_updates`, `nnx.Optimizer` or a `TrainState`, which cast to the
    dtype of the parameter and so give `t` exactly. `equinox.apply_updates` does not cast: with it,
    the model would become float32.

    Args:
      inner: The optimizer to wrap, with its learning rate.
      seed: The seed of the random bits. The bits depend on the seed, the step, the path of the leaf
        and the index of the entry. They do not depend on devices, meshes or other leaves.

    `p + u` is a float32 sum with a relative error of at most 2^-24. Where it is smaller than
    2^-118, infinite or NaN, `u` passes unchanged. Where it is finite but exceeds bfloat16's largest
    number, `t` is that number. Derivatives pass through the rounding unchanged.

    Returns:
      An `optax.GradientTransformationExtraArgs` with a `RoundParametersState`. `update` needs
      `params`; updates of bfloat16 parameters are float32. Under `jax.shard_map`, give `update` the
      argument `partition_specs`, as for `scale_by_rms`.

    Raises:
      TypeError: If `inner` is not a transformation, returns updates narrower than float32 or
        changes the dtypes of its state, or if `seed` is not a Python integer.
      ValueError: If `params` are missing, `inner` rounds parameters itself, or its updates are not
        like `params`.

    Example:
      >>> import jax.numpy as jnp, optax, rmsprop_jax
      >>> from rmsprop_jax import storage
      >>> tx = rmsprop_jax.round_parameters(rmsprop_jax.rmsprop(1e-3, storage=storage.uint8()))
      >>> params = jnp.ones((64, 64), jnp.bfloat16)
      >>> state = tx.init(params)
      >>> for _ in range(10):  # steps of 0.01 or less; the largest bfloat16 below 1 is 0.996
      ...     updates, state = tx.update(jnp.ones_like(params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params.dtype, optax.tree.get(state, 'nu').dtype, round(float(params.mean()), 2)
      (dtype(bfloat16), dtype('uint8'), 0.98)

    Reference:
      Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551.
    """
    inner_ = member(checked_transformation('inner', inner))
    own = bfloat16(seed=seed)

    def init(params: optax.Params) -> Any:
        state = inner_.init(params)
        check_does_not_round(state, 'wrap the whole chain, and only once.')
        return RoundParametersState(jnp.zeros([], jnp.int32), state)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        before = checked_state(state, RoundParametersState).inner_state
        checked_params('round_parameters', updates, params)
        new, after = inner_.update(
            jax.tree.map(_widened, updates, params),
            before,
            jax.tree.map(_widened, params, params),
            **extra_args,
        )
        _check_dtypes_stay(before, after)
        check_alike(RESULT, new, 'params', params)
        partition = by_path(extra_args.get('partition_specs'))

        def leaf(path: Any, u: Any, p: Any) -> Any:
            if not _is_rounded(p):
                return u
            _check_is_wide(f'{RESULT}{keystr(path)}', u)
            path = canonical(path)
            bits = salt(own.key(f'parameter{keystr(path)}'), state.count)
            return _rounded_update(p, u, bits, partition.get(path))

        new = jax.tree_util.tree_map_with_path(leaf, new, params)
        return new, RoundParametersState(optax.safe_increment(state.count), after)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_rounded(param: Any) -> bool:
    return jnp.result_type(param) == jnp.bfloat16


def _widened(x: Any, param: Any) -> Any:
    return widen(x) if _is_rounded(param) else x


@functools.partial(jax.jit, static_argnums=3)
def _rounded_update(p: Any, u: Any, salt: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    p, u = (jnp.asarray(x, jnp.float32) for x in (p, u))
    return _to_target(p, u, random_bits(p.shape, salt, spec))


@jax.custom_jvp
def _to_target(p: jax.Array, u: jax.Array, bits: jax.Array) -> jax.Array:
    """The float32 update from `p` to one of the two bfloat16 numbers around `p + u`."""
    exact, kept = p + u, bfloat16()
    update = kept.rounded(exact, bits).astype(jnp.float32) - p
    # The format does not keep smaller numbers: their neighbours are at a subnormal distance.
    is_kept = (jnp.abs(exact) >= kept.smallest) & jnp.isfinite(update)
    return jnp.where(is_kept, update, u)


@_to_target.defjvp
def _straight_through(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _to_target(*primals), tangents[1]


def check_does_not_round(state: Any, advice: str) -> None:
    """Raises if the state of `inner` is that of a transformation that rounds parameters."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, RoundParametersState))
    if any(isinstance(node, RoundParametersState) for node in nodes):
        raise ValueError(f'inner rounds parameters itself: {advice}')


def _check_is_wide(name: str, update: Any) -> None:
    dtype = jnp.result_type(update)
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f'{name} has dtype {dtype}, but updates of bfloat16 parameters must be float32, as '
            'their gradients are in inner: they are rounded once, at the end.'
        )


def _check_dtypes_stay(before: Any, after: Any) -> None:
    """Raises if dtypes change: Optax keeps statistics in the dtype of the parameters in `init`."""
    after = by_path(after)
    for path, x in tree_flatten_with_path(before)[0]:
        old, new = (getattr(leaf, 'dtype', None) for leaf in (x, after.get(canonical(path))))
        if None not in (old, new) and old != new:
            raise TypeError(
                f'inner_state{keystr(path)} is {old} and would become {new}: make the state with '
                'init(optax.tree.cast(params, jnp.float32)).'
            )
