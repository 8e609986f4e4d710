import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.predict.generation import GenerationRun, generation_seconds
from planner.predict.generation_floors import BatchLengths
from planner.predict.one_wave import deal
from planner.predict.speed import Speed, engine_speed
from planner.spec.cluster import load_device
from planner.spec.workload import Shape

QWEN_1_5B = Shape(
    hidden=1536,
    layers=28,
    heads=12,
    kv_heads=2,
    intermediate=8960,
    vocab=151936,
    tied_embeddings=True,
)
# Powers of two, so that no sum is rounded and a tie is a tie however the seconds are added up.
SLOW = Speed(
    weights=2**-7,
    arithmetic=2**-9,
    attention=2**-13,
    step=2**-9,
    sequence=2**-11,
    prefill_token=2**-10,
    prefill_square=2**-16,
)
FAST = Speed(
    weights=2**-8,
    arithmetic=2**-11,
    attention=2**-14,
    step=2**-10,
    sequence=2**-12,
    prefill_token=2**-12,
    prefill_square=2**-18,
)


class Engine:
    """Token by token: the model of generation.py, written as plainly as possible."""

    def __init__(self, speed: Speed) -> None:
        self.speed, self.clock = speed, 0.0
        self.active: list[list[int]] = []  # [context, tokens still to come, prompt]

    def outstanding(self, limit: int) -> int:
        return sum(prompt + limit for _, _, prompt in self.active)

    def admit(self, prompt: int, response: int, prefills: bool) -> None:
        self.active.append([prompt, response, prompt])
        self.clock += self.speed.prefill(prompt) if prefills else 0.0

    def decode(self) -> int:
        """One step; how many sequences left."""
        contexts = sum(context for context, _, _ in self.active)
        self.clock += self.speed.matrices(len(self.active)) + self.speed.attention * contexts
        self.active = [[context + 1, left - 1, prompt] for context, left, prompt in self.active]
        before = len(self.active)
        self.active = [sequence for sequence in self.active if sequence[1]]
        return before - len(self.active)


def token_by_token(
    prompts: list[int],
    responses: list[int],
    speeds: list[Speed],
    concurrency: int,
    limit: int,
    first: int,
) -> float:
    engines = [Engine(speed) for speed in speeds]
    prefilled = [number < first for number in range(len(prompts))]
    queue = list(zip(prompts, responses, prefilled, strict=True))
    while queue and any(len(engine.active) < concurrency for engine in engines):
        free = [engine for engine in engines if len(engine.active) < concurrency]
        min(free, key=lambda engine: engine.outstanding(limit)).admit(*queue.pop(0))
    leaving = [next_departure(engine) for engine in engines]
    while any(engine.active for engine in engines):
        number = min((n for n, e in enumerate(engines) if e.active), key=lambda n: leaving[n])
        engine, left = engines[number], 0
        while not left:
            left = engine.decode()
        for _ in range(min(left, len(queue))):
            engine.admit(*queue.pop(0))
        leaving[number] = next_departure(engine)
    return max(engine.clock for engine in engines)


def next_departure(engine: Engine) -> float:
    """The clock at the end of the step in which the next sequence ends."""
    ahead = Engine(engine.speed)
    ahead.clock, ahead.active = engine.clock, [list(sequence) for sequence in engine.active]
    while ahead.active and not ahead.decode():
        pass
    return ahead.clock


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=14),
    same_prompt=st.booleans(),
    speeds=st.lists(st.sampled_from([SLOW, FAST]), min_size=1, max_size=3),
    concurrency=st.integers(1, 6),
    first=st.integers(1, 14),
)
def test_events_equal_token_by_token(
    requests: list[tuple[int, int]],
    same_prompt: bool,
    speeds: list[Speed],
    concurrency: int,
    first: int,
) -> None:
    prompts = [requests[0][0] if same_prompt else prompt for prompt, _ in requests]
    responses = [response for _, response in requests]
    seconds = generation_seconds(
        np.array([prompts]), np.array([responses]), speeds, concurrency, 12, first
    )
    assert seconds[0] == token_by_token(prompts, responses, speeds, concurrency, 12, first)


def test_one_sequence_by_hand() -> None:
    # prefill of 4 tokens; 3 steps with contexts 4, 5, 6
    prefill = 4 / 1024 + 16 / 65536
    steps = 3 * (1 / 128 + 1 / 512 + 1 / 2048) + (4 + 5 + 6) / 8192
    seconds = generation_seconds(np.array([[4]]), np.array([[3]]), [SLOW], 8, 10)
    assert seconds == pytest.approx([prefill + steps])


def test_the_samples_of_a_prompt_share_its_prefill() -> None:
    """Two prompts of 40 tokens with two samples each, of one token, on one engine and on two: the
    engine prefills both prompts once, or one each."""
    prefill, step = 40 / 1024 + 1600 / 65536, 1 / 512 + 1 / 128

    def seconds(engines: int, group: int) -> float:
        lengths = np.full((1, 4), 40), np.full((1, 4), 1)
        batch = BatchLengths(*lengths, group)
        run = GenerationRun(batch, [SLOW] * engines, 4, 1)
        run.advance()
        floors = batch.floors(SLOW, np.array([engines]), np.array([4]))
        assert floors[0, 0] <= run.seconds[0]
        assert batch.wave_floors([SLOW], engines)[0] == pytest.approx(run.seconds)
        return float(run.seconds[0])

    assert seconds(1, group=2) == pytest.approx(2 * prefill + step + 4 / 2048 + 160 / 8192)
    assert seconds(2, group=2) == pytest.approx(1 * prefill + step + 2 / 2048 + 80 / 8192)
    assert seconds(2, group=1) == pytest.approx(2 * prefill + step + 2 / 2048 + 80 / 8192)


def test_requests_go_to_the_fewest_outstanding_tokens() -> None:
    # outstanding after each: [21, 0], [21, 11], [21, 22], [32, 22], [32, 33]: then engine 0 has no
    # slot left
    engine, place = deal(np.array([11, 1, 1, 1, 1]), 2, 2, 10)
    assert engine.tolist() == [0, 1, 1, 0]
    assert place.tolist() == [0, 0, 1, 1]
    assert deal(np.array([5, 5, 5]), 2, 8, 10)[0].tolist() == [0, 1, 0]


def test_a_length_is_not_seen_in_advance() -> None:
    """Both long responses land on engine 0, although engine 1 would have been the better place for
    one."""
    prompts, responses = np.array([[4, 4, 4, 4]]), np.array([[90, 2, 90, 2]])
    together = generation_seconds(prompts, responses, [SLOW, SLOW], 2, 100)
    alone = generation_seconds(prompts[:, ::2], responses[:, ::2], [SLOW], 2, 100)
    assert together == pytest.approx(alone)


def test_longest_sequence_not_the_mean_sets_the_time() -> None:
    even = generation_seconds(np.full((1, 8), 4), np.full((1, 8), 50), [FAST], 8, 400)
    skewed = generation_seconds(np.full((1, 8), 4), np.array([[1] * 7 + [393]]), [FAST], 8, 400)
    assert skewed[0] > 4 * even[0]


def test_more_slots_and_more_engines_are_not_slower() -> None:
    rng = np.random.default_rng(3)
    prompts, responses = np.full((4, 96), 32), rng.integers(1, 200, (4, 96))
    speed = engine_speed(QWEN_1_5B, 1, load_device("h200"))

    def seconds(engines: int, concurrency: int) -> float:
        return float(
            generation_seconds(prompts, responses, [speed] * engines, concurrency, 200).mean()
        )

    by_slots = [seconds(2, concurrency) for concurrency in (4, 12, 24, 48)]
    by_engines = [seconds(engines, 48) for engines in (1, 2, 4, 8)]
    assert by_slots == sorted(by_slots, reverse=True)
    assert by_engines == sorted(by_engines, reverse=True)


def test_rate_of_a_measured_engine() -> None:
    """vLLM on an H200 with a 1.5B model decodes about 34,000 tokens/s at 256 sequences."""
    prompts, responses = np.full((1, 256), 256), np.full((1, 256), 512)
    seconds = generation_seconds(
        prompts, responses, [engine_speed(QWEN_1_5B, 1, load_device("h200"))], 256, 512
    )
    assert 34_000 / 1.6 < 256 * 512 / seconds[0] < 34_000 * 1.6


def test_speed_by_hand() -> None:
    shape = Shape(hidden=8, layers=2, heads=2, kv_heads=1, intermediate=16, vocab=10)
    device = load_device("h200").model_copy(
        update={
            "flops": 1e3,
            "memory_bandwidth": 1e2,
            "efficiency_compute": 0.5,
            "efficiency_memory": 0.5,
        }
    )
    speed = engine_speed(shape, 1, device)
    block = 8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16 + 2 * 8
    assert speed.weights == pytest.approx(2 * (2 * block + 80) / 50)
    assert speed.arithmetic == pytest.approx(2 * (2 * block + 80) / 500)
    assert speed.attention == pytest.approx(max(2 * 2 * 1 * 4 * 2 / 50, 4 * 2 * 2 * 4 / 500))
    two = engine_speed(shape, 2, device)
    assert two.weights == pytest.approx(speed.weights / 2)
    assert two.step > speed.step  # the all-reduces
