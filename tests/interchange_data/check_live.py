"""Moves runs both ways between JAX and an installed framework, halfway, and compares the ends.

In `tests/`, the first and the last line where JAX is, the middle one where the framework is (the
two need not be in one environment)::

    python -m interchange_data.check_live write torch ours.npz
    python -m interchange_data.frameworks torch theirs.npz ours.npz
    python -m interchange_data.check_live compare torch theirs.npz

`write` trains the first half here and hands over; `compare` takes over theirs, trains the second
half, and fails if either run ends more than 1e-10 from the one that never moved.
"""

import sys

import jax
import numpy as np

from interchange_data import ours, problem

EXACT = 1e-10
CASES = {
    'torch': ('net', 'complex'),
    'keras': tuple(problem.KERAS),
    'tensorflow': tuple(problem.TENSORFLOW),
}


def start(case: str) -> dict[str, np.ndarray]:
    return problem.net_params() if case == 'net' else problem.params(case == 'complex')


def write(framework: str, target: str) -> None:
    arrays: dict[str, np.ndarray] = {}
    for case in CASES[framework]:
        # Of the recorded state only what is no moment is used: groups and the learning rate.
        theirs = problem.read(problem.FOLDER / f'{framework}.npz', case)['state']
        arrays |= problem.flat(case, ours.port(framework, case, theirs).starts_here(start(case)))
    np.savez(target, **arrays)  # pyright: ignore[reportArgumentType]


def compare(framework: str, recording: str) -> None:
    failed = []
    for case in CASES[framework]:
        recorded = problem.read(recording, case)
        here = ours.port(framework, case, recorded['state']).goes_on_here(recorded)
        for way, found in (('to us', here), ('to them', recorded['continued'])):
            deviation = ours.worst(found, recorded['end'])
            label = f'{framework} {case} {way}'
            print(f'{label:30}{deviation:.1e}')
            failed += [label] * (not deviation < EXACT)
    if failed:
        sys.exit(f'more than {EXACT} apart: {", ".join(failed)}')


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    {'write': write, 'compare': compare}[sys.argv[1]](*sys.argv[2:])
