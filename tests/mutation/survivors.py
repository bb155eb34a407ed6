"""Says which mutants no test noticed, after `mutmut run`; `equivalent.toml` lists those that may.

    python tests/mutation/survivors.py

It is run where mutmut was run, and fails if a mutant survived that is not listed, or if a listed
one is noticed or no more made. A mutant is known by its function and the lines that it changes.
"""

import subprocess
import sys
import sysconfig
import tomllib
from collections import Counter
from pathlib import Path

LISTED = Path(__file__).parent / 'equivalent.toml'
# A mutant that takes many times as long as the original is noticed by that. So is one with which a
# file of tests cannot be imported: pytest then ends as if it were interrupted.
NOTICED = ('killed', 'timeout', 'check was interrupted by user')


def mutmut(*arguments: str) -> str:
    command = Path(sysconfig.get_path('scripts')) / 'mutmut'
    return subprocess.run([command, *arguments], check=True, capture_output=True, text=True).stdout


def change(mutant: str) -> str:
    """`function: line -> line`, as it stands in the list."""
    lines = mutmut('show', mutant).splitlines()
    removed, added = (
        ' '.join(line[1:].strip() for line in lines if line[:1] == sign and line[:3] != 3 * sign)
        for sign in '-+'
    )
    function = mutant.removeprefix('rmsprop_jax.').rpartition('__mutmut_')[0]
    function = function.replace('.x_', '.').replace('.xǁ', '.').replace('ǁ', '.')
    return f'{function}: {removed} -> {added}'


def main() -> int:
    results = dict(
        line.strip().split(': ') for line in mutmut('results', '--all', '1').splitlines()
    )
    listed = tomllib.loads(LISTED.read_text())['equivalent']
    expected = Counter(key for entry in listed for key in entry['mutants'])
    counts = Counter(results.values())
    found = {}
    for mutant, status in results.items():
        if status not in (*NOTICED, 'not checked'):
            found[mutant] = change(mutant), status
    left = expected.copy()
    unlisted = 0
    for mutant, (key, status) in found.items():
        left[key] -= 1
        if status != 'survived' or left[key] < 0:
            unlisted += 1
            print(f'{status}: {mutant}\n    {key}')
    gone = [] if counts['not checked'] else list(left.elements())
    for key in gone:
        print(f'listed, but noticed or no more made: {key}')
    print(', '.join(f'{count} {status}' for status, count in counts.most_common()))
    return bool(unlisted or gone)


if __name__ == '__main__':
    sys.exit(main())
