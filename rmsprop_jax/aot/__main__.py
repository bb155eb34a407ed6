"""`python -m rmsprop_jax.aot`: compiles an optimizer's step and reports on the program."""

import ast
import inspect
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import rmsprop_jax
from rmsprop_jax import aot
from rmsprop_jax import storage as formats
from rmsprop_jax._command import OneLineParser, install
from rmsprop_jax.aot import _models
from rmsprop_jax.dialects._record import functions

_DIALECTS = functions()
_FACTORIES = {'rmsprop': rmsprop_jax.rmsprop, **_DIALECTS}
_FORMATS = sorted(
    name
    for name, thing in vars(formats).items()
    if inspect.isclass(thing) and issubclass(thing, formats.Format) and thing is not formats.Format
)
_WORDS = {'true': True, 'false': False, 'none': None}


def _parser() -> OneLineParser:
    made = OneLineParser(
        prog='python -m rmsprop_jax.aot',
        description='Compile one step of an optimizer (its update and its application to the '
        'parameters) from shapes alone, and print what the program does to memory: kernels per '
        'leaf, copies, bytes moved per parameter and the fewest possible, temporary memory, '
        "memory of the arguments, the compiler's own estimate of the time, and communication. "
        'All amounts are per device. Nothing is executed, and no accelerator is needed.',
        epilog='example: python -m rmsprop_jax.aot torch momentum=0.9 centered=true '
        '--model transformer-12 --target tpu-v5e --target cuda-h100',
        allow_abbrev=False,
    )
    made.add_argument(
        'optimizer',
        nargs='?',
        default='rmsprop',
        help=f'rmsprop (the default), a dialect ({", ".join(_DIALECTS)}), or optax.NAME',
    )
    made.add_argument(
        'options',
        nargs='*',
        metavar='KEY=VALUE',
        help='its arguments, such as momentum=0.9 or centered=true; the learning rate is 1e-3',
    )
    made.add_argument(
        '--storage',
        metavar='NAME',
        help=f'the storage format: {_either(_FORMATS)}, from rmsprop_jax.storage',
    )
    made.add_argument(
        '--model',
        action='append',
        metavar='NAME',
        help='resnet50, transformer-12 (or another number of layers), or the shape of one leaf '
        '(default: 4096x4096); may be repeated',
    )
    made.add_argument(
        '--dtype', default='float32', help='dtype of the parameters (default: float32)'
    )
    made.add_argument(
        '--target',
        action='append',
        choices=[*aot.targets(), 'all'],
        help='what to compile for; may be repeated (default: all whose compiler is installed)',
    )
    made.add_argument(
        '--topology',
        help='several devices, over which parameters are replicated: TPU chips such as 4x4 (v5e, '
        'v6e) or 4x4x4 (v4, v5p, 7x), a number of GPUs, or slices x hosts x GPUs such as 1x2x8',
    )
    made.add_argument('--hlo', action='store_true', help='print the programs too')
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`. On bad input it exits with code 2 and a one-line message."""
    command = _parser()
    given = command.parse_args(argv)
    # Otherwise plug-ins look for their hardware, and complain.
    if 'JAX_PLATFORMS' not in os.environ:
        jax.config.update('jax_platforms', 'cpu')
    try:
        tx = _optimizer(given.optimizer, given.options, given.storage)
        dtype = jnp.dtype(given.dtype)
        models = {name: _models.shapes(name, dtype) for name in given.model or ['4096x4096']}
        steps = list(itertools.product(_targets(given.target), models))
        reports = [
            aot.compile_update(tx, models[name], target=target, topology=given.topology)
            for target, name in steps
        ]
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        command.error(str(error))
    if given.hlo:
        print('\n\n'.join(report.text() for report in reports))
    print(aot.table(reports, [name for _, name in steps]))
    return 0


def _targets(chosen: Sequence[str] | None) -> list[str]:
    """The requested targets, or by default those whose compiler is installed."""
    if chosen:
        return list(aot.targets()) if 'all' in chosen else list(chosen)
    found = []
    missing: dict[str, None] = {}
    for name in aot.targets():
        try:
            aot.devices(name)
            found.append(name)
        except aot.MissingPluginError as error:
            missing[error.extra] = None
    if missing:
        print(f'for TPUs and GPUs: {install(",".join(missing))}', file=sys.stderr)
    return found


def _optimizer(name: str, options: Sequence[str], storage: str | None) -> Any:
    """The optimizer of that name, with a default learning rate if the options have none."""
    if '=' in name:
        name, options = 'rmsprop', [name, *options]
    make = _factory(name)
    arguments = dict(map(_option, options))
    parameters = list(inspect.signature(make).parameters)
    if parameters[0] in ('lr', 'learning_rate'):
        arguments.setdefault(parameters[0], 1e-3)
    if storage is not None:
        if storage not in _FORMATS:
            raise ValueError(f'storage must be {_either(_FORMATS)}, got {storage!r}.')
        arguments['storage'] = getattr(formats, storage)()
    return make(**arguments)


def _factory(name: str) -> Any:
    if name in _FACTORIES:
        return _FACTORIES[name]
    if name.startswith('optax.') and hasattr(optax, name.removeprefix('optax.')):
        return getattr(optax, name.removeprefix('optax.'))
    raise ValueError(f'optimizer must be {_either([*_FACTORIES, "optax.NAME"])}, got {name!r}.')


def _either(names: Sequence[str]) -> str:
    return f'{", ".join(names[:-1])} or {names[-1]}'


def _option(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition('=')
    if not separator:
        raise ValueError(f'options are KEY=VALUE, got {text!r}.')
    if value.lower() in _WORDS:
        return key, _WORDS[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        raise ValueError(f'{text!r} must give a number, true, false or none.') from None


if __name__ == '__main__':
    sys.exit(main())
