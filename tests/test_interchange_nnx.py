"""Runs of PyTorch go on in a Flax NNX model and its optimizer, and go back."""

import dataclasses
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from interchange_data import ours, problem, record_layers

import rmsprop_jax
from rmsprop_jax import dialects, interchange, storage

EXACT = 1e-10


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Net(nnx.Module):
    """The network of `problem`, as its PyTorch run has it."""

    def __init__(self):
        wide: dict[str, Any] = {'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
        self.Conv_0 = nnx.Conv(1, problem.CHANNELS, (3, 3), padding='VALID', **wide)
        self.Dense_0 = nnx.Linear(problem.CHANNELS * problem.SIDE**2, 5, **wide)
        self.LayerNorm_0 = nnx.LayerNorm(5, epsilon=1e-5, **wide)
        self.Dense_1 = nnx.Linear(5, 1, **wide)

    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.Conv_0(x.transpose(0, 2, 3, 1))).reshape(len(x), -1)
        return self.Dense_1(jnp.tanh(self.LayerNorm_0(self.Dense_0(x))))


@nnx.jit
def _step(model: Any, optimizer: Any, step: Any) -> None:
    batch = step % problem.BATCHES
    inputs, targets = (jnp.asarray(x)[batch] for x in (problem.INPUTS, problem.TARGETS))
    loss = lambda model: jnp.mean((model(inputs) - targets) ** 2)  # noqa: E731
    optimizer.update(model, nnx.grad(loss)(model))


def _halfway(run: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """The recorded run halfway as a model and its optimizer, and the dictionary it came from."""
    groups = [g | {'lr': problem.DROP * g['lr']} for g in run['state']['param_groups']]
    checkpoint, names = run['state'] | {'param_groups': groups}, problem.NET_NAMES
    model = Net()
    params = nnx.state(model, nnx.Param)
    nnx.update(model, interchange.parameters_from(run['params'], params, ours.NET_PAIRS))
    params = nnx.state(model, nnx.Param)
    tx = interchange.torch_optimizer(checkpoint, params, ours.NET_PAIRS, names=names)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = interchange.from_torch(checkpoint, tx, params, ours.NET_PAIRS, names=names)
    interchange.nnx.set_state(optimizer, state)
    return model, optimizer, checkpoint


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
def test_a_run_of_pytorch_goes_on_in_an_nnx_optimizer_and_back():
    run = problem.read(problem.FOLDER / 'torch.npz', 'net')
    model, optimizer, checkpoint = _halfway(run)
    back = interchange.to_torch(
        optimizer.opt_state,
        nnx.state(model, nnx.Param),
        ours.NET_PAIRS,
        checkpoint['param_groups'],
        names=problem.NET_NAMES,
        tx=optimizer.tx,
    )
    for number, entry in checkpoint['state'].items():
        for slot, array in entry.items():
            np.testing.assert_allclose(back['state'][number][slot], array, rtol=1e-15)
    for step in range(problem.HANDOVER, problem.END):
        _step(model, optimizer, step)
    found = interchange.parameters_to(nnx.state(model, nnx.Param), ours.NET_PAIRS)
    assert ours.worst(found, run['end']) < EXACT


def _recorded(layer: str) -> dict[str, Any]:
    return problem.read(problem.FOLDER / 'layers.npz', layer)


def _assert_near(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
def test_batch_norm_goes_on_with_its_buffers():
    run, half = _recorded('batch_norm'), record_layers.HALF
    wide: dict[str, Any] = {'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
    model = nnx.Dict(bn=nnx.BatchNorm(record_layers.FEATURES, momentum=0.9, epsilon=1e-5, **wide))
    pairs = interchange.torch.norm('batch_norm', 'bn')
    buffers = interchange.torch.batch_stats('batch_norm', 'bn')
    arrays = nnx.Any(nnx.Param, nnx.BatchStat)
    # Flax starts statistics in float32, whatever param_dtype is.
    like = jax.tree.map(lambda x: x.astype(jnp.float64), nnx.state(model, arrays))
    nnx.update(model, interchange.parameters_from(run['weights'], like, (*pairs, *buffers)))

    def forward(model: Any, **mode: bool) -> Any:
        x = jnp.asarray(record_layers.inputs('batch_norm', half)).transpose(0, 2, 3, 1)
        return model.bn(x, **mode).transpose(0, 3, 1, 2)

    _assert_near(forward(model, use_running_average=True), run['output']['y'])
    params = nnx.state(model, nnx.Param)
    tx = interchange.torch_optimizer(run['state'], params, pairs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    interchange.nnx.set_state(optimizer, interchange.from_torch(run['state'], tx, params, pairs))

    def loss(model: Any) -> Any:
        y = forward(model, use_running_average=False)
        return jnp.mean((y - record_layers.target(y)) ** 2)

    optimizer.update(model, nnx.grad(loss)(model))
    found = interchange.parameters_to(nnx.state(model, arrays), (*pairs, *buffers))
    # PyTorch's share of the batch is unbiased, Flax's is not.
    n = record_layers.BATCH * 2 * 2
    old, new = found.pop('batch_norm.running_var'), run['end'].pop('batch_norm.running_var')
    kept = 0.9 * run['weights']['batch_norm.running_var']
    _assert_near((old - kept) * n / (n - 1), new - kept)
    del run['end']['batch_norm.num_batches_tracked']
    assert ours.worst(found, run['end']) < 1e-12


def _lstm(cell: Any) -> Any:
    def make(rngs: Any) -> Any:
        sizes, wide = (record_layers.FEATURES, record_layers.HIDDEN), {'param_dtype': jnp.float64}
        made = cell(*sizes, **wide, rngs=rngs)
        layers = ('dense_i',) if hasattr(made, 'dense_i') else ('ii', 'if_', 'ig', 'io')
        for name in layers:
            shape = getattr(made, name).kernel.shape
            setattr(made, name, nnx.Linear(*shape, **wide, rngs=rngs))
        return made

    return make


def _gru(rngs: Any) -> Any:
    hidden, wide = record_layers.HIDDEN, {'param_dtype': jnp.float64}
    made = nnx.GRUCell(record_layers.FEATURES, hidden, **wide, rngs=rngs)
    made.dense_h = nnx.Linear(hidden, 3 * hidden, **wide, rngs=rngs)
    return made


CELLS = {
    'nnx.LSTMCell': ('lstm', _lstm(nnx.LSTMCell)),
    'nnx.OptimizedLSTMCell': ('lstm', _lstm(nnx.OptimizedLSTMCell)),
    'nnx.GRUCell': ('gru', _gru),
}


def _cell_outputs(layer: str, cell: Any) -> dict[str, Any]:
    x = jnp.asarray(record_layers.inputs(layer, record_layers.HALF))
    h, c = record_layers.carry(0), record_layers.carry(1)
    if layer == 'gru':
        return {'h': cell(h, x)[1]}
    (c, h), _ = cell((c, h), x)
    return {'h': h, 'c': c}


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', CELLS)
def test_a_cell_goes_on_from_pytorch_and_goes_back(name: str):
    layer, make = CELLS[name]
    run, model = _recorded(layer), nnx.Dict(cell=make(nnx.Rngs(0)))
    pairs = interchange.torch.recurrent(layer, 'cell', name)
    like = nnx.state(model, nnx.Param)
    nnx.update(model, interchange.parameters_from(run['weights'], like, pairs))
    found = _cell_outputs(layer, model.cell)
    assert ours.worst(found, run['output']) < 1e-12
    params = nnx.state(model, nnx.Param)
    tx = interchange.torch_optimizer(run['state'], params, pairs)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    interchange.nnx.set_state(optimizer, interchange.from_torch(run['state'], tx, params, pairs))
    groups = run['state']['param_groups']
    back = interchange.to_torch(optimizer.opt_state, params, pairs, groups, tx=tx)
    for number, entry in run['state']['state'].items():
        for slot, array in entry.items():
            np.testing.assert_array_equal(back['state'][number][slot], array)

    def loss(model: Any) -> Any:
        outputs = _cell_outputs(layer, model.cell).values()
        return sum(jnp.mean((y - record_layers.target(y)) ** 2) for y in outputs)

    optimizer.update(model, nnx.grad(loss)(model))
    found = interchange.parameters_to(nnx.state(model, nnx.Param), pairs)
    assert ours.worst(found, run['end']) < 1e-12


def _page(start: str) -> dict[str, Any]:
    """What a block of the porting page defines."""
    text = (problem.FOLDER.parents[1] / 'docs' / 'porting.md').read_text()
    (block,) = [x for x in re.findall(r'```python\n(.*?)```', text, re.DOTALL) if start in x]
    scope = {'jax': jax, 'jnp': jnp, 'np': np, 'interchange': interchange}
    exec(block, scope)
    return scope


LINEN = {
    'LSTMCell': ('lstm', linen.LSTMCell),
    'OptimizedLSTMCell': ('lstm', linen.OptimizedLSTMCell),
    'GRUCell': ('gru', linen.GRUCell),
}


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', LINEN)
def test_a_linen_cell_goes_on_from_pytorch_and_goes_back(name: str):
    """With both biases in the tree, and their sum in the cell, as the page does it."""
    (layer, make), own_biases = LINEN[name], _page('def own_biases')['own_biases']
    run, cell = _recorded(layer), make(record_layers.HIDDEN, param_dtype=jnp.float64)
    x = jnp.asarray(record_layers.inputs(layer, record_layers.HALF))
    h, c = record_layers.carry(0), record_layers.carry(1)
    carry = h if layer == 'gru' else (c, h)
    own = cell.init(jax.random.key(0), carry, x)['params']
    zeros = jnp.zeros(record_layers.HIDDEN)
    like = {'cell': {gate: {'bias': zeros, **arrays} for gate, arrays in own.items()}}

    def outputs(params: Any) -> dict[str, Any]:
        found, _ = cell.apply({'params': own_biases(params['cell'])}, carry, x)
        return {'h': found} if layer == 'gru' else {'h': found[1], 'c': found[0]}

    pairs = interchange.torch.recurrent(layer, 'cell', f'linen.{name.removeprefix("Optimized")}')
    params = interchange.parameters_from(run['weights'], like, pairs)
    assert jax.tree.structure(own_biases(params['cell'])) == jax.tree.structure(own)
    assert ours.worst(outputs(params), run['output']) < 1e-12
    tx = interchange.torch_optimizer(run['state'], params, pairs)
    state = interchange.from_torch(run['state'], tx, params, pairs)
    groups = run['state']['param_groups']
    back = interchange.to_torch(state, params, pairs, groups, tx=tx)
    for number, entry in run['state']['state'].items():
        for slot, array in entry.items():
            np.testing.assert_array_equal(back['state'][number][slot], array)

    def loss(params: Any) -> Any:
        found = outputs(params).values()
        return sum(jnp.mean((y - record_layers.target(y)) ** 2) for y in found)

    updates, _ = tx.update(jax.grad(loss)(params), state, params)
    found = interchange.parameters_to(optax.apply_updates(params, updates), pairs)
    assert ours.worst(found, run['end']) < 1e-12


@pytest.mark.extended
@pytest.mark.usefixtures('x64')
def test_the_output_of_an_lstm_needs_one_bias():
    run, made = _recorded('lstm'), linen.LSTMCell(record_layers.HIDDEN, param_dtype=jnp.float64)
    x = jnp.asarray(record_layers.inputs('lstm', record_layers.HALF))
    carry = (record_layers.carry(1), record_layers.carry(0))
    like = made.init(jax.random.key(0), carry, x)['params']
    weights = run['weights']
    weights['lstm.bias_hh'] = weights['lstm.bias_hh'] + weights.pop('lstm.bias_ih')
    pairs = interchange.torch.recurrent('lstm', 'cell', 'linen.LSTMCell', biases=['hh'])
    params = interchange.parameters_from(weights, {'cell': like}, pairs)['cell']
    (c, h), _ = made.apply({'params': params}, carry, x)
    assert ours.worst({'h': h, 'c': c}, run['output']) < 1e-12


def test_parts_are_split_and_joined_in_order():
    cell: dict[str, Any] = {f'i{gate}': {'kernel': jnp.zeros((2, 3))} for gate in 'ifgo'}
    of_hidden = {'kernel': jnp.zeros((3, 3)), 'bias': jnp.zeros(3)}
    gates = {'cell': cell | {f'h{gate}': dict(of_hidden) for gate in 'ifgo'}}
    pairs = interchange.torch.recurrent('rnn', 'cell', 'linen.LSTMCell', biases=['hh'])
    shapes = {'rnn.weight_ih': (12, 2), 'rnn.weight_hh': (12, 3), 'rnn.bias_hh': (12,)}
    theirs = {name: problem.wave(shape, 0.7).astype('f') for name, shape in shapes.items()}
    params = interchange.parameters_from(theirs, gates, pairs)
    np.testing.assert_array_equal(params['cell']['ig']['kernel'], theirs['rnn.weight_ih'][6:9].T)
    np.testing.assert_array_equal(params['cell']['ho']['bias'], theirs['rnn.bias_hh'][9:])
    back = interchange.parameters_to(params, pairs)
    assert list(back) == list(theirs)
    for name, array in theirs.items():
        np.testing.assert_array_equal(back[name], array)
    narrow = theirs | {'rnn.bias_hh': np.zeros(10, 'f')}
    with pytest.raises(interchange.InterchangeError, match=r'\(10,\) has not 4 equal parts'):
        interchange.parameters_from(narrow, gates, pairs)

    tx = dialects.torch(0.1)
    state = tx.init(params)
    groups = [{'params': [0, 1, 2], 'param_names': list(theirs)}]
    written = interchange.to_torch(state, params, pairs, groups)['state']
    assert [entry['square_avg'].shape for entry in written.values()] == list(shapes.values())

    # A gate that is left out, of the pairs and of the state.
    for function in (
        interchange.parameters_to,
        lambda p, pairs: interchange.from_torch(
            {'state': written, 'param_groups': groups}, tx, p, pairs
        ),
    ):
        with pytest.raises(interchange.InterchangeError) as error:
            function(params, [pair for pair in pairs if pair.ours != 'cell/if/kernel'])
        assert "part 1 of 4 of 'rnn.weight_ih' is not in any pair" in error.value.problems
    del state[0].nu['cell']['hg']
    with pytest.raises(interchange.InterchangeError) as error:
        interchange.to_torch(state, params, pairs, groups)
    for name, path in (('weight', 'kernel'), ('bias', 'bias')):
        line = f"'rnn.{name}_hh' is one array there, and there is nothing for 'cell/hg/{path}'"
        assert line in error.value.problems
    twice = [*pairs, dataclasses.replace(pairs[0], ours='cell/ig/kernel')]
    with pytest.raises(
        interchange.InterchangeError, match="'rnn.weight_ih' is the `theirs` of more"
    ):
        interchange.parameters_to(params, twice)


def _together(clip: Any) -> Any:
    """Clips the parts of each of PyTorch's arrays as one."""
    labels = {
        'cell': {
            f'{half}{gate}': {key: f'{half}{key}' for key in ('kernel', 'bias')}
            for half in 'ih'
            for gate in 'ifgo'
        }
    }
    clips = {f'{half}{key}': clip for half in 'ih' for key in ('kernel', 'bias')}
    return optax.partition(clips, labels)


WEIGHTS, BIASES = ('weight_hh', 'weight_ih'), ('bias_hh', 'bias_ih')
BEFORE: dict[str, tuple[Any, tuple[str, ...]]] = {
    'nothing': (optax.identity(), ()),
    'each entry': (optax.clip(1e-2), ()),
    'all arrays': (optax.clip_by_global_norm(1e-2), ()),
    'parts together': (_together(optax.clip_by_global_norm(1e-2)), ()),
    'each part, in partition': (_together(optax.clip_by_block_rms(1e-2)), (*BIASES, *WEIGHTS)),
    'each array': (optax.clip_by_block_rms(1e-2), (*BIASES, *WEIGHTS)),
    'a large threshold': (optax.clip_by_block_rms(1e3), (*BIASES, *WEIGHTS)),
    # A unit is a row of PyTorch's weight and a column of our kernel, but the whole of a bias.
    'each unit': (optax.adaptive_grad_clip(1e-2), BIASES),
}


@pytest.mark.extended
@pytest.mark.parametrize(('name', 'calls'), [*((name, 1) for name in BEFORE), ('each array', 2)])
def test_parts_that_are_clipped_apart_are_warned_of(name, calls):
    before, expected = BEFORE[name]
    layer = {'kernel': jnp.zeros((2, 2)), 'bias': jnp.zeros(2)}
    params = {'cell': {f'{half}{gate}': layer for half in 'ih' for gate in 'ifgo'}}
    pairs = interchange.torch.recurrent('rnn', 'cell', 'linen.LSTMCell')
    names = list(dict.fromkeys(pair.theirs for pair in pairs))
    groups = [{'params': [0, 1, 2, 3], 'param_names': names, 'momentum': 0.9}]
    tx = optax.chain(before, dialects.torch(0.1, momentum=0.9, weight_decay=0.01))
    tx = tx if calls == 1 else optax.MultiSteps(tx, calls).gradient_transformation()
    state = tx.init(params)

    def back_and_forth() -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            theirs = interchange.to_torch(state, params, pairs, groups, tx=tx)
            interchange.from_torch(theirs, tx, params, pairs)
        assert all(w.filename == __file__ for w in caught)
        return [str(w.message) for w in caught]

    found = back_and_forth()
    assert len(found) == (2 if expected else 0)
    for message in found:
        for name in (*WEIGHTS, *BIASES):
            assert (f"'rnn.{name}'" in message) == (name in expected)


def test_an_update_that_is_scaled_by_its_norm_is_warned_of():
    params = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}
    pairs = [
        interchange.Pair('w', k, interchange.Layout(part=(i, 2, 0))) for i, k in enumerate('ab')
    ]
    tx = optax.chain(dialects.torch(1.0), optax.scale_by_trust_ratio(), optax.scale(0.1))
    entry = {'step': 3.0, 'square_avg': np.ones(4, 'f')}
    theirs = {'state': {0: entry}, 'param_groups': [{'params': [0], 'param_names': ['w']}]}
    with pytest.warns(UserWarning, match="'a' and 'b' .* one array in PyTorch, 'w'"):
        interchange.from_torch(theirs, tx, params, pairs)


def test_only_the_count_of_a_paired_buffer_is_passed_over():
    buffers = {f'{x}.num_batches_tracked': np.int64(3) for x in ('bn', 'other')}
    buffers |= {'bn.running_mean': np.ones(2, 'f'), 'bn.running_var': np.ones(2, 'f')}
    like = {'bn': {'mean': jnp.zeros(2), 'var': jnp.zeros(2)}}
    with pytest.raises(interchange.InterchangeError) as error:
        interchange.parameters_from(buffers, like, interchange.torch.batch_stats('bn', 'bn'))
    assert error.value.problems == ("'other.num_batches_tracked' is not in any pair",)


GROUP = {'lr': 0.1, 'alpha': 0.9, 'eps': 1e-8, 'weight_decay': 0.1, 'momentum': 0.9}
GROUP |= {'centered': True, 'maximize': False, 'params': [0, 1]}


def _with_frozen_bias() -> Any:
    return interchange.torch_optimizer(
        {'param_groups': [GROUP]},
        {'fc': {'kernel': 0, 'bias': 0}},
        interchange.torch.linear('fc', 'fc'),
        names=['fc.weight', 'fc.bias'],
        frozen=['fc.bias'],
    )


MADE = {
    'momentum': lambda: dialects.keras(0.1, momentum=0.9),
    'bias correction': lambda: rmsprop_jax.rmsprop(0.1, centered=True, bias_correction=True),
    'bytes': lambda: rmsprop_jax.rmsprop(0.1, storage=storage.uint8()),
    'factored': lambda: rmsprop_jax.rmsprop(0.1, storage=storage.factored()),
    'MultiSteps': lambda: optax.MultiSteps(rmsprop_jax.rmsprop(0.1), 2).gradient_transformation(),
    'injected': lambda: rmsprop_jax.inject_hyperparams(dialects.torch)(0.1, momentum=0.9),
    'frozen': _with_frozen_bias,
}


def _fresh(tx: Any) -> tuple[Any, Any]:
    model = nnx.Dict(fc=nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def _gradients(params: Any) -> Any:
    return jax.tree.map(jnp.cos, params)


def _stepped(tx: Any) -> tuple[Any, Any, Any]:
    """A model, its optimizer after two updates, and the same state without Flax."""
    model, optimizer = _fresh(tx)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(_gradients(params), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, _gradients(nnx.state(model, nnx.Param)))
    return model, optimizer, state


def _assert_equal(found: Any, wanted: Any) -> None:
    found, wanted = (jax.tree.leaves(nnx.as_pure(x)) for x in (found, wanted))
    # Flax turns the two means of a factored statistic around.
    order = lambda leaves: sorted(map(np.asarray, leaves), key=lambda x: (x.shape, x.tobytes()))  # noqa: E731
    for a, b in zip(order(found), order(wanted), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.extended
@pytest.mark.parametrize('make', MADE.values(), ids=MADE)
def test_a_state_put_into_an_optimizer_is_what_it_goes_on_from(make: Any):
    tx = make()
    model, optimizer, plain = _stepped(tx)
    params = jax.tree.map(lambda x: x, nnx.state(model, nnx.Param))
    gradients = _gradients(params)
    before = jax.tree.map(lambda x: x, optimizer.opt_state)
    optimizer.update(model, gradients)
    for state in (plain, before):
        other, restored = _fresh(tx)
        nnx.update(other, params)
        interchange.nnx.set_state(restored, state)
        _assert_equal(restored.opt_state, before)
        restored.update(other, gradients)
        _assert_equal(restored.opt_state, optimizer.opt_state)
        _assert_equal(nnx.state(other), nnx.state(model))


def test_a_state_is_put_into_an_optimizer_under_jit():
    tx = rmsprop_jax.rmsprop(0.1, momentum=0.9)
    _, _, state = _stepped(tx)
    _, restored = _fresh(tx)
    nnx.jit(interchange.nnx.set_state)(restored, state)
    _assert_equal(restored.opt_state, state)


FORMATS = {'float32': None, 'bytes': storage.uint8(), 'factored': storage.factored()}


@pytest.mark.extended
@pytest.mark.parametrize('kept', FORMATS.values(), ids=FORMATS)
def test_formats_are_read_and_converted_as_in_a_plain_state(kept: Any):
    tx = rmsprop_jax.rmsprop(0.1, centered=kept is None, storage=kept)
    model, optimizer, state = _stepped(tx)
    params = nnx.state(model, nnx.Param)
    _assert_equal(storage.read(optimizer.opt_state, kept), storage.read(state, kept))
    into = storage.bfloat16()
    converted = storage.convert(optimizer.opt_state, params, kept, into)
    _assert_equal(converted, storage.convert(state, nnx.as_pure(params), kept, into))
    _, other = _fresh(rmsprop_jax.rmsprop(0.1, centered=kept is None, storage=into))
    interchange.nnx.set_state(other, converted)
    _assert_equal(other.opt_state, converted)


def test_a_state_that_does_not_fit_changes_nothing():
    tx = rmsprop_jax.rmsprop(0.1)
    _, optimizer, state = _stepped(tx)
    before = jax.tree.map(lambda x: x, optimizer.opt_state)
    nu = {'fc': {'kernel': jnp.zeros((64, 3)), 'other': jnp.zeros(64)}}
    count = np.zeros([], np.int64)
    with pytest.raises(interchange.InterchangeError) as error:
        interchange.nnx.set_state(optimizer, (state[0]._replace(nu=nu, count=count), *state[1:]))
    assert error.value.problems == (
        "'0/count' is int64[] where the optimizer has int32[]",
        "'0/nu/fc/bias' is missing",
        "'0/nu/fc/kernel' is float32[64, 3] where the optimizer has float32[64, 64]",
        "'0/nu/fc/other' is not in the optimizer",
    )
    _assert_equal(optimizer.opt_state, before)


def test_without_flax_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'flax', None)
    with pytest.raises(ImportError, match=re.escape("pip install '.[flax]'")):
        interchange.nnx.set_state(3, 3)


def test_labels_refuse_what_torch_optimizer_did_not_see():
    with pytest.raises(ValueError, match="'fc/scale' is not in the params that torch_optimizer"):
        _with_frozen_bias().init({'fc': {'scale': jnp.zeros(2)}})


def test_every_group_has_its_schedule_in_an_nnx_optimizer():
    """The closed form: with a second moment and a gradient of one, a step is the rate."""
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    params, pairs = nnx.state(model, nnx.Param), interchange.torch.linear('fc', 'fc')
    plain = GROUP | {'centered': False, 'momentum': 0, 'weight_decay': 0, 'initial_lr': 1.0}
    groups = [
        plain | {'lr': rate, 'params': [i], 'param_names': [name]}
        for i, (name, rate) in enumerate({'fc.weight': 0.5, 'fc.bias': 0.25}.items())
    ]
    shapes = ((3, 2), (3,))
    entries = {
        i: {'step': np.float32(3), 'square_avg': np.ones(shape, 'f')}
        for i, shape in enumerate(shapes)
    }
    checkpoint = {'state': entries, 'param_groups': groups}

    def halving(start: float) -> Any:
        return lambda count: start * 0.5 ** (count - 3.0)

    schedules = [halving(0.5), halving(0.25)]
    tx = interchange.torch_optimizer(checkpoint, params, pairs, learning_rate=schedules)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    interchange.nnx.set_state(optimizer, interchange.from_torch(checkpoint, tx, params, pairs))
    for factor in (1.0, 0.5):
        updates = optimizer.update(model, jax.tree.map(jnp.ones_like, params))
        np.testing.assert_allclose(updates['fc']['kernel'], -0.5 * factor, rtol=1e-6)
        np.testing.assert_allclose(updates['fc']['bias'], -0.25 * factor, rtol=1e-6)

    for rates, lines in (
        (None, ['group 0: initial_lr shows that a scheduler', 'group 1: initial_lr shows']),
        (schedules[:1], ['learning_rate has 1 entries for 2 groups']),
        (schedules[0], ['learning_rate is a single rate, but the groups']),
    ):
        with pytest.raises(interchange.InterchangeError) as error:
            interchange.torch_optimizer(checkpoint, params, pairs, learning_rate=rates)
        problems = error.value.problems
        assert len(problems) == len(lines)
        assert all(map(str.startswith, problems, lines))
    groups[0]['lr'] = schedules[0]
    with pytest.raises(interchange.InterchangeError, match='group 1: initial_lr shows'):
        interchange.torch_optimizer(checkpoint, params, pairs)


def test_a_frozen_layer_stands_still_in_an_nnx_optimizer():
    """Weight decay would move it, and `fresh` writes it back without state, as PyTorch has it."""
    model = nnx.Dict(fc=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    params, pairs = nnx.state(model, nnx.Param), interchange.torch.linear('fc', 'fc')
    names, slots = ['fc.weight', 'fc.bias'], ('grad_avg', 'momentum_buffer')
    entry = {'step': np.float32(3), 'square_avg': np.ones((3, 2), 'f')}
    entry |= {slot: np.zeros((3, 2), 'f') for slot in slots}
    checkpoint = {'state': {0: entry}, 'param_groups': [GROUP]}  # No gradient for the bias so far.
    tx = interchange.torch_optimizer(checkpoint, params, pairs, names=names)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    state = interchange.from_torch(checkpoint, tx, params, pairs, names=names)
    interchange.nnx.set_state(optimizer, state)
    optimizer.update(model, jax.tree.map(jnp.ones_like, params))
    layer = nnx.as_pure(nnx.state(model, nnx.Param))['fc']
    assert (layer['bias'] == 1).all()
    assert (layer['kernel'] != 1).all()
    back = interchange.to_torch(
        optimizer.opt_state,
        nnx.state(model, nnx.Param),
        pairs,
        [GROUP],
        names=names,
        fresh=['fc.bias'],
        tx=tx,
    )
    # A gradient of one and a weight decay of 0.1.
    np.testing.assert_allclose(back['state'][0]['square_avg'], 0.9 + 0.1 * 1.1**2, rtol=1e-6)
    assert back['state'].keys() == {0}
