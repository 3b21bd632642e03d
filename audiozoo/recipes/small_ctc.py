"""A small recogniser of one's own: wav2vec 2.0 and CTC from random weights, in minutes on a laptop, without recordings.

    python -m audiozoo.recipes.small_ctc --out run/ --minutes 15 --hear recordings/
    audiozoo transcribe seven.wav --model run/model

The speech is made (`audiozoo.recipes.spoken`: a hundred words, espeak-ng's voices, and Piper's through our VITS); the
network is `Wav2Vec2ForCTC` in small, with LayerNorm in the convolutions and before attention and MLP, as in the paper's
largest models; the loop, the batches and the loss are those of every recipe. Fine-tuning begins with a network that
pre-training has taught to hear. From nothing, CTC stays for long where every frame is blank; three things shorten it:

- the first convolution begins as what it would become, a bank of band-pass filters (`filterbank`);
- the first eighth of the time is a flat start, as hidden Markov models have it: single words and short parts of
  sentences, with their letters laid evenly along the frames (`EvenCTC`); CTC then moves them to where they belong;
- all is trained, at a rate some seventy times that of fine-tuning, which rises over the first twentieth of the time and
  falls to nothing at its end.

What is said of the result is measured on sentences that were never said in training, apart for voices of training and
for voices never heard. Of 100 sentences each, 5 % and 16 % of the characters were wrong after 5,900 updates, which take
a quarter of an hour on two cores; `notebooks/wav2vec2.ipynb` has the curve.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

import audiozoo
from audiozoo.audio import hertz_to_mel, mel_to_hertz, read
from audiozoo.audio.files import SUFFIXES
from audiozoo.checkpoints import check_place
from audiozoo.decoding.ctc import transcribe_ctc
from audiozoo.errors import AudiozooError
from audiozoo.layers.losses import IGNORED_LABEL, cross_entropy
from audiozoo.models.wav2vec2 import conv_lengths
from audiozoo.recipes import Recipe, run, spoken
from audiozoo.recipes.clock import Clock
from audiozoo.recipes.objectives import CTC, Fields
from audiozoo.recipes.settings import Settings
from audiozoo.training.data import Batches, Example, Item, Padding, find_items
from audiozoo.training.loop import Loss, Options, Trainer, Turn
from audiozoo.training.metrics import error_rates


@dataclass(frozen=True)
class EvenCTC(CTC):
    """CTC; and where examples come with `frame_labels`, cross-entropy with these instead."""

    def evenly(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """An example of a short clip, its letters laid evenly along the frames between silences."""
        example = self.prepare(processor, config, waveform, fields, rng)
        longest, frames = (
            conv_lengths(samples, config.conv_kernel, config.conv_stride)
            for samples in (round(SHORT * spoken.RATE), len(waveform))
        )
        silence = SILENCE * spoken.RATE / config.inputs_to_logits_ratio
        place = (np.arange(frames) + 0.5 - silence) / (frames - 2 * silence)
        letters = example["labels"]
        spoken_there = (place >= 0) & (place < 1)
        chosen = letters[np.clip((place * len(letters)).astype(int), 0, len(letters) - 1)]
        labels = np.full(longest, IGNORED_LABEL, np.int32)
        labels[:frames] = np.where(spoken_there, chosen, config.pad_token_id)
        return example | {"frame_labels": labels}

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""
        ctc = super().loss(processor)

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            if "frame_labels" not in batch:
                return ctc(networks, batch, turn)
            logits = networks["model"](batch["input_values"], batch["attention_mask"], key=turn.key).logits
            return Loss(cross_entropy(logits, batch["frame_labels"]))

        return loss


RECIPE = Recipe(
    "small_ctc",
    "wav2vec2",
    "Wav2Vec2ForCTC",
    EvenCTC(),
    Settings(
        source="not in the paper: for a small model from random weights, by trial",
        steps=1,
        batch_size=16,
        learning_rate=2e-3,
        schedule="cosine",
        warmup=0.05,
        beta2=0.98,
        weight_decay=0.01,
        clip=5.0,
        seconds=3.0,
    ),
    "base",
    config={
        "conv_dim": (128, 128, 128),
        "conv_kernel": (320, 8, 3),
        "conv_stride": (50, 4, 2),  # 400 samples a frame: 25 ms
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "num_conv_pos_embeddings": 32,
        "num_conv_pos_embedding_groups": 8,
        # Made speech does not run out: nothing is dropped but short spans of frames.
        "mask_time_length": 4,
        "mask_time_min_masks": 0,
        "hidden_dropout": 0.0,
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "final_dropout": 0.0,
        "layerdrop": 0.0,
    },
)
LETTERS = 40  # of the longest text
SHORT = 1.0  # seconds, at most, of the clips of the flat start
SILENCE = 0.1  # seconds, about, before and after what is said


def filterbank(model: Any, lowest: float = 90.0, highest: float = 7000.0) -> None:
    r"""Let the first convolution begin as band-pass filters, evenly spaced in mel, each in four phases.

    $$ h_{f,\phi}(t) = g_f\, e^{-t^2 / 2\sigma_f^2} \cos(2\pi f t + \phi), \quad \phi \in \{0, \pi/2, \pi, 3\pi/2\} $$

    GELU then keeps one half of each wave, and the next convolution can sum the four to the band's envelope. The filters
    are as wide as they are apart, and louder with frequency, as speech is softer; a bias keeps silence from being
    blown up by the LayerNorm.
    """
    layer, rate = model.wav2vec2.feature_extractor.conv_layers[0], spoken.RATE
    taps, _, channels = layer.conv.kernel.shape
    edges = mel_to_hertz(np.linspace(hertz_to_mel(lowest), hertz_to_mel(highest), channels // 4 + 1))
    centre, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    time = (np.arange(taps) - (taps - 1) / 2)[:, None] / rate
    window = np.exp(-0.5 * np.square(time * np.clip(np.pi * width, 2e2, 8e2)))
    phases = [window * np.cos(2 * np.pi * centre * time + phi) for phi in np.pi / 2 * np.arange(4)]
    kernel = np.concatenate([h / np.linalg.norm(h, axis=0) * (centre / 500) ** 0.7 for h in phases], axis=1)
    layer.conv.kernel[...] = jnp.asarray(kernel[:, None, :], layer.conv.kernel.dtype)
    bias = 0.3 * np.random.default_rng(0).normal(size=channels)
    layer.conv.bias[...] = jnp.asarray(bias, layer.conv.bias.dtype)


# --- what is heard ---------------------------------------------------------------------------------------------------


class Listener:
    """Writes down what is said in some clips, with one compiled program."""

    def __init__(self, ready: run.Run, items: Sequence[Item]):
        data = batches(ready, items, buckets=1)
        self.said = [str(item.fields["text"]) for item in data.items]
        self._processor, self._blank = ready.processor, ready.model.config.pad_token_id
        self._batches = [(b["input_values"], b["attention_mask"]) for b in data.evaluation()]
        graphdef = nnx.graphdef(ready.model)

        def letters(state: Any, values: jax.Array, mask: jax.Array) -> jax.Array:
            model = nnx.merge(graphdef, state)
            best = model(values, mask).logits.argmax(axis=-1)
            inside = jnp.arange(best.shape[1]) < model.backbone.frame_lengths(mask.sum(axis=1))[:, None]
            return jnp.where(inside, best, self._blank)

        self._letters = jax.jit(letters)

    def __call__(self, model: Any) -> list[str]:
        """The greedy texts of the clips."""
        state = nnx.state(model)
        return [
            text
            for values, mask in self._batches
            for text in self._processor.batch_decode(np.asarray(self._letters(state, values, mask)))
        ]

    def rates(self, texts: Sequence[str]) -> dict[str, float]:
        """Error rates of what was written down, in characters and in words."""
        found = error_rates(self.said, texts)
        return {name: round(found[name], 4) for name in ("cer", "wer")}


def batches(ready: run.Run, items: Sequence[Item], buckets: int, *, seed: int = 0, evenly: bool = False) -> Batches:
    """Batches of few shapes, as compilation takes time; `evenly`: with `frame_labels`, of short clips."""
    objective: Any = ready.recipe.objective
    prepare = objective.evenly if evenly else objective.prepare
    return Batches(
        [item for item in items if (item.seconds or 0.0) <= SHORT] if evenly else items,
        partial(prepare, ready.processor, ready.model.config),
        batch_size=ready.settings.batch_size,
        padding=objective.padding(ready.processor) | {"labels": Padding(IGNORED_LABEL, LETTERS)},
        buckets=buckets,
        seconds=SHORT if evenly else ready.settings.seconds,
        seed=seed,
    )


def transcripts(model: Any, processor: Any, folder: Path) -> dict[str, str]:
    """What a model hears in the recordings of a folder, by file name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return {path.name: transcribe_ctc(model, processor, read(path, spoken.RATE)).text for path in paths}


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What training gave.

    Attributes:
        model: the recogniser.
        processor: its processor, with the letters of the corpus.
        curve: from time to time: seconds, step, the mean loss since the last point (`even`: cross-entropy of a frame in
            the flat start; `loss`: CTC of a letter), and `cer`, the character error rate on held-out sentences.
        held_out: by manifest of the corpus: `cer` and `wer`, `guess` (the character error rate of other sentences of
            the language, which is what a recogniser has that does not listen) and all texts, said and heard.
        seconds: of training, compilation and the points of the curve included.
    """

    model: Any
    processor: Any
    curve: list[dict[str, float]] = field(default_factory=list)
    held_out: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0


def train(
    corpus: spoken.Corpus,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    flat_start: float = 0.12,
    buckets: int = 3,
    seed: int = 0,
    judge_every: float = 60.0,
    report: Callable[[float, dict[str, float] | None], None] | None = None,
) -> Result:
    """Train until the time is over, or for a number of steps.

    Args:
        corpus: what is learnt from, and what is held out.
        seconds: of training; compilation counts.
        steps: instead of `seconds`.
        config: changes to the model of `RECIPE`.
        settings: changes to its numbers.
        flat_start: share of the time that goes to short clips whose letters are laid evenly.
        buckets: how many lengths batches may have.
        seed: of all that is drawn.
        judge_every: seconds between points of the curve (steps, where these are given).
        report: called after each step with the share that is done and, when there is one, a new point of the curve.
    """
    clock = Clock(seconds, steps, judge_every)
    items = find_items(corpus.train)
    held = {name: find_items(path) for name, path in corpus.held_out.items()}
    ready = run.build(RECIPE, items, settings=settings, config=config, options=Options(seed=seed))
    filterbank(ready.model)
    peak, share = ready.settings.learning_rate, ready.settings.warmup

    def at(learning_rate: Any) -> optax.GradientTransformation:
        still = dataclasses.replace(ready.settings, learning_rate=learning_rate, schedule="constant", warmup=0)
        return still.transformation()

    task = ready.trainer.task
    phase = dataclasses.replace(task.phases[0], optimizer=optax.inject_hyperparams(at)(peak))
    trainer = Trainer(dataclasses.replace(task, phases=[phase]), ready.trainer.options)
    state, everything = trainer.init(), batches(ready, items, buckets, seed=seed).training()
    words = batches(ready, items, 1, seed=seed, evenly=True).training()
    listeners = {name: Listener(ready, some) for name, some in held.items()}
    watched = next(iter(listeners.values()))
    result = Result(ready.model, ready.processor)
    losses: dict[str, list[float]] = {"even": [], "loss": []}
    clock.start()
    while (done := clock.share) < 1:
        # Up in a straight line, down along a cosine, by the share of the time that is gone.
        fallen = max(0.0, (done - share) / (1 - share))
        rate = peak * min(1.0, done / share + 1e-2) * 0.5 * (1 + math.cos(math.pi * fallen))
        state.optimizer["model"].hyperparams["learning_rate"] = jnp.asarray(rate, jnp.float32)
        begins = done < flat_start
        state, metrics = trainer.step(state, trainer.put(next(words if begins else everything)))
        losses["even" if begins else "loss"].append(float(metrics["loss"]))
        point = None
        if clock.tick():
            point = {"seconds": round(clock.elapsed, 1), "step": clock.step}
            point |= {name: round(float(np.mean(some)), 4) for name, some in losses.items() if some}
            point["cer"] = watched.rates(watched(trainer.network(state, "model")))["cer"]
            result.curve.append(point)
            losses = {"even": [], "loss": []}
        if report is not None:
            report(clock.share, point)
    result.seconds = clock.stop()
    result.model = trainer.network(state, "model")
    for name, listener in listeners.items():
        heard, said = listener(result.model), listener.said
        others = [*said[1:], said[0]]
        result.held_out[name] = listener.rates(heard) | {"guess": listener.rates(others)["cer"], "clips": len(said)}
        result.held_out[name]["texts"] = [list(pair) for pair in zip(said, heard, strict=True)]
    return result


# --- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[float], None]]:
    columns = (TextColumn(what), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda done: bar.update(task, completed=done)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make speech, train on it, save, and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m audiozoo.recipes.small_ctc", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for corpus/, model/ and results.json")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training; by default %(default)g")
    parser.add_argument("--clips", type=int, default=6000, help="to learn from; by default %(default)s")
    parser.add_argument("--piper", type=int, default=None, help="clips by Piper's voice; 240 where it is installed")
    parser.add_argument("--hear", type=Path, help="folder of recordings to transcribe at the end")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn; by default %(default)s")
    options = parser.parse_args(arguments)
    console, begun = Console(stderr=True), time.monotonic()
    piper = options.piper if options.piper is not None else 240 * spoken.Piper.available()
    try:
        check_place(options.out / "model", overwrite=True)
        with _bar(console, "speaking") as show:
            corpus = spoken.make(
                options.out / "corpus",
                clips=options.clips,
                piper=piper,
                seed=options.seed,
                progress=lambda done, total: show(done / total),
            )
        made = time.monotonic() - begun
        length = sum(item.seconds or 0.0 for item in find_items(corpus.train))
        print(f"{length / 60:.0f} minutes of speech in {options.clips + piper} clips, made in {made:.0f} s", flush=True)
        with _bar(console, "training") as show:

            def report(done: float, point: dict[str, float] | None) -> None:
                show(done)
                if point is not None:
                    print("  ".join(f"{name} {value:g}" for name, value in point.items()), flush=True)

            result = train(corpus, seconds=60 * options.minutes, seed=options.seed, report=report)
        audiozoo.save(result.model, options.out / "model", overwrite=True)
        result.processor.save(options.out / "model")
        heard = transcripts(result.model, result.processor, options.hear) if options.hear else {}
    except (AudiozooError, OSError) as problem:
        console.print(str(problem), style="red", highlight=False, markup=False)
        return 1
    found = {"seed": options.seed, "seconds": round(result.seconds), "seconds_to_make_the_corpus": round(made)}
    found |= {"minutes_of_speech": round(length / 60), "processor_seconds": round(time.process_time())}
    found |= {"curve": result.curve, "held_out": result.held_out, "recordings": heard}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (options.out / "results.json").write_text(text, encoding="utf-8")
    for name, numbers in result.held_out.items():
        rates = f"CER {numbers['cer']:.1%}, WER {numbers['wer']:.1%} (not listening: CER {numbers['guess']:.0%})"
        print(f"\n{name}: {numbers['clips']} held-out sentences, {rates}")
        for said, written in numbers["texts"][:4]:
            print(f"  said   {said}\n  heard  {written}")
    if heard:
        print("\nreal recordings, of which it knows neither the voices nor most of the words:")
        for name, written in heard.items():
            print(f"  {name}: {written!r}")
    used = time.process_time()
    print(f"\n{result.curve[-1]['step']} steps in {result.seconds:.0f} s; {used:.0f} s of processor time in all")
    print(options.out / "model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
