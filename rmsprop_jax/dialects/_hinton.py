"""Hinton 2012."""

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import Optimizer
from rmsprop_jax.storage._choice import Storage


@Dialect(
    # A missing epsilon leaves no trace, so `identify_dialect` never names this dialect.
    rules=(Rule(epsilon=(), centered=('no',), momentum=('none',)),),
    recorded=False,
)
def hinton(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    *,
    storage: Storage | None = None,
) -> Optimizer:
    """Hinton 2012: `nu <- 0.9 nu + 0.1 g^2` and `p <- p - learning_rate g / sqrt(nu)`, no epsilon.

    A zero second moment gives a zero update; the slides leave this case open.

    Source: Hinton, Srivastava and Swersky, Neural Networks for Machine Learning, lecture 6e.
    """
    return rmsprop(learning_rate, decay, eps=0.0, storage=storage)
