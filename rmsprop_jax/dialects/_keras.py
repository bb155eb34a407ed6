"""Keras 3."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from rmsprop_jax._checks import checked_flag, checked_steps
from rmsprop_jax._core.chains import chain
from rmsprop_jax._optimizer import precise_chain, rmsprop
from rmsprop_jax._transforms import accumulate, average_parameters, unscale
from rmsprop_jax._types import ScalarOrSchedule, is_none_or_zero
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import NAME, Optimizer, clipping_unless_zero
from rmsprop_jax.storage._choice import Storage

RULE = Rule(weight_decay=('decoupled',))


@Dialect(
    title='Keras 3',
    rules=(RULE,),
    refused={
        'name': NAME,
        'var_list': 'give mask, a tree of booleans',
        'overwrite_with_gradient': 'set such variables outside the optimizer, with optax.partition',
    },
)
def keras(
    learning_rate: ScalarOrSchedule = 1e-3,
    rho: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-7,
    centered: bool = False,
    weight_decay: ScalarOrSchedule | None = None,
    clipnorm: ArrayLike | None = None,
    clipvalue: ArrayLike | None = None,
    global_clipnorm: ArrayLike | None = None,
    use_ema: bool = False,
    ema_momentum: ScalarOrSchedule = 0.99,
    ema_overwrite_frequency: int | None = None,
    *,
    loss_scale_factor: ArrayLike | None = None,
    gradient_accumulation_steps: int | None = None,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`keras.optimizers.RMSprop` of Keras 3, in Keras's order of operations.

    ::

        g  <- g / loss_scale_factor
        g  <- mean of gradient_accumulation_steps gradients; between them p does not move
        g  <- clipped
        p  <- p - learning_rate weight_decay p
        nu <- rho nu + (1 - rho) g^2                                        from 0
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b
        a  <- ema_momentum a + (1 - ema_momentum) p                         first: a <- p
        p  <- a                                       every ema_overwrite_frequency

    As in Keras, schedules count calls, not accumulated steps. The average also moves at every call,
    and copies `p` during the whole first window. Read it with `optax.tree.get(state, 'ema')`. With
    `use_ema` this must be the last transformation of a chain, and `update` needs `params`.

    Embeddings: as in Keras, also on TensorFlow, rows that were not looked up still change. Their
    statistics decay, and momentum moves them. But where ids repeat within a step, Keras on
    TensorFlow squares and clips the gradient of each lookup separately. (It adds these gradients
    first with `gradient_accumulation_steps`, and after taking the norm with `global_clipnorm`.) A
    dense gradient holds only their sum, so this cannot be reproduced here.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      rho: Weight of the past in the running averages, in [0, 1].
      momentum: Decay of the velocity, in [0, 1]; a Python zero means no velocity.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      weight_decay: Decoupled decay per step, times the learning rate.
      clipnorm: Maximum norm of each gradient array. Give at most one of `clipnorm`, `clipvalue` and
        `global_clipnorm`; for each, a Python zero means no clipping, as in Keras.
      clipvalue: Maximum magnitude of each entry.
      global_clipnorm: Maximum norm of all gradients together.
      use_ema: Whether to average the parameters.
      ema_momentum: Weight of the past in that average.
      ema_overwrite_frequency: Number of steps between two replacements of the parameters by the
        average; None for never.
      loss_scale_factor: Factor by which the gradients are divided.
      gradient_accumulation_steps: Number of calls per step, at least 2.
      mask: Which parameters decay. It replaces Keras's `exclude_from_weight_decay`.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Raises:
      ValueError: If more than one kind of clipping is given, or fewer than 2 accumulation steps.

    Source: Keras 3.15, keras/src/optimizers/base_optimizer.py and rmsprop.py.
    """
    every = 1
    if gradient_accumulation_steps is not None:
        every = checked_steps('gradient_accumulation_steps', gradient_accumulation_steps, least=2)
    rate = learning_rate
    if callable(learning_rate):
        # Step k happens at the last call of its window.
        rate = functools.partial(_at_last_call, learning_rate, every)
    step = precise_chain(
        clipping_unless_zero(
            clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm
        ),
        rmsprop(
            rate,
            rho,
            epsilon,
            centered=centered,
            momentum=None if is_none_or_zero(momentum) else momentum,
            weight_decay=weight_decay,
            mask=mask,
            storage=storage,
        ),
    )
    step = precise_chain(
        None if loss_scale_factor is None else unscale('loss_scale_factor', loss_scale_factor),
        step if gradient_accumulation_steps is None else accumulate(step, every),
    )
    if not checked_flag('use_ema', use_ema):
        return step
    return chain(step, average_parameters(ema_momentum, ema_overwrite_frequency, every))


def _at_last_call(schedule: Any, every: int, count: ArrayLike) -> ArrayLike:
    # The number of calls saturates before the number of steps does.
    last = (jnp.iinfo(jnp.int32).max - (every - 1)) // every
    return schedule(jnp.minimum(count, last) * every + (every - 1))
