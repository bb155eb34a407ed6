"""From the files of PyTorch to the next step here, and what is wrong with a file."""

import importlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from interchange_data import problem
from interchange_data import record_files as recorded

from rmsprop_jax import dialects, interchange
from rmsprop_jax.interchange import __main__ as command
from rmsprop_jax.interchange import _files

FILES = problem.FOLDER / 'files'
EXACT = 1e-12
NAMES = ['norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked']
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

    def loss(model: Net, step: int) -> Any:
        return jnp.mean((model(recorded.tokens(step)) - recorded.targets(step)) ** 2)

    @nnx.jit
    def train(model: Net, optimizer: nnx.Optimizer) -> None:
        for step in range(recorded.HANDOVER, recorded.HANDOVER + recorded.AFTER):
            optimizer.update(model, nnx.grad(loss)(model, step))

    train(model, optimizer)
    return {
        **interchange.parameters_to(*proposed(model)),
        'norm.running_mean': model.norm.mean[...],
    }


def proposed(model: Net) -> Any:
    params, _ = states(model)
    return params, interchange.propose_pairs(run()['model'], params, known=KNOWN).pairs


def assert_continues(model: Net, port: interchange.Port) -> None:
    nnx.update(model, port.params, port.buffers)
    got = trained(model, nnx.Optimizer(model, port.resumed, wrt=nnx.Param))
    expected = run()['after']
    # Flax averages the biased variance, PyTorch the unbiased one.
    assert expected.keys() - got.keys() == {*NAMES[1:]}
    for name, array in got.items():
        np.testing.assert_allclose(array, expected[name], rtol=EXACT, atol=EXACT, err_msg=name)


def test_from_a_file_to_the_next_steps(readable):
    model = Net()
    port = interchange.from_checkpoint(readable, *states(model), known=KNOWN, accept_guesses=True)
    assert_continues(model, port)


def test_a_wrong_layout_is_noticed_by_the_steps(readable):
    model = Net()
    port = interchange.from_checkpoint(readable, *states(model), accept_guesses=True)
    with pytest.raises(AssertionError, match='Not equal to tolerance'):
        assert_continues(model, port)


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
    assert_continues(model, port)
    with pytest.raises(SystemExit) as stopped:
        command.main([*argv, '--pair', known, '--accept-guesses'])
    assert stopped.value.code == 2
    assert 'exists already' in capsys.readouterr().err
