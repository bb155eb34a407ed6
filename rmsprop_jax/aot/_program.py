"""Reads a compiled program: its kernels, the bytes they move, its collectives.

The text that XLA prints after optimization is the only description that all backends give. A kernel
is an instruction that runs by itself. It reads its operands and writes its results, once each.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {'pred': 8, 'token': 0, 'opaque': 0}
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,<=?]*)\](?:\{([^}]*)\})?|(token|opaque)\[\]')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_NAME = re.compile(r'%([\w.\-]+)')
_SPACE = re.compile(r'S\((\d+)\)')

# Views of memory, and other instructions that move nothing.
_FREE = frozenset(
    {
        'add-dependency',
        'after-all',
        'bitcast',
        'constant',
        'domain',
        'get-tuple-element',
        'opt-barrier',
        'parameter',
        'partition-id',
        'replica-id',
        'tuple',
    }
)
_COLLECTIVES = frozenset(
    {
        'all-gather',
        'all-reduce',
        'all-to-all',
        'collective-broadcast',
        'collective-permute',
        'ragged-all-to-all',
        'reduce-scatter',
    }
)
_REDUCE_SCATTER = 'all-reduce-scatter'
# Kernels in which the same collective may appear several times.
_PARTS = ('async_collective_fusion', 'fused_computation')
_CHANNEL = re.compile(r'channel_id=\d+')
# The results of these instructions begin with their operands.
_STARTS_WITH_OPERANDS = frozenset(
    {'all-gather-start', 'collective-permute-start', 'reduce-scatter-start', 'slice-start'}
)
_SLICES = frozenset({'dynamic-slice', 'slice', 'slice-start'})
_COPIES = frozenset({'copy', 'copy-start', *_SLICES})
# Joins slices that were prefetched into fast memory separately.
_FREE_CALL = 'custom_call_target="ConcatBitcast"'
_HOST_TRANSFERS = frozenset({'infeed', 'outfeed', 'recv', 'send'})


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array in a program: its dtype (as XLA writes it), shape and memory space."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The size in bytes, without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.findall(r'\d+', self.dtype)[0])
        return -(-self.size * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self) -> tuple[str, ...]:
        """The computations that the instruction runs."""
        pattern = r'(?:calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%[\w.\-]+)'
        found = re.findall(pattern, self.attributes)
        return tuple(name for group in found for name in _NAME.findall(group))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication in a program.

    Attributes:
      kind: 'all-reduce', 'all-gather', 'reduce-scatter', and so on.
      count: The number of instructions.
      bytes: The bytes that enter or leave a device, whichever are more, in all these instructions.
    """

    kind: str
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a computation does to memory.

    Attributes:
      kernels: The number of instructions that run by themselves, except those on scalars alone.
      copies: The number of kernels that only copy.
      bytes: The bytes that kernels read and write. Fast memory on the chip is not counted, so an
        array that is prefetched there is read once.
    """

    kernels: int = 0
    copies: int = 0
    bytes: int = 0

    def __add__(self, other: 'Traffic') -> 'Traffic':
        return Traffic(
            self.kernels + other.kernels, self.copies + other.copies, self.bytes + other.bytes
        )


class Program:
    """A compiled program, read from its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.computations, self.entry = _parse(text)

    def traffic(self) -> Traffic:
        """Kernels and bytes of one run.

        The body of a loop counts once, and a conditional counts as the branch that moves most. A
        kernel that reads or writes a part of an array counts as if it moved the whole array.
        """
        return self._traffic(self.entry)

    def minimum(self) -> int:
        """The bytes needed to read each used argument once and write each result once."""
        entry = self.computations[self.entry]
        used = {name for instruction in entry.values() for name in instruction.operands}
        read = [i for i in entry.values() if i.opcode == 'parameter' and i.name in used]
        (root,) = [i for i in entry.values() if i.is_root]
        return sum(_bytes(i.arrays) for i in (*read, root))

    def collectives(self) -> tuple[Collective, ...]:
        """All communication by kind, including communication inside kernels.

        The TPU compiler writes a reduce-scatter as a kernel with an all-reduce and a slice. It
        writes an all-gather into each kernel that runs at the same time.
        """
        found: dict[str, dict[str, int]] = {}
        for name, computation in self.computations.items():
            for i in computation.values():
                kind = i.opcode.removesuffix('-start')
                if kind not in _COLLECTIVES:
                    continue
                inside, outside = _bytes(self._operands(computation, i)), _bytes(i.arrays)
                if i.opcode in _STARTS_WITH_OPERANDS:
                    outside -= inside
                if name.startswith(_REDUCE_SCATTER):
                    kind = 'reduce-scatter'
                channel = _CHANNEL.search(i.attributes) if name.startswith(_PARTS) else None
                key = channel[0] if channel else f'{name} {i.name}'
                found.setdefault(kind, {})[key] = max(inside, outside)
        return tuple(Collective(k, len(v), sum(v.values())) for k, v in sorted(found.items()))

    def dtypes(self) -> frozenset[str]:
        """The dtypes in the program, as XLA writes them."""
        return frozenset(array.dtype for i in self._instructions() for array in i.arrays)

    def custom_calls(self) -> frozenset[str]:
        """The external functions that the program calls."""
        return frozenset(re.findall(r'custom_call_target="([^"]*)"', self.text))

    def host_transfers(self) -> frozenset[str]:
        """The ways in which the program talks to the host while it runs."""
        calls = {name for name in self.custom_calls() if 'callback' in name.lower()}
        opcodes = {i.opcode for i in self._instructions()}
        return frozenset(calls | (opcodes & _HOST_TRANSFERS))

    def _instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.values()

    def _traffic(self, name: str) -> Traffic:
        computation = self.computations[name]
        return sum((self._cost(computation, i) for i in computation.values()), Traffic())

    def _cost(self, computation: Mapping[str, Instruction], i: Instruction) -> Traffic:
        ended = i.opcode.endswith(('-done', '-update'))
        if i.opcode in _FREE or ended or _FREE_CALL in i.attributes:
            return Traffic()
        if i.opcode == 'conditional':
            branches = [self._traffic(name) for name in i.called()]
            return max(branches, key=lambda branch: (branch.bytes, branch.kernels))
        if i.opcode in ('call', 'while', 'async-start'):
            return sum((self._traffic(name) for name in i.called()), Traffic())
        read = self._operands(computation, i)
        written = i.arrays[:1] if i.opcode == 'copy-start' else i.arrays
        if i.opcode in _STARTS_WITH_OPERANDS:
            written = written[len(read) :]
        if i.opcode in _SLICES:
            # A slice reads as many bytes as it writes, from the memory space of its operand.
            read = tuple(dataclasses.replace(written[0], space=array.space) for array in read[:1])
        touched = [array for array in (*read, *written) if array.size > 1]
        copies = i.opcode in _COPIES
        is_kernel = bool(touched) and not (copies and any(array.space for array in touched))
        moved = sum(array.bytes for array in touched if not array.space)
        return Traffic(int(is_kernel), int(is_kernel and copies), moved)

    def _operands(
        self, computation: Mapping[str, Instruction], instruction: Instruction
    ) -> tuple[Array, ...]:
        names = dict.fromkeys(instruction.operands)
        return tuple(a for n in names if n in computation for a in computation[n].arrays)


def _bytes(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays if array.size > 1)


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    computations: dict[str, dict[str, Instruction]] = {}
    entry = ''
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
        line = re.sub(r'/\*.*?\*/', '', line)
        if opening := _COMPUTATION.match(line):
            current = computations[opening[2]] = {}
            entry = opening[2] if opening[1] else entry
        elif found := _INSTRUCTION.match(line):
            current[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    if not entry:
        raise ValueError('text has no ENTRY computation, so it is not a compiled program.')
    return computations, entry


def _instruction(name: str, definition: str, is_root: bool) -> Instruction:
    """Splits `TYPE opcode(operands), attributes`."""
    end = _closing(definition, 0) if definition.startswith('(') else definition.index(' ')
    opening = definition.index('(', end)
    closing = _closing(definition, opening)
    return Instruction(
        name=name,
        opcode=definition[end:opening].strip(),
        arrays=tuple(_arrays(definition[:end])),
        operands=tuple(_NAME.findall(definition[opening:closing])),
        attributes=definition[closing:],
        is_root=is_root,
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {'(': 1, ')': -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f'unbalanced parentheses in {text!r}.')


def _arrays(text: str) -> Iterator[Array]:
    for dtype, dims, layout, other in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        shape = tuple(int(re.sub(r'\D', '', dim)) for dim in dims.split(',') if dim)
        yield Array(other or dtype, shape, int(space[1]) if space else 0)
