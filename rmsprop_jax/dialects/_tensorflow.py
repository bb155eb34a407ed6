"""TensorFlow 1."""

from typing import Any

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._transforms import skip_zero_rows
from rmsprop_jax._types import ScalarOrSchedule, decay_rate
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import NAME, Optimizer
from rmsprop_jax.storage._choice import Storage


@Dialect(
    title='TensorFlow 1',
    rules=(Rule(start=('one',)),),
    refused={'name': NAME, 'use_locking': 'updates are pure functions: leave it out'},
)
def tensorflow(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    momentum: ScalarOrSchedule = 0.0,
    epsilon: ScalarOrSchedule = 1e-10,
    *,
    centered: bool = False,
    sparse: Any = False,
    storage: Storage | None = None,
) -> Optimizer:
    """`tf.compat.v1.train.RMSPropOptimizer`: the second moment starts at one.

    ::

        nu <- decay nu + (1 - decay) g^2                                    from 1
        b  <- momentum b + learning_rate g / sqrt(nu + epsilon);  p <- p - b

    Args:
      learning_rate: Step size, in the unit of the parameter.
      decay: Weight of the past in the running averages, in [0, 1].
      momentum: Decay of the velocity, in [0, 1]. As in TensorFlow, the velocity exists even at 0.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      sparse: Which gradients TensorFlow would receive as `IndexedSlices`, such as those of
        embedding tables: a tree of booleans like the parameters, a function that returns such a
        tree for the parameters, or True for all. In these gradients, rows (along the first axis)
        that are exactly zero keep their parameters and statistics. This includes rows that were
        looked up but happen to have a zero gradient, which TensorFlow would let decay. Requires
        `nu` and `var` in float32.
      storage: How the statistics are kept in memory, as in `rmsprop`.

    Source: TensorFlow 2.21, tensorflow/python/training/rmsprop.py and
    tensorflow/core/kernels/training_ops.cc.
    """
    dense = rmsprop(
        learning_rate,
        decay,
        epsilon,
        initial_scale=1.0,
        centered=centered,
        momentum=decay_rate('momentum', momentum).value,
        storage=storage,
    )
    return dense if sparse is False else skip_zero_rows(dense, sparse)
