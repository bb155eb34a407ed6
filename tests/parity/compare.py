"""Replays recorded draws with this package: one line for each framework, and an exit status."""

import json
import multiprocessing
import sys
from collections import defaultdict
from typing import Any

import jax
import numpy as np
from golden.problems import fingerprint, problem
from replaying import difference, replay

# Rounding: 24 steps of 1e-16 each, amplified where a framework subtracts to find a variance.
LIMIT = 1e-12
# bitsandbytes computes in float32 only; its roundings add up as a random walk does.
NARROW_LIMIT = 4 * 2.0**-24 * 24**0.5


def limit(configuration: dict[str, Any]) -> float:
    return LIMIT if configuration['dtype'] == 'float64' else NARROW_LIMIT


def compare(configuration: dict[str, Any], theirs: np.ndarray, drawn: str) -> float:
    """The largest relative difference; infinite where the two do not even compare."""
    if fingerprint(problem(configuration)) != drawn:
        print(f'{configuration["name"]}: the two NumPys draw different gradients')
        return float('inf')
    with jax.enable_x64(configuration['dtype'] == 'float64'):
        try:
            ours = replay(configuration)
        except Exception as error:
            # One failure must not hide the others.
            print(f'{configuration["name"]} raised {error!r}')
            return float('inf')
    same = ours.shape == theirs.shape and np.isfinite(theirs).all()
    found = difference(ours, theirs) if same else float('nan')
    return found if np.isfinite(found) else float('inf')


def main(paths: list[str]) -> int:
    # Most of the time goes into compiling, one configuration after another.
    with multiprocessing.get_context('spawn').Pool() as pool:
        failures = sum(compare_file(path, pool) for path in paths)
    print(f'{failures} failures')
    return 1 if failures else 0


def compare_file(path: str, pool: Any) -> int:
    """Prints a line for each framework of a file, and returns how many draws differ."""
    with np.load(path) as file:
        about = json.loads(str(file['about']))
        drawn = about['configurations']
        traces = [file[c['name']] for c in drawn]
    prints = [about['fingerprints'][c['name']] for c in drawn]
    found = defaultdict(list)
    worst = pool.starmap(compare, zip(drawn, traces, prints, strict=True), chunksize=4)
    for difference_, configuration in zip(worst, drawn, strict=True):
        found[configuration['framework']].append((difference_, configuration))
    print(', '.join(f'{n} {v}' for n, v in about['versions'].items()) + ':')
    for framework, results in found.items():
        largest = max(d for d, _ in results)
        print(f'  {framework}: {len(results)} configurations, worst difference {largest:.1e}')
        for d, configuration in results:
            if d > limit(configuration):
                print(f'    differs by {d:.1e}: {json.dumps(configuration)}')
    # A file without draws proves nothing.
    return sum(d > limit(c) for d, c in zip(worst, drawn, strict=True)) or int(not drawn)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
