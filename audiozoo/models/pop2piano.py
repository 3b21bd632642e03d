r"""# Pop2Piano: Pop Audio-based Piano Cover Generation

Jongho Choi, Kyogu Lee, 2022, arXiv 2211.00895.

A pop song becomes a piano cover. The song is cut at its beats into segments of two bars; a T5 (arXiv 1910.10683) reads
the spectrogram of a segment as if each frame were an embedded word, after one vector that stands for an arranger's
style, and writes notes as tokens whose unit of time is the half beat. So the model need not know how long a beat is,
and it needs neither melody nor chords.

    waveform 22.05 kHz ── beats ── half-beat times ── two bars ── log-mel, 186 ms window, 46 ms hop ──> (frames, 512)
      ── [composer] in front ── T5 encoder ──┐
    tokens so far ── T5 decoder ─────────────┴──> next of: note 0-127, velocity 0/1, time shift, end
      ── notes in half beats, two bars further for each segment ── half-beat times ──> MIDI

| paper | here |
| --- | --- |
| §3.1, beats; the tracker is behind `beats` | `audiozoo.audio.beats` |
| §3.1, a cover brought together with its song | `synchronised`, `quantised`, `paired` |
| §3.1, filtering | `melody_chroma_accuracy`, `Pop2PianoRecipe` |
| §4.1 and Figure 2, input: spectrogram and arranger token | `Pop2PianoConcatEmbeddingToMel` |
| §4.1 and Table 1, output tokens: note, velocity, time, special | `audiozoo.processors.pop2piano.Pop2PianoTokenizer` |
| §4.1, T5 | `Pop2PianoForConditionalGeneration` |
| §4.2, training: cross-entropy, Adafactor, two-bar crops | `Pop2PianoForConditionalGeneration`, `Pop2PianoRecipe` |
| §5, song to MIDI | `arrange` |

`transformers` differs in five places, each shown by a test: its `encode` writes absolute times where its `decode` (and
the training data) has differences, so notes do not survive the round trip; it begins a note where one ends that never
began; a token beyond the vocabulary leads it back in time; its `batch_decode` loses its place from the third song on;
and it feeds the beat tracker whatever sampling rate it is given.

Checkpoints: `sweetcocoa/pop2piano`, and the authors' `model-1999-val_0.67311615.ckpt`.

    import audiozoo
    from audiozoo.models.pop2piano import arrange
    model = audiozoo.load("sweetcocoa/pop2piano")
    processor = audiozoo.load_processor("sweetcocoa/pop2piano")
    song = audiozoo.audio.read("song.mp3", sampling_rate=44_100)
    arrange(model, processor, song, sampling_rate=44_100, composer="composer4").write("piano.mid")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from audiozoo.audio import beats as tracking
from audiozoo.audio.features import hann_window
from audiozoo.audio.files import resample
from audiozoo.audio.midi import table_of
from audiozoo.decoding import GenerateOutput, GenerationConfig, Growing, Shared, generate
from audiozoo.errors import UsageError
from audiozoo.layers import Embed, KeyValues, Linear, check_frames, check_mask
from audiozoo.layers.losses import cross_entropy, shift_tokens_right
from audiozoo.models.t5 import T5Cache, T5Config, T5Stack
from audiozoo.outputs import BaseModelOutput, Seq2SeqLMOutput

COMPOSERS = tuple((f"composer{i}", 2051 + i) for i in range(1, 22))


@dataclass(frozen=True)
class Pop2PianoConfig:
    """Sizes of the model: §4.1; the defaults are those of the released checkpoint, T5-small with gates."""

    vocab_size: int = 2400  # tokens, of which 234 are used
    composer_vocab_size: int = 21  # arrangers
    d_model: int = 512  # width, and mel bands
    d_kv: int = 64  # channels of a head
    d_ff: int = 2048  # width of the feed-forward network
    num_layers: int = 6  # blocks of the encoder
    num_decoder_layers: int = 6  # blocks of the decoder
    num_heads: int = 8  # heads
    relative_attention_num_buckets: int = 32  # distances that are told apart
    relative_attention_max_distance: int = 128  # positions, from which on distances are not told apart
    dropout_rate: float = 0.1  # everywhere
    layer_norm_epsilon: float = 1e-6  # of all normalisations
    feed_forward_proj: str = "gated-gelu"  # gated-gelu, or relu for a network without a gate
    dense_act_fn: str = "gelu_new"  # of the gate; the default of transformers' class, relu, is not the checkpoint's
    scale_decoder_outputs: bool = False  # divide by sqrt(d_model) before the head, as a T5 with a tied head does

    @property
    def t5(self) -> T5Config:
        """The T5 inside."""
        return T5Config(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            d_kv=self.d_kv,
            d_ff=self.d_ff,
            num_layers=self.num_layers,
            num_decoder_layers=self.num_decoder_layers,
            num_heads=self.num_heads,
            relative_attention_num_buckets=self.relative_attention_num_buckets,
            relative_attention_max_distance=self.relative_attention_max_distance,
            dropout_rate=self.dropout_rate,
            layer_norm_epsilon=self.layer_norm_epsilon,
            gated=self.feed_forward_proj.startswith("gated"),
            dense_act_fn=self.dense_act_fn,
        )

    @classmethod
    def released(cls) -> Pop2PianoConfig:
        """§4.1: 59 M parameters."""
        return cls()


@dataclass(frozen=True)
class Pop2PianoGenerationConfig:
    """What the released checkpoint says of generation (`generation_config.json`); §4.1 for the tokens."""

    composer_to_feature_token: tuple[tuple[str, int], ...] = COMPOSERS  # number of each style; the least is row 0
    max_length: int = 256  # tokens of a segment, the first included
    pad_token_id: int = 0  # fills
    eos_token_id: int = 1  # ends a segment
    decoder_start_token_id: int = 0  # begins a segment
    options: tuple[tuple[str, Any], ...] = ()  # of the search, as for `transformers.GenerationConfig`

    def row(self, composer: str) -> int:
        """The style's row of the embedding table.

        Raises:
            UsageError: if there is no such style.
        """
        numbers = dict(self.composer_to_feature_token)
        if composer not in numbers:
            raise UsageError(f"There is no composer {composer!r}; there are {', '.join(numbers)}.")
        return numbers[composer] - min(numbers.values())


class Pop2PianoConcatEmbeddingToMel(nnx.Module):
    """§4.1, Figure 2: the arranger's vector before the frames."""

    def __init__(self, config: Pop2PianoConfig, **kwargs: Any):
        normal = nnx.initializers.normal(1.0)
        self.embedding = Embed(config.composer_vocab_size, config.d_model, embedding_init=normal, **kwargs)

    def __call__(
        self, features: Float[Array, "batch frames d_model"], row: Int[Array, " batch"]
    ) -> Float[Array, "batch positions d_model"]:
        """One position more, in front."""
        composer = self.embedding(row)[:, None].astype(features.dtype)
        return jnp.concatenate([composer, features], axis=1)


class Pop2PianoForConditionalGeneration(nnx.Module):
    """§4.1: T5 from frames to note tokens."""

    def __init__(self, config: Pop2PianoConfig, *, dtype: Any = None, param_dtype: Any = jnp.float32, rngs: nnx.Rngs):
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        normal = nnx.initializers.normal(1.0)
        self.shared = Embed(config.vocab_size, config.d_model, embedding_init=normal, **kwargs)
        self.mel_conditioner = Pop2PianoConcatEmbeddingToMel(config, **kwargs)
        self.encoder = T5Stack(config.t5, decoder=False, **kwargs)
        self.decoder = T5Stack(config.t5, decoder=True, **kwargs)
        self.lm_head = Linear(config.d_model, config.vocab_size, use_bias=False, **kwargs)
        self.config, self.dtype = config, dtype
        self.generation_config = Pop2PianoGenerationConfig()

    def head(self, x: Float[Array, "batch time d_model"]) -> Float[Array, "batch time vocabulary"]:
        """§4.1: logits; the head is not tied to the embeddings."""
        return self.lm_head(x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x)

    def condition(
        self,
        input_features: Float[Array, "batch frames d_model"],
        composer: str | Int[Array, " batch"],
        attention_mask: Int[Array, "batch frames"] | None = None,
    ) -> tuple[Float[Array, "batch positions d_model"], Int[Array, "batch positions"] | None]:
        """§4.1: the encoder's input for a style, and its mask.

        Args:
            input_features: log-mel frames as the processor gives them.
            composer: a style's name, or one row of the table an item.
            attention_mask: 1 for frames to be seen. An item whose first frame is hidden is a separator between songs:
                it becomes zeros.

        Raises:
            UsageError: for an unknown style, or features, mask and rows whose shapes do not fit.
        """
        shape = input_features.shape
        check_frames(input_features, self.config.d_model)
        check_mask(attention_mask, shape[:2])
        rows: Any = composer
        if isinstance(composer, str):
            rows = jnp.full((len(input_features),), self.generation_config.row(composer), jnp.int32)
        if rows.shape != shape[:1]:
            raise UsageError(f"There are arrangers of shape {rows.shape} for {shape[0]} segments.")
        x = self.mel_conditioner(input_features, rows)
        if attention_mask is None:
            return x, None
        first = attention_mask[:, :1]
        return jnp.where(first[:, :, None] != 0, x, 0), jnp.concatenate([first, attention_mask], axis=1)

    def __call__(
        self,
        input_features: Float[Array, "batch positions d_model"] | None = None,
        attention_mask: Int[Array, "batch positions"] | None = None,
        decoder_input_ids: Int[Array, "batch tokens"] | None = None,
        decoder_attention_mask: Int[Array, "batch tokens"] | None = None,
        labels: Int[Array, "batch tokens"] | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        *,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        key: jax.Array | None = None,
    ) -> Seq2SeqLMOutput:
        """Logits of each token given those before it, and with `labels` their mean cross-entropy.

        Args:
            input_features: the encoder's input, with the style in front (`condition`); without, the style is unknown.
            attention_mask: 1 for positions to be seen.
            decoder_input_ids: tokens; by default the labels, one later.
            decoder_attention_mask: 1 for tokens to be seen.
            labels: wanted tokens, -100 where there is none.
            encoder_outputs: an earlier encoding, instead of `input_features`.
            output_attentions: return attention weights.
            output_hidden_states: return the states between blocks.
            key: switches dropout on.

        Raises:
            UsageError: without features or tokens.
        """
        asked: dict[str, Any] = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        keys: Any = (None, None) if key is None else jax.random.split(key)
        if encoder_outputs is None:
            if input_features is None:
                raise UsageError("Give the model input_features, or encoder_outputs of an earlier call.")
            encoded = self.encoder(input_features, attention_mask, key=keys[0], **asked)
            encoder_outputs = BaseModelOutput(encoded.last_hidden_state, encoded.hidden_states, encoded.attentions)
        if decoder_input_ids is None:
            if labels is None:
                raise UsageError("Give the model decoder_input_ids or labels.")
            decoder_input_ids = self.shift_right(labels)
        decoded = self.decoder(
            self.shared(decoder_input_ids),
            decoder_attention_mask,
            encoder_outputs.last_hidden_state,
            attention_mask,
            key=keys[1],
            **asked,
        )
        logits = self.head(decoded.last_hidden_state)
        return Seq2SeqLMOutput(
            loss=None if labels is None else cross_entropy(logits, labels),
            logits=logits,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def shift_right(self, labels: Int[Array, "batch tokens"]) -> Int[Array, "batch tokens"]:
        """§4.2, teacher forcing: the labels one later, the first token in front, padding for what has no label."""
        ids = self.generation_config
        return shift_tokens_right(labels, ids.pad_token_id, ids.decoder_start_token_id)

    def start(
        self,
        encoder_hidden_states: Float[Array, "batch positions d_model"],
        length: int,
        attention_mask: Int[Array, "batch positions"] | None = None,
    ) -> T5Cache:
        """A cache for `length` tokens; see `audiozoo.decoding`."""
        return _marked(self.decoder.start(encoder_hidden_states, length, attention_mask))

    def step(
        self, tokens: Int[Array, "rows 1"], cache: T5Cache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "rows vocabulary"], T5Cache]:
        """Logits of the token after the one at `position`; see `audiozoo.decoding`."""
        out = self.decoder(self.shared(tokens), cache=_unmarked(cache, len(tokens)), position=position)
        own = _marked(out.past_key_values).self_attention
        return self.head(out.last_hidden_state)[:, -1], T5Cache(own, cache.cross_attention, None)

    def generate(
        self,
        input_features: Float[Array, "batch frames d_model"],
        attention_mask: Int[Array, "batch frames"] | None = None,
        composer: str = "composer1",
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Int[np.ndarray, "rows tokens"] | GenerateOutput:
        """§5: tokens of every segment, by one compiled loop, greedily unless the checkpoint or you say otherwise.

        Args:
            input_features: log-mel frames as the processor gives them.
            attention_mask: of the processor.
            composer: the style.
            key: randomness for `do_sample=True`.
            options: as for `transformers.generate`; see `audiozoo.decoding.GenerationConfig`.

        Returns:
            Tokens, the first one included, padded to the longest; with `return_dict_in_generate=True` a
            `GenerateOutput`.

        Raises:
            UsageError: for an unknown style or option.
        """
        ids = self.generation_config
        defaults: dict[str, Any] = {
            "max_length": ids.max_length,
            "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id,
            **dict(ids.options),
        }
        config = GenerationConfig.over(defaults, options)
        config = config.replace(max_new_tokens=config.new_tokens(1), max_length=None)
        prompt = jnp.full((len(input_features), 1), ids.decoder_start_token_id, jnp.int32)
        row = ids.row(composer)
        output = _generate(*nnx.split(self), input_features, attention_mask, jnp.int32(row), prompt, key, config=config)
        output = output.trim()
        return output if config.return_dict_in_generate else np.asarray(output.sequences)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def _generate(
    graphdef: Any,
    state: Any,
    input_features: jax.Array,
    attention_mask: jax.Array | None,
    row: jax.Array,
    prompt: jax.Array,
    key: jax.Array | None,
    *,
    config: GenerationConfig,
) -> GenerateOutput:
    model = nnx.merge(graphdef, state)
    rows = jnp.broadcast_to(row, (len(prompt),))
    x, mask = model.condition(input_features, rows, attention_mask)
    memory = model.encoder(x, mask).last_hidden_state
    cache = model.start(memory, 1 + config.new_tokens(1), mask)
    return generate(model.step, cache, prompt, config, key=key)


def _marked(cache: T5Cache) -> T5Cache:
    """Tell the search which arrays grow with the tokens and which all beams share."""
    mark: Any = Growing
    own = tuple(KeyValues(mark(kv.key, 2), mark(kv.value, 2)) for kv in cache.self_attention)
    shared: Any = Shared((cache.cross_attention, cache.memory_mask))
    return T5Cache(own, shared, None)


def _unmarked(cache: Any, rows: int) -> T5Cache:
    """The cache as the decoder reads it; the mask, of which beams share that of their example, with a row for each."""
    own = tuple(KeyValues(kv.key.value, kv.value.value) for kv in cache.self_attention)
    cross, mask = cache.cross_attention.value
    return T5Cache(own, cross, None if mask is None else jnp.repeat(mask, rows // len(mask), axis=0))


# --- data, §3.1 ------------------------------------------------------------------------------------------------------

RATE, CHROMA_RATE = 22_050, 20  # Hz of a song, and of its chroma
STEPS = np.array([[1, 0], [0, 1], [1, 1]])  # of the alignment: in one, in the other, in both
STEP_WEIGHTS = np.array([1.5, 1.5, 2.0])


def _unit(chroma: Float[np.ndarray, "frames 12"]) -> Float[np.ndarray, "frames 12"]:
    return chroma / np.maximum(np.linalg.norm(chroma, axis=1, keepdims=True), 1e-6)


def chroma_of_song(song: Float[np.ndarray, " time"]) -> Float[np.ndarray, "frames 12"]:
    """How loud each pitch class is in a song at `RATE`, `CHROMA_RATE` times a second; each frame of norm 1."""
    import librosa

    size, hop = 4096, RATE / CHROMA_RATE
    padded = np.pad(np.asarray(song, np.float64), size // 2)
    starts = np.round(np.arange(int(len(song) / hop) + 1) * hop).astype(int)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[np.minimum(starts, len(padded) - size)]
    power = np.abs(np.fft.rfft(frames * hann_window(size))) ** 2
    filters = librosa.filters.chroma(sr=RATE, n_fft=size, tuning=0.0, base_c=True)
    return _unit(np.log1p(power @ filters.T))


def chroma_of_notes(notes: Float[np.ndarray, "notes 4"]) -> Float[np.ndarray, "frames 12"]:
    """The same of notes, `(onset, offset, pitch, velocity)` with times in seconds."""
    chroma = np.zeros((int(notes[:, 1].max() * CHROMA_RATE) + 1, 12))
    for onset, end, pitch, velocity in notes.tolist():
        first = int(onset * CHROMA_RATE)
        chroma[first : max(int(end * CHROMA_RATE), first + 1), int(pitch) % 12] += max(velocity, 1.0)
    return _unit(chroma)


def aligned(
    one: Float[np.ndarray, "frames 12"], two: Float[np.ndarray, "others 12"]
) -> tuple[Int[np.ndarray, "2 places"], float]:
    """Dynamic time warping of two chroma sequences: frames that belong together, growing in both, and the mean cost."""
    import librosa

    cost, path = librosa.sequence.dtw(C=1.0 - one @ two.T, step_sizes_sigma=STEPS, weights_mul=STEP_WEIGHTS)
    kept = [path[-1]]
    for place in path[::-1]:
        if (place > kept[-1]).all():
            kept.append(place)
    return np.array(kept).T, float(cost[-1, -1]) / (len(one) + len(two))


def synchronised(
    song: Float[np.ndarray, " time"], notes: Float[np.ndarray, "notes 4"], sampling_rate: int = RATE
) -> tuple[Float[np.ndarray, "notes 4"], int]:
    """§3.1, synchronisation: a cover's notes at the times of the song and in its key.

    Of the twelve keys the one whose alignment, second by second, costs least. The released code aligns chroma and
    onsets in several resolutions, and moves the song to the cover's key; here the cover moves.

    Args:
        song: mono waveform.
        notes: of the cover, `(onset, offset, pitch, velocity)`, times in seconds; see `audiozoo.audio.midi.notes_of`.
        sampling_rate: Hz of `song`.

    Returns:
        The notes, and by how many semitones they were moved, -5 to 6.

    Raises:
        UsageError: if there is no note.
    """
    notes = table_of(notes)
    if not len(notes):
        raise UsageError("A cover without a note cannot be brought together with a song.")
    heard = chroma_of_song(resample(song, sampling_rate, RATE))
    played = chroma_of_notes(notes)

    def by_the_second(chroma: np.ndarray) -> np.ndarray:
        groups = np.array_split(chroma, max(len(chroma) // CHROMA_RATE, 1))
        return _unit(np.stack([group.mean(axis=0) for group in groups]))

    coarse = by_the_second(heard), by_the_second(played)
    keys = sorted(range(-5, 7), key=abs)
    key = min(keys, key=lambda k: aligned(coarse[0], np.roll(coarse[1], k, axis=1))[1])
    (there, here), _ = aligned(heard, np.roll(played, key, axis=1))
    moved = notes.copy()
    for column in (0, 1):
        moved[:, column] = np.interp(notes[:, column], here / CHROMA_RATE, there / CHROMA_RATE)
    moved[:, 2] += key
    return moved, key


def quantised(
    notes: Float[np.ndarray, "notes 4"], half_beats: Float[np.ndarray, " times"]
) -> Int[np.ndarray, "quantised_notes 4"]:
    """§3.1: notes in seconds at the nearest half beats, each at least one long; of those that coincide, one."""
    notes = table_of(notes)
    borders = (half_beats[1:] + half_beats[:-1]) / 2
    onsets, ends = (np.searchsorted(borders, notes[:, column], side="right") for column in (0, 1))
    table = np.column_stack([onsets, np.maximum(ends, onsets + 1), np.round(notes[:, 2:])]).astype(int)
    _, first = np.unique(table[:, 0] * 128 + table[:, 2], return_index=True)
    return table[first]


def melody_chroma_accuracy(
    melody: Float[np.ndarray, " frames"], notes: Float[np.ndarray, "notes 4"], hop: float
) -> float:
    """§3.1, filtering: of the frames that are sung, in how many the highest note is the melody's, whatever its octave.

    Args:
        melody: Hz, NaN where nothing is sung: in the paper that of the separated voice, by pYIN (`librosa.pyin`).
        notes: of the cover, synchronised, times in seconds.
        hop: seconds between frames.
    """
    at, highest = np.arange(len(melody)) * hop, np.full(len(melody), -np.inf)
    for onset, end, pitch, _ in table_of(notes):
        sounding = (at >= onset) & (at < end)
        highest[sounding] = np.maximum(highest[sounding], pitch)
    sung = np.isfinite(melody)
    if not sung.any():
        return 0.0
    apart = 69 + 12 * np.log2(melody[sung] / 440) - np.where(np.isfinite(highest[sung]), highest[sung], np.nan)
    return float(np.mean(np.abs((apart + 6) % 12 - 6) < 0.5))


def paired(
    song: Float[np.ndarray, " time"],
    notes: Float[np.ndarray, "notes 4"],
    sampling_rate: int = RATE,
    *,
    beats: Float[np.ndarray, " beats"] | None = None,
    tracker: str = "librosa",
    melody: Float[np.ndarray, " frames"] | None = None,
    hop: float = 1024 / 44_100,
) -> dict[str, list]:
    """§3.1: what training has to know of a song with a piano cover, as the recipe `pop2piano` reads it.

    Args:
        song: mono waveform.
        notes: of the cover, times in seconds; a recorded one is to be transcribed first.
        sampling_rate: Hz of `song`.
        beats: times of the beats in seconds, if they are known; tracked otherwise.
        tracker: of the beats.
        melody: see `melody_chroma_accuracy`; without it, covers are chosen by their length alone.
        hop: seconds between frames of the melody.

    Returns:
        `beats` in seconds, and `notes` in half beats from the first one on.

    Raises:
        UsageError: if the cover's length is another than the song's by more than a fifth of it, or if the cover has
            another melody.
    """
    notes = table_of(notes)
    length, played = len(song) / sampling_rate, float(np.max(notes[:, 1], initial=0.0))
    if abs(length - played) > Pop2PianoRecipe.length_difference * length:
        raise UsageError(
            f"The song is {length:.0f} s long and the cover {played:.0f} s: it is not one of the whole song."
        )
    times = np.asarray(tracking.beats(song, sampling_rate, tracker) if beats is None else beats, np.float64)
    half_beats = tracking.interpolated(times, np.arange(2 * len(times) - 1) / 2)
    moved, _ = synchronised(song, notes, sampling_rate)
    if melody is not None and (share := melody_chroma_accuracy(melody, moved, hop)) < Pop2PianoRecipe.melody_accuracy:
        raise UsageError(f"Of what is sung the cover plays {share:.0%}: it has another melody, or is not in time.")
    return {"beats": times.tolist(), "notes": quantised(moved, half_beats).tolist()}


# --- training, §4.2 --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pop2PianoRecipe:
    """§4.2: how the released model was trained."""

    learning_rate: float = 1e-3  # constant
    batch_size: int = 32  # segments of two bars
    epochs: int = 2000  # passes over the songs
    clip: float = 3.0  # not in the paper; in the released code: largest norm of the gradient
    melody_accuracy: float = 0.15  # §3.1: least `melody_chroma_accuracy` of a cover that is learnt from
    length_difference: float = 0.2  # §3.1: largest difference between a song's and its cover's length, of the song's

    def optimizer(self) -> optax.GradientTransformation:
        """§4.2: Adafactor (arXiv 1804.04235) at a constant rate."""
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.adafactor(self.learning_rate))


# --- use, §5 ---------------------------------------------------------------------------------------------------------


def arrange(
    model: Pop2PianoForConditionalGeneration,
    processor: Any,
    song: Float[np.ndarray, " time"],
    *,
    sampling_rate: int = 44_100,
    composer: str = "composer1",
    batch_size: int = 16,
    beats: Float[np.ndarray, " beats"] | None = None,
    progress: Callable[[int, int], None] | None = None,
    key: jax.Array | None = None,
    **options: Any,
) -> Any:
    """§5: a song's piano cover.

    Segments are arranged `batch_size` at a time, in a shape that all batches share, so that memory does not grow with
    the song and nothing compiles twice.

    Args:
        model: the model.
        processor: of the same checkpoint.
        song: mono waveform in [-1, 1].
        sampling_rate: Hz of `song`.
        composer: the style.
        batch_size: segments at a time.
        beats: times of the beats in seconds, if they are known; tracked otherwise.
        progress: called with the segments done and the segments in all.
        key: randomness for `do_sample=True`, other for each batch of segments.
        options: of `generate`.

    Returns:
        A `pretty_midi.PrettyMIDI`; its times are those of the song.

    Raises:
        UsageError: for an unknown style or option, or one that makes more than tokens of one score.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; at least one segment has to be arranged at a time.")
    several = sorted(set(options) & {"num_return_sequences", "return_dict_in_generate"})
    if several:
        raise UsageError(f"arrange makes one score of a song; {several[0]} is an option of generate alone.")
    inputs = processor(audio=song, sampling_rate=sampling_rate, beats=beats)
    features = inputs["input_features"]
    count, frames = features.shape[:2]
    padded = -(-frames // 64) * 64
    tokens = []
    for start in range(0, count, batch_size):
        part = features[start : start + batch_size]
        batch = np.zeros((batch_size, padded, features.shape[2]), features.dtype)
        mask = np.zeros((batch_size, padded), np.int32)
        batch[: len(part), :frames], mask[: len(part), :frames] = part, 1
        own = None if key is None else jax.random.fold_in(key, start)
        one = options | {"num_return_sequences": 1}
        rows = model.generate(jnp.asarray(batch), jnp.asarray(mask), composer, key=own, **one)
        tokens.append(np.asarray(rows)[: len(part)])
        if progress is not None:
            progress(min(start + batch_size, count), count)
    longest = max(rows.shape[1] for rows in tokens)
    whole = np.concatenate([np.pad(rows, ((0, 0), (0, longest - rows.shape[1]))) for rows in tokens])
    return processor.batch_decode(whole, inputs)["pretty_midi_objects"][0]
