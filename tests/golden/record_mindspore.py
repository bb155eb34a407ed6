"""MindSpore's RMSProp."""

import inspect

import numpy as np
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Step, main, signature
from mindspore import Parameter, Tensor, nn


def start_mindspore(configuration: Configuration, given: Problem) -> Step:
    options = dict(configuration['options'])
    rates = learning_rates(configuration)
    if rates is not None:
        options['learning_rate'] = [float(rate) for rate in rates]
    params = {
        n: [Parameter(Tensor(x), name=f'{n} {i}') for i, x in enumerate(_pieces(p))]
        for n, p in given.params.items()
    }
    tx = nn.RMSProp([piece for pieces in params.values() for piece in pieces], **options)

    def step(number: int) -> Arrays:
        tx(tuple(Tensor(x) for n in params for x in _pieces(given.gradients[n][number])))
        return {
            n: np.concatenate([x.asnumpy() for x in pieces]).reshape(given.params[n].shape)
            for n, pieces in params.items()
        }

    return step


def _pieces(x: np.ndarray) -> list[np.ndarray]:
    """The entries of an array, no more than seven together.

    Without centering MindSpore's kernel for CPUs adds epsilon to the root where it takes eight
    entries at once, and inside of it, as documented, for what is left over.
    """
    return np.split(x.reshape(-1), range(7, x.size, 7))


if __name__ == '__main__':
    # The constructor is inside of one that records its arguments.
    (constructor,) = inspect.getclosurevars(nn.RMSProp.__init__).nonlocals.values()
    main(
        {'mindspore': start_mindspore},
        {'mindspore': signature(constructor)},
        ('mindspore', 'numpy'),
    )
