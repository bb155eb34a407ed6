"""The main job from the outside: what it writes, how it resumes, and what it refuses.

Most runs happen in this process, where JAX and Flax are loaded, with the small network and the few
digits of `small_demo.py`.
"""

import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optax
import pytest
import small_demo

from rmsprop_jax import demo

SMALL = ('--epochs', '4', '--batch-size', '32', '--checkpoint-every', '1', '--no-comparison')
KILLED = Path(__file__).with_name('small_demo.py')


def python(*arguments: object, **changed: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-W', 'error', *map(str, arguments)]
    return subprocess.run(
        command,
        env=environment() | changed,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def environment() -> dict[str, str]:
    # A process that is killed may leave half an entry in a cache of compiled programs.
    changed = {'PYTHONPATH': str(Path(demo.__file__).parents[1]), 'JAX_COMPILATION_CACHE_DIR': ''}
    return os.environ | changed


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = demo.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module', autouse=True)
def small() -> Iterator[None]:
    # The command sets the level of this logger.
    logger = logging.getLogger('absl')
    level = logger.level
    with pytest.MonkeyPatch.context() as patch:
        small_demo.shrink(patch)
        yield
    logger.setLevel(level)


def assert_refused(done: subprocess.CompletedProcess[str], pattern: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ''
    assert re.fullmatch(rf'rmsprop-jax-demo: error: .*{pattern}.*\n', done.stderr), done.stderr


def restored(output: Path) -> tuple[int, list[bytes]]:
    import jax

    optimizer = demo.Optimizer('', 3e-3, lambda rate: demo.rmsprop(rate, momentum=0.9))
    experiment = demo.Experiment(demo.load_digits(), optimizer, epochs=4, batch_size=32)
    with demo.open_checkpoints(output / demo.CHECKPOINTS) as checkpoints:
        state = demo.restore(checkpoints, lambda: experiment.init(jax.random.key(0)))
    assert state is not None
    return int(state.epoch), [leaf.tobytes() for leaf in jax.device_get(jax.tree.leaves(state))]


def assert_same_run(one: Path, other: Path) -> None:
    assert restored(one) == restored(other)
    for name in (demo.CONFIG, demo.METRICS):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp('demo') / 'undisturbed'
    summary = succeed('--output', output, *SMALL)
    assert re.fullmatch(
        rf'test accuracy [\d.]+% after 4 epochs; .* results in {re.escape(str(output))}\n', summary
    )
    return output


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / 'copied')


def test_writes_metrics_a_figure_and_a_checkpoint(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / demo.METRICS).read_text().splitlines()]
    assert [record['epoch'] for record in records] == [1, 2, 3, 4]
    assert [record['step'] for record in records] == [3, 6, 9, 12]
    assert records[-1]['loss'] < records[0]['loss']
    # The first step of each epoch of three.
    peak = demo.Config.learning_rate
    rates = optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps=1, decay_steps=12)
    found = [record['learning_rate'] for record in records]
    assert found == [float(rates(step)) for step in (0, 3, 6, 9)]
    assert (finished / demo.FIGURES[0]).read_bytes().startswith(b'\x89PNG')
    assert not (finished / demo.FIGURES[1]).exists()
    assert restored(finished)[0] == 4


@pytest.mark.parametrize(
    ('function', 'call'),
    [
        # Each checkpoint is renamed twice, so this is the third, all but complete.
        ('os.rename', 6),
        # Metrics written, no checkpoint yet.
        pytest.param('orbax.checkpoint.CheckpointManager.save', 1, marks=pytest.mark.extended),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    finished: Path, tmp_path: Path, function: str, call: int
) -> None:
    options = '--output', tmp_path, *SMALL
    killed = python(KILLED, function, call, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    succeed('--resume', *options)
    assert_same_run(finished, tmp_path)


@pytest.mark.extended
def test_a_run_killed_at_any_time_resumes_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    options = '--output', tmp_path, *SMALL
    # A call that there is not: it is killed from outside.
    command = [sys.executable, str(KILLED), 'os.rename', '-1', *map(str, options)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while len(demo.read_lines(tmp_path / demo.METRICS)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    succeed('--resume', *options)
    assert_same_run(finished, tmp_path)


@pytest.mark.extended
def test_unfinished_writes_and_later_metrics_are_ignored(finished: Path, copied: Path) -> None:
    folder = copied / demo.CHECKPOINTS
    (folder / '4').rename(folder / '4.orbax-checkpoint-tmp')
    with (copied / demo.METRICS).open('a') as file:
        file.write('{"epoch": 5, "lo')
    succeed('--resume', '--output', copied, *SMALL)
    assert_same_run(finished, copied)


def test_resuming_a_finished_run_changes_nothing(finished: Path, copied: Path) -> None:
    succeed('--resume', '--output', copied, *SMALL)
    assert_same_run(finished, copied)


@pytest.mark.extended
def test_overwrite_starts_again(finished: Path, copied: Path) -> None:
    (copied / demo.METRICS).write_text('{"epoch": 1, "loss": 0}\n')
    succeed('--overwrite', '--output', copied, *SMALL)
    assert_same_run(finished, copied)


@pytest.mark.parametrize(
    ('options', 'pattern'),
    [
        (['--epochs', 'many'], "--epochs: must be a whole number .*'many'"),
        (['--epochs', '1.5'], '--epochs'),
        (['--epochs', '0'], '--epochs'),
        (['--seed', '-1'], '--seed'),
        (['--batch-size', '1438'], '--batch-size'),
        (['--learning-rate', '0'], '--learning-rate'),
        (['--learning-rate', 'nan'], '--learning-rate'),
        (['--learning-rate', 'inf'], '--learning-rate'),
        (['--momentum', '1'], '--momentum'),
        (['--decay', '-0.1'], '--decay'),
        (['--comparison-epochs', '0'], '--comparison-epochs'),
        (['--checkpoint-every', '0'], '--checkpoint-every'),
        (['--resume', '--overwrite'], 'not allowed with'),
        (['--frobnicate'], '--frobnicate'),
    ],
)
def test_bad_options_are_refused_in_one_line(
    options: list[str], pattern: str, tmp_path: Path
) -> None:
    done = run('--output', tmp_path / 'new', *options)
    assert_refused(done, re.escape(pattern) if '.*' not in pattern else pattern)
    assert not (tmp_path / 'new').exists()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    file = tmp_path / 'file'
    file.write_text('mine')
    assert_refused(run('--output', file), 'File exists')
    assert_refused(run('--output', file / 'below'), 'Not a directory')
    assert_refused(run('--output', tmp_path, '--overwrite'), 'contains other files, but not a run')
    assert_refused(
        run('--output', tmp_path / 'new', '--resume'), 'does not contain a run to resume'
    )
    assert file.read_text() == 'mine'


def test_a_run_is_neither_replaced_nor_mixed_by_accident(finished: Path) -> None:
    before = (finished / demo.METRICS).read_bytes()
    assert_refused(run('--output', finished), 'add --resume or --overwrite')
    other = '--decay', '0.5', '--seed', '3'
    assert_refused(
        run('--output', finished, '--resume', *SMALL, *other),
        '--seed was 0, now 3; --decay was 0.9, now 0.5',
    )
    assert (finished / demo.METRICS).read_bytes() == before


@pytest.mark.parametrize('name', [demo.CONFIG, demo.METRICS])
@pytest.mark.parametrize('content', [b'\xff\xfe\n', b'foreign\n', b'[1]\n'])
def test_damaged_text_is_refused(copied: Path, name: str, content: bytes) -> None:
    (copied / name).write_bytes(content)
    assert_refused(run('--output', copied, '--resume', *SMALL), f'{name} is damaged')


@pytest.mark.extended
def test_steps_are_measured_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, 'network', small_demo.whole_network)
    options = '--output', tmp_path, *SMALL, '--diagnose'
    succeed(*options)
    last = json.loads((tmp_path / demo.METRICS).read_text().splitlines()[-1])
    assert len(last['step_size/layers/0']) == 5
    assert 0 < last['update_ratio/layers/9'] < 1
    assert 0 < last['epsilon_share/layers/7'] < 1
    assert (tmp_path / demo.FIGURES[2]).read_bytes().startswith(b'\x89PNG')
    done = run('--resume', *options[:-1])
    assert_refused(done, 'other options: --diagnose was True, now False')


def test_missing_metrics_are_refused(copied: Path) -> None:
    (copied / demo.METRICS).unlink()
    assert_refused(run('--output', copied, '--resume', *SMALL), 'lacks epochs')


@pytest.mark.extended
# Orbax abandons the reads of the other arrays.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize('damage', ['empty', 'truncated', 'garbled', 'without data', 'foreign'])
def test_a_checkpoint_that_cannot_be_read_is_refused(copied: Path, damage: str) -> None:
    checkpoint = copied / demo.CHECKPOINTS / '4'
    files = [path for path in checkpoint.rglob('*') if path.is_file()]
    if damage in {'empty', 'foreign'}:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    if damage == 'foreign':
        write_foreign_checkpoint(checkpoint)
    for path in files if damage in {'truncated', 'garbled', 'without data'} else []:
        if damage == 'truncated':
            os.truncate(path, path.stat().st_size // 2)
        elif damage == 'garbled':
            path.write_bytes(b'garbled')
        elif path.parent.name == 'd':
            path.unlink()
    done = run('--output', copied, '--resume', *SMALL)
    assert_refused(done, f'cannot read the checkpoint {re.escape(str(checkpoint))}')


def write_foreign_checkpoint(checkpoint: Path) -> None:
    import numpy as np
    import orbax.checkpoint as ocp

    checkpoint.rmdir()
    with demo.open_checkpoints(checkpoint.parent) as checkpoints:
        checkpoints.save(4, args=ocp.args.StandardSave({'weights': np.zeros(3)}), force=True)


@pytest.mark.extended
def test_a_diverging_run_ends_with_advice(tmp_path: Path) -> None:
    done = run('--output', tmp_path, *SMALL, '--learning-rate', '1e38')
    assert done.returncode == 2
    assert 'lower --learning-rate' in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
    assert 'NaN' not in (tmp_path / demo.METRICS).read_text()


@pytest.mark.extended
def test_the_comparison_is_resumed_by_optimizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demo.Config(batch_size=32, comparison_epochs=2)
    optimizers, digits = demo.OPTIMIZERS, demo.load_digits()
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    whole.mkdir()
    resumed.mkdir()
    monkeypatch.setattr(demo, 'OPTIMIZERS', optimizers[-2:])
    monkeypatch.setattr(demo, 'COMPARISON_SEEDS', 2)
    results = demo.compare(config, digits, whole)
    monkeypatch.setattr(demo, 'OPTIMIZERS', optimizers[-2:-1])
    demo.compare(config, digits, resumed)
    monkeypatch.setattr(demo, 'OPTIMIZERS', optimizers[-2:])
    assert demo.compare(config, digits, resumed) == results
    assert (whole / demo.COMPARISON).read_bytes() == (resumed / demo.COMPARISON).read_bytes()
    for result in results:
        assert len({tuple(losses) for losses in result['loss']}) == demo.COMPARISON_SEEDS
    monkeypatch.setattr(demo, 'OPTIMIZERS', optimizers)
    with pytest.raises(demo.DemoError, match='not written by this version'):
        demo.compare(config, digits, resumed)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(['--help'])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for action in demo.parser()._actions:
        assert action.help
        assert all(name in text for name in action.option_strings)
        assert ' '.join(action.help.split()[:3]) in ' '.join(text.split())


EXTRAS = ('flax', 'matplotlib', 'orbax', 'sklearn', 'tqdm')


@pytest.mark.parametrize('name', EXTRAS)
def test_a_missing_extra_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name, *(known for known in sys.modules if known.startswith(f'{name}.'))]:
        monkeypatch.setitem(sys.modules, module, None)
    done = run('--output', tmp_path / 'new')
    assert_refused(done, rf"{name}.*in a checkout, pip install '\.\[demo\]'")
    assert not (tmp_path / 'new').exists()


def test_help_needs_no_extra() -> None:
    code = f'import sys; sys.modules.update(dict.fromkeys({EXTRAS}))'
    done = python('-c', f'{code}; from rmsprop_jax import demo; demo.main()', '--help')
    assert done.returncode == 0, done.stderr


@pytest.mark.extended
def test_shifts_move_by_one_pixel_at_most() -> None:
    import jax
    import jax.numpy as jnp

    image = jnp.zeros((8, 8)).at[3, 4].set(1.0)
    images = jnp.tile(image[None, :, :, None], (200, 1, 1, 1))
    shifted = demo.shift(jax.random.key(0), images)
    places = {tuple(place) for place in jnp.argwhere(shifted[..., 0] == 1)[:, 1:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


@pytest.mark.extended
def test_convolution_agrees_with_xla() -> None:
    import jax

    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    layout = ('NHWC', 'HWIO', 'NHWC')
    expected = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), 'SAME', dimension_numbers=layout
    )
    # Sums of 27 products of standard normals, in float32.
    assert abs(demo.convolve(images, kernel) - expected).max() < 1e-4


@pytest.mark.slow
def test_the_default_run_reaches_98_percent_in_a_minute(tmp_path: Path) -> None:
    # The suite's eight forced devices would take the threads that a user's run has.
    options = '--output', tmp_path, '--comparison-epochs', 1
    done = python('-m', 'rmsprop_jax.demo', *options, XLA_FLAGS='')
    assert done.returncode == 0, done.stderr
    seconds = re.search(r'(\d+) s of training', done.stdout)
    assert seconds is not None
    assert int(seconds[1]) < 60
    last = json.loads((tmp_path / demo.METRICS).read_text().splitlines()[-1])
    assert last['test_accuracy'] >= 0.98
    results = demo.read_lines(tmp_path / demo.COMPARISON)
    assert [result['method'] for result in results] == [x.name for x in demo.OPTIMIZERS]
    for figure in demo.FIGURES[:2]:
        assert (tmp_path / figure).read_bytes().startswith(b'\x89PNG')
