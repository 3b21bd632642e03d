r"""What stands between a decoder's logits and the choice of a token: constraints, and the shaping of sampling.

A processor is a pure function

    (logits Float[B, V], tokens Int[B, T], length Int[]) -> logits Float[B, V]

where `tokens` is the whole buffer, of which the first `length` columns are filled (prompt included). Each one here
equals the processor of the same purpose in `transformers.generation`; `from_config` puts them in its order. Beam search
hands them log-probabilities instead of logits, as `transformers` does (and with `patience` logits, as OpenAI does).
"""

# ruff: noqa: D102 (a processor is documented by its class)

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from audiozoo.decoding.config import GenerationConfig, _as_tuple
from audiozoo.errors import UsageError

LogitsProcessor: TypeAlias = Callable[
    [Float[Array, "batch vocab"], Int[Array, "batch buffer"], Int[Array, ""]], Float[Array, "batch vocab"]
]


@dataclasses.dataclass(frozen=True)
class SuppressTokens:
    """Never choose these tokens."""

    tokens: tuple[int, ...]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return _forbid(logits, _one_of(self.tokens, logits.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SuppressTokensAtBegin:
    """Do not choose these tokens at index `begin` (the first token after the prompt)."""

    tokens: tuple[int, ...]
    begin: int

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return _forbid(logits, _one_of(self.tokens, logits.shape[-1]) & (length == self.begin))


@dataclasses.dataclass(frozen=True)
class MinLength:
    """Do not choose end-of-sequence before there are `min_length` tokens, prompt included."""

    min_length: int
    eos_token_ids: tuple[int, ...]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return _forbid(logits, _one_of(self.eos_token_ids, logits.shape[-1]) & (length < self.min_length))


@dataclasses.dataclass(frozen=True)
class ForcedTokens:
    """At each given index choose the given token."""

    index_and_token: tuple[tuple[int | Array, int | tuple[int, ...]], ...]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        for index, token in self.index_and_token:
            if not all(0 <= one < logits.shape[-1] for one in _as_tuple(token)):
                raise UsageError(f"The forced token {token} is not in the vocabulary of {logits.shape[-1]} tokens.")
            forced = jnp.where(_one_of(_as_tuple(token), logits.shape[-1]), 0.0, -jnp.inf).astype(logits.dtype)
            logits = jnp.where(length == index, forced, logits)
        return logits


@dataclasses.dataclass(frozen=True)
class RepetitionPenalty:
    r"""Divide the positive logits of tokens seen so far by $\theta$, multiply the negative ones by it.

    Keskar et al. (2019), arXiv:1909.05858, §4.1; the treatment of negative logits is that of `transformers`.
    """

    penalty: float
    ignore: Int[Array, " batch"] | None = None  # leading columns of each row that are padding

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        column = jnp.arange(tokens.shape[1])
        counted = jnp.broadcast_to(column < length, tokens.shape)
        if self.ignore is not None:
            counted &= column >= self.ignore[:, None]
        return _penalise(logits, _mark(tokens, counted, logits.shape[-1]), self.penalty)


@dataclasses.dataclass(frozen=True)
class EncoderRepetitionPenalty:
    r"""Favour the tokens of the encoder's input by $\theta$: the inverse of `RepetitionPenalty`."""

    penalty: float
    encoder_tokens: Int[Array, "batch source"]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        source = _per_row(self.encoder_tokens, logits.shape[0])
        return _penalise(logits, _mark(source, jnp.ones(source.shape, bool), logits.shape[-1]), 1 / self.penalty)


@dataclasses.dataclass(frozen=True)
class NoRepeatNGram:
    """Do not choose a token that would complete an n-gram which the sequence already holds."""

    size: int

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return _forbid(logits, _completes_ngram(tokens, length, tokens, length, self.size, logits.shape[-1]))


@dataclasses.dataclass(frozen=True)
class EncoderNoRepeatNGram:
    """Do not choose a token that would complete an n-gram of the encoder's input."""

    size: int
    encoder_tokens: Int[Array, "batch source"]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        source = _per_row(self.encoder_tokens, logits.shape[0])
        banned = _completes_ngram(source, source.shape[1], tokens, length, self.size, logits.shape[-1])
        return _forbid(logits, banned & (length >= self.size - 1))


@dataclasses.dataclass(frozen=True)
class SequenceBias:
    r"""Add a bias to a token whenever it would complete a given sequence; a bias of $-\infty$ forbids the sequence."""

    sequences: tuple[tuple[tuple[int, ...], float], ...]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        vocabulary = logits.shape[-1]
        for sequence, _ in self.sequences:
            if not all(0 <= token < vocabulary for token in sequence):
                raise UsageError(
                    f"sequence_bias or bad_words_ids names the tokens {list(sequence)}, of which one is not in the "
                    f"vocabulary of {vocabulary} tokens."
                )
        single = np.zeros(vocabulary)
        for sequence, bias in self.sequences:
            if len(sequence) == 1:
                single[sequence[0]] = bias
        logits = logits + single.astype(logits.dtype)
        for size in sorted({len(sequence) for sequence, _ in self.sequences} - {1}):
            group = [(sequence, bias) for sequence, bias in self.sequences if len(sequence) == size]
            if size - 1 > tokens.shape[1]:
                continue
            suffix = lax.dynamic_slice_in_dim(tokens, length - (size - 1), size - 1, axis=1)
            prefixes = np.array([sequence[:-1] for sequence, _ in group])
            matches = jnp.all(suffix[:, None] == prefixes, axis=-1) & (length >= size - 1)
            biases = jnp.where(matches, np.array([bias for _, bias in group]), 0.0).astype(logits.dtype)
            logits = logits.at[:, np.array([sequence[-1] for sequence, _ in group])].add(biases)
        return logits


@dataclasses.dataclass(frozen=True)
class ExponentialDecayLengthPenalty:
    r"""From index `start` on, raise end-of-sequence by $|x| (f^{n} - 1)$, with $n$ the tokens since `start`."""

    start: int
    factor: float
    eos_token_ids: tuple[int, ...]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        count = jnp.maximum(length - self.start, 0).astype(logits.dtype)
        raised = logits + jnp.abs(logits) * (self.factor**count - 1)
        applies = _one_of(self.eos_token_ids, logits.shape[-1]) & jnp.isfinite(logits)
        return jnp.where(applies, raised, logits)


@dataclasses.dataclass(frozen=True)
class RemoveInvalidValues:
    """Turn nan into 0 and infinities into the largest finite numbers."""

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return jnp.nan_to_num(logits, nan=0.0)


@dataclasses.dataclass(frozen=True)
class Normalize:
    """Turn logits into log-probabilities."""

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return jax.nn.log_softmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True)
class Temperature:
    r"""$x / \tau$; $\tau$ may be an array of one value per row."""

    temperature: float | Float[Array, "*batch"]

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        temperature = jnp.asarray(self.temperature, logits.dtype)
        return logits / (temperature[:, None] if temperature.ndim else temperature)


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keep the `k` most probable tokens (Fan et al., 2018, arXiv:1805.04833), and those that tie with the last."""

    k: int
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        return _forbid(logits, logits < _kth(logits, max(self.k, self.min_tokens_to_keep)))


@dataclasses.dataclass(frozen=True)
class TopP:
    """Nucleus sampling: keep the smallest set of tokens with probability `p` (Holtzman et al., arXiv:1904.09751)."""

    p: float
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        # A token goes if those that are no more probable hold at most 1 - p together.
        probabilities = jax.nn.softmax(logits, axis=-1)

        def removable(below: Array) -> Array:
            return jnp.sum(jnp.where(below, probabilities, 0.0), axis=-1, keepdims=True) <= 1 - self.p

        image = _ordered_bits(logits)
        removed = image < _bisect(image, lambda threshold: removable(image < threshold))
        return _forbid(logits, removed & (logits < _kth(logits, self.min_tokens_to_keep)))


@dataclasses.dataclass(frozen=True)
class MinP:
    """Keep tokens with at least `p` times the probability of the best one (Nguyen et al., arXiv:2407.01082)."""

    p: float
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        # P(v) < p max P  <=>  x_v < max x + log p
        threshold = jnp.max(logits, axis=-1, keepdims=True) + (np.log(self.p) if self.p > 0 else -np.inf)
        return _forbid(logits, (logits < threshold) & (logits < _kth(logits, self.min_tokens_to_keep)))


@dataclasses.dataclass(frozen=True)
class TypicalP:
    """Keep the tokens whose information is nearest to the entropy, up to `mass` (Meister et al., arXiv:2202.00666)."""

    mass: float
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        distance = jnp.abs(-log_p - _entropy(log_p))
        distances, sorted_log_p = lax.sort((distance, log_p), dimension=-1, num_keys=1)
        last = jnp.sum(jnp.cumsum(jnp.exp(sorted_log_p), axis=-1) < self.mass, axis=-1, keepdims=True)
        last = jnp.clip(last, self.min_tokens_to_keep - 1, logits.shape[-1] - 1)
        return _forbid(logits, distance > jnp.take_along_axis(distances, last, axis=-1))


@dataclasses.dataclass(frozen=True)
class EpsilonCutoff:
    """Keep tokens of probability `epsilon` or more (Hewitt et al., arXiv:2210.15191, §4)."""

    epsilon: float
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        unlikely = jax.nn.softmax(logits, axis=-1) < self.epsilon
        return _forbid(logits, unlikely & (logits < _kth(logits, self.min_tokens_to_keep)))


@dataclasses.dataclass(frozen=True)
class EtaCutoff:
    r"""Keep tokens of probability $\min(\epsilon, \sqrt{\epsilon}\,e^{-H})$ or more (Hewitt et al., Eq. 6)."""

    epsilon: float
    min_tokens_to_keep: int = 1

    def __call__(self, logits: Array, tokens: Array, length: Array) -> Array:
        log_p = jax.nn.log_softmax(logits, axis=-1)
        eta = jnp.minimum(self.epsilon, np.sqrt(self.epsilon) * jnp.exp(-_entropy(log_p)))
        return _forbid(logits, (jnp.exp(log_p) < eta) & (logits < _kth(logits, self.min_tokens_to_keep)))


def from_config(
    config: GenerationConfig,
    prompt_length: int,
    max_length: int | Int[Array, ""],
    *,
    padding: Int[Array, " batch"] | None = None,
    encoder_tokens: Int[Array, "batch source"] | None = None,
) -> tuple[LogitsProcessor, ...]:
    """The constraints that `config` asks for, in the order of `transformers`.

    Args:
        config: the options.
        prompt_length: tokens of the prompt.
        max_length: prompt and new tokens; may be traced.
        padding: number of leading padding columns in each row of the prompt.
        encoder_tokens: the encoder's input, if that is text.
    """
    eos = config.eos_token_ids
    found: list[LogitsProcessor] = []
    if config.sequence_bias:
        found.append(SequenceBias(config.sequence_bias))
    if config.encoder_repetition_penalty != 1.0:
        found.append(EncoderRepetitionPenalty(config.encoder_repetition_penalty, _need(encoder_tokens)))
    if config.repetition_penalty != 1.0:
        found.append(RepetitionPenalty(config.repetition_penalty, padding))
    if config.no_repeat_ngram_size > 0:
        found.append(NoRepeatNGram(config.no_repeat_ngram_size))
    if config.encoder_no_repeat_ngram_size > 0:
        found.append(EncoderNoRepeatNGram(config.encoder_no_repeat_ngram_size, _need(encoder_tokens)))
    if config.bad_words_ids:
        words = tuple((word, -np.inf) for word in config.bad_words_ids if word not in [(token,) for token in eos])
        found.append(SequenceBias(words))
    min_length = config.min_length
    if config.min_new_tokens is not None:
        min_length = prompt_length + config.min_new_tokens
    if min_length > 0 and eos:
        found.append(MinLength(min_length, eos))
    if config.forced_bos_token_id is not None:
        found.append(ForcedTokens(((1, config.forced_bos_token_id),)))
    if config.forced_eos_token_id is not None:
        found.append(ForcedTokens(((max_length - 1, config.forced_eos_token_id),)))
    if config.remove_invalid_values:
        found.append(RemoveInvalidValues())
    if config.exponential_decay_length_penalty is not None:
        start, factor = config.exponential_decay_length_penalty
        found.append(ExponentialDecayLengthPenalty(start + prompt_length, factor, eos))
    if config.suppress_tokens:
        found.append(SuppressTokens(config.suppress_tokens))
    if config.begin_suppress_tokens:
        # A forced first token moves the beginning by one.
        begin = prompt_length + int(prompt_length <= 1 and config.forced_bos_token_id is not None)
        found.append(SuppressTokensAtBegin(config.begin_suppress_tokens, begin))
    if config.forced_decoder_ids:
        found.append(ForcedTokens(config.forced_decoder_ids))
    return tuple(found)


def warpers_from_config(
    config: GenerationConfig, temperature: float | Float[Array, "*batch"] | None = None
) -> tuple[LogitsProcessor, ...]:
    """The shaping of the sampled distribution that `config` asks for; empty without `do_sample`.

    Args:
        config: the options.
        temperature: a traced value to use instead of `config.temperature`.
    """
    found: list[LogitsProcessor] = []
    if config.do_sample:
        # Beams need a token besides every end-of-sequence token, to go on.
        keep = len(config.eos_token_ids) + 1 if config.num_beams > 1 and config.eos_token_ids else 1
        keep = 2 if config.num_beams > 1 and not config.eos_token_ids else keep
        if temperature is not None:
            found.append(Temperature(temperature))
        elif config.temperature != 1.0:
            found.append(Temperature(config.temperature))
        if config.top_k:
            found.append(TopK(config.top_k, keep))
        if config.top_p is not None and config.top_p < 1.0:
            found.append(TopP(config.top_p, keep))
        if config.min_p is not None:
            found.append(MinP(config.min_p, keep))
        if config.typical_p is not None and config.typical_p < 1.0:
            found.append(TypicalP(config.typical_p, keep))
        if 0.0 < config.epsilon_cutoff < 1.0:
            found.append(EpsilonCutoff(config.epsilon_cutoff, keep))
        if 0.0 < config.eta_cutoff < 1.0:
            found.append(EtaCutoff(config.eta_cutoff, keep))
    if config.renormalize_logits:
        found.append(Normalize())
    return tuple(found)


def apply(processors: Sequence[LogitsProcessor], logits: Array, tokens: Array, length: Array) -> Array:
    """`logits` through all `processors`, in order."""
    for processor in processors:
        logits = processor(logits, tokens, length)
    return logits


def is_one_of(tokens: Int[Array, "*shape"], ids: tuple[int, ...]) -> Bool[Array, "*shape"]:
    """Whether each token is one of a few `ids`."""
    found = jnp.zeros(tokens.shape, bool)
    for token in ids:
        found |= tokens == token
    return found


def _forbid(logits: Array, forbidden: Array | np.ndarray) -> Array:
    return jnp.where(forbidden, jnp.asarray(-jnp.inf, logits.dtype), logits)


def _one_of(tokens: Sequence[int], vocabulary: int) -> np.ndarray:
    mask = np.zeros(vocabulary, bool)
    mask[[token for token in tokens if 0 <= token < vocabulary]] = True
    return mask


def _mark(tokens: Array, counted: Array, vocabulary: int) -> Bool[Array, "batch vocab"]:
    """Which tokens of the vocabulary occur in each row, among the `counted` columns."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    columns = jnp.where(counted, tokens, vocabulary)
    return jnp.zeros((tokens.shape[0], vocabulary), bool).at[rows, columns].set(True, mode="drop")


def _penalise(logits: Array, marked: Array, penalty: float) -> Array:
    return jnp.where(marked, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def _completes_ngram(
    source: Array, source_length: int | Array, tokens: Array, length: Array, size: int, vocabulary: int
) -> Bool[Array, "batch vocab"]:
    """Tokens that, after the last `size - 1` of `tokens`, would make an n-gram found in `source`."""
    windows = source.shape[1] - size + 1
    if windows <= 0:
        return jnp.zeros((tokens.shape[0], vocabulary), bool)
    matches = jnp.broadcast_to(jnp.arange(windows) + size <= source_length, (tokens.shape[0], windows))
    for offset in range(size - 1):
        last = lax.dynamic_slice_in_dim(tokens, length - (size - 1) + offset, 1, axis=1)
        matches &= source[:, offset : offset + windows] == last
    return _mark(source[:, size - 1 :], matches, vocabulary)


def _kth(logits: Array, k: int) -> Float[Array, "batch 1"]:
    """The k-th largest value of each row, by bisection: on a CPU far cheaper than a sort of the vocabulary."""
    if k == 1:
        return jnp.max(logits, axis=-1, keepdims=True)
    image = _ordered_bits(logits)
    kth = _bisect(image, lambda threshold: jnp.sum(image >= threshold, axis=-1, keepdims=True) >= k)
    return jnp.min(jnp.where(image >= kth, logits, jnp.inf), axis=-1, keepdims=True)


def _ordered_bits(x: Array) -> Array:
    """Unsigned integers in the order of the floats `x`: of negative floats all bits are flipped, else the sign."""
    unsigned = jnp.uint32 if x.dtype == jnp.float32 else jnp.uint64
    width = jnp.iinfo(unsigned).bits
    bits = lax.bitcast_convert_type(x + 0.0, unsigned)  # -0.0 + 0.0 is 0.0: equal floats get equal integers
    negative = bits >> (width - 1) == 1
    return jnp.where(negative, ~bits, bits | (jnp.ones((), unsigned) << (width - 1)))


def _bisect(image: Array, holds: Callable[[Array], Array]) -> Array:
    """For each row the largest integer threshold that `holds`, which must be true below it and false above."""
    width = jnp.iinfo(image.dtype).bits

    def refine(step: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.ones((), image.dtype) << (width - 1 - step).astype(image.dtype))
        return jnp.where(holds(candidate), candidate, threshold)

    return lax.fori_loop(0, width, refine, jnp.zeros((image.shape[0], 1), image.dtype))


def _entropy(log_p: Array) -> Float[Array, "batch 1"]:
    return -jnp.sum(jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * log_p, 0.0), axis=-1, keepdims=True)


def _per_row(source: Array, rows: int) -> Array:
    return jnp.repeat(source, rows // source.shape[0], axis=0)


def _need(encoder_tokens: Array | None) -> Array:
    if encoder_tokens is None:
        raise UsageError(
            "encoder_repetition_penalty and encoder_no_repeat_ngram_size need the encoder's input as tokens, and this "
            "model's encoder does not read tokens."
        )
    return encoder_tokens
