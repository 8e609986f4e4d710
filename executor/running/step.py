"""One PPO step: what each call does, seen from the controller. Their order is the plan's, kept by
the loop in `loop.py`; what is learned from is said in `learning.py`; what happens on the GPUs is in
`trainer.py` and in the engines of `executor/rollout`."""

import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from executor.data.batch import Generated, Sequences, assign, collate, join, minibatches, spread
from executor.data.prompts import Prompts, PromptSource
from executor.data.rating import add_up
from executor.data.requests import Rows
from executor.fleet.asking import Answers, ask, to_each
from executor.fleet.pools import Fleet
from executor.fleet.worker import DiedAgain, Record
from executor.rollout.engine import EngineWorker
from executor.running import checkpoint, evaluation, learning
from executor.running.checkpoint import Checkpoint
from executor.running.export import export_models
from executor.running.preflight import reader_of
from executor.running.processes import Processes
from executor.running.rewarding import Early, Rated, Rewarding
from executor.running.said import Listener, Said, lines_of
from executor.running.saving import Snapshot
from executor.running.step_figures import spread_of
from executor.running.supervise import Deadlines
from executor.training import kl
from executor.training.aggregation import mean_stats
from executor.training.trainer import COLUMNS, Minibatch, Trainer
from planner.predict.schedule import Task
from planner.spec.data import Sampler
from planner.spec.engines import ENGINES
from planner.spec.errors import UserError
from planner.spec.plan import Plan
from planner.spec.rewards import Overlong
from planner.spec.workload import RewardModel

MOST_SKIPPED = 8  # optimizer steps in a row without finite gradients
# Between log-probs of an engine and of training with the same weights, on average. Rounding to bf16
# made at most 0.05 on GPUs.
LARGEST_GAP = 0.5
Done = tuple[list[Record], int]  # the records of a call's processes, and its tokens


@dataclass(kw_only=True)
class StepData:
    """What the calls of a step have made so far."""

    prompts: Prompts
    sequences: Sequences
    batch: ray.ObjectRef[Any]  # the sequences in Ray's object store
    early: Early | None = None  # what is scored beside generation
    rated: Rated = field(default_factory=dict)
    scores: NDArray[np.float32] | None = None  # [B], of all rewards together
    selected: Rows | None = None  # [B], of all that were generated
    columns: COLUMNS = field(default_factory=dict)  # [B, R] by the name of the datum
    metrics: dict[str, Any] = field(default_factory=dict)

    def take(self, rows: Rows) -> None:
        """Go on with these sequences alone."""
        assert self.scores is not None
        self.selected, self.prompts = rows, self.prompts.take(rows)
        self.sequences, self.scores = self.sequences.take(rows), self.scores[rows]
        self.rated = {number: scores[rows] for number, scores in self.rated.items()}
        self.batch = ray.put(self.sequences)

    def drop_unscored(self) -> None:
        """Sequences without a finite score become prompts with empty responses, from which nothing
        is learned."""
        assert self.scores is not None
        unscored = ~np.isfinite(self.scores)
        self.metrics["dropped"] = int(unscored.sum())
        if unscored.any():
            lengths = np.where(unscored, 0, self.sequences.response_lengths).astype(np.int32)
            self.sequences = replace(self.sequences, response_lengths=lengths)
            self.batch = ray.put(self.sequences)
            self.scores = np.where(unscored, np.float32(0), self.scores)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The data that a checkpoint keeps of it, without the metrics; prompts can be had again."""
        found = {f"sequences/{f.name}": getattr(self.sequences, f.name) for f in fields(Sequences)}
        found |= {f"columns/{name}": column for name, column in self.columns.items()}
        for name in ("scores", "selected"):
            if (array := getattr(self, name)) is not None:
                found[name] = array
        found |= {f"rated/{number}": scores for number, scores in self.rated.items()}
        return found

    @classmethod
    def restored(
        cls, prompts: Prompts, arrays: dict[str, NDArray[Any]], metrics: dict[str, Any]
    ) -> "StepData":
        sequences = Sequences(**{f.name: arrays[f"sequences/{f.name}"] for f in fields(Sequences)})
        columns = {
            name.removeprefix("columns/"): x
            for name, x in arrays.items()
            if name.startswith("columns/")
        }
        selected = arrays.get("selected")
        rated = {
            int(name.removeprefix("rated/")): x
            for name, x in arrays.items()
            if name.startswith("rated/")
        }
        return cls(
            prompts=prompts if selected is None else prompts.take(selected),
            sequences=sequences,
            batch=ray.put(sequences),
            rated=rated,
            scores=arrays.get("scores"),
            selected=selected,
            columns=columns,
            metrics=metrics,
        )


class Training:
    """A plan's processes and the data of the steps under way. Each call is a method of its name; it
    waits for its processes and returns their records and its tokens."""

    def __init__(
        self,
        plan: Plan,
        prompts: PromptSource,
        fleet: Fleet | None = None,
        deadlines: Deadlines | None = None,
        resumed: Checkpoint | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.listener = listener or Listener()
        self.plan, self.workload, self.settings, self.prompts = (
            plan,
            plan.workload,
            plan.workload.algorithm,
            prompts,
        )
        self.steps: dict[int, StepData] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.deadlines = deadlines or Deadlines(plan=plan)
        torch.set_num_threads(
            1
        )  # of this process, for small work; each thread of the loop would start its own
        self.skipped: dict[
            str, int
        ] = {}  # optimizer steps in a row without finite gradients, by role
        self.kl_coef = self.settings.kl_coef
        self.processes = Processes(plan, fleet, self.deadlines, resumed.saved if resumed else None)
        self.rewarding = Rewarding(
            self.workload, prompts, self.processes.judges, self.processes.tray
        )
        self.reader = reader_of(self.workload)
        if resumed:
            self._restore(resumed)

    def run(self, task: Task) -> Done:
        call = getattr(self, task.call.name)
        done: Done = call(task)
        return done

    # --- the calls ---

    def generate(self, task: Task) -> Done:
        prompts = self.prompts.step(task.step)
        assert task.weights_version is not None
        version = task.weights_version
        early, workload = self.rewarding.begin(prompts), self.workload
        sequences, answers = self._generate(
            version, prompts, workload.sampler, workload.group, early
        )
        self.steps[task.step] = StepData(
            prompts=prompts, sequences=sequences, batch=ray.put(sequences), early=early
        )
        return answers.records, int(sequences.response_lengths.sum())

    def score(self, task: Task) -> Done:
        step = self.steps[task.step]
        if task.pools:
            number = self._number_of_model
            read, batch = self._read(step)
            step.rated[number], done = self._infer(task, "reward", read, batch)
            self._add_up(step)
            return done
        return self.score_on_host(task)

    def score_on_host(self, task: Task) -> Done:
        step = self.steps[task.step]
        responses = step.sequences.responses()
        rated, records = self.rewarding.score(step.prompts, responses, step.early)
        step.rated |= rated
        self._add_up(step)
        return records, int(step.sequences.lengths.sum())

    def _read(self, step: StepData) -> tuple[Sequences, ray.ObjectRef[Any]]:
        """The sequences of a step as the reward model reads them."""
        if self.reader is None:
            return step.sequences, step.batch
        responses = step.sequences.responses()
        given = self.rewarding.samples(step.prompts, responses, range(len(responses)))
        read = self.reader.read(given)
        return read, ray.put(read)

    @property
    def _number_of_model(self) -> int:
        """The number of the model among the rewards."""
        rewards = self.workload.all_rewards
        return next(at for at, reward in enumerate(rewards) if isinstance(reward, RewardModel))

    def _add_up(self, step: StepData) -> None:
        """Make one score of all rewards, once all calls that score have ended."""
        rewards = self.workload.all_rewards
        given = [at for at, each in enumerate(rewards) if not isinstance(each, Overlong)]
        if all(at in step.rated for at in given):
            lengths, longest = step.sequences.response_lengths, self.workload.response.longest
            step.scores, means = add_up(rewards, step.rated, lengths, longest)
            step.metrics |= means

    def select(self, task: Task) -> Done:
        """Keep the groups whose scores differ, as many as a batch has."""
        start = time.perf_counter()
        step, workload = self.steps[task.step], self.workload
        assert step.scores is not None
        rows, metrics = learning.select(step.scores, workload.group, workload.batch)
        step.metrics |= metrics
        step.take(rows)
        return [Record(start=start, end=time.perf_counter())], int(step.sequences.lengths.sum())

    def ref_logprobs(self, task: Task) -> Done:
        self.steps[task.step].columns["ref_log_probs"], done = self._column(task, "reference")
        return done

    def old_logprobs(self, task: Task) -> Done:
        self.steps[task.step].columns["proximal_log_probs"], done = self._column(task, "actor")
        return done

    def values(self, task: Task) -> Done:
        self.steps[task.step].columns["values"], done = self._column(task, "critic")
        return done

    def advantages(self, task: Task) -> Done:
        start = time.perf_counter()
        step = self.steps[task.step]
        ended = self._ended(step.prompts, step.sequences)
        self._tell_of_step(task.step, ended)
        step.drop_unscored()
        step.columns["log_probs"] = step.sequences.log_probs
        step.columns.setdefault("proximal_log_probs", step.sequences.log_probs)
        assert step.scores is not None
        columns, metrics = learning.estimate(
            self.workload,
            step.columns,
            scores=step.scores,
            mask=step.sequences.mask,
            ended=ended,
            kl_coef=self.kl_coef,
        )
        step.columns |= columns
        step.metrics |= metrics
        fresh = task.step == 0  # at any staleness: nothing was updated before
        if fresh and not self.workload.sampler.cuts:
            check_agreement(metrics["log_prob_gap"], self.plan)
        some = step.sequences.response_lengths > 0
        step.metrics |= spread_of("score", step.scores[some])
        step.metrics |= spread_of("response_tokens", step.sequences.response_lengths[some])
        self._adapt_kl(step)
        tokens = int(step.sequences.response_lengths.sum())
        return [Record(start=start, end=time.perf_counter())], tokens

    def _adapt_kl(self, step: StepData) -> None:
        """Let the weight of the KL penalty follow its target, from the next step on."""
        settings = self.settings
        if settings.kl_target is not None:
            step.metrics["kl_coef"] = self.kl_coef
            self.kl_coef = kl.adapted_coef(
                self.kl_coef,
                step.metrics["kl"],
                target=settings.kl_target,
                sequences=self.workload.batch,
                horizon=settings.kl_horizon,
            )

    def update_critic(self, task: Task) -> Done:
        return self._train(task, "critic", ("values", "returns"))

    def update_actor(self, task: Task) -> Done:
        if task.step < self.settings.critic_warmup:
            return self._train(task, "actor", (), epochs=0)
        columns = ["advantages", "proximal_log_probs", "weights"]
        if self.settings.kl_kind != "k1" and self.workload.reference:
            columns.append("ref_log_probs")  # the KL penalty is part of the loss
        return self._train(task, "actor", tuple(columns))

    def sync_weights(self, task: Task) -> Done:
        assert task.weights_version is not None
        return self.processes.sync_weights(task.weights_version), 0

    def evaluate(self, task: Task) -> Done:
        assert task.weights_version is not None
        figures, done = self._evaluate(task.step, task.weights_version)
        self.evaluations.setdefault(task.step, {}).update(figures)
        return done

    def evaluate_first(self) -> dict[str, float]:
        """Evaluate the weights that the run begins with; the figures go to the first step."""
        figures, _ = self._evaluate(0, 0)
        found = {f"initial_{name}": figure for name, figure in figures.items()}
        self.evaluations.setdefault(0, {}).update(found)
        return found

    def _evaluate(self, step: int, version: int) -> tuple[dict[str, float], Done]:
        """Responses to the held-out prompts of each evaluation: their scores by the reward
        function, or without one whether they equal the answer."""
        figures: dict[str, float] = {}
        records: list[Record] = []
        tokens = 0
        for held_out in self.prompts.evaluations():
            prompts = held_out.prompts
            settings = held_out.settings
            sequences, answers = self._generate(version, prompts, settings, settings.samples)
            responses = self.prompts.decode(sequences.responses())
            records += answers.records
            by_rewards = bool(self.workload.host_rewards)
            if by_rewards:
                rated, of_judges = self.rewarding.score(prompts, sequences.responses())
                scores, by_name = self.rewarding.evaluated(rated), self._by_name(rated)
                records += of_judges
            else:
                scores, by_name = evaluation.equal(responses, prompts.answers), {}
            figures |= evaluation.figures(held_out.settings, scores, responses, by_rewards)
            if self.listener.listens:
                lines = lines_of(
                    step=step,
                    evaluation=held_out.settings.name,
                    prompts=prompts,
                    sequences=sequences,
                    responses=responses,
                    ended=self._ended(prompts, sequences),
                    scores={"score": scores, **by_name},
                    rows=np.arange(len(responses)),
                )
                self.listener.add(lines)
            tokens += int(sequences.response_lengths.sum())
        return figures, (records, tokens)

    # --- what they share ---

    def _by_name(self, rated: Rated) -> dict[str, NDArray[np.float32]]:
        """Scores by the names of the rewards, where there are several."""
        rewards = self.workload.rewards
        return {rewards[at].label: scores for at, scores in rated.items() if rewards}

    def _ended(self, prompts: Prompts, sequences: Sequences) -> NDArray[np.bool_]:
        """Whether a response ended by itself, `[B]`."""
        stopped = [cut is not None for cut in self.prompts.stopped(sequences.responses())]
        return prompts.requests.exact | sequences.ended(self.processes.eos) | stopped

    def _tell_of_step(self, number: int, ended: NDArray[np.bool_]) -> None:
        """Tell the listener of the sequences that it wants."""
        step = self.steps[number]
        rows = self.listener.rows(number, len(step.prompts.texts))
        responses = step.sequences.responses()
        assert step.scores is not None
        lines = lines_of(
            step=number,
            evaluation=None,
            prompts=step.prompts,
            sequences=step.sequences,
            responses=self.prompts.decode([responses[row] for row in rows]),
            ended=ended[rows],
            scores={"score": step.scores, **self._by_name(step.rated)},
            rows=rows,
        )
        self.listener.add(lines)

    def _generate(
        self,
        version: int,
        prompts: Prompts,
        sampler: Sampler,
        group: int,
        early: Early | None = None,
    ) -> tuple[Sequences, Answers[Generated]]:
        """Responses to some prompts, by weights of a version; those that finish are scored
        `early`."""
        try:
            sequences, answers = self._generated(version, prompts, sampler, group, early)
        except BaseException:
            if early is not None:
                early.stop()
            raise
        if early is not None:
            early.finish(sequences.responses())
        return sequences, answers

    def _generated(
        self, version: int, prompts: Prompts, sampler: Sampler, group: int, early: Early | None
    ) -> tuple[Sequences, Answers[Generated]]:
        requests, engines = prompts.requests, self.processes.engines
        longest = self.workload.response.longest
        shares = assign(requests.lengths, len(engines), longest, group)
        orders = [
            engine.order(
                EngineWorker.generate,
                requests.take(rows),
                sampler,
                early.hand_over(rows) if early is not None else None,
            )
            for engine, rows in zip(engines, shares, strict=True)
        ]
        try:
            answers = ask(orders, revive=self.processes.revive)
        except DiedAgain as error:
            given = prompts.named(shares[error.number])
            raise DiedAgain(f"{error}; they were given {given}", error.number) from error
        sequences = collate(requests, shares, answers.results)
        used = set(sequences.weights_versions.tolist())
        assert used == {version}, f"sampled with weights {used}, the plan says {version}"
        return self._cut(sequences), answers

    def _cut(self, sequences: Sequences) -> Sequences:
        """End responses behind their stop strings, which engines do not look for."""
        stopped = self.prompts.stopped(sequences.responses())
        if stopped == [None] * len(stopped):
            return sequences
        pairs = zip(stopped, sequences.response_lengths.tolist(), strict=True)
        lengths = [whole if cut is None else cut for cut, whole in pairs]
        return replace(sequences, response_lengths=np.array(lengths, dtype=np.int32))

    def _column(self, task: Task, role: str) -> tuple[NDArray[np.float32], Done]:
        step = self.steps[task.step]
        return self._infer(task, role, step.sequences, step.batch)

    def _infer(
        self, task: Task, role: str, sequences: Sequences, batch: ray.ObjectRef[Any]
    ) -> tuple[NDArray[np.float32], Done]:
        """What a role makes of some sequences, which are `batch` in the object store."""
        lengths, version, ranks = sequences.lengths, task.weights_version, self.processes.of(role)
        most = self.micro_batch_tokens(task, role)
        shares = spread(np.arange(len(lengths)), lengths, len(ranks), most)
        answers = ask(
            [
                rank.order(Trainer.infer, role, version, [batch], share)
                for rank, share in zip(ranks, shares, strict=True)
            ]
        )
        shape = lengths.shape if role == "reward" else sequences.mask.shape
        return join(shares, answers.results, shape), (answers.records, int(lengths.sum()))

    def _train(
        self, task: Task, role: str, columns: tuple[str, ...], epochs: int | None = None
    ) -> Done:
        """Epochs of minibatches, each formed over the whole batch and then spread over the
        ranks."""
        step, ranks = self.steps[task.step], self.processes.of(role)
        lengths, workload = step.sequences.lengths, self.workload
        counted = step.sequences.response_lengths  # the tokens of each sequence that are learned
        if "weights" in columns:
            counted = np.count_nonzero(step.columns["weights"], axis=1)
        most = self.micro_batch_tokens(task, role)
        each: list[list[Minibatch]] = [[] for _ in ranks]
        epochs = self.settings.epochs if epochs is None else epochs
        for epoch in range(epochs):
            key = workload.seed, task.step, epoch
            for rows in minibatches(len(lengths), workload.minibatch, *key, group=workload.group):
                tokens, sequences = counted[rows].sum(), np.count_nonzero(counted[rows])
                shares = spread(rows, lengths, len(ranks), most)
                for rank, share in enumerate(shares):
                    minibatch = Minibatch(
                        micro_batches=share, tokens=int(tokens), sequences=int(sequences)
                    )
                    each[rank].append(minibatch)
        needed = ray.put({name: step.columns[name] for name in columns})
        version = task.weights_version
        assert version is not None, "an update makes a version of the weights"
        answers = ask(
            [
                rank.order(Trainer.train, role, version, [step.batch, needed], share)
                for rank, share in zip(ranks, each, strict=True)
            ]
        )
        if epochs:
            step.metrics |= _train_metrics(role, answers.results)
        self._count_skipped(task, role, [part["grad_norm"] for part in answers.results[0]])
        return answers.records, int(lengths.sum()) * epochs

    def _count_skipped(self, task: Task, role: str, norms: list[float]) -> None:
        for norm in norms:
            self.skipped[role] = 0 if np.isfinite(norm) else self.skipped.get(role, 0) + 1
            if self.skipped[role] >= MOST_SKIPPED:
                raise UserError(
                    f"{task.call.name} of step {task.step}: loss or gradient was not finite in "
                    f"{MOST_SKIPPED} "
                    "optimizer steps in a row, which were left out; look at the rewards and the "
                    f"{role}'s learning "
                    "rate, and resume from the last checkpoint"
                )

    def micro_batch_tokens(self, task: Task, role: str) -> int:
        """The most tokens of one forward pass of a call."""
        return self.plan.trainers[role].micro_batch_tokens

    # --- between the calls ---

    def said(self) -> list[Said]:
        return self.listener.take()

    def end_step(self, number: int) -> dict[str, Any]:
        """Drop a step's data, of which only the metrics stay."""
        step = self.steps.pop(number)
        return {
            "step": number,
            **step.metrics,
            **self.evaluations.pop(number, {}),
            **_version_metrics(number, step.sequences.weights_versions.tolist()),
            "tokens": int(step.sequences.lengths.sum()),
        }

    def snapshot(self, directory: Path) -> Snapshot:
        """Copy the state off the devices, between calls. The ranks go on to write their parts into
        `directory`."""
        ranks = self.processes.training
        ask(to_each(ranks, Trainer.snapshot, directory))

        def written() -> list[Any] | None:
            parts = ask(to_each(ranks, Trainer.written)).results
            finished = [part for part in parts if part is not None]
            return finished if len(finished) == len(parts) else None

        return Snapshot(
            arrays={
                f"{number}/{name}": x
                for number, step in self.steps.items()
                for name, x in step.arrays().items()
            },
            metrics={number: dict(step.metrics) for number, step in self.steps.items()},
            evaluations=dict(self.evaluations),
            skipped=dict(self.skipped),
            kl_coef=None if self.settings.kl_target is None else self.kl_coef,
            written=written,
        )

    def _restore(self, resumed: Checkpoint) -> None:
        manifest, arrays = resumed.manifest, resumed.arrays()
        self.evaluations, self.skipped = dict(manifest.evaluations), dict(manifest.skipped)
        if self.settings.kl_target is not None and manifest.kl_coef is not None:
            self.kl_coef = manifest.kl_coef
        for number, metrics in manifest.metrics.items():
            own = {
                name.removeprefix(f"{number}/"): x
                for name, x in arrays.items()
                if name.startswith(f"{number}/")
            }
            kept = {name: checkpoint.metric(value) for name, value in metrics.items()}
            self.steps[number] = StepData.restored(self.prompts.step(number), own, kept)

    def export(self, directory: Path) -> None:
        """Actor and critic as Hugging Face directories under `directory`."""
        export_models(self.processes, self.prompts, directory)

    def close(self) -> None:
        self.processes.close()


def _version_metrics(number: int, versions: list[int]) -> dict[str, Any]:
    """Metrics of the weights that sampled the sequences of a step: mean staleness and newest
    version, sequences by staleness, and the version of each sequence in the order of the batch, as
    runs of [version, sequences]."""
    staleness = Counter(number - version for version in versions)
    return {
        "staleness": number - float(np.mean(versions)),
        "staleness_histogram": {str(lag): staleness[lag] for lag in sorted(staleness)},
        "weights_version": max(versions),
        "weights_versions": [[version, len(list(run))] for version, run in groupby(versions)],
    }


def _train_metrics(role: str, ranks: list[list[dict[str, float]]]) -> dict[str, float]:
    """Means over minibatches of what the ranks summed; the gradient norm is the same on every rank.
    Minibatches that were left out are `skipped` and do not count, unless all of them were."""
    means: list[dict[str, float]] = []
    finite = [bool(np.isfinite(part["grad_norm"])) for part in ranks[0]]
    for counts, *parts in zip(finite, *ranks, strict=True):
        if any(finite) and not counts:
            continue
        sums = {name: sum(part[name] for part in parts) for name in parts[0] if name != "grad_norm"}
        means.append({"grad_norm": parts[0]["grad_norm"], **mean_stats(sums)})
    names = [name for name in means[0] if name != "tokens"]
    found = {f"{role}/{name}": float(np.mean([mean[name] for mean in means])) for name in names}
    return {**found, f"{role}/skipped": float(finite.count(False))}


def check_agreement(gap: float, plan: Plan) -> None:
    """Whether an engine computes what training computes, given the mean difference of their
    log-probs with the same weights. Raises UserError."""
    if gap > LARGEST_GAP:
        others = " or ".join(name for name in ENGINES if name != plan.rollout.engine)
        raise UserError(
            f"log-probs of the first batch differ by {gap:.2g} a token between the engine "
            f"({plan.rollout.engine}) and training: the engine does not compute this model right; "
            f"plan with engine {others}, or use another model"
        )
