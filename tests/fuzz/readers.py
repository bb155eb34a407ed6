"""Coverage-guided fuzzing of everything that reads what others have written.

    python readers.py FOLDER [libFuzzer options, such as -max_total_time=600]

Inputs are kept in the folder. A reader may return, or raise one of `DOCUMENTED` from a line of
ours; anything else is a finding: libFuzzer stops and writes the input down.
"""

import io
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import jax.numpy as jnp
import numpy as np
import optax

with atheris.instrument_imports(include=['rmsprop_jax']):
    import rmsprop_jax
    from rmsprop_jax import dialects, interchange, storage
    from rmsprop_jax.identify._recording import lay_out, read_trace

# A name in the place of a trace is a path.
ABSENT = (FileNotFoundError, IsADirectoryError)
DOCUMENTED = (ValueError, TypeError)
PARAMS = {'fc': {'kernel': jnp.ones((2, 3)), 'bias': jnp.ones(3)}}
PAIRS = interchange.torch.linear('fc', 'fc')
NAMES = ['fc.weight', 'fc.bias']
KERAS_PAIRS = interchange.keras.dense('fc', 'fc')
TORCH = dialects.torch(0.1, momentum=0.9, centered=True)
KERAS = dialects.keras(0.1, momentum=0.9)
TENSORFLOW = dialects.tensorflow(0.1)
OURS = rmsprop_jax.rmsprop(0.1, centered=True, momentum=0.9)
STATE = OURS.init(PARAMS)
DESCRIPTION = storage.describe(STATE, None)
DTYPES = ('float32', 'float64', 'int64', 'bool', 'complex64', 'float16', 'U3', 'object')
SHAPES = ((), (1,), (3,), (2, 3), (3, 2), (0,), (3, 2, 1), (4, 3))
NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**63, 10**400, 0.5, 1e-8, -0.0, 1e308, np.inf, -np.inf, np.nan)
WORDS = (
    *('state', 'param_groups', 'params', 'param_names', 'step', 'square_avg', 'grad_avg'),
    *('momentum_buffer', 'lr', 'alpha', 'eps', 'weight_decay', 'momentum', 'centered', 'foreach'),
    *('fc.weight', 'fc.bias', 'gradients', 'learning_rate', 'decay', 'iteration', 'iterations'),
    *('fc_kernel_velocity', 'fc_bias_momentum', 'fc_kernel_average_gradient', 'global_step'),
    *('fc.weight/RMSProp', 'fc.weight/RMSProp_1', 'fc.bias/RMSProp', 'fc.bias/RMSProp_1'),
    *('params/a', 'gradients/a', 'params/b', 'rmsprop_jax.storage', 'leaves', 'format', 'seed'),
    *('scale', 'version', ".var['fc']['bias']"),
)


class Unpickled:
    """An object whose unpickling would be noticed."""

    happened = False

    def __reduce__(self) -> Any:
        return _notice, ()


def _notice() -> None:
    Unpickled.happened = True


class Draw:
    """Values of every kind, out of libFuzzer's bytes."""

    def __init__(self, data: bytes):
        self.data = atheris.FuzzedDataProvider(data)

    def one(self, choices: Any) -> Any:
        return choices[self.data.ConsumeIntInRange(0, len(choices) - 1)]

    def some(self) -> range:
        return range(self.data.ConsumeIntInRange(0, 4))

    def array(self) -> np.ndarray:
        dtype, shape = self.one(DTYPES), self.one(SHAPES)
        filler: Any = self.one((0, 1, 0.5, -1, np.nan, np.inf))
        if dtype in ('int64', 'bool') and not np.isfinite(filler):
            filler = 3
        return np.full(shape, filler, dtype)

    def key(self) -> Any:
        return self.one((self.one(WORDS), self.one(WORDS), self.one((0, 1, 2, None, '', (1,)))))

    def value(self, depth: int = 0) -> Any:
        kind = self.data.ConsumeIntInRange(0, 8 if depth < 4 else 5)
        if kind <= 2:
            return self.array()
        if kind == 3:
            return self.one(NUMBERS)
        if kind == 4:
            return self.key()
        if kind == 5:
            return self.one((None, True, False, object(), b'x', np.float32(1), 2j, 'fit'))
        if kind == 6:
            return [self.value(depth + 1) for _ in self.some()]
        return self.mapping(depth + 1)

    def mapping(self, depth: int = 0) -> dict[Any, Any]:
        return {self.key(): self.value(depth) for _ in self.some()}

    def changed(self, valid: Any, depth: int = 0) -> Any:
        """`valid` with a few of its parts replaced, removed or added."""
        if self.data.ConsumeIntInRange(0, 9) == 0:
            return self.value(depth)
        if isinstance(valid, dict):
            kept = {
                k: self.changed(v, depth + 1)
                for k, v in valid.items()
                if self.data.ConsumeIntInRange(0, 9) != 0
            }
            return kept | (self.mapping(depth + 1) if self.data.ConsumeBool() else {})
        if isinstance(valid, list):
            return [self.changed(x, depth + 1) for x in valid]
        return valid


def matrix(fill: float) -> np.ndarray:
    return np.full((3, 2), fill, np.float32)


def valid_torch() -> dict[str, Any]:
    row = np.full(3, 0.5, np.float32)
    moments = ('square_avg', 'grad_avg', 'momentum_buffer')
    group = {'lr': 0.1, 'alpha': 0.99, 'eps': 1e-8, 'weight_decay': 0, 'momentum': 0.9}
    group['maximize'] = False
    return {
        'state': {
            0: {'step': 3.0, **dict.fromkeys(moments, matrix(0.5))},
            1: {'step': np.float32(3), **dict.fromkeys(moments, row)},
        },
        'param_groups': [{**group, 'centered': True, 'params': [0, 1], 'param_names': NAMES}],
    }


def valid_keras() -> dict[str, Any]:
    shapes = {'kernel': (2, 3), 'bias': (3,)}
    slots = {
        f'fc_{name}_{slot}': np.ones(shape, np.float32)
        for name, shape in shapes.items()
        for slot in ('velocity', 'momentum')
    }
    return {'iteration': np.int64(3), 'learning_rate': np.float32(0.1), **slots}


def valid_tensorflow() -> dict[str, Any]:
    slots = {f'fc.weight/RMSProp{n}': matrix(1).copy() for n in ('', '_1')}
    rows = {f'fc.bias/RMSProp{n}': np.ones(3, np.float32) for n in ('', '_1')}
    return {'global_step': np.int64(3), **slots, **rows}


def valid_trace() -> dict[str, Any]:
    params = np.arange(8, dtype=np.float32).reshape(4, 2)
    return {'params/a': params, 'gradients/a': params[:3], 'learning_rate': 0.1, 'decay': 0.9}


def trace(given: Any) -> None:
    read = read_trace(given)
    lay_out(read, read.learning_rate)


def file_of(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix='.npz') as file:
        file.write(content)
        file.flush()
        trace(file.name)


def from_optax(draw: Draw) -> None:
    theirs = optax.rmsprop(0.1, centered=True, momentum=0.9).init(PARAMS)
    changed = [
        part._replace(**{name: draw.changed(x) for name, x in part._asdict().items()})
        for part in theirs
    ]
    tx = rmsprop_jax.rmsprop(0.1, centered=True, momentum=0.9)
    interchange.from_optax(changed, tx, PARAMS, count=draw.one((1, None)))


def to_torch(draw: Draw) -> None:
    groups = valid_torch()['param_groups']
    state, names = TORCH.init(PARAMS), draw.changed(NAMES)
    interchange.to_torch(state, PARAMS, PAIRS, draw.changed(groups), names=names, tx=TORCH)


def parameters(draw: Draw) -> None:
    theirs = {'fc.weight': matrix(1), 'fc.bias': np.ones(3)}
    interchange.parameters_from(draw.changed(theirs), PARAMS, PAIRS)


# Files, which are the bytes as they are, come before these.
TARGETS: tuple[Callable[[Draw], Any], ...] = (
    lambda draw: trace(draw.changed(valid_trace())),
    lambda draw: interchange.from_torch(draw.changed(valid_torch()), TORCH, PARAMS, PAIRS),
    lambda draw: interchange.torch_optimizer(draw.changed(valid_torch()), PARAMS, PAIRS),
    lambda draw: interchange.from_keras(draw.changed(valid_keras()), KERAS, PARAMS, KERAS_PAIRS),
    lambda draw: interchange.from_tensorflow(
        draw.changed(valid_tensorflow()), TENSORFLOW, PARAMS, PAIRS
    ),
    lambda draw: storage.check(draw.changed(DESCRIPTION), STATE, None),
    parameters,
    from_optax,
    to_torch,
)


def read(data: bytes) -> None:
    """Hands drawn data to one of the readers."""
    target = data[0] % (1 + len(TARGETS)) if data else 0
    if target == 0:
        file_of(data[1:])
    else:
        TARGETS[target - 1](Draw(data[1:]))


def once(data: bytes) -> None:
    """One input: everything but a result or a documented error of ours is a finding."""
    try:
        read(data)
    except ABSENT:
        pass
    except DOCUMENTED as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if 'rmsprop_jax' not in Path(last.filename).parts or 'raise' not in (last.line or ''):
            raise AssertionError(f'not an error of ours: {error!r}') from error
    assert not Unpickled.happened, 'a pickle was loaded'


def seeds(folder: Path) -> None:
    """Files as they should be, one with a pickle inside, and a start for every other target."""
    folder.mkdir(parents=True, exist_ok=True)
    for save in (np.savez, np.savez_compressed):
        for extra in ({}, {'params/b': np.array([Unpickled()], object)}):
            buffer = io.BytesIO()
            save(buffer, **(valid_trace() | extra))
            (folder / f'{save.__name__}-{len(extra)}').write_bytes(b'\0' + buffer.getvalue())
    (folder / 'pickle').write_bytes(b'\0' + pickle.dumps(Unpickled()))
    for target in range(1, 1 + len(TARGETS)):
        for fill in (b'\xff', b'\x55', bytes(range(256))):
            (folder / f'{target}-{fill[0]}').write_bytes(bytes([target]) + (fill * 200)[:200])


def main() -> None:
    folder = Path(sys.argv[1])
    seeds(folder)
    # On Python 3.11 jaxlib 0.10 loses one level of recursion at each tree that it cannot flatten.
    sys.setrecursionlimit(10**6)
    atheris.Setup([sys.argv[0], str(folder), *sys.argv[2:]], once)
    atheris.Fuzz()


if __name__ == '__main__':
    main()
