"""timm: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, halving, in_both_precisions, nearly_constant, one

_DECOUPLED = {'weight_decay': 0.1, 'decoupled_decay': True}
CHANGES = {
    'timm': {
        'decoupled_decay': (True, {'weight_decay': 0.1}),
        'corrected_weight_decay': (True, {'lr': halving, 'max_lr': 0.5, **_DECOUPLED}),
        'lr_in_momentum': (False, {'lr': halving, 'momentum': 0.9}),
        'caution': (True, {'momentum': 0.9}),
        'max_lr': (0.5, {'corrected_weight_decay': True, **_DECOUPLED}),
    }
}


def configurations() -> list[dict[str, Any]]:
    name = 'timm'
    return [
        *in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        one(name, 'defaults'),
        one(name, 'eps 1', eps=1.0, momentum=0.9),
        one(name, 'decoupled', weight_decay=0.1, decoupled_decay=True, momentum=0.9),
        one(
            name,
            'corrected',
            schedule=DROPS,
            weight_decay=0.5,
            decoupled_decay=True,
            corrected_weight_decay=True,
        ),
        one(name, 'corrected but coupled', weight_decay=0.5, corrected_weight_decay=True),
        one(name, 'schedule', schedule=DROPS, momentum=0.9),
        one(name, 'lr outside', schedule=DROPS, momentum=0.9, lr_in_momentum=False),
        one(name, 'caution', momentum=0.9, caution=True, weight_decay=0.1),
        one(
            name,
            'caution outside',
            schedule=DROPS,
            momentum=0.9,
            caution=True,
            lr_in_momentum=False,
            weight_decay=0.1,
            decoupled_decay=True,
        ),
        one(name, 'caution without momentum', caution=True),
        one(name, 'foreach', foreach=True, momentum=0.9, caution=True, centered=True),
        nearly_constant(name),
    ]
