"""Pinned searches: what is pinned holds, costs time at most, and contradictions are one line."""

import re

import pytest
from conftest import ROLES, small_workload, tiny_cluster
from hypothesis import given
from hypothesis import strategies as st

from planner.search import SearchOptions, baseline, find
from planner.search.space.pins import parse_pins, restriction
from planner.search.space.placements import families, sizes, structures
from planner.spec.cluster import make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.workload_file import load_workload


@pytest.fixture(scope="module")
def free():
    return find(small_workload(max_staleness=1), tiny_cluster(4)).best


@pytest.mark.parametrize(
    "pins",
    [
        ("actor=1",),
        ("actor+rollout",),
        ("actor/critic",),
        ("rollout=3", "actor/rollout"),
        ("actor+critic", "critic=3"),
    ],
)
def test_pins_hold_and_are_never_faster(free, pins):
    plan = find(
        small_workload(max_staleness=1), tiny_cluster(4), SearchOptions(pins=tuple(pins))
    ).best
    homes = {role: set(layout.pools) for role, layout in plan.roles.items()}
    for pin in pins:
        if "=" in pin:
            role, count = pin.split("=")
            assert plan.gpus_of(tuple(homes[role])) == int(count)
        elif "+" in pin:
            assert homes[pin.split("+")[0]] & homes[pin.split("+")[1]]
        else:
            assert not homes[pin.split("/")[0]] & homes[pin.split("/")[1]]
    assert plan.predicted.step_seconds >= free.predicted.step_seconds * (1 - 1e-9)
    assert all(pin in plan.predicted.proof.space for pin in pins)


def test_pinning_what_was_found_finds_it_again(free):
    """The sizes of all roles of the best plan."""
    pins = [f"{role}={free.gpus_of(layout.pools)}" for role, layout in free.roles.items()]
    again = find(
        small_workload(max_staleness=1), tiny_cluster(4), SearchOptions(pins=tuple(pins))
    ).best
    assert (again.pools, again.roles, again.program) == (free.pools, free.roles, free.program)


PINS = st.one_of(
    st.builds("{}={}".format, st.sampled_from(ROLES), st.integers(0, 7)),
    st.builds(
        lambda pair, how: how.join(pair),
        st.permutations(ROLES).map(lambda roles: roles[:2]),
        st.sampled_from("+/"),
    ),
)


@given(st.lists(PINS, min_size=1, max_size=4), st.integers(1, 6))
def test_pins_are_refused_exactly_when_they_leave_nothing(texts, gpus):
    possible = any(
        meets(texts, structure, counts)
        for structure in structures(ROLES)
        for used in range(1, gpus + 1)
        for counts in sizes(used, len(structure)).tolist()
    )
    try:
        parse_pins(texts, ROLES, tiny_cluster(gpus))
    except UserError:
        assert not possible
    else:
        assert possible


def meets(texts, structure, counts):
    """What the pins say, of one placement."""
    for text in texts:
        role, sign, other = re.fullmatch(r"(\w+)([=+/])(\w+)", text).groups()
        if sign == "=":
            held = sum(
                count for roles, count in zip(structure, counts, strict=True) if role in roles
            )
            if held != int(other):
                return False
        elif any({role, other} <= roles for roles in structure) != (sign == "+"):
            return False
    return True


@pytest.mark.parametrize(
    ("pins", "message"),
    [
        (["actor"], "write actor=8"),
        (["actor=x"], "write actor=8"),
        (["judge=2"], "the workload has no role 'judge'"),
        (["actor+actor"], "names actor twice"),
        (["actor=0"], "--pin actor=0 cannot be met on 4 GPUs"),
        (["actor=5"], "--pin actor=5 cannot be met on 4 GPUs"),
        (["actor=2", "actor=3"], "--pin actor=2 --pin actor=3 cannot be met together"),
        (["actor=1", "actor+critic", "critic=2"], "cannot be met together"),
    ],
)
def test_a_pin_that_cannot_be_met_is_named(pins, message):
    with pytest.raises(UserError) as error:
        parse_pins(pins, ROLES, tiny_cluster(4))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_rollouts_pools_together_have_what_is_pinned():
    structure = (
        frozenset({"actor", "rollout"}),
        frozenset({"critic", "rollout"}),
        frozenset({"reference", "reward"}),
    )
    (family,) = families(structure, tiny_cluster(5))
    pinned = restriction(parse_pins(["rollout=3"], ROLES, tiny_cluster(5)))(family)
    assert (pinned.rollout, pinned.limits) == (3, (((0, 1, 2), 5), ((0, 1), 3), ((2,), 2)))
    assert restriction(parse_pins(["actor=1", "critic=2"], ROLES, tiny_cluster(5)))(
        family
    ).given == {0: 1, 1: 2}


@pytest.mark.slow
def test_a_workload_may_fix_the_engines_tensor_parallel_size():
    workload = load_workload(profiles_dir() / "workloads" / "tutorial.toml")
    cluster = make_cluster(8, device="h200")
    assert (
        baseline("split", workload, cluster).rollout.tensor_parallel
        == workload.tensor_parallel
        == 4
    )
    free = workload.model_copy(update={"tensor_parallel": None})
    assert (
        find(free, cluster).best.predicted.step_seconds
        <= find(workload, cluster).best.predicted.step_seconds
    )
