"""`python -m rmsprop_jax.identify trace.npz`."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rmsprop_jax._command import OneLineParser
from rmsprop_jax.identify import identify_dialect
from rmsprop_jax.identify._verdict import Outcome

EXIT_CODES: dict[Outcome, int] = {'settled': 0, 'several': 1, 'unexplained': 3, 'degenerate': 4}


def _parser() -> OneLineParser:
    made = OneLineParser(
        prog='python -m rmsprop_jax.identify',
        description='Find out which RMSProp made a recorded run. Hyperparameters that you do not '
        'give are read from the file, or else fitted.',
        epilog='Exit codes: 0, one dialect remains or all facts are settled; 1, several '
        'combinations remain; 2, the trace or an option cannot be read; 3, no candidate explains '
        'the run; 4, the run is explained, but need not be RMSProp (for example, SGD explains it '
        'too). This takes about ten seconds, or longer if weight decay is fitted.',
        allow_abbrev=False,
    )
    made.add_argument(
        'trace',
        type=Path,
        help='.npz file with the arrays params/NAME of shape (steps + 1, ...), gradients/NAME of '
        'shape (steps, ...), learning_rate of shape (steps,) or (), and, if known, the scalars '
        'decay, eps, momentum, weight_decay. It must begin with the first step of the optimizer.',
    )
    helps = {
        'learning-rate': 'one learning rate for all steps',
        'decay': 'weight of the past in the running averages (alpha, rho), in [0, 1)',
        'eps': 'epsilon, as passed to the framework',
        'momentum': 'momentum, in [0, 1); 0 means none',
        'tolerance': 'relative error of the recorded gradients, if it is larger than rounding',
    }
    for name, text in helps.items():
        made.add_argument(f'--{name}', type=float, metavar='X', help=text)
    made.add_argument(
        '--weight-decay',
        metavar='X|fit',
        help='weight decay, or "fit" to fit it (default: the value in the file, or else none)',
    )
    made.add_argument('--json', action='store_true', help='print everything as JSON')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit code of its outcome.

    On bad input it exits with code 2 and a one-line message.
    """
    command = _parser()
    options = vars(command.parse_args(argv))
    path, as_json = options.pop('trace'), options.pop('json')
    try:
        found = identify_dialect(path, **options)
    except (OSError, ValueError) as error:
        command.error(str(error))
    print(json.dumps(found.as_dict(), indent=1, allow_nan=False) if as_json else found)
    return EXIT_CODES[found.outcome]


if __name__ == '__main__':
    sys.exit(main())
