"""Hinton 2012."""

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import Optimizer, dialect
from rmsprop_jax.storage._choice import Storage


@dialect(
    Dialect(
        # An epsilon that is not there leaves no trace: `identify_dialect` never names this one.
        rules=(Rule(epsilon=(), centered=('no',), momentum=('none',)),),
        recorded=False,
    )
)
def hinton(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    *,
    storage: Storage | None = None,
) -> Optimizer:
    """Hinton 2012: `nu <- 0.9 nu + 0.1 g^2` and `p <- p - learning_rate g / sqrt(nu)`, no epsilon.

    A zero second moment, which the slides leave open, gives a zero update.

    Source: Hinton, Srivastava and Swersky, Neural Networks for Machine Learning, lecture 6e.
    """
    return rmsprop(learning_rate, decay, eps=0.0, storage=storage)
