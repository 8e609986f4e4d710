"""Constraints on placements: `actor=8` (GPUs of a role's pools), `actor+critic` (together),
`actor/critic` (apart)."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from planner.search.space.placements import PlacementFamily, Structure, families, structures
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError
from planner.spec.wording import counted

Restrict = Callable[[PlacementFamily], PlacementFamily | None]


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


def parse_pins(texts: Sequence[str], roles: Sequence[str], cluster: Cluster) -> tuple[Pin, ...]:
    """Pins of a workload with these roles on a cluster. Raises UserError for one that cannot be
    read or met, and for pins that contradict each other."""
    pins = tuple(_parse(text, roles) for text in texts)
    for count in sorted({1, 2, len(pins)} - {0}):
        for some in combinations(pins, count):
            meet = restriction(some)
            every = (family for s in structures(roles) for family in families(s, cluster))
            if not any(meet(family) for family in every):
                texts_of = " ".join(f"--pin {pin.text}" for pin in some)
                together = "cannot be met" if count == 1 else "cannot be met together"
                raise UserError(
                    f"{texts_of} {together} on {counted(len(cluster.gpus), 'GPU')}, of which "
                    f"every pool needs one at least; change {'it' if count == 1 else 'one of them'}"
                )
    return pins


def _parse(text: str, roles: Sequence[str]) -> Pin:
    match = re.fullmatch(r"(\w+)\s*(?:=\s*(\d+)|([+/])\s*(\w+))", text.strip())
    if match is None:
        raise UserError(
            f"--pin {text}: write actor=8 (GPUs of a role), actor+critic (together) or "
            "actor/critic (apart)"
        )
    role, count, how, other = match.groups()
    for name in (role, *([other] if other else [])):
        if name not in roles:
            raise UserError(
                f"--pin {text}: the workload has no role {name!r}; it has {', '.join(roles)}"
            )
    if count is not None:
        return Pin(text=text, roles=(role,), gpus=int(count))
    if role == other:
        raise UserError(f"--pin {text}: names {role} twice; name two roles")
    return Pin(text=text, roles=(role, other), together=how == "+")


def restriction(pins: Sequence[Pin]) -> Restrict:
    """The function that makes a family of placements meet all pins: it returns the family with
    tighter limits, or None where no sizes meet them."""

    def restrict(family: PlacementFamily) -> PlacementFamily | None:
        if not all(pin.admits(family.structure) for pin in pins):
            return None
        given: dict[int, int] = {}
        rollout: int | None = None
        for role, gpus in _gpus_of_roles(pins):
            pools = [i for i, roles in enumerate(family.structure) if role in roles]
            if len(pools) > 1:  # only the rollout has several pools
                if rollout not in (None, gpus):
                    return None
                rollout = gpus
            elif given.setdefault(pools[0], gpus) != gpus:
                return None
        limits = family.limits
        if rollout is not None:
            limits = (*limits, *_limits_of_rollout(family, rollout))
        pinned = family._replace(limits=limits, given=given, rollout=rollout)
        return pinned if _possible(pinned) else None

    return restrict


def _gpus_of_roles(pins: Sequence[Pin]) -> Iterator[tuple[str, int]]:
    """Roles with the GPUs that pins give them."""
    for pin in pins:
        if pin.gpus is not None:
            yield pin.roles[0], pin.gpus


def _limits_of_rollout(
    family: PlacementFamily, rollout: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    """The limits of pools if those of the rollout have `rollout` GPUs together: these pools, and
    the others of their kind, which have the rest."""
    yield family.generating, rollout
    kind = family.kinds[family.generating[0]]
    others = tuple(
        pool
        for pool, own in enumerate(family.kinds)
        if own == kind and pool not in family.generating
    )
    for pools, most in family.limits:
        if set(others) & set(pools):
            yield others, most - rollout
        elif set(family.generating) & set(pools) and most < rollout:
            yield family.generating, 0  # more than there are: no sizes meet this


def _possible(family: PlacementFamily) -> bool:
    """Whether some sizes meet all limits: the given ones, and one GPU at least for every other
    pool."""
    least = [family.given.get(pool, 1) for pool in range(len(family.structure))]
    if min(least) < 1:
        return False
    for pools, most in family.limits:
        if sum(least[pool] for pool in pools) > most:
            return False
    if family.rollout is None or any(pool not in family.given for pool in family.generating):
        return True
    return sum(least[pool] for pool in family.generating) == family.rollout
