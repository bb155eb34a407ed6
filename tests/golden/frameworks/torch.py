"""PyTorch: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one


def configurations() -> list[dict[str, Any]]:
    name = 'torch'
    return [
        *in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        one(name, 'defaults', 1000),
        one(name, 'large eps', eps=1.0, momentum=0.5),
        one(name, 'eps 0.01', eps=0.01, alpha=0.9),
        one(name, 'weight decay', weight_decay=0.1),
        one(name, 'schedule', schedule=DROPS, momentum=0.9, alpha=0.9),
        one(name, 'centered', centered=True, alpha=0.95),
        one(name, 'maximize', maximize=True, weight_decay=0.1, momentum=0.9),
        one(name, 'complex', problem='complex', momentum=0.9, weight_decay=0.1),
        one(name, 'complex centered', problem='complex', centered=True, maximize=True),
        one(name, 'foreach', foreach=True, momentum=0.9, centered=True),
        nearly_constant(name, alpha=0.9),
        *_clip_grad_norm(),
    ]


def _clip_grad_norm() -> list[dict[str, Any]]:
    def clipped(problem: str = 'normal', **clip: Any) -> dict[str, Any]:
        label = ', '.join(f'{n} {value}' for n, value in clip.items())
        made = one('torch', f'clip {label} {problem}', problem=problem, alpha=0.9, momentum=0.5)
        return made | {'clip': clip}

    return [
        clipped(max_norm=1.0),
        clipped(max_norm=1.0, problem='complex'),
        clipped(max_norm=0.5, norm_type='inf'),
        clipped(max_norm=2.0, norm_type=1.0),
        clipped(max_norm=1.0, norm_type=3.0),
        clipped(max_norm=1e6),
    ]
