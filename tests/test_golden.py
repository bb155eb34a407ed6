"""Each dialect against traces that its framework itself recorded, step for step.

The traces are made by `make golden`, in environments without JAX. Gradients are drawn from a seed
on both sides; the traces hold the parameters after 1, 2, 3, 10, ... up to 1000 steps.
"""

import re

import numpy as np
import pytest
from golden.problems import fingerprint, problem
from replaying import CONFIGURATIONS, GOLDEN, golden_error, recorded, trace

# bitsandbytes and the centered forms below compute in float32 only.
WIDE = [n for n, c in CONFIGURATIONS.items() if c['dtype'] == 'float64']
NARROW = [n for n in CONFIGURATIONS if n.endswith(' in float32')]
NEARLY_CONSTANT = [n for n, c in CONFIGURATIONS.items() if c['problem'] == 'nearly constant']
ONLY_NARROW = CONFIGURATIONS.keys() - {*WIDE, *NARROW, *NEARLY_CONSTANT}


def test_traces_are_those_of_the_configurations():
    traces, about = recorded()
    made = {c['name']: c for file in about for c in file['configurations']}
    assert made == CONFIGURATIONS
    assert traces.keys() == CONFIGURATIONS.keys()


def test_numpy_still_draws_the_recorded_gradients():
    found = {n: fingerprint(problem(c)) for n, c in CONFIGURATIONS.items()}
    assert found == {n: f for file in recorded()[1] for n, f in file['fingerprints'].items()}


def test_traces_were_made_by_the_required_versions():
    for file in recorded()[1]:
        text = (GOLDEN / 'requirements' / f'{file["family"]}.txt').read_text()
        required = dict(re.findall(r'^(\S+)==(\S+)$', text.replace('-', '_'), re.MULTILINE))
        for name, version in file['versions'].items():
            # Builds without CUDA add '+cpu'.
            assert version.partition('+')[0] == required[name.replace('-', '_')], name


# Every third one leaves each dialect several.
EXTENDED = [pytest.param(x, marks=pytest.mark.extended) for x in WIDE if x not in WIDE[::3]]


def assert_as_close_as_asked(name: str) -> None:
    error, limit = golden_error(name)
    assert error <= limit


@pytest.mark.parametrize('name', [*WIDE[::3], *EXTENDED])
def test_float64(name):
    assert np.isfinite(trace(name)).all()
    assert_as_close_as_asked(name)


LONG = [pytest.param(name, marks=pytest.mark.extended) for name in NARROW]


@pytest.mark.parametrize('name', [*LONG, *sorted(ONLY_NARROW)])
def test_float32(name):
    assert_as_close_as_asked(name)


@pytest.mark.extended
@pytest.mark.parametrize('name', NEARLY_CONSTANT)
def test_frameworks_turn_nan_where_we_stay_finite(name):
    assert not np.isfinite(trace(name)[-1]).all()
    assert_as_close_as_asked(name)
