"""TensorFlow 1."""

from typing import Any

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._transforms import skip_zero_rows
from rmsprop_jax._types import ScalarOrSchedule, decay_rate
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import NAME, Optimizer, dialect
from rmsprop_jax.storage._choice import Storage


@dialect(
    Dialect(
        title='TensorFlow 1',
        rules=(Rule(start=('one',)),),
        refused={'name': NAME, 'use_locking': 'updates are pure functions: leave it out'},
    )
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
      momentum: In [0, 1]. The buffer exists even at zero, as in TensorFlow.
      epsilon: Added inside the root, in the squared unit of the gradient.
      centered: Whether to divide by the standard deviation.
      sparse: Which gradients TensorFlow would get as `IndexedSlices`, such as those of embedding
        tables: a tree of booleans like the parameters, a function from them to one, or True for
        all. Rows (along the first axis) whose gradient is exactly zero keep their parameters and
        all their statistics. A row that was looked up and whose gradient happens to be zero looks
        the same, and is skipped too, where TensorFlow would let it decay. Needs `nu` and `var` in
        float32.
      storage: How the statistics are kept in memory, as for `rmsprop`.

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
