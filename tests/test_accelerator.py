"""The script for accelerators: it runs on the CPU, and a wrong number makes it fail."""

import json
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import jax_steps, works
from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import correctness, speed
from benchmarks.accelerator.apart import STATISTIC_ULPS, Apart, apart
from benchmarks.accelerator.rows import (
    MET,
    MISSED,
    NO_BOUND,
    NOT_JUDGED,
    NOT_RUN,
    NotRunError,
    row,
)
from benchmarks.worker import ROOT

pytestmark = pytest.mark.extended


def run(folder, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = folder / 'table.json'
    status = command.main(['--quick', '--output', str(output), *arguments])
    return status, json.loads(output.read_text())


ON_CPU = {
    'encode': {MET},
    'step': {MET, NOT_RUN},
    'golden': {MET, NOT_RUN},
    'long': {MET},
    'sharding': {MET},
    'steps': {NOT_JUDGED, NOT_RUN, *([NO_BOUND] if speed.python_with_torch() else [])},
    'compact': {NOT_JUDGED},
    'training': {NOT_JUDGED},
}


@pytest.mark.parametrize(
    ('sections', 'status'),
    [
        (('encode', 'golden', 'long'), 0),
        (('step',), 0),
        (('sharding',), 0),
        # Where nothing is judged, nothing is met.
        (('steps', 'compact', 'training'), 1),
    ],
    ids=lambda x: '-'.join(x) if isinstance(x, tuple) else '',
)
def test_on_the_cpu_all_that_is_judged_is_met(tmp_path, capsys, sections, status):
    found, result = run(tmp_path, '--sections', *sections)
    assert found == status
    assert result['complete']
    assert not result['accelerator']
    assert {*result['left out'], *sections} == ON_CPU.keys()
    verdicts = {section: set() for section in sections}
    for one in result['rows']:
        verdicts[one['section']].add(one['verdict'])
        assert bool(one['measured']) == (one['verdict'] != NOT_RUN), one
        assert bool(one['why']) == (one['verdict'] in (NOT_RUN, NOT_JUDGED)), one
    assert verdicts == {section: ON_CPU[section] for section in sections}
    assert sum(result['counts'].values()) == len(result['rows'])
    printed = capsys.readouterr().out
    assert printed.count(command.ON_CPU) == 2
    assert printed.count('\n| ') == 1 + len(result['rows'])


def test_it_needs_no_more_than_the_package():
    """From a checkout, without a path to the tests."""
    code = 'import sys, benchmarks.accelerator.__main__; print(*sys.modules)'
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {name.partition('.')[0] for name in done.stdout.split()}
    assert 'rmsprop_jax' in imported
    assert not imported & {'pytest', 'flax', 'torch', 'matplotlib', 'equinox', 'hypothesis'}


def off_by_two_ulps(x: np.ndarray) -> np.ndarray:
    return x + 2 * np.spacing(x) if x.dtype == np.float32 else x


def next_code(x: np.ndarray) -> np.ndarray:
    """Every hundredth code is that of the neighbour."""
    if x.dtype.itemsize > 2 or not x.size:
        return x
    flat = x.ravel().view(f'u{x.dtype.itemsize}').copy()
    flat[::100] += 1
    return flat.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize(
    ('section', 'wrong', 'case'),
    [
        ('encode', next_code, 'rmsprop'),
        ('step', off_by_two_ulps, 'rmsprop'),
        ('step', next_code, 'rmsprop-bfloat16'),
    ],
)
def test_a_wrong_result_of_the_device_is_missed(tmp_path, monkeypatch, section, wrong, case):
    right, device = correctness.taken_on, jax.devices()[0]

    def taken_on(where: Any, *arguments: Any) -> Any:
        found = right(where, *arguments)
        return jax.tree.map(lambda x: wrong(np.asarray(x)), found) if where == device else found

    chosen = tuple(one for one in correctness.CROSSED if one.name == case)
    monkeypatch.setattr(correctness, 'CROSSED', chosen)
    monkeypatch.setattr(correctness, 'taken_on', taken_on)
    status, result = run(tmp_path, '--sections', section)
    assert status == 1
    verdicts = {one['name']: one['verdict'] for one in result['rows']}
    assert verdicts['encode, uint8' if section == 'encode' else case] == MISSED


def test_a_wrong_trace_or_split_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(correctness, 'golden_error', lambda name: (float('nan'), 1.0))
    monkeypatch.setattr(correctness, 'drift', lambda name, steps: (float('nan'), 1.0))
    monkeypatch.setattr(correctness, '_on_mesh', lambda *_: Apart(statistics=1e3))
    status, result = run(tmp_path, '--sections', 'golden', 'long', 'sharding')
    assert status == 1
    verdicts = {(one['section'], one['name']): one['verdict'] for one in result['rows']}
    right = {('long', 'storage.bfloat16'), ('long', 'storage.uint8')}
    assert {what for what, verdict in verdicts.items() if verdict == MET} == right
    assert {verdict for what, verdict in verdicts.items() if what not in right} == {MISSED, NOT_RUN}


ONE = np.ones(10_000, np.float32)
BYTES = np.zeros(10_000, np.uint8)


def changed(x: np.ndarray, count: int, value: Any) -> np.ndarray:
    x = x.copy()
    x[:count] = value
    return x


@pytest.mark.parametrize(
    ('got', 'expected', 'within'),
    [
        (ONE, ONE, True),
        (changed(ONE, 1, 1 + 2.0**-23), ONE, True),
        (changed(ONE, 1, 1 + 2.0**-22), ONE, False),
        (changed(ONE, 1, np.nan), ONE, False),
        (changed(ONE, 1, np.nan), changed(ONE, 1, np.nan), True),
        (changed(ONE, 1, np.inf), changed(ONE, 1, -np.inf), False),
        (ONE.astype(np.float64), ONE, False),
        (ONE[:1], ONE, False),
        (changed(BYTES, 10, 1), BYTES, True),
        (changed(BYTES, 11, 1), BYTES, False),
        (changed(BYTES, 1, 2), BYTES, False),
        (changed(ONE, 1, -1).astype(jnp.bfloat16), ONE.astype(jnp.bfloat16), False),
        (changed(ONE, 1, 1 + 2.0**-7).astype(jnp.bfloat16), ONE.astype(jnp.bfloat16), True),
        (np.int32(3), np.int32(3), True),
        (np.int32(3), np.int32(4), False),
        ((), (ONE,), False),
    ],
)
def test_a_step_may_differ_by_one_ulp_or_one_code(got, expected, within):
    assert apart((expected, None), (got, None), (expected, None)).within == within


def test_statistics_have_a_bound_of_their_own():
    limit = changed(ONE, 1, 1 + STATISTIC_ULPS * 2.0**-23)
    assert apart((None, ONE), (None, limit), (None, ONE)).within
    assert not apart((None, ONE), (None, limit + 2.0**-23), (None, ONE)).within
    # A sum that is small by cancellation is measured by what it was before.
    small = np.float32(2.0**-20) * ONE
    assert apart((None, ONE), (None, small + 2.0**-23), (None, small)).within
    assert not apart((None, small), (None, small + 2.0**-23), (None, small)).within


def test_what_did_not_run_has_not_passed():
    def raises(error: Exception) -> str:
        def check() -> Any:
            raise error

        return row('step', 'a case', 'a bound', check).verdict

    assert raises(NotRunError('there is one device')) == NOT_RUN
    assert raises(RuntimeError('RESOURCE_EXHAUSTED: out of memory')) == NOT_RUN
    assert raises(RuntimeError('anything else')) == MISSED
    assert raises(AssertionError()) == MISSED
    assert row('step', 'a case', 'a bound', lambda: ({}, False)).verdict == MISSED


class Card(NamedTuple):
    """A device with so much memory."""

    platform: str = 'gpu'
    memory: int = 10**9

    def memory_stats(self) -> dict[str, int]:
        return {'bytes_limit': self.memory}


ON_CARD = speed.Setup(Card(), quick=True, torch=None)


@pytest.mark.parametrize(('factor', 'verdict'), [(0.9, MET), (1.05, MET), (1.2, MISSED)])
def test_an_accelerator_is_judged_beside_optax_and_its_noise(factor, verdict):
    base, again = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.1, 1.1]
    ours = [factor] * 4
    seconds = {'rmsprop_jax': ours, 'optax': base, 'optax again': again}
    assert speed.against_optax(ON_CARD, 'steps', 'a leaf', seconds).verdict == verdict
    # Without room for Optax's second program nothing is put down to noise.
    strict = speed.against_optax(ON_CARD, 'steps', 'a leaf', {**seconds, 'optax again': base})
    del seconds['optax again']
    assert speed.against_optax(ON_CARD, 'steps', 'a leaf', seconds) == strict
    assert strict.verdict == (MET if factor <= 1 else MISSED)
    on_cpu = speed.Setup(Card('cpu'), quick=True, torch=None)
    assert speed.against_optax(on_cpu, 'steps', 'a leaf', seconds).verdict == NOT_JUDGED


@pytest.mark.parametrize(('ours', 'verdict'), [(1.1, MET), (1.12, MISSED)])
def test_a_step_must_move_bytes_as_a_copy_does(ours, verdict):
    seconds = {'rmsprop_jax': [ours] * 4, 'copy': [1.0] * 4}
    found = speed.beside_copy(ON_CARD, 'a leaf', seconds, 2 * 10**9)
    assert found.verdict == verdict
    assert found.measured['copy GB/s'] == 2


@pytest.mark.parametrize(('time', 'verdict'), [(0.75, MET), (0.77, MISSED)])
def test_a_format_must_save_time_as_it_saves_bytes(time, verdict):
    """14 bytes for 20 save 0.3 of them, and 0.8 of that is 0.24."""
    moved = {'float32': 20, 'uint8': 14}
    seconds = {'float32': [1.0] * 4, 'uint8': [time] * 4, 'copy': [1.0] * 4}
    (found,) = speed.beside_float32(ON_CARD, 'a leaf', 1, moved, seconds)
    assert found.verdict == verdict


def test_what_does_not_fit_is_not_run():
    small = speed.Setup(Card(memory=1000), quick=True, torch=None)
    rows = [*speed.steps(small), *speed.compact(small)]
    assert {one.verdict for one in rows} == {NOT_RUN}
    assert 'the device has' in rows[0].why


def test_a_copy_reads_and_writes_each_byte(monkeypatch):
    monkeypatch.setattr(speed.Copy, 'LARGEST', 100)
    copy = speed.Copy(8 * 250)
    copy.place()
    assert copy.run(3) > 0
    assert [x.size for x in copy.xs] == [100, 100, 50]
    assert all((x == -1).all() for x in copy.xs)


def test_the_bytes_of_a_step_are_those_of_the_page():
    """20, 28 and 36 bytes a parameter, as docs/backends.md has them."""
    found = {}
    for name, options in works.VARIANTS.items():
        found[name] = jax_steps.prepare('rmsprop_jax', [(64, 64)], options).bytes_moved // 64**2
    assert found == {'plain': 20, 'momentum': 28, 'centered, momentum': 36}


def test_without_an_accelerator_only_quick_runs(capsys):
    assert command.main([]) == 2
    assert 'finds no accelerator' in capsys.readouterr().out
