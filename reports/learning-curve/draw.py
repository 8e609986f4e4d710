"""Draw curve.png from k0.jsonl and k1.jsonl: python draw.py (needs matplotlib)."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

here = Path(__file__).parent
figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120)
for k, colour in ((0, "#0072B2"), (1, "#D55E00")):
    steps = [json.loads(line) for line in (here / f"k{k}.jsonl").read_text().splitlines()]
    found = [(step["step"] + 1, step["exact_match"]) for step in steps if "exact_match" in step]
    axes.plot(
        [x for x, _ in found],
        [y for _, y in found],
        marker="o",
        markersize=4,
        color=colour,
        label=f"k = {k}",
    )
axes.axhline(0.31, color="grey", linestyle=":", linewidth=1, label="before PPO")
axes.set(xlabel="step", ylabel="held-out exact match (greedy)", ylim=(0, 1))
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
figure.tight_layout()
figure.savefig(here / "curve.png")
