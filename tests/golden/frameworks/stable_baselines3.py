"""Stable-Baselines3: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one


def configurations() -> list[dict[str, Any]]:
    name = 'stable_baselines3'
    return [
        *in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        one(name, 'defaults'),
        one(name, 'A2C', eps=1e-5, lr=7e-4),
        one(name, 'schedule', schedule=DROPS, momentum=0.9, eps=0.01),
        one(name, 'weight decay', weight_decay=0.1, alpha=0.9),
        nearly_constant(name, alpha=0.9),
    ]
