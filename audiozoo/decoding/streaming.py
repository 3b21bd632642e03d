"""The engine as a user of a model meets it: compiled once, called often, or read token by token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from audiozoo.decoding.config import GenerationConfig
from audiozoo.decoding.generate import GenerateOutput, Search, SearchState, StoppingCriterion, Streamer, generate
from audiozoo.decoding.processors import LogitsProcessor
from audiozoo.errors import UsageError

BUCKET = 64  # new tokens; buffers are rounded up to a multiple of this


def bucketed(config: GenerationConfig, prompt_length: int, limit: int | None = None) -> tuple[GenerationConfig, int]:
    """Split `config` into one for the compiler and the number of new tokens that is really wanted.

    Args:
        config: the options.
        prompt_length: tokens of the prompt.
        limit: tokens that the model can hold in all (its position table), if that is limited.

    Returns:
        The options with their length rounded up to a bucket, which many lengths share, and the number of new tokens.
    """
    wanted = config.new_tokens(prompt_length)
    rounded = -(-wanted // BUCKET) * BUCKET
    if limit is not None:
        if prompt_length + wanted > limit:
            raise UsageError(
                f"The prompt has {prompt_length} tokens and {wanted} more are asked for, but the model holds {limit}. "
                "Lower max_new_tokens or max_length, or shorten the prompt."
            )
        rounded = min(rounded, limit - prompt_length)
    return config.replace(max_new_tokens=rounded, max_length=None), wanted


class Generator:
    """A model's generation, compiled: one program for all lengths of a bucket and for all temperatures.

    The functions get the model's state as their first argument, so that parameters are never constants of the program:

        start(state, inputs, rows, length) -> cache       for `rows` examples, `length` slots; runs the encoder, if any
        prefill(state, prompt, cache)      -> (logits, cache)
        step(state, tokens, cache, position) -> (logits, cache)

    Processors, stopping rules and streamers are static: pass the same (hashable) objects to use the same program.

    Attributes:
        compilations: how many programs have been traced and compiled so far.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        start: Callable[..., Any],
        prefill: Callable[..., Any] | None = None,
        *,
        limit: int | None = None,
    ) -> None:
        self.limit = limit
        self.compilations = 0
        static = ("config", "logits_processors", "stopping")

        def setup(state: Any, prompt: Array, config: GenerationConfig, **options: Any) -> Search:
            return Search(functools.partial(step, state), config, prompt.shape[1], prefill=bind(state), **options)

        def bind(state: Any) -> Callable[..., Any] | None:
            return None if prefill is None else functools.partial(prefill, state)

        def cache_for(state: Any, inputs: Any, prompt: Array, config: GenerationConfig) -> Any:
            return start(state, inputs, prompt.shape[0], prompt.shape[1] + config.new_tokens(prompt.shape[1]))

        def run(state: Any, inputs: Any, prompt: Array, config: GenerationConfig, key: Any, **options: Any) -> Any:
            self.compilations += 1  # this line runs when JAX traces the function, and not when it calls the program
            cache = cache_for(state, inputs, prompt, config)
            bound = functools.partial(step, state)
            return generate(bound, cache, prompt, config, key=key, prefill=bind(state), **options)

        def begin(state: Any, inputs: Any, prompt: Array, config: GenerationConfig, key: Any, **options: Any) -> Any:
            self.compilations += 1
            cache = cache_for(state, inputs, prompt, config)
            return setup(state, prompt, config, **options).start(cache, prompt, key)

        def advance(
            state: Any, prompt: Array, config: GenerationConfig, search: SearchState, until: Array, **options: Any
        ) -> SearchState:
            self.compilations += 1
            return setup(state, prompt, config, **options).advance(search, until)

        self._run = jax.jit(run, static_argnames=(*static, "streamer", "return_cache"))
        self._begin = jax.jit(begin, static_argnames=static)
        self._advance = jax.jit(advance, static_argnames=static, donate_argnames="search")

    def __call__(
        self,
        state: Any,
        inputs: Any,
        prompt: Int[Array, "batch prompt"],
        config: GenerationConfig,
        *,
        prompt_mask: Bool[Array, "batch prompt"] | None = None,
        key: Array | None = None,
        noise: Float[Array, "new rows vocab"] | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingCriterion] = (),
        streamer: Streamer | None = None,
        return_cache: bool = False,
    ) -> GenerateOutput:
        """Generate after `prompt`, in one dispatch; `generate` describes the arguments."""
        prompt = jnp.asarray(prompt)
        static, wanted, temperature = self._prepare(config, prompt)
        return self._run(
            state,
            inputs,
            prompt,
            static,
            key,
            prompt_mask=prompt_mask,
            noise=noise,
            max_new_tokens=wanted,
            temperature=temperature,
            logits_processors=tuple(logits_processors),
            stopping=tuple(stopping),
            streamer=streamer,
            return_cache=return_cache,
        )

    def stream(
        self,
        state: Any,
        inputs: Any,
        prompt: Int[Array, "batch prompt"],
        config: GenerationConfig,
        *,
        every: int = 1,
        prompt_mask: Bool[Array, "batch prompt"] | None = None,
        key: Array | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        stopping: Sequence[StoppingCriterion] = (),
    ) -> Iterator[np.ndarray]:
        """Yield new tokens `(rows, n)` as they are found, `every` steps at a time; concatenated, what `__call__` finds.

        Between two yields nothing runs: a reader who stops reading stops the model.
        """
        if config.num_beams > 1:
            raise UsageError("stream needs num_beams=1: beam search knows its tokens only at the end.")
        if every < 1:
            raise UsageError(f"every={every} must be at least 1.")
        prompt = jnp.asarray(prompt)
        static, wanted, temperature = self._prepare(config, prompt)
        options: dict[str, Any] = {
            "prompt_mask": prompt_mask,
            "max_new_tokens": wanted,
            "temperature": temperature,
            "logits_processors": tuple(logits_processors),
            "stopping": tuple(stopping),
        }
        search = self._begin(state, inputs, prompt, static, key, **options)
        seen = prompt.shape[1]
        while True:
            if not (done := bool(np.all(search.finished))) and int(search.length) - seen < every:
                search = self._advance(state, prompt, static, search, jnp.asarray(seen + every, jnp.int32), **options)
                done = bool(np.all(search.finished))
            length = int(search.length)
            yield np.asarray(search.tokens[:, seen:length])
            if done:
                return
            seen = length

    def _prepare(self, config: GenerationConfig, prompt: Array) -> tuple[GenerationConfig, Array, Array | None]:
        static, wanted = bucketed(config, prompt.shape[1], self.limit)
        temperature = None
        if config.do_sample:
            temperature, static = jnp.asarray(config.temperature, jnp.float32), static.replace(temperature=1.0)
        return static, jnp.asarray(wanted, jnp.int32), temperature
