"""An auditor that finds the optimum of small instances in another way than the search: one CP-SAT
model of placement, layouts and periodic schedule at once. It is given the space (structures,
packing, listed layouts), the seconds of calls and the memory of roles; it knows nothing of
programs, event graphs, bounds or dominance.

A periodic schedule starts call v of step t at s_v + t * period. Calls that share a pool exclude
each other: v of step t comes after u of step t - lag, and before u of step t - lag + 1, for a lag
to be chosen. Every such schedule is a program (the calls by their starts modulo the period) and
every program has one: the least period is the best plan's."""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations

import numpy as np
import pytest
from ortools.sat.python import cp_model

from planner.predict.cost import CostModel, Place
from planner.predict.host_memory import batch_bytes
from planner.predict.layouts import rollout_layouts, trainer_layouts
from planner.predict.memory import pool_peak, rollout_memory, trainer_memory
from planner.search.space.placements import gpus_of, pack, sizes, structures
from planner.spec.cluster import Cluster
from planner.spec.workload import Workload, head_of

UNITS = 10**6  # of time in a step: what rounding to whole numbers leaves is below TOLERANCE
TOLERANCE = 2e-5
PATIENCE = 60  # seconds; a few instances with random lengths take the auditor longer than that


# --- the space, as docs/search.md has it ---


@dataclass(frozen=True)
class Placement:
    """Roles and GPUs of each pool."""

    roles: tuple
    gpus: tuple

    def pools(self, role):
        return tuple(i for i, roles in enumerate(self.roles) if role in roles)

    def parts(self, role):
        """GPUs per node of each pool of a role."""
        nodes = [[node for node, _ in self.gpus[i]] for i in self.pools(role)]
        return tuple(tuple(Counter(pool).values()) for pool in nodes)

    def on_node(self, role, node):
        return sum(gpu[0] == node for i in self.pools(role) for gpu in self.gpus[i])

    @property
    def linked(self):
        """Whether actor and rollout lie on one node, and whether they share a pool."""
        both = {*self.pools("actor"), *self.pools("rollout")}
        nodes = {node for i in both for node, _ in self.gpus[i]}
        return len(nodes) == 1, self.pools("actor")[0] in self.pools("rollout")


def placements(workload, cluster):
    """Every size of every pool; what no pool has is idle."""
    return [
        Placement(structure, tuple(map(gpus_of, pack(counts, cluster))))
        for structure in structures(workload.roles)
        for gpus in range(1, len(cluster.gpus) + 1)
        for counts in sizes(gpus, len(structure)).tolist()
    ]


@dataclass
class Option:
    """A layout of a role on pools with `parts` GPUs per node: seconds [S] of its calls, memory."""

    parts: tuple
    layout: object
    memory: object
    seconds: dict
    chosen: object = field(default=None, repr=False)


@dataclass(frozen=True)
class Given:
    """What the auditor takes from the project: the listed layouts with their seconds and bytes."""

    workload: Workload
    cluster: Cluster
    model: CostModel

    @cached_property
    def device(self):
        return self.cluster.devices["g"]

    @cached_property
    def flow(self):
        return self.workload.dataflow.steady

    def calls_of(self, role):
        """The calls that a role runs alone; of the rollout also what is scored beside it."""
        beside = self.scored_beside if role == "rollout" else []
        return [call.name for call in self.flow.calls if call.roles == (role,)] + beside

    @property
    def scored_beside(self):
        return [call.name for call in self.flow.calls if self.model.scores_beside(call)]

    def place(self, parts):
        return Place(parts=parts, device=self.device)

    def options(self, role, parts):
        if role == "rollout":
            pools = tuple(f"p{i}" for i in range(len(parts)))
            for layout in rollout_layouts(self.workload, parts, pools, self.device):
                seconds = self.model.generate(layout, [self.place(part) for part in parts]).seconds
                yield Option(
                    parts,
                    layout,
                    rollout_memory(self.workload, layout, self.device),
                    {"generate": seconds}
                    | {name: self.model.host(name, seconds).seconds for name in self.scored_beside},
                )
            return
        (on_nodes,) = parts
        node = max(node.gpus for node in self.cluster.nodes)
        for trained in chain.from_iterable(
            trainer_layouts(self.workload, role, ranks, "p", self.device, node)
            for ranks in range(1, min(sum(on_nodes), self.workload.minibatch) + 1)
        ):
            by_call = {
                call: getattr(self.model, self.flow[call].kind)(
                    role, trained, self.place(on_nodes)
                ).seconds
                for call in self.calls_of(role)
            }
            memory = trainer_memory(self.workload, role, trained, self.device)
            yield Option(parts, trained, memory, by_call)

    def sync(self, actor, rollout, same_node, shared):
        return self.model.sync(
            actor.layout,
            self.place(actor.parts[0]),
            rollout.layout,
            [self.place(part) for part in rollout.parts],
            same_node=same_node,
            shared=shared,
        ).seconds


# --- the auditor ---


class Auditor:
    """Mean period over the scenarios, in whole units of time, of the best plan."""

    def __init__(self, given, most=None):
        """`most`: seconds; a plan that takes longer is not looked for."""
        self.given, self.cp = given, cp_model.CpModel()
        self.roles, self.calls = given.workload.roles, given.flow.names
        self.scenarios = range(given.model.scenarios)
        self.placements = {
            p: self.cp.new_bool_var("") for p in placements(given.workload, given.cluster)
        }
        self.cp.add_exactly_one(self.placements.values())
        self.options = {role: self._options(role) for role in self.roles}
        hosts = {
            call.name: given.model.host(call.name).seconds
            for call in given.flow.calls
            if not call.roles and call.name not in given.scored_beside
        }
        least = sum(float(np.mean(s)) for s in hosts.values()) + sum(
            min((float(option.seconds[call].mean()) for option in options), default=1.0)
            for role, options in self.options.items()
            for call in given.calls_of(role)
        )
        self.unit = least / UNITS
        self.longest = (
            10**9
            if most is None
            else round(len(self.scenarios) * most * (1 + TOLERANCE) / self.unit) + 2
        )
        self.seconds = {
            call: [self._whole(s) for s in np.broadcast_to(hosts[call], len(self.scenarios))]
            for call in hosts
        }
        for role, options in self.options.items():
            self._durations(given.calls_of(role), options)
        self._sync()
        self._memory()
        self._schedule()

    def _whole(self, seconds):
        return round(float(seconds) / self.unit)

    def _any(self, placements):
        """A literal: one of some placements is chosen."""
        literal = self.cp.new_bool_var("")
        self.cp.add(sum(self.placements[p] for p in placements) == literal)
        return literal

    def _options(self, role):
        """One layout, on the pools that the placement gives the role."""
        by_parts = {}
        for placement in self.placements:
            by_parts.setdefault(placement.parts(role), []).append(placement)
        found = []
        for parts, here in by_parts.items():
            listed = list(self.given.options(role, parts))
            for option in listed:
                option.chosen = self.cp.new_bool_var("")
            self.cp.add(
                sum(option.chosen for option in listed) == sum(self.placements[p] for p in here)
            )
            found += listed
        return found

    def _durations(self, calls, options):
        stale = self.given.workload.max_staleness
        for call in calls:
            self.seconds[call] = []
            # On the host a call of one step may run beside that of the next, on a pool it does not.
            longest = self.longest * (1 if self.given.flow[call].roles else stale + 1)
            for scenario in self.scenarios:
                values = [
                    (
                        self._whole(
                            np.broadcast_to(o.seconds[call], len(self.scenarios))[scenario]
                        ),
                        o,
                    )
                    for o in options
                ]
                for value, option in values:
                    if value > longest:
                        self.cp.add(option.chosen == 0)
                lasting = self.cp.new_int_var(0, longest, call)
                self.cp.add(
                    lasting == sum(min(value, longest) * option.chosen for value, option in values)
                )
                self.seconds[call].append(lasting)

    def _sync(self):
        """Its duration depends on actor, rollout and how they are linked; layouts alike in that are
        taken together."""
        self.seconds["sync_weights"] = [
            self.cp.new_int_var(0, self.longest, "") for _ in self.scenarios
        ]
        ways = {}
        for placement in self.placements:
            ways.setdefault(
                (placement.parts("actor"), placement.parts("rollout"), placement.linked), []
            ).append(placement)
        for (actor_at, rollout_at, linked), here in ways.items():
            there, table = self._any(here), {}
            engines = [option for option in self.options["rollout"] if option.parts == rollout_at]
            _, shared = linked
            for actor in (option for option in self.options["actor"] if option.parts == actor_at):
                for engine in (
                    engines if shared else ()
                ):  # none may be wider than an actor on its GPUs
                    if engine.layout.tensor_parallel > actor.layout.gpus:
                        self.cp.add(actor.chosen + engine.chosen + there <= 2)
                row = tuple(
                    tuple(
                        self._whole(s)
                        for s in np.broadcast_to(
                            self.given.sync(actor, e, *linked), len(self.scenarios)
                        )
                    )
                    for e in engines
                )
                table.setdefault(row, []).append(actor.chosen)
            for row, actors in table.items():
                columns = {}
                for lasting, option in zip(row, engines, strict=True):
                    columns.setdefault(lasting, []).append(option.chosen)
                for lasting, rollouts in columns.items():
                    met = self.cp.new_bool_var("")
                    self.cp.add(met >= there + sum(actors) + sum(rollouts) - 2)
                    for scenario in self.scenarios:
                        if lasting[scenario] > self.longest:
                            self.cp.add(met == 0)
                        else:
                            self.cp.add(
                                self.seconds["sync_weights"][scenario] >= lasting[scenario]
                            ).only_enforce_if(met)

    def _memory(self):
        """What the roles of a pool keep, less what they give back to an engine that sleeps there,
        and the most that one adds while it runs, fit a GPU; pinned copies a host."""

        def total(role, value):
            return sum(value(option.memory) * option.chosen for option in self.options[role])

        idle = {role: total(role, lambda memory: memory.idle) for role in self.roles}
        running = {role: total(role, lambda memory: memory.running) for role in self.roles}
        given_back = {role: total(role, lambda memory: memory.given_back) for role in self.roles}
        asleep = self.cp.new_bool_var("")
        engines = self.options["rollout"]
        self.cp.add(sum(each.chosen for each in engines if each.layout.offload) == asleep)
        device, by_pool, self.pools = self.given.device, {}, {}
        for placement in self.placements:
            for roles in placement.roles:
                by_pool.setdefault(roles, []).append(placement)
        for roles, here in by_pool.items():
            used = pool_peak((), roles != {"rollout"}, "rollout" in roles, device)
            there = self.pools[roles] = self._any(here)
            for role in roles:
                others = sum(idle[other] for other in roles - {role})
                needed = running[role] + others + used
                if "rollout" in roles:
                    awake = self.cp.add(needed <= device.memory_bytes)
                    awake.only_enforce_if(there, ~asleep)
                    needed -= sum(given_back[other] for other in roles - {role})
                    self.cp.add(needed <= device.memory_bytes).only_enforce_if(there, asleep)
                else:
                    self.cp.add(needed <= device.memory_bytes).only_enforce_if(there)
        for placement, chosen in self.placements.items():
            for node, spec in enumerate(self.given.cluster.nodes):
                self._host(placement, chosen, node, int(0.95 * spec.host_memory_bytes))

    def _host(self, placement, chosen, node, left):
        """Pinned copies on each GPU, and 4 GB for each process of one; 12 bytes a trained parameter
        for each GPU that may be of the replica that is saved, or 4 for the export where the first
        rank is; the batches in flight."""
        workload = self.given.workload
        on_node = {role: placement.on_node(role, node) for role in self.roles}
        for roles, gpus in zip(placement.roles, placement.gpus, strict=True):
            processes = ("rollout" in roles) + (roles != {"rollout"})
            left -= 4 * 10**9 * processes * sum(there == node for there, _ in gpus)
        if node == 0 or any(on_node.values()):
            left -= batch_bytes(workload, workload.max_staleness)
        asleep = 0 if workload.max_staleness == 0 else 2
        pinned, copied, exported = [], [], [0]
        for role in self.roles:
            times = asleep if role == "rollout" else 1
            for option in self.options[role]:
                pinned.append(option.memory.host * times * on_node[role] * option.chosen)
                if role in ("actor", "critic"):
                    count = workload.models[role].shape.parameters(head_of(role))
                    saved = min(option.layout.shard, on_node[role])
                    copied.append(12 * count // option.layout.shard * saved * option.chosen)
            if (
                role in ("actor", "critic")
                and placement.gpus[placement.pools(role)[0]][0][0] == node
            ):
                exported.append(4 * workload.models[role].shape.parameters(head_of(role)))
        self.cp.add(sum(pinned) + sum(copied) <= left).only_enforce_if(chosen)
        self.cp.add(sum(pinned) + max(exported) <= left).only_enforce_if(chosen)

    def _schedule(self):
        """Starts of step 0 and periods, one for each scenario; the order is the same in all."""
        stale = self.given.workload.max_staleness
        least = self._whole(self.given.model.least_period)  # whatever scores has to keep up
        self.periods = [self.cp.new_int_var(least, self.longest, "period") for _ in self.scenarios]
        self.starts = [
            {call: self.cp.new_int_var(0, (stale + 2) * self.longest, call) for call in self.calls}
            for _ in self.scenarios
        ]
        for start in self.starts:
            self.cp.add(start["generate"] == 0)
        fixed = {}  # (u, v) -> the lag of v behind u on their pool
        for v in self.given.flow.calls:
            for read in v.reads:
                u = self.given.flow.writer(read.data)
                if u is None or read.latest or u is v:
                    continue
                self._after(u.name, v.name, read.lag)
                if read.data in self.given.flow.state:  # v is issued before u overwrites it
                    fixed[u.name, v.name] = read.lag
        for u, v in combinations(self.given.flow.calls, 2):
            pools = [
                p
                for p in self.placements
                if any({*u.roles} & roles and {*v.roles} & roles for roles in p.roles)
            ]
            if not pools:
                continue
            lags = list(range(-stale - 1, stale + 2))
            if (u.name, v.name) == ("generate", "sync_weights"):
                lags = list(range(-stale, 1))  # generation uses weights that are -lag updates old
            elif (u.name, v.name) in fixed:
                lags = [fixed[u.name, v.name]]
            elif (v.name, u.name) in fixed:
                lags = [1 - fixed[v.name, u.name]]
            orders = {lag: self.cp.new_bool_var("") for lag in lags}
            self.cp.add(sum(orders.values()) == self._any(pools))
            for lag, order in orders.items():
                self._after(u.name, v.name, lag, order)
                self._after(v.name, u.name, 1 - lag, order)
        for roles, there in self.pools.items():  # follows from the orders, and shortens the proof
            own = [
                self.seconds[call.name] for call in self.given.flow.calls if {*call.roles} & roles
            ]
            for scenario in self.scenarios:
                load = sum(seconds[scenario] for seconds in own)
                self.cp.add(load <= self.periods[scenario]).only_enforce_if(there)
        self.cp.minimize(sum(self.periods))

    def _after(self, u, v, lag, order=None):
        """v of step t starts after u of step t - lag has ended."""
        for scenario in self.scenarios:
            start, period = self.starts[scenario], self.periods[scenario]
            after = self.cp.add(start[v] >= start[u] + self.seconds[u][scenario] - lag * period)
            if order is not None:
                after.only_enforce_if(order)

    def step_seconds(self):
        """None if nothing fits."""
        solver = cp_model.CpSolver()
        # The presolve of OR-Tools 9.15 loses solutions, the best ones or all of them, as in
        # https://github.com/google/or-tools/issues/5274.
        solver.parameters.cp_model_presolve = False
        solver.parameters.num_workers = 1
        solver.parameters.relative_gap_limit = TOLERANCE / 4
        solver.parameters.max_time_in_seconds = PATIENCE
        status = solver.solve(self.cp)
        if status == cp_model.INFEASIBLE:
            return None
        if status != cp_model.OPTIMAL:
            pytest.skip(f"the auditor has not finished within {PATIENCE} s")
        return solver.objective_value * self.unit / len(self.scenarios)
