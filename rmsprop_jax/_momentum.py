"""`trace`: the decaying sum of updates that momentum applies."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rmsprop_jax._checks import checked_flag, checked_state
from rmsprop_jax._core.edge import public
from rmsprop_jax._core.leaves import Statistic, map_leaves
from rmsprop_jax._core.moments import componentwise
from rmsprop_jax._types import ScalarOrSchedule, TraceState, cast, decay_rate
from rmsprop_jax.storage._choice import Storage, check_storage


@public
def trace(
    decay: ScalarOrSchedule, nesterov: bool = False, *, storage: Storage | None = None
) -> optax.GradientTransformationExtraArgs:
    """Replaces updates by a decaying sum of them: `optax.trace`, with schedules and a float32
    accumulator.

    ::

        trace <- g + decay trace
        u      = trace,  or with nesterov  g + decay trace  (with the new trace)

    The learning rate may come before it, as in TensorFlow and Optax, or after it, as in PyTorch.
    The two agree only while the learning rate is constant.

    Args:
      decay: The momentum, in [0, 1]: a Python float, a scalar array, or a schedule of the 0-based
        step count.
      nesterov: Whether to look one step ahead.
      storage: How the sum is kept in memory, as in `scale_by_rms`, which also explains the argument
        of `update` under `jax.shard_map`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `TraceState`. Updates have the
      dtype of the incoming ones.

    Raises:
      ValueError: If a concrete decay is outside [0, 1], or updates do not fit the state.
      TypeError: If a leaf is integer or boolean, the decay is narrower than float32, or the state
        is not a `TraceState`.

    Example:
      >>> import jax.numpy as jnp, rmsprop_jax
      >>> tx = rmsprop_jax.trace(decay=0.5)
      >>> state = tx.init(jnp.zeros(()))
      >>> for _ in range(3):
      ...     update, state = tx.update(jnp.ones(()), state)
      >>> print(update)
      1.75

    Reference:
      Sutskever et al., On the importance of initialization and momentum in deep learning, ICML
      2013.
    """
    return trace_step(decay, nesterov, storage=storage)


def trace_step(
    decay: ScalarOrSchedule,
    nesterov: bool = False,
    *,
    storage: Storage | None = None,
    of_pairs: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """`trace` for our chains; `of_pairs` treats complex arrays as pairs of reals."""
    decay_ = decay_rate('decay', decay)
    nesterov = checked_flag('nesterov', nesterov)
    check_storage(storage, 'trace')
    kept = Statistic('trace', storage=storage, of_pairs=of_pairs)

    def init(params: optax.Params) -> Any:
        return TraceState(count=jnp.zeros([], jnp.int32), trace=kept.init(params, 0.0))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        partition_specs: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        del params
        checked_state(state, TraceState)
        decay = decay_.at(state.count)

        def step(way: Any, g: jax.Array, velocity: jax.Array) -> tuple[jax.Array, jax.Array]:
            del way
            d = cast(decay, g.real.dtype)
            velocity = g + componentwise(operator.mul, velocity, d)
            ahead = g + componentwise(operator.mul, velocity, d) if nesterov else velocity
            return ahead, velocity

        new_updates, new_trace = map_leaves(
            step, updates, [(kept, state.trace)], count=state.count, specs=partition_specs
        )
        return new_updates, TraceState(count=optax.safe_increment(state.count), trace=new_trace)

    return optax.GradientTransformationExtraArgs(init, update)
