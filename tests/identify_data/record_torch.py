"""Records PyTorch 2.13, timm 1.0.31 and Stable-Baselines3 2.9: `python record_torch.py`.

The last two are loaded by path, so that what they depend on need not be installed.
"""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import torch
from draws import SHAPES, Arrays, Draw, record


def load(package: str, path: str) -> Any:
    """Runs one file of an installed package without running the package's own `__init__`s."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    file = Path(found.submodule_search_locations[0]) / path
    # What the file imports from its own folder is found through a package without contents.
    folder = types.ModuleType(f'{package}_folder')
    folder.__path__ = [str(file.parent)]
    sys.modules[folder.__name__] = folder
    spec = importlib.util.spec_from_file_location(f'{folder.__name__}.{file.stem}', file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    timm = load('timm', 'optim/rmsprop_tf.py').RMSpropTF
    sb3 = load('stable_baselines3', 'common/sb2_compat/rmsprop_tf_like.py').RMSpropTFLike
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
