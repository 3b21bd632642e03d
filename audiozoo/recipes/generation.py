"""What models learn that make music, speech, or text of another language; see `objectives` for the others."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.audio.files import in_channels
from audiozoo.audio.midi import table_of
from audiozoo.errors import UsageError
from audiozoo.layers.losses import IGNORED_LABEL
from audiozoo.models import bark, musicgen, pop2piano, seamless_m4t, speecht5, wav2vec2
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor
from audiozoo.processors.pop2piano import QUIETEST, STEPS_PER_BAR
from audiozoo.processors.speecht5 import read_x_vector
from audiozoo.recipes.objectives import (
    CTC,
    LABELS,
    Fields,
    Objective,
    speech_example,
    speech_of,
    text_of,
    unprocessed_example,
    whole_numbers,
)
from audiozoo.training.data import Example, Padding
from audiozoo.training.loop import Loss, Turn

LossFunction = Callable[[dict[str, Any], Any, Turn], Loss]


def _needed(fields: Fields, name: str, what: str) -> Any:
    value = fields.get(name)
    if value is None or (isinstance(value, list | str) and not len(value)):
        raise UsageError(f"This recipe needs {what}, and a recording has no {name}.")
    return value


# --- recognition in many languages -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Languages(CTC):
    """MMS, §5.1: letters of each recording's own `language`, through that language's adapters and head."""

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        language = str(_needed(fields, "language", "recordings whose language is known"))
        if language not in config.languages:
            raise UsageError(f"The model holds no {language!r}; it holds {', '.join(config.languages)}.")
        tokenizer = copy.copy(processor.tokenizer)  # of this example alone: several threads prepare
        tokenizer.set_target_lang(language)
        labels = np.asarray(tokenizer(text_of(fields))["input_ids"], np.int32)
        index = np.asarray(config.languages.index(language), np.int32)
        return speech_example(processor, waveform) | {"labels": labels, "languages": index}


# --- translation of speech -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Translated(Objective):
    """SeamlessM4T, §4.2.3, X2T of speech alone: the text, in its `language`, that is said or meant, smoothed.

    The paper also learns from texts, and from the text's translation what the speech's should be: `into_text_losses`.

    Attributes:
        smoothing: label smoothing; of the authors' trainer.
    """

    smoothing: float = 0.2

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {"waveform": Padding(), "labels": LABELS}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        language = str(_needed(fields, "language", "texts whose language is known"))
        text = text_of(fields, ("translation", "text"))
        # </s>, the language, the text, </s>: the first is the decoder's first input and no target.
        labels = np.asarray(processor.tokenizer(text_target=text, tgt_lang=language)["input_ids"][0][1:], np.int32)
        return unprocessed_example(waveform) | {"labels": labels}

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            features, mask = speech_of(processor, batch)
            losses = seamless_m4t.finetuning_losses(
                networks["model"],
                batch["labels"],
                input_features=features,
                attention_mask=mask,
                batch_invariant=True,
                label_smoothing=self.smoothing,
                key=turn.key if turn.training else None,
            )
            count = (batch["labels"][:, 1:] != IGNORED_LABEL).sum()
            return Loss(losses.total * count, count)

        return loss


# --- speech of texts -------------------------------------------------------------------------------------------------


def _speaker(fields: Fields, width: int) -> np.ndarray:
    """The x-vector of a recording: numbers, or a .npy file with them."""
    given = _needed(fields, "speaker_embedding", "speakers' x-vectors")
    if isinstance(given, str):
        return read_x_vector(given, width)
    vector = np.asarray(given, np.float32)
    if vector.size != width:
        raise UsageError(f"A speaker_embedding has {vector.size} numbers; the model's have {width}.")
    return vector.reshape(-1).astype(np.float32)


@dataclass(frozen=True)
class Speaking(Objective):
    """SpeechT5, §3.3: the spectrogram of a text in a speaker's voice, and where to stop."""

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        pad = Padding(processor.tokenizer.pad_token_id, 16)
        return {"input_ids": pad, "attention_mask": Padding(0, 16)} | {
            "labels": Padding(IGNORED_LABEL, 32),
            "decoder_attention_mask": Padding(0, 32),
        }

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        ids = np.asarray(processor.tokenizer.encode(text_of(fields), normalize=True), np.int32)  # as it is spoken
        target = processor.feature_extractor.spectrograms(waveform, processor.feature_extractor.sampling_rate)
        labels = np.asarray(target["input_values"][0], np.float32)
        present = np.ones(len(labels), np.int32)
        example = {"input_ids": ids, "attention_mask": np.ones(len(ids), np.int32), "labels": labels}
        example["decoder_attention_mask"] = present
        return example | {"speaker_embeddings": _speaker(fields, config.speaker_embedding_dim)}

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            output = networks["model"](**batch, key=turn.key if turn.training else None)
            count = (batch["labels"][..., 0] != IGNORED_LABEL).sum()
            return Loss(output.loss * count, count)

        return loss


@dataclass(frozen=True)
class SpeechAndText(Objective):
    """SpeechT5, §2.2: units under a mask, the speech again, and a text with gaps filled in, each by itself.

    The paper's batches are of speech or of text. Here a recording brings both, and an update learns from both. Without
    a speaker's x-vector the voice is unknown: zeros.
    """

    evaluation_key: bool = field(default=True, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        text = {name: Padding(processor.tokenizer.pad_token_id, 16) for name in ("gapped", "text")}
        return (
            super().padding(processor)
            | text
            | {
                "units": Padding(IGNORED_LABEL, 64),
                "spectrogram": Padding(IGNORED_LABEL, 32),
            }
        )

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        tokenizer, extractor = processor.tokenizer, processor.feature_extractor
        _needed(fields, "units", "units beside the recordings")
        units = whole_numbers(fields, "units", config.num_clusters)
        ids = [config.bos_token_id, *tokenizer.encode(text_of(fields))]
        gapped = speecht5.text_infilling(ids, tokenizer.added["<mask>"], rng)
        width = config.speaker_embedding_dim
        voice = np.zeros(width, np.float32) if "speaker_embedding" not in fields else _speaker(fields, width)
        target = extractor.spectrograms(waveform, extractor.sampling_rate)["input_values"][0]
        return speech_example(processor, waveform) | {
            "units": units,
            "spectrogram": np.asarray(target, np.float32),
            "gapped": np.asarray(gapped, np.int32),
            "text": np.asarray(ids[1:], np.int32),
            "speaker_embeddings": voice,
        }

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""
        pad = processor.tokenizer.pad_token_id

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, temperature = networks["model"], wav2vec2.gumbel_temperature(turn.step)
            keys: Any = jax.random.split(turn.key)  # type: ignore[arg-type]
            hidden: Any = None
            if not turn.training:  # what is hidden is drawn all the same, and nothing else
                prenet, present = model.speech_encoder_prenet, batch["attention_mask"]
                frames = prenet.frame_lengths(present.shape[1])
                hidden, _ = prenet.draw_masks(keys[0], len(present), frames, prenet.frame_mask(present, frames))
                keys = (None, None)
            spoken = model.speech(
                batch["input_values"],
                batch["attention_mask"],
                batch["units"],
                batch["spectrogram"],
                speaker_embeddings=batch["speaker_embeddings"],
                mask_time_indices=hidden,
                temperature=temperature,
                key=keys[0],
            )
            written = model.text(
                batch["gapped"],
                (batch["gapped"] != pad).astype(jnp.int32),
                jnp.where(batch["text"] == pad, IGNORED_LABEL, batch["text"]),
                temperature=temperature,
                key=keys[1],
            )
            parts = {
                "masked_loss": spoken.mlm_loss,
                "speech_loss": spoken.reconstruction_loss,
                "text_loss": written.reconstruction_loss,
            }
            return Loss(spoken.loss + written.loss, None, parts)

        return loss


@dataclass(frozen=True)
class Stages(Objective):
    """Bark: all three stages at once, by `semantic_loss`, `coarse_loss` and `fine_loss`, our reconstruction.

    No parameter belongs to two stages, so that the sum of their losses trains each as if it were alone. The first reads
    a text and writes its `units` (semantic tokens). The second sees a window of them and the codes of the same seconds,
    which the model's own codec makes of the recording. The last sees as many frames as when it is used, padding
    included, and predicts each of its codebooks in turn.

    Attributes:
        ids: what the tokens are numbered by.
        multiple: of the lengths that semantic tokens are padded to.
    """

    ids: bark.BarkGenerationConfig = field(default_factory=bark.BarkGenerationConfig)
    multiple: int = 64

    def knowing(self, model: Any) -> Objective:
        """See `Objective`."""
        return dataclasses.replace(self, ids=model.generation_config)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {"semantic": Padding(IGNORED_LABEL, self.multiple)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        ids = self.ids
        units = np.asarray([int(u) for u in _needed(fields, "units", "semantic tokens")], np.int32)
        semantic, coarse = ids.semantic_config, ids.coarse_acoustics_config
        longest = coarse.max_coarse_input_length
        start = int(rng.integers(max(len(units) - longest, 0) + 1))
        read = np.full(longest, coarse.coarse_semantic_pad_token, np.int32)
        read[: len(units[start : start + longest])] = units[start : start + longest]
        most = config.semantic_config.block_size - semantic.max_input_semantic_length
        hop = config.codec_config.hop_length
        first = ids.frames(start) * hop
        frames = max(self._coarse_frames(config), ids.fine_acoustics_config.max_fine_input_length)
        heard = waveform[first : first + frames * hop].astype(np.float32)
        real = max(1, len(heard) // hop)
        # Every other window begins with frames of which all codes are known, as one that goes on from what was said.
        longest = ids.fine_acoustics_config.max_fine_history_length
        known = int(rng.integers(2)) * int(rng.integers(min(longest + 1, real)))
        said = processor(text_of(fields))
        text = bark.numbered_text(said["input_ids"], said["attention_mask"], semantic)
        return {
            "input_ids": text[0].astype(np.int32),
            "semantic": np.append(units, semantic.eos_token_id)[:most].astype(np.int32),
            "read": read,
            "waveform": np.pad(heard, (0, frames * hop - len(heard))),
            "frames": np.asarray(real, np.int32),
            "known": np.asarray(known, np.int32),
        }

    def _coarse_frames(self, config: Any) -> int:
        """Frames of codes of a window of semantic tokens: as many as there is room for after these."""
        coarse = self.ids.coarse_acoustics_config
        read = coarse.max_coarse_input_length
        room = config.coarse_acoustics_config.block_size - read - 1
        return min(self.ids.frames(read), room // coarse.n_coarse_codebooks)

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model = networks["model"]
            ids, codec = model.generation_config, model.codec_model
            semantic, coarse, *rest = [None] * 3 if not turn.training else jax.random.split(turn.key, 3)  # type: ignore[arg-type]
            books = ids.coarse_acoustics_config.n_coarse_codebooks
            bandwidth = codec.config.target_bandwidths[-1]
            codes = codec.encode_frame(batch["waveform"][:, None], bandwidth)[0]  # (batch, codebooks, frames)
            codes = jax.lax.stop_gradient(codes[:, : ids.fine_acoustics_config.n_fine_codebooks])
            written = codes[:, :books, : self._coarse_frames(model.config)]
            real = jnp.arange(written.shape[2]) < batch["frames"][:, None]
            # c_1,1 c_2,1 c_1,2 …, each codebook with numbers of its own
            offset = ids.semantic_config.semantic_vocab_size + ids.codebook_size * jnp.arange(books)
            turns = (written + offset[:, None]).swapaxes(1, 2).reshape(len(codes), -1)
            turns = jnp.where(jnp.repeat(real, books, axis=1), turns, IGNORED_LABEL)
            window = codes[:, :, : ids.fine_acoustics_config.max_fine_input_length].swapaxes(1, 2)
            known = (batch["known"], batch["frames"])
            fine = [
                bark.fine_loss(model.fine_acoustics, window, i, *known, key=rest[0])
                for i in range(books, window.shape[2])
            ]
            parts = {
                "semantic_loss": bark.semantic_loss(
                    model.semantic, batch["input_ids"], batch["semantic"], key=semantic
                ),
                "coarse_loss": bark.coarse_loss(model.coarse_acoustics, batch["read"], turns, key=coarse),
                "fine_loss": sum(fine) / len(fine),
            }
            return Loss(sum(parts.values()), None, parts)  # type: ignore[arg-type]

        return loss


# --- music -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Music(Objective):
    """MusicGen, §3.1: the codes of a piece, given its text and, in melody models, its melody, left out now and then.

    Attributes:
        recipe: the paper's numbers.
    """

    recipe: musicgen.MusicgenRecipe = field(default_factory=musicgen.MusicgenRecipe)
    whole: bool = field(default=False, kw_only=True)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {"waveform": Padding(), "input_ids": Padding(0, 16), "attention_mask": Padding(0, 16)}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`; of what is known besides, strings count as tags: `genre`, `key` …"""
        text = fields.get("text")
        tags = {n: v for n, v in fields.items() if n != "label" and isinstance(v, str) and v != text}
        text = musicgen.augmented(text, tags, rng, self.recipe)
        tokens = processor.tokenizer([text or ""])
        ids, mask = (np.asarray(tokens[name][0], np.int32) for name in ("input_ids", "attention_mask"))
        hop, channels = config.audio_encoder.hop_length, in_channels(waveform, config.audio_channels)
        example = {
            "waveform": channels.T.astype(np.float32),  # padded along its first axis
            "frames": np.asarray(-(-channels.shape[1] // hop), np.int32),
            "input_ids": ids,
            "attention_mask": mask if text else 0 * mask,
        }
        if isinstance(processor.feature_extractor, MusicgenMelodyFeatureExtractor):
            melody = processor.melody(example["waveform"].mean(axis=1), processor.feature_extractor.sampling_rate)[0]
            example["input_features"] = np.resize(melody, (config.chroma_length, melody.shape[1]))
        return example

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model = networks["model"]
            codes = jax.lax.stop_gradient(model.audio_to_codes(batch["waveform"].swapaxes(1, 2)))
            real = jnp.arange(codes.shape[2]) < batch["frames"][:, None]
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "input_features") if name in batch}
            if "input_features" in batch:
                inputs["melody_dropout"] = self.recipe.melody_dropout
            mean, each = model.training_loss(
                codes,
                code_mask=jnp.broadcast_to(real[:, None], codes.shape),
                condition_dropout=self.recipe.condition_dropout,
                key=turn.key if turn.training else None,
                **inputs,
            )
            count = real.sum()
            return Loss(mean * count, count, {f"codebook_{k}": each[k] * count for k in range(len(each))})

        return loss


@dataclass(frozen=True)
class Arrangement(Objective):
    """Pop2Piano, §4.2: the piano notes of two bars, drawn at random, given the song and the arranger.

    A recording is known by the times of its `beats` in seconds, by `notes` as `[onset, offset, pitch, velocity]` with
    times in half beats from the first beat on, both as `pop2piano.paired` finds them (§3.1), and by its `composer`.
    What is shorter than a batch's longest is followed by silence that is heard, as in the authors' code and in use.

    Attributes:
        arrangers: the checkpoint's, which knows their names.
    """

    arrangers: pop2piano.Pop2PianoGenerationConfig = field(default_factory=pop2piano.Pop2PianoGenerationConfig)

    def knowing(self, model: Any) -> Objective:
        """See `Objective`."""
        return dataclasses.replace(self, arrangers=model.generation_config)

    def padding(self, processor: Any) -> dict[str, Padding]:
        """See `Objective`."""
        return {"input_features": Padding(math.log(QUIETEST), 32), "labels": LABELS}

    def prepare(self, processor: Any, config: Any, waveform: np.ndarray, fields: Fields, rng: Any) -> Example:
        """See `Objective`."""
        beats = np.asarray(_needed(fields, "beats", "the times of beats"), np.float64)
        notes = np.round(table_of(_needed(fields, "notes", "notes in half beats")))
        composer = str(_needed(fields, "composer", "arrangers"))
        row = self.arrangers.row(composer)
        if row >= config.composer_vocab_size:
            raise UsageError(f"The model has {config.composer_vocab_size} arrangers, and {composer} is none of them.")
        steps = processor.feature_extractor.num_bars * STEPS_PER_BAR  # half beats of a segment
        if len(beats) <= steps // 2:
            raise UsageError(f"A song needs more than the {len(beats)} beats that it has, for one segment.")
        first = int(rng.integers(len(beats) - steps // 2))
        features = processor.feature_extractor.segments(waveform, beats[first : first + steps // 2 + 1], 2)[0][0]
        begin = 2 * first
        inside = notes[(notes[:, 0] >= begin) & (notes[:, 0] < begin + steps)]
        inside[:, 1] = np.minimum(inside[:, 1], begin + steps)  # what hangs over ends with the segment
        labels = processor.tokenizer.encode(inside, begin, add_eos=True)
        return {
            "input_features": features,
            "labels": labels.astype(np.int32),
            "composer": np.asarray(row, np.int32),
        }

    def loss(self, processor: Any) -> LossFunction:
        """See `Objective`."""

        def loss(networks: dict[str, Any], batch: Any, turn: Turn) -> Loss:
            model, labels = networks["model"], batch["labels"]
            x, _ = model.condition(batch["input_features"], batch["composer"])
            output = model(x, labels=labels, key=turn.key if turn.training else None)
            count = (labels != IGNORED_LABEL).sum()
            right = ((output.logits.argmax(axis=-1) == labels) & (labels != IGNORED_LABEL)).sum()
            return Loss(output.loss * count, count, {"accuracy": right})

        return loss
