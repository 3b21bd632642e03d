r"""Beam search: keep the $K$ most probable continuations of every example, and the best finished ones.

Two searches share their expansion step and differ in which hypotheses they keep and when they end:

- `_Standard` is that of `transformers` 5: a pool of $K$ finished hypotheses, ranked by $\log P / n^{\lambda}$ over $n$
  generated tokens, improved until the running beams cannot beat it (`early_stopping` says how that is judged);
- `_Patient` is first come, first served with controlled patience (Kasai et al., 2022, arXiv:2204.05424, Algorithm 1),
  as OpenAI's Whisper runs it: hypotheses are collected as they finish until there are $\mathrm{round}(p K)$ of them,
  and the constraints act on logits before these become log-probabilities.

One deviation from `transformers`: with `pad_token_id=0` it fills finished sequences with end-of-sequence, because its
test for "is there a padding token" takes 0 for no; here padding is padding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from audiozoo.decoding import cache as caches
from audiozoo.decoding import processors
from audiozoo.decoding.generate import GenerateOutput, Search, record, row_keys
from audiozoo.errors import UsageError

_NEVER = -1.0e9  # the score of a hypothesis that must not win; that of `transformers`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hypotheses:
    """Some hypotheses of every example."""

    tokens: Int[Array, "batch beams buffer"]
    origins: Int[Array, "batch beams new"]  # row from which each new token came; -1 where there is none
    log_probs: Float[Array, "batch beams"]  # accumulated, without penalty
    scores: Float[Array, "batch beams"]  # what they are ranked by
    finished: Bool[Array, "batch beams"]

    def take(self, indices: Int[Array, "batch chosen"]) -> Hypotheses:
        """Those at `indices`, for every example."""

        def gather(x: Array) -> Array:
            return jnp.take_along_axis(x, indices.reshape(indices.shape + (1,) * (x.ndim - 2)), axis=1)

        return jax.tree.map(gather, self)

    def join(self, other: Hypotheses) -> Hypotheses:
        """These, followed by `other`."""
        return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), self, other)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BeamState:
    """Beam search between two steps."""

    cache: Any
    length: Int[Array, ""]
    running: Hypotheses  # K a example
    done: Hypotheses  # pool of finished ones
    rows: Int[Array, " rows"]  # the row that each running hypothesis continues: the reorder that the cache awaits
    improvable: Bool[Array, " batch"]
    continuing: Bool[Array, ""]
    keys: Array | None
    scores: Float[Array, "new rows vocab"] | None
    logits: Float[Array, "new rows vocab"] | None


def search(
    setup: Search, cache: Any, prompt: Int[Array, "batch prompt"], key: Array | None, *, return_cache: bool = False
) -> GenerateOutput:
    """Beam search over `setup.step`; see `generate` for the arguments."""
    config, prompt_length = setup.config, setup.prompt_length
    beams, new = config.num_beams, setup.buffer_new
    if setup.streamer is not None:
        raise UsageError("A streamer needs num_beams=1: beam search knows its tokens only at the end.")
    if config.output_log_probs:
        raise UsageError("output_log_probs needs num_beams=1; beam search always returns sum_log_probs.")
    if config.do_sample and key is None and setup.noise is None:
        raise UsageError("do_sample=True needs a key (jax.random.key(seed)) or noise.")
    policy: _Standard | _Patient = _Standard(setup) if config.patience is None else _Patient(setup)

    logits, cache = setup.begin(cache, prompt, beams)
    rows, vocabulary = logits.shape
    batch, dtype = rows // beams, logits.dtype
    tokens = jnp.full((batch, prompt_length + new), config.fill_token_id, jnp.int32)
    tokens = lax.dynamic_update_slice(tokens, prompt.astype(jnp.int32), (0, 0))

    def hypotheses(count: int, log_probs: Array) -> Hypotheses:
        return Hypotheses(
            tokens=jnp.repeat(tokens[:, None], count, axis=1),
            origins=jnp.full((batch, count, new), -1, jnp.int32),
            log_probs=jnp.broadcast_to(log_probs, (batch, count)),
            scores=jnp.full((batch, count), _NEVER, dtype),
            finished=jnp.zeros((batch, count), bool),
        )

    # All beams begin alike: only the first may be continued at the first step.
    first = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER).astype(dtype)
    state = BeamState(
        cache=cache,
        length=jnp.asarray(prompt_length, jnp.int32),
        running=hypotheses(beams, first),
        done=hypotheses(policy.pool, jnp.asarray(_NEVER, dtype)),
        rows=jnp.arange(rows, dtype=jnp.int32),
        improvable=jnp.ones(batch, bool),
        continuing=jnp.asarray(True),
        keys=row_keys(key, batch) if config.do_sample and setup.noise is None and key is not None else None,
        scores=jnp.zeros((new, rows, vocabulary), dtype) if config.output_scores else None,
        logits=jnp.zeros((new, rows, vocabulary), dtype) if config.output_logits else None,
    )
    state = policy.select(*_expand(setup, state, logits))

    def body(state: BeamState) -> BeamState:
        flat = state.running.tokens.reshape(rows, -1)
        cache = caches.reorder(state.cache, state.rows, state.length - 1)
        logits, cache = setup.feed_last(flat, cache, state.length)
        return policy.select(*_expand(setup, dataclasses.replace(state, cache=cache), logits))

    state = lax.while_loop(lambda state: state.continuing, body, state)

    returned = config.num_return_sequences
    flat = jax.tree.map(lambda x: x[:, :returned].reshape(batch * returned, *x.shape[2:]), policy.result(state))
    return GenerateOutput(
        sequences=flat.tokens,
        lengths=prompt_length + jnp.sum(flat.origins >= 0, axis=1),
        prompt_length=prompt_length,
        steps=state.length - prompt_length,
        sequences_scores=flat.scores,
        sum_log_probs=flat.log_probs,
        beam_indices=flat.origins,
        scores=state.scores,
        logits=state.logits,
        cache=state.cache if return_cache else None,
    )


def _expand(
    setup: Search, state: BeamState, logits: Float[Array, "rows vocab"]
) -> tuple[BeamState, Hypotheses, Bool[Array, "batch candidates"]]:
    """The best continuations of the running beams by one token, best first, and which of them are finished.

    Of $K V$ continuations, $K (1 + E)$ are enough to find $K$ unfinished ones, with $E$ end-of-sequence tokens.
    """
    config, length, running = setup.config, state.length, state.running
    rows, vocabulary = logits.shape
    beams, index = config.num_beams, length - setup.prompt_length
    batch = rows // beams
    candidates = min(max(2, 1 + len(config.eos_token_ids)) * beams, beams * vocabulary)

    chain = (*setup.constraints(beams), *processors.warpers_from_config(config, setup.temperature))
    flat = running.tokens.reshape(rows, -1)
    if config.patience is None:  # `transformers` processes log-probabilities, and does not normalise them again
        scores = processors.apply(chain, jax.nn.log_softmax(logits, axis=-1), flat, length)
    else:  # OpenAI processes logits
        scores = jax.nn.log_softmax(processors.apply(chain, logits, flat, length), axis=-1)
    accumulated = scores.reshape(batch, beams, vocabulary) + running.log_probs[..., None]
    if config.do_sample:
        # Gumbel top-k: a sample without replacement (Kool et al., 2019, arXiv:1903.06059).
        long = accumulated.reshape(batch, -1)
        noisy = long + setup.gumbel(state.keys, index, long)
        beam, token = _top(noisy.reshape(accumulated.shape), candidates)
    else:
        beam, token = _top(accumulated, candidates)
    log_probs = accumulated[jnp.arange(batch)[:, None], beam, token]

    found = dataclasses.replace(running.take(beam), log_probs=log_probs)
    origin = (beam + beams * jnp.arange(batch)[:, None]).astype(jnp.int32)
    tokens = lax.dynamic_update_slice_in_dim(found.tokens, token[..., None], length, axis=2)
    origins = lax.dynamic_update_slice_in_dim(found.origins, origin[..., None], index, axis=2)
    found = dataclasses.replace(found, tokens=tokens, origins=origins)
    stopped = setup.stops(tokens.reshape(batch * candidates, -1), token.reshape(-1), length + 1)
    state = dataclasses.replace(
        state,
        length=length + 1,
        scores=record(state.scores, scores, index),
        logits=record(state.logits, logits, index),
    )
    return state, found, stopped.reshape(batch, candidates)


def _top(
    scores: Float[Array, "batch beams vocab"], count: int
) -> tuple[Int[Array, "batch count"], Int[Array, "batch count"]]:
    """Beam and token of the `count` best scores of each example, best first: the best of each beam, then of those."""
    batch, beams, vocabulary = scores.shape
    each = min(count, vocabulary)
    # One row a beam: on a CPU, XLA sorts a single long row where it selects from several.
    of_beam, tokens = lax.top_k(scores.reshape(batch * beams, vocabulary), each)
    _, best = lax.top_k(of_beam.reshape(batch, beams * each), count)
    token = jnp.take_along_axis(tokens.reshape(batch, beams * each), best, axis=1)
    return best // each, token.astype(jnp.int32)


class _Standard:
    """The search of `transformers`."""

    def __init__(self, setup: Search) -> None:
        self.setup = setup
        self.pool = setup.config.num_beams

    def select(self, state: BeamState, found: Hypotheses, stopped: Bool[Array, "batch candidates"]) -> BeamState:
        """Choose the beams that go on, update the pool, and judge whether to go on at all."""
        setup, config = self.setup, self.setup.config
        beams, length = config.num_beams, state.length
        penalised = found.log_probs / self._penalty(length - setup.prompt_length, found.log_probs.dtype)

        # The best unfinished continuations run on.
        log_probs = jnp.where(stopped, found.log_probs + _NEVER, found.log_probs)
        log_probs, chosen = lax.top_k(log_probs, beams)
        running = dataclasses.replace(found.take(chosen), log_probs=log_probs)

        # Of the finished ones, only the first K candidates may enter the pool: the others are there as a reserve.
        enters = stopped & (jnp.arange(stopped.shape[1]) < beams)
        full = jnp.all(state.done.finished, axis=1) & (config.early_stopping is True)
        closed = full | ~state.improvable
        scores = penalised + _NEVER * (~enters) + _NEVER * closed[:, None]
        merged = state.done.join(dataclasses.replace(found, scores=scores, finished=enters))
        done = merged.take(lax.top_k(merged.scores, beams)[1])

        # Could the best running beam still beat the worst of the pool?
        hopeful = setup.max_length if config.early_stopping == "never" and config.length_penalty > 0 else length
        best = running.log_probs[:, :1] / self._penalty(hopeful - setup.prompt_length, running.log_probs.dtype)
        worst = jnp.where(done.finished, jnp.min(done.scores, axis=1, keepdims=True), _NEVER)
        improvable = state.improvable & jnp.any(best > worst, axis=1)

        all_full = jnp.all(done.finished) & (config.early_stopping is True)
        return dataclasses.replace(
            state,
            running=running,
            done=done,
            rows=last_origins(running, length - setup.prompt_length - 1),
            improvable=improvable,
            continuing=jnp.any(improvable) & ~all_full & ~jnp.all(stopped),
        )

    def result(self, state: BeamState) -> Hypotheses:
        """The pool, best first."""
        return state.done

    def _penalty(self, generated: int | Array, dtype: Any) -> Array:
        return jnp.asarray(generated, dtype) ** self.setup.config.length_penalty


class _Patient:
    """The search of Kasai et al. and of OpenAI's Whisper."""

    def __init__(self, setup: Search) -> None:
        self.setup = setup
        self.pool = max(setup.config.max_candidates, setup.config.num_beams)

    def select(self, state: BeamState, found: Hypotheses, stopped: Bool[Array, "batch candidates"]) -> BeamState:
        """Choose the beams that go on, and collect the hypotheses that finished before them."""
        setup, config = self.setup, self.setup.config
        beams, length = config.num_beams, state.length
        index = length - setup.prompt_length - 1
        # At the last index every candidate has stopped, but only an end-of-sequence token finishes one.
        out_of_room = length >= setup.max_length
        ended = processors.is_one_of(_token_at(found.tokens, length - 1), config.eos_token_ids)
        ended = jnp.where(out_of_room, ended, stopped)

        # Walk down the candidates until K of them go on; those met on the way that have ended are finished.
        going_on = jnp.cumsum(~ended, axis=1)
        finishing = ended & (going_on < beams)
        order = jnp.argsort(ended, axis=1, stable=True)[:, :beams]
        running = found.take(order)

        # First come, first served: a full pool takes no more.
        count = jnp.sum(state.done.finished, axis=1, keepdims=True)
        slot = count + jnp.cumsum(finishing, axis=1) - 1
        slot = jnp.where(finishing & (slot < config.max_candidates), slot, self.pool)
        generated = jnp.maximum(length - setup.prompt_length - 1, 1)  # end-of-sequence does not count
        scores = found.log_probs / jnp.asarray(generated, found.log_probs.dtype) ** config.length_penalty
        entering = dataclasses.replace(found, scores=scores, finished=finishing)
        done = _put(state.done, slot, entering)
        complete = jnp.sum(done.finished, axis=1) >= config.max_candidates
        return dataclasses.replace(
            state,
            running=running,
            done=done,
            rows=last_origins(running, index),
            continuing=~jnp.all(complete) & ~out_of_room,
        )

    def result(self, state: BeamState) -> Hypotheses:
        """The pool, filled up to K from the running beams, best first by penalised log-probability."""
        setup, config, running = self.setup, self.setup.config, state.running
        generated = jnp.maximum(state.length - setup.prompt_length, 1)
        scores = running.log_probs / jnp.asarray(generated, running.log_probs.dtype) ** config.length_penalty
        count = jnp.sum(state.done.finished, axis=1, keepdims=True)
        slot = count + jnp.arange(config.num_beams)  # running beams are sorted by log-probability
        slot = jnp.where(slot < config.num_beams, slot, self.pool)
        pool = _put(state.done, slot, dataclasses.replace(running, scores=scores))
        return pool.take(jnp.argsort(-pool.scores, axis=1, stable=True))


def last_origins(running: Hypotheses, index: Int[Array, ""]) -> Int[Array, " rows"]:
    """For each running beam, the row that its last token continued."""
    return _token_at(running.origins, index).reshape(-1)


def _token_at(tokens: Int[Array, "batch beams size"], index: Int[Array, ""]) -> Int[Array, "batch beams"]:
    return lax.dynamic_index_in_dim(tokens, index, axis=2, keepdims=False)


def _put(pool: Hypotheses, slots: Int[Array, "batch chosen"], entering: Hypotheses) -> Hypotheses:
    """Write hypotheses into slots of the pool; a slot past its end drops them."""
    example = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(lambda x, y: x.at[example, slots].set(y, mode="drop"), pool, entering)
