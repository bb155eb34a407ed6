"""Runs the problems in the frameworks themselves, and records the results.

In `tests/`, where the framework is installed (`torch`, `keras` or `tensorflow`; no JAX)::

    python -m interchange_data.frameworks torch interchange_data/torch.npz

records every case halfway (`params`, `state`) and at its `end`. With a second file, made by
`check_live write`, it also goes on from what is in there, and records where that ends as
`continued`. Every runner takes and returns plain dictionaries of NumPy arrays.
"""

import functools
import importlib
import sys
from typing import Any

import numpy as np

from interchange_data import problem

Arrays = dict[str, np.ndarray]


def run_torch_net(
    params: Arrays, state: dict[str, Any] | None, start: int, stop: int
) -> tuple[Arrays, dict[str, Any]]:
    torch: Any = importlib.import_module('torch')
    functional = torch.nn.functional
    p = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    optimizer = torch.optim.RMSprop(
        [
            {'params': [p[name] for name in group['names']], **group['settings']}
            for group in problem.NET_GROUPS
        ]
    )
    if state is not None:
        _load(torch, optimizer, state)
    inputs, targets = torch.tensor(problem.INPUTS), torch.tensor(problem.TARGETS)
    for step in range(start, stop):
        for group, given in zip(optimizer.param_groups, problem.NET_GROUPS, strict=True):
            factor = 1.0 if step < problem.HANDOVER else problem.DROP
            group['lr'] = given['settings']['lr'] * factor
        batch = step % problem.BATCHES
        x = torch.tanh(functional.conv2d(inputs[batch], p['conv.weight'], p['conv.bias']))
        x = functional.linear(x.flatten(1), p['fc.weight'], p['fc.bias'])
        x = torch.tanh(functional.layer_norm(x, (5,), p['norm.weight'], p['norm.bias']))
        x = functional.linear(x, p['head.weight'], p['head.bias'])
        loss = ((x - targets[batch]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {k: v.detach().numpy().copy() for k, v in p.items()}, _state_dict(optimizer)


def run_torch_complex(
    params: Arrays, state: dict[str, Any] | None, start: int, stop: int
) -> tuple[Arrays, dict[str, Any]]:
    torch: Any = importlib.import_module('torch')
    p = {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}
    optimizer = torch.optim.RMSprop(p.items(), **problem.TORCH_COMPLEX)
    if state is not None:
        _load(torch, optimizer, state)
    for step in range(start, stop):
        optimizer.param_groups[0]['lr'] = problem.rate(step)
        now = {name: value.detach().numpy() for name, value in p.items()}
        for name, g in problem.gradient(now, step).items():
            p[name].grad = torch.tensor(g)
        optimizer.step()
    return {k: v.detach().numpy().copy() for k, v in p.items()}, _state_dict(optimizer)


def _load(torch: Any, optimizer: Any, state: dict[str, Any]) -> None:
    entries = {
        number: {key: torch.from_numpy(np.array(value)) for key, value in entry.items()}
        for number, entry in state['state'].items()
    }
    optimizer.load_state_dict({**state, 'state': entries})


def _state_dict(optimizer: Any) -> dict[str, Any]:
    """A copy: PyTorch's own goes on changing."""
    found = optimizer.state_dict()
    entries = {
        number: {key: value.numpy().copy() for key, value in entry.items()}
        for number, entry in found['state'].items()
    }
    return {'state': entries, 'param_groups': found['param_groups']}


def run_keras(
    case: str, params: Arrays, state: Arrays | None, start: int, stop: int
) -> tuple[Arrays, Arrays]:
    keras: Any = importlib.import_module('keras')
    with keras.name_scope('net'):
        variables = {
            name: keras.Variable(value, dtype='float64', name=name)
            for name, value in params.items()
        }
    optimizer = keras.optimizers.RMSprop(problem.RATE, **problem.KERAS[case])
    optimizer.build(list(variables.values()))
    if state is not None:
        assert {v.name for v in optimizer.variables} == set(state)
        for variable in optimizer.variables:
            variable.assign(state[variable.name])
    for step in range(start, stop):
        optimizer.learning_rate = problem.rate(step)
        now = {name: np.array(v.numpy()) for name, v in variables.items()}
        gradients = problem.gradient(now, step)
        optimizer.apply(list(map(keras.ops.convert_to_tensor, gradients.values())))
    found = {v.name: np.array(v.numpy()) for v in optimizer.variables}
    return {name: np.array(v.numpy()) for name, v in variables.items()}, found


def run_tensorflow(
    case: str, params: Arrays, state: Arrays | None, start: int, stop: int
) -> tuple[Arrays, Arrays]:
    tf: Any = importlib.import_module('tensorflow').compat.v1
    with tf.Graph().as_default(), tf.Session() as session:
        step_count = tf.train.get_or_create_global_step()
        variables = {
            name: tf.get_variable(f'net/{name}', initializer=value)
            for name, value in params.items()
        }
        slots = {name: tf.placeholder(tf.float64, v.shape) for name, v in params.items()}
        rate = tf.placeholder(tf.float32, ())
        optimizer = tf.train.RMSPropOptimizer(rate, **problem.TENSORFLOW[case])
        pairs = [(slots[name], variables[name]) for name in variables]
        train = optimizer.apply_gradients(pairs, global_step=step_count)
        session.run(tf.global_variables_initializer())
        if state is not None:
            for variable in [step_count, *optimizer.variables()]:
                variable.load(state[variable.op.name], session)
        for step in range(start, stop):
            gradients = problem.gradient(session.run(variables), step)
            feed = {slots[name]: g for name, g in gradients.items()}
            session.run(train, feed | {rate: problem.rate(step)})
        found = {v.op.name: session.run(v) for v in [step_count, *optimizer.variables()]}
        return session.run(variables), found


def runs(framework: str) -> dict[str, Any]:
    """Each case's runner and the parameters it starts from."""
    if framework == 'torch':
        return {
            'net': (run_torch_net, problem.net_params()),
            'complex': (run_torch_complex, problem.params(is_complex=True)),
        }
    cases, run = {
        'keras': (problem.KERAS, run_keras),
        'tensorflow': (problem.TENSORFLOW, run_tensorflow),
    }[framework]
    return {case: (functools.partial(run, case), problem.params()) for case in cases}


def record(framework: str, target: str, ours: str | None = None) -> None:
    arrays: Arrays = {}
    for case, (run, params) in runs(framework).items():
        halfway, state = run(params, None, 0, problem.HANDOVER)
        # In one go, so that nothing hangs on the framework's own way to restore a state.
        end, _ = run(params, None, 0, problem.END)
        results = {'params': halfway, 'state': state, 'end': end}
        if ours is not None:
            moved = problem.read(ours, case)
            span = (problem.HANDOVER, problem.END)
            results['continued'], _ = run(moved['params'], moved['state'], *span)
        arrays |= problem.flat(case, results)
    np.savez_compressed(target, **arrays)  # pyright: ignore[reportArgumentType]


if __name__ == '__main__':
    record(*sys.argv[1:])
