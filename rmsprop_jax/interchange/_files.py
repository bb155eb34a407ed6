"""Reads PyTorch's checkpoint files into NumPy arrays and plain values."""

import collections
import dataclasses
import importlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rmsprop_jax._command import install
from rmsprop_jax.interchange._mapping import InterchangeError

# Before 2.6 `weights_only=True` could be made to run code (CVE-2025-32434).
_OLDEST_TORCH = (2, 6)
# The limit of the safetensors package: a header is parsed before anything else is known.
_LONGEST_HEADER = 100_000_000
# The end of the name of an index, which says which array is in which file.
_INDEX = '.safetensors.index.json'
_DTYPES: dict[str, Any] = {
    'BOOL': np.bool_,
    **{f'U{bits}': f'<u{bits // 8}' for bits in (8, 16, 32, 64)},
    **{f'I{bits}': f'<i{bits // 8}' for bits in (8, 16, 32, 64)},
    **{f'F{bits}': f'<f{bits // 8}' for bits in (16, 32, 64)},
    'BF16': ml_dtypes.bfloat16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2,
    'C64': '<c8',
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The contents of a PyTorch checkpoint.

    Attributes:
      arrays: The model's parameters and buffers by name, in the order of the file.
      optimizer: The optimizer's state dictionary, or None if the file has none.
      places: The keys under which the two were found, such as `'model/state_dict'`; '' is the top
        level, and None means none.
    """

    arrays: Mapping[str, np.ndarray]
    optimizer: Mapping[str, Any] | None = None
    places: tuple[str, str | None] = ('', None)


def read_checkpoint(
    path: str | os.PathLike[str], *, model: str | None = None, optimizer: str | None = None
) -> Checkpoint:
    """Reads a `.safetensors` file, or a PyTorch file (`.pt`, `.pth`, `.bin`, `.ckpt`).

    PyTorch files need PyTorch 2.6 or newer. They are read by `torch.load(weights_only=True)`, which
    accepts tensors and plain values only. Safetensors files need nothing else, and hold no
    optimizer. A model in several of them is read through its index,
    `model.safetensors.index.json`: the files must be beside it and hold what it says, no more.

    Args:
      path: The file, or the index.
      model: The keys of the model's state dictionary in a PyTorch file, such as
        `'ema/state_dict'`. None finds it if there is only one.
      optimizer: The same for the optimizer's state dictionary.

    Raises:
      InterchangeError: If a file is damaged, missing or holds something else, or if it has several
        state dictionaries and the argument does not say which one is meant.
      FileNotFoundError: If `path` is not a file.
      ImportError: If PyTorch is needed and is missing or too old.

    Source: PyTorch 2.13, torch/serialization.py; safetensors 0.8.0, README.md, "Format".

    Example:
      >>> import json, pathlib, tempfile
      >>> from rmsprop_jax import interchange
      >>> header = {'w': {'dtype': 'U8', 'shape': [3], 'data_offsets': [0, 3]}}
      >>> text = json.dumps(header).encode()
      >>> path = pathlib.Path(tempfile.mkdtemp(), 'model.safetensors')
      >>> _ = path.write_bytes(len(text).to_bytes(8, 'little') + text + bytes([1, 2, 3]))
      >>> print(interchange.read_checkpoint(path).arrays['w'])
      [1 2 3]
    """
    for name, value in (('model', model), ('optimizer', optimizer)):
        if not isinstance(value, str | None):
            raise TypeError(f'{name} must be keys such as "a/b", or None, got {value!r}.')
    path = checked_path('path', path)
    if not os.path.isfile(path):  # Which does not raise, whatever the name is.
        raise FileNotFoundError(f'{shown(str(path))} is not a file.')
    if path.name.endswith(('.safetensors', _INDEX)):
        if model is not None or optimizer is not None:
            raise ValueError('model and optimizer are for PyTorch files: safetensors has no keys.')
        is_index = path.name.endswith(_INDEX)
        return Checkpoint((_read_shards if is_index else _read_safetensors)(path))
    if path.suffix in ('.pt', '.pth', '.bin', '.ckpt'):
        return _found(path, _read_torch(path), model, optimizer)
    wanted = (
        f'path must end in .safetensors, {_INDEX}, .pt, .pth, .bin or .ckpt, got '
        f'{shown(path.name)}.'
    )
    if path.suffix in ('.keras', '.h5', '.hdf5'):
        wanted += ' Keras reads its own files, with keras.saving.load_model: see interchange.keras.'
    raise ValueError(wanted)


def checked_path(name: str, value: Any) -> Path:
    """Returns `value` as a path."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(f'{name} must be a path, got {value!r}.') from None


def shown(name: str) -> str:
    """A name from a file, with control characters escaped."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _damaged(path: Path, *problems: str) -> InterchangeError:
    return InterchangeError(f'{shown(str(path))} cannot be read', problems)


def json_object(text: bytes) -> dict[str, Any]:
    """Parses JSON from a file.

    Raises:
      ValueError: If it is not an object, or has a name twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(parsed, dict):
        raise ValueError('it is not a JSON object')
    return parsed


def _read_shards(path: Path) -> dict[str, np.ndarray]:
    """The arrays of several files, in the order of their index."""
    try:
        if (size := path.stat().st_size) > _LONGEST_HEADER:
            raise ValueError(f'it has {size} bytes, more than {_LONGEST_HEADER}')
        places = json_object(path.read_bytes()).get('weight_map')
        is_map = isinstance(places, dict) and all(isinstance(x, str) for x in places.values())
        if not is_map or not places:
            raise ValueError('it has no weight_map of names to files')
    except ValueError as error:
        raise _damaged(path, f'it is not an index of shards: {error}') from None
    arrays: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for file in dict.fromkeys(places.values()):
        if file in ('', '.', '..') or not {*file}.isdisjoint('/\\'):
            problems.append(f'{file!r} is not the name of a file beside it')
        elif not os.path.isfile(path.parent / file):
            problems.append(f'{file!r} is missing')
        else:
            found = _read_safetensors(path.parent / file)
            named = {name for name, place in places.items() if place == file}
            problems += [f'{file!r} has no {name!r}' for name in sorted(named - found.keys())]
            problems += [
                f'{file!r} has {name!r}, which the index does not name there'
                for name in sorted(found.keys() - named)
            ]
            arrays |= found
    if problems:
        raise _damaged(path, *problems)
    return {name: arrays[name] for name in places}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays, which stay in the file until they are used."""
    size = path.stat().st_size
    if size < 8:
        raise _damaged(path, f'it has {size} bytes, and the length of the header alone takes 8')
    data = np.memmap(path, np.uint8, 'r')
    length = int.from_bytes(data[:8].tobytes(), 'little')
    if length > min(size - 8, _LONGEST_HEADER):
        raise _damaged(
            path,
            f'its header is said to have {length} bytes, but the file has {size} and headers have '
            f'at most {_LONGEST_HEADER}: it is cut off, or not a safetensors file',
        )
    try:
        header = json_object(data[8 : 8 + length].tobytes())
    except ValueError as error:
        raise _damaged(path, f'its header is not one of safetensors: {error}') from None
    header.pop('__metadata__', None)
    buffer = data[8 + length :]
    arrays: dict[str, np.ndarray] = {}
    end = 0
    try:
        entries = {name: _entry(name, entry) for name, entry in header.items()}
        for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda x: x[1][2:]):
            if begin != end:
                raise ValueError(
                    f'{shown(name)!r} begins at byte {begin}, but the data before it ends at byte '
                    f'{end}'
                )
            if stop > buffer.size:
                raise ValueError(
                    f'{shown(name)!r} ends at byte {stop} of {buffer.size}: the file is cut off'
                )
            raw = buffer[begin:stop]
            if dtype == np.bool_ and (raw > 1).any():
                raise ValueError(f'{shown(name)!r} has bytes other than 0 and 1 as booleans')
            arrays[name] = np.asarray(raw).view(dtype).reshape(shape)
            end = stop
        if end != buffer.size:
            raise ValueError(f'{buffer.size - end} bytes at its end belong to no array')
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    return {name: arrays[name] for name in header}


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, number in collections.Counter(name for name, _ in pairs).items():
        if number > 1:
            raise ValueError(f'it has {shown(name)!r} {number} times')
    return dict(pairs)


def _entry(name: str, entry: Any) -> tuple[np.dtype, list[int], int, int]:
    """The dtype, shape, begin and end of an array.

    Raises:
      ValueError: If the entry is incomplete or contradicts itself.
    """
    name = shown(name)
    if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{name!r} must have dtype, shape and data_offsets, and nothing else')
    if not isinstance(entry['dtype'], str) or entry['dtype'] not in _DTYPES:
        raise ValueError(f'{name!r} has an unsupported dtype, {entry["dtype"]!r:.40}')
    shape, offsets = entry['shape'], entry['data_offsets']
    for key, value in (('shape', shape), ('data_offsets', offsets)):
        whole = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
        if not whole:
            raise ValueError(f'{key} of {name!r} is not a list of lengths')
    if len(offsets) != 2:
        raise ValueError(f'data_offsets of {name!r} must be two numbers, got {len(offsets)}')
    if len(shape) > 32:
        raise ValueError(f'{name!r} has {len(shape)} axes')
    dtype, (begin, stop) = np.dtype(_DTYPES[entry['dtype']]), offsets
    if stop - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f'{name!r} has {stop - begin} bytes, but its shape {tuple(shape)} of {dtype} takes '
            f'{math.prod(shape) * dtype.itemsize}'
        )
    return dtype, shape, begin, stop


def _torch() -> Any:
    try:
        torch = importlib.import_module('torch')
    except ImportError:
        raise ImportError(
            f'PyTorch files need PyTorch: pip install torch, or {install("torch")}. Or save the '
            'parameters as safetensors, which needs no other package.'
        ) from None
    release = re.match(r'(\d+)\.(\d+)', str(torch.__version__))
    if release is None or tuple(map(int, release.groups())) < _OLDEST_TORCH:
        raise ImportError(
            f'PyTorch files need PyTorch 2.6 or newer, found {torch.__version__}: before that, '
            'torch.load(weights_only=True) could be made to run code (CVE-2025-32434).'
        )
    return torch


def _read_torch(path: Path) -> Any:
    """The file's object, with every tensor an array."""
    torch = _torch()
    try:
        loaded = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # PyTorch documents none, and raises many.
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())
        found = re.search(r'Unsupported (global|class).*?(?= Please| Use|$)', reason)
        problem = f'torch.load cannot read it as a PyTorch file ({reason[:200]})'
        if found is not None:
            problem = (
                'it contains more than tensors and plain values. Such a file is not loaded, since '
                f'it could run code: save state dictionaries only. PyTorch says: {found[0][:200]}'
            )
        raise _damaged(path, problem) from None
    try:
        return _Plain(path, torch).of(loaded, '')
    except RecursionError:
        raise _damaged(path, 'its containers are nested too deeply') from None


class _Plain:
    """Makes arrays of the tensors in containers, which become dictionaries and lists."""

    def __init__(self, path: Path, torch: Any):
        self.path, self.torch = path, torch
        # By identity: a container that is in another one many times is converted once.
        self._made: dict[int, Any] = {}

    def of(self, value: Any, place: str) -> Any:
        if id(value) not in self._made:
            self._made[id(value)] = self._of(value, place)
        return self._made[id(value)]

    def _of(self, value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return {key: self.of(x, f'{place}/{key}') for key, x in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(x, f'{place}/{i}') for i, x in enumerate(value)]
        return self._array(value, place) if isinstance(value, self.torch.Tensor) else value

    def _array(self, tensor: Any, place: str) -> np.ndarray:
        try:
            size, most = tensor.numel() * tensor.element_size(), self.path.stat().st_size
            if size > most:  # Some of its strides are zero.
                raise ValueError(f'it would take {size} bytes, and the whole file has {most}')
            # NumPy has neither bfloat16 nor float8; float32 holds all of their numbers.
            usual = (self.torch.float16, self.torch.float32, self.torch.float64)
            if tensor.is_floating_point() and tensor.dtype not in usual:
                tensor = tensor.float()
            return tensor.detach().resolve_conj().resolve_neg().numpy()
        except (ValueError, TypeError, RuntimeError) as error:
            raise _damaged(self.path, f'{shown(place[1:])} cannot be an array: {error}') from None


def _is_arrays(value: Any) -> bool:
    """Whether this is the state dictionary of a model."""
    return (
        isinstance(value, dict)
        and any(isinstance(x, np.ndarray) for x in value.values())
        and all(
            isinstance(key, str) and (isinstance(x, np.ndarray) or key.endswith('_extra_state'))
            for key, x in value.items()
        )
    )


def _is_optimizer(value: Any) -> bool:
    """Whether this is the state dictionary of an optimizer."""
    if not isinstance(value, dict) or not {'state', 'param_groups'} <= value.keys():
        return False
    state, groups = value['state'], value['param_groups']
    return (
        isinstance(state, dict)
        and all(isinstance(entry, dict) for entry in state.values())
        and isinstance(groups, list)
        and all(isinstance(g, dict) and isinstance(g.get('params'), list) for g in groups)
    )


def _state_dicts(value: Any, place: str = '', depth: int = 4) -> Iterator[tuple[str, Any]]:
    if _is_arrays(value) or _is_optimizer(value):
        yield place, value
    elif isinstance(value, dict | list) and depth:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, x in items:
            yield from _state_dicts(x, f'{place}/{key}'.lstrip('/'), depth - 1)


def _found(path: Path, loaded: Any, model: str | None, optimizer: str | None) -> Checkpoint:
    problems: list[str] = []
    dicts = dict(_state_dicts(loaded))

    def chosen(name: str, wanted: str | None, fits: Any, needed: bool) -> str | None:
        there = [place for place, value in dicts.items() if fits(value)]
        listed = ', '.join(repr(shown(place)) for place in there)
        if wanted is not None and wanted not in there:
            problems.append(f'{name} {wanted!r} is not in it; there is {listed or "none"}')
        elif wanted is None and len(there) > 1:
            problems.append(f'it has several state dictionaries: pass {name}=, one of {listed}')
        elif needed and not there:
            problems.append(f'it has no state dictionary of a {name}, which is tensors by name')
        return wanted if wanted is not None else next(iter(there), None)

    places = (
        chosen('model', model, _is_arrays, True),
        chosen('optimizer', optimizer, _is_optimizer, False),
    )
    if problems:
        raise _damaged(path, *problems)
    at, beside = places
    arrays = {k: x for k, x in dicts[str(at)].items() if isinstance(x, np.ndarray)}
    return Checkpoint(arrays, None if beside is None else dicts[beside], (str(at), beside))
