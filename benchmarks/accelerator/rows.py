"""A row of the table: what was measured, its bound, and whether that was met."""

import dataclasses
from collections.abc import Callable
from typing import Any

MET, MISSED, NOT_RUN, NOT_JUDGED, NO_BOUND = 'met', 'missed', 'not run', 'not judged', 'no bound'
VERDICTS = (MET, MISSED, NOT_RUN, NOT_JUDGED, NO_BOUND)

Measured = dict[str, Any]


class NotRunError(Exception):
    """Says why a row cannot be run here."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One claim.

    Attributes:
      section: The part of the table.
      name: What was looked at.
      bound: What is claimed of it; empty where nothing is.
      verdict: One of `VERDICTS`.
      measured: The figures by name.
      why: Why it was not run or not judged, or what went wrong.
    """

    section: str
    name: str
    bound: str
    verdict: str
    measured: Measured = dataclasses.field(default_factory=dict)
    why: str = ''

    def __str__(self) -> str:
        figures = ', '.join(f'{name} {_short(x)}' for name, x in self.measured.items())
        verdict = f'{self.verdict} ({self.why})' if self.why else self.verdict
        return f'| {self.section} | {self.name} | {figures or "-"} | {self.bound} | {verdict} |'


def _short(x: Any) -> str:
    return f'{x:.3g}' if isinstance(x, float) else str(x)


def row(section: str, name: str, bound: str, run: Callable[[], tuple[Measured, bool]]) -> Row:
    """Runs a check, which returns its figures and whether they are within the bound.

    An error is a miss, unless it is `NotRunError` or says that memory is too small.
    """
    try:
        measured, within = run()
    except Exception as error:
        return failed(section, name, bound, error)
    return Row(section, name, bound, MET if within else MISSED, measured)


def failed(section: str, name: str, bound: str, error: Exception) -> Row:
    """The row of a check that raised an error."""
    if isinstance(error, NotRunError):
        return Row(section, name, bound, NOT_RUN, why=str(error))
    if 'RESOURCE_EXHAUSTED' in str(error):
        return Row(section, name, bound, NOT_RUN, why='the memory of the device is too small')
    lines = str(error).strip().splitlines() or ['']
    return Row(section, name, bound, MISSED, why=f'{type(error).__name__}: {lines[0][:200]}')
