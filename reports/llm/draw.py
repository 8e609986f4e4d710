"""Draw accuracy.png from results.csv, and print the tables of README.md: python draw.py
(matplotlib)."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
TITLES = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO"}
COLOURS = {0: "#000000", 1: "#D55E00"}
QUESTIONS = {"chain_sum": 50, "products": 25, "gcd": 200}  # held out
WINDOW = 5  # steps over which rewards are averaged

Accuracy = dict[str, float]  # by task, and of all questions together
Run = tuple[str, int]

seeds: dict[Run, list[str]] = defaultdict(list)
rewards: dict[tuple[Run, str], list[float]] = defaultdict(list)
held_out: dict[tuple[Run, str], dict[int, Accuracy]] = defaultdict(dict)


def read() -> None:
    with (HERE / "results.csv").open() as file:
        for row in csv.DictReader(file):
            run, seed = (row["algorithm"], int(row["k"])), row["seed"]
            if seed not in seeds[run]:
                seeds[run].append(seed)
            rewards[run, seed].append(float(row["score"]))
            for prefix, done in (("initial_evaluation", 0), ("evaluation", int(row["step"]) + 1)):
                if row[f"{prefix}/gcd/pass@1"]:
                    found = {task: float(row[f"{prefix}/{task}/pass@1"]) for task in QUESTIONS}
                    right = sum(found[task] * count for task, count in QUESTIONS.items())
                    found["all"] = right / sum(QUESTIONS.values())
                    held_out[run, seed][done] = found


def at(run: Run, done: int, task: str = "all") -> list[float]:
    """The accuracy of each seed after so many steps; none where no run took them."""
    found = (held_out[run, seed].get(done) for seed in seeds[run])
    return [accuracy[task] for accuracy in found if accuracy]


def draw() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(10, 5.6), dpi=120, sharex=True, sharey=True)
    for column, (algorithm, title) in enumerate(TITLES.items()):
        for k, colour in COLOURS.items():
            run = (algorithm, k)
            steps = [done for done in (0, 10, 20, 30) if at(run, done)]
            line(axes[0, column], steps, [at(run, done) for done in steps], k, colour)
            length = min(len(rewards[run, seed]) for seed in seeds[run])
            ends = [*range(WINDOW, length + 1, WINDOW)]
            means = [
                [mean(rewards[run, seed][end - WINDOW : end]) for seed in seeds[run]]
                for end in ends
            ]
            line(axes[1, column], ends, means, k, colour)
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel("steps")
    axes[0, 0].set_ylabel("held-out questions, greedy")
    axes[1, 0].set_ylabel(f"reward, mean of {WINDOW} steps")
    axes[0, 0].set_ylim(0, 0.85)
    axes[0, 0].legend(loc="lower right", fontsize=9)
    figure.suptitle("Line: mean of three seeds; band: from the lowest to the highest", fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "accuracy.png")


def line(panel: plt.Axes, x: list[int], of_seeds: list[list[float]], k: int, colour: str) -> None:
    means = [mean(values) for values in of_seeds]
    panel.plot(x, means, color=colour, marker="o", markersize=3, label=f"k = {k}")
    lowest, highest = [min(v) for v in of_seeds], [max(v) for v in of_seeds]
    panel.fill_between(x, lowest, highest, color=colour, alpha=0.15, lw=0)
    panel.grid(alpha=0.3)


def spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "–"


def tables() -> None:
    print("| | k | before | 10 steps | 20 steps | 30 steps | reward, last 5 steps |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in all_runs():
        last = [mean(rewards[run, seed][-WINDOW:]) for seed in seeds[run]]
        cells = [f"{at(run, 0)[0]:.2f}", *(spread(at(run, done)) for done in (10, 20, 30))]
        print(f"| {TITLES[run[0]]} | {run[1]} | {' | '.join(cells)} | {spread(last)} |")
    print("\n| task | questions | before | after 20 steps, 18 runs |")
    print("| --- | ---: | ---: | ---: |")
    for task, count in QUESTIONS.items():
        after = [value for run in all_runs() for value in at(run, 20, task)]
        print(f"| `{task}` | {count} | {at(('ppo', 0), 0, task)[0]:.2f} | {spread(after)} |")


def all_runs() -> list[Run]:
    return [(algorithm, k) for algorithm in TITLES for k in COLOURS]


read()
draw()
tables()
