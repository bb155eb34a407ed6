"""Each dialect against traces that its framework itself recorded, step for step.

The traces are made by `make golden`, in environments without JAX. Gradients are drawn from a seed
on both sides; the traces hold the parameters after 1, 2, 3, 10, ... up to 1000 steps.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from golden.configurations import golden_configurations
from golden.problems import fingerprint, problem
from replaying import difference, replay

GOLDEN = Path(__file__).parent / 'golden'
CONFIGURATIONS = {c['name']: c for c in golden_configurations()}
# bitsandbytes and the centered forms below compute in float32 only.
WIDE = [n for n, c in CONFIGURATIONS.items() if c['dtype'] == 'float64']
NARROW = [n for n in CONFIGURATIONS if n.endswith(' in float32')]
NEARLY_CONSTANT = [n for n, c in CONFIGURATIONS.items() if c['problem'] == 'nearly constant']
ONLY_NARROW = CONFIGURATIONS.keys() - {*WIDE, *NARROW, *NEARLY_CONSTANT}


@functools.cache
def recorded() -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """All traces by name, and what each file says about itself."""
    traces, about = {}, []
    for path in sorted(GOLDEN.glob('*.npz')):
        with np.load(path) as file:
            about.append(json.loads(str(file['about'])) | {'family': path.stem})
            traces |= {name: file[name] for name in file.files if name != 'about'}
    return traces, about


def trace(name: str) -> np.ndarray:
    return recorded()[0][name]


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


# Every second one leaves each dialect several.
EXTENDED = [pytest.param(name, marks=pytest.mark.extended) for name in WIDE[1::2]]


@pytest.mark.parametrize('name', [*WIDE[::2], *EXTENDED])
def test_float64(name):
    """The same to 1e-12 after every number of steps, which leaves rounding only: a step of a
    thousand rounds by 1e-16, and where errors add up they reach 1e-14."""
    with jax.enable_x64(True):
        ours = replay(CONFIGURATIONS[name])
    theirs = trace(name)
    assert ours.shape == theirs.shape
    assert np.isfinite(theirs).all()
    assert difference(ours, theirs) <= 1e-12


@pytest.mark.parametrize('name', NARROW)
def test_float32(name):
    """In float32 we are as close to the framework's float64 as its own float32 is. Two walks of a
    thousand roundings each have a root mean square that differs by chance, hence the factor."""
    exact = trace(name.removesuffix(' in float32'))
    ours, theirs = replay(CONFIGURATIONS[name]) - exact, trace(name) - exact
    assert 0 < np.sqrt(np.mean(ours**2)) <= 1.5 * np.sqrt(np.mean(theirs**2))


@pytest.mark.parametrize('name', sorted(ONLY_NARROW))
def test_float32_without_a_float64_trace(name):
    """Roundings of 2^-24 of the parameter add up as a random walk does; four deviations."""
    configuration = CONFIGURATIONS[name]
    limit = 4 * 2.0**-24 * configuration['steps'] ** 0.5
    assert difference(replay(configuration), trace(name)) <= limit


@pytest.mark.extended
@pytest.mark.parametrize('name', NEARLY_CONSTANT)
def test_frameworks_turn_nan_where_we_stay_finite(name):
    assert not np.isfinite(trace(name)[-1]).all()
    ours = replay(CONFIGURATIONS[name])
    assert np.isfinite(ours).all()
    # And right: a mean rounded by 2^-24 of itself, and deviations from it of 1e-5.
    with jax.enable_x64(True):
        exact = replay(CONFIGURATIONS[name] | {'dtype': 'float64', 'float32 inputs': True})
    assert difference(ours, exact) <= 2.0**-24 / 1e-5
