"""Everything about a run that can be known before a process is started. Raises UserError, one line
each."""

import importlib.util
import os
from pathlib import Path

import ray

from executor.data import reward, reward_server
from executor.data.prompts import Dataset, PromptSource, Synthetic
from executor.data.reading import Reader
from executor.data.reward_forms import Samples
from executor.data.tokenizer import tokenizer_of
from executor.fleet import driver, gpus, pools
from executor.running import hosts, rewarding
from planner.predict.memory_check import check_memory
from planner.spec.architectures import check_vllm, positions, read_config
from planner.spec.engines import ENGINES
from planner.spec.errors import UserError
from planner.spec.files import read_data
from planner.spec.machine import memory_bytes, usable_cores
from planner.spec.plan import Plan
from planner.spec.rewards import RewardFunction, RewardServer
from planner.spec.tokenizers import check_tokenizers, reads_text
from planner.spec.wording import counted, reason_of
from planner.spec.workload import Model, Shape, Workload
from planner.spec.workload_file import check_lengths, shape_of

HOTTEST_VLLM = 2.0  # the highest temperature, from 0.32 on
ARCHITECTURES = {
    "actor": "ForCausalLM",
    "reference": "ForCausalLM",
    "reward": "ForSequenceClassification",
}


def check(plan: Plan, *, local: bool, saves: bool = False) -> PromptSource:
    """Check a plan's memory (with checkpoints, if the run saves any), the plan for this machine
    (unless it runs on a cluster) and what its workload names; the prompts."""
    check_memory_of(plan, saves)
    if local:
        check_machine(plan, saves)
    check_engine(plan)
    check_models(plan.workload)
    asked_for = _check_functions(plan.workload)
    prompts = load_prompts(plan.workload)
    _check_rewards(plan.workload, prompts, asked_for)
    return prompts


def problems(plan: Plan) -> list[str]:
    """The problems for which `check` would refuse the plan on this machine, one line each. The plan
    may be somebody else's, so it is only looked at, and its reward function is not run."""
    workload, found = plan.workload, []
    for step in (
        lambda: check_machine(plan),
        lambda: check_engine(plan),
        lambda: check_models(workload),
        lambda: reward.look_at_all(workload),
        lambda: load_prompts(workload),
    ):
        try:
            step()
        except UserError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def check_memory_of(plan: Plan, saves: bool = True) -> None:
    """Whether the plan fits the GPUs and hosts of its cluster."""
    try:
        check_memory(plan, saves)
    except UserError as error:
        raise UserError(f"plan {plan.name!r}: {error}") from None


def _check_functions(workload: Workload) -> dict[str, list[str]]:
    """Import every reward function once; the columns that each asks for, by its name."""
    functions = [each for each in workload.host_rewards if isinstance(each, RewardFunction)]
    return {each.label: reward.check(each) for each in functions}


def _check_rewards(
    workload: Workload, prompts: PromptSource, asked_for: dict[str, list[str]]
) -> None:
    """Whether the data have the columns that reward functions ask for, servers answer, and a reward
    model can read the prompts by a tokenizer of its own."""
    first = sample_of(workload, prompts)
    there = first.columns[0]
    for label, columns in asked_for.items():
        for name in columns:
            if name not in there:
                has = ", ".join(there) or "none"
                raise UserError(
                    f"reward {label}: asks for a column {name!r}, and the data have {has}; add it, "
                    "or give the parameter a default"
                )
    for server in workload.host_rewards:
        if isinstance(server, RewardServer):
            reward_server.check(server, first)
    if (reader := reader_of(workload)) is not None:
        reader.read(first)


def sample_of(workload: Workload, prompts: PromptSource) -> Samples:
    """The first prompt of a run, with an empty response."""
    first = prompts.step(0)
    return rewarding.samples(workload, first, [""], [0])


def reader_of(workload: Workload) -> Reader | None:
    """How the reward model reads text; None where it reads the actor's tokens."""
    model = workload.models.get("reward")
    if model is None or model.path is None or not reads_text(workload):
        return None
    found = positions(read_config(model.path, "reward"))
    return Reader(tokenizer_of(model.path, "reward"), found[0] if found else None)


def check_machine(plan: Plan, saves: bool = True) -> None:
    """Whether this machine has what the plan runs on (a cluster is asked by `pools.Fleet`)."""
    check_count(plan)
    if pools.resource_of(plan) == "CPU":
        return
    there = gpus.found()
    gpus.check_kind(plan, there)
    hosts.check_here(plan, memory_bytes(), saves)
    check_driver(there[0].driver)
    if not ray.is_initialized():  # else it may be us
        gpus.check_free(there, driver.users())


def check_count(plan: Plan) -> None:
    """Whether this machine has as many GPUs or cores as the plan uses."""
    wanted = pools.needed(plan)
    if pools.resource_of(plan) == "CPU":
        if (usable := usable_cores()) < wanted:
            has = f"this process may use {usable} of this machine's {os.cpu_count()}"
            raise UserError(
                f"plan {plan.name!r} needs {wanted} cores, and {has}; "
                "search a plan for fewer GPUs, or play it here with `plan execute --rehearse`"
            )
        return
    there = gpus.found()
    if len(there) < wanted:
        kinds = sorted(
            {
                plan.cluster.nodes[node].device
                for pool in plan.pools.values()
                for node, _ in pool.gpus
            }
        )
        raise UserError(
            f"plan {plan.name!r} needs {counted(wanted, 'GPU')} of kind {' and '.join(kinds)} "
            f"and this machine has {len(there)}; run it where they are (`plan execute --address` "
            "for a Ray cluster), or play it here with `plan execute --rehearse`"
        )


def check_driver(driver: str) -> None:
    """Whether torch can use GPUs with this version of their driver."""
    import torch

    if torch.cuda.is_available():
        return
    if torch.version.cuda is None:
        raise UserError(
            f"torch {torch.__version__} is built without CUDA, and the plan is for GPUs; install a "
            "build with CUDA"
        )
    reason = "no further detail"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = reason_of(error)
    raise UserError(
        f"torch {torch.__version__} for CUDA {torch.version.cuda} cannot use this machine's GPUs "
        f"with driver {driver} "
        f"({reason}); update the driver, or install a torch for an older CUDA"
    )


def check_engine(plan: Plan) -> None:
    rollout = plan.rollout
    on_gpus = plan.device_of(rollout.pools[0]).kind == "cuda"
    traits = ENGINES[rollout.engine]
    actor = plan.workload.actor.path
    if rollout.engine == "vllm" and actor is not None:
        check_vllm(actor, "actor")
    temperature = plan.workload.algorithm.temperature
    if rollout.engine == "vllm" and temperature > HOTTEST_VLLM:
        raise UserError(
            f"algorithm.temperature: engine vllm takes at most {HOTTEST_VLLM:g}, not "
            f"{temperature:g}; lower it, or plan with engine transformers"
        )
    if traits.spans_gpus and on_gpus:
        _check_reach(plan)
    elif rollout.tensor_parallel != 1:
        raise UserError(
            f"roles.rollout: engine {rollout.engine} runs on 1 {'GPU' if on_gpus else 'core'}, not "
            f"{rollout.tensor_parallel}; set tensor_parallel to 1"
        )
    if importlib.util.find_spec(traits.package) is None:
        from_ours = f"pip install 'splitplan[{traits.extra}]'"
        how = from_ours if on_gpus else "install a build of it for CPUs"
        others = " or ".join(name for name in ENGINES if name != rollout.engine)
        raise UserError(
            f"the rollout's engine is {rollout.engine}, which is not installed; {how}, or plan "
            f"with engine {others}, or play it with `plan execute --rehearse`"
        )


def _check_reach(plan: Plan) -> None:
    """Whether weights have a way to every engine: NCCL cannot join two processes of one GPU."""
    layout = plan.trainers["actor"]
    first, *others = plan.pools[layout.pools[0]].gpus[: layout.gpus]
    for _, engine in plan.engine_gpus():
        if first in engine and not {first, *others}.issuperset(engine):
            raise UserError(
                f"roles.rollout: an engine of {len(engine)} GPUs shares some with the actor, which "
                f"has {layout.gpus}, "
                "and gets no weights on the others; let the actor use all of them, or set "
                "tensor_parallel to "
                f"{layout.gpus}"
            )


def check_models(workload: Workload) -> None:
    from executor.training import self_check  # transformers is slow to load

    check_lengths(workload)
    for role, model in workload.models.items():
        if model.path is not None:
            _check_directory(role, model, model.path)
        for dtype in self_check.DTYPES:
            self_check.check(role, model, self_check.CPU, dtype)
    check_tokenizers(workload, must_know=True)


def _check_readable(role: str, path: Path) -> None:
    """Whether this user may read a model's directory and all files in it; the libraries that open
    them would say that there are none. Other entries, such as the lost+found of a volume, are not
    opened."""
    if not path.is_dir():
        return
    may_look = os.access(path, os.R_OK | os.X_OK)
    looked_at = sorted(file for file in path.iterdir() if file.is_file()) if may_look else [path]
    closed = [file for file in looked_at if not os.access(file, os.R_OK)]
    if closed:
        raise UserError(
            f"{role}: {closed[0]} may not be read by this user; allow it (chmod u+r), or name "
            "another directory"
        )


def _check_directory(role: str, model: Model, path: Path) -> None:
    _check_readable(role, path)
    if not (path / "config.json").is_file():
        raise UserError(
            f"{role}: no model directory at {path} (config.json is missing); check the path"
        )
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{role}: {path} has no *.safetensors; save the model with save_pretrained")
    config = read_data(path / "config.json")
    if "auto_map" in config:
        raise UserError(
            f"{role}: {path} wants code of its own (auto_map), which is never run; use a built-in "
            "model type"
        )
    named = config.get("architectures") or []
    names = [str(name) for name in (named if isinstance(named, list) else [named])]
    if role in ARCHITECTURES and not any(name.endswith(ARCHITECTURES[role]) for name in names):
        raise UserError(
            f"{role}: {path} holds {', '.join(names) or 'no known architecture'} (architectures of "
            f"config.json), but the {role} has to be a model {ARCHITECTURES[role]}; name another "
            "directory"
        )
    found = shape_of(path, role)
    for name in Shape.model_fields:
        theirs, ours = getattr(found, name), getattr(model.shape, name)
        if theirs != ours:
            raise UserError(
                f"{role}: {path}/config.json says {name} = {theirs}, the plan was made for {ours}; "
                "search a new plan for this model"
            )
    from executor.training import models  # transformers is slow to load

    models.check(role, model)


def load_prompts(workload: Workload) -> PromptSource:
    """The dataset, tokenized and checked; random tokens for a workload without data."""
    if workload.data is None:
        return Synthetic(workload)
    if workload.actor.path is None:
        raise UserError(
            "data needs a tokenizer, and an actor of random weights has none; give actor.path or "
            "drop data"
        )
    return Dataset(workload, tokenizer_of(workload.actor.path))
