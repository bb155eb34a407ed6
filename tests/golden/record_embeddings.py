"""Records what optimizers do with the sparse gradients of an embedding.

In `tests/`, where TensorFlow is installed: `python -m golden.record_embeddings embeddings.json`.

A table of two rows and one column starts at zero, and every lookup has a gradient of one. Each case
is a list of steps, and each step a list of the rows that are looked up. Recorded are the table and
its second moment after every step.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
import sonnet
import tensorflow as tf
import tf_keras

RATE = 0.01
# Row 0 is looked up once and then left alone.
LEFT = [[0], [1], [1], [1]]
REPEATED = [[0, 0]]
CASES: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    'left': (LEFT, {}),
    'left, momentum': (LEFT, {'momentum': 0.9}),
    'left, momentum, centered': (LEFT, {'momentum': 0.9, 'centered': True}),
    'repeated': (REPEATED, {}),
    'repeated, centered': (REPEATED, {'centered': True}),
}
CLIPPED: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    'repeated, clipnorm': (REPEATED, {'clipnorm': 1.0}),
    'repeated, clipvalue': (REPEATED, {'clipvalue': 0.5}),
    'repeated, global_clipnorm': (REPEATED, {'global_clipnorm': 1.0}),
}
ACCUMULATED: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    'repeated, accumulated': (REPEATED * 2, {'gradient_accumulation_steps': 2}),
}

# Applies the gradient to a table, and reads its second moment.
Started = tuple[Any, Callable[[Any], Any], Callable[[], Any]]


def start_keras(options: dict[str, Any]) -> Started:
    tx = keras.optimizers.RMSprop(RATE, **options)
    table = keras.Variable(np.zeros((2, 1), 'f'))
    tx.build([table])
    moment = next(v for v in tx.variables if v.path.endswith('velocity'))
    return table, lambda g: tx.apply([g]), lambda: moment


def start_tf_keras(options: dict[str, Any]) -> Started:
    tx = tf_keras.optimizers.RMSprop(RATE, **options)
    table = tf.Variable(np.zeros((2, 1), 'f'))
    tx.build([table])
    return table, lambda g: tx.apply_gradients([(g, table)]), lambda: tx._velocities[0]


def start_slots(tx: Any) -> Started:
    table = tf.Variable(np.zeros((2, 1), 'f'))
    return table, lambda g: tx.apply_gradients([(g, table)]), lambda: tx.get_slot(table, 'rms')


def start_sonnet(options: dict[str, Any]) -> Started:
    tx = sonnet.optimizers.RMSProp(RATE, **options)
    table = tf.Variable(np.zeros((2, 1), 'f'))
    return table, lambda g: tx.apply([g], [table]), lambda: tx.ms[0]


def record(started: Started, steps: list[list[int]]) -> dict[str, list[list[float]]]:
    """The table and its second moment after every step."""
    table, apply, moment = started
    found: dict[str, list[list[float]]] = {'table': [], 'moment': []}
    for rows in steps:
        ones = tf.ones((len(rows), 1))
        apply(tf.IndexedSlices(ones, tf.constant(rows, tf.int64), tf.constant([2, 1], tf.int64)))
        for name, value in (('table', table), ('moment', moment())):
            found[name].append(np.ravel(value.numpy()).tolist())
    return found


def main() -> None:
    legacy = tf_keras.optimizers.legacy.RMSprop
    original = tf.compat.v1.train.RMSPropOptimizer
    starts: dict[str, tuple[Callable[[dict[str, Any]], Started], dict[str, Any]]] = {
        'keras': (start_keras, CASES | CLIPPED | ACCUMULATED),
        'tf_keras': (start_tf_keras, CASES | CLIPPED),
        'keras_legacy': (lambda o: start_slots(legacy(RATE, **o)), CASES | CLIPPED),
        'tensorflow': (lambda o: start_slots(original(RATE, **o)), CASES),
        'sonnet': (start_sonnet, CASES),
    }
    found: dict[str, Any] = {
        framework: {case: record(start(options), steps) for case, (steps, options) in cases.items()}
        for framework, (start, cases) in starts.items()
    }
    packages = ('tensorflow_cpu', 'keras', 'tf-keras', 'dm-sonnet')
    found['versions'] = {name: version(name) for name in packages}
    Path(sys.argv[1]).write_text(json.dumps(found) + '\n')


if __name__ == '__main__':
    main()
