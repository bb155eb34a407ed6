"""Records one step in float64 with hyperparameters that float32 does not hold exactly.

In `tests/`, where the framework is installed (`torch` or `tensorflow`; no JAX)::

    python -m interchange_data.record_float64 torch interchange_data/float64_torch.json

Every case is the parameters after one step from `PARAMS` with `GRADIENTS`.
"""

import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np

PARAMS, GRADIENTS = [0.0, 0.0, 0.0], [0.7, -1.3, 2.1]
RATE, DECAY, EPS = 0.1, 0.95, 1e-3


def torch() -> dict[str, Any]:
    module: Any = importlib.import_module('torch')
    copies: Any = importlib.import_module('golden.record_torch')
    found: dict[str, Any] = {}
    for name, optimizer in (
        ('torch', module.optim.RMSprop),
        ('timm', copies.rmsprop_tf()),
        ('stable_baselines3', copies.rmsprop_tf_like()),
    ):
        p = module.tensor(PARAMS, dtype=module.float64, requires_grad=True)
        p.grad = module.tensor(GRADIENTS, dtype=module.float64)
        optimizer([p], lr=RATE, alpha=DECAY, eps=EPS).step()
        found[name] = p.tolist()
    return found


def _step(optimizers: Any, make: Any, rate: Any, tensor: Any) -> list[float]:
    variable = make(np.array(PARAMS))
    optimizer = optimizers.RMSprop(rate, rho=DECAY, epsilon=EPS)
    optimizer.apply_gradients([(tensor(GRADIENTS), variable)])
    return np.asarray(variable).tolist()


def tensorflow() -> dict[str, Any]:
    tf: Any = importlib.import_module('tensorflow')
    keras: Any = importlib.import_module('keras')
    tf_keras: Any = importlib.import_module('tf_keras')

    def tensor(value: Any) -> Any:
        return tf.constant(value, tf.float64)

    def float64_variable(value: Any) -> Any:
        return keras.Variable(value, dtype='float64')

    found: dict[str, Any] = {}
    for name, module in (('keras', keras), ('tf_keras', tf_keras)):
        make = float64_variable if name == 'keras' else tf.Variable
        schedule = module.optimizers.schedules.ExponentialDecay(RATE, 1000, 0.5)
        for label, rate in (('', RATE), (' with a schedule', schedule)):
            found[name + label] = _step(module.optimizers, make, rate, tensor)
    found['keras_legacy'] = _step(tf_keras.optimizers.legacy, tf.Variable, RATE, tensor)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable('p', initializer=np.array(PARAMS))
        optimizer = tf.compat.v1.train.RMSPropOptimizer(RATE, DECAY, 0.0, EPS)
        train = optimizer.apply_gradients([(tensor(GRADIENTS), variable)])
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(train)
        found['tensorflow'] = session.run(variable).tolist()
    return found


if __name__ == '__main__':
    framework, target = sys.argv[1:]
    made = {'torch': torch, 'tensorflow': tensorflow}[framework]()
    pathlib.Path(target).write_text(json.dumps(made, indent=1) + '\n')
