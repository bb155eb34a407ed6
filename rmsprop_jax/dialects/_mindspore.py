"""MindSpore."""

from typing import Any

from jax.typing import ArrayLike

from rmsprop_jax._optimizer import precise_chain, scale_by_learning_rate
from rmsprop_jax._precondition import rms_step
from rmsprop_jax._transforms import unscale
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import Optimizer, coupled_decay, momentum_step
from rmsprop_jax.storage._choice import Storage


@Dialect(
    rules=(Rule(start=('one',), weight_decay=('coupled',)),),
    refused={'use_locking': 'updates are pure functions: leave it out'},
)
def mindspore(
    learning_rate: ScalarOrSchedule = 0.1,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    *,
    centered: bool = False,
    loss_scale: ArrayLike = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: Any = None,
    storage: Storage | None = None,
) -> Optimizer:
    """`mindspore.nn.RMSProp`: TensorFlow 1's rule with an L2 penalty and a loss scale.

    ::

        g  <- g / loss_scale + weight_decay p
        nu <- decay nu + (1 - decay) g^2                                    from 1
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b

    MindSpore does not decay parameters whose name contains 'beta' or 'gamma', unless parameters are
    in groups: give a `mask` that does the same. Without centering, its CPU kernel adds epsilon
    outside the root in every full block of eight entries, and inside in the remaining entries. We
    follow its documentation, which puts epsilon inside.

    Args:
      learning_rate: Step size, in the unit of the parameter.
      decay: Weight of the past in the running averages, in [0, 1].
      momentum: Decay of the velocity, in [0, 1]; a Python zero means no velocity.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      loss_scale: Factor by which the gradients are divided, but not the penalty.
      weight_decay: L2 penalty, added to the gradient.
      mask: Which parameters decay.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Example:
      >>> import jax.numpy as jnp
      >>> from rmsprop_jax import dialects
      >>> tx = dialects.mindspore()
      >>> update, _ = tx.update(jnp.ones(()), tx.init(jnp.ones(())))
      >>> round(float(update), 4)
      -0.1

    Source: MindSpore 2.10, mindspore/nn/optim/rmsprop.py and optimizer.py.
    """
    return precise_chain(
        unscale('loss_scale', loss_scale),
        coupled_decay(weight_decay, mask),
        rms_step(decay, epsilon, initial_scale=1.0, centered=centered, storage=storage),
        scale_by_learning_rate(learning_rate),
        momentum_step(momentum, storage),
    )
