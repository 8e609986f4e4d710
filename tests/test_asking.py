"""What mypy knows of calls to other processes: their names, their arguments, what they return."""

import subprocess
import sys
from pathlib import Path

from executor.fleet.asking import Rank
from executor.fleet.worker import Worker

ROOT = Path(__file__).parents[1]
SNIPPET = """
from executor.data.reward import RewardWorker
from executor.data.reward_forms import Samples
from executor.fleet.asking import Rank, ask, to_each
from executor.training.trainer import Trainer

def asks(ranks: list[Rank[Trainer]], samples: Samples) -> None:
    reveal_type(ask(to_each(ranks, Trainer.version_of, "actor")).results)
    to_each(ranks, Trainer.version_of, 3)
    to_each(ranks, Trainer.version_of)
    to_each(ranks, Trainer.versions_of, "actor")
    ranks[0].order(RewardWorker.score, samples)
"""

# What torch and ray are, mypy need not know for it, and reads for a minute.
SETTINGS = """
[mypy]
strict = true

[mypy-numpy.*,pydantic.*,ray.*,torch.*,transformers.*]
follow_imports = skip

[mypy-executor.*,planner.*]
follow_imports = silent
"""


def test_mypy_checks_what_a_process_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    options = [f"--config-file={tmp_path}/mypy.ini", f"--cache-dir={tmp_path}/cache"]
    command = [sys.executable, "-m", "mypy", "--no-error-summary", *options, str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.rpartition("snippet.py:")[2] for line in done.stdout.splitlines()]
    said = [line for line in lines if "note: This is likely" not in line]
    assert len(said) == 5, done.stdout + done.stderr
    assert said[0].startswith('8: note: Revealed type is "') and "list[int]" in said[0]
    assert said[1].startswith("9: error: ") and "[arg-type]" in said[1]
    assert said[2].startswith("10: error: ") and "[call-arg]" in said[2]
    assert said[3].startswith("11: error: ") and "[attr-defined]" in said[3]
    assert said[4].startswith("12: error: ") and "[arg-type]" in said[4]


def test_what_is_sent_is_the_name_of_the_method() -> None:
    rank: Rank[Worker] = Rank(name="it", handle=None)
    order = rank.order(Worker.part, name="wake")
    assert (order.method, order.args, order.kwargs) == ("part", (), {"name": "wake"})
