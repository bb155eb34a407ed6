"""TensorFlow 1: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one

FLOAT32 = {'tensorflow': {'learning_rate', 'schedule', 'decay', 'momentum', 'epsilon'}}


def configurations() -> list[dict[str, Any]]:
    name, rate = 'tensorflow', {'learning_rate': 0.01}
    return [
        *in_both_precisions(name, momentum=0.9, centered=True, **rate),
        one(name, 'defaults', **rate),
        one(name, 'eps 1', epsilon=1.0, momentum=0.9, **rate),
        one(name, 'eps 0.01', epsilon=0.01, decay=0.95, centered=True, **rate),
        one(name, 'schedule', schedule=DROPS, momentum=0.9),
        one(name, 'sparse', problem='sparse', momentum=0.9, **rate),
        one(name, 'sparse centered', problem='sparse', momentum=0.9, centered=True, **rate),
        one(name, 'sparse schedule', problem='sparse', schedule=DROPS, momentum=0.5),
        nearly_constant(name, **rate),
    ]
