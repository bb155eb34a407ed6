"""Frameworks that are one of the dialects under other names: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, one

FLOAT32 = {
    'sonnet': {'learning_rate', 'schedule', 'decay', 'momentum', 'epsilon'},
    'paddle': {'rho', 'momentum', 'epsilon'},
    'mlx': {'learning_rate'},
}


def configurations() -> list[dict[str, Any]]:
    """The frameworks of the table: as they come, and with what their quirks speak of."""
    rate = {'learning_rate': 0.01}
    return [
        one('sonnet', 'defaults', 1000, **rate),
        one('sonnet', 'schedule', schedule=DROPS, momentum=0.9, centered=True),
        one('sonnet', 'sparse', problem='sparse', momentum=0.9, **rate),
        one('chainer', 'defaults', 1000),
        one('chainer', 'inside', eps_inside_sqrt=True, eps=0.01),
        one('chainer_graves', 'defaults', 1000),
        one('chainer_graves', 'schedule', schedule=DROPS),
        one('paddle', 'defaults', 1000, **rate),
        one('paddle', 'all', momentum=0.9, centered=True, weight_decay=0.1, **rate),
        one('paddle', 'schedule', schedule=DROPS, momentum=0.9),
        one('mlx', 'defaults', 1000, **rate),
        one('bitsandbytes', 'defaults', 1000, dtype='float32'),
        one('bitsandbytes', 'momentum is ignored', momentum=0.9, dtype='float32'),
        one('bitsandbytes', 'weight decay', weight_decay=0.1, dtype='float32'),
    ]
