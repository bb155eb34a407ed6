"""The arithmetic of benchmarks/storage: what it calls an error, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.storage.metrics import (
    WARM_UP,
    exact_steps,
    moment_errors,
    paired,
    signed_errors,
    step_errors,
)
from benchmarks.storage.report import parameters_table, pooled, table
from benchmarks.storage.streams import STEPS, Stream

pytestmark = pytest.mark.extended


def test_exact_steps_on_a_constant_gradient():
    steps = list(exact_steps([np.array([2.0, -2.0])] * 3, decay=0.5, eps=1.0))
    roots = 2 * np.sqrt([0.5, 0.75, 0.875])
    np.testing.assert_allclose([step[0] for step in steps], 2 / (roots + 1))
    np.testing.assert_allclose([step[1] for step in steps], -2 / (roots + 1))


def test_moment_errors_are_of_the_root_and_leave_out_what_never_moved():
    truth = np.array([1.0, 4.0, 9.0, 0.0])
    errors = moment_errors(truth * np.array([1.21, 1.0, 0.81, 1.0]) + [0, 0, 0, 5], truth)
    assert errors['median'] == pytest.approx(0.1)
    assert errors['max'] == pytest.approx(0.1)
    assert errors['bias'] == pytest.approx(0.02 / 3)


def test_signed_errors_are_in_each_entrys_unit():
    truth, unit = np.array([1.0, -10.0, 3.0]), np.array([1.0, 10.0, 0.0])
    errors = signed_errors(truth * 1.1, truth, unit)
    assert errors['max'] == pytest.approx(0.1)
    assert errors['bias'] == pytest.approx(0.1)
    assert errors['bias_se'] == pytest.approx(0, abs=1e-12)


def test_step_errors_know_small_steps_from_large_ones():
    truth = np.ones((WARM_UP + 2, 3)) * [0.01, 1.0, 0.0]
    steps = truth * 1.0
    steps[0] = 100
    steps[-1] = [-0.05, 2.0, 7.0]
    errors = step_errors(steps, truth)
    assert errors['worst'] == pytest.approx(5)
    assert errors['worst_large'] == pytest.approx(2)


def test_paired_differences():
    found = paired(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]))
    assert found['difference'] == pytest.approx(4 / 3)
    assert found['se'] == pytest.approx(np.std([0, 1, 3], ddof=1) / np.sqrt(3))


@pytest.fixture(scope='module')
def sizes():
    """Median sizes of gradients over 200 steps at the start and 200 after the change."""
    stream = jax.jit(Stream(1, rows=64, columns=64, size=1.0, decades=0.0))
    starts = np.r_[0:200, STEPS // 2 : STEPS // 2 + 200]
    return np.stack([stream(step) for step in starts]).reshape(2, 200, 64, 64)


def test_gradients_change_their_size_at_half_time(sizes):
    median = np.median(np.abs(sizes[:, :, 16:]), axis=(1, 2))
    growth = median[1] / median[0]
    np.testing.assert_allclose(growth[:32], 100, rtol=0.3)
    np.testing.assert_allclose(growth[32:], 0.01, rtol=0.3)


def test_a_quarter_of_the_rows_is_mostly_silent(sizes):
    awake = np.any(sizes != 0, axis=3).mean(axis=(0, 1))
    assert np.all(awake[:16] < 0.06)
    assert 0.01 < awake[:16].mean() < 0.03
    assert np.all(awake[16:] == 1)


def test_gradients_stay_finite_in_a_narrow_dtype():
    stream = Stream(1, rows=4, columns=64, size=1e6, dtype='float16')
    gradient = stream(0)
    assert gradient.dtype == jnp.float16
    assert jnp.isfinite(gradient).all()


def test_seeds_are_pooled_by_their_worst_step_and_their_mean_error():
    common = {'format': 'uint8', 'bias_se': 3.0}
    records = [
        common | {'seed': 1, 'median': 0.1, 'worst': 2.0},
        common | {'seed': 2, 'median': 0.3, 'worst': 5.0},
    ]
    (record,) = pooled(records, ['format'])
    assert record['median'] == pytest.approx(0.2)
    assert record['worst'] == 5
    assert record['bias_se'] == pytest.approx(3 / np.sqrt(2))
    assert table([record], {'format': 'format', 'largest': lambda r: f'{r["worst"]:g}'}) == (
        '| format | largest |\n| --- | --- |\n| uint8 | 5 |'
    )


def test_both_series_of_seeds_are_beside_each_other():
    record = {'task': 'digits', 'format': 'bfloat16', 'bytes': 6, 'losses': [1.0, 2.0]}
    first = {'difference': 0.5, 'se': 0.25}
    second = {'second_difference': -0.25, 'second_se': 0.125}
    lines = parameters_table([record, record | first | second]).splitlines()
    assert lines[-2] == '| digits | bfloat16 | 6 | 1.5000 |  |  |  |  |'
    assert lines[-1].endswith('| +0.5000 ± 0.2500 | +2.0 | -0.2500 ± 0.1250 | -2.0 |')
