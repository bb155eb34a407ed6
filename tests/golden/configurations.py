"""What the golden traces record: a thousand steps of each dialect, and each of its options.

Each framework has a module in golden/frameworks, with a function `configurations`. The module may
also hold what tests must know about the framework, by dialect:

    FLOAT32    the arguments that the framework holds in float32
    CHANGES    for its arguments, a value that is not the default, and what else must be given for
               it to matter; test_dialects.py holds those that several frameworks have
    DRAWS      how `make parity` draws configurations: see parity/draw.py
"""

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

DROPS = {'peak': 0.05, 'warmup': 3, 'every': 7, 'factor': 0.6}
RATE = 0.05


def halving(count: Any) -> Any:
    """A schedule."""
    return RATE * 0.5 ** (count // 4)


def frameworks() -> list[ModuleType]:
    """The modules of golden/frameworks."""
    folder = str(Path(__file__).with_name('frameworks'))
    names = sorted(m.name for m in pkgutil.iter_modules([folder]))
    return [importlib.import_module(f'golden.frameworks.{name}') for name in names]


def declared(name: str) -> dict[str, Any]:
    """What the frameworks' modules hold under a name, in one."""
    return {key: x for module in frameworks() for key, x in getattr(module, name, {}).items()}


def golden_configurations() -> list[dict[str, Any]]:
    """Every configuration, as JSON has it; names are unique."""
    found = [c for module in frameworks() for c in module.configurations()]
    names = [c['name'] for c in found]
    assert len(set(names)) == len(names)
    return found


def one(
    framework: str,
    name: str,
    steps: int = 60,
    problem: str = 'normal',
    dtype: str = 'float64',
    schedule: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    return {
        'name': f'{framework}: {name}',
        'framework': framework,
        'problem': problem,
        'dtype': dtype,
        'steps': steps,
        'seed': 7,
        'schedule': schedule,
        'options': options,
    }


def in_both_precisions(framework: str, **options: Any) -> list[dict[str, Any]]:
    """A thousand steps in float64 and the same in float32, and gradients that hardly change."""
    name = '1000 steps'
    return [
        one(framework, name, 1000, **options) | {'float32 inputs': True},
        one(framework, f'{name} in float32', 1000, dtype='float32', **options),
    ]


def nearly_constant(framework: str, **options: Any) -> dict[str, Any]:
    """Centered, in float32: `nu - mu^2` turns negative by rounding."""
    return one(
        framework,
        'nearly constant',
        300,
        problem='nearly constant',
        dtype='float32',
        centered=True,
        **options,
    )
