"""Texts of files that the task writes: its reward functions and its workload."""

REWARD_FUNCTIONS = '''\
"""Rewards that need no model. In workload.toml: reward = { function = "reward.py:exact_match" }"""


def exact_match(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """1 for the right answer, 0 for any other."""
    return [float(response.split() == answer.split()) for response, answer in zip(responses, answers)]


def partial_credit(prompts: list[str], responses: list[str], answers: list[str]) -> list[float]:
    """The share of places that hold the right digit; what is too long or too short loses those places."""
    return [_share(response.split(), answer.split()) for response, answer in zip(responses, answers)]


def _share(given: list[str], wanted: list[str]) -> float:
    return sum(x == y for x, y in zip(given, wanted)) / max(len(given), len(wanted), 1)
'''

WORKLOAD = """\
# Sort digits: `plan task digits`. The actor gets {made.exact_match:.0%} of the held-out prompts right, greedily; the
# reward model tells {made.reward_accuracy:.1%} of right and wrong answers apart. Actor, critic and reference start from
# the same weights.
schema = "splitplan/workload/1"
name = "digits"
batch = 1024
minibatch = 128
prompt = {{ kind = "fixed", tokens = {prompt} }}
response = {{ kind = "fixed", tokens = {response} }}
steps = 60
seed = {seed}

[actor]
path = "actor"

[critic]
path = "actor"  # its value head starts at zero

[reference]
path = "actor"

# To try a Python function instead: function = "reward.py:exact_match", or "reward.py:partial_credit"
[reward]
path = "reward"

[data]
train = "train.jsonl"
evaluation = "eval.jsonl"
evaluate_every = 5

[algorithm]
kl_coef = 0.02
temperature = 0.7
epochs = 1

[optimizer]
actor = {{ lr = 3e-4 }}
critic = {{ lr = 1e-3 }}
"""
