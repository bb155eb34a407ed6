"""PyTorch's RMSprop and its relatives in timm, Stable-Baselines3, bitsandbytes and MLX."""

import importlib.util
import sys
from importlib.metadata import distribution
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
import torch
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Step, main, signature


def load(package: str, path: str, needs: tuple[str, ...] = ()) -> ModuleType:
    """One module of a package without the package's own imports, which want much more."""
    folder = path.rpartition('/')[0]
    name = '_'.join((package, *folder.split('/')))
    parent = sys.modules.setdefault(name, ModuleType(name))
    parent.__path__ = [str(distribution(package).locate_file(folder))]
    module = name + '.' + path.rpartition('/')[2].removesuffix('.py')
    spec = importlib.util.spec_from_file_location(module, distribution(package).locate_file(path))
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[module] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def rmsprop_tf() -> Any:
    return load('timm', 'timm/optim/rmsprop_tf.py').RMSpropTF


def rmsprop_tf_like() -> Any:
    path = 'stable_baselines3/common/sb2_compat/rmsprop_tf_like.py'
    return load('stable_baselines3', path).RMSpropTFLike


def bitsandbytes_rmsprop() -> Any:
    import bitsandbytes

    return bitsandbytes.optim.RMSprop32bit


def starter(optimizer: Any) -> Any:
    """A `Start` for an optimizer with PyTorch's interface."""

    def start(configuration: Configuration, given: Problem) -> Step:
        rates = learning_rates(configuration)
        options = dict(configuration['options'])
        if rates is not None:
            # timm remembers the rate it was made with as the largest one.
            options['lr'] = configuration['schedule']['peak']
        params = {n: torch.nn.Parameter(torch.tensor(p)) for n, p in given.params.items()}
        tx = optimizer(list(params.values()), **options)
        clip = configuration.get('clip')

        def step(number: int) -> Arrays:
            for name, parameter in params.items():
                parameter.grad = torch.tensor(given.gradients[name][number])
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(params.values(), **clip)
            if rates is not None:
                tx.param_groups[0]['lr'] = float(rates[number])
            tx.step()
            return {n: p.detach().numpy() for n, p in params.items()}

        return step

    return start


def start_mlx(configuration: Configuration, given: Problem) -> Step:
    mx.set_default_device(mx.cpu)
    rates = learning_rates(configuration)
    options = dict(configuration['options'])
    dtype = getattr(mx, configuration['dtype'])
    params = {n: mx.array(p, dtype) for n, p in given.params.items()}
    tx = mlx.optimizers.RMSprop(**options)
    assert rates is None

    def step(number: int) -> Arrays:
        nonlocal params
        gradients = {n: mx.array(g[number], dtype) for n, g in given.gradients.items()}
        params = tx.apply_gradients(gradients, params)
        return {n: np.array(p) for n, p in params.items()}

    return step


if __name__ == '__main__':
    OPTIMIZERS = {
        'torch': torch.optim.RMSprop,
        'timm': rmsprop_tf(),
        'stable_baselines3': rmsprop_tf_like(),
        'bitsandbytes': bitsandbytes_rmsprop(),
    }
    main(
        {name: starter(o) for name, o in OPTIMIZERS.items()} | {'mlx': start_mlx},
        {name: signature(o) for name, o in OPTIMIZERS.items()}
        | {
            'mlx': signature(mlx.optimizers.RMSprop),
            'torch_clip_grad_norm': signature(torch.nn.utils.clip_grad_norm_),
        },
        ('torch', 'timm', 'stable_baselines3', 'bitsandbytes', 'mlx', 'numpy'),
    )
