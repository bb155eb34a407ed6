"""tf_keras: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one

FLOAT32 = {'tf_keras': {'learning_rate', 'weight_decay'}}


def configurations() -> list[dict[str, Any]]:
    name = 'tf_keras'
    ema = {'use_ema': True, 'ema_momentum': 0.8}
    return [
        *in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        one(name, 'defaults'),
        one(name, 'eps 0.01', epsilon=0.01, rho=0.95, momentum=0.5),
        one(name, 'schedule', schedule=DROPS, momentum=0.9, weight_decay=0.1),
        one(name, 'clipnorm before clipvalue', clipnorm=0.5, clipvalue=0.01),
        one(name, 'global_clipnorm before clipvalue', global_clipnorm=0.5, clipvalue=0.01),
        one(name, 'clipvalue', clipvalue=0.1, clipnorm=0.0, weight_decay=0.1),
        one(name, 'ema', 250, use_ema=True),
        one(name, 'ema overwriting', ema_overwrite_frequency=2, momentum=0.9, **ema),
        one(name, 'ema never overwriting', 150, ema_overwrite_frequency=None, **ema),
        one(
            name, 'ema with all', schedule=DROPS, ema_overwrite_frequency=3, weight_decay=0.1, **ema
        )
        | {'exclude': ['vector', 'scalar']},
        one(name, 'sparse', problem='sparse', momentum=0.9, centered=True),
        one(name, 'sparse without momentum', problem='sparse'),
        nearly_constant(name),
    ]
