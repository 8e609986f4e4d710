"""Runs with several rewards: files written for other frameworks, a model with another tokenizer,
processes that score beside generation."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPE, WORDS, make_plan, make_workload

from executor.running import checkpoint
from executor.running.execute import execute, resume
from executor.running.options import RunOptions
from planner.spec.workload import Workload

pytestmark = pytest.mark.ray

HOMES = {"actor": "t", "critic": "t", "rollout": "g", "reward": "g"}

# As verl's documentation has such a file, but for what it computes.
VERL = '''
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """The share of the words that are the ground truth."""
    words = solution_str.split()
    right = sum(word == ground_truth for word in words)
    return {"score": right / max(1, len(words)) + extra_info["index"] / 100, "acc": right > 0}
'''
TRL = """
def length(completions, level, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    return [len(text.split()) / 8 if easy == "easy" else None
            for text, easy in zip(texts, level)]
"""


@pytest.fixture(scope="module")
def directories(
    tmp_path_factory: pytest.TempPathFactory, model_directories: dict[str, Path]
) -> dict[str, Path]:
    """The tiny actor with a chat template, and a reward model that knows the same words by other
    numbers, with a template of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    found = {}
    for role in ("actor", "reward"):
        words = WORDS if role == "actor" else [*WORDS[:2], *reversed(WORDS[2:])]
        numbers = {word: number for number, word in enumerate(words)}
        tokenizer = Tokenizer(WordLevel(numbers, unk_token="<pad>"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
        )
        fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        found[role] = tmp_path_factory.mktemp(role)
        shutil.copytree(model_directories[role], found[role], dirs_exist_ok=True)
        fast.save_pretrained(found[role])
    return found


def workload_of(tmp_path: Path, directories: dict[str, Path], **changes: Any) -> Workload:
    (tmp_path / "verl_reward.py").write_text(VERL)
    (tmp_path / "trl_reward.py").write_text(TRL)
    rows = [
        {
            "data_source": "tiny",
            "prompt": [{"role": "user", "content": f"{i} {i + 1}"}],
            "reward_model": {"style": "rule", "ground_truth": str(i)},
            "extra_info": {"index": i},
            "level": "easy" if i % 2 else "hard",
        }
        for i in range(9)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "train.jsonl").write_text(lines)
    data = {
        "train": tmp_path / "train.jsonl",
        "answer": "reward_model.ground_truth",
        "evaluation": tmp_path / "train.jsonl",
        "evaluate_every": 2,
    }
    rewards = (
        {"function": f"{tmp_path}/verl_reward.py", "processes": 2, "name": "verl"},
        {"path": directories["reward"], "shape": SHAPE, "weight": 0.5, "normalize": True},
        {"function": f"{tmp_path}/trl_reward.py:length", "name": "trl", "clip": [0, 0.5]},
        {"overlong_buffer": 4, "name": "overlong"},
    )
    actor = {"shape": SHAPE, "path": directories["actor"]}
    base = {"actor": actor, "critic": actor, "reference": None, "reward": None, "data": data}
    return make_workload(**{**base, "rewards": rewards, "steps": 4, **changes})


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The metrics without what differs from run to run."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [
        {
            name: value
            for name, value in json.loads(line).items()
            if name not in timed and not name.startswith(("idle/", "busy/"))
        }
        for line in lines
    ]


def test_four_rewards_one_of_them_a_model_of_another_tokenizer(
    on_two_cores: None, tmp_path: Path, directories: dict[str, Path]
) -> None:
    """A run in one go; then one that goes on from its middle, where a batch is generated and not
    yet scored: number for number."""
    workload = workload_of(tmp_path, directories)
    order = [name for name in workload.dataflow.names if name != "evaluate"]
    plan = make_plan(
        workload,
        {"t": 1, "g": 1},
        HOMES,
        order=[*order, "evaluate"],
        offsets={"generate": 1},
        staleness=1,
        name="one-step-off",
    )
    options = RunOptions(save_every=2)
    whole = execute(plan, name="whole", runs=tmp_path, options=options)
    metrics = metrics_of(whole)
    names = {"score/verl", "score/trl", f"score/{directories['reward'].name}", "score/overlong"}
    assert names <= metrics[0].keys() and metrics[0]["dropped"] == 0
    assert 0 <= metrics[0]["score/verl"] < 2 and -1 <= metrics[0]["score/overlong"] <= 0
    assert "evaluation_score" in metrics[1]
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    middle = checkpoint.find(again / "checkpoints" / "step-000002")
    for ours, theirs in zip(metrics_of(resume(middle, options=options)), metrics, strict=True):
        assert ours == theirs


def test_groups_are_selected_by_all_rewards_together(
    on_two_cores: None, tmp_path: Path, directories: dict[str, Path]
) -> None:
    """GRPO on messages with a file for verl as it is: twice as many sequences are scored as are
    trained on."""
    workload = workload_of(
        tmp_path,
        directories,
        critic=None,
        algorithm={"advantage": "grpo", "oversampling_factor": 2.0},
        samples_per_prompt=2,
        max_staleness=0,
        steps=2,
    )
    order = [name for name in workload.dataflow.names if name != "evaluate"]
    assert order.index("score_on_host") < order.index("select")
    homes = {role: home for role, home in HOMES.items() if role != "critic"}
    plan = make_plan(workload, {"t": 1, "g": 1}, homes, order=[*order, "evaluate"], name="grpo")
    metrics = metrics_of(execute(plan, name="grpo", runs=tmp_path))
    assert [line["groups/generated"] for line in metrics] == [8, 8]
    assert all("score/verl" in line and line["dropped"] == 0 for line in metrics)
    said = [json.loads(line) for line in (tmp_path / "grpo/samples.jsonl").read_text().splitlines()]
    assert {"score", "verl", "trl", directories["reward"].name} <= said[0]["scores"].keys()
