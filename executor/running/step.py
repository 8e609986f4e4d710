"""One PPO step: what each call does, seen from the controller. Their order is the plan's, kept by
the loop in `loop.py`; what is asked of engines is in `generating.py`, the minibatches of an update
in `updating.py`, evaluations in `evaluating.py`; what is learned from is said in `learning.py`; how
steps are found again in a checkpoint in `restoring.py`; what happens on the GPUs is in `trainer.py`
and in the engines of `executor/rollout`."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from executor.data.batch import Sequences, join, spread
from executor.data.prompts import PromptSource
from executor.data.rating import add_up
from executor.fleet.asking import ask, to_each
from executor.fleet.pools import Fleet
from executor.fleet.worker import Record
from executor.running import learning
from executor.running.checkpoint import Checkpoint
from executor.running.evaluating import Evaluating
from executor.running.export import export_models
from executor.running.generating import Generating, check_agreement
from executor.running.preflight import reader_of
from executor.running.processes import Processes
from executor.running.restoring import restore_stream, restored_steps
from executor.running.rewarding import Rewarding
from executor.running.said import Listener, Said, lines_of
from executor.running.saving import Snapshot
from executor.running.step_data import Done, StepData
from executor.running.step_figures import spread_of, stream_figures, version_figures
from executor.running.stream import RolloutStream
from executor.running.supervise import Deadlines
from executor.running.updating import count_skipped, minibatches_of_ranks, update_metrics
from executor.training import kl
from executor.training.trainer import Trainer
from planner.predict.schedule import Task
from planner.spec.plan import Plan
from planner.spec.rewards import Overlong
from planner.spec.workload import RewardModel


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
        refills: bool = False,
    ) -> None:
        """Begin, or go on from a checkpoint; where the pipeline `refills`, without what that has of
        steps in flight."""
        self.listener = listener or Listener()
        self.plan, self.workload, self.prompts = plan, plan.workload, prompts
        self.settings = self.workload.algorithm
        self.steps: dict[int, StepData] = {}
        self.evaluations: dict[int, dict[str, float]] = {}
        self.deadlines = deadlines or Deadlines(plan=plan)
        # Of this process, for small work; each thread of the loop would start its own.
        torch.set_num_threads(1)
        self.skipped: dict[str, int] = {}  # by role, see count_skipped
        self.kl_coef = self.settings.kl_coef
        self.processes = Processes(plan, fleet, self.deadlines, resumed.saved if resumed else None)
        self.rewarding = Rewarding(
            self.workload, prompts, self.processes.judges, self.processes.tray
        )
        self.stream = RolloutStream(self.processes) if plan.streams else None
        self._taking = threading.Lock()  # a batch over from the stream
        self.generating = Generating(self.processes, prompts, self.stream)
        self.evaluating = Evaluating(prompts, self.generating, self.rewarding, self.listener)
        self.reader = reader_of(self.workload)
        if resumed:
            self._restore(resumed, refills)

    def run(self, task: Task) -> Done:
        call = getattr(self, task.call.name)
        done: Done = call(task)
        return done

    # --- the calls ---

    def generate(self, task: Task) -> Done:
        prompts = self.prompts.step(task.step)
        assert task.weights_version is not None
        version = task.weights_version
        early = self.rewarding.begin(prompts)
        workload, sampler = self.workload, self.workload.sampler
        if self.stream is None:
            sequences, records = self.generating.responses(
                version, prompts, sampler, workload.group, early
            )
        else:
            sequences, records = self.generating.streamed(task.step, prompts, sampler, early)
        batch = ray.put(sequences)
        with self._taking:
            sampled = 0 if self.stream is None else self.stream.hand_on(task.step)
            self.steps[task.step] = StepData(
                prompts=prompts, sequences=sequences, batch=batch, early=early, sampled=sampled
            )
        return records, int(sequences.response_lengths.sum())

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
        ended = self.generating.ended(step.prompts, step.sequences)
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
        of_engines = self.stream or self.processes
        return of_engines.sync_weights(task.weights_version), 0

    def evaluate(self, task: Task) -> Done:
        assert task.weights_version is not None
        figures, done = self.evaluating.evaluate(task.step, task.weights_version)
        self.evaluations.setdefault(task.step, {}).update(figures)
        return done

    def evaluate_first(self) -> dict[str, float]:
        """Evaluate the weights that the run begins with; the figures go to the first step."""
        figures, _ = self.evaluating.evaluate(0, 0)
        found = {f"initial_{name}": figure for name, figure in figures.items()}
        self.evaluations.setdefault(0, {}).update(found)
        return found

    # --- what they share ---

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
            scores={"score": step.scores, **self.rewarding.by_name(step.rated)},
            rows=rows,
        )
        self.listener.add(lines)

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
        """Train a role on some columns of a step, for the epochs of the settings if for no other
        number of them."""
        step, ranks, version = self.steps[task.step], self.processes.of(role), task.weights_version
        assert version is not None, "an update makes a version of the weights"
        epochs = self.settings.epochs if epochs is None else epochs
        lengths, learned = step.sequences.lengths, step.sequences.response_lengths
        if "weights" in columns:
            learned = np.count_nonzero(step.columns["weights"], axis=1)
        shares = minibatches_of_ranks(
            self.workload,
            task.step,
            epochs=epochs,
            lengths=lengths,
            learned=learned,
            ranks=len(ranks),
            most=self.micro_batch_tokens(task, role),
        )
        needed = ray.put({name: step.columns[name] for name in columns})
        answers = ask(
            [
                rank.order(Trainer.train, role, version, [step.batch, needed], share)
                for rank, share in zip(ranks, shares, strict=True)
            ]
        )
        if epochs:
            step.metrics |= update_metrics(role, answers.results)
        norms = [part["grad_norm"] for part in answers.results[0]]
        count_skipped(self.skipped, task, role, norms)
        return answers.records, int(lengths.sum()) * epochs

    def micro_batch_tokens(self, task: Task, role: str) -> int:
        """The most tokens of one forward pass of a call."""
        return self.plan.trainers[role].micro_batch_tokens

    # --- between the calls ---

    def said(self) -> list[Said]:
        return self.listener.take()

    def end_step(self, number: int) -> dict[str, Any]:
        """Drop a step's data, of which only the metrics stay."""
        with self._taking:
            step = self.steps.pop(number)
            of_stream = {}
            if self.stream is not None:
                complete = sum(other.sampled for other in self.steps.values())
                of_stream = stream_figures(number, step, self.stream.ledger(), complete)
        return {
            "step": number,
            **step.metrics,
            **self.evaluations.pop(number, {}),
            **version_figures(number, step.sequences),
            **of_stream,
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

        with self._taking:
            steps = dict(self.steps)
            of_stream = {} if self.stream is None else self.stream.arrays()
        arrays = {
            f"{number}/{name}": x
            for number, step in steps.items()
            for name, x in step.arrays().items()
        }
        return Snapshot(
            arrays=arrays | of_stream,
            metrics={number: dict(step.metrics) for number, step in steps.items()},
            evaluations=dict(self.evaluations),
            skipped=dict(self.skipped),
            kl_coef=None if self.settings.kl_target is None else self.kl_coef,
            written=written,
        )

    def _restore(self, resumed: Checkpoint, refills: bool) -> None:
        manifest, arrays = resumed.manifest, resumed.arrays()
        self.evaluations, self.skipped = dict(manifest.evaluations), dict(manifest.skipped)
        if self.settings.kl_target is not None and manifest.kl_coef is not None:
            self.kl_coef = manifest.kl_coef
        self.steps, dropped = restored_steps(manifest, arrays, self.prompts, refills=refills)
        if self.stream is not None:
            self.stream.version = manifest.step
            sampler = self.workload.sampler
            restore_stream(self.stream, arrays, self.prompts, sampler, refills=refills)
            self.stream.sampled -= dropped

    def export(self, directory: Path) -> None:
        """Actor and critic as Hugging Face directories under `directory`."""
        export_models(self.processes, self.prompts, directory)

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
        self.processes.close()
