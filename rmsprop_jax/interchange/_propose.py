"""Proposes pairs of PyTorch's arrays and ours by their names and shapes."""

import collections
import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from rmsprop_jax._checks import checked_leaves
from rmsprop_jax._types import path_name
from rmsprop_jax.interchange._files import Checkpoint, shown
from rmsprop_jax.interchange._mapping import (
    AS_IS,
    KERNEL,
    Layout,
    Pair,
    checked_collection,
    checked_names,
    shape_here,
)

# For each name in PyTorch, the names of our leaves and how their axes differ.
_ROLES: dict[str, tuple[tuple[str, Layout], ...]] = {
    'weight': (('kernel', KERNEL), ('embedding', AS_IS), ('scale', AS_IS)),
    'bias': (('bias', AS_IS),),
    'running_mean': (('mean', AS_IS),),
    'running_var': (('var', AS_IS),),
}
# The prefixes that module wrappers put before every name.
_WRAPPERS = ('module', '_orig_mod', 'model')
_IGNORED = 'num_batches_tracked'
_UNSEEN = 'its shape does not show how they lie'


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Proposed pairs, and what is not certain about them. `print` shows everything.

    Attributes:
      pairs: The pairs of parameters.
      buffers: The pairs of buffers, such as running means.
      guesses: Why a pair is a guess, by our path. All other pairs are sure: the names agree, and
        only one layout is usual for such an array.
      missing: Why a path of ours has no pair, by path.
      unused: Why an array of theirs has no pair, by name.
    """

    pairs: tuple[Pair, ...]
    buffers: tuple[Pair, ...]
    guesses: Mapping[str, str]
    missing: Mapping[str, str]
    unused: Mapping[str, str]

    def __str__(self) -> str:
        lines = []
        for pair in (*self.pairs, *self.buffers):
            reason = self.guesses.get(str(pair.ours))
            kind = 'sure' if reason is None else 'guessed'
            text = f'{kind:9} {shown(pair.theirs)} -> {pair.ours}{_described(pair.layout)}'
            lines.append(text if reason is None else f'{text}\n{"":10}{reason}')
        for kind, found in (('missing', self.missing), ('unused', self.unused)):
            lines += [f'{kind:9} {shown(name)}: {reason}' for name, reason in found.items()]
        return '\n'.join(lines)


def _described(layout: Layout) -> str:
    if layout == AS_IS:
        return ''
    split = f', flattened {layout.split}' if layout.split else ''
    return f' (axes {"swapped" if layout.axes == KERNEL.axes else layout.axes}{split})'


def propose_pairs(
    theirs: Mapping[str, Any],
    params: Any,
    buffers: Any = None,
    *,
    known: Iterable[Pair] = (),
    ignore: Collection[str] = (),
) -> Proposal:
    """Proposes pairs for the arrays of a PyTorch model and a tree of Flax parameters.

    A name matches a path if both are equal up to `.`, `_` and `/`, after `weight` has become
    `kernel`, `embedding` or `scale` (whichever the layer has), `running_mean` `mean` and
    `running_var` `var`, and without the `module.`, `_orig_mod.` or `model.` that wrappers put
    before all names. A kernel is transposed, a convolution's from OIHW to HWIO. The pair is then
    sure, unless its shape leaves open how its axes lie:

    - a kernel has as many inputs as outputs,
    - a linear kernel may read or make a flattened image: the number of its features is a multiple
      of a convolution's channels, and no linear layer in the same module hands it these features
      or takes them from it.

    A layer without a matching name is guessed if only one array of theirs has its shape, and only
    one of ours. Otherwise it is missing: nothing is chosen among several.

    Args:
      theirs: Arrays by name, as `read_checkpoint(path).arrays` or `model.state_dict()`.
      params: Our parameters, or a tree of `jax.ShapeDtypeStruct`s like them.
      buffers: The same for arrays that are not parameters: `nnx.state(model, nnx.BatchStat)`, or
        Linen's `variables['batch_stats']`.
      known: Pairs that you know. They are sure, and their arrays are proposed for nothing else.
      ignore: Their names that are left out.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `known` or `ignore` contradicts `theirs` or our trees.

    Source: the layers of PyTorch 2.13 and Flax 0.12.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> from rmsprop_jax import interchange
      >>> theirs = {'fc.weight': np.ones((3, 2)), 'fc.bias': np.ones(3), 'head.weight': np.eye(3)}
      >>> like = {'fc': {'kernel': jnp.zeros((2, 3)), 'bias': jnp.zeros(3)},
      ...         'head': {'kernel': jnp.zeros((3, 3))}}
      >>> print(interchange.propose_pairs(theirs, like))
      sure      fc.bias -> fc/bias
      sure      fc.weight -> fc/kernel (axes swapped)
      guessed   head.weight -> head/kernel (axes swapped)
                it has as many inputs as outputs, so its shape does not show how they lie
    """
    checked_names('theirs', theirs)
    trees = {}
    for name, tree in (('params', params), ('buffers', buffers)):
        trees[name] = {path_name(at): leaf for at, leaf in checked_leaves(name, tree)}
    ours = {**trees['params'], **trees['buffers']}
    if len(ours) < sum(map(len, trees.values())):
        raise ValueError('params and buffers must not have the same paths.')
    found = _Search({name: np.shape(x) for name, x in theirs.items()}, ours)
    for pair in known if isinstance(known, Iterable) else [known]:
        if not isinstance(pair, Pair):
            raise TypeError(f'known must hold pairs (interchange.Pair), got {pair!r}.')
        found.settle(pair)
    for name in checked_collection('ignore', ignore):
        if name not in theirs:
            raise ValueError(f'ignore has {name!r}, which is not in theirs.')
        found.unused[name] = 'it is in `ignore`'
    found.by_names()
    found.by_shapes()
    found.doubt_layouts()
    pairs = [found.pairs[path] for path in ours if path in found.pairs]
    return Proposal(
        tuple(pair for pair in pairs if pair.ours in trees['params']),
        tuple(pair for pair in pairs if pair.ours in trees['buffers']),
        found.guesses,
        {path: found.why_missing(path) for path in ours if path not in found.pairs},
        found.all_unused(),
    )


def _split(name: str) -> tuple[str, str]:
    """The layer in a name, spelled alike for both sides, and the name of its array."""
    layer, _, leaf = name.rpartition('.')
    return layer.replace('.', '_'), leaf


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Maps names without the prefixes of wrappers to the full names."""
    short = {name: name for name in names}
    while True:
        first = {name.partition('.')[0] for name in short}
        if len(first) != 1 or not first & {*_WRAPPERS} or any('.' not in name for name in short):
            return short
        short = {key.partition('.')[2]: name for key, name in short.items()}


class _Search:
    """The pairs that were found so far.

    Attributes:
      pairs: The pairs by our path.
      guesses: Why a pair is a guess, by our path.
      unused: Why an array of theirs is left out, by name.
    """

    def __init__(self, theirs: Mapping[str, tuple[int, ...]], ours: Mapping[str, Any]):
        self.theirs, self.ours = theirs, {path: np.shape(x) for path, x in ours.items()}
        self.pairs: dict[str, Pair] = {}
        self.guesses: dict[str, str] = {}
        self.unused: dict[str, str] = {}
        self._misfits: dict[str, str] = {}
        self._known: list[Pair] = []
        # Names that are spelled alike show nothing.
        self._named: dict[tuple[str, str], list[str]] = {}
        for short, name in _without_wrappers(theirs).items():
            self._named.setdefault(_split(short), []).append(name)
        self._place = {name: key for key, names in self._named.items() for name in names}
        short = _without_wrappers(path.replace('/', '.') for path in ours)
        self._path_place = dict(zip(ours, (_split(key) for key in short), strict=True))
        counted = collections.Counter(self._path_place.values())
        self._unclear = {place for place, number in counted.items() if number > 1}

    def settle(self, pair: Pair) -> None:
        """Takes a pair that the caller knows."""
        path = str(pair.ours)
        if pair.theirs not in self.theirs or path not in self.ours:
            side = 'theirs' if pair.theirs not in self.theirs else 'params or buffers'
            raise ValueError(f'known has {pair.theirs!r} with {path!r}, which is not in {side}.')
        if not self._fits(pair.theirs, path, pair.layout):
            raise ValueError(
                f'known has {pair.theirs!r} of shape {self.theirs[pair.theirs]} with {path!r} of '
                f'shape {self.ours[path]}, which this layout does not make of it.'
            )
        if path in self.pairs or pair.theirs in self._taken():
            raise ValueError(f'known has {pair.theirs!r} or {path!r} more than once.')
        self.pairs[path] = pair
        self._known.append(pair)

    def _taken(self) -> set[str]:
        return {pair.theirs for pair in self.pairs.values()} | self.unused.keys()

    def _free(self) -> list[str]:
        taken = self._taken()
        return [n for n in self.theirs if n not in taken and self._place[n][1] != _IGNORED]

    def _open(self) -> list[str]:
        return [path for path in self.ours if path not in self.pairs]

    def _fits(self, name: str, path: str, layout: Layout) -> bool:
        try:
            return shape_here(layout, self.theirs[name]) == self.ours[path]
        except ValueError:
            return False

    def _layout(self, name: str, path: str) -> Layout | None:
        """The usual layout for two arrays with these names; None if they do not go together."""
        (_, theirs), leaf = self._place[name], path.rpartition('/')[2]
        for ours, layout in _ROLES.get(theirs, ()):
            if leaf == ours and (leaf != 'kernel' or len(self.theirs[name]) > 1):
                return layout
        return AS_IS if leaf == theirs and theirs not in ('weight',) else None

    def by_names(self) -> None:
        """Pairs arrays whose names agree."""
        claims: list[tuple[str, str, Layout]] = []
        free = set(self._free())
        for path in self._open():
            layer, leaf = self._path_place[path]
            if (layer, leaf) in self._unclear:
                continue
            leaves = [theirs for theirs, roles in _ROLES.items() if leaf in dict(roles)]
            for theirs in dict.fromkeys([*leaves, leaf]):
                names = self._named.get((layer, theirs), [])
                layout = self._layout(names[0], path) if len(names) == 1 else None
                if layout is not None and names[0] in free:
                    claims.append((names[0], path, layout))
        rivals = collections.Counter(x for name, path, _ in claims for x in (('', name), (path,)))
        for name, path, layout in claims:
            alone = rivals['', name] == rivals[path,] == 1
            if alone and self._fits(name, path, layout):
                self.pairs[path] = Pair(name, path, layout)
                continue
            # An array with this name must not be guessed for another path.
            self.unused[name] = f'its name belongs to {path!r}'
            self._misfits[path] = (
                f'{shown(name)!r} has shape {self.theirs[name]}{_described(layout)}, and ours '
                f'{self.ours[path]}'
                if alone
                else f'{shown(name)!r} has its name, but others have it too'
            )

    def by_shapes(self) -> None:
        """Pairs arrays whose shape no other array has, and then the rest of their layers."""
        before = -1
        while before != len(self.pairs):
            before = len(self.pairs)
            free = self._free()
            paths = [path for path in self._open() if path not in self._misfits]
            fits = {
                path: [
                    (name, layout)
                    for name in free
                    if (layout := self._layout(name, path)) and self._fits(name, path, layout)
                ]
                for path in paths
            }
            for path, names in fits.items():
                among = self._same_layer(path, names) or names
                if len(among) != 1:
                    continue
                name, layout = among[0]
                rivals = [p for p in paths if p != path and (name, layout) in fits[p]]
                if among is names and rivals:
                    continue
                if name in self._taken():
                    continue
                self.pairs[path] = Pair(name, path, layout)
                self.guesses[path] = (
                    'their names differ, and no other free array has this shape'
                    if among is names
                    else 'their names differ; the shapes of its other arrays suggest this layer'
                )

    def _same_layer(self, path: str, names: list[tuple[str, Layout]]) -> list[tuple[str, Layout]]:
        """Those of `names` in the layer that is paired with our layer already."""
        layer = path.rpartition('/')[0]
        layers = {
            self._place[pair.theirs][0]
            for other, pair in self.pairs.items()
            if other.rpartition('/')[0] == layer
        }
        return [(name, layout) for name, layout in names if self._place[name][0] in layers]

    def doubt_layouts(self) -> None:
        """Notes arrays whose axes may lie differently, unless the caller gave their layout."""
        for path, pair in self.pairs.items():
            doubts = [] if pair in self._known else self._doubts(path, pair)
            if doubts:
                before = [self.guesses[path]] if path in self.guesses else []
                self.guesses[path] = '; '.join([*before, *doubts])

    def _doubts(self, path: str, pair: Pair) -> list[str]:
        shape, leaf = self.theirs[pair.theirs], path.rpartition('/')[2]
        if leaf == self._place[pair.theirs][1]:
            alike = [n for n in shape if n > 1 and shape.count(n) > 1]
            return [f'it has several axes of length {alike[0]}, so {_UNSEEN}'] if alike else []
        if leaf != 'kernel':
            return []
        square, is_conv = shape[0] == shape[1], len(shape) > 2
        if is_conv:
            also = 'nor whether it is a transposed convolution'
            return [f'it has as many inputs as outputs, so {_UNSEEN}, {also}'] if square else []
        found = [f'it has as many inputs as outputs, so {_UNSEEN}'] if square else []
        return found + self._doubts_of_flattening(pair.theirs)

    def _doubts_of_flattening(self, name: str) -> list[str]:
        """The doubts about a linear kernel that may read or make a flattened image.

        PyTorch flattens channels first, Flax last. There is no doubt if another linear layer in the
        same module makes this number of features before it, or reads it afterwards.
        """
        outputs, inputs = self.theirs[name]
        names = [n for n, shape in self.theirs.items() if len(shape) > 1]
        convs = [n for n in names if len(self.theirs[n]) > 2]
        beside = [n for n in names if self._module(n) == self._module(name)]
        # In a sorted file the order of names is not the order of layers.
        if names == sorted(names) and not {*beside}.isdisjoint(convs):
            beside = []
        at = names.index(name)
        matrices = [n for n in beside if self._is_matrix(n)]
        made = {self.theirs[n][0] for n in matrices if names.index(n) < at}
        read = {self.theirs[n][1] for n in matrices if names.index(n) > at}

        def channels(axis: int, features: int, explained: set[int]) -> list[int]:
            numbers = {self.theirs[n][axis] for n in convs} if features not in explained else set()
            return sorted(n for n in numbers if 1 < n < features and features % n == 0)

        found = []
        if images := channels(0, inputs, made):
            found.append(
                f'its {inputs} inputs may be a flattened image of '
                f'{" or ".join(map(str, images))} channels, which Flax flattens in another order '
                '(if so, pair it with layout=interchange.flattened(channels, height, width))'
            )
        if images := [n for n in channels(1, outputs, read) if n > 4]:
            found.append(
                f'its {outputs} outputs may become an image of {" or ".join(map(str, images))} '
                'channels, which Flax lays out in another order'
            )
        return found

    def _is_matrix(self, name: str) -> bool:
        return self._place[name][1] == 'weight' and len(self.theirs[name]) == 2

    def _module(self, name: str) -> str:
        """The module that has the layer of a name."""
        return name.rpartition('.')[0].rpartition('.')[0]

    def why_missing(self, path: str) -> str:
        """Why one of our paths has no pair."""
        if path in self._misfits:
            return self._misfits[path]
        names = [
            name
            for name in self._free()
            if (layout := self._layout(name, path)) and self._fits(name, path, layout)
        ]
        if not names:
            return f'none of their unpaired arrays becomes {self.ours[path]}'
        listed = ', '.join(shown(name) for name in names[:4]) + (' ...' if len(names) > 4 else '')
        return f'no name matches, and by its shape {self.ours[path]} it may be any of {listed}'

    def all_unused(self) -> dict[str, str]:
        """Why arrays of theirs have no pair."""
        paired = {pair.theirs for pair in self.pairs.values()}
        reasons = {}
        for name in self.theirs:
            if name in paired:
                continue
            if name in self.unused:
                reasons[name] = self.unused[name]
            elif self._place[name][1] == _IGNORED:
                reasons[name] = 'Flax does not keep it'
            else:
                reasons[name] = f'it has shape {self.theirs[name]}, and no path of ours takes it'
        return reasons


def propose_names(
    checkpoint: Checkpoint, proposal: Proposal
) -> tuple[tuple[str, ...] | None, str | None]:
    """The names of the parameters in the optimizer's order, and why they are a guess.

    Returns:
      The names, or None if they cannot be found; and why so, or why they are a guess, or None.
    """
    optimizer = checkpoint.optimizer or {}
    groups = optimizer['param_groups']
    numbers = [n for group in groups for n in group.get('params', ())]
    named: list[str] = [name for group in groups for name in group.get('param_names', ())]
    shorts = _without_wrappers(checkpoint.arrays)
    if len(named) == len(numbers):
        return tuple(shorts.get(x, name) for x, name in _without_wrappers(named).items()), None
    paired = {pair.theirs for pair in proposal.pairs}
    names = [name for name in checkpoint.arrays if name in paired]
    if len(names) != len(numbers):
        return None, (
            f'the groups have {len(numbers)} parameters and no names, and the model has '
            f'{len(names)} that are paired: pass names, in the order of the optimizer'
        )
    shapes = [checkpoint.arrays[name].shape for name in names]
    for name, number, shape in zip(names, numbers, shapes, strict=True):
        slots = optimizer['state'].get(number, {})
        wrong = [s for s, x in slots.items() if s != 'step' and np.shape(x) != shape]
        if wrong:
            return None, (
                f'the groups have no names, and the order of the model does not fit: parameter '
                f'{number} has {wrong[0]} of shape {np.shape(slots[wrong[0]])}, and '
                f'{shown(name)!r} has {shape}. Pass names, in the order of the optimizer'
            )
    if len({*shapes}) == len(shapes) and all(optimizer['state'].get(n) for n in numbers):
        return tuple(names), None
    alike = sum(math.prod(s) > 0 and shapes.count(s) > 1 for s in shapes)
    return tuple(names), (
        'the groups have no names, so the order of the model is assumed for the optimizer, too; '
        f'the shapes agree, but {alike} parameters have the shape of another one'
    )
