"""What PyTorch's parameter groups say of the optimizer they belong to."""

from collections.abc import Mapping, Sequence
from typing import Any

from rmsprop_jax import dialects
from rmsprop_jax._checks import checked_flag
from rmsprop_jax.interchange._mapping import Problems, as_number
from rmsprop_jax.interchange._settings import UNTOLD, recognised
from rmsprop_jax.interchange._sides import Claim

_FRAMEWORKS = {dialects.timm: 'timm', dialects.stable_baselines3: 'Stable-Baselines3'}
_SETTINGS = {'alpha': 'decay', 'eps': 'eps', 'momentum': 'momentum'}


class Claims(Sequence[Claim]):
    """The claim of each group.

    Args:
      groups: The parameter groups.
      lr_in_momentum: What the caller says of that; None means what the groups say.
      dialect: Whose optimizer it is, where the groups do not tell.
      problems: Where contradictions go.

    Raises:
      TypeError: If `lr_in_momentum` is no flag or `dialect` not one of three functions.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        lr_in_momentum: bool | None,
        dialect: Any,
        problems: Problems,
    ):
        if lr_in_momentum is not None:
            lr_in_momentum = checked_flag('lr_in_momentum', lr_in_momentum)
        whose = recognised(groups, dialect, problems)
        if whose is None and lr_in_momentum:
            whose = dialects.timm
        # Where a group has no epsilon nothing hangs on whose it is.
        if whose is None and any('eps' in group for group in groups):
            problems.add(UNTOLD)
        self._claims = [
            _claim(f'group {i}', group, lr_in_momentum, whose, problems)
            for i, group in enumerate(groups)
        ]

    def __len__(self) -> int:
        return len(self._claims)

    def __getitem__(self, i: Any) -> Any:
        return self._claims[i]


def _claim(
    label: str,
    group: Mapping[str, Any],
    lr_in_momentum: bool | None,
    dialect: Any,
    problems: Problems,
) -> Claim:
    written = as_number(group.get('lr_in_momentum'))
    if None not in (written, lr_in_momentum) and bool(written) != lr_in_momentum:
        problems.add(f'{label}: lr_in_momentum is {bool(written)} there, not {lr_in_momentum}')
    inside = bool(written) if lr_in_momentum is None else lr_in_momentum
    numbers = {key: as_number(group.get(key)) for key in group}
    said = {field: (key, numbers.get(key)) for key, field in _SETTINGS.items()}
    rate = numbers.get('lr')
    if rate is not None and numbers.get('maximize'):
        rate = -rate
    said['rate'] = ('lr', rate)
    decay = numbers.get('weight_decay')
    if not numbers.get('decoupled_decay'):
        said['coupled'] = ('weight_decay', decay)
    elif rate is not None and decay is not None and not numbers.get('corrected_weight_decay'):
        said['decoupled'] = ('lr times weight_decay', rate * decay)
    if 'caution' in group and numbers.get('momentum'):
        said['cautious'] = ('caution', numbers['caution'])
    return Claim(
        _FRAMEWORKS.get(dialect, 'PyTorch'),
        inside,
        eps_in_sqrt=None if dialect is None else dialect is not dialects.torch,
        said=said,
        climbs=bool(numbers.get('maximize')),
        undo=f'change one of the two, or delete the entry from {label} to leave it uncompared',
    )
