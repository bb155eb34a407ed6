"""Keras 3: what the golden traces record."""

from typing import Any

from golden.configurations import DROPS, in_both_precisions, nearly_constant, one

FLOAT32 = {'keras': {'weight_decay'}}
# The arguments that tf_keras has too are with those of all.
CHANGES = {
    'keras': {
        'loss_scale_factor': (1e3, {'epsilon': 0.1}),
        'gradient_accumulation_steps': (2, {}),
    }
}


def configurations() -> list[dict[str, Any]]:
    name = 'keras'
    accumulated = {'gradient_accumulation_steps': 3, 'schedule': DROPS, 'weight_decay': 0.1}
    ema = {'use_ema': True, 'ema_momentum': 0.8}
    return [
        *in_both_precisions(name, momentum=0.9, weight_decay=1e-2, centered=True),
        one(name, 'defaults'),
        one(name, 'eps 1', epsilon=1.0, momentum=0.9),
        one(name, 'eps 0.01', epsilon=0.01, rho=0.95),
        one(name, 'schedule', schedule=DROPS, momentum=0.9, weight_decay=0.1),
        one(name, 'clipnorm', clipnorm=0.5, momentum=0.5),
        one(name, 'clipvalue', clipvalue=0.1),
        one(name, 'global_clipnorm', global_clipnorm=0.5, weight_decay=0.1),
        one(name, 'clips of zero', clipnorm=0.0),
        one(name, 'loss scale', loss_scale_factor=128.0, clipnorm=0.01),
        one(name, 'ema', **ema),
        one(name, 'ema overwriting', ema_overwrite_frequency=4, momentum=0.9, **ema),
        one(name, 'accumulation', **accumulated, momentum=0.9, centered=True),
        one(
            name,
            'accumulation with all',
            **accumulated,
            **ema,
            ema_overwrite_frequency=2,
            momentum=0.9,
            global_clipnorm=0.5,
            loss_scale_factor=4.0,
        ),
        one(name, 'excluded', weight_decay=0.5) | {'exclude': ['vector', 'scalar']},
        # Keras squares the values of repeated indices one by one, unlike their sum when dense.
        one(name, 'sparse', problem='sparse without repetitions', momentum=0.9),
        nearly_constant(name),
    ]
