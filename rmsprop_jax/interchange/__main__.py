"""`python -m rmsprop_jax.interchange checkpoint.pt`."""

import argparse
import contextlib
import importlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rmsprop_jax._command import OneLineParser
from rmsprop_jax.interchange._files import Checkpoint, read_checkpoint, shown
from rmsprop_jax.interchange._mapping import (
    AS_IS,
    KERNEL,
    InterchangeError,
    Layout,
    Pair,
    flattened,
)
from rmsprop_jax.interchange._port import (
    DIALECTS,
    as_schedules,
    ported,
    rates_of,
    read_template,
    settled,
    write_port,
)
from rmsprop_jax.interchange._propose import propose_pairs


def _parser() -> OneLineParser:
    made = OneLineParser(
        prog='python -m rmsprop_jax.interchange',
        description='List the contents of a PyTorch checkpoint, propose pairs with the parameters '
        'of a Flax model, and write parameters and optimizer state with Orbax.',
        epilog='Exit codes: 0, success; 1, something is missing, or only guessed without '
        '--accept-guesses; 2, a file or an option cannot be read. Read the folder with '
        'interchange.restore_port.',
        allow_abbrev=False,
    )
    made.add_argument(
        'checkpoint',
        type=Path,
        help='.safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt file',
    )
    made.add_argument(
        '--like',
        type=Path,
        metavar='JSON',
        help='the shapes of your model, as interchange.save_template writes them',
    )
    made.add_argument('--out', type=Path, metavar='FOLDER', help='a new folder to write')
    made.add_argument(
        '--accept-guesses', action='store_true', help='accept guessed pairs and names'
    )
    made.add_argument(
        '--pair',
        action='append',
        default=[],
        type=_pair,
        dest='known',
        metavar='THEIRS=OURS=LAYOUT',
        help='a pair that you know, such as fc.weight=fc/kernel=kernel; LAYOUT is as_is, kernel '
        '(axes swapped) or flattened:CHANNELS,HEIGHT,WIDTH',
    )
    made.add_argument(
        '--ignore', action='append', default=[], metavar='NAME', help='an array to leave out'
    )
    made.add_argument(
        '--names',
        type=Path,
        metavar='FILE',
        help="the parameters' names in the optimizer's order, one a line",
    )
    made.add_argument(
        '--fresh',
        action='append',
        default=[],
        metavar='NAME',
        help='a parameter without state that is trained from now on; others without state get no '
        'update',
    )
    made.add_argument(
        '--frozen',
        action='append',
        default=[],
        metavar='NAME',
        help='a parameter that gets no update',
    )
    made.add_argument(
        '--model', metavar='KEYS', help='the keys of the model in the file, such as ema/model'
    )
    made.add_argument('--optimizer', metavar='KEYS', help='the keys of the optimizer')
    made.add_argument('--dialect', choices=DIALECTS, help='the dialect of the optimizer')
    return made


def _pair(text: str) -> Pair:
    theirs, _, rest = text.partition('=')
    ours, _, layout = rest.partition('=')
    return Pair(theirs, ours, _layout(layout))


def _layout(text: str) -> Layout:
    kind, _, lengths = text.partition(':')
    if kind == 'flattened':
        return flattened(*(int(n) for n in lengths.split(',')))
    if text not in ('as_is', 'kernel'):
        raise argparse.ArgumentTypeError(f'{text!r} is not a layout')
    return AS_IS if text == 'as_is' else KERNEL


def _listing(path: Path, checkpoint: Checkpoint) -> Iterator[str]:
    """The contents of a file, line by line."""
    model, optimizer = (f' at {shown(x)!r}' if x else '' for x in checkpoint.places)
    arrays = checkpoint.arrays
    yield f'{shown(path.name)}: {len(arrays)} parameters and buffers{model}'
    for name, array in arrays.items():
        yield f'  {shown(name)}  {array.dtype} {array.shape}'
    if checkpoint.optimizer is None:
        yield 'no optimizer'
        return
    groups, state = (checkpoint.optimizer[key] for key in ('param_groups', 'state'))
    yield f'optimizer{optimizer}, parameter groups: {len(groups)}'
    for i, group in enumerate(groups):
        told = {key: x for key, x in group.items() if key not in ('params', 'param_names')}
        yield f'  group {i}: ' + ', '.join(f'{shown(str(k))}={x!r:.60}' for k, x in told.items())
        for number, name in itertools.zip_longest(group['params'], group.get('param_names', [])):
            entry = state.get(number, {})
            slots = [f'{shown(str(k))} {np.shape(x)}' for k, x in entry.items() if k != 'step']
            step = f', step {float(entry["step"]):g}' if 'step' in entry else ''
            yield (
                f'    {number}{f" {shown(name)}" if name else ""}: '
                + (', '.join(slots) or 'no state')
                + step
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit code of its outcome.

    On bad input it exits with code 2 and a one-line message.
    """
    command = _parser()
    options = command.parse_args(argv)
    if options.out is not None and options.like is None:
        command.error('--out needs --like')
    try:
        return _run(options)
    except (OSError, ValueError, TypeError, ImportError) as error:
        command.error(str(error))


def _run(options: argparse.Namespace) -> int:
    checkpoint = read_checkpoint(
        options.checkpoint, model=options.model, optimizer=options.optimizer
    )
    print(*_listing(options.checkpoint, checkpoint), sep='\n')
    if options.like is None:
        return 0
    params, buffers = read_template(options.like)
    proposal = propose_pairs(
        checkpoint.arrays, params, buffers, known=options.known, ignore=options.ignore
    )
    print(f'\npairs with {options.like}:\n{proposal}')
    given = options.names and options.names.read_text().splitlines()
    names, doubt, problems = settled(
        checkpoint, proposal, given, options.ignore, options.accept_guesses
    )
    if doubt is not None:
        print(doubt)
    if problems:
        print('\nnothing is written: something is missing, left over, or only guessed')
        return 1
    if options.out is None:
        return 0
    groups = (checkpoint.optimizer or {}).get('param_groups', [])
    with _wide_enough((params, buffers)):
        try:
            port, told = ported(
                checkpoint,
                params,
                buffers,
                proposal,
                as_schedules(rates_of(groups)),
                {
                    'names': names,
                    'fresh': options.fresh,
                    'frozen': options.frozen,
                    'dialect': DIALECTS.get(options.dialect),
                },
            )
        except InterchangeError as error:
            print(f'\n{error}')
            return 1
        write_port(options.out, port, told, options.dialect)
    print(f'\nwritten to {options.out}')
    return 0


def _wide_enough(template: Any) -> contextlib.AbstractContextManager[Any]:
    """Enables 64 bits in JAX if the template has them."""
    if all(x.dtype.name not in ('float64', 'complex128') for x in jax.tree.leaves(template)):
        return contextlib.nullcontext()
    # Before JAX 0.8 it is in jax.experimental.
    home = jax if hasattr(jax, 'enable_x64') else importlib.import_module('jax.experimental')
    return home.enable_x64(True)


if __name__ == '__main__':
    sys.exit(main())
