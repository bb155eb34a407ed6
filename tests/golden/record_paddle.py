"""Paddle's RMSProp."""

import numpy as np
import paddle
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Step, main, signature


def start_paddle(configuration: Configuration, given: Problem) -> Step:
    paddle.set_default_dtype(configuration['dtype'])
    rates = learning_rates(configuration)
    options = {'learning_rate': 0.0} | configuration['options']
    params = {n: paddle.to_tensor(p, stop_gradient=False) for n, p in given.params.items()}
    tx = paddle.optimizer.RMSProp(parameters=list(params.values()), **options)

    def step(number: int) -> Arrays:
        for name, parameter in params.items():
            parameter.grad = paddle.to_tensor(given.gradients[name][number])
        if rates is not None:
            tx.set_lr(float(rates[number]))
        tx.step()
        return {n: np.array(p.numpy()) for n, p in params.items()}

    return step


if __name__ == '__main__':
    main(
        {'paddle': start_paddle},
        {'paddle': signature(paddle.optimizer.RMSProp)},
        ('paddlepaddle', 'numpy'),
    )
