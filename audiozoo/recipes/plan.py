"""What a model needs and does on TPUs: `audiozoo plan`. No weights, no TPU; nothing of the model's size is allocated.

    made = plan("openai/whisper-large-v3", "v5e:8x8", "data=4,fsdp=16", Amount(batch=64, seconds=30.0), train=True)
    print(made.text())

What is compiled is not a model of a step but the step: `Trainer.step`, which `audiozoo train` runs, with a recipe's
loss and optimiser, or the program of `audiozoo.jit`. Only their arguments are shapes with a place on a mesh in place of
arrays, and the batch is the one that the recipe makes of a recording of the given length.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import audiozoo
from audiozoo import loading, registry, sharding
from audiozoo.checkpoints import is_native
from audiozoo.errors import UsageError
from audiozoo.layers.abstract import abstract
from audiozoo.layers.fused import fused_attention
from audiozoo.layers.stacking import scanned
from audiozoo.layers.weight_norm import fold_weight_norm
from audiozoo.models.bark import BarkGenerationConfig
from audiozoo.models.seamless_m4t import finetuning_losses
from audiozoo.processors.audio_spectrogram_transformer import ASTFeatureExtractor
from audiozoo.processors.clap import ClapFeatureExtractor
from audiozoo.processors.hifigan import HifiGanProcessor
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor, MusicgenMelodyProcessor
from audiozoo.processors.pop2piano import Pop2PianoFeatureExtractor
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor
from audiozoo.processors.speech_to_text import Speech2TextFeatureExtractor
from audiozoo.processors.speecht5 import SpeechT5FeatureExtractor
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor
from audiozoo.recipes import RECIPES, Recipe
from audiozoo.recipes import recipe as find_recipe
from audiozoo.recipes.objectives import Objective
from audiozoo.recipes.run import as_stacked, sampling_rate, with_average
from audiozoo.recipes.settings import Settings
from audiozoo.training import tpu
from audiozoo.training.data import collate
from audiozoo.training.loop import Loss, Options, Task, Trainer, Turn
from audiozoo.training.parameters import Trainable

Shapes = dict[str, Any]

# --- which model -----------------------------------------------------------------------------------------------------

# A model of several parts, each with a configuration inside the whole one.
_PARTS = {
    "BarkSemanticModel": "semantic_config",
    "BarkCoarseModel": "coarse_acoustics_config",
    "BarkFineModel": "fine_acoustics_config",
}
_FIRST = {"bark": "BarkSemanticModel"}  # of a paper whose first class is not one network


@dataclass(frozen=True)
class Choice:
    """A paper, one of its classes, and a configuration."""

    paper: registry.Paper
    model_class: str
    config: Any
    name: str

    def create(self, dtype: Any, param_dtype: Any) -> Any:
        """The model as shapes."""
        cls = registry.paper_of_class(self.model_class).model_class(self.model_class)
        return abstract(lambda rngs: cls(self.config, dtype=dtype, param_dtype=param_dtype, rngs=rngs))


def choose(model: str, model_class: str | None = None, config: Mapping[str, Any] | None = None) -> Choice:
    """A model by the name of a published checkpoint, as `paper:size`, or by a directory, whose weights are not read.

    Raises:
        UsageError: if there is no such model.
    """
    found = _published(model)
    if found is None and Path(model).exists():
        name, paper = Path(model).name, loading.paper_of(Path(model))
        if is_native(model):
            whole, own = loading.native_config(Path(model), paper)
            model_class = model_class or own
        else:
            foreign = paper.conversion.open_checkpoint(Path(model), model_class)
            whole, model_class = foreign.config, foreign.model_class
    elif found is None:
        raise UsageError(
            f"There is no model {model!r}: give a published checkpoint (audiozoo show PAPER lists them), PAPER:SIZE or "
            "a directory."
        )
    else:
        paper, size = found
        name, whole = f"{paper.name}:{size}", getattr(paper.config_class, size)()
    model_class = model_class or _FIRST.get(paper.name, paper.classes[0])
    if model_class == "MMSForCTC" and not whole.languages and not (config or {}).get("languages"):
        model_class = "Wav2Vec2ForCTC"
    part = getattr(whole, _PARTS[model_class]) if model_class in _PARTS else whole
    if config:
        known = {f.name for f in dataclasses.fields(part)}
        if unknown := sorted(set(config) - known):
            raise UsageError(
                f"{unknown[0]!r} is no field of {type(part).__name__}; there are {', '.join(sorted(known))}."
            )
        part = dataclasses.replace(part, **{n: tuple(v) if isinstance(v, list) else v for n, v in config.items()})
    return Choice(paper, model_class, part, name)


def _published(model: str) -> tuple[registry.Paper, str] | None:
    for paper in registry.PAPERS:
        for checkpoint in paper.checkpoints:
            if checkpoint.name == model:
                return paper, checkpoint.size
    name, colon, size = model.partition(":")
    if not colon:
        return None
    paper = registry.paper(name)
    if size not in paper.sizes:
        raise UsageError(f"{paper.title} has no size {size!r}; it has {', '.join(paper.sizes)}.")
    return paper, size


# --- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """How much goes into one step: recordings, their length in seconds, and tokens of text with each."""

    batch: int
    seconds: float
    tokens: int = 128

    def samples(self, rate: int = 16_000) -> int:
        """Samples of a recording."""
        return round(self.seconds * rate)


def inputs(choice: Choice, amount: Amount, *, labels: bool = False) -> Shapes:
    """The arguments of a model's call, and with `labels` those for which it returns a loss.

    Raises:
        UsageError: for a class whose call is not known here.
    """
    config, paper, n = choice.config, choice.paper.name, amount.batch

    def of(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *shape), dtype)

    floats = partial(of, dtype=jnp.float32)
    text = of(amount.tokens)
    samples = amount.samples(getattr(config, "sampling_rate", 16_000))
    heard = {"input_values": floats(samples), "attention_mask": of(samples)}
    if bands := getattr(getattr(config, "encoder", config), "feature_projection_input_dim", None):
        steps = round(50 * amount.seconds)  # two filterbank frames of 10 ms each
        heard = {"input_features": floats(steps, bands), "attention_mask": of(steps)}
    written = {"decoder_input_ids": text, "labels": text}
    known: Shapes
    if paper == "whisper":
        known = {"input_features": floats(config.num_mel_bins, 2 * config.max_source_positions), **written}
        if choice.model_class == "WhisperForCausalLM":
            known = {"input_ids": text, "encoder_outputs": floats(config.max_source_positions, config.d_model)}
    elif paper == "audio_spectrogram_transformer":
        known = {"input_values": floats(config.max_length, config.num_mel_bins), "labels": of()}
    elif paper == "clap":
        extractor = _clap(config)
        waves = floats(extractor.nb_max_samples)
        known = {"input_ids": text, "attention_mask": text, "input_features": jax.eval_shape(extractor.in_jax, waves)}
    elif paper == "pop2piano":
        known = {"input_features": floats(round(amount.seconds * 22_050 / 1024), config.d_model), **written}
    elif paper == "vits":
        frames = amount.samples(config.sampling_rate) // config.hop_length
        known = {"input_ids": text, "attention_mask": text, "prior_noise": floats(frames, config.flow_size)}
        known |= {"speaker_id": of()} if config.num_speakers > 1 else {}
    elif paper == "speecht5":
        frames = round(amount.seconds * 62.5)
        speech = {
            "decoder_input_values": floats(frames // config.reduction_factor, config.num_mel_bins),
            "labels": floats(frames, config.num_mel_bins),
            "speaker_embeddings": floats(config.speaker_embedding_dim),
        }
        spoken = {"input_ids": text} if choice.model_class == "SpeechT5ForTextToSpeech" else heard
        known = spoken | (written if choice.model_class == "SpeechT5ForSpeechToText" else speech)
    elif paper == "hifigan":
        known = {
            "spectrogram": floats(
                round(amount.seconds * config.sampling_rate) // config.samples_per_frame, config.model_in_dim
            )
        }
    elif paper == "xls_r":
        known = heard | written
    elif paper == "speech_to_text":
        frames = round(100 * amount.seconds)
        known = {
            "input_features": floats(frames, config.input_feat_per_channel),
            "attention_mask": of(frames),
            **written,
        }
    elif paper == "speech_to_text_2":
        frames = round(50 * amount.seconds)
        known = {"input_ids": text, "labels": text, "encoder_hidden_states": floats(frames, config.d_model)}
    elif paper == "encodec":
        known = {"input_values": floats(config.audio_channels, amount.samples(config.sampling_rate))}
    elif paper == "bark":
        known = {"input_ids": text, "labels": text}
        if choice.model_class == "BarkFineModel":
            codes = of(amount.tokens, config.n_codes_total)
            known = {"codebook_idx": config.n_codes_given + 1, "input_ids": codes, "labels": text}
    elif paper == "musicgen":
        steps = round(amount.seconds * config.audio_encoder.frame_rate)
        codes = jax.ShapeDtypeStruct((n * config.num_codebooks, steps), jnp.int32)
        known = {"input_ids": text, "attention_mask": text, "decoder_input_ids": codes}
        if labels:
            known = {"input_ids": text, "attention_mask": text, "labels": of(steps, config.num_codebooks)}
    elif paper in ("seamless_m4t", "seamless_m4t_v2"):
        reads = choice.model_class.endswith(("TextToText", "TextToSpeech"))
        known = {"input_ids": text, "attention_mask": text} if reads else heard
        speaks = paper == "seamless_m4t" and choice.model_class.endswith(("Speech", "Model"))
        known |= written | ({"unit_labels": of(round(50 * amount.seconds))} if labels and speaks else {})
    else:
        known = heard | {"labels": text} | ({"languages": of()} if choice.model_class == "MMSForCTC" else {})
    return _asked(choice, known, labels)


def _asked(choice: Choice, known: Shapes, labels: bool) -> Shapes:
    cls = registry.paper_of_class(choice.model_class).model_class(choice.model_class)
    parameters = inspect.signature(cls.__call__).parameters
    free = any(p.kind is p.VAR_POSITIONAL or p.kind is p.VAR_KEYWORD for p in parameters.values())
    lacking = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in (*known, "self")
    ]
    if lacking or ("args" in parameters and "kwargs" in parameters):
        raise UsageError(f"What {choice.model_class} is called with is not known; plan another class of the paper.")
    if not labels:
        known = {name: shape for name, shape in known.items() if name != "labels"}
    elif "labels" in known:  # which the model itself shifts for its decoder
        given = ("decoder_input_ids", "decoder_input_values")
        known = {name: shape for name, shape in known.items() if name not in given}
    return {name: shape for name, shape in known.items() if free or name in parameters}


# --- a forward -------------------------------------------------------------------------------------------------------


def _placed(model: Any, mesh: Mesh, rules: sharding.Rules) -> Any:
    """The same model of shapes, each with its place on the mesh."""
    values = loading.variables(model)
    where = sharding.shardings_for({name: leaf.get_value() for name, leaf in values.items()}, mesh, rules)
    shapes = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where[n]) for n, v in values.items()}
    return loading.with_variables(model, shapes)


def _batched(shapes: Shapes, mesh: Mesh) -> Shapes:
    where = sharding.batch_sharding(mesh, ("data", "fsdp"))
    many = sharding.shards(where)

    def place(name: str, shape: Any) -> Any:
        if not hasattr(shape, "shape"):
            return shape
        if shape.shape[0] % many:
            raise UsageError(f"A batch of {shape.shape[0]} cannot be divided among {many} groups of chips.")
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)

    return {name: place(name, shape) for name, shape in shapes.items()}


def forward(
    choice: Choice,
    shapes: Shapes,
    mesh: Mesh,
    *,
    rules: sharding.Rules = sharding.TRAINING_RULES,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = jnp.float32,
    stack: bool = False,
    fused: bool = False,
) -> tuple[tpu.Report, dict[str, int]]:
    """Compile `audiozoo.jit(model)` for a batch; and the bytes on one chip by what they are."""
    model = nnx.eval_shape(fold_weight_norm, choice.create(dtype, param_dtype))
    model = _placed(scanned(model) if stack else model, mesh, rules)
    run = audiozoo.jit(model)
    batch = _batched(shapes, mesh)
    with fused_attention(mesh) if fused else contextlib.nullcontext():
        report = tpu.compile(run, **batch)
    arrays = {name: shape for name, shape in batch.items() if hasattr(shape, "shape")}
    values = [leaf.get_value() for leaf in loading.variables(model).values()]
    return report, {"parameters": tpu.resident(values), "batch": tpu.resident(arrays)}


# --- a step of training ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned(Objective):
    """The loss that a model itself returns for its labels, of papers that have no recipe."""

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, key = networks["model"], turn.key if turn.training else None
            if "unit_labels" in batch:  # SeamlessM4T, §4.3.3
                return Loss(finetuning_losses(model, **batch, key=key).total)
            return Loss(model(**batch, key=key).loss)

        return loss


def _clap(config: Any) -> ClapFeatureExtractor:
    audio = config.audio_config
    kind = "fusion" if audio.enable_fusion else "rand_trunc"
    return ClapFeatureExtractor(feature_size=audio.num_mel_bins, truncation=kind)


class _Ids:
    """A tokenizer in whose language every text, and every piece of music, has as many tokens."""

    pad_token_id = 0
    added: ClassVar = {"<mask>": 1}

    def __init__(self, tokens: int):
        self.tokens = tokens

    def encode(self, *what: Any, **options: Any) -> np.ndarray:
        return np.ones(self.tokens, np.int32)

    def set_target_lang(self, language: str) -> None:
        pass

    def __call__(self, text: Any = None, *, text_target: Any = None, **options: Any) -> dict[str, Any]:
        ids = [1] * self.tokens
        many = isinstance(text, list) or text_target is not None
        return {"input_ids": [ids] if many else ids, "attention_mask": [ids] if many else ids}


class _Symbols(SimpleNamespace):
    """A processor of texts."""

    def __call__(self, text: str) -> dict[str, Any]:
        ids = np.ones((1, self.tokens), np.int32)
        return {"input_ids": ids, "attention_mask": ids}


def _processor(choice: Choice, amount: Amount) -> Any:
    config, paper, tokens = choice.config, choice.paper.name, amount.tokens
    if paper == "audio_spectrogram_transformer":
        return ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, max_length=config.max_length)
    if paper == "hifigan":
        return HifiGanProcessor.with_hop(config.sampling_rate, config.model_in_dim, config.samples_per_frame)
    if paper == "clap":
        extractor: Any = _clap(config)
    elif paper == "speech_to_text":
        extractor = Speech2TextFeatureExtractor(num_mel_bins=config.input_feat_per_channel)
    elif paper in ("seamless_m4t", "seamless_m4t_v2", "wav2vec2_bert"):
        extractor = SeamlessM4TFeatureExtractor(num_mel_bins=config.feature_projection_input_dim // 2)
    elif paper == "speecht5":
        extractor = SpeechT5FeatureExtractor(num_mel_bins=config.num_mel_bins)
    elif paper == "pop2piano":
        extractor = Pop2PianoFeatureExtractor(feature_size=config.d_model)
    elif paper in ("vits", "encodec", "whisper", "musicgen", "bark"):
        codec = {"musicgen": "audio_encoder", "bark": "codec_config"}.get(paper)
        rate = getattr(getattr(config, codec, config) if codec else config, "sampling_rate", 16_000)
        extractor = SimpleNamespace(sampling_rate=rate)
        tokens = BarkGenerationConfig().semantic_config.max_input_semantic_length if paper == "bark" else tokens
    else:
        extractor = Wav2Vec2FeatureExtractor()
    rate = extractor.sampling_rate
    if choice.model_class.startswith("MusicgenMelody"):
        heard = MusicgenMelodyFeatureExtractor(config.num_chroma, rate, num_chroma=config.num_chroma)
        return MusicgenMelodyProcessor(heard, _Ids(tokens))  # type: ignore[arg-type]
    return _Symbols(feature_extractor=extractor, tokenizer=_Ids(amount.tokens), sampling_rate=rate, tokens=tokens)


def example(recipe: Recipe, choice: Choice, processor: Any, amount: Amount) -> Shapes:
    """The batch that a recipe makes of recordings of this length: `Objective.prepare` and `collate`, as in training."""
    rate = sampling_rate(None, processor)
    samples = amount.samples(rate)
    frames, config = round(50 * amount.seconds), choice.config
    fields: dict[str, Any] = {"text": "x", "units": [0] * frames, "phonemes": [1] * amount.tokens}
    fields["label"] = str(next(iter(getattr(config, "id2label", None) or ("0",))))
    fields["language"] = next(iter(getattr(config, "languages", None) or ("eng",)))
    fields |= {"speaker_embedding": np.zeros(getattr(config, "speaker_embedding_dim", 1), np.float32)}
    # Of a song, the two bars that a step hears: four beats, as long as the recording.
    fields |= {"composer": "composer1", "beats": np.linspace(0, amount.seconds, 5), "notes": [[0, 1, 60, 80]]}
    one = recipe.objective.prepare(
        processor, choice.config, np.zeros(samples, np.float32), fields, np.random.default_rng(0)
    )
    batch = collate([one], recipe.objective.padding(processor), samples)
    return {
        n: jax.ShapeDtypeStruct((amount.batch, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))
        for n, a in batch.items()
    }


_DEFAULTS = Settings(
    source="AdamW, for classes without a recipe", steps=100_000, batch_size=1, learning_rate=1e-4, clip=1.0
)
_FROZEN = {"seamless_m4t": r"^vocoder\.", "seamless_m4t_v2": r"^vocoder\."}


def recipe_of(choice: Choice, name: str | None = None) -> Recipe:
    """A recipe by name, or the first of the paper and class; without one, the model's own loss under AdamW.

    Raises:
        UsageError: for a recipe of another class.
    """
    if name is not None:
        found = find_recipe(name)
        if choice.model_class != found.model_class:
            raise UsageError(
                f"{name} trains a {found.model_class}; {choice.name} is planned as a {choice.model_class}."
            )
        return found
    for row in RECIPES.values():
        if (row.paper, row.model_class) == (choice.paper.name, choice.model_class):
            return row
    if choice.model_class == "Wav2Vec2ForCTC":
        return find_recipe("wav2vec2_ctc")
    numbers = dataclasses.replace(_DEFAULTS, frozen=_FROZEN.get(choice.paper.name))
    return Recipe(f"{choice.paper.name}_own_loss", choice.paper.name, choice.model_class, Returned(), numbers, "")


def trainer(
    choice: Choice,
    recipe: Recipe,
    processor: Any,
    mesh: Mesh | None,
    *,
    options: Options | None = None,
    rules: sharding.Rules = sharding.TRAINING_RULES,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = jnp.float32,
) -> Trainer:
    """The trainer that `audiozoo train` builds, over networks of shapes."""
    made: dict[str, Task] = {}

    def networks() -> dict[str, Any]:
        model = choice.create(dtype, param_dtype)
        trainable = Trainable(frozen=recipe.settings.frozen)
        made["task"] = recipe.objective.task(model, processor, recipe.settings, trainable, dtype)
        return {name: network for name, network in made["task"].networks.items() if network is not model}

    others = nnx.eval_shape(networks)  # judges and averages, which an objective makes
    task = made["task"]
    whole = {name: others.get(name, network) for name, network in task.networks.items()}
    how = with_average(options, recipe.settings)
    return Trainer(dataclasses.replace(task, networks=whole), how, mesh=mesh, rules=rules)


def training(
    choice: Choice, amount: Amount, mesh: Mesh, *, recipe: Recipe, processor: Any = None, **how: Any
) -> tuple[tpu.Report, dict[str, int]]:
    """Compile one step of `audiozoo train`; and the bytes on one chip by what they are."""
    processor = processor or _processor(choice, amount)
    ready = trainer(choice, recipe, processor, mesh, **how)
    own = isinstance(recipe.objective, Returned)
    shapes = inputs(choice, amount, labels=True) if own else example(recipe, choice, processor, amount)
    state, batch = ready.abstract(), _batched(shapes, mesh)
    report = tpu.compile(ready.step, state, batch)
    parameters = tpu.resident((state.params, state.rest, state.average))
    return report, {
        "parameters": parameters,
        "optimizer": tpu.resident(state.optimizer),
        "batch": tpu.resident(batch),
    }


# --- the command's answer --------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What `audiozoo plan` prints. Bytes and operations of one chip."""

    model: str
    model_class: str
    step: str
    topology: str
    chips: int
    mesh: str
    amount: Amount
    how: str
    parameters: int  # in all, of the whole model
    resident: dict[str, int]
    report: tpu.Report
    chip: tpu.Chip = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        report, program = self.report, self.report.program
        told: dict[str, Any] = {
            "model": self.model,
            "model_class": self.model_class,
            "step": self.step,
            "topology": self.topology,
            "chips": self.chips,
            "mesh": self.mesh,
            **dataclasses.asdict(self.amount),
            "how": self.how,
            "parameters": self.parameters,
            "fits": report.fits,
            "bytes_needed": report.needed,
            "bytes_of_hbm": int(self.chip.memory),
            **{f"bytes_of_{name}": size for name, size in self.resident.items()},
            "bytes_of_temporaries": report.temporaries,
            "bytes_of_outputs": report.outputs,
            "bytes_of_code": report.code,
            "seconds_to_compile": round(report.seconds, 1),
        }
        if program is not None:
            line = report.roofline(self.chip)
            told |= {
                "flops": program.flops,
                "bytes_moved": program.bytes,
                "collectives": [dataclasses.asdict(c) | {"bytes_sent": c.sent} for c in program.collectives],
                "loops_of_unknown_length": program.unknown_loops,
                "roofline": dataclasses.asdict(line) | {"seconds": line.seconds, "bound": line.bound},
                "page": self.chip.page,
            }
        else:
            told["message"] = report.message
        return told

    def text(self) -> str:
        """For reading."""
        report, chip = self.report, self.chip
        lines = [
            f"{self.model_class} ({self.model}), {self.parameters / 1e6:,.0f} M parameters: {self.step}",
            f"{self.chips} chips {self.topology}, mesh {self.mesh}; {self.amount.batch} recordings of "
            f"{self.amount.seconds:g} s, {self.amount.tokens} tokens each; {self.how}",
            "",
            f"On each chip, of {chip.memory / 1e9:.0f} GB:",
            *(_line(name, _bytes(size)) for name, size in self.resident.items()),
        ]
        if not report.fits:
            room = f"{_bytes(report.needed)} of {_bytes(report.available or 0)}"
            return "\n".join([*lines, _line("needed", room), "", f"It does not fit. {report.message}"])
        assert report.program is not None
        program, line = report.program, report.roofline(chip)
        lines += [
            _line("temporaries", f"{_bytes(report.temporaries)}  activations, gradients, buffers"),
            _line("program", _bytes(report.code)),
            _line("in all", f"{_bytes(report.needed)}  it fits"),
            "",
            "In one step, each chip:",
            _line("computes", f"{program.flops / 1e12:,.3f} T operations of matrix products and convolutions"),
            _line("moves", f"{_bytes(program.bytes)} from and to its memory"),
        ]
        for c in program.collectives[:8]:
            lines.append(_line(c.kind, f"{c.count:,} x {_bytes(c.bytes)} among {c.devices}: sends {_bytes(c.sent)}"))
        rest = program.collectives[8:]
        if rest:
            lines.append(
                _line("and", f"{sum(c.count for c in rest):,} smaller ones: {_bytes(sum(c.sent for c in rest))}")
            )
        if program.unknown_loops:
            lines.append(_line("loops", f"{program.unknown_loops} of unknown length, counted as one turn each"))
        lines += [
            "",
            f"At the least {_seconds(line.seconds)} a step, bound by {line.bound}: computing {_seconds(line.compute)}, "
            f"memory {_seconds(line.memory)}, network {_seconds(line.network)}, all at once and each at its peak:",
            f"  {chip.flops / 1e12:.0f} T bfloat16 operations a second, {chip.bandwidth / 1e9:,.0f} GB/s of memory, "
            f"{chip.ring / 1e9:.0f} GB/s along one axis of the torus ({chip.page})",
            f"compiled in {report.seconds:.0f} s",
        ]
        return "\n".join(lines)


def _line(name: str, value: str) -> str:
    return f"  {name:<18} {value}"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"


def _seconds(value: float) -> str:
    return f"{value * 1e3:,.2f} ms" if value < 1 else f"{value:,.2f} s"


def plan(
    model: str,
    topology: str,
    mesh: str,
    amount: Amount,
    *,
    train: bool = False,
    recipe: str | None = None,
    model_class: str | None = None,
    config: Mapping[str, Any] | None = None,
    options: Options | None = None,
    dtype: str = "bfloat16",
    param_dtype: str = "float32",
) -> Plan:
    """What `audiozoo plan` does.

    Args:
        model: see `choose`.
        topology: `v5e:8x8`.
        mesh: `data=4,fsdp=16,tensor=1`.
        amount: the batch.
        train: a step of training; else a forward pass.
        recipe: of `RECIPES`; by default the paper's.
        model_class: where the paper has several.
        config: changes to the configuration.
        options: of the loop; `stack` holds for the forward pass too.
        dtype: of the computation.
        param_dtype: of the parameters.

    Raises:
        UsageError: one sentence for each thing that can be wrong.
    """
    options = options or Options()
    asked = None if recipe is None else find_recipe(recipe)
    choice = choose(model, model_class or (asked.model_class if asked else None), config)
    row = recipe_of(choice, asked.name if asked else None) if train else None
    if row is not None and (besides := {n: v for n, v in row.config.items() if n not in (config or {})}):
        choice = dataclasses.replace(choice, config=dataclasses.replace(choice.config, **besides))
    if row is not None:
        options = as_stacked(options, choice.paper.model_class(choice.model_class), choice.config)
    chip, where = tpu.chip(topology), tpu.topology_mesh(topology, mesh)
    how: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(param_dtype)}
    if row is not None:
        report, resident = training(choice, amount, where, recipe=row, options=options, **how)
        step = f"a step of training, {row.name}"
    else:
        report, resident = forward(
            choice, inputs(choice, amount), where, stack=options.stack, fused=options.fused_attention, **how
        )
        step = "a forward pass"
    count = sum(int(np.prod(leaf.shape)) for leaf in loading.variables(choice.create(None, jnp.float32)).values())
    told = [f"{dtype} from {param_dtype}"]
    told += ["stacked"] if options.stack else []
    told += ["attention fused"] if options.fused_attention else []
    told += [f"remat {options.remat}"] if train and options.remat != "none" else []
    told += [f"in {options.accumulate} parts"] if train and options.accumulate > 1 else []
    return Plan(
        choice.name,
        choice.model_class,
        step,
        topology,
        where.size,
        mesh,
        amount,
        ", ".join(told),
        count,
        resident,
        report,
        chip,
    )


__all__ = ["Amount", "Choice", "Plan", "choose", "forward", "inputs", "plan", "recipe_of", "trainer", "training"]
