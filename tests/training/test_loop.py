"""The loop: what one step does, and that no way of doing it changes the result."""

import dataclasses
import io
import itertools
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from audiozoo.errors import UsageError
from audiozoo.layers.stacking import Scanned, scanned, unscanned
from audiozoo.training.checkpointing import Checkpoints
from audiozoo.training.loop import Loss, Options, Phase, Task, Together, Trainer
from audiozoo.training.parameters import Lora, Trainable
from audiozoo.training.reporting import Reporter
from tests.training.networks import Net, Numbers, arrays, loss, task, without_dropout


def run(trainer, steps=3, data=None):
    state, data, losses = trainer.init(), data or Numbers(), []
    for _ in range(steps):
        state, metrics = trainer.step(state, trainer.put(next(data)))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_a_step_is_the_gradient_and_the_optimisers_update():
    trainer = Trainer(task(without_dropout, optax.sgd(0.1)))
    state, batch = trainer.init(), next(Numbers())
    before = {name: np.asarray(value) for name, value in state.params["model"].items()}
    graphdef, params = nnx.split(task().networks["model"])

    def mean(params):
        model = nnx.merge(graphdef, params)
        return jnp.mean(jnp.square(model(batch["x"]) - batch["y"]))

    gradient = jax.grad(lambda p: mean(p), allow_int=True)(params)
    state, metrics = trainer.step(state, trainer.put(batch))
    for path, leaf in nnx.to_flat_state(gradient):
        name = ".".join(map(str, path))
        if name != "seen":
            expected = before[name] - 0.1 * np.asarray(leaf.get_value())
            np.testing.assert_allclose(state.params["model"][name], expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["loss"], mean(params), rtol=1e-5)
    assert int(state.step) == 1


def test_training_lowers_the_loss_and_repeats_itself_to_the_bit():
    state, losses = run(Trainer(task(loss, optax.adam(1e-2))), 60)
    assert losses[-1] < 0.2 * losses[0]
    assert float(state.rest["model"]["seen"]) == 60  # changed in place by the loss
    again, same = run(Trainer(task(loss, optax.adam(1e-2))), 60)
    assert losses == same
    assert all(np.array_equal(a, b) for a, b in zip(arrays(state), arrays(again), strict=True))
    _, other = run(Trainer(task(loss, optax.adam(1e-2)), Options(seed=1)), 3)
    assert other[0] != losses[0]  # the seed draws the dropout


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 4},
        {"remat": "layers"},
        {"remat": "dots"},
        {"stack": True},
        {"stack": True, "remat": "layers", "accumulate": 2},
    ],
    ids=str,
)
def test_no_way_of_computing_changes_the_result(options):
    with jax.enable_x64(True):
        double = {"model": {"param_dtype": jnp.float64}}
        data = [Numbers(dtype=np.float64), Numbers(dtype=np.float64)]
        plain = Trainer(task(without_dropout, optax.adam(1e-2), **dict(double)))
        other = Trainer(task(without_dropout, optax.adam(1e-2), model={"param_dtype": jnp.float64}), Options(**options))
        (a, losses), (b, same) = run(plain, 4, data[0]), run(other, 4, data[1])
        np.testing.assert_allclose(same, losses, rtol=1e-12)
        pairs = zip(arrays(plain.network(a, "model")), arrays(other.network(b, "model")), strict=True)
        assert max(float(np.abs(x - y).max()) for x, y in pairs) < 1e-12


def test_accumulation_weighs_parts_by_what_they_count():
    """A loss over a varying number of frames: parts with more of them weigh more, as in one large batch."""

    def masked(networks, batch, turn):
        error = jnp.square(networks["model"](batch["x"]) - batch["y"])
        return Loss((error * batch["mask"]).sum(), batch["mask"].sum())

    batch = next(Numbers()) | {"mask": np.asarray([1, 1, 1, 1, 1, 0, 0, 0], np.float32)}
    states = []
    for parts in (1, 4):
        trainer = Trainer(task(masked, optax.sgd(0.1)), Options(accumulate=parts))
        states.append(trainer.step(trainer.init(), trainer.put(batch))[0])
    for a, b in zip(arrays(states[0].params), arrays(states[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    # A mean of an evaluation's smaller last batch weighs less, too.
    trainer = Trainer(task(lambda n, b, turn: Loss(jnp.square(n["model"](b["x"]) - b["y"]).mean())))
    state = trainer.init()
    cut = [{name: value[rows] for name, value in batch.items()} for rows in (slice(5), slice(5, 8))]
    assert trainer.evaluate(state, cut)["loss"] == pytest.approx(trainer.evaluate(state, [batch])["loss"], rel=1e-5)
    empty = batch | {"mask": np.zeros(8, np.float32)}
    state, shown = Trainer(task(masked, optax.sgd(0.1))).step(trainer.init(), empty)  # nothing to learn from
    assert (float(shown["loss"]), float(shown["gradient_norm"])) == (0.0, 0.0)
    trainer = Trainer(task(masked), Options(accumulate=3))
    with pytest.raises(UsageError, match="A batch of 8 cannot be cut into 3"):
        trainer.step(trainer.init(), trainer.put(batch))


def test_bfloat16_computes_and_float32_is_kept():
    seen = []

    def objective(networks, batch, turn):
        out = networks["model"](batch["x"])
        seen.append(out.dtype)
        return Loss(jnp.square(out.astype(jnp.float32) - batch["y"]).sum(), len(out))

    trainer = Trainer(task(objective, optax.adam(1e-2), model={"dtype": jnp.bfloat16}))
    state, losses = run(trainer, 60)
    assert set(seen) == {jnp.bfloat16.dtype}
    assert {a.dtype for a in arrays((state.params, state.optimizer["model"][0].mu))} == {np.dtype(np.float32)}
    assert losses[-1] < 0.3 * losses[0]


def test_moving_average():
    trainer = Trainer(task(without_dropout, optax.sgd(0.05)), Options(average=0.9))
    state, data, seen = trainer.init(), Numbers(), []
    for _ in range(4):
        state, _ = trainer.step(state, trainer.put(next(data)))
        seen.append(np.asarray(state.params["model"]["head.bias"]))
    expected = np.average(seen, axis=0, weights=0.9 ** np.arange(4)[::-1])  # of where it began nothing is left
    np.testing.assert_allclose(state.average["model"]["head.bias"], expected, rtol=1e-4)
    np.testing.assert_array_equal(trainer.network(state, "model").head.bias[...], state.average["model"]["head.bias"])
    now = trainer.network(state, "model", averaged=False)
    np.testing.assert_array_equal(now.head.bias[...], state.params["model"]["head.bias"])
    batch = next(Numbers())
    measured = trainer.evaluate(state, [batch])["loss"]
    np.testing.assert_allclose(
        measured, jnp.square(trainer.network(state, "model")(batch["x"]) - batch["y"]).mean(), rtol=1e-5
    )


# --- what is trained -------------------------------------------------------------------------------------------------


def test_only_what_is_named_is_trained():
    trainer = Trainer(task(trainable=Trainable("head|layers", frozen=r"layers\.0")))
    before = trainer.init()
    assert all(not name.startswith("layers.0") for name in before.params["model"])
    kept = {name: np.asarray(value) for name, value in before.rest["model"].items()}
    state, _ = run(trainer, 2)
    for name, value in kept.items():
        assert name == "seen" or np.array_equal(value, state.rest["model"][name])
    with pytest.raises(UsageError, match="nothing is found by nowhere"):
        Trainer(task(trainable=Trainable("nowhere")))


@pytest.mark.parametrize("stack", [False, True])
def test_lora_begins_as_the_model_and_moves_low_rank(stack):
    lora = Lora(rank=2, alpha=8, pattern=r"fc1\.kernel$")
    trainer = Trainer(task(without_dropout, optax.adam(1e-2), trainable=Trainable(lora=lora)), Options(stack=stack))
    state = trainer.init()
    original = task().networks["model"]
    names = {name.rsplit(".", 1)[-1] for name in state.params["model"]}
    assert names == {"lora_a", "lora_b"}
    x = next(Numbers())["x"]
    np.testing.assert_array_equal(trainer.network(state, "model")(x), original(x))
    state, losses = run(trainer, 40)
    assert losses[-1] < 0.7 * losses[0]
    model = trainer.network(state, "model")
    for layer, old in zip(model.layers, original.layers, strict=True):
        assert np.linalg.matrix_rank(np.asarray(layer.fc1.kernel[...] - old.fc1.kernel[...]), tol=1e-5) == 2
        np.testing.assert_array_equal(layer.fc2.kernel[...], old.fc2.kernel[...])


def test_scanned_is_the_same_model_and_goes_back():
    model = Net(rngs=nnx.Rngs(0))
    deep = scanned(model)
    assert isinstance(deep.layers[0], Scanned)
    assert len(model.layers) == 3
    x = next(Numbers())["x"]
    np.testing.assert_allclose(deep(x), model(x), rtol=1e-6)
    for a, b in zip(arrays(unscanned(deep)), arrays(model), strict=True):
        np.testing.assert_array_equal(a, b)
    # Each block has dropout keys of its own.
    text = str(jax.make_jaxpr(lambda x: deep(x))(x))
    assert "scan" in text
    assert not np.array_equal(deep(x, jax.random.key(0)), deep(x, jax.random.key(1)))
    odd = Net(rngs=nnx.Rngs(0))
    odd.layers[1].fc1 = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
    assert len(scanned(odd).layers) == 3  # not alike


# --- two networks ----------------------------------------------------------------------------------------------------


def test_phases_alternate_and_hand_on():
    """A generator and its judge: the second phase sees what the first one made, and each moves its own network."""

    def fool(networks, batch, turn):
        made = networks["generator"](batch["x"])
        return Loss(jnp.square(made - batch["y"]).sum(), len(made), {"size": jnp.abs(made).sum()}, carried=made)

    def judge(networks, batch, turn):
        return Loss(jnp.square(networks["judge"](batch["x"]) - turn.carried).sum(), len(turn.carried))

    networks = {"generator": Net(rngs=nnx.Rngs(0)), "judge": Net(rngs=nnx.Rngs(1))}
    phases = [Phase("generator", fool, optax.adam(1e-2)), Phase("judge", judge, optax.adam(1e-2))]
    results = []
    for parts in (1, 4):
        trainer = Trainer(Task(networks, phases), Options(accumulate=parts))
        state, data = trainer.init(), Numbers()
        for _ in range(40):
            state, metrics = trainer.step(state, trainer.put(next(data)))
            results.append({name: float(value) for name, value in metrics.items()})
    first, last = results[0], results[39]
    assert set(first) == {f"{n}/{m}" for n in networks for m in ("loss", "gradient_norm")} | {"generator/size"}
    assert last["generator/loss"] < 0.5 * first["generator/loss"]
    assert last["judge/loss"] < 0.5 * first["judge/loss"]
    for name, value in results[40].items():
        np.testing.assert_allclose(value, first[name], rtol=1e-4)
    for wrong in ([phases[0], phases[0]], [Phase("nobody", judge, optax.adam(1e-2))]):
        with pytest.raises(UsageError, match="a network of its own"):
            Trainer(Task(networks, wrong))


# --- many steps ------------------------------------------------------------------------------------------------------


def plain(screen):
    """What a terminal was sent, without its colours and movements."""
    return re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", screen.getvalue()).replace("\r", "\n")


def test_fit_reports_evaluates_and_stops_early(tmp_path):
    trainer, shown, screen = Trainer(task(without_dropout, optax.sgd(0.0))), [], io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=200)
    with Reporter(tmp_path, steps=100, tensorboard=True, console=terminal) as write:

        def report(step, metrics):
            shown.append((step, metrics))
            write(step, metrics)

        state = trainer.fit(
            trainer.init(),
            Numbers(),
            steps=100,
            evaluation=lambda: [next(Numbers())],
            evaluate_every=5,
            patience=2,
            log_every=5,
            report=report,
        )
    assert int(state.step) == 15  # one best, then twice no better
    assert [step for step, metrics in shown if "evaluation/loss" in metrics] == [5, 10, 15]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 5, 10, 10, 15, 15]
    assert lines[0]["loss"] == shown[0][1]["loss"]
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert re.search(r"^step +10  (?!evaluation).*\bloss [\d.]+", plain(screen), re.M)
    assert re.search(r"^step +10  evaluation/.*\bevaluation/loss [\d.]+", plain(screen), re.M)
    assert re.search(r"training .* 15/100 .*loss [\d.]+", plain(screen))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')  # a process that was killed
    with Reporter(tmp_path, steps=100, start=10) as write:
        write(11, {"loss": math.nan})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 5, 10, 10, 11]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_patience_is_with_what_is_no_better_than_the_best(sign, monkeypatch, tmp_path):
    """Better than the one before is not enough; the best may be the largest, and its checkpoint is kept."""
    trainer, measured = Trainer(task(without_dropout)), iter([3.0, 1.0, 2.0, 1.5, 0.5])
    monkeypatch.setattr(trainer, "evaluate", lambda state, batches: {"cost": sign * next(measured)})
    checkpoints = Checkpoints(tmp_path, keep=1, watch="cost", larger_is_better=sign < 0)
    how = {"watch": "cost", "larger_is_better": sign < 0, "evaluate_every": 2, "patience": 2, "save_every": 4}
    state = trainer.fit(trainer.init(), Numbers(), steps=20, evaluation=list, checkpoints=checkpoints, **how)
    assert int(state.step) == 8
    assert checkpoints.progress == {"best": 1.0, "worse": 2}
    assert checkpoints.steps() == [4, 8]
    assert checkpoints.best() == 4
    checkpoints.close()


def test_the_last_step_is_reported_evaluated_and_saved(monkeypatch, tmp_path):
    clock = itertools.count()  # a second from one look at it to the next
    monkeypatch.setattr("audiozoo.training.loop.time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    trainer, shown, checkpoints = Trainer(task(without_dropout)), [], Checkpoints(tmp_path)
    trainer.fit(
        trainer.init(),
        Numbers(),
        steps=7,
        evaluation=lambda: [next(Numbers())],
        evaluate_every=5,
        log_every=3,
        report=lambda step, metrics: shown.append((step, metrics)),
        checkpoints=checkpoints,
    )
    assert [(step, m["steps_a_second"]) for step, m in shown if "loss" in m] == [(3, 3.0), (6, 3.0), (7, 1.0)]
    assert [step for step, metrics in shown if "evaluation/loss" in metrics] == [5, 7]
    assert checkpoints.steps() == [5, 7]
    checkpoints.close()


def test_a_run_that_stopped_early_stays_stopped(tmp_path):
    """Started again it trains no further, unless it is given more patience."""
    trainer = Trainer(task(without_dropout, optax.sgd(0.0)))

    def go_on(patience):
        checkpoints = Checkpoints(tmp_path)
        state = checkpoints.restore(trainer.abstract()) or trainer.init()
        held = [next(Numbers())]
        how = {"evaluation": lambda: held, "evaluate_every": 1, "patience": patience, "checkpoints": checkpoints}
        state = trainer.fit(state, Numbers(), steps=9, **how)
        checkpoints.close()
        return int(state.step)

    assert [go_on(2), go_on(2), go_on(4)] == [3, 3, 5]


def test_what_cannot_go_on_says_so(tmp_path):
    trainer = Trainer(task(without_dropout, optax.sgd(1e30)))
    with pytest.raises(UsageError, match="not finite at step 3"):
        trainer.fit(trainer.init(), Numbers(), steps=10, log_every=3)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(UsageError, match="not finite at step 2"):  # and none of it is saved
        trainer.fit(trainer.init(), Numbers(), steps=10, log_every=5, save_every=1, checkpoints=checkpoints)
    assert checkpoints.steps() == [1]
    checkpoints.close()
    trainer = Trainer(task())
    with pytest.raises(UsageError, match="ends after 2 steps; 5 were"):
        trainer.fit(trainer.init(), iter([next(Numbers())] * 2), steps=5)
    for evaluated in (trainer, Trainer(dataclasses.replace(trainer.task, evaluate=Together(None, None)))):
        with pytest.raises(UsageError, match="no batch to evaluate on"):
            evaluated.evaluate(evaluated.init(), [])
    with pytest.raises(UsageError, match="no 'wer'; it has error, loss"):
        trainer.fit(trainer.init(), Numbers(), steps=1, evaluation=lambda: [next(Numbers())], watch="wer")
    for wrong in ({"accumulate": 0}, {"remat": "all"}, {"average": 1.0}, {"seed": -1}):
        with pytest.raises(UsageError):
            Options(**wrong)
    with pytest.raises(UsageError, match="a rank of at least 1, not 0"):
        Lora(rank=0)
