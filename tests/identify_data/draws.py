"""What the recording scripts of this folder draw and write; NumPy only, for every framework.

A recording script calls `record(framework, number, run)` with a function that makes the framework's
optimizer and steps it; `make golden` runs them all. Everything drawn is decided by the framework's
name and the run's number.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {'kernel': (3, 4), 'bias': (4,), 'scale': (2, 2)}
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Draw:
    """A run to be made: hyperparameters, gradients, start, and what the user will say."""

    framework: str
    dtype: str
    decay: float
    eps: float
    momentum: float
    weight_decay: float
    decoupled: bool
    centered: bool
    rate_first: bool
    nesterov: bool
    corrected: bool
    from_one: bool
    eps_inside: bool
    schedule: str
    told: list[str]
    learning_rate: np.ndarray
    params: Arrays
    gradients: Arrays

    def gradient(self, name: str, step: int) -> np.ndarray:
        """One gradient in the dtype of the run."""
        return self.gradients[name][step].astype(self.dtype)


# A run takes a Draw and yields the parameters after each step.
Run = Callable[[Draw], list[Arrays]]


def draw(framework: str, number: int) -> Draw:
    rng = np.random.default_rng([zlib.crc32(framework.encode()), number])
    steps = int(rng.integers(12, 21))
    dtype = ('float32', 'float64')[number % 2]
    schedule = str(rng.choice(['constant', 'drop', 'cosine', 'jitter', 'geometric']))
    t = np.arange(steps)
    shape = {
        'constant': np.ones(steps),
        'drop': np.where(t < steps // 2, 1.0, 0.1),
        'cosine': 0.55 + 0.45 * np.cos(np.pi * t / steps),
        'jitter': rng.uniform(0.3, 1.0, steps),
        'geometric': 0.85**t,
    }[schedule]
    eps = 10 ** rng.uniform(-4, -1.5) if rng.random() < 0.7 else 1e-8
    momentum = round(float(rng.uniform(0.3, 0.95)), 3) if rng.random() < 0.7 else 0.0
    decays = framework in ('torch', 'timm', 'stable_baselines3', 'keras') and rng.random() < 0.4
    told = ['decay', 'eps', 'momentum', 'weight_decay']
    sizes = {name: 10 ** rng.uniform(-2, 0, size) for name, size in SHAPES.items()}
    centered, corrected = rng.random() < 0.4, rng.random() < 0.4
    return Draw(
        framework=framework,
        dtype=dtype,
        decay=float(rng.choice([0.5, 0.8, 0.9, 0.95, 0.99, 0.999])),
        eps=float(f'{eps:.3g}'),
        momentum=momentum,
        weight_decay=float(f'{10 ** rng.uniform(-2.5, -0.5):.3g}') if decays else 0.0,
        decoupled=framework == 'keras' or (framework == 'timm' and rng.random() < 0.5),
        centered=centered,
        rate_first=bool(rng.random() < 0.5),
        # Optax alone has these.
        nesterov=bool(rng.random() < 0.4),
        # Optax's first step is NaN with both.
        corrected=corrected and not centered,
        from_one=bool(rng.random() < 0.4),
        eps_inside=bool(rng.random() < 0.5),
        schedule=schedule,
        told=[name for name in told if rng.random() < 0.5],
        learning_rate=10 ** rng.uniform(-3, -1) * shape,
        params={n: (0.3 * rng.normal(size=s)).astype(dtype) for n, s in SHAPES.items()},
        gradients={
            # Few digits make small files.
            n: (rng.normal(size=(steps, *s)) * sizes[n] + 0.3 * sizes[n]).astype('float16')
            for n, s in SHAPES.items()
        },
    )


def record(framework: str, runs: int, run: Run) -> None:
    """Makes the runs of one framework and writes them, with what is true of them, to one file."""
    arrays: dict[str, Any] = {}
    for number in range(runs):
        made = draw(framework, number)
        after = run(made)
        for name in SHAPES:
            seen = np.stack([made.params[name], *(p[name] for p in after)])
            assert seen.dtype == made.dtype, (framework, number, seen.dtype)
            assert np.isfinite(seen).all(), (framework, number)
            arrays[f'{number}/params/{name}'] = seen
            arrays[f'{number}/gradients/{name}'] = made.gradients[name]
        arrays[f'{number}/learning_rate'] = made.learning_rate
        truth = dataclasses.asdict(made)
        for name in ('learning_rate', 'params', 'gradients'):
            del truth[name]
        arrays[f'{number}/truth'] = np.array(json.dumps(truth))
    np.savez_compressed(Path(__file__).with_name(f'{framework}.npz'), **arrays)
