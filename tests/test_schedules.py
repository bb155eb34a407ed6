"""The Optax expressions of docs/schedules.md give the rates that other frameworks have recorded."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

HERE = Path(__file__).parent
PAGE = (HERE.parent / 'docs' / 'schedules.md').read_text()
RECORDED = {
    code: rates
    for name in ('torch', 'keras')
    for code, rates in json.loads((HERE / 'golden' / f'schedules_{name}.json').read_text()).items()
}
ROWS = dict(re.findall(r'^\| `(.+)` \| `(.+)` \|$', PAGE, re.MULTILINE))
SETUP, IN_DOUBLE = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
NAMES: dict[str, object] = {}
exec(SETUP, NAMES)
exec(IN_DOUBLE, NAMES)


def rates(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(steps, dtype=jnp.int32)), np.float64)


def test_every_recorded_schedule_is_on_the_page():
    assert ROWS.keys() == RECORDED.keys()


@pytest.mark.extended
@pytest.mark.parametrize(('theirs', 'ours'), ROWS.items(), ids=ROWS)
def test_a_row(theirs, ours):
    expected = np.array(RECORDED[theirs])
    with jax.enable_x64(True):
        schedule = NAMES['in_double'](eval(ours, NAMES))
        np.testing.assert_allclose(rates(schedule, len(expected)), expected, 1e-12, 1e-17)
    for enabled in (False, True):
        with jax.enable_x64(enabled):
            found = rates(eval(ours, NAMES), len(expected))
        assert np.abs(found - expected).max() <= 2e-7 * expected.max()
