"""Reading compiled programs, and the one compiler that is always there."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rmsprop_jax
from rmsprop_jax import aot
from rmsprop_jax.aot import __main__ as command
from rmsprop_jax.aot import _models, _targets
from rmsprop_jax.aot._program import Array, Collective, Program, Traffic

PROGRAMS = pathlib.Path(__file__).parent / 'aot'
# One leaf of 8192 float32 on a TPU: mu is brought to fast memory, half of g too, and one result is
# taken back from there.
TPU = (PROGRAMS / 'tpu.hlo').read_text()
GPU = (PROGRAMS / 'gpu.hlo').read_text()


def test_fast_memory_on_the_chip_is_not_counted():
    leaf = 64 * 128 * 4
    program = Program(TPU)
    # mu and g are read on their way to fast memory; the kernel reads p and writes one result, the
    # other is written on its way back.
    assert program.traffic() == Traffic(kernels=1, copies=0, bytes=5 * leaf)
    assert program.minimum() == 5 * leaf
    assert not program.collectives()
    assert program.custom_calls() == {'ConcatBitcast'}
    assert not program.host_transfers()
    assert program.dtypes() == {'f32', 's32', 'u32'}


def test_a_gpu_program_counts_copies_branches_loops_and_communication():
    program = Program(GPU)
    by_hand = {
        'copy': 2 * 2000,
        'fusion': 2 * 3000,
        'all-reduce': 2 * 4000,
        'all-gather': 4000 + 8000,
        'conditional, the branch that moves most': 2 * 4000,
        'loop, once': 2 * 4000,
        'custom call': 2 * 4000,
    }
    assert program.traffic() == Traffic(kernels=7, copies=1, bytes=sum(by_hand.values()))
    assert program.minimum() == 2 * (2000 + 1000 + 4000)
    assert program.collectives() == (
        Collective('all-gather', 1, 8000),
        Collective('all-reduce', 1, 4000),
    )
    assert program.host_transfers() == {'xla_ffi_python_gpu_callback'}


@pytest.mark.parametrize(
    ('dtype', 'expected'), [('pred', 7), ('s4', 4), ('f8e4m3fn', 7), ('bf16', 14), ('c64', 56)]
)
def test_bytes_of_dtypes(dtype, expected):
    assert Array(dtype, (7,)).bytes == expected


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match='ENTRY'):
        Program('module @jit_step {}')


def test_the_minimum_on_cpu_is_what_the_arithmetic_needs():
    params = {'w': jnp.ones((256, 128)), 'b': jnp.ones(128)}
    size = 256 * 128 + 128
    tx = rmsprop_jax.rmsprop(1e-3, momentum=0.9)
    report = aot.compile_update(tx, params)
    assert report.leaves == 2
    assert report.parameters == size
    assert report.bytes_minimum == 7 * 4 * size
    assert report.bytes_moved >= report.bytes_minimum
    assert report.donated_bytes >= 3 * 4 * size
    assert report.target == 'cpu'
    assert report.devices == 1
    assert 'ENTRY' in report.text()
    assert 'cpu' in str(report)
    assert not report.host_transfers


def test_a_callback_is_seen():
    def step(x):
        return jax.pure_callback(lambda x: x, x, x)

    assert aot.compile_step(step, jnp.ones(8)).host_transfers


def test_shardings_are_kept_and_given_to_the_state():
    mesh = Mesh(np.array(aot.devices('cpu', 8)), ('data',))
    sharding = NamedSharding(mesh, PartitionSpec('data'))
    params = {'w': jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=sharding)}
    report = aot.compile_update(rmsprop_jax.rmsprop(1e-3), params)
    assert report.devices == 8
    assert report.parameters == 64 * 32 // 8
    assert report.minimum_per_parameter == 20
    assert not report.collectives


def test_collectives_of_a_data_parallel_gradient():
    mesh = Mesh(np.array(aot.devices('cpu', 8)), ('data',))
    batch = jax.ShapeDtypeStruct(
        (64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec('data'))
    )
    weights = jax.ShapeDtypeStruct((32,), jnp.float32)
    gradient = jax.grad(lambda w, x: jnp.mean((x @ w) ** 2))
    report = aot.compile_step(gradient, weights, batch, params=weights)
    (found,) = report.collectives
    assert (found.kind, found.bytes) == ('all-reduce', 32 * 4)


def test_a_topology_alone_replicates():
    report = aot.compile_update(optax.sgd(0.1), jnp.ones((64, 32)), topology=4)
    assert (report.devices, report.parameters) == (4, 64 * 32)


def test_a_jitted_step_keeps_its_settings():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(x):
        return x + 1

    assert aot.compile_step(step, jnp.ones(100)).donated_bytes == 400


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'target': 'abacus'}, 'target must be one of cpu, tpu-v4'),
        ({'topology': 99}, 'topology of cpu must be a number from 1 to 8'),
        ({'topology': '2x2'}, 'topology of cpu must be a number'),
    ],
)
def test_wrong_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        aot.compile_update(optax.sgd(0.1), jnp.ones(3), **arguments)


@pytest.fixture
def without_plugins(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)


@pytest.mark.parametrize(('target', 'extra'), [('tpu-v5e', 'aot-tpu'), ('cuda-h100', 'aot-cuda')])
def test_a_missing_compiler_is_named(target, extra, without_plugins):
    with pytest.raises(
        aot.MissingPluginError, match=rf"in a checkout, pip install '\.\[{extra}\]'"
    ):
        aot.devices(target)


@pytest.mark.parametrize('name', ['cuda-a100', 'cuda-h100', 'cuda-b200'])
def test_a_gpu_is_described_in_whole(name):
    gpu = _targets.find(name)
    assert isinstance(gpu, _targets.Gpu)
    text = gpu.text()
    assert text.count('{') == text.count('}')
    assert ' 0\n' not in text.replace('patch: 0', '').replace('minor: 0', '')
    assert f'memory_bandwidth: {gpu.bandwidth}\n' in text


@pytest.mark.parametrize(
    ('name', 'leaves', 'size'),
    [
        ('4096x4096', 1, 4096**2),
        ('7', 1, 7),
        # The networks' published parameter counts.
        ('resnet50', 161, 25_557_032),
        ('transformer-12', 148, 124_439_808),
    ],
)
def test_model_shapes(name, leaves, size):
    found = jax.tree.leaves(_models.shapes(name, jnp.bfloat16))
    assert len(found) == leaves
    assert sum(x.size for x in found) == size
    assert {x.dtype for x in found} == {jnp.dtype('bfloat16')}


def run(line):
    return command.main(line.split())


def test_the_command_prints_a_table(capsys):
    arguments = 'torch momentum=0.9 centered=true --model 64x64 --model 32 --target cpu'
    assert run(arguments) == 0
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ['step', 'target']
    assert first.split()[:2] == ['64x64', 'cpu']
    assert second.split()[:2] == ['32', 'cpu']
    assert ' 36 ' in first


def test_the_command_takes_storage_formats_and_optax(capsys):
    assert run('rmsprop --storage bfloat16 --model 64x64 --target cpu') == 0
    assert ' 16 ' in capsys.readouterr().out
    assert run('optax.sgd learning_rate=0.1 --model 64x64 --target cpu') == 0
    assert ' 12 ' in capsys.readouterr().out


def test_options_without_an_optimizer_are_those_of_rmsprop(capsys):
    for line in ('rmsprop momentum=0.9', 'momentum=0.9', 'momentum=0.9 nesterov=true'):
        assert run(f'{line} --model 64x64 --target cpu') == 0
        # With momentum: four arrays are read and three written.
        assert ' 28 ' in capsys.readouterr().out


def test_the_command_says_in_one_line_which_extra_is_missing(capsys, without_plugins):
    assert command.main(['--model', '64']) == 0
    captured = capsys.readouterr()
    assert captured.err == "for TPUs and GPUs: in a checkout, pip install '.[aot-tpu,aot-cuda]'\n"
    with pytest.raises(SystemExit):
        command.main(['--model', '64', '--target', 'tpu-v4'])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("in a checkout, pip install '.[aot-tpu]'")


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('adagrad', 'optimizer must be'),
        ('optax.adagradient', 'optimizer must be'),
        ('torch momentum', 'KEY=VALUE'),
        ('torch momentum=lots', 'must give a number'),
        ('torch momentum=2', 'momentum must be in'),
        ('torch speed=2', 'speed'),
        ('momentum', 'optimizer must be'),
        ('--model vgg', 'model must be'),
        ('--model 0x0', "without zeros; got '0x0'"),
        ('--model 4096x0', "without zeros; got '4096x0'"),
        ('--model transformer-0', 'layers, at least 1'),
        ('--storage bf16', "storage must be bfloat16, factored, float32 or uint8, got 'bf16'"),
        ('--storage per_leaf', 'storage must be bfloat16'),
        ('--storage Format', 'storage must be bfloat16'),
        ('--dtype float7', 'float7'),
        ('--topology 3x3', 'topology'),
    ],
)
def test_the_command_answers_mistakes_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main([*arguments.split(), '--target', 'cpu'])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
