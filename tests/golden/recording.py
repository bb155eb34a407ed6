"""What the recorders of all frameworks share: the loop over steps, and the file they write.

A recorder names, for each optimizer, a function from a configuration and its problem to a `Step`.
It is run in an environment that holds the framework and NumPy:

    python -m golden.record_torch traces.npz                      the golden configurations
    python -m golden.record_torch traces.npz configurations.json  others
"""

import inspect
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from golden.configurations import golden_configurations
from golden.problems import (
    Arrays,
    Problem,
    fingerprint,
    flat,
    problem,
    recorded_steps,
)

Configuration = dict[str, Any]
# Takes the step's number, from 0, and returns the parameters after it.
Step = Callable[[int], Arrays]
Start = Callable[[Configuration, Problem], Step]


def trace(start: Start, configuration: Configuration) -> np.ndarray:
    """The parameters at the recorded steps, one row each."""
    given = problem(configuration)
    step = start(configuration, given)
    wanted = set(recorded_steps(configuration))
    rows = []
    for number in range(configuration['steps']):
        params = step(number)
        if number + 1 in wanted:
            rows.append(flat({name: np.array(p) for name, p in params.items()}))
    return np.stack(rows)


def signature(function: Callable[..., Any]) -> dict[str, str]:
    """The arguments of an optimizer and their defaults, as text."""
    return {
        name: 'required' if p.default is inspect.Parameter.empty else repr(p.default)
        for name, p in inspect.signature(function).parameters.items()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and name not in ('self', 'params', 'parameters')
    }


def main(
    starts: Mapping[str, Start],
    signatures: Mapping[str, dict[str, str]],
    distributions: Sequence[str],
) -> None:
    """Records every configuration whose framework is among `starts`."""
    target, *rest = sys.argv[1:]
    everything = json.loads(Path(rest[0]).read_text()) if rest else golden_configurations()
    mine = [c for c in everything if c['framework'] in starts]
    begun = time.monotonic()
    traces = {c['name']: trace(starts[c['framework']], c) for c in mine}
    about = {
        'versions': {name: version(name) for name in distributions},
        'signatures': dict(signatures),
        'configurations': mine,
        'fingerprints': {c['name']: fingerprint(problem(c)) for c in mine},
    }
    np.savez_compressed(target, about=np.array(json.dumps(about)), **traces)
    print(f'{Path(target).name}: {len(mine)} traces in {time.monotonic() - begun:.0f} s')
