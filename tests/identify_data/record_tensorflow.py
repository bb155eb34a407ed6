"""Records Keras 3.15, TensorFlow 2.21 and tf_keras 2.21.

In `tests/`: `python -m identify_data.record_tensorflow`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
import tf_keras
from identify_data.draws import SHAPES, Arrays, Draw, record


def step_with(apply: Callable[[list[tuple[Any, Any]], float], Any], draw: Draw) -> list[Arrays]:
    params = {n: tf.Variable(p) for n, p in draw.params.items()}
    after = []
    for step, rate in enumerate(draw.learning_rate):
        pairs = [(tf.constant(draw.gradient(n, step)), params[n]) for n in SHAPES]
        apply(pairs, float(rate))
        after.append({name: params[name].numpy().copy() for name in SHAPES})
    return after


def run_keras(draw: Draw) -> list[Arrays]:
    made = keras.optimizers.RMSprop(
        rho=draw.decay,
        momentum=draw.momentum,
        epsilon=draw.eps,
        centered=draw.centered,
        weight_decay=draw.weight_decay or None,
    )

    def apply(pairs: list[tuple[Any, Any]], rate: float) -> None:
        made.learning_rate = rate
        made.apply_gradients(pairs)

    return step_with(apply, draw)


def run_legacy(draw: Draw) -> list[Arrays]:
    made = tf_keras.optimizers.legacy.RMSprop(
        rho=draw.decay, momentum=draw.momentum, epsilon=draw.eps, centered=draw.centered
    )

    def apply(pairs: list[tuple[Any, Any]], rate: float) -> None:
        made.learning_rate = rate
        made.apply_gradients(pairs)

    return step_with(apply, draw)


def run_tensorflow(draw: Draw) -> list[Arrays]:
    rate_now = [0.0]
    made = tf.compat.v1.train.RMSPropOptimizer(
        lambda: rate_now[0],
        decay=draw.decay,
        momentum=draw.momentum,
        epsilon=draw.eps,
        centered=draw.centered,
    )

    def apply(pairs: list[tuple[Any, Any]], rate: float) -> None:
        rate_now[0] = rate
        made.apply_gradients(pairs)

    return step_with(apply, draw)


if __name__ == '__main__':
    record('keras', 14, run_keras)
    record('keras_legacy', 10, run_legacy)
    record('tensorflow', 12, run_tensorflow)
