r"""The training loop. One, for every paper: read this file from top to bottom and you have seen all of it.

    batches ──► step ──► step ──► …          every `evaluate_every` steps: evaluate, keep the best, stop early
                 │
                 ├─ phase 1: loss of the networks ─► gradient ─► optimiser ─► new parameters of network 1
                 ├─ phase 2: loss of the networks ─► gradient ─► optimiser ─► new parameters of network 2
                 └─ moving average

A **task** has named networks and phases. A phase is a loss, the network that it moves, and an optimiser. Most papers
have one network and one phase. A GAN has two of each, and nothing in the loop knows that it is one: the generator's
phase hands what it generated to the discriminator's (`Loss.carried`). A loss may change what is no parameter of its
networks in place (codebooks, running statistics, a balancer's averages): the loop keeps it. A loss over all pairs of a
batch (CLAP) or over distractors (wav2vec 2.0) sees the whole batch, whatever the number of devices: the batch is one
array over the mesh, and the compiler gathers. An evaluation over all pairs (`Together`) sees those of all batches.

    task = Task({"model": model}, [Phase("model", loss, optax.adamw(1e-4))])
    trainer = Trainer(task)
    state = trainer.fit(trainer.init(), batches, steps=1000)
    model = trainer.network(state, "model")

Parameters are held as one dictionary by dotted name, so that "which are trained" (`Trainable`: all, some, or LoRA's
small factors) and "where they lie" (`sharding.Rule`) are questions about names. They stay in their own dtype (float32
masters); a model that was made with `dtype=jnp.bfloat16` computes in bfloat16 from them, and its gradients arrive in
float32.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from audiozoo import sharding
from audiozoo.errors import UsageError
from audiozoo.layers.fused import fused_attention
from audiozoo.layers.stacking import rematerialise, scanned, unscanned
from audiozoo.training.data import Whole
from audiozoo.training.parameters import Trainable, join, partition, restore, shardings_like

# --- what a task is --------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """What a phase's loss returns.

    Attributes:
        total: what is differentiated: a sum over `count` things (frames, tokens, pairs). The gradient is divided by the
            count of the whole step, so that accumulating over small batches equals one large one.
        count: None for a loss that is a mean over the batch's rows already, with metrics that are.
        metrics: sums too, shown divided by the count.
        carried: what the next phases find in `Turn.carried`.
    """

    total: jax.Array
    count: Any = None
    metrics: Mapping[str, Any] = {}
    carried: Any = None


class Turn(NamedTuple):
    """What a loss is told besides networks and batch.

    Attributes:
        key: of all that is drawn; None in evaluation, unless the task wants one.
        step: the number of this step.
        carried: what the phase before handed on.
        training: whether this is training; else nothing is dropped.
    """

    key: jax.Array | None
    step: jax.Array
    carried: Any = None
    training: bool = True


@dataclass(frozen=True)
class Phase:
    """One network's turn in a step.

    Attributes:
        network: the name of the network whose parameters move.
        loss: `(networks, batch, turn)` to a `Loss`; `networks` are modules by name.
        optimizer: Optax's.
        trainable: which of the network's parameters move; all by default.
    """

    network: str
    loss: Callable[[dict[str, Any], Any, Turn], Loss]
    optimizer: optax.GradientTransformation
    trainable: Trainable = field(default_factory=Trainable)


@dataclass(frozen=True)
class Together:
    """An evaluation that looks at all recordings at once, whatever batches they come in.

    Attributes:
        rows: `(networks, batch, turn)` to arrays that have a row for each recording.
        judge: `(networks, arrays)`, the arrays those of all batches, to metrics.
    """

    rows: Callable[[dict[str, Any], Any, Turn], dict[str, jax.Array]]
    judge: Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]


@dataclass(frozen=True)
class Task:
    """Networks, the phases of a step, and how to evaluate.

    Attributes:
        networks: modules by name.
        phases: in the order in which they take their turn; each network has one.
        evaluate: `(networks, batch, turn)` to a `Loss` whose metrics are shown; the first phase's loss by default. Or
            `Together`.
        evaluation_key: whether evaluation draws (masks, noise, distractors), by a key that is always the same.
    """

    networks: Mapping[str, nnx.Module]
    phases: Sequence[Phase]
    evaluate: Callable[[dict[str, Any], Any, Turn], Loss] | Together | None = None
    evaluation_key: bool = False


@jax.tree_util.register_dataclass
@dataclass
class State:
    """All that training changes. Dictionaries by network; of parameters, by dotted name."""

    step: jax.Array
    params: dict[str, dict[str, jax.Array]]  # what is trained
    rest: dict[str, dict[str, jax.Array]]  # frozen parameters, statistics, codebooks
    optimizer: dict[str, Any]
    average: dict[str, dict[str, jax.Array]]  # moving average of `params`; empty without one


@dataclass(frozen=True)
class Options:
    """How to train, whatever the task.

    Attributes:
        accumulate: parts that a batch is cut into, one after another, to save memory.
        average: decay of a moving average of the parameters after each step, which is then what is evaluated; None for
            none.
        remat: "none"; "layers" recomputes each block of a stack in the backward pass; "dots" keeps the results of
            matrix products and recomputes the rest.
        stack: run stacks of equal blocks by `lax.scan`, which compiles a deep model in the time of one block.
        seed: of all that is drawn.
        fused_attention: run attention by the kernel of `layers.fused` on TPUs.
    """

    accumulate: int = 1
    average: float | None = None
    remat: str = "none"
    stack: bool = False
    seed: int = 0
    fused_attention: bool = False

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UsageError(f"A batch is cut into at least 1 part, not {self.accumulate}.")
        if self.seed < 0:
            raise UsageError(f"A seed is at least 0, not {self.seed}.")
        if self.remat not in ("none", "layers", "dots"):
            raise UsageError(f"There is no remat {self.remat!r}; there are none, layers and dots.")
        if self.average is not None and not 0 <= self.average < 1:
            raise UsageError(f"The decay of a moving average lies in [0, 1), not at {self.average}.")


# --- one step --------------------------------------------------------------------------------------------------------


class Trainer:
    """A task, compiled.

    Args:
        task: networks and phases.
        options: how to train.
        mesh: devices, from `sharding.make_mesh`; one device by default. Axes `data` and `fsdp` divide the batch.
        rules: where parameters lie; `sharding.TRAINING_RULES` by default.
    """

    def __init__(
        self,
        task: Task,
        options: Options | None = None,
        *,
        mesh: Mesh | None = None,
        rules: sharding.Rules = sharding.TRAINING_RULES,
    ):
        self.task, self.options, self.mesh, self.rules = task, options or Options(), mesh, rules
        unknown = [phase.network for phase in task.phases if phase.network not in task.networks]
        if unknown or len({phase.network for phase in task.phases}) < len(task.phases):
            raise UsageError(f"Each phase moves a network of its own; there are {', '.join(task.networks)}.")
        self.phase = {phase.network: phase for phase in task.phases}
        # (network, its arrays); with `stack`, each stack of blocks is one, its parameters with an axis in front
        stacked = partial(scanned, remat=self.options.remat == "layers") if self.options.stack else (lambda n: n)
        self._parts = {name: partition(stacked(network)) for name, network in task.networks.items()}
        self._divided = None if mesh is None else sharding.batch_sharding(mesh, ("data", "fsdp"))
        self.parts = 1 if self._divided is None else sharding.shards(self._divided)  # that a batch is divided into
        abstract = jax.eval_shape(self._init, *self._initial())
        self.shardings = None if mesh is None else shardings_like(abstract, mesh, rules)
        self.step = jax.jit(self._fused(self._step), donate_argnums=0, out_shardings=self._results(None))
        self._evaluate = jax.jit(self._fused(self._evaluation))
        if isinstance(how := task.evaluate, Together):
            self._judge = jax.jit(lambda state, rows: how.judge(self._evaluated(state), rows))

    def _fused(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """`program`, traced where attention is fused if the options ask for it."""
        if not self.options.fused_attention:
            return program

        @wraps(program)
        def inside(*arguments: Any) -> Any:
            with fused_attention(self.mesh):
                return program(*arguments)

        return inside

    def _results(self, others: Any) -> Any:
        return None if self.shardings is None else (self.shardings, others)

    def _initial(self) -> tuple[dict[str, Any], dict[str, Any]]:
        params, rest = {}, {}
        for name, (_, trained, others) in self._parts.items():
            trainable = self.phase[name].trainable if name in self.phase else Trainable(nothing=True)
            params[name], rest[name] = trainable.split(trained, others, jax.random.key(self.options.seed))
        return params, rest

    def _init(self, params: dict[str, Any], rest: dict[str, Any]) -> State:
        optimizer = {name: phase.optimizer.init(params[name]) for name, phase in self.phase.items()}
        average = jax.tree.map(jnp.copy, params) if self.options.average is not None else {}
        return State(jnp.zeros((), jnp.int32), params, rest, optimizer, average)

    def init(self) -> State:
        """The state before the first step, in its shards. The task's networks stay as they are."""
        initial = self._initial()
        if self.shardings is None:
            return jax.jit(self._init, donate_argnums=(0, 1))(*jax.tree.map(jnp.copy, initial))
        where = (self.shardings.params, self.shardings.rest)  # one by one: a model may be larger than a device
        placed = jax.tree.map(lambda array, place: sharding.put(jnp.copy(array), place), initial, where)
        return jax.jit(self._init, out_shardings=self.shardings)(*placed)

    def abstract(self) -> State:
        """Shapes, dtypes and places of the state: what a checkpoint is restored into."""
        abstract = jax.eval_shape(self._init, *self._initial())
        if self.shardings is None:
            return abstract
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, self.shardings)

    def network(self, state: State, name: str, *, averaged: bool = True) -> Any:
        """A network as far as it is trained, with its moving average if there is one."""
        params = state.average if averaged and state.average else state.params
        network = self._networks(params, state.rest)[name]
        return unscanned(network) if self.options.stack else network

    def _networks(self, params: dict[str, Any], rest: dict[str, Any], *, train: bool = False) -> dict[str, Any]:
        networks = {}
        for name, (graphdef, _, _) in self._parts.items():
            trainable = self.phase[name].trainable if name in self.phase else Trainable(nothing=True)
            networks[name] = join(graphdef, trainable.whole(params[name], rest[name]))
            if train and self.options.remat == "layers":
                rematerialise(networks[name])
        return networks

    def _step(self, state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(self.options.seed), state.step)
        metrics: dict[str, jax.Array] = {}
        carried = None
        for index, (name, phase) in enumerate(self.phase.items()):
            turn_key = jax.random.fold_in(key, index)
            gradient, rest, carried, shown = self._gradient(name, state, batch, turn_key, carried)
            updates, moved = phase.optimizer.update(gradient, state.optimizer[name], state.params[name])
            params = optax.apply_updates(state.params[name], updates)
            state = dataclasses.replace(
                state, rest=rest, params=state.params | {name: params}, optimizer=state.optimizer | {name: moved}
            )
            prefix = "" if len(self.phase) == 1 else f"{name}/"
            metrics |= {f"{prefix}{k}": v for k, v in shown.items()}
            metrics[f"{prefix}gradient_norm"] = optax.tree.norm(gradient)
        if (decay := self.options.average) is not None:
            # Without the parameters before the first step, whose part in $a + (1 - \gamma)(p - a)$ would be $\gamma^n$.
            share = (1 - decay) / (1 - decay ** (state.step + 1))
            average = jax.tree.map(lambda a, p: a + share.astype(a.dtype) * (p - a), state.average, state.params)
            state = dataclasses.replace(state, average=average)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def _gradient(self, name: str, state: State, batch: Any, key: jax.Array, carried: Any) -> tuple[Any, ...]:
        """The gradient of one phase over a batch, taken in `accumulate` parts."""
        phase = self.phase[name]

        def loss(params: Any, rest: Any, batch: Any, carried: Any, key: jax.Array) -> tuple[jax.Array, Any]:
            networks = self._networks(state.params | {name: params}, rest, train=True)
            result = phase.loss(networks, batch, Turn(key, state.step, carried))
            kept = {n: restore(rest[n], networks[n]) for n in networks}
            count = 1.0 if result.count is None else result.count
            return result.total, (jnp.asarray(count), result.metrics, kept, result.carried)

        if self.options.remat == "dots":
            loss = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_saveable)
        differentiate = jax.value_and_grad(loss, has_aux=True)

        def part(rest: Any, inputs: tuple[Any, ...]) -> tuple[Any, tuple[Any, Any]]:
            (total, (count, metrics, rest, more)), gradient = differentiate(state.params[name], rest, *inputs)
            return rest, ((gradient, {"loss": total, **metrics}, count), more)

        parts = self.options.accumulate
        if parts == 1:
            rest, (sums, carried) = part(state.rest, (batch, carried, key))
        else:
            keys = jax.random.split(key, parts)
            rest, sums, carried = self._accumulated(part, state, (_cut(batch, parts), carried, keys))
        gradient, metrics, count = sums
        count = jnp.maximum(count, 1e-8)
        gradient = jax.tree.map(lambda g: g / count.astype(g.dtype), gradient)
        return gradient, rest, carried, jax.tree.map(lambda m: m / count, metrics)

    def _accumulated(self, part: Callable[..., Any], state: State, inputs: Any) -> tuple[Any, Any, Any]:
        first = jax.tree.map(lambda x: x[0], inputs)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, state.rest, first)[1][0])

        def add(carry: Any, inputs: Any) -> tuple[Any, Any]:
            rest, sums = carry
            rest, (more, carried) = part(rest, inputs)
            return (rest, jax.tree.map(jnp.add, sums, more)), carried

        (rest, sums), carried = jax.lax.scan(add, (state.rest, zeros), inputs)
        return rest, sums, carried

    # --- evaluation --------------------------------------------------------------------------------------------------

    def _evaluation(self, state: State, batch: Any) -> dict[str, jax.Array]:
        networks = self._evaluated(state)
        key = jax.random.key(self.options.seed) if self.task.evaluation_key else None
        how, turn = self.task.evaluate or self.task.phases[0].loss, Turn(key, state.step, training=False)
        if isinstance(how, Together):
            found = how.rows(networks, batch, turn)
            return (
                found if self.mesh is None else jax.lax.with_sharding_constraint(found, NamedSharding(self.mesh, P()))
            )
        result = how(networks, batch, turn)
        shown = {"loss": result.total, **result.metrics}
        if result.count is not None:
            return shown | {"count": jnp.asarray(result.count, jnp.float32)}
        rows = len(jax.tree.leaves(batch)[0])  # the last batch may have fewer
        return {name: rows * value for name, value in shown.items()} | {"count": jnp.asarray(rows, jnp.float32)}

    def _evaluated(self, state: State) -> dict[str, Any]:
        return self._networks(state.average or state.params, state.rest)

    def evaluate(self, state: State, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics over all batches, each divided by the count of all; or those of all rows `Together`.

        Raises:
            UsageError: if there is no batch.
        """
        if isinstance(self.task.evaluate, Together):
            found = [jax.tree.map(np.asarray, self._evaluate(state, self.put(batch))) for batch in batches]
            if not found:
                raise UsageError("There is no batch to evaluate on.")
            rows = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
            return {name: float(value) for name, value in self._judge(state, rows).items()}
        sums: dict[str, float] = {}
        for batch in batches:
            for name, value in self._evaluate(state, self.put(batch)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if not sums:
            raise UsageError("There is no batch to evaluate on.")
        count = sums.pop("count")
        return {name: value / max(count, 1e-8) for name, value in sums.items()}

    def put(self, batch: Any) -> Any:
        """A batch on its devices. On several hosts each host gives its own rows, of a `Whole` batch all."""
        where = self._divided
        if isinstance(batch, Whole):
            where, batch = where and NamedSharding(where.mesh, P()), dict(batch)
        if where is None:
            return jax.tree.map(jnp.asarray, batch)
        return jax.tree.map(partial(jax.make_array_from_process_local_data, where), jax.tree.map(np.asarray, batch))

    # --- many steps --------------------------------------------------------------------------------------------------

    def fit(
        self,
        state: State,
        batches: Iterator[Any],
        *,
        steps: int,
        evaluation: Callable[[], Iterable[Any]] | None = None,
        evaluate_every: int = 1000,
        patience: int | None = None,
        watch: str = "loss",
        larger_is_better: bool = False,
        log_every: int = 10,
        report: Callable[[int, dict[str, float]], None] | None = None,
        checkpoints: Any = None,
        save_every: int | None = None,
    ) -> State:
        """Train up to a step.

        Args:
            state: from `init`, or restored.
            batches: as many as are asked for; a Grain iterator's position is kept with each checkpoint.
            steps: the step to stop at, counted from the very beginning.
            evaluation: makes a pass over the evaluation data.
            evaluate_every: steps between evaluations.
            patience: evaluations without a new best `watch` after which to stop; None never does.
            watch: the evaluation's metric that says which checkpoint is best.
            larger_is_better: of `watch`.
            log_every: steps between reports.
            report: called with the step and its metrics; those of evaluations are named `evaluation/…`.
            checkpoints: a `Checkpoints`.
            save_every: steps between checkpoints; `evaluate_every` by default.

        Raises:
            CheckpointError: a checkpoint cannot be written; the one before it stays good.
            UsageError: the loss is no number any more, or the data ends before `steps`.
        """
        step, sign = int(state.step), -1.0 if larger_is_better else 1.0
        progress = {"best": math.inf, "worse": 0} | (checkpoints.progress if checkpoints is not None else {})
        save_every = save_every or evaluate_every

        def stops() -> bool:
            return patience is not None and progress["worse"] >= patience

        clock, clocked = time.perf_counter(), step
        while step < steps and not stops():
            try:
                batch = next(batches)
            except StopIteration:
                raise UsageError(f"The data ends after {step} steps; {steps} were asked for.") from None
            state, metrics = self.step(state, self.put(batch))
            step += 1
            told, saved = (step % every == 0 or step == steps for every in (log_every, save_every))
            if told and report is not None:
                shown = {name: float(value) for name, value in metrics.items()}
                now = time.perf_counter()
                report(step, shown | {"steps_a_second": (step - clocked) / max(now - clock, 1e-9)})
                clock, clocked = now, step
            if told or saved:
                losses = [float(value) for name, value in metrics.items() if name.rpartition("/")[2] == "loss"]
                if not all(map(math.isfinite, losses)):
                    raise UsageError(f"The loss is not finite at step {step}: lower the learning rate, or clip.")
            measured: dict[str, float] = {}
            if evaluation is not None and (step % evaluate_every == 0 or step == steps):
                measured = self.evaluate(state, evaluation())
                if report is not None:
                    report(step, {f"evaluation/{name}": value for name, value in measured.items()})
                if watch not in measured:
                    raise UsageError(f"The evaluation has no {watch!r}; it has {', '.join(measured)}.")
                worse = 0 if sign * measured[watch] < progress["best"] else progress["worse"] + 1
                progress = {"best": min(progress["best"], sign * measured[watch]), "worse": worse}
            if checkpoints is not None and (saved or stops()):
                checkpoints.progress = progress
                checkpoints.save(step, state, batches, measured)
        if checkpoints is not None:
            checkpoints.wait()
        return state


def _cut(batch: Any, parts: int) -> Any:
    """`parts` smaller batches along a new first axis, every `parts`-th row in each, so that devices keep their rows."""

    def cut(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise UsageError(f"A batch of {x.shape[0]} cannot be cut into {parts} equal parts.")
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)
