"""What is learnt: for each kind of training, how a recording becomes an example, and the phases of a step.

An objective knows the papers' models and losses; everything about steps, devices and files is in `audiozoo.training`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from audiozoo.audio.features import log_mel_spectrogram
from audiozoo.audio.files import in_channels
from audiozoo.decoding.encoders import without_padding
from audiozoo.decoding.units import cepstra
from audiozoo.decoding.windows import short_window
from audiozoo.errors import UsageError
from audiozoo.layers.losses import IGNORED_LABEL, ctc_loss
from audiozoo.models import audio_spectrogram_transformer as ast
from audiozoo.models import clap, encodec, hifigan, unispeech_sat, vits, wav2vec2, wavlm
from audiozoo.models.speech_to_text import SpecAugmentPolicy, spec_augment
from audiozoo.processors import zero_mean_unit_variance
from audiozoo.recipes.settings import Settings
from audiozoo.text.whisper_tokenizer import WITHOUT_SPACES
from audiozoo.training.data import Example, Item, Padding, labels_of
from audiozoo.training.loop import Loss, Phase, Task, Together, Turn
from audiozoo.training.parameters import Trainable

LABELS = Padding(IGNORED_LABEL, 16)
Fields = Mapping[str, Any]


def text_of(fields: Fields, names: Sequence[str] = ("text",)) -> str:
    """The text of a recording, by the first of these names that it has.

    Raises:
        UsageError: if it has none.
    """
    text = next((fields[name] for name in names if fields.get(name)), None)
    if not isinstance(text, str) or not text.strip():
        raise UsageError("This recipe learns from recordings with texts, and a recording has none.")
    return text


def whole_numbers(fields: Fields, name: str, classes: int) -> np.ndarray:
    """The units or phonemes of a recording: a list, or a text with spaces between.

    Raises:
        UsageError: if they are no whole numbers, or of no class that the model has.
    """
    given = fields[name]
    try:
        found = np.asarray([int(number) for number in (given.split() if isinstance(given, str) else given)], np.int32)
    except (TypeError, ValueError):
        raise UsageError(f"The {name} of a recording should be whole numbers.") from None
    if (wrong := found[(found < 0) | (found >= classes)]).size:
        raise UsageError(f"The {name} of a recording hold {wrong[0]}, and the model has {classes} of them, from 0 on.")
    return found


def in_language(tokenizer: Any, fields: Fields) -> Any:
    """A tokenizer of several languages that writes in the recording's `language`, for its `task` (Whisper's).

    Raises:
        UsageError: if the language is not known, or none of the tokenizer's.
    """
    language, task = fields.get("language"), fields.get("task")
    several = bool(getattr(tokenizer, "lang_code_to_id", None))
    if language is None and (several or (getattr(tokenizer, "multilingual", False) and tokenizer.language is None)):
        raise UsageError("This checkpoint writes many languages, and a recording has no language.")
    if getattr(tokenizer, "multilingual", False):
        tokenizer = copy.copy(tokenizer)  # of this example alone: several threads prepare
        tokenizer.set_prefix_tokens(language, task or tokenizer.task or "transcribe")
    elif several:
        tokenizer = copy.copy(tokenizer)
        tokenizer.set_target_lang(str(language))
    return tokenizer


def as_whisper_writes(text: str, tokenizer: Any) -> str:
    """A text with a space before its first word, as before any other: what follows a window is joined as it is."""
    language = None if getattr(tokenizer, "task", None) == "translate" else getattr(tokenizer, "language", None)
    return text.strip() if language in WITHOUT_SPACES else " " + text.strip()


@dataclass(frozen=True)
class Objective:
    """Base: one network `model`, one phase.

    Attributes:
        evaluation_key: whether evaluation draws.
        whole: whether recordings are heard from beginning to end, as texts ask for; else long ones are cut.
    """

    evaluation_key: bool = field(default=False, kw_only=True)
    whole: bool = field(default=True, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """How examples become a batch."""
        if _computes_features(processor):
            return {"waveform": Padding()}
        return {"input_values": Padding(), "attention_mask": Padding(0)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """One example."""
        raise NotImplementedError

    def odds(self, config: Any, items: Sequence[Item]) -> np.ndarray | None:
        """How often to draw each recording, where they are not drawn alike."""
        return None

    def mono(self, config: Any) -> bool:
        """Whether recordings are brought to one channel, as for all models that do not have two."""
        return bool(getattr(config, "audio_channels", 1) == 1)

    def knowing(self, model: Any) -> Objective:
        """The objective, with what only the checkpoint tells."""
        return self

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """The loss of the only phase."""
        raise NotImplementedError

    def task(self, model: Any, processor: Any, settings: Settings, trainable: Trainable, dtype: Any = None) -> Task:
        """Networks and phases; networks beside the model compute in `dtype`."""
        phase = Phase("model", self.loss(processor), settings.transformation(), trainable)
        return Task({"model": model}, [phase], evaluation_key=self.evaluation_key)


def _computes_features(processor: Any) -> bool:
    """Whether what the model reads is computed of waveforms on the device (w2v-BERT's, and S2T's)."""
    return hasattr(getattr(processor, "feature_extractor", processor), "in_jax")


def speech_example(processor: Any, waveform: np.ndarray) -> Example:
    """A waveform as the wav2vec 2.0 family reads it."""
    extractor = getattr(processor, "feature_extractor", processor)
    if _computes_features(processor):
        return unprocessed_example(waveform)
    if extractor.do_normalize:
        waveform = zero_mean_unit_variance(waveform)
    return {"input_values": waveform.astype(np.float32), "attention_mask": np.ones(len(waveform), np.int32)}


def unprocessed_example(waveform: np.ndarray) -> Example:
    """A waveform whose features are computed on the device."""
    return {"waveform": waveform.astype(np.float32), "length": np.asarray(len(waveform), np.int32)}


def speech_of(processor: Any, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """What a model of the wav2vec 2.0 family reads of a batch, and which steps of it are speech."""
    if "waveform" in batch:
        return getattr(processor, "feature_extractor", processor).in_jax(batch["waveform"], batch["length"])
    return batch["input_values"], batch["attention_mask"]


# --- recognition -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CTC(Objective):
    """Letters by connectionist temporal classification (wav2vec 2.0, §3.3): a sum over letters, as in fairseq."""

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return super().padding(processor) | {"labels": LABELS}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        labels = np.asarray(processor.tokenizer(text_of(fields))["input_ids"], np.int32)
        return speech_example(processor, waveform) | {"labels": labels}

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, labels = networks["model"], batch["labels"]
            values, mask = speech_of(processor, batch)
            key = turn.key if turn.training else None
            more: dict[str, Any] = {"languages": batch["languages"]} if "languages" in batch else {}
            more |= without_padding(model.config)
            logits = model(values, mask, key=key, **more).logits
            lengths = model.backbone.frame_mask(mask, logits.shape[1]).sum(axis=1)
            blank = model.config.pad_token_id
            losses = ctc_loss(logits, labels, lengths, blank=blank, reduction="none", zero_infinity=True)
            return Loss(losses.sum(), ((labels != IGNORED_LABEL) & (labels != blank)).sum())

        return loss


@dataclass(frozen=True)
class Seq2Seq(Objective):
    """The next token of the text, given the sound and the tokens before: a mean over tokens.

    Attributes:
        features: "log_mel" (Whisper) or "filterbank" (S2T), computed on the device, or "waveform" (wav2vec 2.0's).
        smoothing: label smoothing.
        augmentation: what is masked of filterbanks (S2T, §2).
        texts: the fields that hold a text, the one to learn first.
        allow_short: whether Whisper hears windows as short as those of `transcribe(…, allow_short=True)`, not of 30 s.
    """

    features: str = "waveform"
    smoothing: float = 0.0
    augmentation: SpecAugmentPolicy | None = None
    texts: tuple[str, ...] = ("text",)
    allow_short: bool = False

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        kinds = {
            "waveform": super().padding(processor),
            "log_mel": {"waveform": Padding()},
            "filterbank": {"waveform": Padding()},
        }
        return kinds[self.features] | {"labels": LABELS}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        tokenizer, text = in_language(processor.tokenizer, fields), text_of(fields, self.texts)
        text = as_whisper_writes(text, tokenizer) if self.features == "log_mel" else text
        labels = np.asarray(tokenizer(text)["input_ids"], np.int32).reshape(-1)
        end = getattr(tokenizer, "eos_token_id", None)
        if end is not None and end not in labels[-1:]:  # Speech2Text2's tokenizer writes none
            labels = np.append(labels, np.int32(end))
        decoder = getattr(config, "decoder", config)
        if labels.max(initial=0) >= (known := decoder.vocab_size):
            raise UsageError(
                f"The tokenizer writes token {labels.max()}, and the model knows {known}: they do not fit."
            )
        if self.features == "log_mel" and labels[0] == config.decoder_start_token_id:
            labels = labels[1:]  # <|startoftranscript|>, the decoder's first input and no target
        places = ("max_position_embeddings", "max_target_positions")
        room = next((getattr(decoder, name) for name in places if hasattr(decoder, name)), len(labels))
        if len(labels) > room:
            raise UsageError(f"A text has {len(labels)} tokens, and the model has places for {room}.")
        if self.features == "log_mel":
            if len(waveform) > (heard := 320 * config.max_source_positions):
                raise UsageError(f"A recording has {len(waveform)} samples, and the model hears {heard} at once.")
            return {"waveform": waveform.astype(np.float32), "labels": labels}
        if self.features == "filterbank":
            return unprocessed_example(waveform) | {"labels": labels}
        return speech_example(processor, waveform) | {"labels": labels}

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, batch = networks["model"], dict(batch)
            labels = batch["labels"]
            options: dict[str, Any] = {"key": turn.key if turn.training else None}
            if self.features == "log_mel":
                # On the device, the silence behind a recording included; the encoder reads two frames a position.
                waveform, frames = batch.pop("waveform"), 2 * model.config.max_source_positions
                if self.allow_short:
                    frames = short_window(-(-waveform.shape[1] // 160), frames)
                waveform = waveform[:, : 160 * frames]
                waveform = jnp.pad(waveform, ((0, 0), (0, 160 * frames - waveform.shape[1])))
                batch["input_features"] = log_mel_spectrogram(waveform, model.config.num_mel_bins)
                options["allow_short"] = self.allow_short
            elif self.features == "filterbank":
                x, mask = processor.feature_extractor.in_jax(batch.pop("waveform"), batch.pop("length"))
                if turn.training and self.augmentation is not None:
                    options["key"], of_masks = jax.random.split(turn.key)  # type: ignore[arg-type]
                    x = spec_augment(x, self.augmentation, of_masks, mask)
                batch["input_features"], batch["attention_mask"], options["batch_invariant"] = x, mask, True
                if getattr(processor.tokenizer, "lang_code_to_id", None):  # S2T: a language is given, not learnt
                    options["ignore_prefix_size"] = 1
                    labels = labels.at[:, 0].set(IGNORED_LABEL)
            else:
                values, mask = speech_of(processor, batch)
                batch = {"input_values": values, "attention_mask": mask, "labels": labels}
                options |= without_padding(getattr(model.config, "encoder", model.config))
            if self.smoothing and turn.training:
                options["label_smoothing"] = self.smoothing
            output = model(**batch, **options)
            count = (labels != IGNORED_LABEL).sum()
            right = (output.logits.argmax(axis=-1) == labels).sum()
            return Loss(output.loss * count, count, {"accuracy": right})

        return loss


# --- pre-training of the wav2vec 2.0 family ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretraining(Objective):
    """Masked frames, told from distractors (wav2vec 2.0, §3.2), by their cluster (HuBERT, §II-B), or both (w2v-BERT).

    Attributes:
        units: whether the targets are clusters (`units` beside the recordings, or of MFCCs; HuBERT, §IV-B).
        phonemes: whether a CTC loss over the recordings' `phonemes`, as numbers, is added (UniSpeech).
        features_penalty: weight of the mean square of the features.
        feature_gradient: factor on the gradient that reaches the convolutions.
        end_temperature: of the Gumbel softmax; None where there is no quantiser.
        mixing: probability that another utterance is laid over this one (WavLM, Algorithm 1).
    """

    units: bool = False
    phonemes: bool = False
    features_penalty: float = 10.0
    feature_gradient: float = 0.1
    end_temperature: float | None = None
    mixing: float = 0.0
    evaluation_key: bool = field(default=True, kw_only=True)
    whole: bool = field(default=False, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return super().padding(processor) | {"labels": Padding(IGNORED_LABEL, 64)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        example = speech_example(processor, waveform)
        if self.units:
            if "units" in fields:
                labels = whole_numbers(fields, "units", np.ravel(config.num_clusters)[0])  # of the first set
                if "crop" in fields:  # of the whole recording's units, those of the part that is heard
                    first, last = (round(t * getattr(config, "label_rate", 50.0)) for t in fields["crop"])
                    labels = labels[first:last]
            elif (clusters := getattr(processor, "clusters", None)) is not None:
                labels = np.asarray(clusters(cepstra(jnp.asarray(waveform))))  # 100 a second
                labels = labels[np.arange(0, len(labels), 100 / config.label_rate).astype(int)]
            else:
                raise UsageError("This recipe predicts units, and a recording has none: give a .km beside the .tsv.")
            example["labels"] = np.asarray(labels, np.int32)
        if self.phonemes:
            phonemes = whole_numbers({"phonemes": [], **fields}, "phonemes", config.num_ctc_classes)
            example["labels"] = phonemes if len(phonemes) else np.asarray([IGNORED_LABEL], np.int32)
        return example

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, (values, present) = networks["model"], speech_of(processor, batch)
            mask_key, mix_key, negative_key, key = jax.random.split(turn.key, 4)  # type: ignore[arg-type]
            backbone, options = model.backbone, dict[str, Any](without_padding(model.config))
            frames = backbone.frame_lengths(values.shape[1], adapter=False)
            valid = backbone.frame_mask(present, frames, adapter=False)
            spans, _ = backbone.draw_masks(mask_key, len(values), frames, valid)
            if spans is None:
                raise UsageError("Pre-training needs masks: a mask_time_prob above 0 in the configuration.")
            if "labels" in batch:
                options["labels"] = batch["labels"]
            if self.end_temperature is not None:
                options["temperature"] = wav2vec2.gumbel_temperature(turn.step, end=self.end_temperature)
            if self.mixing and turn.training:
                options["mixes"] = wavlm.draw_mixes(
                    mix_key, *values.shape, probability=self.mixing, lengths=present.sum(axis=1)
                )
                options["normalize"] = getattr(processor, "feature_extractor", processor).do_normalize
            if not turn.training and self.end_temperature is not None:
                if self.units:  # UniSpeech-SAT
                    count = model.config.cross_sample_instances
                    options["instances"] = unispeech_sat.sample_instances(negative_key, spans & valid, count)
                else:
                    among = valid if self.phonemes else spans  # UniSpeech's are not of masked frames alone
                    options["sampled_negative_indices"] = wav2vec2.sample_negative_indices(
                        negative_key, among, model.config.num_negatives
                    )
            if hasattr(backbone, "feature_extractor"):
                options["features_pen_weight"] = self.features_penalty
                options["feature_grad_mult"] = self.feature_gradient
            output = model(values, present, mask_time_indices=spans, key=key if turn.training else None, **options)
            count = (spans & valid).sum()
            parts = {n: output[n] for n in output.keys() if n.endswith("_loss") and jnp.ndim(output[n]) == 0}  # noqa: SIM118
            return Loss(output.loss, count, parts)

        return loss


# --- classification --------------------------------------------------------------------------------------------------


def labels_in(fields: Fields, names: Sequence[str], several: bool) -> list[str] | None:
    """What a recording's `label` or `labels` say, the latter first where there may be `several`; None without."""
    keys = ("labels", "label") if several else ("label", "labels")
    given = next((fields[key] for key in keys if fields.get(key) is not None), None)
    if given is None:
        return None
    return labels_of(given, names) if several or isinstance(given, list | tuple) else [str(given)]


def _targets(config: Any, fields: Fields, several: bool) -> np.ndarray:
    names = list(config.id2label)
    given = labels_in(fields, names, several)
    if given is None or not (given or several):
        raise UsageError("This recipe learns labels, and a recording has none.")
    if len(given) > 1 and not several:
        raise UsageError(f"This recipe learns one label of a recording, and one has {len(given)}: {', '.join(given)}.")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UsageError(f"The model has no label {unknown[0]!r}; it has {len(names)}, from {names[0]} to {names[-1]}.")
    index = [names.index(name) for name in given]
    if not several:
        return np.asarray(index[0], np.int32)
    return np.isin(np.arange(len(names)), index).astype(np.float32)


@dataclass(frozen=True)
class Spectrogram(Objective):
    """AST, §3: balanced sampling, spectrograms on the device, mixup, SpecAugment, one class or several.

    Of what is longer than the model's window another part is heard each time, as all of it is in use (`ast.classify`).

    Attributes:
        recipe: the paper's numbers.
    """

    recipe: ast.ASTRecipe = field(default_factory=lambda: ast.ASTRecipe.esc50())
    whole: bool = field(default=False, kw_only=True)

    @property
    def several(self) -> bool:
        """Whether a recording may be of several classes."""
        return self.recipe.problem_type == "multi_label_classification"

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {}

    def odds(self, config: Any, items: Sequence[Item]) -> np.ndarray | None:
        """See `Objective`."""
        if not self.recipe.balanced:
            return None
        targets = [_targets(config, item.fields, several=self.several) for item in items]
        return ast.balanced_sampling_weights(np.stack(targets) if self.several else np.eye(config.num_labels)[targets])

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        more = len(waveform) - processor.samples
        start = int(rng.integers(more + 1)) if more > 0 else 0
        kept = waveform[start : start + processor.samples].astype(np.float32)
        filled = np.pad(kept, (0, processor.samples - len(kept)))
        return {"waveform": filled, "length": np.asarray(len(kept), np.int32)} | {
            "labels": _targets(config, fields, self.several)
        }

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, waveform, labels = networks["model"], batch["waveform"], batch["labels"]
            keys = jax.random.split(turn.key, 3) if turn.training and turn.key is not None else None
            length, recipe = batch["length"], self.recipe
            if keys is not None and recipe.mixup_rate and self.several:
                weight = ast.mixup_weights(keys[0], len(waveform), recipe.mixup_rate)
                partner = jnp.roll(jnp.arange(len(waveform)), 1)  # batches are in random order already
                waveform, labels = ast.mixup(waveform, waveform[partner], labels, labels[partner], weight)
                length = jnp.where(weight < 1, jnp.maximum(length, length[partner]), length)
            features = processor.in_jax(waveform)
            frames = (length - processor.window) // processor.hop + 1
            heard = jnp.arange(features.shape[1]) < frames[:, None]
            features = jnp.where(heard[..., None], features, processor.padding)
            if keys is not None:
                shape = (len(features), features.shape[1], features.shape[2])
                features = ast.Augmentation.draw(keys[1], recipe, shape).apply(features, processor.padding)
            logits = model(features, key=None if keys is None else keys[2]).logits
            right = (logits.argmax(axis=-1) == (labels.argmax(axis=-1) if self.several else labels)).sum()
            mean = ast.classification_loss(logits, labels, recipe.problem_type)
            return Loss(mean * len(logits), len(logits), {"accuracy": right})

        return loss


@dataclass(frozen=True)
class Utterance(Objective):
    """A class for a recording, by the wav2vec 2.0 family: language, speaker, keyword, emotion."""

    whole: bool = field(default=False, kw_only=True)

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        return speech_example(processor, waveform) | {"labels": _targets(config, fields, several=False)}

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, labels = networks["model"], batch["labels"]
            options = without_padding(model.config) | {"key": turn.key if turn.training else None}
            output = model(*speech_of(processor, batch), labels=labels, **options)
            right = (output.logits.argmax(axis=-1) == labels).sum()
            return Loss(output.loss * len(labels), len(labels), {"accuracy": right})

        return loss


# --- sounds and texts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contrastive(Objective):
    r"""CLAP, §3.1: every sound finds its text among those of the whole batch, over all devices, and the other way.

    A batch that is cut into parts (`Options.accumulate`) is as many smaller ones: a sound looks in its own part alone.
    In evaluation it looks among all texts that there are, so that neither batches nor devices change what is measured;
    chance alone is worth a loss of $\log N$ among $N$.

    A model that fuses (§3.4) learns from the shrunk whole and three windows, drawn anew each time; `Settings.seconds`
    has then to be more than the ten that others hear.
    """

    whole: bool = field(default=False, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        pad = processor.tokenizer.pad_token_id if hasattr(processor.tokenizer, "pad_token_id") else 1
        return {"input_ids": Padding(pad, 16), "attention_mask": Padding(0, 16)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        extractor = processor.feature_extractor
        text = processor.tokenizer([text_of(fields)], padding=False, truncation=True, max_length=config.text_length)
        words = {n: np.asarray(text[n][0], np.int32) for n in ("input_ids", "attention_mask")}
        if extractor.truncation == "fusion":
            views = extractor(waveform, sampling_rate=extractor.sampling_rate, crops="random", rng=rng)
            return {n: array[0] for n, array in views.items()} | words
        length = extractor.nb_max_samples
        if len(waveform) > length:
            start = int(rng.integers(len(waveform) - length + 1))
            waveform = waveform[start : start + length]
        elif len(waveform) < length:
            waveform = extractor.fill(waveform, length, extractor.padding)
        return {"waveform": waveform.astype(np.float32)} | words

    def loss(self, processor: Any) -> Callable[[dict[str, Any], Any, Turn], Loss]:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            output = self._output(networks["model"], processor, batch, turn, return_loss=True)
            pairs = len(output.audio_embeds)
            found = (output.logits_per_audio.argmax(axis=-1) == jnp.arange(pairs)).sum()
            return Loss(output.loss * pairs, pairs, {"accuracy": found})

        return loss

    def _output(self, model: Any, processor: Any, batch: Any, turn: Turn, **options: Any) -> Any:
        features = batch.get("input_features")
        if features is None:
            features = processor.feature_extractor.in_jax(batch["waveform"])
        longest = model.config.text_length  # behind it there is padding alone
        return model(
            batch["input_ids"][:, :longest],
            features,
            batch.get("is_longer"),
            attention_mask=batch["attention_mask"][:, :longest],
            key=turn.key if turn.training else None,
            **options,
        )

    def together(self, processor: Any) -> Together:
        """The loss and the accuracy among all texts and sounds of an evaluation."""

        def rows(networks: dict[str, Any], batch: Any, turn: Turn) -> dict[str, jax.Array]:
            output = self._output(networks["model"], processor, batch, turn)
            return {"audio": output.audio_embeds, "text": output.text_embeds}

        def judge(networks: dict[str, Any], rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return clap.told_apart(networks["model"], rows["audio"], rows["text"])

        return Together(rows, judge)

    def task(self, model: Any, processor: Any, settings: Settings, trainable: Trainable, dtype: Any = None) -> Task:
        """See `Objective`; the scales are kept in their bounds after each update."""
        optimizer = optax.chain(settings.transformation(), _keep_scales())
        phase = Phase("model", self.loss(processor), optimizer, trainable)
        return Task({"model": model}, [phase], self.together(processor))


def _keep_scales() -> optax.GradientTransformation:
    """The released code's clamp of the logit scales to [0, log 100], as a change to their updates."""

    def update(updates: dict[str, Any], state: Any, params: Any = None) -> tuple[dict[str, Any], Any]:
        def clamped(name: str, change: jax.Array) -> jax.Array:
            if not name.startswith("logit_scale"):
                return change
            return jnp.clip(params[name] + change, 0.0, clap.LARGEST_LOGIT_SCALE) - params[name]

        return {name: clamped(name, change) for name, change in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# --- generators and their judges -------------------------------------------------------------------------------------


def _speaker(fields: Fields, named: Mapping[str, int], voices: int) -> int:
    """The voice of a recording, by its number or name; the first one if that is not said.

    Raises:
        UsageError: if the model has no such voice.
    """
    given = str(fields.get("speaker_id", 0))
    number = str(named.get(given, given))
    if not number.isdecimal() or int(number) >= voices:
        raise UsageError(f"The speaker_id of a recording is {given!r}; the model has voices 0 to {voices - 1}.")
    return int(number)


@dataclass(frozen=True)
class Voice(Objective):
    """VITS, §2.4 and §3.3: text, recording and segments of it; then the judge's turn on the same segments.

    Attributes:
        segment_frames: frames that are decoded (§3.3: 32).
        judge: arguments of `VitsDiscriminator`.
    """

    segment_frames: int = 32
    num_mels: int = 80
    judge: Mapping[str, Any] = field(default_factory=dict)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {"waveform": Padding(), "input_ids": Padding(0, 32), "attention_mask": Padding(0, 32)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        text = processor(text_of(fields))
        example = {name: text[name][0] for name in ("input_ids", "attention_mask")}
        if not example["attention_mask"].any():
            raise UsageError(f"The text {text_of(fields)!r} has no symbol that this voice knows.")
        hop, least = config.hop_length, max(self.segment_frames, len(example["input_ids"])) + 1
        waveform = np.pad(waveform, (0, max(0, least * hop - len(waveform)))).astype(np.float32)
        example |= {"waveform": waveform[: len(waveform) // hop * hop]}
        example["waveform_lengths"] = np.asarray(len(example["waveform"]), np.int32)
        if config.num_speakers > 1:
            example["speaker_id"] = np.asarray(_speaker(fields, processor.speakers, config.num_speakers), np.int32)
        return example

    def task(self, model: Any, processor: Any, settings: Settings, trainable: Trainable, dtype: Any = None) -> Task:
        """See `Objective`."""

        def generate(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            hop = networks["generator"].config.hop_length
            length = batch["waveform"].shape[1] // hop * hop
            whole = vits.VitsBatch(**(batch | {"waveform": batch["waveform"][:, :length]}))
            losses, output, real = vits.generator_losses(
                networks["generator"],
                networks["judge"],
                whole,
                segment_frames=self.segment_frames,
                num_mels=self.num_mels,
                key=turn.key,
            )
            parts = {name: losses[name] for name in losses.keys() if name != "total"}  # noqa: SIM118
            return Loss(losses.total, None, parts, (real, jax.lax.stop_gradient(output.waveform)))

        def judge(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            return Loss(vits.discriminator_losses(networks["judge"], *turn.carried))

        param_dtype = jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype
        discriminator = vits.VitsDiscriminator(**self.judge, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(1))
        phases = [
            Phase("generator", generate, settings.transformation(), trainable),
            Phase("judge", judge, settings.transformation()),
        ]
        return Task({"generator": model, "judge": discriminator}, phases)


@dataclass(frozen=True)
class Vocoder(Objective):
    """HiFi-GAN, §2.4: segments of recordings, and on the device the processor's spectrograms; then the judge's turn.

    Attributes:
        segment: samples (8,192 in the authors' config_v1.json).
        judge: arguments of `HifiGanDiscriminator`.
    """

    segment: int = 8192
    judge: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = field(default=False, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        segment = self.segment // config.samples_per_frame * config.samples_per_frame
        start = int(rng.integers(max(len(waveform) - segment, 0) + 1))
        cut = waveform[start : start + segment].astype(np.float32)
        return {"waveform": np.pad(cut, (0, segment - len(cut)))}

    def task(self, model: Any, processor: Any, settings: Settings, trainable: Trainable, dtype: Any = None) -> Task:
        """See `Objective`."""

        def generate(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            waveform = batch["waveform"]
            frames = waveform.shape[1] // networks["generator"].config.samples_per_frame
            losses, output, real = hifigan.generator_losses(
                networks["generator"],
                networks["judge"],
                hifigan.HifiGanBatch(processor.in_jax(waveform)[:, :frames], waveform),
                n_fft=processor.n_fft,
                num_mels=processor.num_mels,
            )
            parts = {name: losses[name] for name in losses.keys() if name != "total"}  # noqa: SIM118
            return Loss(losses.total, None, parts, (real, jax.lax.stop_gradient(output.waveform)))

        def judge(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            hifigan.power_iteration(networks["judge"])
            return Loss(hifigan.discriminator_losses(networks["judge"], *turn.carried))

        param_dtype = jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype
        discriminator = hifigan.HifiGanDiscriminator(
            **self.judge, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(1)
        )
        phases = [
            Phase("generator", generate, settings.transformation(), trainable),
            Phase("judge", judge, settings.transformation()),
        ]
        return Task({"generator": model, "judge": discriminator}, phases)


class Averages(nnx.Module):
    """The running averages of EnCodec's balancer (§3.4), as a network without parameters."""

    def __init__(self, names: tuple[str, ...], dtype: Any = jnp.float32):
        self.norms = nnx.Variable(jnp.zeros((len(names),), dtype))
        self.weights = nnx.Variable(jnp.zeros((len(names),), dtype))
        self.names = names

    def state(self) -> encodec.BalancerState:
        """As the balancer reads it."""
        norms, weights = self.norms[...], self.weights[...]
        return encodec.BalancerState(
            {name: norms[i] for i, name in enumerate(self.names)},
            {name: weights[i] for i, name in enumerate(self.names)},
        )

    def replace(self, state: encodec.BalancerState) -> None:
        """Take what the balancer returned."""
        self.norms[...] = jnp.stack([state.norms[name] for name in self.names])
        self.weights[...] = jnp.stack([state.weights[name] for name in self.names])


@dataclass(frozen=True)
class Codec(Objective):
    r"""EnCodec, §3.4: codec, codebooks and balancer in one phase, the judge in the other.

    The balancer makes a gradient that no scalar loss has. The loss is therefore $\langle g, \theta \rangle$ with the
    balanced gradient $g$ held fixed, whose gradient with respect to $\theta$ is $g$.

    Attributes:
        segment: seconds (§4.4: 1).
        judge: arguments of `MultiScaleSTFTDiscriminator`, which hears one channel at a time, in stereo (48 kHz) in
            windows of twice the length (§3.4); None leaves it, and the adversarial losses, out.
        judge_updates: share of the steps in which the judge learns; by default 2/3, in stereo 1/2 (§3.4).
        weights: of the balancer; those of the paper for the model's rate by default.
        options: of `codec_gradients`.
    """

    segment: float = 1.0
    judge: Mapping[str, Any] | None = field(default_factory=dict)
    judge_updates: float | None = None
    weights: Mapping[str, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    evaluation_key: bool = field(default=True, kw_only=True)
    whole: bool = field(default=False, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`; a mono recording is the same in both channels of a stereo model."""
        length, waveform = round(self.segment * config.sampling_rate), in_channels(waveform, config.audio_channels)
        start = int(rng.integers(max(waveform.shape[1] - length, 0) + 1))
        cut = waveform[:, start : start + length].astype(np.float32)
        return {"input_values": np.pad(cut, ((0, 0), (0, length - cut.shape[1])))}

    def task(self, model: Any, processor: Any, settings: Settings, trainable: Trainable, dtype: Any = None) -> Task:
        """See `Objective`."""
        wide = model.config.audio_channels == 2
        balancer = encodec.Balancer.encodec_48khz() if wide else encodec.Balancer.encodec_24khz()
        if self.weights is not None:
            balancer = encodec.Balancer(self.weights)
        if self.judge is None:
            kept = {name: w for name, w in balancer.weights.items() if name not in ("adversarial", "feature")}
            balancer = dataclasses.replace(balancer, weights=kept)

        def compress(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            codec, averages = networks["codec"], networks["balancer"]
            count_key, key = jax.random.split(turn.key)  # type: ignore[arg-type]
            count = encodec.random_quantizers(count_key, codec.config)
            graphdef, state = nnx.split(codec)
            still = nnx.merge(graphdef, jax.lax.stop_gradient(state))
            gradient, balance, losses, output = encodec.codec_gradients(
                still,
                batch["input_values"],
                balancer,
                averages.state(),
                discriminator=networks.get("judge"),
                num_quantizers=count,
                key=key,
                **self.options,
            )
            if turn.training:
                codec.quantizer.replace(output.codebooks)
                averages.replace(balance)
            params = nnx.state(codec, nnx.Param)
            products = jax.tree.map(
                lambda g, p: jnp.vdot(jax.lax.stop_gradient(g), p), jax.tree.leaves(gradient), jax.tree.leaves(params)
            )
            total = sum(products[1:], products[0])
            # Its value is of no meaning; shown is the sum of the weighted losses.
            shown = sum(balancer.weights[name] * losses[name] for name in balancer.weights) + losses["commitment"]
            total = total + jax.lax.stop_gradient(shown - total)
            return Loss(total, None, losses, jax.lax.stop_gradient(output.audio_values))

        def judge(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            discriminator = networks["judge"]
            real, fake = discriminator(batch["input_values"])[0], discriminator(turn.carried)[0]
            return Loss(encodec.discriminator_loss(real, fake))

        def learns(step: jax.Array, **_: Any) -> jax.Array:
            share = (1 / 2 if wide else 2 / 3) if self.judge_updates is None else self.judge_updates
            return jax.random.uniform(jax.random.fold_in(jax.random.key(2), step)) < share

        param_dtype = jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype
        networks: dict[str, Any] = {"codec": model, "balancer": Averages(tuple(balancer.weights), param_dtype)}
        phases = [Phase("codec", compress, settings.transformation(), trainable)]
        if self.judge is not None:
            arguments: dict[str, Any] = {"n_ffts": (4096, 2048, 1024, 512, 256)} if wide else {}
            arguments |= self.judge
            networks["judge"] = encodec.MultiScaleSTFTDiscriminator(
                **arguments, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(1)
            )
            phases.append(Phase("judge", judge, optax.conditionally_mask(settings.transformation(), learns)))
        return Task(networks, phases, evaluation_key=True)
