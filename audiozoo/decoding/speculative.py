r"""Speculative decoding: a small model drafts, the large one checks all drafted tokens in one pass.

Leviathan et al. (2023, arXiv:2211.17192), Algorithm 1 in its greedy case, which `transformers` calls assisted
generation: the draft's tokens are kept up to the first that the target would not have chosen, and the target's own
choice follows them. The result is therefore the target's greedy result, whatever the draft does; the draft decides only
how fast.

Both models are steps over *several* tokens a row:

    step(tokens Int[B, L], cache, position Int[]) -> (logits Float[B, L, V], cache)

feeds the tokens at `position … position + L - 1`, writes their keys and values to these slots, lets token $i$ attend to
slots up to its own, and returns the logits after each. Rejected tokens are undone by moving the position back: slots at
or after it are never attended to and are overwritten later, so nothing is copied.

Without a draft model the text itself drafts (**prompt lookup**, Saxena, 2023): where the last few tokens stood before,
what followed them then is the guess. That helps where a text repeats itself or its prompt.

In a batch all rows advance together, by the smallest number of accepted tokens among the unfinished rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from audiozoo.decoding import cache as caches
from audiozoo.decoding import processors
from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import GenerateOutput, Search, argmax
from audiozoo.decoding.processors import LogitsProcessor
from audiozoo.errors import UsageError
from audiozoo.layers.basic import at_least_float32

MultiStep: TypeAlias = Callable[
    [Int[Array, "batch fed"], Any, Int[Array, ""]], tuple[Float[Array, "batch fed vocab"], Any]
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AssistedOutput(GenerateOutput):
    """The target's greedy result, and how it was reached.

    Attributes:
        rounds: how often the target ran after the prompt.
        accepted: how many drafted tokens were kept.
    """

    rounds: Int[Array, ""] | None = None
    accepted: Int[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    target: Any
    draft: Any
    tokens: Int[Array, "batch buffer"]
    length: Int[Array, ""]
    finished: Bool[Array, " batch"]
    lengths: Int[Array, " batch"]
    rounds: Int[Array, ""]
    accepted: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class _Greedy:
    """Which token greedy search takes, and when a row ends: by the rules of a `Search` that never runs."""

    search: Search
    constraints: tuple[LogitsProcessor, ...]

    def choose(
        self, logits: Float[Array, "batch vocab"], tokens: Int[Array, "batch buffer"], length: Int[Array, ""]
    ) -> Int[Array, " batch"]:
        """What follows the first `length` tokens."""
        logits = at_least_float32(logits)
        return argmax(processors.apply(self.constraints, logits, tokens, length))

    def commit(self, state: _State, chosen: Int[Array, " batch"]) -> _State:
        """Append one token to every unfinished row."""
        token = jnp.where(state.finished, self.search.config.fill_token_id, chosen)
        tokens = _append(state.tokens, token, state.length)
        length = state.length + 1
        return dataclasses.replace(
            state,
            tokens=tokens,
            length=length,
            finished=state.finished | self.search.stops(tokens, token, length),
            lengths=jnp.where(state.finished, state.lengths, length),
        )


def _never(*_: Any) -> Any:
    raise AssertionError("the search is used for its rules only")


def _append(
    tokens: Int[Array, "batch buffer"], chosen: Int[Array, " batch"], length: Int[Array, ""]
) -> Int[Array, "batch buffer"]:
    return lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], length, axis=1)


def _look_up(
    tokens: Int[Array, "batch buffer"], length: Int[Array, ""], drafted: int, longest: int
) -> Int[Array, "batch buffer"]:
    """Draft what followed the first occurrence of the last tokens: of as many, up to `longest`, as have one."""
    batch = tokens.shape[0]
    follows = jnp.zeros(batch, jnp.int32)  # without an occurrence any guess will do
    for size in range(1, longest + 1):
        starts = tokens.shape[1] - size
        occurs = jnp.broadcast_to(jnp.arange(starts) + size < length, (batch, starts))
        for offset in range(size):
            last = lax.dynamic_slice_in_dim(tokens, length - size + offset, 1, axis=1)
            occurs &= tokens[:, offset : offset + starts] == last
        follows = jnp.where(jnp.any(occurs, axis=1), jnp.argmax(occurs, axis=1) + size, follows)
    guess = jnp.take_along_axis(tokens, follows[:, None] + jnp.arange(drafted), axis=1, mode="clip")
    return lax.dynamic_update_slice_in_dim(tokens, guess, length, axis=1)


def _ask(
    draft_step: MultiStep,
    greedy: _Greedy,
    cache: Any,
    tokens: Int[Array, "batch buffer"],
    length: Int[Array, ""],
    drafted: int,
) -> tuple[Int[Array, "batch buffer"], Any]:
    """Draft by the draft model's greedy search.

    If all of the last draft was accepted, the draft has not yet been fed the last but one token; feeding two tokens
    first covers both cases and writes again what was there in the other.
    """

    def draft(carry: tuple[Array, Array, Any, Array]) -> tuple[Array, Array, Any, Array]:
        index, tokens, cache, chosen = carry
        tokens = _append(tokens, chosen, length + index - 1)
        fed = lax.dynamic_slice_in_dim(tokens, length + index - 1, 1, axis=1)
        logits, cache = draft_step(fed, cache, length + index - 1)
        return index + 1, tokens, cache, greedy.choose(logits[:, -1], tokens, length + index)

    two = lax.dynamic_slice_in_dim(tokens, length - 2, 2, axis=1)
    logits, cache = draft_step(two, cache, length - 2)
    drafting = (jnp.int32(1), tokens, cache, greedy.choose(logits[:, -1], tokens, length))
    _, tokens, cache, last = caches.while_loop(lambda carry: carry[0] < drafted, draft, drafting)
    return _append(tokens, last, length + drafted - 1), cache


def _check(
    target_step: MultiStep, greedy: _Greedy, state: _State, tokens: Int[Array, "batch buffer"], drafted: int
) -> tuple[Int[Array, "batch choices"], Int[Array, ""], Any]:
    """The target sees the last token and the draft: its own choice after each, how many drafted stand, its cache."""
    length = state.length
    fed = lax.dynamic_slice_in_dim(tokens, length - 1, drafted + 1, axis=1)
    logits, cache = target_step(fed, state.target, length - 1)
    own = jnp.stack([greedy.choose(logits[:, i], tokens, length + i) for i in range(drafted + 1)], axis=1)
    agree = jnp.cumsum(own[:, :-1] != fed[:, 1:], axis=1) == 0
    matches = jnp.where(state.finished, drafted, jnp.sum(agree, axis=1))
    return own, jnp.min(matches).astype(jnp.int32), cache


def _keep(greedy: _Greedy, state: _State, own: Int[Array, "batch choices"], agreed: Int[Array, ""]) -> _State:
    """Keep the agreed tokens and one more, unless the rows end before."""
    length = state.length

    def keep_one(state: _State) -> _State:
        return greedy.commit(state, lax.dynamic_index_in_dim(own, state.length - length, axis=1, keepdims=False))

    def going(state: _State) -> Array:
        return (state.length <= length + agreed) & ~jnp.all(state.finished)

    kept = caches.while_loop(going, keep_one, state)
    accepted = state.accepted + jnp.minimum(kept.length - length, agreed)
    return dataclasses.replace(kept, rounds=state.rounds + 1, accepted=accepted)


def assisted_generate(
    target_step: MultiStep,
    draft_step: MultiStep | None,
    target_cache: Any,
    draft_cache: Any,
    prompt: Int[Array, "batch prompt"],
    config: GenerationConfig,
    *,
    num_assistant_tokens: int = 5,
    max_matching_ngram_size: int = 2,
    logits_processors: Sequence[LogitsProcessor] = (),
    max_new_tokens: int | Int[Array, ""] | None = None,
) -> AssistedOutput:
    """Greedy search with `target_step`, sped up by `draft_step`; traceable, in one loop.

    Args:
        target_step: the model whose tokens are wanted.
        draft_step: a cheaper model over the same vocabulary; None for prompt lookup.
        target_cache: the target's cache, with `num_assistant_tokens` slots more than prompt and new tokens.
        draft_cache: likewise; None for prompt lookup.
        prompt: the tokens to continue.
        config: the options; those of greedy search.
        num_assistant_tokens: how many tokens are drafted at a time.
        max_matching_ngram_size: how many of the last tokens prompt lookup looks for, at most.
        logits_processors: as for `generate`; they apply to draft and target alike.
        max_new_tokens: a traced limit, at most that of `config`.

    Raises:
        UsageError: for sampling, beams or requests for scores.
    """
    _refuse_all_but_greedy(config, num_assistant_tokens, max_matching_ngram_size)
    drafted, prompt = num_assistant_tokens, prompt.astype(jnp.int32)
    batch, prompt_length = prompt.shape
    search = Search(
        _never, config, prompt_length, logits_processors=tuple(logits_processors), max_new_tokens=max_new_tokens
    )
    greedy, room = _Greedy(search, search.constraints(1)), prompt_length + search.buffer_new

    # The prompt, through both models; the target chooses the first token.
    zero = jnp.zeros((), jnp.int32)
    logits, target_cache = target_step(prompt, target_cache, zero)
    if draft_step is not None:
        _, draft_cache = draft_step(prompt, draft_cache, zero)
    buffer = jnp.full((batch, room + drafted), config.fill_token_id, jnp.int32)
    state = _State(
        target=target_cache,
        draft=draft_cache,
        tokens=lax.dynamic_update_slice(buffer, prompt, (0, 0)),
        length=jnp.asarray(prompt_length, jnp.int32),
        finished=jnp.zeros(batch, bool),
        lengths=jnp.full(batch, prompt_length, jnp.int32),
        rounds=zero,
        accepted=zero,
    )
    state = greedy.commit(state, greedy.choose(logits[:, -1], state.tokens, state.length))

    def speculate(state: _State) -> _State:
        if draft_step is None:
            tokens, draft = _look_up(state.tokens, state.length, drafted, max_matching_ngram_size), state.draft
        else:
            tokens, draft = _ask(draft_step, greedy, state.draft, state.tokens, state.length, drafted)
        own, agreed, target = _check(target_step, greedy, state, tokens, drafted)
        return _keep(greedy, dataclasses.replace(state, target=target, draft=draft), own, agreed)

    state = caches.while_loop(lambda state: ~jnp.all(state.finished), speculate, state)
    # Drafted tokens that were never committed may stand behind the end.
    behind = jnp.arange(state.tokens.shape[1]) >= state.length
    return AssistedOutput(
        sequences=jnp.where(behind, config.fill_token_id, state.tokens)[:, :room],
        lengths=state.lengths,
        prompt_length=prompt_length,
        steps=state.length - prompt_length,
        rounds=state.rounds,
        accepted=state.accepted,
    )


def _refuse_all_but_greedy(config: GenerationConfig, num_assistant_tokens: int, max_matching_ngram_size: int) -> None:
    for name in ("do_sample", "output_scores", "output_logits", "output_log_probs"):
        if getattr(config, name):
            raise UsageError(f"Speculative decoding is greedy and returns tokens only; {name} must be False.")
    if config.num_beams > 1:
        raise UsageError(f"Speculative decoding is greedy; num_beams={config.num_beams} must be 1.")
    if num_assistant_tokens < 1:
        raise UsageError(f"num_assistant_tokens={num_assistant_tokens} must be at least 1.")
    if max_matching_ngram_size < 1:
        raise UsageError(f"max_matching_ngram_size={max_matching_ngram_size} must be at least 1.")
