"""What is trained, in terms that every framework understands: arrays, settings and steps.

Everything is given by formulas, so that nothing but results need be recorded. Step `HANDOVER` is
where a run moves from one library to another, and where the learning rate drops.
"""

import json
import math
import pathlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent
HANDOVER, END = 200, 400
DROP = 0.25


def wave(shape: tuple[int, ...], pitch: float, phase: float = 0.0) -> np.ndarray:
    return np.sin(pitch * np.arange(1, math.prod(shape) + 1) + phase).reshape(shape)


def complex_wave(shape: tuple[int, ...], pitch: float, phase: float = 0.0) -> np.ndarray:
    return wave(shape, pitch, phase) + 1j * wave(shape, 1.1 * pitch, phase + 0.5)


# A model proper, for PyTorch: a convolution, a linear layer that reads its flattened image, a
# normalisation and an output, in three parameter groups whose order is not the model's.
CHANNELS, SIDE = 2, 4
NET_SHAPES = {
    'conv.weight': (CHANNELS, 1, 3, 3),
    'conv.bias': (CHANNELS,),
    'fc.weight': (5, CHANNELS * SIDE * SIDE),
    'fc.bias': (5,),
    'norm.weight': (5,),
    'norm.bias': (5,),
    'head.weight': (1, 5),
    'head.bias': (1,),
}
NET_GROUPS: list[dict[str, Any]] = [
    {
        'names': ['head.weight', 'head.bias'],
        'settings': {'lr': 5e-4},
    },
    {
        'names': ['fc.weight', 'fc.bias', 'norm.weight', 'norm.bias'],
        'settings': {
            'lr': 1e-3,
            'alpha': 0.95,
            'eps': 1e-3,
            'weight_decay': 1e-2,
            'momentum': 0.5,
            'centered': True,
        },
    },
    {
        'names': ['conv.weight', 'conv.bias'],
        'settings': {'lr': 2e-4, 'alpha': 0.9, 'eps': 1e-4, 'momentum': 0.9},
    },
]
NET_NAMES = [name for group in NET_GROUPS for name in group['names']]
# Step t sees batch t % BATCHES: with one batch gradients would be nearly constant, and PyTorch's
# difference nu - mu^2 would be rounding error, which nobody can reproduce.
BATCHES = 4
INPUTS = wave((BATCHES, 2, 1, SIDE + 2, SIDE + 2), 1.7)
TARGETS = wave((BATCHES, 2, 1), 0.9)


def net_params() -> dict[str, np.ndarray]:
    sizes = {name: 0.5 / math.sqrt(shape[-1]) for name, shape in NET_SHAPES.items()}
    params = {
        name: sizes[name] * wave(shape, 2.3, 0.1 * i)
        for i, (name, shape) in enumerate(NET_SHAPES.items())
    }
    return params | {'norm.weight': 1 + params['norm.weight']}


# Two arrays on a quadratic whose minimum moves, for everything else.
SHAPES = {'kernel': (3, 2), 'bias': (2,)}


def params(is_complex: bool = False) -> dict[str, np.ndarray]:
    make = complex_wave if is_complex else wave
    return {name: make(shape, 0.7) for name, shape in SHAPES.items()}


def gradient(params: dict[str, Any], step: int) -> dict[str, Any]:
    return {name: PULL * (p - target(p)) + push(p, step) for name, p in params.items()}


PULL = 0.8


def target(like: Any) -> Any:
    return (complex_wave if np.iscomplexobj(like) else wave)(like.shape, 1.9)


def push(like: Any, step: int) -> Any:
    return (complex_wave if np.iscomplexobj(like) else wave)(like.shape, 1.3, 0.7 * step)


# Numbers that float32 holds exactly, since Keras keeps its rates in it and TensorFlow 1
# all of its hyperparameters.
RATE = 2.0**-7
TORCH_COMPLEX: dict[str, Any] = {'lr': RATE, 'alpha': 0.9, 'momentum': 0.75, 'centered': True}
KERAS: dict[str, dict[str, Any]] = {
    'plain': {},
    'momentum': {'momentum': 0.9, 'weight_decay': 2.0**-7, 'clipnorm': 1.5},
    'centered': {'momentum': 0.5, 'rho': 0.95, 'centered': True, 'epsilon': 1e-4},
    'average': {
        'momentum': 0.5,
        'use_ema': True,
        'ema_momentum': 0.9,
        'ema_overwrite_frequency': 7,
        'gradient_accumulation_steps': 2,
    },
}
TENSORFLOW: dict[str, dict[str, Any]] = {
    'plain': {'decay': 0.875, 'epsilon': 2.0**-33},
    'centered': {'decay': 0.875, 'momentum': 0.75, 'epsilon': 2.0**-12, 'centered': True},
}


def rate(step: int) -> float:
    return RATE if step < HANDOVER else RATE * DROP


# Recordings: nested dictionaries of arrays as one, with slashes; PyTorch's groups as JSON.


def flat(prefix: str, tree: Any) -> dict[str, np.ndarray]:
    if isinstance(tree, dict):
        items = [flat(f'{prefix}/{key}', value) for key, value in tree.items()]
        return {key: value for item in items for key, value in item.items()}
    return {prefix: np.array(json.dumps(tree)) if isinstance(tree, list) else np.asarray(tree)}


def read(path: str | pathlib.Path, case: str) -> dict[str, Any]:
    """The parts of a recorded case, states as the framework's own dictionaries."""
    parts: dict[str, Any] = {}
    with np.load(path) as arrays:
        for key in arrays:
            which, part, name = key.split('/', 2)
            if which == case:
                parts.setdefault(part, {})[name] = arrays[key]
    if 'param_groups' in parts.get('state', {}):
        parts['state'] = _state_dict(parts['state'])
    return parts


def _state_dict(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    groups = json.loads(str(arrays.pop('param_groups')))
    entries: dict[int, dict[str, np.ndarray]] = {}
    for key, array in arrays.items():
        _, number, slot = key.split('/')
        entries.setdefault(int(number), {})[slot] = array
    return {'state': entries, 'param_groups': groups}
