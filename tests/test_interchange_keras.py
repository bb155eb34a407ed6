"""Runs that Keras 3 and tf_keras saved go on here, and go back."""

import dataclasses
import pathlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from interchange_data import ours, problem
from interchange_data import record_saved as recorded

from rmsprop_jax import dialects, interchange

EXACT = 1e-12
PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'porting.md'


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def _run(case: str) -> dict[str, Any]:
    return problem.read(problem.FOLDER / 'saved.npz', case)


def _loss(outputs: Any) -> Any:
    return jnp.mean((outputs - recorded.targets()) ** 2)


def _assert_near(found: Any, wanted: Any, within: float = EXACT) -> None:
    assert ours.worst(found, wanted) < within


class Net(nnx.Module):
    """That of `record_saved` with the dense layers, and with its normalisation if it has one."""

    def __init__(self, normalised: bool = True):
        wide: dict[str, Any] = {'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
        self.hidden = nnx.Linear(recorded.FEATURES, 5, **wide)
        if normalised:
            self.norm = nnx.LayerNorm(5, epsilon=1e-3, **wide)
        self.head = nnx.Linear(5, recorded.HIDDEN, **wide)

    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.hidden(x))
        return self.head(self.norm(x) if hasattr(self, 'norm') else x)


PAIRS = (
    *interchange.keras.dense('dense', 'hidden'),
    *interchange.keras.dense('dense_1', 'head'),
)


def _params(model: Any) -> Any:
    return nnx.as_pure(nnx.state(model, nnx.Param))


def _trained(model: Any, tx: Any, params: Any, state: Any, case: str = '') -> tuple[Any, Any]:
    """The parameters and the state after the recorded steps."""
    graph, _ = nnx.split(model)
    x = jnp.asarray(recorded.inputs(case))
    gradient = jax.jit(jax.grad(lambda params: _loss(nnx.merge(graph, params)(x))))
    for _ in range(recorded.AFTER):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


# The page's example, with a Keras that replays the recorded file.


@dataclasses.dataclass
class Variable:
    path: str
    value: np.ndarray
    name: str = ''

    def numpy(self) -> np.ndarray:
        return self.value

    def assign(self, value: Any) -> None:
        assert value.shape == self.value.shape
        self.value = value


class Loaded:
    """A model that was loaded, of a case of `record_saved`."""

    def __init__(self, case: str):
        parts, settings = _run(case), recorded.KERAS[case]
        self.trainable_variables = [Variable(*item) for item in parts['weights'].items()]
        self.optimizer = types.SimpleNamespace(
            variables=[Variable(f'rm_sprop/{k}', v, k) for k, v in parts['variables'].items()],
            get_config=lambda: {
                'name': 'rm_sprop',
                'learning_rate': recorded.RATE,
                'loss_scale_factor': None,
                'clipnorm': None,
                **settings,
            },
        )
        self.saved: list[str] = []

    def save(self, path: str) -> None:
        self.saved.append(path)


@pytest.mark.extended
def test_the_example_of_the_page_takes_a_file_to_the_next_steps_and_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    there, paths = Loaded('excluded'), []
    keras = types.ModuleType('keras')
    keras.saving = types.SimpleNamespace(load_model=lambda path: paths.append(path) or there)
    monkeypatch.setitem(sys.modules, 'keras', keras)
    section = PAGE.read_text().split('### From a file of Keras\n')[1].split('\n### ')[0]
    (block,) = re.findall(r'^```\n(import .*?)```', section, re.DOTALL | re.MULTILINE)
    x = jnp.asarray(recorded.inputs('excluded'))
    namespace = {'Net': Net, 'loss_fn': lambda model, x: _loss(model(x))}
    exec(block, namespace | {'batches': [x] * recorded.AFTER})
    assert (paths, there.saved) == (['run.keras'], ['on.keras'])
    parts = _run('excluded')
    assert str(list(parts['weights'])) in capsys.readouterr().out
    _assert_near({v.path: v.value for v in there.trainable_variables}, parts['end'], 1e-11)
    variables = {v.name: v.value for v in there.optimizer.variables}
    _assert_near(variables, parts['end_variables'], 1e-11)
    assert len(block.splitlines()) < 45


@pytest.mark.extended
def test_keras_forgets_what_was_excluded_from_weight_decay():
    parts = _run('excluded')
    names = [f'sequential/{name}' for name in parts['weights']]
    assert list(parts['stayed']) == names
    _assert_near(dict(zip(parts['end'], parts['stayed'].values(), strict=True)), parts['end'])
    assert ours.worst(parts['forgotten'], parts['end']) > 1e-3
    pairs, model = (*PAIRS, *interchange.keras.norm('layer_normalization', 'norm')), Net()
    params = interchange.parameters_from(parts['weights'], _params(model), pairs)
    tx = dialects.keras(recorded.RATE, **recorded.KERAS['excluded'])
    state = interchange.from_keras(parts['variables'], tx, params, pairs)
    params, _ = _trained(model, tx, params, state)
    _assert_near(interchange.parameters_to(params, pairs), parts['forgotten'], 1e-11)


@pytest.mark.extended
def test_fit_ends_with_the_average_in_the_place_of_the_weights():
    parts, model = _run('average'), Net(normalised=False)
    averages = {
        path: parts['variables'][f'{path.replace("/", "_")}_average'] for path in parts['weights']
    }
    _assert_near(parts['weights'], averages, 1e-15)
    before = dict(zip(averages, parts['before'].values(), strict=True))
    assert ours.worst(averages, before) > 1e-3
    params = interchange.parameters_from(parts['weights'], _params(model), PAIRS)
    tx = dialects.keras(recorded.RATE, **recorded.KERAS['average'])
    state = interchange.from_keras(parts['variables'], tx, params, PAIRS)
    params, state = _trained(model, tx, params, state)
    found = interchange.to_keras(state, params, PAIRS, tx=tx, learning_rate=recorded.RATE)
    _assert_near(found, parts['end_variables'])
    ended = interchange.parameters_to(optax.tree.get(state, 'ema'), PAIRS)
    _assert_near(ended, parts['end'])


# The cells.


class Sequence(nnx.Module):
    """A cell of NNX over the inputs."""

    def __init__(self, cell: Any):
        self.cell = cell

    def __call__(self, x: Any) -> Any:
        carry = self.cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
        carry = jax.tree.map(lambda leaf: leaf.astype(x.dtype), carry)
        y = x
        for i in range(x.shape[1]):
            carry, y = self.cell(carry, x[:, i])
        return y


def _cell(name: str) -> Any:
    hidden, wide = recorded.HIDDEN, {'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
    made = getattr(nnx, name.removeprefix('nnx.'))(recorded.FEATURES, hidden, **wide)
    if name == 'nnx.GRUCell':
        made.dense_h = nnx.Linear(hidden, 3 * hidden, **wide)
    return made


@pytest.mark.extended
@pytest.mark.parametrize('name', ['nnx.LSTMCell', 'nnx.OptimizedLSTMCell', 'nnx.GRUCell'])
def test_a_cell_goes_on_from_keras_and_goes_back(name: str):
    case = 'gru' if 'GRU' in name else 'lstm'
    parts, model = _run(case), Sequence(_cell(name))
    pairs = interchange.keras.recurrent(f'{case}/{case}_cell', 'cell', name)
    params = interchange.parameters_from(parts['weights'], _params(model), pairs)
    nnx.update(model, params)
    _assert_near({'y': model(jnp.asarray(recorded.inputs(case)))}, parts['output'])
    tx = dialects.keras(recorded.RATE, **recorded.KERAS[case])
    state = interchange.from_keras(parts['variables'], tx, params, pairs)

    def back() -> dict[str, np.ndarray]:
        return interchange.to_keras(state, params, pairs, tx=tx, learning_rate=recorded.RATE)

    _assert_near(back(), parts['variables'], 1e-15)
    params, state = _trained(model, tx, params, state, case)
    # Where gradients change little, nu and mu^2 have few digits apart.
    within = 1e-10 if recorded.KERAS[case].get('centered') else EXACT
    _assert_near(interchange.parameters_to(params, pairs), parts['end'], within)
    _assert_near(back(), parts['end_variables'], within)


@pytest.mark.extended
@pytest.mark.parametrize('cell', [linen.LSTMCell, linen.OptimizedLSTMCell])
def test_a_linen_cell_has_the_output_of_keras(cell: Any):
    parts, made = _run('lstm'), cell(recorded.HIDDEN, param_dtype=jnp.float64)
    x = jnp.asarray(recorded.inputs('lstm'))
    carry = (jnp.zeros((recorded.BATCH, recorded.HIDDEN)),) * 2
    like = made.init(jax.random.key(0), carry, x[:, 0])['params']
    pairs = interchange.keras.recurrent('lstm/lstm_cell', 'cell', 'linen.LSTMCell')
    params = interchange.parameters_from(parts['weights'], {'cell': like}, pairs)['cell']
    y = None
    for i in range(recorded.LENGTH):
        carry, y = made.apply({'params': params}, carry, x[:, i])
    _assert_near({'y': y}, parts['output'])


def test_gates_without_a_bias_have_no_pair_for_it():
    pairs = interchange.keras.recurrent('l', 'c', 'nnx.LSTMCell', bias=False)
    assert [pair.theirs for pair in pairs] == ['l/kernel'] * 4 + ['l/recurrent_kernel'] * 4
    gru = interchange.keras.recurrent('g', 'c', 'nnx.GRUCell')
    like = {'c': {f'dense_{x}': {'kernel': np.zeros((2, 6)), 'bias': np.zeros(6)} for x in 'ih'}}
    # Of reset_after=False, which has one row only.
    theirs = {'g/kernel': np.ones((2, 6)), 'g/recurrent_kernel': np.ones((2, 6))}
    with pytest.raises(interchange.InterchangeError, match="'g/bias': its 1 axes cannot be laid"):
        interchange.parameters_from(theirs | {'g/bias': np.ones(6)}, like, gru)


# tf_keras.


LEGACY = [case for case in recorded.TF_KERAS if case.startswith('legacy')]


@pytest.mark.extended
@pytest.mark.parametrize('case', LEGACY)
def test_the_slots_of_a_legacy_optimizer_go_on_and_go_back(case: str):
    parts, settings = _run(case), recorded.TF_KERAS[case]
    model, slots, ends = Net(normalised=False), parts['variables'], parts['end_variables']
    count, end = slots.pop('iterations'), ends.pop('iterations')
    params = interchange.parameters_from(parts['weights'], _params(model), PAIRS)
    tx = dialects.keras_legacy(recorded.RATE, **settings)
    centered = settings.get('centered', False)
    state = interchange.from_tensorflow(
        slots, tx, params, PAIRS, centered=centered, name=None, count=count
    )

    def back() -> dict[str, np.ndarray]:
        return interchange.to_tensorflow(state, params, PAIRS, tx=tx, name=None)

    _assert_near(back(), slots | {'global_step': count}, 1e-15)
    params, state = _trained(model, tx, params, state)
    within = 1e-10 if centered else EXACT
    _assert_near(interchange.parameters_to(params, PAIRS), parts['end'], within)
    _assert_near(back(), ends | {'global_step': end}, within)


def test_the_slots_of_a_legacy_optimizer_are_asked_for_as_the_page_does():
    parts, params = _run('legacy'), _params(Net(normalised=False))
    wanted = parts['variables']
    count = wanted.pop('iterations')
    variables = [Variable(path, w, f'{path}:0') for path, w in parts['weights'].items()]
    (block,) = re.findall(r'^```\n(named = .*?)```', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {
        'model': types.SimpleNamespace(trainable_variables=variables),
        'optimizer': types.SimpleNamespace(
            get_slot=lambda v, slot: Variable(slot, wanted[f'{v.name.removesuffix(":0")}/{slot}']),
            get_slot_names=lambda: ['rms'],
            iterations=count,
        ),
        'interchange': interchange,
        'tx': dialects.keras_legacy(recorded.RATE, **recorded.TF_KERAS['legacy']),
        'params': params,
        'pairs': PAIRS,
    }
    exec(block, namespace)
    found = interchange.to_tensorflow(
        namespace['state'], params, PAIRS, tx=namespace['tx'], name=None
    )
    _assert_near(found, wanted | {'global_step': count}, 1e-15)


def test_slots_of_a_legacy_optimizer_must_go_with_its_rule():
    """Without momentum it has no such slot, and epsilon is outside the root."""
    parts, model = _run('legacy'), Net(normalised=False)
    slots, params = parts['variables'], _params(model)
    del slots['iterations']
    for tx, complaint in (
        (dialects.keras_legacy(0.1, momentum=0.5), "'dense/kernel/momentum' .momentum. is missing"),
        (dialects.keras(0.1), 'TensorFlow adds epsilon outside the root, and tx inside'),
    ):
        with pytest.raises(interchange.InterchangeError, match=complaint):
            interchange.from_tensorflow(slots, tx, params, PAIRS, name=None, count=5)
    tx = dialects.keras_legacy(0.1)
    state = interchange.from_tensorflow(slots, tx, params, PAIRS, name=None, count=5)
    # TensorFlow 1 has the slot at any momentum.
    with pytest.raises(interchange.InterchangeError, match="'hidden/kernel' lacks a nu or a trace"):
        interchange.to_tensorflow(state, params, PAIRS, tx=tx)
    # Under the names of its `variables()`, nothing is found.
    named = {f'RMSprop/{name}:0': slot for name, slot in slots.items()}
    with pytest.raises(
        interchange.InterchangeError, match=r"'dense/kernel/rms' \(rms\) is missing"
    ):
        interchange.from_tensorflow(named, tx, params, PAIRS, name=None, count=5)
    with pytest.raises(interchange.InterchangeError, match='differ only before their last slash'):
        interchange.from_keras(named, tx, params, PAIRS)


@pytest.mark.extended
def test_the_variables_of_tf_keras_go_on_under_the_names_of_keras_3():
    parts, model = _run('tf_keras'), Net(normalised=False)
    text = re.findall(r'^def keras_3_name.*?\n\n\n', PAGE.read_text(), re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(text[0], found)
    rename = found['keras_3_name']
    assert rename('RMSprop/velocity/dense/kernel:0') == rename('velocity/dense/kernel:0')
    variables, ends = (
        {rename(name): value for name, value in parts[which].items()}
        for which in ('variables', 'end_variables')
    )
    params = interchange.parameters_from(parts['weights'], _params(model), PAIRS)
    tx = dialects.tf_keras(recorded.RATE, **recorded.TF_KERAS['tf_keras'])
    state = interchange.from_keras(variables, tx, params, PAIRS)
    params, state = _trained(model, tx, params, state)
    _assert_near(interchange.parameters_to(params, PAIRS), parts['end'], 1e-10)
    _assert_near(interchange.to_keras(state, params, PAIRS, tx=tx), ends, 1e-10)


# TensorFlow 1.


def test_a_whole_checkpoint_of_tensorflow_1_has_the_parameters():
    like, pairs = {'w': jnp.zeros(2)}, [interchange.Pair('net/w', 'w')]
    w = np.array([1.0, 2.0])
    theirs = {'net/w': w, 'global_step': np.int64(4)}
    theirs |= {f'net/w/RMSProp{end}': np.ones(2) for end in ('', '_1', '_2')}
    found = interchange.parameters_from(theirs, like, pairs)
    np.testing.assert_array_equal(found['w'], w)
    strays = {'net/v': w, 'net/v/RMSProp': w, 'gone/RMSProp': w, 'net/w/Adam': w}
    strays |= {'net/w/RMSProp_3': w, 'beta1_power': w}
    with pytest.raises(interchange.InterchangeError) as error:
        interchange.parameters_from(theirs | strays, like, pairs)
    assert error.value.problems == tuple(
        f'{name!r} is not in any pair'
        for name in ('beta1_power', 'gone/RMSProp', 'net/v', 'net/w/Adam', 'net/w/RMSProp_3')
    )
    named = {'net/w': w, 'net/w/Mine': w, 'net/w/Mine_1': w, 'global_step': np.int64(4)}
    interchange.parameters_from(named, like, pairs, optimizer='Mine')
    with pytest.raises(interchange.InterchangeError, match="'net/w/Mine' is not in any pair"):
        interchange.parameters_from(named, like, pairs)


# Files.


@pytest.mark.parametrize('name', ['run.keras', 'run.weights.h5', 'run.h5', 'run.hdf5'])
def test_files_of_keras_are_for_keras_to_read(name: str, tmp_path: pathlib.Path):
    (tmp_path / name).write_bytes(b'')
    with pytest.raises(ValueError, match=r'keras\.saving\.load_model.*interchange\.keras'):
        interchange.read_checkpoint(tmp_path / name)
