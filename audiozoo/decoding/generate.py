r"""Autoregressive decoding in one compiled loop, for any model that can be written as a step.

**The step.** A model gives two pure functions and a cache (see `decoding.cache` for its three kinds of leaves):

    step(tokens Int[B, 1], cache, position Int[]) -> (logits Float[B, V], cache)
    prefill(prompt Int[B, P], cache)              -> (logits Float[B, V], cache)

`step` feeds the token that stands at index `position` (counted from the first token of the prompt, padding included)
and returns the logits of the token at `position + 1`; it writes its keys and values to slot `position` of the cache and
attends to slots `0 … position`. `prefill` does the same for a whole prompt at once and returns the logits after its
last token; without it the prompt is fed token by token. The cache that comes back has the structure, shapes and dtypes
of the one that went in, with room for `P + max_new_tokens` slots (the last token is never fed, so one less is enough).
With several beams or returned sequences $K$, `prefill` runs on the $B$ examples and `step` on $B K$ rows.

**Prompts of different lengths** are padded on the left and come with `prompt_mask`. The step sees buffer positions
only: a model keeps the number of padding tokens per row in its cache, to subtract it from positions and to mask keys.

**Composition.** `generate` is traceable and runs nothing by itself. Model state is an argument of the function that is
compiled, never a constant:

    @partial(jax.jit, static_argnames="config")
    def run(state, features, prompt, config, limit, key):
        model = nnx.merge(graphdef, state)
        cache = model.start(features, length=prompt.shape[1] + config.max_new_tokens)
        return generate(model.step, cache, prompt, config, prefill=model.prefill, max_new_tokens=limit, key=key)

`config.max_new_tokens` fixes the buffers; the traced `max_new_tokens` ends the loop earlier, so that one compilation
serves every length up to it. `decoding.Generator` does all this, and rounds lengths up to buckets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import io_callback
from jaxtyping import Bool, Float, Int

from audiozoo.decoding import cache as caches
from audiozoo.decoding import processors
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.processors import LogitsProcessor
from audiozoo.errors import UsageError
from audiozoo.layers.basic import at_least_float32

Step: TypeAlias = Callable[[Int[Array, "rows 1"], Any, Int[Array, ""]], tuple[Float[Array, "rows vocab"], Any]]
Prefill: TypeAlias = Callable[[Int[Array, "batch prompt"], Any], tuple[Float[Array, "batch vocab"], Any]]
# (tokens, length) -> which rows are finished; only the first `length` columns of `tokens` are filled.
StoppingCriterion: TypeAlias = Callable[[Int[Array, "rows buffer"], Int[Array, ""]], Bool[Array, " rows"]]


@runtime_checkable
class Streamer(Protocol):
    """Called on the host once per step, in order, with the new token of every row and its index in the sequence."""

    def __call__(self, tokens: np.ndarray, position: int) -> None:
        """Receive the tokens `(rows,)` that were chosen for index `position`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What a search found. Rows are examples times `num_return_sequences`, best first within an example.

    A beam search that ends with fewer hypotheses than are to be returned (possible with `patience`) fills up with rows
    that hold the prompt alone and have scores of -1e9.

    Attributes:
        sequences: prompt and new tokens, padded to the buffer; `trim` cuts it to what `transformers` returns.
        lengths: tokens of each row, the prompt and a final end-of-sequence included.
        prompt_length: tokens of the prompt.
        steps: how many tokens the loop chose for the row that took longest.
        sequences_scores: beam search: log-probability with length penalty.
        sum_log_probs: log-probability of the new tokens: with beams always (of processed scores, as `transformers`
            accumulates them), else with `output_log_probs`.
        log_probs: with `output_log_probs` and no beams: that of each new token, 0 after the end; taken from the
            constrained, but not tempered or truncated, distribution.
        beam_indices: beam search: the row (example x beams) from which each new token came, -1 after the end.
        scores: with `output_scores`: processed scores of every step; with beams, log-probabilities of all rows.
        logits: with `output_logits`: the model's logits of every step.
        cache: the step's cache after the last step.
    """

    sequences: Int[Array, "rows buffer"]
    lengths: Int[Array, " rows"]
    prompt_length: int = dataclasses.field(metadata={"static": True})
    steps: Int[Array, ""]
    sequences_scores: Float[Array, " rows"] | None = None
    sum_log_probs: Float[Array, " rows"] | None = None
    log_probs: Float[Array, "rows new"] | None = None
    beam_indices: Int[Array, "rows new"] | None = None
    scores: Float[Array, "new rows_searched vocab"] | None = None
    logits: Float[Array, "new rows_searched vocab"] | None = None
    cache: Any = None

    def trim(self) -> GenerateOutput:
        """The same on the host, as NumPy arrays, cut to the longest sequence; not for use under `jax.jit`."""
        host = jax.device_get(dataclasses.replace(self, cache=None))
        longest = int(host.lengths.max())
        new, steps = longest - self.prompt_length, int(host.steps)

        def cut(array: np.ndarray | None, axis: int, size: int) -> np.ndarray | None:
            return None if array is None else array[(slice(None),) * axis + (slice(size),)]

        return dataclasses.replace(
            host,
            sequences=host.sequences[:, :longest],
            log_probs=cut(host.log_probs, 1, new),
            beam_indices=cut(host.beam_indices, 1, new),
            scores=cut(host.scores, 0, steps),
            logits=cut(host.logits, 0, steps),
            cache=self.cache,
        )

    def new_tokens(self, row: int = 0) -> list[int]:
        """The tokens generated in one row, end-of-sequence included, padding not."""
        return np.asarray(self.sequences[row, self.prompt_length : int(self.lengths[row])]).tolist()


def generate(
    step: Step,
    cache: Any,
    prompt: Int[Array, "batch prompt"],
    config: GenerationConfig,
    *,
    prompt_mask: Bool[Array, "batch prompt"] | None = None,
    key: Array | None = None,
    noise: Float[Array, "new rows vocab"] | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    stopping: Sequence[StoppingCriterion] = (),
    streamer: Streamer | None = None,
    prefill: Prefill | None = None,
    max_new_tokens: int | Int[Array, ""] | None = None,
    temperature: float | Float[Array, "*rows"] | None = None,
    encoder_tokens: Int[Array, "batch source"] | None = None,
    return_cache: bool = False,
) -> GenerateOutput:
    r"""Continue `prompt` by greedy search, sampling or beam search, as `config` says.

    Args:
        step: feeds one token per row; see the module's docstring for the contract.
        cache: what the step reads and writes, with `batch` rows.
        prompt: the tokens that every sequence begins with; at least one.
        config: the options; static.
        prompt_mask: False on left padding; needed by `repetition_penalty` only.
        key: randomness of sampling: one key, from which row `r` takes `fold_in(key, r)`, or one key per row, which
            makes a row's tokens independent of the rest of the batch.
        noise: standard Gumbel noise to sample with, instead of `key`: the token at step $i$ is
            $\arg\max_v (x_v + g_{i,v})$, which is distributed as $\mathrm{softmax}(x)$.
        logits_processors: further processors, applied after those of `config` and before temperature, top-k and so on.
        stopping: further stopping rules.
        streamer: called on the host with every new token, in order; not with beams.
        prefill: feeds the whole prompt.
        max_new_tokens: a traced limit, at most that of `config`.
        temperature: a traced temperature, one for all rows or one for each, instead of that of `config`.
        encoder_tokens: the encoder's input if it is text, for the options that look at it.
        return_cache: whether the result holds the cache.

    Raises:
        UsageError: for options that contradict each other, and for a step that changes its cache's structure.
    """
    search = Search(
        step,
        config,
        prompt.shape[1],
        logits_processors=tuple(logits_processors),
        stopping=tuple(stopping),
        streamer=streamer,
        prefill=prefill,
        noise=noise,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        encoder_tokens=encoder_tokens,
        prompt_mask=prompt_mask,
    )
    if config.num_beams > 1:
        from audiozoo.decoding import beam  # beam search builds on this module

        return beam.search(search, cache, prompt, key, return_cache=return_cache)
    state = search.start(cache, prompt, key)
    return search.finish(search.advance(state), return_cache=return_cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SearchState:
    """Greedy search or sampling, between two steps."""

    cache: Any
    tokens: Int[Array, "rows buffer"]
    length: Int[Array, ""]  # filled columns of `tokens`
    finished: Bool[Array, " rows"]
    lengths: Int[Array, " rows"]
    keys: Array | None
    log_probs: Float[Array, "rows new"] | None
    scores: Float[Array, "new rows vocab"] | None
    logits: Float[Array, "new rows vocab"] | None


@dataclasses.dataclass(frozen=True)
class Search:
    """One search: its static parts and what they close over. `generate` is `finish(advance(start(…)))`."""

    step: Step
    config: GenerationConfig
    prompt_length: int
    logits_processors: tuple[LogitsProcessor, ...] = ()
    stopping: tuple[StoppingCriterion, ...] = ()
    streamer: Streamer | None = None
    prefill: Prefill | None = None
    noise: Float[Array, "new rows vocab"] | None = None
    temperature: float | Float[Array, "*rows"] | None = None
    max_new_tokens: int | Int[Array, ""] | None = None
    encoder_tokens: Int[Array, "batch source"] | None = None
    prompt_mask: Bool[Array, "batch prompt"] | None = None

    def __post_init__(self) -> None:
        if self.prompt_length < 1:
            raise UsageError("generate needs a prompt of at least one token, such as decoder_start_token_id.")
        limit = self.max_new_tokens
        if isinstance(limit, (int, np.integer)) and not 1 <= limit <= self.buffer_new:
            raise UsageError(f"max_new_tokens={limit} must be between 1 and the buffer's {self.buffer_new} tokens.")

    @property
    def buffer_new(self) -> int:
        """How many new tokens the buffers hold."""
        return self.config.new_tokens(self.prompt_length)

    @property
    def max_length(self) -> int | Int[Array, ""]:
        """The length at which the loop ends; traced if the limit is."""
        new = self.buffer_new if self.max_new_tokens is None else self.max_new_tokens
        return self.prompt_length + (new if isinstance(new, int) else jnp.minimum(new, self.buffer_new))

    def begin(self, cache: Any, prompt: Int[Array, "batch prompt"], copies: int) -> tuple[Array, Any]:
        """Feed the prompt once per example, then repeat logits and cache for `copies` rows each."""
        prompt = prompt.astype(jnp.int32)
        if self.prefill is not None:
            logits, filled = self.prefill(prompt, cache)
        else:

            def feed(index: Array, cache: Any) -> Any:
                after = self.step(lax.dynamic_slice_in_dim(prompt, index, 1, axis=1), cache, index)[1]
                _check_cache(cache, after, "step")
                return after

            before = lax.fori_loop(0, self.prompt_length - 1, feed, cache) if self.prompt_length > 1 else cache
            logits, filled = self.step(prompt[:, -1:], before, jnp.asarray(self.prompt_length - 1, jnp.int32))
        _check_cache(cache, filled, "prefill" if self.prefill is not None else "step")
        return jnp.repeat(at_least_float32(logits), copies, axis=0), caches.expand(filled, copies)

    def feed_last(
        self, tokens: Int[Array, "rows buffer"], cache: Any, length: Int[Array, ""]
    ) -> tuple[Float[Array, "rows vocab"], Any]:
        """Logits after the last filled column of `tokens`."""
        position = length - 1
        logits, after = self.step(lax.dynamic_slice_in_dim(tokens, position, 1, axis=1), cache, position)
        _check_cache(cache, after, "step")
        return at_least_float32(logits), after

    def constraints(self, copies: int) -> tuple[LogitsProcessor, ...]:
        """Processors of the config and of the caller, without the shaping of sampling."""
        padding = None
        if self.prompt_mask is not None:
            padding = jnp.repeat(jnp.argmax(self.prompt_mask, axis=1), copies, axis=0)
        own = processors.from_config(
            self.config, self.prompt_length, self.max_length, padding=padding, encoder_tokens=self.encoder_tokens
        )
        return (*own, *self.logits_processors)

    def stops(
        self, tokens: Int[Array, "rows buffer"], last: Int[Array, " rows"], length: Array
    ) -> Bool[Array, " rows"]:
        """Which rows are finished by their last token, by a stopping rule or by length."""
        done = processors.is_one_of(last, self.config.eos_token_ids) | (length >= self.max_length)
        for rule in self.stopping:
            done |= rule(tokens, length)
        return done

    def start(self, cache: Any, prompt: Int[Array, "batch prompt"], key: Array | None) -> SearchState:
        """Feed the prompt and choose the first token."""
        config, copies = self.config, self.config.num_return_sequences
        logits, cache = self.begin(cache, prompt, copies)
        rows, vocabulary = logits.shape
        if self.noise is not None and self.noise.shape[1:] != (rows, vocabulary):
            raise UsageError(f"noise has shape {self.noise.shape}; it must be (steps, {rows}, {vocabulary}).")
        if config.do_sample and key is None and self.noise is None:
            raise UsageError("do_sample=True needs a key (jax.random.key(seed)) or noise.")
        new = self.buffer_new
        tokens = jnp.full((rows, self.prompt_length + new), config.fill_token_id, jnp.int32)
        tokens = lax.dynamic_update_slice(tokens, jnp.repeat(prompt.astype(jnp.int32), copies, axis=0), (0, 0))
        state = SearchState(
            cache=cache,
            tokens=tokens,
            length=jnp.asarray(self.prompt_length, jnp.int32),
            finished=jnp.zeros(rows, bool),
            lengths=jnp.full(rows, self.prompt_length, jnp.int32),
            keys=row_keys(key, rows) if config.do_sample and self.noise is None and key is not None else None,
            log_probs=jnp.zeros((rows, new), logits.dtype) if config.output_log_probs else None,
            scores=jnp.zeros((new, rows, vocabulary), logits.dtype) if config.output_scores else None,
            logits=jnp.zeros((new, rows, vocabulary), logits.dtype) if config.output_logits else None,
        )
        return self._choose(state, logits)

    def advance(self, state: SearchState, until: int | Int[Array, ""] | None = None) -> SearchState:
        """Choose tokens until all rows are finished, or until the sequences are `until` tokens long."""

        def unfinished(state: SearchState) -> Array:
            going = ~jnp.all(state.finished)
            return going if until is None else going & (state.length < until)

        def body(state: SearchState) -> SearchState:
            logits, cache = self.feed_last(state.tokens, state.cache, state.length)
            return self._choose(dataclasses.replace(state, cache=cache), logits)

        return caches.while_loop(unfinished, body, state)

    def finish(self, state: SearchState, *, return_cache: bool = False) -> GenerateOutput:
        """The result of a search that has ended."""
        return GenerateOutput(
            sequences=state.tokens,
            lengths=state.lengths,
            prompt_length=self.prompt_length,
            steps=state.length - self.prompt_length,
            sum_log_probs=None if state.log_probs is None else jnp.sum(state.log_probs, axis=1),
            log_probs=state.log_probs,
            scores=state.scores,
            logits=state.logits,
            cache=state.cache if return_cache else None,
        )

    def _choose(self, state: SearchState, logits: Float[Array, "rows vocab"]) -> SearchState:
        """Append to every unfinished row the token that `logits` and the options call for."""
        config, length, index = self.config, state.length, state.length - self.prompt_length
        constrained = processors.apply(self.constraints(config.num_return_sequences), logits, state.tokens, length)
        warpers = processors.warpers_from_config(config, self.temperature)
        scores = processors.apply(warpers, constrained, state.tokens, length)
        if config.do_sample:
            token = self._draw(state.keys, index, scores)
        else:
            token = argmax(scores)
        token = jnp.where(state.finished, config.fill_token_id, token)

        log_probs = state.log_probs
        if log_probs is not None:
            chosen = jnp.take_along_axis(constrained, token[:, None], axis=1)[:, 0]
            log_prob = chosen - jax.nn.logsumexp(constrained, axis=-1)
            log_prob = jnp.where(state.finished, 0.0, log_prob)
            log_probs = lax.dynamic_update_slice_in_dim(log_probs, log_prob[:, None], index, axis=1)
        tokens = lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], length, axis=1)
        if self.streamer is not None:
            io_callback(_host(self.streamer), None, token, length, ordered=True)
        return dataclasses.replace(
            state,
            tokens=tokens,
            length=length + 1,
            finished=state.finished | self.stops(tokens, token, length + 1),
            lengths=jnp.where(state.finished, state.lengths, length + 1),
            log_probs=log_probs,
            scores=record(state.scores, scores, index),
            logits=record(state.logits, logits, index),
        )

    def _draw(self, keys: Array | None, index: Int[Array, ""], scores: Float[Array, "rows vocab"]) -> Array:
        """One token per row, distributed as the softmax of `scores`."""
        if keys is None:
            return argmax(scores + self.gumbel(keys, index, scores))
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, index), (), scores.dtype))(keys)
        return invert_cdf(scores, uniform)

    def gumbel(self, keys: Array | None, index: Int[Array, ""], scores: Float[Array, "rows scores"]) -> Array:
        """Standard Gumbel noise for one step: the caller's, or drawn from the rows' keys."""
        if self.noise is not None:
            return lax.dynamic_index_in_dim(self.noise, index, keepdims=False).astype(scores.dtype)
        assert keys is not None
        steps = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        return jax.vmap(lambda key: jax.random.gumbel(key, scores.shape[1:], scores.dtype))(steps)


def row_keys(key: Array, rows: int) -> Array:
    """One key per row: those given, or `fold_in(key, row)` of a single one."""
    if not jnp.issubdtype(jnp.result_type(key), jax.dtypes.prng_key):
        if jnp.ndim(key) == 0:
            raise UsageError("A number is no key: give jax.random.key(number).")
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape[0] != rows:
        raise UsageError(f"{key.shape[0]} random keys were given for {rows} rows; give one key, or one for each row.")
    return key


def invert_cdf(scores: Float[Array, "rows vocab"], uniform: Float[Array, " rows"]) -> Int[Array, " rows"]:
    r"""The token at which the cumulative probability passes $u$; one uniform number a row instead of one a token.

    The sum runs over blocks first and then within one of them, so that the vocabulary is read once.
    """
    rows, vocabulary = scores.shape
    block = max(1, round(vocabulary**0.5))
    blocks = -(-vocabulary // block)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))  # softmax without its divisor
    weights = jnp.pad(weights, ((0, 0), (0, blocks * block - vocabulary))).reshape(rows, blocks, block)
    # Rounding must not lead into a block or to a token of probability zero: only others are candidates.
    of_block = jnp.sum(weights, axis=-1)
    before = jnp.cumsum(of_block, axis=-1)
    chosen = _first(before > (uniform * before[:, -1])[:, None], of_block > 0)
    rest = uniform * before[:, -1] - jnp.take_along_axis(before - of_block, chosen[:, None], axis=1)[:, 0]
    inside = jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
    token = _first(jnp.cumsum(inside, axis=-1) > rest[:, None], inside > 0)
    # Scores that are no numbers, or all minus infinity, leave no token possible; the last one stands for that.
    return jnp.minimum(chosen * block + token, vocabulary - 1).astype(jnp.int32)


def _first(reached: Bool[Array, "rows n"], possible: Bool[Array, "rows n"]) -> Int[Array, " rows"]:
    """The first possible index that is reached, else the last possible one."""
    last = possible.shape[1] - 1 - jnp.argmax(possible[:, ::-1], axis=1)
    found = reached & possible
    return jnp.where(jnp.any(found, axis=1), jnp.argmax(found, axis=1), last)


def argmax(scores: Float[Array, "rows vocab"]) -> Int[Array, " rows"]:
    """The index of the first largest score of each row."""
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def record(history: Array | None, scores: Array, index: Array) -> Array | None:
    """Write one step's scores into the stacked history, if there is one."""
    return None if history is None else lax.dynamic_update_index_in_dim(history, scores, index, axis=0)


def _host(streamer: Streamer) -> Callable[[Array, Array], None]:
    def call(tokens: Array, position: Array) -> None:
        streamer(np.asarray(tokens), int(position))

    return call


def _check_cache(before: Any, after: Any, name: str) -> None:
    """A step must give back a cache of the same structure, shapes and dtypes; say where it does not."""
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:  # type: ignore[operator]
        raise UsageError(f"{name} returned a cache of another structure: {new} instead of {old}.")
    for (path, x), y in zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if jnp.shape(x) != jnp.shape(y) or jnp.result_type(x) != jnp.result_type(y):
            raise UsageError(
                f"{name} returned the cache leaf {jax.tree_util.keystr(path)} as {jnp.result_type(y)}{jnp.shape(y)}; "
                f"it was {jnp.result_type(x)}{jnp.shape(x)}."
            )
