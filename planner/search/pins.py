"""Constraints on placements: `actor=8` (GPUs of a role's pools), `actor+critic` (together), `actor/critic` (apart)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from planner.search.space import Structure, structures
from planner.spec.errors import UserError

Allows = Callable[[Structure, NDArray[np.int64]], NDArray[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Pin:
    """One role with the GPUs of its pools, or two roles that share a pool or do not."""

    text: str
    roles: tuple[str, ...]
    gpus: int | None = None
    together: bool = False

    def admits(self, structure: Structure) -> bool:
        """Whether the roles lie as they must; sizes aside."""
        shared = any(pool >= set(self.roles) for pool in structure)
        return self.gpus is not None or shared == self.together


def parse_pins(texts: Sequence[str], roles: Sequence[str], gpus: int) -> tuple[Pin, ...]:
    """Pins of a workload with these roles on that many GPUs. Raises UserError for one that cannot be read or met, and
    for pins that contradict each other."""
    pins = tuple(_parse(text, roles) for text in texts)
    for count in sorted({1, 2, len(pins)} - {0}):
        for some in combinations(pins, count):
            if not any(_possible(structure, some, gpus) for structure in structures(roles)):
                texts_of = " ".join(f"--pin {pin.text}" for pin in some)
                together = "cannot be met" if count == 1 else "cannot be met together"
                raise UserError(
                    f"{texts_of} {together} on {gpus} GPUs, all of which are shared out with at least one for each "
                    f"pool; change {'it' if count == 1 else 'one of them'}"
                )
    return pins


def _parse(text: str, roles: Sequence[str]) -> Pin:
    match = re.fullmatch(r"(\w+)\s*(?:=\s*(\d+)|([+/])\s*(\w+))", text.strip())
    if match is None:
        raise UserError(
            f"--pin {text}: write actor=8 (GPUs of a role), actor+critic (together) or actor/critic (apart)"
        )
    role, count, how, other = match.groups()
    for name in (role, *([other] if other else [])):
        if name not in roles:
            raise UserError(f"--pin {text}: the workload has no role {name!r}; it has {', '.join(roles)}")
    if count is not None:
        return Pin(text=text, roles=(role,), gpus=int(count))
    if role == other:
        raise UserError(f"--pin {text}: names {role} twice; name two roles")
    return Pin(text=text, roles=(role, other), together=how == "+")


def _possible(structure: Structure, pins: Sequence[Pin], gpus: int) -> bool:
    """Whether some pool sizes of a structure meet the pins: pools of a pinned trained or inference role have its size;
    those of a pinned rollout, and then all pools, must add up."""
    wanted = {(pin.roles[0], pin.gpus) for pin in pins if pin.gpus is not None}
    if not all(pin.admits(structure) for pin in pins) or len({role for role, _ in wanted}) < len(wanted):
        return False
    fixed: dict[int, int] = {}
    pools_of_rollout, every, of_rollout = set[int](), set(range(len(structure))), 0
    for role, count in wanted:
        pools = {i for i in every if role in structure[i]}
        if len(pools) > 1:
            pools_of_rollout, of_rollout = pools, count
        elif fixed.setdefault(min(pools), count) != count or count < 1:
            return False
    return _adds_up(of_rollout, pools_of_rollout, fixed) and _adds_up(
        gpus - of_rollout, every - pools_of_rollout, fixed
    )


def _adds_up(total: int, pools: set[int], fixed: dict[int, int]) -> bool:
    left = total - sum(fixed.get(pool, 0) for pool in pools)
    free = len(pools - fixed.keys())
    return left >= free if free else left == 0


def allows(pins: Sequence[Pin]) -> Allows:
    """Of a structure and pool sizes [n, pools]: which [n] meet all pins."""

    def meet(structure: Structure, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
        met = np.full(len(sizes), all(pin.admits(structure) for pin in pins))
        for pin in pins:
            if pin.gpus is not None:
                pools = [i for i, roles in enumerate(structure) if pin.roles[0] in roles]
                met &= sizes[:, pools].sum(axis=1) == pin.gpus
        return met

    return meet
