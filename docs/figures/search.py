"""The pictures of docs/search.md: `python docs/figures/search.py` writes them next to this file.

The numbers in them come from the search itself, so they change with the model of costs.
`tests/test_search_example.py` holds the numbers on the page against the code.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from planner.predict.cycle import cycles
from planner.predict.forecast import forecast
from planner.predict.schedule import steady_edges
from planner.report.gantt import CALL_COLORS
from planner.search import SearchOptions, find
from planner.search.space.placements import Structure, structures
from planner.spec.cluster import make_cluster
from planner.spec.plan import Plan
from planner.spec.workload_file import load_workload

HERE = Path(__file__).parent
WORKLOAD = load_workload(HERE / "example.toml")
CLUSTER = make_cluster(4, "h100", 8)
TWO_POOLS = ("actor/critic", "actor+rollout", "actor=3", "rollout=3")

WIDTH = 8.0  # inches
DARK = {"generate", "advantages", "sync_weights", "values", "update_actor"}  # take white text
GREY = "#6B6B6B"
RED = "#B00020"


def plan_of(max_staleness: int, *pins: str) -> Plan:
    options = SearchOptions(max_staleness=max_staleness, pins=pins, runners_up=0)
    return find(WORKLOAD, CLUSTER, options).best


def save(figure: Figure, name: str) -> None:
    metadata = {"Date": None, "Creator": None}
    figure.savefig(HERE / f"{name}.svg", bbox_inches="tight", metadata=metadata)


def clear(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


# --- the calls of a step ---

PLACES = {
    "generate": (0.0, 1.0),
    "score": (1.5, 2.0),
    "old_logprobs": (1.5, 1.0),
    "values": (1.5, 0.0),
    "advantages": (3.0, 1.0),
    "update_actor": (4.5, 1.5),
    "update_critic": (4.5, 0.5),
    "sync_weights": (6.0, 1.5),
}
ROLE = {
    "generate": "rollout",
    "score": "host",
    "old_logprobs": "actor",
    "values": "critic",
    "advantages": "host",
    "update_actor": "actor",
    "update_critic": "critic",
    "sync_weights": "actor, rollout",
}
SHOWN = [  # arrows that another path does not imply
    ("generate", "score"),
    ("generate", "old_logprobs"),
    ("generate", "values"),
    ("score", "advantages"),
    ("old_logprobs", "advantages"),
    ("values", "advantages"),
    ("advantages", "update_actor"),
    ("advantages", "update_critic"),
    ("update_actor", "sync_weights"),
]


def draw_calls() -> None:
    figure = Figure(figsize=(WIDTH, 2.5))
    axes = figure.add_subplot()
    clear(axes)
    for call, (x, y) in PLACES.items():
        corner, color = (x - 0.55, y - 0.28), CALL_COLORS[call]
        box = FancyBboxPatch(corner, 1.1, 0.56, boxstyle="round,pad=0.02", fc=color, ec="none")
        axes.add_patch(box)
        color = "white" if call in DARK else "black"
        axes.text(x, y + 0.06, call, ha="center", va="center", fontsize=8.5, color=color)
        axes.text(x, y - 0.15, ROLE[call], ha="center", va="center", fontsize=7, color=color)
    for u, v in SHOWN:
        (x0, y0), (x1, y1) = PLACES[u], PLACES[v]
        arrow = {"arrowstyle": "-|>", "color": GREY, "lw": 1.2}
        axes.annotate("", (x1 - 0.58, y1), (x0 + 0.58, y0), arrowprops=arrow)
    dashed = {"arrowstyle": "-|>", "color": GREY, "lw": 1.2, "ls": "--"}
    axes.plot([6.0, 6.0, 0.0], [1.8, 2.55, 2.55], color=GREY, lw=1.2, ls="--")
    axes.annotate("", (0.0, 1.3), (0.0, 2.56), arrowprops=dashed)
    axes.text(3.0, 2.68, "weights for a later step", ha="center", fontsize=8, color=GREY)
    axes.set_xlim(-0.7, 6.7)
    axes.set_ylim(-0.4, 2.9)
    save(figure, "search-calls")


# --- two programs on the same pools ---

LANES = {"actor+rollout": 1, "critic": 0}
SECONDS = 12.2  # that are drawn


def draw_programs() -> None:
    figure = Figure(figsize=(WIDTH, 4.1))
    for number, staleness in enumerate((0, 1)):
        plan = plan_of(staleness, *TWO_POOLS)
        axes = figure.add_subplot(2, 1, number + 1)
        draw_program(axes, plan)
    figure.axes[-1].set_xlabel("seconds", fontsize=8)
    figure.subplots_adjust(hspace=0.5)
    save(figure, "search-programs")


def draw_program(axes: Axes, plan: Plan) -> None:
    """Three steps in the steady state. A red bar marks the calls of the cycle that binds."""
    assert plan.predicted
    period = plan.predicted.step_seconds
    seconds = plan.predicted.call_seconds
    names = plan.dataflow.steady.names
    graph = cycles(names, steady_edges(plan.dataflow, plan.program, plan.pools_of))
    binding = graph.critical([seconds[name] for name in names])
    timeline = forecast(plan, 12)
    begin = min(s.start for s in timeline.spans if s.call == "generate" and s.step == 4)
    for span in timeline.spans:
        x, width = span.start - begin, span.end - span.start
        if not -period < x < SECONDS or span.call in ("score", "advantages"):
            continue
        for pool in span.pools:
            y = LANES[pool]
            axes.add_patch(
                Rectangle((x, y - 0.36), width, 0.72, fc=CALL_COLORS[span.call], ec="white")
            )
            if span.call in binding:
                axes.add_patch(Rectangle((x, y + 0.39), width, 0.09, color=RED))
            if width > 0.75 and x >= 0:
                color = "white" if span.call in DARK else "black"
                text = f"{span.call}\nstep {span.step}"
                axes.text(
                    x + width / 2, y, text, ha="center", va="center", fontsize=6.5, color=color
                ).set_clip_on(True)
    title = f"staleness {plan.staleness}: a step takes {period:.2f} s"
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_yticks(list(LANES.values()), ["actor, rollout\n3 GPUs", "critic\n1 GPU"], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, SECONDS)
    axes.set_ylim(-0.5, 1.55)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


# --- bounds by hand ---

GPUS = 4
KNOWN = 3.775  # seconds of a plan that is known

# Least seconds on 1 to 4 GPUs, as the table of the page has them.
ACTOR = (4.267, 2.144, 1.499, 1.122)
CRITIC = (3.390, 1.705, 1.194, 0.895)
GENERATE = (3.732, 2.347, 1.970, 1.773)
GATHER = (0.0, 0.029, 0.030, 0.031)
TO_OWN_GPUS, ELSEWHERE = 0.080, 0.043  # a sync, without gathering


def load_of(structure: Structure, sizes: Sequence[int], pool: int) -> float:
    """Seconds that the calls of a pool take in turn."""
    roles, at = structure[pool], sizes[pool] - 1
    generating = [i for i, own in enumerate(structure) if "rollout" in own]
    home = next(i for i, own in enumerate(structure) if "actor" in own)
    to_own_gpus, elsewhere = home in generating, generating != [home]
    seconds = 0.0
    if "actor" in roles:
        seconds += ACTOR[at] + (to_own_gpus + elsewhere) * GATHER[at]
    if "critic" in roles:
        seconds += CRITIC[at]
    if "rollout" in roles:
        seconds += GENERATE[min(GPUS, sum(sizes[i] for i in generating)) - 1]
    if "actor" in roles or "rollout" in roles:
        seconds += to_own_gpus * TO_OWN_GPUS + elsewhere * ELSEWHERE
    return round(seconds, 3)


def bound_of(structure: Structure, sizes: Sequence[int]) -> float:
    return max(load_of(structure, sizes, pool) for pool in range(len(structure)))


def largest(structure: Structure) -> list[int]:
    """The largest size of each pool, if every other pool has one GPU."""
    return [GPUS - len(structure) + 1] * len(structure)


def needs(structure: Structure) -> list[int]:
    """GPUs that each pool needs for its calls to take less than the plan that is known; too many
    where none suffice."""
    found = []
    for pool, most in enumerate(largest(structure)):
        sizes = largest(structure)
        for count in range(1, most + 1):
            sizes[pool] = count
            if load_of(structure, sizes, pool) < KNOWN:
                found.append(count)
                break
        else:
            found.append(GPUS + 1)
    return found


def name_of(structure: Structure) -> str:
    return " | ".join(", ".join(sorted(roles, key=ROLES.index)) for roles in structure)


ROLES = ["actor", "critic", "rollout"]
STRUCTURES = sorted(structures(ROLES), key=lambda s: bound_of(s, largest(s)))
WINNER = next(s for s in STRUCTURES if name_of(s) == "actor, rollout | critic")


def draw_box() -> None:
    figure = Figure(figsize=(4.6, 3.3))
    axes = figure.add_subplot()
    for a in (1, 2, 3):
        for c in (1, 2, 3):
            possible = a + c <= GPUS
            bound = bound_of(WINNER, (a, c))
            face = "#BFE3D0" if bound < KNOWN else "#F6D9D5"
            face = face if possible else "#EEEEEE"
            axes.add_patch(Rectangle((a - 0.5, c - 0.5), 1, 1, fc=face, ec="white", lw=2))
            text = f"{bound:.2f} s" if possible else "too many\nGPUs"
            axes.text(a, c, text, ha="center", va="center", fontsize=9 if possible else 7.5)
    axes.add_patch(Rectangle((0.5, 0.5), 3, 3, fill=False, ec="black", lw=1.5))
    least, _ = needs(WINNER)
    at = least - 0.5
    axes.plot([at, at], [0.5, 3.5], color=RED, lw=2.5)
    text = f"less than {KNOWN:.3f} s needs\n{least} GPUs here"
    axes.text(at, 3.6, text, ha="center", fontsize=8, color=RED)
    axes.set_xlim(0.4, 3.6)
    axes.set_ylim(0.4, 4.1)
    axes.set_xticks([1, 2, 3])
    axes.set_yticks([1, 2, 3])
    axes.set_xlabel("GPUs of the actor and the rollout", fontsize=8.5)
    axes.set_ylabel("GPUs of the critic", fontsize=8.5)
    axes.tick_params(labelsize=8.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    save(figure, "search-box")


def draw_structures() -> None:
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.add_subplot()
    for row, structure in enumerate(STRUCTURES):
        bound, best = bound_of(structure, largest(structure)), structure == WINNER
        sizes = " + ".join(map(str, needs(structure)))
        why = f"needs {sizes} GPUs" if bound < KNOWN else "bound too high"
        why = f"{sizes} GPUs: the plan, {plan_of(1).predicted.step_seconds:.2f} s" if best else why
        color = "#009E73" if best else "#BBBBBB" if bound < KNOWN else "#E8B4AC"
        axes.barh(-row, bound, color=color, height=0.72)
        axes.text(0.06, -row, f"{bound:.2f} s", va="center", fontsize=8)
        axes.text(4.75, -row, why, va="center", fontsize=8, color="black" if best else GREY)
    axes.axvline(KNOWN, color=RED, lw=1.8)
    text = f"{KNOWN:.3f} s: a plan that is known"
    axes.text(KNOWN, 0.75, text, ha="center", fontsize=8, color=RED)
    ticks = [-row for row in range(len(STRUCTURES))]
    axes.set_yticks(ticks, map(name_of, STRUCTURES), fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, 4.7)
    axes.set_ylim(0.4 - len(STRUCTURES), 0.6)
    axes.set_xlabel("seconds that no plan of the structure is below", fontsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save(figure, "search-structures")


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "splitplan"
    draw_calls()
    draw_programs()
    draw_box()
    draw_structures()
