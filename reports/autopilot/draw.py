"""Draws results.json, as `run.py` writes it: seconds of each step, and where the plan was switched.

python reports/autopilot/draw.py results.json steps.png
"""

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def draw(results: Path, out: Path) -> None:
    found = json.loads(results.read_text())
    seconds = found["seconds"]["autopilot"]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(seconds)), seconds, ".", markersize=4, color="tab:blue", label="a step")
    known = found["percentiles"]["hindsight"]["25"]
    axes.axhline(known, color="tab:green", label="longer responses, with hindsight (25%)")
    axes.axvline(len(seconds) / 2, color="gray", linestyle=":", label="responses become longer")
    for decision in found["decisions"]:
        if decision["switches"]:
            axes.axvline(decision["steps_done"], color="tab:red", label="a switch")
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.legend(once.values(), once.keys(), fontsize=9, loc="lower right")
    axes.set(xlabel="step", ylabel="seconds", ylim=(0, None))
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
