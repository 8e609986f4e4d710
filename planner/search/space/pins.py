"""Constraints on placements: `actor=8` (GPUs of a role's pools), `actor+critic` (together),
`actor/critic` (apart)."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from planner.search.space.placements import PlacementFamily, Structure, families, structures
from planner.spec.cluster import Cluster
from planner.spec.errors import UserError

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
            if not any(meet(a) for s in structures(roles) for a in families(s, cluster)):
                texts_of = " ".join(f"--pin {pin.text}" for pin in some)
                together = "cannot be met" if count == 1 else "cannot be met together"
                raise UserError(
                    f"{texts_of} {together} on {len(cluster.gpus)} GPUs, of which every pool needs "
                    "one at least; "
                    f"change {'it' if count == 1 else 'one of them'}"
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
    """What pins make of a family: None where no sizes meet them all."""

    def restrict(a: PlacementFamily) -> PlacementFamily | None:
        wanted = {(pin.roles[0], pin.gpus) for pin in pins if pin.gpus is not None}
        if not all(pin.admits(a.structure) for pin in pins) or len(
            {role for role, _ in wanted}
        ) < len(wanted):
            return None
        given: dict[int, int] = {}
        rollout: int | None = None
        for role, count in wanted:
            pools = [i for i, roles in enumerate(a.structure) if role in roles]
            if len(pools) > 1:
                rollout = count
            elif given.setdefault(pools[0], count) != count:
                return None
        limits = a.limits if rollout is None else (*a.limits, *_shares(a, rollout))
        pinned = a._replace(limits=limits, given=given, rollout=rollout)
        return pinned if _possible(pinned) else None

    return restrict


def _shares(a: PlacementFamily, rollout: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """What the rollout's pools have together, and what they leave to the others of their kind."""
    yield a.generating, rollout
    kind = a.kinds[a.generating[0]]
    others = tuple(
        i for i in range(len(a.structure)) if a.kinds[i] == kind and i not in a.generating
    )
    for pools, most in a.limits:
        if set(others) & set(pools):
            yield others, most - rollout
        elif set(a.generating) & set(pools) and most < rollout:
            yield a.generating, 0


def _possible(a: PlacementFamily) -> bool:
    """Whether there are sizes that meet all limits: given ones, and one GPU at least for every
    other pool."""
    least = [a.given.get(i, 1) for i in range(len(a.structure))]
    within = all(sum(least[i] for i in pools) <= most for pools, most in a.limits)
    free = any(i not in a.given for i in a.generating)
    exact = a.rollout is None or free or sum(least[i] for i in a.generating) == a.rollout
    return min(least) > 0 and within and exact
