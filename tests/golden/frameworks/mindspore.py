"""MindSpore, whose kernels compute in float32: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, one

FLOAT32 = {
    'mindspore': {'learning_rate', 'schedule', 'decay', 'momentum', 'epsilon', 'weight_decay'}
}
CHANGES = {'mindspore': {'loss_scale': (1e3, {'epsilon': 0.1})}}


def configurations() -> list[dict[str, Any]]:
    def narrow(label: str, steps: int = 60, **options: Any) -> dict[str, Any]:
        return one('mindspore', label, steps, dtype='float32', **options)

    return [
        narrow('defaults', 1000),
        narrow('eps 0.01', epsilon=0.01, decay=0.95, learning_rate=0.01),
        narrow('schedule', schedule=DROPS, momentum=0.9),
        narrow('centered', centered=True, momentum=0.9, epsilon=0.01, learning_rate=0.01),
        narrow('weight decay', weight_decay=0.1, momentum=0.5, learning_rate=0.01),
        narrow('all', schedule=DROPS, weight_decay=0.1, loss_scale=128.0, centered=True, decay=0.8),
    ]


def _draw(draw: Any) -> dict[str, Any]:
    options = draw.shared('decay', 'epsilon') | draw.some(
        weight_decay=draw.between(1e-4, 0.3), loss_scale=float(2 ** draw.rng.integers(1, 12))
    )
    return {'options': options, 'dtype': 'float32'}


DRAWS = {'mindspore': (_draw, 20, 'learning_rate')}
