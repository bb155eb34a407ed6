"""Keras 3, the Keras of TensorFlow 2.0 to 2.10 and of 2.11 to 2.15, TensorFlow 1 and Sonnet 2."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import sonnet
import tensorflow as tf
import tf_keras
from golden.problems import Arrays, Problem, learning_rates
from golden.recording import Configuration, Step, main, signature


class Tabulated(keras.optimizers.schedules.LearningRateSchedule):
    """Looks the learning rate of a step up."""

    def __init__(self, rates: np.ndarray):
        self.rates = tf.constant(rates)

    def __call__(self, step: Any) -> Any:
        return tf.gather(self.rates, tf.cast(step, 'int64'))


class OlderTabulated(tf_keras.optimizers.schedules.LearningRateSchedule):
    """The same for the older two."""

    def __init__(self, rates: np.ndarray):
        self.rates = tf.constant(rates)

    def __call__(self, step: Any) -> Any:
        return tf.gather(self.rates, tf.cast(step, 'int64'))


def gradients_at(given: Problem, number: int) -> dict[str, Any]:
    """The gradients of a step, in rows where the problem has rows."""
    found = {n: tf.constant(g[number]) for n, g in given.gradients.items()}
    if given.rows:
        indices, values = given.rows[number]
        shape = tf.constant(given.params['table'].shape, tf.int64)
        found['table'] = tf.IndexedSlices(tf.constant(values), tf.constant(indices), shape)
    return found


def values(variables: dict[str, Any]) -> Arrays:
    return {n: np.array(v.numpy()) for n, v in variables.items()}


def options_of(configuration: Configuration, tabulated: Callable[[np.ndarray], Any]) -> Any:
    """The optimizer's arguments, with the rates of the steps, if there are any, as a schedule."""
    rates = learning_rates(configuration)
    options = dict(configuration['options'])
    return options if rates is None else options | {'learning_rate': tabulated(rates)}


def start_keras(configuration: Configuration, given: Problem) -> Step:
    keras.config.set_floatx(configuration['dtype'])
    tx = keras.optimizers.RMSprop(**options_of(configuration, Tabulated))
    variables = {n: keras.Variable(p) for n, p in given.params.items()}
    if configuration.get('exclude'):
        tx.exclude_from_weight_decay([variables[n] for n in configuration['exclude']])
    tx.build(list(variables.values()))

    def step(number: int) -> Arrays:
        found = gradients_at(given, number)
        tx.apply([found[n] for n in variables])
        return values(variables) | averages_of(tx, variables)

    return step


def averages_of(tx: Any, variables: dict[str, Any]) -> Arrays:
    """The averages that Keras, or tf_keras, keeps of its variables."""
    if not tx.use_ema:
        return {}
    averages = tx._model_variables_moving_average
    return {f'average {n}': a.numpy() for n, a in zip(variables, averages, strict=True)}


def start_keras_legacy(configuration: Configuration, given: Problem) -> Step:
    tx = tf_keras.optimizers.legacy.RMSprop(**options_of(configuration, OlderTabulated))
    return apply_gradients(tx, given)


def start_tf_keras(configuration: Configuration, given: Problem) -> Step:
    tx = tf_keras.optimizers.RMSprop(**options_of(configuration, OlderTabulated))
    variables = {n: tf.Variable(p) for n, p in given.params.items()}
    if configuration.get('exclude'):
        tx.exclude_from_weight_decay([variables[n] for n in configuration['exclude']])
    tx.build(list(variables.values()))

    def step(number: int) -> Arrays:
        found = gradients_at(given, number)
        tx.apply_gradients([(found[n], v) for n, v in variables.items()])
        return values(variables) | averages_of(tx, variables)

    return step


def start_tensorflow(configuration: Configuration, given: Problem) -> Step:
    current = {'number': 0}
    options = options_of(configuration, lambda rates: lambda: float(rates[current['number']]))
    tx = tf.compat.v1.train.RMSPropOptimizer(**options)
    inner = apply_gradients(tx, given)

    def step(number: int) -> Arrays:
        current['number'] = number
        return inner(number)

    return step


def apply_gradients(tx: Any, given: Problem) -> Step:
    variables = {n: tf.Variable(p) for n, p in given.params.items()}

    def step(number: int) -> Arrays:
        found = gradients_at(given, number)
        tx.apply_gradients([(found[n], v) for n, v in variables.items()])
        return values(variables)

    return step


def start_sonnet(configuration: Configuration, given: Problem) -> Step:
    rates = learning_rates(configuration)
    tx = sonnet.optimizers.RMSProp(**({'learning_rate': 0.0} | configuration['options']))
    variables = {n: tf.Variable(p) for n, p in given.params.items()}

    def step(number: int) -> Arrays:
        if rates is not None:
            tx.learning_rate = float(rates[number])
        found = gradients_at(given, number)
        tx.apply([found[n] for n in variables], list(variables.values()))
        return values(variables)

    return step


def with_extra(optimizer: Any, *extra: str) -> dict[str, str]:
    """A signature with the keyword arguments that the base class takes out of `**kwargs`."""
    return signature(optimizer) | dict.fromkeys(extra, 'in kwargs')


if __name__ == '__main__':
    main(
        {
            'keras': start_keras,
            'keras_legacy': start_keras_legacy,
            'tf_keras': start_tf_keras,
            'tensorflow': start_tensorflow,
            'sonnet': start_sonnet,
        },
        {
            'keras': signature(keras.optimizers.RMSprop),
            'keras_legacy': with_extra(
                tf_keras.optimizers.legacy.RMSprop,
                *('clipnorm', 'clipvalue', 'global_clipnorm', 'decay', 'lr'),
            ),
            'tf_keras': with_extra(tf_keras.optimizers.RMSprop, 'lr'),
            'tensorflow': signature(tf.compat.v1.train.RMSPropOptimizer),
            'sonnet': signature(sonnet.optimizers.RMSProp.__init__),
        },
        ('tensorflow_cpu', 'keras', 'tf-keras', 'dm-sonnet', 'numpy'),
    )
