"""The pictures of docs/search.md: `python docs/figures/search.py` writes them next to this file.

The numbers in them come from the search itself, so they change with the model of costs.
`tests/test_search_example.py` holds the numbers on the page against the code.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from planner.predict.cycle import cycles
from planner.predict.forecast import forecast
from planner.predict.schedule import steady_edges
from planner.report.gantt import COLORS
from planner.search import find
from planner.spec.cluster import make_cluster
from planner.spec.plan import Plan
from planner.spec.workload import load_workload

HERE = Path(__file__).parent
WORKLOAD = load_workload(HERE / "example.toml")
CLUSTER = make_cluster(4, "h100", 8)
TWO_POOLS = ("actor/critic", "actor+rollout", "actor=3", "rollout=3")

WIDTH = 8.0  # inches
DARK = {"generate", "advantages", "sync_weights", "values", "update_actor"}  # take white text
GREY = "#6B6B6B"
RED = "#B00020"


def plan_of(max_staleness: int, *pins: str) -> Plan:
    return find(WORKLOAD, CLUSTER, max_staleness=max_staleness, pins=pins, keep=1).best


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
        box = FancyBboxPatch(
            (x - 0.55, y - 0.28), 1.1, 0.56, boxstyle="round,pad=0.02", fc=COLORS[call], ec="none"
        )
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
            axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, fc=COLORS[span.call], ec="white"))
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


# --- the box of one structure, and the bounds of all ---

# Least seconds by GPUs (1 to 4), as the table of the page has them.
GENERATE = (3.732, 2.347, 1.970, 1.773)
ACTOR = (4.267, 2.144, 1.499, 1.122)
CRITIC = (3.390, 1.705, 1.194, 0.895)
GATHER = (0.0, 0.029, 0.030, 0.031)
OWN_GPUS = 0.080  # a sync to engines on the actor's GPUs, without gathering


def load_of_actor_and_rollout(gpus: int) -> float:
    at = gpus - 1
    return ACTOR[at] + GENERATE[at] + OWN_GPUS + GATHER[at]


def draw_box() -> None:
    figure = Figure(figsize=(4.6, 3.3))
    axes = figure.add_subplot()
    for a in (1, 2, 3):
        for c in (1, 2, 3):
            possible = a + c <= 4
            bound = max(load_of_actor_and_rollout(a), CRITIC[c - 1])
            kept = possible and bound < 3.775
            face = "#BFE3D0" if kept else "#F6D9D5" if possible else "#EEEEEE"
            axes.add_patch(Rectangle((a - 0.5, c - 0.5), 1, 1, fc=face, ec="white", lw=2))
            text = f"{bound:.2f} s" if possible else "too many\nGPUs"
            axes.text(a, c, text, ha="center", va="center", fontsize=9 if possible else 7.5)
    axes.add_patch(Rectangle((0.5, 0.5), 3, 3, fill=False, ec="black", lw=1.5))
    axes.plot([2.5, 2.5], [0.5, 3.5], color=RED, lw=2.5)
    axes.annotate(
        "less than 3.78 s needs\n3 GPUs here",
        (2.5, 3.5),
        (2.5, 3.6),
        ha="center",
        fontsize=8,
        color=RED,
    )
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


# Each structure, the bound of its box, and the GPUs that its pools need for less than 3.775 s.
STRUCTURES = [
    ("actor | critic | rollout", 2.390, "needs 2 + 1 + 2 GPUs"),
    ("actor, critic | rollout", 2.766, "needs 3 + 2 GPUs"),
    ("actor | critic, rollout", 3.208, "needs 2 + 3 GPUs"),
    ("actor, rollout | critic, rollout", 3.455, "needs 3 + 2 GPUs"),
    ("actor | critic, rollout | rollout", 3.521, "needs 2 + 2 + 1 GPUs"),
    ("actor, rollout | critic", 3.579, "3 + 1 GPUs: the plan, 3.581 s"),
    ("actor, critic, rollout", 3.901, "bound too high"),
    ("actor, rollout | critic | rollout", 4.097, "bound too high"),
    ("actor, rollout | critic, rollout | rollout", 4.097, "bound too high"),
    ("actor, critic, rollout | rollout", 4.649, "bound too high"),
]


def draw_structures() -> None:
    figure = Figure(figsize=(WIDTH, 3.3))
    axes = figure.add_subplot()
    for row, (name, bound, why) in enumerate(STRUCTURES):
        best = name == "actor, rollout | critic"
        color = "#009E73" if best else "#BBBBBB" if bound < 3.775 else "#E8B4AC"
        axes.barh(-row, bound, color=color, height=0.72)
        axes.text(0.06, -row, f"{bound:.2f} s", va="center", fontsize=8)
        axes.text(4.75, -row, why, va="center", fontsize=8, color="black" if best else GREY)
    axes.axvline(3.775, color=RED, lw=1.8)
    axes.text(3.775, 0.75, "3.78 s: a plan that is known", ha="center", fontsize=8, color=RED)
    axes.set_yticks([-row for row in range(10)], [name for name, *_ in STRUCTURES], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlim(0, 4.7)
    axes.set_ylim(-9.6, 0.6)
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
