"""Graves 2013."""

from rmsprop_jax._optimizer import rmsprop
from rmsprop_jax._types import ScalarOrSchedule
from rmsprop_jax.dialects._record import Dialect, Rule
from rmsprop_jax.dialects._shared import Optimizer
from rmsprop_jax.storage._choice import Storage


@Dialect(title='always centered', rules=(Rule(centered=('yes',)),), recorded=False)
def graves(
    learning_rate: ScalarOrSchedule = 1e-4,
    decay: ScalarOrSchedule = 0.95,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-4,
    *,
    storage: Storage | None = None,
) -> Optimizer:
    """Graves 2013: always centered, epsilon inside the root, learning rate inside the momentum.

    ::

        n <- decay n + (1 - decay) g^2
        m <- decay m + (1 - decay) g
        b <- momentum b - learning_rate g / sqrt(n - m^2 + eps);  p <- p + b

    The paper gives no start values; here they are 0.

    Source: Graves, Generating Sequences With Recurrent Neural Networks, arXiv:1308.0850, equations
    38 to 45.
    """
    return rmsprop(learning_rate, decay, eps, centered=True, momentum=momentum, storage=storage)
