"""Records PyTorch 2.13, timm 1.0.31 and Stable-Baselines3 2.9.

In `tests/`: `python -m identify_data.record_torch`.
"""

from typing import Any

import torch
from golden.record_torch import rmsprop_tf, rmsprop_tf_like
from identify_data.draws import SHAPES, Arrays, Draw, record


def run(optimizer: Any, options: dict[str, Any], draw: Draw) -> list[Arrays]:
    params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in draw.params.items()}
    made = optimizer(
        params.values(),
        lr=float(draw.learning_rate[0]),
        alpha=draw.decay,
        eps=draw.eps,
        weight_decay=draw.weight_decay,
        momentum=draw.momentum,
        centered=draw.centered,
        **options,
    )
    after = []
    for step, rate in enumerate(draw.learning_rate):
        for name, param in params.items():
            param.grad = torch.tensor(draw.gradient(name, step))
        made.param_groups[0]['lr'] = float(rate)
        made.step()
        after.append({name: params[name].detach().numpy().copy() for name in SHAPES})
    return after


if __name__ == '__main__':
    timm, sb3 = rmsprop_tf(), rmsprop_tf_like()
    record('torch', 16, lambda draw: run(torch.optim.RMSprop, {}, draw))
    record('stable_baselines3', 10, lambda draw: run(sb3, {}, draw))
    record(
        'timm',
        12,
        lambda draw: run(
            timm,
            {'decoupled_decay': draw.decoupled, 'lr_in_momentum': draw.rate_first},
            draw,
        ),
    )
