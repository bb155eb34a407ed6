"""What the two versions of MXNet share."""

from types import ModuleType
from typing import Any

import numpy as np
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Start, Step, signature


def starter(mxnet: ModuleType, **fixed: Any) -> Start:
    """A `Start` for `mxnet.optimizer.RMSProp` of either version."""
    newer = mxnet.__version__.startswith('2')

    def start(configuration: Configuration, given: Problem) -> Step:
        rates = learning_rates(configuration)
        tx = mxnet.optimizer.RMSProp(**configuration['options'], **fixed)
        dtype = configuration['dtype']
        params = {n: mxnet.nd.array(np.atleast_1d(p), dtype=dtype) for n, p in given.params.items()}
        # Its own states are float32 whatever the parameters are.
        count = 3 if tx.centered else 1
        states = {
            n: tuple(mxnet.nd.zeros(p.shape, dtype=dtype) for _ in range(count))
            for n, p in params.items()
        }

        def update(index: int, name: str, gradient: Any) -> None:
            if newer:
                state = states[name] if tx.centered else states[name][0]
                tx.update([index], [params[name]], [gradient], [state])
            else:
                tx.update(index, params[name], gradient, states[name])

        def step(number: int) -> Arrays:
            if rates is not None:
                tx.lr = float(rates[number])
            for index, name in enumerate(params):
                gradient = np.atleast_1d(given.gradients[name][number])
                update(index, name, mxnet.nd.array(gradient, dtype=dtype))
            return {n: p.asnumpy().reshape(given.params[n].shape) for n, p in params.items()}

        return step

    return start


def mxnet_signature(mxnet: ModuleType) -> dict[str, str]:
    """The arguments of the optimizer, and then of its base class."""
    own, base = (signature(mxnet.optimizer.RMSProp), signature(mxnet.optimizer.Optimizer))
    return own | {name: value for name, value in base.items() if name not in own}
