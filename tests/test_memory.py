import pytest
from conftest import CALLS

from planner.predict.kv_cache import AMPLE
from planner.predict.memory import (
    COMMUNICATION_BYTES,
    ENGINE_ASLEEP_BYTES,
    ENGINE_WORKSPACE_BYTES,
    LOGIT_CHUNK_TOKENS,
    SPARE,
    RoleMemory,
    activation_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    kv_room,
    plan_memory,
    pool_peak,
    process_bytes,
    rollout_fraction,
    rollout_memory,
    trainer_allowance,
    trainer_memory,
)
from planner.predict.memory_check import check_memory
from planner.spec.cluster import load_device, make_cluster
from planner.spec.errors import UserError
from planner.spec.files import profiles_dir
from planner.spec.lengths import Fixed
from planner.spec.plan import Issue, Plan, Pool, RolloutRole, TrainerRole
from planner.spec.workload import Model, Shape, Workload
from planner.spec.workload_file import load_workload

SHAPE = Shape(hidden=8, layers=3, heads=4, kv_heads=2, intermediate=20, vocab=50)
BLOCK = 8 * 2 * (2 * 4 + 2 * 2) + 3 * 8 * 20 + 2 * 8  # 688
LM = 3 * BLOCK + 400 + 8 + 400
SCALAR = 3 * BLOCK + 400 + 8 + 8
H200 = load_device("h200")
CPU = H200.model_copy(update={"kind": "cpu", "context_bytes": 0})
MODEL = Model(shape=SHAPE, random_weights=True)
SMALL = Workload(
    name="small",
    batch=64,
    minibatch=16,
    prompt=Fixed(tokens=10),
    response=Fixed(tokens=30),
    actor=MODEL,
    critic=MODEL,
    reference=MODEL,
    reward=MODEL,
)
WIDEST = 4 * 8 + 2 * (
    8 + 3 * 20
)  # a token's bytes in a forward pass: residual stream, norm, and the MLP
SEVEN_B = load_workload(profiles_dir() / "workloads" / "7b.toml")


def trainer(**changes: object) -> TrainerRole:
    return TrainerRole.model_validate(
        {"pools": ("a",), "shard": 2, "micro_batch_tokens": 80, "engine": "fsdp", **changes}
    )


def engine(**changes: object) -> RolloutRole:
    return RolloutRole.model_validate(
        {
            "engine": "vllm",
            "pools": ("a",),
            "tensor_parallel": 1,
            "replicas": 2,
            "memory_fraction": 0.5,
            "concurrency": 8,
            **changes,
        }
    )


def test_parameters_by_hand() -> None:
    assert SHAPE.parameters() == LM
    assert SHAPE.parameters("scalar") == SCALAR


def test_activations_by_hand() -> None:
    # outputs of 2 norms and of the attention's projection; q, attention output; k, v; gate, up,
    # product
    numbers = 3 * 8 + 2 * 8 + 2 * 4 + 3 * 20
    assert activation_bytes(SHAPE, H200) == (4 * 8 + 2 * numbers + 4 * (2 + 4), 4 * 8)
    assert activation_bytes(SHAPE, CPU) == (4 * 8 + 4 * numbers + 4 * (2 + 4), 4 * 8)


def test_trained_role_by_hand() -> None:
    full, kept = activation_bytes(SHAPE, H200)
    memory = trainer_memory(SMALL, "actor", trainer(recompute=False), H200)
    parts = {
        "weights": 4 * LM // 2,
        "optimizer": 8 * LM // 2,
        "gradients": 4 * LM // 2,
        "gathered": 2 * (2 * BLOCK + 800) + 6 * BLOCK + 2 * 400,
        "activations": 3 * full * 80,
        "weight window": 2**30,
        "logits": 3 * 80 * 50 * 2,
    }
    assert memory.detail == parts | {"spare": sum(parts.values()) // SPARE}
    assert memory.running == sum(memory.detail.values())
    assert (
        memory.idle == 4 * LM // 2 + 8 * LM // 2 + 4 * LM // 2 + 2**30
    )  # what gradients took, too
    recomputing = trainer_memory(SMALL, "actor", trainer(recompute=True), H200)
    assert recomputing.detail["activations"] == (full + 3 * kept) * 80


def test_frozen_role_by_hand() -> None:
    memory = trainer_memory(SMALL, "reward", trainer(), H200)
    assert memory.idle == 2 * SCALAR // 2
    assert memory.detail["optimizer"] == memory.detail["gradients"] == memory.detail["logits"] == 0
    assert memory.detail["activations"] == WIDEST * 80
    assert trainer_memory(SMALL, "reward", trainer(), CPU).idle == 4 * SCALAR // 2


def test_micro_batch_holds_a_longest_sequence_and_no_more_than_a_ranks_share() -> None:
    def tokens(**changes: object) -> int:
        return (
            trainer_memory(SMALL, "reference", trainer(**changes), H200).detail["activations"]
            // WIDEST
        )

    assert tokens(micro_batch_tokens=1) == 40
    assert tokens(micro_batch_tokens=100) == 100
    assert tokens(micro_batch_tokens=10**6, shard=4) == 64 // 4 * 40


def test_logits_never_exceed_a_chunk_and_come_after_the_activations_of_a_forward_pass() -> None:
    chunk = LOGIT_CHUNK_TOKENS * 152064 * 2
    assert (
        trainer_memory(SEVEN_B, "actor", trainer(micro_batch_tokens=32768), H200).detail["logits"]
        == 3 * chunk
    )
    found = trainer_memory(SEVEN_B, "reference", trainer(micro_batch_tokens=4096), H200).detail
    assert found["logits"] + found["activations"] == chunk > found["activations"]


@pytest.mark.parametrize(
    ("offload", "idle", "host"),
    [("none", 16 * LM // 2, 0), ("optimizer", 4 * LM // 2, 8 * LM // 2), ("all", 0, 12 * LM // 2)],
)
def test_offload_moves_bytes_from_idle_to_the_host(offload: str, idle: int, host: int) -> None:
    memory = trainer_memory(SMALL, "actor", trainer(offload=offload), H200)
    assert (memory.idle - memory.detail["weight window"], memory.host) == (idle, host)
    assert memory.running == trainer_memory(SMALL, "actor", trainer(), H200).running


def test_engine_by_hand() -> None:
    weights, kv = 2 * LM, 8 * 48 * (2 * 3 * 2 * 2 * 2)  # 40 tokens in three blocks of 16
    process = H200.context_bytes + COMMUNICATION_BYTES
    memory = rollout_memory(SMALL, engine(), H200)
    assert memory.detail["weights"] == weights
    assert memory.detail["kv_cache"] == kv
    assert (
        memory.running == memory.idle == int(0.5 * H200.memory_bytes) - process
    )  # reserved from the start
    asleep = rollout_memory(SMALL, engine(offload=True), H200)
    assert (asleep.idle, asleep.host, asleep.running) == (
        ENGINE_ASLEEP_BYTES + weights,
        weights,
        memory.running,
    )
    fraction = rollout_fraction(SMALL, 1, 8, H200)
    needed = weights + kv + ENGINE_WORKSPACE_BYTES + process
    assert needed <= fraction * H200.memory_bytes < needed + 0.01 * H200.memory_bytes


def test_engine_of_transformers_reserves_nothing() -> None:
    memory = rollout_memory(SMALL, engine(engine="transformers"), CPU)
    assert memory.idle == 4 * LM
    assert memory.running == 4 * LM + 8 * 40 * (2 * 3 * 2 * 2 * 4)


def test_more_concurrency_needs_more_and_more_gpus_need_less() -> None:
    by_concurrency = [rollout_fraction(SEVEN_B, 1, c, H200) for c in (32, 64, 128, 256, 512)]
    assert by_concurrency == sorted(by_concurrency)
    assert by_concurrency[0] < by_concurrency[-1]
    by_split = [rollout_fraction(SEVEN_B, tp, 128, H200) for tp in (1, 2, 4)]
    assert by_split == sorted(by_split, reverse=True)
    # more GPUs than heads of keys and values: those are copied, only the weights get less
    assert (
        rollout_memory(SEVEN_B, engine(tensor_parallel=8), H200).detail["kv_cache"]
        == (rollout_memory(SEVEN_B, engine(tensor_parallel=4), H200).detail["kv_cache"])
    )


def test_pool_peak_adds_what_stays_and_the_largest_surplus() -> None:
    members = [RoleMemory(idle=5, running=20, host=0), RoleMemory(idle=7, running=9, host=0)]
    process = H200.context_bytes + COMMUNICATION_BYTES
    assert pool_peak(members, True, True, H200) == 2 * process + 12 + 15
    assert pool_peak((), True, False, H200) == process


def plan(workload: Workload = SEVEN_B, **layouts: TrainerRole | RolloutRole) -> Plan:
    """Everything on the GPUs of one node; `layouts` replace the defaults."""
    trainers = {
        role: trainer(shard=8, micro_batch_tokens=8192, offload="all") for role in workload.models
    }
    roles: dict[str, object] = {
        **trainers,
        "rollout": engine(replicas=8, concurrency=64, memory_fraction=0.35, offload=True),
        **layouts,
    }
    return Plan(
        name="test",
        workload=workload,
        cluster=make_cluster(8),
        pools={"a": Pool(gpus=tuple((0, i) for i in range(8)))},
        roles=roles,
        program=tuple(Issue(call=name) for name in CALLS),
        staleness=0,
    )


def test_a_plan_that_fits_passes() -> None:
    check_memory(plan())
    memory = plan_memory(plan())["a"]
    assert memory.peak <= memory.allowed == H200.memory_bytes
    assert (
        memory.detail["actor"]["idle"] == 2 * 152064 * 3584
    )  # the embedding is the largest weight of the window
    assert memory.detail["actor"]["gradients"] == 4 * SEVEN_B.actor.shape.parameters() // 8


def test_beside_an_engine_that_sleeps_idle_roles_keep_no_gradients() -> None:
    """Every call there gives back what it does not hold: the critic's 4 bytes a parameter on 8
    shards are gone while the actor runs."""
    kept = {role: trainer(shard=8, micro_batch_tokens=8192) for role in ("actor", "critic")}
    asleep = plan(**kept)
    awake = plan(**kept, rollout=asleep.rollout.changed(offload=False))
    gradients = 4 * SEVEN_B.critic.shape.parameters("scalar") // 8
    idle = {
        name: plan_memory(each)["a"].detail["critic"]["idle"]
        for name, each in {"asleep": asleep, "awake": awake}.items()
    }
    assert idle["awake"] - idle["asleep"] == gradients
    assert trainer_memory(SEVEN_B, "critic", kept["critic"], H200).given_back == gradients
    offloaded = trainer(shard=8, micro_batch_tokens=8192, offload="optimizer")
    assert trainer_memory(SEVEN_B, "critic", offloaded, H200).given_back == 0


def test_a_trainer_may_take_what_is_planned_and_a_little_more_as_far_as_it_is_left() -> None:
    process = H200.context_bytes + COMMUNICATION_BYTES
    roles = [
        trainer_memory(SEVEN_B, role, layout, H200) for role, layout in plan().trainers.items()
    ]
    planned = sum(role.idle for role in roles) + max(role.running - role.idle for role in roles)
    assert trainer_allowance(plan(), "a") == planned + COMMUNICATION_BYTES
    awake = plan(rollout=engine(replicas=8, memory_fraction=0.35))
    left = H200.memory_bytes - int(0.35 * H200.memory_bytes) - process
    assert trainer_allowance(awake, "a") == min(left, planned + COMMUNICATION_BYTES)
    crowded = plan(rollout=engine(replicas=8, memory_fraction=0.9))
    assert (
        trainer_allowance(crowded, "a")
        == H200.memory_bytes - int(0.9 * H200.memory_bytes) - process
    )


def test_an_engines_cache_has_what_its_fraction_leaves() -> None:
    awake = plan(rollout=engine(replicas=8, memory_fraction=0.35))
    detail = rollout_memory(SEVEN_B, awake.rollout, H200).detail
    others = detail["weights"] + detail["workspace"] + H200.context_bytes + COMMUNICATION_BYTES
    assert kv_cache_bytes(awake) == int(0.35 * H200.memory_bytes) - others


def test_a_role_that_does_not_fit_is_named_with_numbers() -> None:
    with pytest.raises(UserError) as error:
        check_memory(
            plan(critic=trainer(shard=1, micro_batch_tokens=8192, recompute=False, offload="all"))
        )
    assert "critic needs 1" in str(error.value)
    assert (
        "GB per GPU at shard 1, but 149 GB are there; use shard 2, a smaller micro_batch_tokens"
        in str(error.value)
    )


def test_roles_that_do_not_fit_together_are_named() -> None:
    kept = {
        role: trainer(shard=2, micro_batch_tokens=8192, recompute=False)
        for role in ("actor", "critic")
    }
    with pytest.raises(
        UserError,
        match=r"pool 'a' needs \d+ GB per GPU while actor runs at shard 2 .*critic keeps 42",
    ):
        check_memory(plan(**kept))


def test_memory_fraction_must_hold_a_longest_sequence() -> None:
    with pytest.raises(UserError, match=r"memory_fraction of 0\.\d+ for a longest sequence"):
        check_memory(
            plan(rollout=engine(replicas=8, concurrency=256, memory_fraction=0.1, offload=True))
        )


def test_less_memory_than_slots_need_is_a_limit_of_tokens() -> None:
    tight = engine(replicas=8, concurrency=256, memory_fraction=0.15, offload=True)
    check_memory(plan(rollout=tight))
    room = kv_room(SEVEN_B, tight, H200)
    per_token = kv_bytes_per_token(SEVEN_B.actor.shape, 1, H200)
    memory = rollout_memory(SEVEN_B, tight, H200)
    assert room * per_token <= memory.detail["kv_cache"] < (room + 1) * per_token
    assert memory.running == int(0.15 * H200.memory_bytes) - process_bytes(H200)
    needed = rollout_fraction(SEVEN_B, 1, 256, H200)
    assert kv_room(SEVEN_B, tight.changed(memory_fraction=needed), H200) == AMPLE
    assert kv_room(SEVEN_B, tight.changed(engine="transformers"), H200) == AMPLE
