"""What a user may ask of `generate`: the names and defaults of `transformers.GenerationConfig`."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from audiozoo.errors import UsageError, check_names

# What `transformers` has beside them, and why it is refused here.
_REFUSED = {
    "max_time": "a search is one compiled loop, which sees no clock; max_new_tokens limits it",
    "stop_strings": "a search sees tokens and no text; cut the text, or give the token as eos_token_id",
    "guidance_scale": "it needs a model that was trained without its condition too, which only MusicGen was",
    "prompt_lookup_num_tokens": "it needs a model that checks several tokens at once, as Whisper's generate does",
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of autoregressive decoding; frozen and hashable, so that it can be a static argument of `jax.jit`.

    Names and defaults are those of `transformers` 5. Lists are stored as tuples. An unknown name raises
    `UsageError` with the nearest known one; what is left out on purpose raises it with the reason: a clock
    (`max_time`) has no place in a compiled loop, and texts (`stop_strings`) none in a search that knows no tokenizer,
    for recognisers and translators, which end their texts themselves.
    """

    # Length, in tokens. Without `max_new_tokens` and `max_length`, twenty new tokens, as in `transformers`.
    max_new_tokens: int | None = None  # at most so many after the prompt; wins over max_length
    max_length: int | None = None  # prompt included
    min_new_tokens: int | None = None  # end-of-sequence is forbidden before; wins over min_length
    min_length: int = 0  # prompt included

    # Search.
    do_sample: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0  # beams: log-probability / (generated length) ** length_penalty
    early_stopping: bool | Literal["never"] = False  # beams: True stops at num_beams finished ones
    # Not in `transformers`: choose the beam search of Kasai et al. (2022, arXiv:2204.05424), as OpenAI's Whisper runs
    # it, which ends when round(num_beams * patience) hypotheses are finished. None is the search of `transformers`.
    patience: float | None = None

    # Distribution (sampling only).
    temperature: float = 1.0
    top_k: int | None = 50  # 0 or None: off
    top_p: float | None = 1.0
    min_p: float | None = None
    typical_p: float | None = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0

    # Constraints.
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None  # forbidden as the first new token
    forced_bos_token_id: int | None = None  # the token at index 1
    forced_eos_token_id: int | tuple[int, ...] | None = None  # the token at index max_length - 1
    forced_decoder_ids: tuple[tuple[int, int], ...] | None = None  # (index, token) pairs
    exponential_decay_length_penalty: tuple[int, float] | None = None  # (start, factor)
    remove_invalid_values: bool = False  # nan -> 0, inf -> largest finite number
    renormalize_logits: bool = False

    # Special tokens.
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    decoder_start_token_id: int | None = None

    # What to return.
    output_scores: bool = False  # processed scores of every step, (steps, rows, vocabulary)
    output_logits: bool = False  # the model's own, likewise
    output_log_probs: bool = False  # log-probability of every chosen token; not in `transformers`
    return_dict_in_generate: bool = False  # for the model's `generate`; the engine always returns a `GenerateOutput`

    def __new__(cls, *args: Any, **options: Any) -> GenerationConfig:
        """Refuse unknown options before the dataclass does, with a sentence instead of a `TypeError`."""
        _check_names(options)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _freeze(getattr(self, field.name))
            # As in `transformers`, None asks for the default, where it has no meaning of its own.
            absent = value is None and "None" not in str(field.type)
            object.__setattr__(self, field.name, field.default if absent else value)
        self._check_values()

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], *, strict: bool = True) -> GenerationConfig:
        """From a mapping such as a `generation_config.json`.

        Args:
            options: names and values; a value of None means the default.
            strict: whether an unknown name is an error; False drops what is not known (a checkpoint's file also holds
                model-specific entries such as `lang_to_id`).
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if strict:
            _check_names(options)
        return cls(**{name: value for name, value in options.items() if name in known and value is not None})

    @classmethod
    def over(cls, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> GenerationConfig:
        """A caller's options over a checkpoint's; the `max_length` of a caller is also before its `max_new_tokens`."""
        longest = {} if options.get("max_length") is None else {"max_new_tokens": None}
        return cls(**{**defaults, **longest, **options})

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with some options changed; what a user passes to a model's `generate`."""
        _check_names(options)
        return dataclasses.replace(self, **options)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence tokens, possibly none."""
        return _as_tuple(self.eos_token_id)

    @property
    def fill_token_id(self) -> int:
        """The token that follows a finished sequence: padding, else the first end-of-sequence token, else 0."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.eos_token_ids[0] if self.eos_token_ids else 0

    def new_tokens(self, prompt_length: int) -> int:
        """The largest number of tokens to generate after a prompt of `prompt_length` tokens.

        Raises:
            UsageError: if `max_length` leaves no room after the prompt.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return 20
        if self.max_length <= prompt_length:
            raise UsageError(
                f"The prompt has {prompt_length} tokens and max_length is {self.max_length}: nothing is left to "
                "generate. Raise max_length, or give max_new_tokens."
            )
        return self.max_length - prompt_length

    def _check_values(self) -> None:
        def require(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise UsageError(f"Generation option {name}={getattr(self, name)!r} must be {wanted}.")

        for field in dataclasses.fields(self):
            wanted = _WANTED[str(field.type).removesuffix(" | None")]
            require(_is_a(getattr(self, field.name), _KINDS[field.name]), field.name, wanted)
        require(() not in (self.bad_words_ids or ()), "bad_words_ids", "without an empty list")
        require(() not in [words for words, _ in self.sequence_bias or ()], "sequence_bias", "without an empty list")
        require(math.isfinite(self.length_penalty), "length_penalty", "a finite number")
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, "at least 1")
        for name in ("num_beams", "num_return_sequences"):
            require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"):
            require(getattr(self, name) >= 0, name, "0 or more")
        require(self.min_new_tokens is None or self.min_new_tokens >= 0, "min_new_tokens", "0 or more")
        require(self.top_k is None or self.top_k >= 0, "top_k", "0 or more")
        for name in ("temperature", "repetition_penalty", "encoder_repetition_penalty"):
            require(getattr(self, name) > 0, name, "greater than 0 (for greedy decoding set do_sample=False)")
        for name in ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, name, "between 0 and 1")
        require(self.typical_p is None or self.typical_p > 0, "typical_p", "greater than 0")
        require(self.patience is None or 0 < self.patience < math.inf, "patience", "greater than 0, and finite")
        require(
            self.patience is None or (self.num_beams > 1 and not self.do_sample),
            "patience",
            "used with num_beams > 1 and do_sample=False",
        )
        returnable = self.num_beams if self.patience is None else max(self.num_beams, self.max_candidates)
        if self.num_beams > 1:
            require(self.num_return_sequences <= returnable, "num_return_sequences", f"at most {returnable}")
        elif not self.do_sample:
            require(self.num_return_sequences == 1, "num_return_sequences", "1, unless do_sample=True or num_beams > 1")

    @property
    def max_candidates(self) -> int:
        """How many finished hypotheses an example needs: round(num_beams * patience)."""
        return max(1, round(self.num_beams * (1.0 if self.patience is None else self.patience)))


_KINDS = typing.get_type_hints(GenerationConfig)
# What an option of a type must be, for messages.
_WANTED = {
    "bool": "True or False",
    "bool | Literal['never']": 'True, False or "never"',
    "int": "a whole number",
    "float": "a number",
    "int | tuple[int, ...]": "a token id, or a list of them",
    "tuple[int, ...]": "a list of token ids",
    "tuple[tuple[int, ...], ...]": "a list of lists of token ids",
    "tuple[tuple[tuple[int, ...], float], ...]": "pairs of a list of token ids and a number",
    "tuple[tuple[int, int], ...]": "pairs of an index and a token id",
    "tuple[int, float]": "a pair of a whole number and a factor",
}


def _is_a(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type; a whole number is a number, and True is none."""
    origin, of = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, one) for one in of)
    if origin is Literal:
        return type(value) is str and value in of
    if origin is tuple:
        items = value if isinstance(value, tuple) else (None,)
        of = of[:1] * len(items) if of[-1] is ... else of
        return len(items) == len(of) and all(map(_is_a, items, of))
    return type(value) in (int, float) if kind is float else type(value) is kind


def _check_names(options: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in options:
        if name in _REFUSED:
            raise UsageError(f"Generation option {name!r} is not offered here: {_REFUSED[name]}.")
    check_names(options, known, "Unknown generation option '{}'")


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):  # sequence_bias may come as {tokens: bias}
        return tuple((_freeze(key), _freeze(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    return _freeze(value.tolist()) if hasattr(value, "tolist") else value


def _as_tuple(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)
