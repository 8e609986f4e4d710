"""Draw accuracy.png and reward.png from results.csv, and print the table of README.md: python
draw.py (matplotlib)."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
COLOURS = {0: "#000000", 1: "#0072B2", 2: "#009E73", 4: "#D55E00"}
TITLES = {
    "decoupled": "decoupled objective",
    "plain": "plain PPO, ratio to the policy that sampled",
}
LAST = 3  # evaluations that count as the end: steps 50, 55 and 60
WINDOW = 5  # steps over which rewards are averaged

Row = dict[str, float]
runs: dict[tuple[int, str, int], list[Row]] = defaultdict(list)
with (HERE / "results.csv").open() as file:
    for line in csv.DictReader(file):
        key = int(line["k"]), line["objective"], int(line["seed"])
        runs[key].append({name: float(x) for name, x in line.items() if x and name != "objective"})
seeds = sorted({seed for _, _, seed in runs})


def series(rows: list[Row], name: str) -> list[Row]:
    """One row per point that is drawn: evaluations as they are, anything else as means of a few
    steps."""
    if name == "exact_match":
        return [row for row in rows if name in row]
    windows = (rows[at - WINDOW : at] for at in range(WINDOW, len(rows) + 1, WINDOW))
    return [window[-1] | {name: mean(row[name] for row in window)} for window in windows]


def draw(name: str, label: str, out: str) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), dpi=120, sharey=True)
    for column, (objective, title) in enumerate(TITLES.items()):
        for row, unit in enumerate(("step", "seconds")):
            panel = axes[row, column]
            for k, colour in COLOURS.items():
                points = [series(runs[k, objective, seed], name) for seed in seeds]
                values = [[point[name] for point in at] for at in zip(*points, strict=True)]
                offset = 1 if unit == "step" else 0  # steps that are done
                x = [mean(point[unit] for point in at) + offset for at in zip(*points, strict=True)]
                panel.plot(
                    x,
                    [mean(v) for v in values],
                    color=colour,
                    marker="o",
                    markersize=3,
                    label=f"k = {k}",
                )
                panel.fill_between(
                    x,
                    [min(v) for v in values],
                    [max(v) for v in values],
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
            panel.set(xlabel="steps" if unit == "step" else "seconds since the first call")
            panel.grid(alpha=0.3)
            if row == 0:
                panel.set_title(title, fontsize=10)
            if column == 0:
                panel.set_ylabel(label)
    axes[0, 0].legend(loc="lower right", fontsize=9)
    figure.suptitle(
        f"Line: mean of {len(seeds)} seeds; band: from the lowest to the highest", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(HERE / out)


def of_seeds(k: int, objective: str, name: str, last: int) -> list[float]:
    """A mean per seed, of a metric over the last rows that have it."""
    found = ([row[name] for row in runs[k, objective, seed] if name in row] for seed in seeds)
    return [mean(values[-last:]) for values in found]


def steps_until(k: int, objective: str, reward: float) -> float:
    """Until the mean of some steps' rewards reaches this, on average over the seeds."""
    reached = []
    for seed in seeds:
        scores = [row["score"] for row in runs[k, objective, seed]]
        ends = range(WINDOW, len(scores) + 1)
        reached.append(next(end for end in ends if mean(scores[end - WINDOW : end]) >= reward))
    return mean(reached)


def table() -> None:
    titles = (
        "k",
        "objective",
        "held-out exact match",
        "reward",
        "steps to reward 0.5",
        "effective share",
        "clip share",
    )
    print(f"| {' | '.join((*titles, 's a step'))} |\n|{'---|' * (len(titles) + 1)}")
    for k in COLOURS:
        for objective in TITLES:
            match = of_seeds(k, objective, "exact_match", LAST)
            reward = of_seeds(k, objective, "score", 2 * WINDOW)
            cells = [f"{mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in (match, reward)]
            cells.append(f"{steps_until(k, objective, 0.5):.0f}")
            shares = (
                of_seeds(k, objective, name, 60)
                for name in ("importance/effective_share", "actor/clip_share")
            )
            share, clip = (f"{mean(x):.2f}" for x in shares)
            cells += ["–" if objective == "plain" else share, clip]
            seconds = mean(of_seeds(k, objective, "seconds", 1)) / (
                mean(of_seeds(k, objective, "step", 1)) + 1
            )
            print(f"| {k} | {objective} | {' | '.join(cells)} | {seconds:.2f} |")


draw("exact_match", "held-out exact match (greedy)", "accuracy.png")
draw("score", f"reward, mean of {WINDOW} steps", "reward.png")
table()
