"""Records runs that Keras 3 and tf_keras have saved in their middle, as they are once loaded.

In `tests/`, where TensorFlow is installed, but not JAX::

    python -m interchange_data.record_saved interchange_data/saved.npz

Each case has the model's `weights` and the optimizer's `variables`, read after the file was loaded,
and both after `AFTER` further steps, as `end` and `end_variables`. Cells have their `output`, and
the other two cases of Keras 3 show what Keras loses. Everything is float64.
"""

import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from interchange_data import problem

HALF, AFTER = 5, 3
BATCH, LENGTH, FEATURES, HIDDEN = 6, 4, 3, 4
RATE = 2.0**-6
# `excluded` is of `exclude_from_weight_decay`; `average` shows what `fit` does at its end.
KERAS: dict[str, dict[str, Any]] = {
    'excluded': {'momentum': 0.75, 'centered': True, 'weight_decay': 0.125},
    'average': {'use_ema': True, 'ema_momentum': 0.75},
    'lstm': {'momentum': 0.75},
    'gru': {'momentum': 0.75, 'centered': True},
}
TF_KERAS: dict[str, dict[str, Any]] = {
    'legacy': {'rho': 0.875, 'epsilon': 2.0**-10},
    'legacy_centered': {'rho': 0.875, 'momentum': 0.75, 'epsilon': 2.0**-10, 'centered': True},
    'tf_keras': {'rho': 0.875, 'momentum': 0.75, 'epsilon': 2.0**-10, 'centered': True},
}
CELLS = ('lstm', 'gru')
EXCLUDED = ['bias', 'gamma', 'beta']


def inputs(case: str) -> np.ndarray:
    """The one batch of a case."""
    return problem.wave((BATCH, LENGTH, FEATURES) if case in CELLS else (BATCH, FEATURES), 1.7)


def targets() -> np.ndarray:
    return problem.wave((BATCH, HIDDEN), 2.1)


def _model(keras: Any, case: str) -> Any:
    layers = keras.layers
    made = {
        'lstm': lambda: [layers.LSTM(HIDDEN)],
        'gru': lambda: [layers.GRU(HIDDEN)],
        'excluded': lambda: [
            layers.Dense(5, activation='tanh'),
            layers.LayerNormalization(),
            layers.Dense(HIDDEN),
        ],
    }.get(case, lambda: [layers.Dense(5, activation='tanh'), layers.Dense(HIDDEN)])()
    keras.backend.clear_session()
    model = keras.Sequential([keras.Input(inputs(case).shape[1:]), *made])
    model.set_weights(
        [
            0.5 + 0.5 * problem.wave(tuple(w.shape), 2.3, 0.1 * i)
            for i, w in enumerate(model.get_weights())
        ]
    )
    return model


def _fit(model: Any, case: str, steps: int, **more: Any) -> None:
    x, y = inputs(case), targets()
    model.fit(x, y, batch_size=BATCH, epochs=steps, shuffle=False, verbose=0, **more)


def _weights(model: Any) -> dict[str, np.ndarray]:
    return {_name(v): v.numpy().copy() for v in model.trainable_variables}


def _name(variable: Any) -> str:
    """Keras 3's `path`, or the name in tf_keras without `:0`."""
    return getattr(variable, 'path', variable.name.partition(':')[0])


def _recorded(
    load: Callable[[str], Any],
    variables: Callable[[Any], dict[str, np.ndarray]],
    model: Any,
    case: str,
    ending: str,
) -> dict[str, Any]:
    before: list[dict[str, np.ndarray]] = []

    class Watch(importlib.import_module(type(model).__module__.split('.')[0]).callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            before[:] = [_weights(model)]

    _fit(model, case, HALF, callbacks=[Watch()])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f'run.{ending}')
        model.save(path)
        loaded, other = load(path), load(path)
    parts: dict[str, Any] = {'weights': _weights(loaded), 'variables': variables(loaded)}
    if case in CELLS:
        parts['output'] = {'y': loaded.predict(inputs(case), verbose=0)}
    if case == 'average':
        # Before `fit` has ended.
        parts['before'] = before[0]
    if case == 'excluded':
        # The model in memory goes on, and so does a loaded one that is told again; the latter is
        # what is recorded as `end`.
        _fit(model, case, AFTER)
        parts['stayed'] = _weights(model)
        _fit(other, case, AFTER)
        parts['forgotten'] = _weights(other)
        loaded.optimizer.exclude_from_weight_decay(var_names=EXCLUDED)
    _fit(loaded, case, AFTER)
    return parts | {'end': _weights(loaded), 'end_variables': variables(loaded)}


def record(path: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    keras: Any = importlib.import_module('keras')
    keras.config.set_floatx('float64')
    for case, settings in KERAS.items():
        model = _model(keras, case)
        optimizer = keras.optimizers.RMSprop(RATE, **settings)
        if case == 'excluded':
            optimizer.exclude_from_weight_decay(var_names=EXCLUDED)
        model.compile(optimizer, 'mse')
        found = _recorded(
            keras.saving.load_model,
            lambda model: {v.name: v.numpy().copy() for v in model.optimizer.variables},
            model,
            case,
            'keras',
        )
        arrays |= problem.flat(case, found)
    old: Any = importlib.import_module('tf_keras')
    old.backend.set_floatx('float64')
    for case, settings in TF_KERAS.items():
        is_legacy = case != 'tf_keras'
        model = _model(old, case)
        kind = old.optimizers.legacy.RMSprop if is_legacy else old.optimizers.RMSprop
        model.compile(kind(RATE, **settings), 'mse')
        find = _slots if is_legacy else _new_variables
        # A `.keras` file loses the state of legacy optimizers.
        ending = 'h5' if is_legacy else 'keras'
        arrays |= problem.flat(case, _recorded(old.models.load_model, find, model, case, ending))
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]


def _slots(model: Any) -> dict[str, np.ndarray]:
    """The slots by the names of the porting page."""
    optimizer = model.optimizer
    slots = {
        f'{_name(v)}/{slot}': optimizer.get_slot(v, slot).numpy().copy()
        for v in model.trainable_variables
        for slot in optimizer.get_slot_names()
    }
    return slots | {'iterations': optimizer.iterations.numpy()}


def _new_variables(model: Any) -> dict[str, np.ndarray]:
    return {v.name: v.numpy().copy() for v in model.optimizer.variables}


if __name__ == '__main__':
    record(sys.argv[1])
