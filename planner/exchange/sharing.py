"""What the launch scripts of all frameworks say alike."""

from collections.abc import Iterator

from planner.exchange.expressing import Expressed
from planner.spec.data import files_of
from planner.spec.frameworks import VERSIONS, FrameworkName
from planner.spec.rewards import Overlong, RewardFunction, RewardServer
from planner.spec.wording import counted
from planner.spec.workload import Workload

NEVER_CLIPPED = 1e9
LITTLE_SECONDS = 0.005  # of a step, relative: a change that costs less is told without seconds


def head_of_script(framework: FrameworkName, found: Expressed, command: str) -> list[str]:
    """The comments at the beginning: what is run, and what is otherwise than in the plan."""
    plan = found.plan
    assert plan.predicted
    step = plan.predicted.step_seconds
    lines = [
        f"{plan.workload.name} with {framework} {VERSIONS[framework]}, as splitplan plans it: "
        f"{step:.3g} s a step predicted.",
        f"Made by: {command}",
    ]
    for change in found.changes:
        costs = abs(change.seconds) >= LITTLE_SECONDS * step
        price = f"{change.seconds:+.3g} s a step" if costs else "at no cost"
        lines.append(f"Otherwise than in the plan, {change.what}: {price}.")
    return lines


def described(found: Expressed) -> str:
    """Pools with their roles and GPUs, in words."""
    texts = []
    for pool, (nodes, gpus) in found.grids.items():
        roles = [role for role, layout in found.plan.roles.items() if pool in layout.pools]
        total = len(found.plan.pools[pool].gpus)
        alike = nodes > 1 and nodes * gpus == total
        size = f"{nodes} × {gpus} GPUs" if alike else counted(total, "GPU")
        texts.append(f"{', '.join(roles)} on {size}")
    return "; ".join(texts)


CALLED = {
    "verl": "verl calls compute_score(data_source, solution_str, ground_truth, extra_info)",
    "openrlhf": "OpenRLHF calls reward_func(queries, prompts, labels) of a file",
    "areal": (
        "your training script gives AReaL reward_fn(prompt, completions, prompt_ids, "
        "completion_ids, answer)"
    ),
    "skyrl": "SkyRL has the step() of an environment of skyrl-gym score a response",
}


def unsaid_rewards(framework: FrameworkName, workload: Workload) -> Iterator[str]:
    """What a framework that takes one reward function cannot be told of the rewards."""
    functions = [reward for reward in workload.all_rewards if isinstance(reward, RewardFunction)]
    if len(workload.all_rewards) > 1:
        names = ", ".join(reward.label for reward in workload.all_rewards)
        yield f"several rewards ({names}): write one function that adds them up with their weights"
    for reward in workload.all_rewards:
        if isinstance(reward, RewardServer):
            yield f"the reward server {reward.url}: write a function that asks it"
        elif isinstance(reward, Overlong) and framework != "areal":
            yield "the penalty on length: add it in the reward function"
    if functions and not functions[0].file:
        yield f"the reward {functions[0].function}: name a function of yours"
    elif functions and functions[0].form != framework:
        yield f"how {functions[0].label} is called: {CALLED[framework]}"


def reward_server(framework: FrameworkName, found: Expressed) -> Iterator[str]:
    """What is said of a reward model by a framework that has none."""
    if "reward" in found.plan.trainers:
        gpus = counted(found.plan.trainers["reward"].gpus, "GPU")
        yield (
            f"the reward model: {framework} has no such role. Serve it yourself on its {gpus}, and "
            "let the reward function ask it. It is predicted as one forward pass over the batch "
            "once that is generated; asked for each sample as it ends, it may take less"
        )


def data_file(workload: Workload, *suffixes: str) -> str:
    """The only file of prompts, if a framework can read such a one; else nothing."""
    files = files_of(workload.data.train) if workload.data else ()
    paths = [file.path for file in files if file.path]
    return str(paths[0]) if len(files) == 1 and paths and paths[0].suffix in suffixes else ""
