"""From the files of PyTorch to the next step here, and what is wrong with a file."""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import tracemalloc
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interchange_data import problem
from interchange_data import record_files as recorded

from rmsprop_jax import interchange
from rmsprop_jax.interchange import __main__ as command
from rmsprop_jax.interchange import _files, _port

FILES = problem.FOLDER / 'files'
EXACT = 1e-12
FLAT = interchange.flattened(recorded.CHANNELS, recorded.LENGTH)
KNOWN = interchange.torch.linear('hidden', 'hidden', layout=FLAT)[:1]
needs_torch = pytest.mark.skipif(
    importlib.util.find_spec('torch') is None, reason='PyTorch is not here; make notebooks has it'
)


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Net(nnx.Module):
    """That of `record_files.model`."""

    def __init__(self) -> None:
        wide: dict[str, Any] = {'param_dtype': jnp.float64, 'rngs': nnx.Rngs(0)}
        self.embed = nnx.Embed(recorded.WORDS, 6, **wide)
        self.conv = nnx.Conv(6, recorded.CHANNELS, (3,), **wide)
        self.norm = nnx.BatchNorm(recorded.CHANNELS, momentum=0.9, **wide)
        # Flax makes them in float32.
        for stat in (self.norm.mean, self.norm.var):
            stat.set_value(stat[...].astype(jnp.float64))
        self.hidden = nnx.Linear(recorded.CHANNELS * recorded.LENGTH, 7, **wide)
        self.layers = nnx.List([nnx.Linear(7, 7, **wide), nnx.Linear(7, 3, **wide)])

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.conv(self.embed(x))))
        x = jnp.tanh(self.hidden(x.reshape(len(x), -1)))
        return self.layers[1](jnp.tanh(self.layers[0](x)))


def states(model: nnx.Module) -> tuple[Any, Any]:
    return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


def run() -> dict[str, Any]:
    return problem.read(FILES / 'run.npz', 'run')


@pytest.fixture
def readable(monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The recorded file, read from its copy in NumPy's format where PyTorch is not."""
    if importlib.util.find_spec('torch') is None:
        parts = run()
        content = {'model': parts['model'], 'optimizer': parts['state'], 'epoch': 3}
        monkeypatch.setattr(_files, '_read_torch', lambda path: content)
    return FILES / 'run.pt'


def trained(model: Net, optimizer: nnx.Optimizer) -> Any:
    """Takes the recorded steps and returns the parameters by their names."""

    @nnx.jit
    def advance(model: Net, optimizer: nnx.Optimizer, x: Any, y: Any) -> None:
        grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)

    for step in range(recorded.HANDOVER, recorded.HANDOVER + recorded.AFTER):
        advance(model, optimizer, recorded.tokens(step), recorded.targets(step))
    return {
        **interchange.parameters_to(*proposed(model)),
        'norm.running_mean': model.norm.mean[...],
    }


def proposed(model: Net) -> Any:
    params, _ = states(model)
    return params, interchange.propose_pairs(run()['model'], params, known=KNOWN).pairs


def assert_continues(model: Net, optimizer: nnx.Optimizer) -> None:
    got, expected = trained(model, optimizer), run()['after']
    # Flax averages the biased variance, PyTorch the unbiased one.
    assert expected.keys() - got.keys() == {'norm.running_var', 'norm.num_batches_tracked'}
    for name, array in got.items():
        np.testing.assert_allclose(array, expected[name], rtol=EXACT, atol=EXACT, err_msg=name)


def resumed(model: Net, port: interchange.Port) -> nnx.Optimizer:
    nnx.update(model, port.params, port.buffers)
    return nnx.Optimizer(model, port.resumed, wrt=nnx.Param)


def test_the_lines_of_the_page(readable, monkeypatch, capsys):
    """They run as they are, in at most fifteen lines, and the next steps are PyTorch's."""
    page = (problem.FOLDER.parents[1] / 'docs' / 'porting.md').read_text()
    (lines,) = [x for x in page.split('```')[1::2] if 'from_checkpoint(' in x]
    assert len([line for line in lines.splitlines() if line]) <= 15
    monkeypatch.chdir(readable.parent)
    scope: dict[str, Any] = {'Net': Net}
    exec(lines, scope)
    assert 'guessed   hidden.weight' in capsys.readouterr().out
    assert_continues(scope['model'], scope['optimizer'])


@needs_torch
@pytest.mark.extended
def test_the_lines_of_the_page_for_torchax():
    """PyTorch's model goes on in JAX, from the recorded file, and the next steps are PyTorch's."""
    pytest.importorskip('torchax', reason='torchax is not here; make notebooks has it')
    torch = importlib.import_module('torch')
    page = (problem.FOLDER.parents[1] / 'docs' / 'porting.md').read_text()
    (lines,) = [x for x in page.split('```')[1::2] if 'import torchax' in x]
    file = torch.load(FILES / 'run.pt', weights_only=True)
    model = recorded.model(torch)
    optimizer = torch.optim.RMSprop(model.parameters())
    model.load_state_dict(file['model'])
    optimizer.load_state_dict(file['optimizer'])
    scope: dict[str, Any] = {'model': model, 'optimizer': optimizer}
    scope |= {'interchange': interchange, 'jax': jax, 'optax': optax}
    exec(lines, scope)
    params, state = scope['params'], scope['state']
    for step in range(recorded.HANDOVER, recorded.HANDOVER + recorded.AFTER):
        x, y = jnp.asarray(recorded.tokens(step)), jnp.asarray(recorded.targets(step))
        params, state = scope['train_step'](params, state, x, y)
    for name, array in params.items():
        np.testing.assert_allclose(array, run()['after'][name], rtol=EXACT, atol=EXACT)


@pytest.mark.extended
def test_a_wrong_layout_is_noticed_by_the_steps(readable):
    model = Net()
    port = interchange.from_checkpoint(readable, *states(model), accept_guesses=True)
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
        assert_continues(model, resumed(model, port))


def test_the_command_writes_what_the_next_steps_need(readable, tmp_path, capsys):
    model, like, out = Net(), tmp_path / 'like.json', tmp_path / 'ported'
    interchange.save_template(like, *states(model))
    argv = [str(readable), '--like', str(like), '--out', str(out)]
    assert command.main(argv) == 1
    printed = capsys.readouterr().out
    assert 'guessed   hidden.weight -> hidden/kernel (axes swapped)\n' in printed
    assert 'its 40 inputs may be a flattened image of 5 channels' in printed
    assert 'guessed   layers.0.weight -> layers/0/kernel' in printed
    assert 'guessed   names of the optimizer: the groups have no names' in printed
    assert 'sure      embed.weight -> embed/embedding\n' in printed
    assert 'unused    norm.num_batches_tracked: Flax does not keep it' in printed
    assert not out.exists()
    known = f'hidden.weight=hidden/kernel=flattened:{recorded.CHANNELS},{recorded.LENGTH}'
    assert command.main([*argv, '--pair', known, '--accept-guesses']) == 0
    assert 'sure      hidden.weight -> hidden/kernel (axes swapped, flattened (5, 8))' in (
        capsys.readouterr().out
    )
    port = interchange.restore_port(out, *states(model), learning_rate=lambda _: 2.0**-8)
    assert_continues(model, resumed(model, port))
    with pytest.raises(SystemExit) as stopped:
        command.main([*argv, '--pair', known, '--accept-guesses'])
    assert stopped.value.code == 2
    assert 'exists already' in capsys.readouterr().err


# Files.


@needs_torch
def test_a_pytorch_file_holds_what_was_recorded():
    found, parts = interchange.read_checkpoint(FILES / 'run.pt'), run()
    assert found.places == ('model', 'optimizer')
    assert list(found.arrays) == list(parts['model'])
    assert found.optimizer is not None
    jax.tree.map(np.testing.assert_array_equal, dict(found.arrays), parts['model'])
    jax.tree.map(np.testing.assert_array_equal, found.optimizer['state'], parts['state']['state'])
    assert found.optimizer['param_groups'] == parts['state']['param_groups']


@needs_torch
@pytest.mark.parametrize('kind', ['bfloat16', 'float8_e5m2', 'complex64', 'bool'])
def test_dtypes_of_pytorch(kind, tmp_path):
    torch = importlib.import_module('torch')
    tensor = torch.tensor([[0.0, 1.0, 1.0]]).to(getattr(torch, kind)).T
    torch.save({'w': tensor}, tmp_path / 'w.pt')
    array = interchange.read_checkpoint(tmp_path / 'w.pt').arrays['w']
    np.testing.assert_array_equal(array, np.array([[0], [1], [1]], array.dtype))


@needs_torch
@pytest.mark.parametrize('length', [0, 3, 900, 9000, 25000])
def test_a_pytorch_file_that_is_cut_off(length, tmp_path):
    path = tmp_path / 'run.pt'
    path.write_bytes((FILES / 'run.pt').read_bytes()[:length])
    with pytest.raises(interchange.InterchangeError, match='cannot read it as a PyTorch file'):
        interchange.read_checkpoint(path)


@needs_torch
@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_a_tensor_that_repeats_its_numbers_takes_no_memory(kind, tmp_path):
    torch = importlib.import_module('torch')
    one = torch.ones(1, dtype=getattr(torch, kind))
    torch.save({'w': one.expand(10**11)}, tmp_path / 'w.pt')
    with pytest.raises(interchange.InterchangeError, match='w cannot be an array: it would take'):
        interchange.read_checkpoint(tmp_path / 'w.pt')
    torch.save({'w': one.expand(3)}, tmp_path / 'w.pt')
    assert interchange.read_checkpoint(tmp_path / 'w.pt').arrays['w'].tolist() == [1, 1, 1]


@needs_torch
def test_containers_in_themselves_and_in_others(tmp_path):
    torch = importlib.import_module('torch')
    cycle: list[Any] = []
    cycle.append(cycle)
    torch.save({'model': {'w': torch.ones(1)}, 'more': cycle}, tmp_path / 'w.pt')
    with pytest.raises(interchange.InterchangeError, match='nested too deeply'):
        interchange.read_checkpoint(tmp_path / 'w.pt')
    # A list that is twice in a list that is twice in a list, and so on: 2^40 in all.
    twice: list[Any] = []
    for _ in range(40):
        twice = [twice, twice]
    torch.save({'model': {'w': torch.ones(1)}, 'more': twice}, tmp_path / 'w.pt')
    assert interchange.read_checkpoint(tmp_path / 'w.pt').places == ('model', None)


@needs_torch
def test_code_in_a_file_is_not_run(capsys, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(interchange.InterchangeError, match='more than tensors.*global.*print'):
        interchange.read_checkpoint(FILES / 'code.pt')
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    ('torch', 'message'),
    [
        (None, r'pip install torch.*\[torch\]'),
        (types.SimpleNamespace(__version__='2.5.1+cpu'), 'PyTorch 2.6 or newer, found 2.5.1'),
    ],
)
def test_pytorch_is_asked_for(torch, message, monkeypatch, capsys):
    monkeypatch.setitem(importlib.sys.modules, 'torch', torch)
    with pytest.raises(ImportError, match=message):
        interchange.read_checkpoint(FILES / 'run.pt')
    with pytest.raises(SystemExit):
        command.main([str(FILES / 'run.pt')])
    assert re.search(message, capsys.readouterr().err)


def test_pytorch_is_only_asked_for_tensors(monkeypatch):
    asked = {}

    def load(path: Any, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError('enough')

    torch = types.SimpleNamespace(__version__='2.13.0', load=load)
    monkeypatch.setitem(importlib.sys.modules, 'torch', torch)
    with pytest.raises(interchange.InterchangeError, match='RuntimeError: enough'):
        interchange.read_checkpoint(FILES / 'run.pt')
    assert asked == {'map_location': 'cpu', 'weights_only': True}


ADAM = {'state': {0: {'step': 1}}, 'param_groups': [{'params': [0]}]}
W = {'w': np.ones(2)}


@pytest.mark.parametrize(
    ('content', 'options', 'expected'),
    [
        (W, {}, ('', None)),
        ({'state_dict': W, 'optimizer_states': [ADAM]}, {}, ('state_dict', 'optimizer_states/0')),
        ({'a': W, 'b': W}, {'model': 'b'}, ('b', None)),
        ({'a': W, 'b': W}, {}, "several state dictionaries: pass model=, one of 'a', 'b'"),
        ({'a': W}, {'model': 'c'}, "model 'c' is not in it; there is 'a'"),
        ({'a': W, 'g': ADAM, 'd': ADAM}, {'optimizer': 'd'}, ('a', 'd')),
        ({'a': W, 'g': ADAM, 'd': ADAM}, {}, "pass optimizer=, one of 'g', 'd'"),
        ({'epoch': 3}, {}, 'no state dictionary of a model'),
        ([1, 2], {}, 'no state dictionary of a model'),
    ],
)
def test_where_state_dictionaries_are_in_a_file(content, options, expected, monkeypatch):
    monkeypatch.setattr(_files, '_read_torch', lambda path: content)
    if isinstance(expected, tuple):
        assert interchange.read_checkpoint(FILES / 'run.pt', **options).places == expected
    else:
        with pytest.raises(interchange.InterchangeError, match=expected):
            interchange.read_checkpoint(FILES / 'run.pt', **options)


def test_a_safetensors_file_holds_what_was_recorded():
    found = interchange.read_checkpoint(FILES / 'run.safetensors')
    jax.tree.map(np.testing.assert_array_equal, dict(found.arrays), run()['model'])
    assert found.optimizer is None


def test_dtypes_of_safetensors():
    found = interchange.read_checkpoint(FILES / 'dtypes.safetensors').arrays
    assert len(found) == 16
    for kind, array in found.items():
        assert array.dtype == kind
        np.testing.assert_array_equal(array, np.array([[0, 1, 1]], array.dtype))


ENTRY = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}


def safetensors(header: Any, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, 'little') + text + data


BROKEN: dict[str, tuple[bytes, str]] = {
    'empty': (b'', 'it has 0 bytes'),
    'huge header': (safetensors({'w': ENTRY}, length=2**63), 'said to have 9223372036854775808'),
    'cut header': (safetensors({'w': ENTRY}, b'', 100), 'said to have 100 bytes.*cut off'),
    'no JSON': (safetensors(b'{"w": '), 'its header is not one of safetensors'),
    'no text': (safetensors(b'\xff\xfe{}'), 'its header is not one of safetensors'),
    'deep': (safetensors(b'[' * 200_000), 'its header is not one of safetensors'),
    'list': (safetensors([1]), 'not a JSON object'),
    'twice': (
        safetensors(b'{"w": %s, "w": %s}' % ((json.dumps(ENTRY).encode(),) * 2)),
        "it has 'w' 2 times",
    ),
    'cut data': (safetensors({'w': ENTRY}, bytes(7)), "'w' ends at byte 8 of 7: .* cut off"),
    'more data': (safetensors({'w': ENTRY}, bytes(9)), '1 bytes at its end belong to no array'),
    'overlap': (
        safetensors({'v': ENTRY, 'w': ENTRY | {'data_offsets': [4, 12]}}, bytes(12)),
        "'w' begins at byte 4, but the data before it ends at byte 8",
    ),
    'hole': (
        safetensors({'v': ENTRY, 'w': ENTRY | {'data_offsets': [12, 20]}}, bytes(20)),
        "'w' begins at byte 12, but the data before it ends at byte 8",
    ),
    'backwards': (safetensors({'w': ENTRY | {'data_offsets': [8, 0]}}), 'has -8 bytes'),
    'negative': (safetensors({'w': ENTRY | {'data_offsets': [-8, 0]}}), 'data_offsets .* lengths'),
    'three': (safetensors({'w': ENTRY | {'data_offsets': [0, 4, 8]}}), 'two numbers, got 3'),
    'overflow': (
        safetensors({'w': ENTRY | {'shape': [2**62, 4, 2**62]}}),
        'has 8 bytes, but its shape',
    ),
    'shape': (safetensors({'w': ENTRY | {'shape': [2.0]}}), 'shape of .w. is not a list of length'),
    'flag': (safetensors({'w': ENTRY | {'shape': [True, 2]}}), 'shape .* is not a list of length'),
    'axes': (safetensors({'w': ENTRY | {'shape': [2] + [1] * 99}}), 'has 100 axes'),
    'dtype': (safetensors({'w': ENTRY | {'dtype': 'F4'}}), "has an unsupported dtype, 'F4'"),
    'no dtype': (safetensors({'w': {'shape': [2]}}), 'must have dtype, shape and data_offsets'),
    'more': (safetensors({'w': ENTRY | {'more': 1}}), 'and nothing else'),
    'boolean': (
        safetensors(
            {'w': ENTRY | {'dtype': 'BOOL', 'shape': [8]}}, bytes([0, 1, 2, 1, 0, 1, 1, 0])
        ),
        'bytes other than 0 and 1',
    ),
}


@pytest.mark.parametrize(('content', 'message'), BROKEN.values(), ids=BROKEN)
def test_broken_safetensors_files(content, message, tmp_path):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(content)
    with pytest.raises(interchange.InterchangeError, match=message):
        interchange.read_checkpoint(path)


FUZZED = settings(
    database=None,
    deadline=None,
    derandomize='FUZZ' not in os.environ,
    max_examples=int(os.environ.get('FUZZ', 40)),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# What a header may hold by mistake or malice: numbers near the limits of their types, too.
LENGTHS = st.sampled_from([0, 1, 2, 3, 4, 7, 8, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 10**300, -1])
JSON = st.recursive(
    st.none() | st.booleans() | LENGTHS | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {
        'dtype': st.sampled_from(sorted(_files._DTYPES)) | JSON,
        'shape': st.lists(LENGTHS, max_size=4) | JSON,
        'data_offsets': st.lists(LENGTHS, min_size=2, max_size=2) | JSON,
    },
    optional={'more': JSON},
)
NAMES = st.text(max_size=3) | st.sampled_from(['__metadata__', 'w', '\ud800', '\x1b[2J'])


def read_or_refused(path: pathlib.Path, content: bytes) -> bool:
    """Whether a file is read. If not, it is refused by a named error; neither takes memory."""
    path.write_bytes(content)
    refusal = ''
    tracemalloc.start()
    try:
        for array in interchange.read_checkpoint(path).arrays.values():
            assert array.nbytes <= len(content)
    except interchange.InterchangeError as error:
        refusal = str(error)
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 1_000_000 + 200 * len(content)
    assert refusal.replace('\n', '').isprintable()
    return not refusal


@FUZZED
@given(data=st.data())
def test_changed_bytes_of_a_safetensors_file(data, tmp_path):
    """They are read, or refused as damaged; nothing else happens."""
    whole = (FILES / 'dtypes.safetensors').read_bytes()
    header = 8 + int.from_bytes(whole[:8], 'little')
    changed = bytearray(whole[: data.draw(st.integers(0, len(whole)) | st.just(len(whole)))])
    swapped = st.sampled_from([*b'0123456789[]{},":FIU', 0, 255])
    for at in data.draw(st.lists(st.integers(0, header), max_size=3)):
        if at < len(changed):
            changed[at] = data.draw(swapped)
    is_read = read_or_refused(tmp_path / 'x.safetensors', changed)
    assert is_read or changed != whole
    assert not is_read or len(changed) == len(whole)


@pytest.mark.extended
@FUZZED
@given(
    header=st.dictionaries(NAMES, ENTRIES | JSON, max_size=4) | JSON,
    data=st.binary(max_size=16),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_headers_of_safetensors_files(header, data, length, tmp_path):
    read_or_refused(tmp_path / 'x.safetensors', safetensors(header, data, length))


@pytest.mark.extended
@FUZZED
@given(index=st.fixed_dictionaries({'weight_map': st.dictionaries(NAMES, NAMES) | JSON}) | JSON)
def test_indices_of_shards(index, tmp_path):
    assert not read_or_refused(tmp_path / INDEX, json.dumps(index).encode())


@FUZZED
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=2),
    cuts=st.permutations(range(3)),
    shift=st.integers(-2, 2),
)
def test_arrays_that_share_or_leave_bytes(lengths, cuts, shift, tmp_path):
    """Every byte belongs to one array: moving one of three is noticed, and their order is free."""
    sizes = [1, 2, 3, *lengths]
    ends = np.cumsum(sizes).tolist()
    entries = [
        {'dtype': 'U8', 'shape': [n], 'data_offsets': [end - n, end]}
        for n, end in zip(sizes, ends, strict=True)
    ]
    entries[1]['data_offsets'] = [x + shift for x in entries[1]['data_offsets']]
    header = {str(i): entries[i] for i in [*cuts, *range(3, len(sizes))]}
    content = safetensors(header, bytes(range(ends[-1])))
    assert read_or_refused(tmp_path / 'x.safetensors', content) == (shift == 0)


@pytest.mark.extended
@FUZZED
@given(text=JSON.map(json.dumps) | st.text(max_size=20))
def test_templates_and_records_of_ports(text, tmp_path):
    for read, file in (
        (_port.read_template, tmp_path / 'like.json'),
        (lambda path: interchange.restore_port(path.parent, TINY), tmp_path / 'port.json'),
    ):
        file.write_text(text, 'utf-8', 'surrogatepass')
        with pytest.raises(interchange.InterchangeError):
            read(file)


@needs_torch
@pytest.mark.extended
@FUZZED
@given(data=st.data())
def test_changed_bytes_of_a_pytorch_file(data, tmp_path):
    changed = bytearray((FILES / 'run.pt').read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(changed) - 1), min_size=1, max_size=8)):
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.none() | st.integers(0, len(changed)))
    (tmp_path / 'x.pt').write_bytes(changed[:cut])
    with contextlib.suppress(interchange.InterchangeError):
        interchange.read_checkpoint(tmp_path / 'x.pt')


INDEX = 'model.safetensors.index.json'
SHARDS = {
    'model-00001-of-00002.safetensors': ('embed.weight', 'conv.weight', 'conv.bias'),
    'model-00002-of-00002.safetensors': ('norm.weight', 'norm.bias'),
}


def sharded(folder: pathlib.Path, shards: Any = SHARDS, index: Any = None) -> pathlib.Path:
    """Writes some of the recorded arrays as shards, and their index."""
    for file, names in shards.items():
        header, data = {}, b''
        for name in names:
            array, begin = run()['model'][name], len(data)
            data += array.tobytes()
            header[name] = {
                'dtype': 'F64',
                'shape': array.shape,
                'data_offsets': [begin, len(data)],
            }
        (folder / file).write_bytes(safetensors(header, data))
    weight_map = {name: file for file, names in SHARDS.items() for name in names}
    path = folder / INDEX
    path.write_text(json.dumps(index or {'metadata': {}, 'weight_map': weight_map}))
    return path


def test_shards_are_read_through_their_index(tmp_path, capsys):
    path = sharded(tmp_path)
    found = interchange.read_checkpoint(path)
    names = [name for names in SHARDS.values() for name in names]
    assert list(found.arrays) == names
    for name in names:
        np.testing.assert_array_equal(found.arrays[name], run()['model'][name])
    assert command.main([str(path)]) == 0
    assert '5 parameters and buffers' in capsys.readouterr().out


FIRST, SECOND = SHARDS
INDICES: dict[str, tuple[Any, tuple[str, ...]]] = {
    'nothing': ('', ('it is not an index of shards: Expecting value',)),
    'a list': ([1], ('it is not an index of shards: it is not a JSON object',)),
    'no map': ({'metadata': {}}, ('it is not an index of shards: it has no weight_map',)),
    'a number': ({'weight_map': {'w': 3}}, ('it is not an index of shards: it has no weight_map',)),
    'empty': ({'weight_map': {}}, ('it is not an index of shards: it has no weight_map',)),
    'elsewhere': (
        {'weight_map': {'v': '../x.safetensors', 'w': '/x.safetensors', 'x': '..', 'y': 'a\\b'}},
        tuple(f'{x!r} is not the name of a file beside it' for x in ('../x.safetensors', '..')),
    ),
    'no file': (
        {'weight_map': {'v': 'lost.safetensors', 'embed.weight': FIRST}},
        ("'lost.safetensors' is missing",),
    ),
    'another place': (
        {'weight_map': {'norm.weight': FIRST, 'w\x1b': SECOND, 'norm.bias': SECOND}},
        (
            f"{FIRST!r} has no 'norm.weight'",
            f"{FIRST!r} has 'embed.weight', which the index does not name there",
            f"{SECOND!r} has no 'w\\x1b'",
        ),
    ),
}


@pytest.mark.parametrize(('index', 'lines'), INDICES.values(), ids=INDICES)
def test_an_index_that_does_not_fit_its_shards(index, lines, tmp_path):
    path = sharded(tmp_path, index=index)
    if index == '':
        path.write_text('')
    with pytest.raises(interchange.InterchangeError, match='index.json cannot be read') as error:
        interchange.read_checkpoint(path)
    for line in lines:
        assert any(problem.startswith(line) for problem in error.value.problems)


def test_a_damaged_shard_is_named(tmp_path):
    path = sharded(tmp_path)
    (tmp_path / SECOND).write_bytes(b'')
    with pytest.raises(interchange.InterchangeError, match=f'{SECOND}(.|\n)*it has 0 bytes'):
        interchange.read_checkpoint(path)


def test_names_cannot_move_the_terminal(tmp_path, capsys):
    path = tmp_path / 'x.safetensors'
    path.write_bytes(safetensors({'\x1b[2Jw': ENTRY}))
    assert command.main([str(path)]) == 0
    assert r'\x1b[2Jw  float32 (2,)' in capsys.readouterr().out


# Pairs.


def zeros(**shapes: Any) -> Any:
    return {
        key: zeros(**x) if isinstance(x, dict) else jax.ShapeDtypeStruct(x, jnp.float32)
        for key, x in shapes.items()
    }


def arrays(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def text_of(theirs: dict[str, tuple[int, ...]], ours: Any, **options: Any) -> str:
    return str(interchange.propose_pairs(arrays(theirs), ours, **options))


def test_wrappers_are_seen_through():
    theirs = {'_orig_mod.module.a.0.weight': (3, 2), '_orig_mod.module.model.bias': (3,)}
    ours = zeros(a_0={'kernel': (2, 3)}, model={'bias': (3,)})
    assert text_of(theirs, ours) == (
        'sure      _orig_mod.module.a.0.weight -> a_0/kernel (axes swapped)\n'
        'sure      _orig_mod.module.model.bias -> model/bias'
    )
    # What is in ours too is not a wrapper.
    assert 'sure' in text_of({'model.a.bias': (3,)}, {'model': zeros(a={'bias': (3,)})})


def test_layers_by_other_names_are_guessed_by_their_shapes():
    """Those of Linen, where one bias has the shape of another and goes with its layer."""
    theirs = {
        'conv.weight': (4, 3, 5, 5),
        'conv.bias': (4,),
        'fc.weight': (4, 7),
        'fc.bias': (4,),
    }
    ours = zeros(
        Conv_0={'kernel': (5, 5, 3, 4), 'bias': (4,)}, Dense_0={'kernel': (7, 4), 'bias': (4,)}
    )
    found = interchange.propose_pairs(arrays(theirs), ours)
    assert {pair.theirs: pair.ours for pair in found.pairs} == {
        'conv.weight': 'Conv_0/kernel',
        'conv.bias': 'Conv_0/bias',
        'fc.weight': 'Dense_0/kernel',
        'fc.bias': 'Dense_0/bias',
    }
    assert found.guesses.keys() == {str(pair.ours) for pair in found.pairs}
    assert not found.missing
    assert not found.unused


def test_nothing_is_chosen_among_several():
    theirs = {'a.weight': (3, 2), 'b.weight': (3, 2), 'c.weight': (5, 3)}
    for ours in (zeros(x={'kernel': (2, 3)}), zeros(x={'kernel': (2, 3)}, y={'kernel': (2, 3)})):
        found = interchange.propose_pairs(arrays(theirs), ours)
        assert found.pairs == ()
        assert 'it may be any of a.weight, b.weight' in found.missing['x/kernel']
        assert found.unused.keys() == theirs.keys()
    # Nor is one given to the first of two.
    found = interchange.propose_pairs(
        arrays({'a.weight': (3, 2)}), zeros(x={'kernel': (2, 3)}, y={'kernel': (2, 3)})
    )
    assert found.pairs == ()


def test_a_name_with_another_shape_is_no_guess():
    theirs = {'a.weight': (3, 2), 'b.weight': (4, 2)}
    found = interchange.propose_pairs(arrays(theirs), zeros(a={'kernel': (2, 4)}))
    assert found.pairs == ()
    assert (
        "'a.weight' has shape (3, 2) (axes swapped), and ours (2, 4)" in (found.missing['a/kernel'])
    )


def test_names_that_are_not_alone_tell_nothing():
    theirs = {'a.weight': (3, 3), 'a.kernel': (3, 3), 'b.c.bias': (4,), 'b_c.bias': (4,)}
    found = interchange.propose_pairs(
        arrays(theirs), zeros(a={'kernel': (3, 3)}, b_c={'bias': (4,)})
    )
    assert found.pairs == ()
    assert 'others have it too' in found.missing['a/kernel']
    assert 'may be any of b.c.bias, b_c.bias' in found.missing['b_c/bias']


CONV = {'conv.weight': (6, 3, 5, 5)}
PARTS = {
    'flattened': (
        CONV | {'fc.weight': (7, 24)},
        'fc',
        'its 24 inputs may be a flattened image of 6',
    ),
    'pooled': (CONV | {'fc.weight': (7, 6)}, 'fc', None),
    'other': (CONV | {'fc.weight': (7, 25)}, 'fc', None),
    'after another': (CONV | {'b.weight': (24, 6), 'a.weight': (7, 24)}, 'a', None),
    'in a sorted file': (CONV | {'d.weight': (24, 6), 'e.weight': (7, 24)}, 'e', 'its 24 inputs'),
    'in a module': (
        {'z.weight': (6, 3, 1)} | {'m.a.weight': (24, 6), 'm.b.weight': (7, 24)},
        'm/b',
        None,
    ),
    'before': ({'fc.weight': (24, 7), 'c.weight': (9, 6, 3)}, 'fc', 'its 24 outputs may become'),
    'square': ({'fc.weight': (7, 7)}, 'fc', 'as many inputs as outputs'),
    'one channel': ({'c.weight': (1, 1, 3)}, 'c', 'nor whether it is a transposed'),
    'square convolution': ({'c.weight': (7, 7, 3)}, 'c', 'nor whether it is a transposed'),
}


@pytest.mark.parametrize(('theirs', 'layer', 'reason'), PARTS.values(), ids=PARTS)
def test_kernels_whose_axes_may_lie_otherwise(theirs, layer, reason):
    ours: Any = {}
    for name, (outputs, inputs, *window) in theirs.items():
        *at, leaf = name.split('.')[:-1]
        tree = ours
        for key in at:
            tree = tree.setdefault(key, {})
        tree[leaf] = zeros(kernel=(*window, inputs, outputs))
    found = interchange.propose_pairs(arrays(theirs), ours)
    assert len(found.pairs) == len(theirs)
    got = found.guesses.get(f'{layer}/kernel')
    assert (got is None) if reason is None else (reason in got)


def test_a_parameter_of_its_own_name():
    theirs = {'cls_token': (1, 1, 8), 'table': (4, 4)}
    found = interchange.propose_pairs(arrays(theirs), zeros(**theirs))
    assert [pair.layout for pair in found.pairs] == [interchange.AS_IS] * 2
    assert found.guesses.keys() == {'table'}


def test_what_the_caller_knows_is_sure():
    known = [interchange.Pair('fc.weight', 'fc/kernel', interchange.KERNEL)]
    found = interchange.propose_pairs(
        arrays({'fc.weight': (7, 7), 'tied.weight': (7, 7)}),
        zeros(fc={'kernel': (7, 7)}),
        known=known,
        ignore=['tied.weight'],
    )
    assert found.pairs == tuple(known)
    assert not found.guesses
    assert found.unused == {'tied.weight': 'it is in `ignore`'}


# Runs.


def tiny(**group: Any) -> interchange.Checkpoint:
    """A run of one step of a layer and a norm."""
    shapes = {'fc.weight': (3, 2), 'fc.bias': (3,), 'norm.weight': (3,)}
    state = {i: {'step': 1.0, 'square_avg': np.ones(s)} for i, s in enumerate(shapes.values())}
    settings = {'lr': 0.5, 'alpha': 0.9, 'eps': 1e-8, 'weight_decay': 0, 'momentum': 0}
    settings |= {'centered': False, 'maximize': False, 'params': [0, 1, 2], **group}
    return interchange.Checkpoint(arrays(shapes), {'state': state, 'param_groups': [settings]})


TINY = zeros(fc={'kernel': (2, 3), 'bias': (3,)}, norm={'scale': (3,)})


def test_guesses_and_gaps_are_refused_with_their_reasons():
    with pytest.raises(
        interchange.InterchangeError, match='the order of the model is assumed'
    ) as e:
        interchange.from_checkpoint(tiny(), TINY)
    assert len(e.value.problems) == 1
    ours = {**TINY, 'more': zeros(kernel=(9, 9))}
    del ours['norm']
    with pytest.raises(interchange.InterchangeError) as e:
        interchange.from_checkpoint(tiny(), ours, accept_guesses=True)
    text = str(e.value)
    assert "missing: 'more/kernel': none of their unpaired arrays becomes (9, 9)" in text
    assert "left over: 'norm.weight': it has shape (3,), and no path of ours takes it" in text
    assert 'the groups have 3 parameters and no names, and the model has 2' in text


def test_names_in_the_groups_are_taken_without_their_wrapper():
    names = ['module.norm.weight', 'module.fc.weight', 'module.fc.bias']
    run = tiny(param_names=names, params=[2, 0, 1])
    port = interchange.from_checkpoint(run, TINY)
    assert port.state.inner_states.keys() == {'group 0', 'frozen'}
    # In an order that cannot be the model's, they are asked for.
    with pytest.raises(interchange.InterchangeError, match='order of the model does not fit'):
        interchange.from_checkpoint(tiny(params=[2, 0, 1]), TINY, accept_guesses=True)
    wanted = ['norm.weight', 'fc.weight', 'fc.bias']
    interchange.from_checkpoint(tiny(params=[2, 0, 1]), TINY, names=wanted)


NAMED = {'param_names': ['fc.weight', 'fc.bias', 'norm.weight']}


def without_state(number: int, **group: Any) -> interchange.Checkpoint:
    run = tiny(**group)
    assert run.optimizer is not None
    del run.optimizer['state'][number]
    return run


def stepped(port: interchange.Port) -> dict[str, float]:
    """The first entry of each update, for a gradient of one."""
    assert port.tx is not None
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), port.params)
    updates, _ = port.tx.update(ones, port.state, port.params)
    found: Any = updates
    return {name: float(x.ravel()[0]) for name, x in (found['fc'] | found['norm']).items()}


# With a second moment of one: a rate of a half. From none, over the root of 0.1.
STILL, USUAL, FIRST_STEP = 0.0, -0.5, -0.5 / 0.1**0.5
LEFT_OUT: dict[str, tuple[Any, dict[str, Any], dict[str, float]]] = {
    'nothing': (tiny(**NAMED), {}, {}),
    'frozen': (tiny(**NAMED), {'frozen': ['fc.bias']}, {'bias': STILL}),
    'without state': (without_state(2, **NAMED), {}, {'scale': STILL}),
    'fresh': (without_state(2, **NAMED), {'fresh': ['norm.weight']}, {'scale': FIRST_STEP}),
    'frozen without state': (
        without_state(2, **NAMED),
        {'frozen': ['norm.weight', 'fc.bias']},
        {'scale': STILL, 'bias': STILL},
    ),
    'not in the groups': (
        without_state(1, params=[0, 2]),
        {'names': ['fc.weight', 'norm.weight']},
        {'bias': STILL},
    ),
}


@pytest.mark.parametrize(('run', 'options', 'expected'), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_does_not_move_or_starts_anew(run, options, expected, tmp_path, monkeypatch):
    """From the file at once, and by the command and the folder that it writes."""
    wanted = {'kernel': USUAL, 'bias': USUAL, 'scale': USUAL} | expected
    port = interchange.from_checkpoint(run, TINY, **options)
    assert stepped(port) == pytest.approx(wanted)
    flags = [f'--{key}={name}' for key in ('fresh', 'frozen') for name in options.get(key, ())]
    if 'names' in options:
        (tmp_path / 'names').write_text('\n'.join(options['names']))
        flags += ['--names', str(tmp_path / 'names')]
    folder = written(tmp_path, run, monkeypatch, *flags)
    assert stepped(interchange.restore_port(folder, TINY)) == pytest.approx(wanted)


def test_what_is_said_of_parameters_must_fit_the_file(tmp_path, monkeypatch, capsys):
    for run, options, line in (
        (tiny(**NAMED), {'frozen': ['x']}, "'x', said to be frozen, is not in any pair"),
        (tiny(**NAMED), {'fresh': ['x']}, "'x', said to be fresh, is not in any pair"),
        (tiny(**NAMED), {'fresh': ['fc.bias']}, "'fc.bias', said to be fresh, has an entry"),
    ):
        with pytest.raises(interchange.InterchangeError, match=line):
            interchange.from_checkpoint(run, TINY, **options)
        monkeypatch.setattr(command, 'read_checkpoint', lambda *args, run=run, **options: run)
        interchange.save_template(tmp_path / 'like.json', TINY)
        flags = [f'--{key}={name}' for key, names in options.items() for name in names]
        argv = ['run.pt', '--like', str(tmp_path / 'like.json'), '--out', str(tmp_path / 'port')]
        assert command.main([*argv, *flags]) == 1
        assert line in capsys.readouterr().out
        assert not (tmp_path / 'port').exists()


def test_a_linen_train_state_goes_on():
    names = ['fc.weight', 'fc.bias', 'norm.weight']
    port = interchange.from_checkpoint(tiny(param_names=names), TINY)
    made = TrainState.create(apply_fn=None, params=port.params, tx=port.resumed)
    ones = jax.tree.map(jnp.ones_like, port.params)
    after = made.apply_gradients(grads=ones).params
    np.testing.assert_allclose(after['fc']['bias'], -0.5, rtol=1e-6)


def test_parameters_alone():
    port = interchange.from_checkpoint(
        FILES / 'run.safetensors', *states(Net()), known=KNOWN[:1], accept_guesses=True
    )
    assert (port.tx, port.state) == (None, None)
    np.testing.assert_array_equal(port.buffers['norm']['mean'], run()['model']['norm.running_mean'])
    with pytest.raises(ValueError, match='the checkpoint has none'):
        _ = port.resumed


def written(
    folder: pathlib.Path, checkpoint: interchange.Checkpoint, monkeypatch: Any, *flags: str
) -> pathlib.Path:
    monkeypatch.setattr(command, 'read_checkpoint', lambda *args, **options: checkpoint)
    interchange.save_template(folder / 'like.json', TINY)
    argv = ['run.pt', '--like', str(folder / 'like.json'), '--out', str(folder / 'port')]
    assert command.main([*argv, '--accept-guesses', *flags]) == 0
    return folder / 'port'


def test_a_port_needs_the_schedule_that_a_scheduler_was(tmp_path, monkeypatch):
    folder = written(tmp_path, tiny(initial_lr=1.0), monkeypatch)
    with pytest.raises(interchange.InterchangeError, match='learning_rate'):
        interchange.restore_port(folder, TINY)
    with pytest.raises(TypeError, match='real scalar'):
        interchange.restore_port(folder, TINY, learning_rate='x')
    port = interchange.restore_port(folder, TINY, learning_rate=lambda count: 1.0 / (1 + count))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), port.params)
    assert port.tx is not None
    updates, _ = port.tx.update(ones, port.state, port.params)
    np.testing.assert_allclose(updates['fc']['bias'], -0.5, rtol=1e-6)


def test_a_port_that_is_not_whole_or_not_of_this_model(tmp_path, monkeypatch):
    folder = written(tmp_path, tiny(), monkeypatch)
    interchange.restore_port(folder, TINY)
    other = {**TINY, 'norm': zeros(scale=(4,))}
    with pytest.raises(
        interchange.InterchangeError, match=r"'params/norm/scale' is \[3\] there, and \[4\] here"
    ):
        interchange.restore_port(folder, other)
    (folder / 'port.json').unlink()
    with pytest.raises(interchange.InterchangeError, match='not a complete port'):
        interchange.restore_port(folder, TINY)


@pytest.mark.parametrize(
    'text',
    ['', '[]', '{"params": [{}]}', '{"params": [{"path": ["a"], "shape": [-1], "dtype": "f4"}]}'],
)
def test_a_template_that_is_something_else(text, tmp_path, capsys):
    like = tmp_path / 'like.json'
    like.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        command.main([str(FILES / 'run.safetensors'), '--like', str(like)])
    assert stopped.value.code == 2
    assert 'is not a template' in capsys.readouterr().err
