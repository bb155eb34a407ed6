"""MXNet 1 and Chainer, the last versions of each, which need an old NumPy."""

import chainer
import mxnet
import numpy as np
from golden.mxnet_steps import mxnet_signature, starter
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Step, main, signature


def chainer_starter(optimizer):
    def start(configuration: Configuration, given: Problem) -> Step:
        rates = learning_rates(configuration)
        tx = optimizer(**configuration['options'])
        link = chainer.Link()
        with link.init_scope():
            for name, p in given.params.items():
                setattr(link, name, chainer.Parameter(p.copy()))
        tx.setup(link)

        def step(number: int) -> Arrays:
            for parameter in link.params():
                parameter.grad = np.array(given.gradients[parameter.name][number])
            if rates is not None:
                tx.lr = float(rates[number])
            tx.update()
            return {p.name: np.array(p.data) for p in link.params()}

        return step

    return start


if __name__ == '__main__':
    chainers = {
        'chainer': chainer.optimizers.RMSprop,
        'chainer_graves': chainer.optimizers.RMSpropGraves,
    }
    main(
        {'mxnet1': starter(mxnet)} | {n: chainer_starter(o) for n, o in chainers.items()},
        {'mxnet1': mxnet_signature(mxnet)} | {n: signature(o) for n, o in chainers.items()},
        ('mxnet', 'chainer', 'numpy'),
    )
