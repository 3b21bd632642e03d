r"""Connectionist temporal classification (Graves et al., ICML 2006), from scores of letters to text and back.

- `greedy`: the best letter of each frame, repeats and blanks removed.
- `BeamSearch`: prefix beam search (Hannun et al., arXiv 1408.2873, Algorithm 1) with an n-gram language model
  (`NgramModel`, ARPA files), hot words, and a lexicon.
- `forced_alignment`: when a known text is said, by Viterbi's algorithm, for a batch, on any device.
- `chunked_logits`: a recording of any length in overlapping pieces whose edges are thrown away.
- `transcribe_ctc`, `align`: the whole way, for a model and a processor.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from audiozoo.audio.speech import spoken_samples
from audiozoo.decoding.encoders import alone, first_heard, in_pieces, in_steps, rounded, without_padding
from audiozoo.decoding.pieces import SHORTEST
from audiozoo.errors import SourceError, UsageError
from audiozoo.layers.losses import LOG_ZERO

STAR = "<star>"


@dataclass(frozen=True)
class Span:
    """A stretch of frames that belongs to one token or word.

    Attributes:
        text: the token or word; a token's index where there is no vocabulary.
        start: first frame.
        end: frame after the last.
        score: mean probability of the frames' tokens; 1 where it was not computed.
    """

    text: Any
    start: int
    end: int
    score: float = 1.0

    def seconds(self, frame_seconds: float) -> dict[str, Any]:
        """The span in seconds, as a dictionary for JSON."""
        return {
            "text": self.text,
            "start": round(self.start * frame_seconds, 3),
            "end": round(self.end * frame_seconds, 3),
            "score": round(float(self.score), 4),
        }


# --- greedy ----------------------------------------------------------------------------------------------------------


def collapse(path: Sequence[int], blank: int = 0) -> list[Span]:
    r"""The map $\mathcal B$ of the paper (§3.1): repeats become one, blanks go; every token with its frames."""
    spans: list[Span] = []
    start = 0
    for frame in range(1, len(path) + 1):
        if frame == len(path) or path[frame] != path[start]:
            if path[start] != blank:
                spans.append(Span(int(path[start]), start, frame))
            start = frame
    return spans


def greedy(
    logits: Float[np.ndarray, "batch frames vocabulary"],
    lengths: Int[np.ndarray, " batch"] | None = None,
    blank: int = 0,
) -> list[list[Span]]:
    """The tokens of the most probable path of every item."""
    best = np.asarray(logits).argmax(axis=-1)
    counted = np.full(len(best), best.shape[1]) if lengths is None else lengths
    return [collapse(row[: int(length)], blank) for row, length in zip(best, counted, strict=True)]


def words_of(tokens: Sequence[Span], delimiter: Any, join: Callable[[list[Any]], str] = "".join) -> list[Span]:
    """Tokens between delimiters as words, from their first token's start to their last one's end."""
    words: list[Span] = []
    group: list[Span] = []
    for token in [*tokens, Span(delimiter, 0, 0)]:
        if token.text != delimiter:
            group.append(token)
        elif group:
            frames = sum(t.end - t.start for t in group)
            score = sum(t.score * (t.end - t.start) for t in group) / frames
            words.append(Span(join([t.text for t in group]), group[0].start, group[-1].end, score))
            group = []
    return words


# --- n-gram language models ------------------------------------------------------------------------------------------


def _case(words: Iterable[str]) -> Callable[[str], str] | None:
    """The case of letters that all the words have in common, if there is one and it is a case at all."""
    cased = [word for word in words if word.upper() != word.lower()]
    for case in (str.upper, str.lower):
        if cased and all(case(word) == word for word in cased):
            return case
    return None


class NgramModel:
    r"""A back-off n-gram model (Katz 1987) from an ARPA file.

    $$p(w \mid h) = \begin{cases} p^*(w \mid h) & \text{if } hw \text{ was seen} \\ b(h)\, p(w \mid h') &
    \text{otherwise, } h' = h \text{ without its first word} \end{cases}$$

    Attributes:
        order: the longest n-gram.
        case: `str.upper` or `str.lower`, if its words are all in capitals or all in small letters.
    """

    def __init__(self, ngrams: Mapping[tuple[str, ...], tuple[float, float]]):
        """From `{n-gram: (log10 probability, log10 back-off weight)}`."""
        self._ngrams = dict(ngrams)
        self.order = max((len(n) for n in self._ngrams), default=0)
        if not self.order:
            raise SourceError("The language model holds no n-gram.")
        self.case = _case(n[0] for n in self._ngrams if len(n) == 1 and not n[0].startswith("<"))

    @classmethod
    def from_arpa(cls, source: str | os.PathLike[str] | Iterable[str]) -> NgramModel:
        """Read an ARPA file, which may be compressed with gzip, or its lines.

        Raises:
            SourceError: if there is no such file, or it is not in ARPA format.
        """
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if not path.is_file():
                raise SourceError(f"There is no language model {path}.")
            with path.open("rb") as file:
                opener = gzip.open if file.read(2) == b"\x1f\x8b" else open
            try:
                with opener(path, "rt", encoding="utf-8") as lines:
                    return cls(cls._parse(lines, str(path)))
            except UnicodeDecodeError:
                raise SourceError(f"{path} is not an ARPA file (binary models of KenLM are not read).") from None
        return cls(cls._parse(source, "The language model"))

    @staticmethod
    def _parse(lines: Iterable[str], where: str) -> dict[tuple[str, ...], tuple[float, float]]:
        ngrams: dict[tuple[str, ...], tuple[float, float]] = {}
        order = 0
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line in ("\\data\\", "\\end\\") or line.startswith("ngram "):
                continue
            if section := re.fullmatch(r"\\(\d+)-grams:", line):
                order = int(section[1])
                continue
            parts = line.split()
            try:
                if not order or len(parts) not in (order + 1, order + 2):
                    raise ValueError
                backoff = float(parts[order + 1]) if len(parts) == order + 2 else 0.0
                ngrams[tuple(parts[1 : order + 1])] = (float(parts[0]), backoff)
            except ValueError:
                raise SourceError(f"{where}: line {number} is not in ARPA format: {line[:60]!r}.") from None
        return ngrams

    def __contains__(self, word: str) -> bool:
        return (word,) in self._ngrams

    def start(self) -> tuple[str, ...]:
        """The history at the beginning of a sentence."""
        return ("<s>",)

    def score(self, history: tuple[str, ...], word: str) -> tuple[float, tuple[str, ...]]:
        r"""$\ln p(\text{word} \mid \text{history})$ and the next history; `-inf` for a word unknown to it."""
        if word not in self:
            word = "<unk>"
        context, backoff = history[-(self.order - 1) :] if self.order > 1 else (), 0.0
        following = (*history, word)[-(self.order - 1) :] if self.order > 1 else ()
        while True:
            found = self._ngrams.get((*context, word))
            if found is not None:
                return (found[0] + backoff) * math.log(10), following
            if not context:
                return -math.inf, following
            backoff += self._ngrams.get(context, (0.0, 0.0))[1]
            context = context[1:]


# --- prefix beam search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hypothesis:
    """One result of a beam search.

    Attributes:
        tokens: its tokens' indices.
        text: its tokens joined, delimiters as spaces.
        score: what hypotheses are ranked by: `logit_score` plus the language model's and hot words' shares.
        logit_score: log probability of the tokens, summed over all alignments that survived the beam.
        lm_score: weighted log probability of the words and word bonus.
        words: with a lexicon, which of its words the tokens spell.
    """

    tokens: tuple[int, ...]
    text: str
    score: float
    logit_score: float
    lm_score: float
    words: tuple[str, ...] = ()


@dataclass
class _Beam:
    blank: float = -math.inf  # log probability of the alignments that end in a blank
    token: float = -math.inf  # and of those that end in the last token

    @property
    def total(self) -> float:
        return _log_add(self.blank, self.token)


@dataclass(frozen=True)
class _Text:
    """What the language side knows of a prefix; the same for every beam that holds it."""

    history: tuple[str, ...]
    word: str  # letters since the last delimiter
    lm: float  # weighted scores of finished words
    bonus: float  # of finished hot words
    words: tuple[Any, ...] = ()  # finished, as the lexicon writes them: those before, and the last


@dataclass(frozen=True, eq=False, slots=True)
class _Prefix:
    """A sequence of tokens as its last one and those before, so that a long one costs no more than a short one.

    Its key is a polynomial of the tokens modulo a prime: equal for equal sequences, and for others with a chance of
    $2^{-127}$ a pair and token.
    """

    key: int = 1
    token: int | None = None
    before: _Prefix | None = None

    def followed_by(self, token: int) -> int:
        """The key of the sequence that is longer by a token."""
        return (self.key * 0x5DEECE66D2545F4914F6CDD1D + token + 1) % (2**127 - 1)

    def tokens(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(_unrolled(self, lambda p: (p.before, p.token) if p.before is not None else None))


_Beams = dict[int, tuple[_Prefix, _Beam, _Text]]  # by the prefix's key


def _unrolled(last: Any, step: Callable[[Any], tuple[Any, Any] | None]) -> list[Any]:
    """What hangs together from the last to the first, in order."""
    found = []
    while (pair := step(last)) is not None:
        last, item = pair
        found.append(item)
    return found[::-1]


def _log_add(a: float, b: float) -> float:
    if a < b:
        a, b = b, a
    return a if b == -math.inf else a + math.log1p(math.exp(b - a))


def read_lexicon(path: str | os.PathLike[str], delimiter: str = "|") -> dict[str, list[str]]:
    """Words by their spelling, from a file with a word and the tokens that spell it a line, as `abc a b c |`.

    Raises:
        SourceError: if there is no such file, or a line spells nothing.
    """
    found: dict[str, list[str]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SourceError(f"The lexicon {path} cannot be read as UTF-8 text.") from None
    for number, line in enumerate(lines, 1):
        word, *tokens = line.split() or [""]
        spelling = "".join(token for token in tokens if token != delimiter)
        if word and not spelling:
            raise SourceError(f"{path}: line {number} has no tokens behind {word!r}.")
        if word and word not in found.setdefault(spelling, []):
            found[spelling].append(word)
    if not found:
        raise SourceError(f"The lexicon {path} is empty.")
    return found


@dataclass
class BeamSearch:
    r"""Prefix beam search: the label sequence $l$ with the largest

    $$\ln p_\text{CTC}(l \mid x) + \alpha \ln p_\text{LM}(l) + \beta \lvert l \rvert_\text{words} + \text{hot words}$$

    (arXiv 1408.2873, Eq. 4), where $p_\text{CTC}$ sums over the alignments of $l$.

    Attributes:
        vocabulary: the tokens' texts.
        blank: index of CTC's blank.
        delimiter: the token between words; without it every token is a word.
        skip: tokens that never appear in text (`<s>`, `<unk>` …); their frames' probability is left out. Logits may
            lack the last ones.
        language_model: of words; it may be in capitals where the vocabulary is in small letters, or the reverse.
        alpha: weight of the language model.
        beta: bonus for each word.
        unknown_offset: added to the log10 probability of a word that the language model does not know.
        score_boundary: whether the language model also scores the end of the sentence.
        hotwords: words that get `hotword_weight` each; one that is under way gets its share while it competes. Of a
            phrase each word counts; they are brought to the vocabulary's case.
        hotword_weight: in natural logarithms.
        lexicon: the only words that there are, by their spelling (see `read_lexicon`); of words that are spelled alike
            the language model chooses. So a recogniser of romanised letters writes a language that it never saw (MMS
            Zero-shot, arXiv 2407.17852).
    """

    vocabulary: Sequence[str]
    blank: int = 0
    delimiter: str | None = "|"
    skip: Sequence[int] = ()
    language_model: NgramModel | None = None
    alpha: float = 0.5
    beta: float = 1.5
    unknown_offset: float = -10.0
    score_boundary: bool = True
    hotwords: Sequence[str] = ()
    hotword_weight: float = 10.0
    lexicon: Mapping[str, Sequence[str]] | None = None
    _prefixes: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _hot: frozenset[str] = field(init=False, repr=False)
    _written: Callable[[str], str] = field(init=False, repr=False)
    _begun: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        letters = [token for index, token in enumerate(self.vocabulary) if index not in (self.blank, *self.skip)]
        case = _case(letters) if self.lexicon is None else None
        words = [case(word) if case else word for phrase in self.hotwords for word in phrase.split()]
        for word in words:
            for spelling in self._spellings(word, letters):
                for length in range(1, len(spelling) + 1):
                    share = length / len(spelling)
                    self._prefixes[spelling[:length]] = max(self._prefixes.get(spelling[:length], 0.0), share)
        self._hot = frozenset(words)
        # How the language model writes a word.
        self._written = (self.language_model.case if case and self.language_model else None) or str
        self._begun = frozenset(s[:i] for s in self.lexicon or () for i in range(1, len(s) + 1))

    def _spellings(self, word: str, letters: Sequence[str]) -> Sequence[str]:
        """What a hot word is in letters."""
        if self.lexicon is not None:
            if not (found := [spelling for spelling, words in self.lexicon.items() if word in words]):
                raise UsageError(f"The hot word {word!r} cannot be heard: it is not in the lexicon.")
            return found
        if strange := sorted({word} - set(letters) if self.delimiter is None else set(word) - set("".join(letters))):
            raise UsageError(f"The hot word {word!r} cannot be heard: the vocabulary has no {strange[0]!r}.")
        return [word]

    def _finish(self, text: _Text) -> _Text | None:
        """The text with its open word closed, as the best of the words that are spelled so; None if there is none."""
        if not text.word:
            return text
        if self.lexicon is None:
            return self._closed(text, text.word)
        candidates = [self._closed(text, word) for word in self.lexicon.get(text.word, ())]
        return max(candidates, key=lambda t: t.lm + t.bonus, default=None)

    def _closed(self, text: _Text, word: str) -> _Text:
        score, history = 0.0, text.history
        if self.language_model is not None:
            written = self._written(word)
            logp, history = self.language_model.score(history, written)
            if written not in self.language_model:
                logp = (0.0 if logp == -math.inf else logp) + self.unknown_offset * math.log(10)
            score = self.alpha * logp
        if self.language_model is not None or self.lexicon is not None:
            score += self.beta
        bonus = self.hotword_weight if word in self._hot else 0.0
        words = text.words if self.lexicon is None else (text.words, word)
        return _Text(history, "", text.lm + score, text.bonus + bonus, words)

    def _extend(self, text: _Text, token: int) -> _Text | None:
        """The text with one more token, or None where the lexicon goes on otherwise."""
        letter = self.vocabulary[token]
        if self.delimiter is None:
            return self._finish(dataclasses.replace(text, word=letter))
        if letter == self.delimiter:
            return self._finish(text)
        longer = dataclasses.replace(text, word=text.word + letter)
        return longer if self.lexicon is None or longer.word in self._begun else None

    def _rank(self, text: _Text) -> float:
        """What the language side adds while the beam is running."""
        return text.lm + text.bonus + self.hotword_weight * self._prefixes.get(text.word, 0.0)

    def __call__(
        self,
        logits: Float[np.ndarray, "frames vocabulary"],
        *,
        beam_width: int = 100,
        beam_prune_logp: float = -10.0,
        token_min_logp: float = -5.0,
        n_best: int = 1,
    ) -> list[Hypothesis]:
        """Search one item.

        Args:
            logits: scores of the frames; their softmax is taken here.
            beam_width: prefixes kept after each frame.
            beam_prune_logp: prefixes this much worse than the best are dropped.
            token_min_logp: tokens less probable in a frame than this are not tried, the best one always.
            n_best: how many hypotheses to return.

        Returns:
            The best hypotheses, best first.
        """
        logits = np.asarray(logits, np.float64)
        last = max(index for index in range(len(self.vocabulary)) if index not in self.skip)
        if logits.ndim != 2 or not last < logits.shape[1] <= len(self.vocabulary):
            raise UsageError(
                f"Logits of shape (frames, {len(self.vocabulary)}) are wanted, one column a token, not {logits.shape}."
            )
        log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        start = _Text(self.language_model.start() if self.language_model else (), "", 0.0, 0.0)
        beams: _Beams = {1: (_Prefix(), _Beam(blank=0.0), start)}
        skipped = frozenset(self.skip)
        for frame in log_probs:
            probable = np.flatnonzero(frame >= min(token_min_logp, frame.max()))
            following, longer = self._one_frame(beams, frame, [int(t) for t in probable if t not in skipped])
            beams = self._best(beams, following, longer, beam_width, beam_prune_logp) or beams
        return self._hypotheses(beams)[:n_best]

    def _one_frame(
        self, beams: _Beams, frame: np.ndarray, tried: Sequence[int]
    ) -> tuple[dict[int, _Beam], dict[int, tuple[int, _Prefix]]]:
        """What prefixes a frame leaves or makes, with their probabilities; and of what is longer, by which token."""
        following: defaultdict[int, _Beam] = defaultdict(_Beam)
        longer: dict[int, tuple[int, _Prefix]] = {}
        for key, (prefix, beam, _) in beams.items():
            total = beam.total
            for token in tried:
                logp = float(frame[token])
                if token == self.blank:
                    same = following[key]
                    same.blank = _log_add(same.blank, total + logp)
                    continue
                further = prefix.followed_by(token)
                longer[further] = (token, prefix)
                new = following[further]
                if token != prefix.token:
                    new.token = _log_add(new.token, total + logp)
                    continue
                # A repeat continues the token; only after a blank it is a new one.
                same = following[key]
                same.token = _log_add(same.token, beam.token + logp)
                new.token = _log_add(new.token, beam.blank + logp)
        return following, longer

    def _best(
        self,
        beams: _Beams,
        following: dict[int, _Beam],
        longer: dict[int, tuple[int, _Prefix]],
        width: int,
        prune: float,
    ) -> _Beams:
        """The prefixes that go on, best first; none if the lexicon has none."""
        ranked = []
        for key, beam in following.items():
            if beam.total == -math.inf:
                continue
            if key in beams:
                text: _Text | None = beams[key][2]
            else:
                token, prefix = longer[key]
                text = self._extend(beams[prefix.key][2], token)
            if text is not None:
                ranked.append((beam.total + self._rank(text), key, text))
        if not ranked:
            return {}
        ranked.sort(key=lambda entry: entry[:2], reverse=True)
        floor = ranked[0][0] + prune
        kept = [(key, text) for rank, key, text in ranked[:width] if rank >= floor]
        prefixes = {key: beams[key][0] if key in beams else _Prefix(key, *longer[key]) for key, _ in kept}
        return {key: (prefixes[key], following[key], text) for key, text in kept}

    def _hypotheses(self, beams: _Beams) -> list[Hypothesis]:
        """The prefixes as they end, best first."""
        results = []
        ends = [(prefix, beam, self._finish(text)) for prefix, beam, text in beams.values()]
        if not any(end for _, _, end in ends):  # the last word is not yet one of the lexicon's; it is left out
            ends = list(beams.values())
        for prefix, beam, end in ends:
            if end is None:
                continue
            lm = end.lm
            if self.language_model is not None and self.score_boundary and "</s>" in self.language_model:
                lm += self.alpha * self.language_model.score(end.history, "</s>")[0]
            tokens, words = prefix.tokens(), tuple(_unrolled(end.words, lambda pair: pair or None))
            said = self.text(tokens) if self.lexicon is None else " ".join(words)
            results.append(Hypothesis(tokens, said, beam.total + lm + end.bonus, beam.total, lm, words))
        return sorted(results, key=lambda h: h.score, reverse=True)

    def text(self, tokens: Iterable[int]) -> str:
        """Tokens as text."""
        letters = [self.vocabulary[t] for t in tokens]
        if self.delimiter is None:
            return " ".join(letters)
        return " ".join("".join(" " if x == self.delimiter else x for x in letters).split())


# --- forced alignment ------------------------------------------------------------------------------------------------

_BLOCK = 64  # frames between moves of the window


@dataclass(frozen=True)
class ForcedAlignment:
    """The best alignment of every item.

    Attributes:
        states: for each frame, 2i + 1 inside token i and 2i in the blanks before it; -1 behind the item's end.
        scores: log probability of what each frame says.
        exact: whether this is the best of all alignments for certain: the window covered every state, or what left it
            was already too improbable to come back.
    """

    states: Int[np.ndarray, "batch frames"]
    scores: Float[np.ndarray, "batch frames"]
    exact: bool

    def spans(self, item: int, targets: Sequence[Any]) -> list[Span]:
        """Every token of an item with its frames and the mean probability in them."""
        row, scores = self.states[item], self.scores[item]
        inside = np.flatnonzero((row >= 0) & (row % 2 == 1))
        result = []
        edges = np.flatnonzero(np.diff(row[inside], prepend=-1))
        for first, following in zip(edges, [*edges, len(inside)][1:], strict=True):
            frames = inside[first:following]
            probability = float(np.exp(scores[frames]).mean())
            token = targets[int(row[frames[0]]) // 2]
            result.append(Span(token, int(frames[0]), int(frames[-1]) + 1, probability))
        return result


@partial(jax.jit, static_argnames=("window", "blank"))
def _viterbi(
    log_probs: Float[Array, "blocks block vocabulary"],
    extended: Int[Array, " states"],
    frames: Int[Array, ""],
    tokens: Int[Array, ""],
    *,
    window: int,
    blank: int,
) -> tuple[
    Int[Array, " frames"], Float[Array, " frames"], Float[Array, ""], Float[Array, " blocks"], Float[Array, " blocks"]
]:
    r"""Viterbi over `window` states at a time, which follow the best one; one item.

    A frame's scores count from its best one, so that no path ever gains: the score of a path that leaves the window
    bounds all that it could become. In single precision an hour's sum would lose the differences, so each block counts
    from the best score before it. Returns the path, the log probability of what each frame says, the final score from
    the last block's zero, the zero of each block from the one before it, and the largest score that left in each block.
    """
    blocks, block, _ = log_probs.shape
    last = 2 * tokens  # the final blank's state
    two_before = jnp.pad(extended, (2, 0), constant_values=blank)[:-2]
    may_skip = extended != two_before  # a blank follows a blank

    def one_block(carry: tuple, inputs: tuple) -> tuple[tuple, tuple]:
        alpha, offset = carry
        scores, first = inputs
        scores = scores - scores.max(axis=-1, keepdims=True)
        peak = jnp.where(alpha.max() > LOG_ZERO / 2, alpha.max(), 0.0)
        alpha = jnp.where(alpha > LOG_ZERO / 2, alpha - peak, LOG_ZERO)
        alpha, moved, behind = _move_window(alpha, offset, last + 1)
        labels = jax.lax.dynamic_slice(extended, (moved,), (window,))
        skip = jnp.where(jax.lax.dynamic_slice(may_skip, (moved,), (window,)), 0.0, LOG_ZERO).astype(alpha.dtype)
        emissions = scores[:, labels]  # (block, window)
        reachable = moved + jnp.arange(window)

        def one_frame(carry: tuple, frame: tuple) -> tuple[tuple, jax.Array]:
            (alpha, left), (emission, index) = carry, frame
            best, back = _best_predecessors(alpha, skip)
            begun = jnp.where(reachable < 2, emission, LOG_ZERO)  # the first frame
            new = jnp.where(index == 0, begun, best + emission)
            ahead = jnp.where(moved + window <= last, jnp.maximum(alpha[-1], alpha[-2]), LOG_ZERO)
            return (jnp.where(index < frames, new, alpha), jnp.maximum(left, ahead)), _packed(back)

        (alpha, left), back = jax.lax.scan(one_frame, (alpha, behind), (emissions, first + jnp.arange(block)))
        return (alpha, moved), (back, moved, peak, left)

    alpha = jnp.full((window,), LOG_ZERO, log_probs.dtype)
    starts = jnp.arange(blocks) * block
    carry, (back, offsets, peaks, left) = jax.lax.scan(one_block, (alpha, jnp.int32(0)), (log_probs, starts))
    alpha, offset = carry

    def value(state: jax.Array) -> jax.Array:
        inside = (state >= offset) & (state < offset + window)
        return jnp.where(inside, alpha[state - offset], LOG_ZERO)

    at_blank, at_token = value(last), value(last - 1)
    end = jnp.where(at_token > at_blank, last - 1, last)
    path = _trace(back, offsets, end.astype(jnp.int32), frames)
    said = log_probs.reshape(blocks * block, -1)
    scores = jnp.take_along_axis(said, extended[jnp.maximum(path, 0)][:, None], axis=1)[:, 0]
    return path, jnp.where(path >= 0, scores, 0.0), jnp.maximum(at_blank, at_token), peaks, left


def _move_window(
    alpha: Float[Array, " window"], offset: Int[Array, ""], states: Int[Array, ""]
) -> tuple[Float[Array, " window"], Int[Array, ""], Float[Array, ""]]:
    """Move the window on with the best state, never back and not past the last; also the best score left behind."""
    window = len(alpha)
    best = offset + jnp.argmax(alpha).astype(jnp.int32)
    moved = jnp.clip(best - window // 2, offset, jnp.maximum(states - window, offset))
    behind = jnp.where(jnp.arange(window) < moved - offset, alpha, LOG_ZERO).max()
    longer = jnp.concatenate([alpha, jnp.full((window,), LOG_ZERO, alpha.dtype)])
    return jax.lax.dynamic_slice(longer, (moved - offset,), (window,)), moved, behind


def _best_predecessors(
    alpha: Float[Array, " window"], skip: Float[Array, " window"]
) -> tuple[Float[Array, " window"], UInt8[Array, " window"]]:
    r"""$\max(\alpha_s, \alpha_{s-1}, \alpha_{s-2})$, the last where `skip` is 0, and how many states back it is."""
    padded = jnp.concatenate([jnp.full((2,), LOG_ZERO, alpha.dtype), alpha])
    stay, step, jump = alpha, padded[1:-1], padded[:-2] + skip
    back = jnp.where(step > stay, 1, 0)
    best = jnp.maximum(stay, step)
    back = jnp.where(jump > best, 2, back).astype(jnp.uint8)
    return jnp.maximum(best, jump), back


def _packed(back: UInt8[Array, " window"]) -> UInt8[Array, " bytes"]:
    """Steps back of 0 to 2 states, four of them a byte."""
    four = back.reshape(-1, 4)
    return four[:, 0] | (four[:, 1] << 2) | (four[:, 2] << 4) | (four[:, 3] << 6)


def _trace(
    back: UInt8[Array, "blocks block bytes"],
    offsets: Int[Array, " blocks"],
    end: Int[Array, ""],
    frames: Int[Array, ""],
) -> Int[Array, " frames"]:
    """The states of the path that ends in `end`, by the packed steps back of each block's window; -1 behind it."""
    blocks, block, size = back.shape
    flat = back.reshape(blocks * block, size)

    def trace(state: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        inside = index < frames
        local = state - offsets[index // block]
        step = (flat[index, local // 4] >> (2 * (local % 4)).astype(jnp.uint8)) & 3
        before = jnp.where(inside, state - step.astype(jnp.int32), state)
        return before, jnp.where(inside, state, -1)

    return jax.lax.scan(trace, end, jnp.arange(blocks * block), reverse=True)[1]


def forced_alignment(
    log_probs: Float[np.ndarray, "batch frames vocabulary"] | Float[Array, "batch frames vocabulary"],
    targets: Int[np.ndarray, "batch tokens"] | Int[Array, "batch tokens"],
    input_lengths: Int[np.ndarray, " batch"] | Int[Array, " batch"] | None = None,
    target_lengths: Int[np.ndarray, " batch"] | Int[Array, " batch"] | None = None,
    *,
    blank: int = 0,
    window: int = 4096,
) -> ForcedAlignment:
    r"""The most probable alignment of known tokens, $\arg\max_\pi p(\pi \mid x)$ with $\mathcal B(\pi)$ = targets.

    Viterbi's algorithm over the tokens with blanks between and around them. With more states than `window` only that
    many around the best are followed, so that time and memory grow with the frames alone; where no alignment is left at
    the end, the window is doubled. Whether a better alignment can have left the window is checked on the way (`exact`).

    Args:
        log_probs: log probabilities (a `<star>` column, which matches anything, is just one of 0).
        targets: tokens; no blanks among them.
        input_lengths: frames that count.
        target_lengths: tokens that count.
        blank: the blank's index.
        window: states to follow at a time.

    Raises:
        UsageError: for an item with too few frames for its tokens, or a target that is the blank.
    """
    scored, tokens = np.asarray(log_probs), np.asarray(targets)
    scored = scored.astype(np.promote_types(scored.dtype, np.float32))  # sums of many frames in bfloat16 are none
    batch, frames, _ = scored.shape
    spoken = np.full(batch, frames) if input_lengths is None else np.asarray(input_lengths)
    written = np.full(batch, tokens.shape[1]) if target_lengths is None else np.asarray(target_lengths)
    for item in range(batch):
        row = tokens[item, : written[item]]
        if np.any(row == blank):
            raise UsageError(f"Item {item}: the blank is no token to align.")
        if np.any((row < 0) | (row >= scored.shape[2])):
            raise UsageError(f"Item {item}: a token is outside the vocabulary of {scored.shape[2]}.")
        needed = len(row) + int(np.sum(row[1:] == row[:-1]))
        if needed > spoken[item]:
            which = f"Item {item}" if batch > 1 else "The recording"
            raise UsageError(f"{which} has {spoken[item]} frames, too few for its text, which takes {needed}.")
    # A few shapes, so that another length does not compile again.
    blocks = rounded(-(-frames // _BLOCK), 4)
    states = 2 * rounded(tokens.shape[1], 32) + 4
    padded = np.zeros((batch, blocks * _BLOCK, scored.shape[2]), scored.dtype)
    padded[:, :frames] = scored
    extended = np.full((batch, states), blank, np.int32)
    for item in range(batch):
        extended[item, 1 : 2 * written[item] : 2] = tokens[item, : written[item]]
    width = min(-(-window // 4) * 4, states)
    while True:
        run = jax.vmap(partial(_viterbi, window=width, blank=blank)) if batch > 1 else _single(width, blank)
        shaped = padded.reshape(batch, blocks, _BLOCK, -1)
        path, scores, total, peaks, left = (
            np.asarray(out)
            for out in run(
                jnp.asarray(shaped),
                jnp.asarray(extended),
                jnp.asarray(spoken, jnp.int32),
                jnp.asarray(written, jnp.int32),
            )
        )
        if width >= states or np.all(total > LOG_ZERO / 2):
            zero = np.cumsum(peaks, axis=1, dtype=np.float64)
            final = (zero[:, -1] + total)[:, None]
            exact = bool(np.all(zero + left < final - 1e-4 * np.abs(final) - 1e-2))  # far above what rounding does
            return ForcedAlignment(path[:, :frames], scores[:, :frames], exact)
        width = min(2 * width, states)


def _single(width: int, blank: int) -> Callable[..., tuple[jax.Array, ...]]:
    """One item without `vmap`, which would turn slices into gathers."""

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(out[None] for out in _viterbi(*(a[0] for a in arrays), window=width, blank=blank))

    return run


# --- whole recordings ------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames="graphdef")
def _forward(graphdef: Any, state: Any, values: jax.Array, mask: jax.Array | None) -> jax.Array:
    model = nnx.merge(graphdef, state)
    return model(values, mask, **without_padding(model.config)).logits


def _samples_a_row(model: Any) -> int:
    """From one row of a model's logits to the next, strided convolutions behind the Transformer included."""
    config = model.config
    behind = config.adapter_stride**config.num_adapter_layers if getattr(config, "add_adapter", False) else 1
    return config.inputs_to_logits_ratio * behind


def chunked_logits(
    model: Any,
    input_values: Float[np.ndarray, "steps ..."],
    *,
    chunk_length_s: float = 30.0,
    stride_length_s: float = 5.0,
    batch_size: int = 4,
    sampling_rate: int = 16_000,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "frames vocabulary"]:
    """A CTC model's logits for a recording of any length, in overlapping pieces; see `encoders.in_pieces`.

    Args:
        model: a CTC model of the wav2vec 2.0 family.
        input_values: one recording as the processor returns it.
        chunk_length_s: seconds a piece; longer is better and takes memory with its square.
        stride_length_s: seconds thrown away at each inner edge.
        batch_size: pieces at a time.
        sampling_rate: of the waveform.
        progress: called with the pieces done and the pieces in all.

    Raises:
        UsageError: if the strides leave nothing of a piece.
    """
    graphdef, state = nnx.split(alone(model))
    return in_pieces(
        partial(_forward, graphdef, state),
        input_values,
        int(model.backbone.frame_lengths(len(input_values))),
        in_steps(_samples_a_row(model), model.config),
        chunk_length_s=chunk_length_s,
        stride_length_s=stride_length_s,
        batch_size=batch_size,
        sampling_rate=in_steps(sampling_rate, model.config),
        window=in_steps(400, model.config),
        progress=progress,
    )


@dataclass(frozen=True)
class Transcription:
    """What was said, and when, in seconds.

    Attributes:
        text: the transcript.
        words: every word with `start`, `end` and `score`.
        characters: every character alike.
        duration: of the recording.
    """

    text: str
    words: list[dict[str, Any]]
    characters: list[dict[str, Any]]
    duration: float

    def later(self, seconds: float) -> Transcription:
        """The same, `seconds` later in a recording."""

        def moved(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [s | {edge: round(s[edge] + seconds, 3) for edge in ("start", "end")} for s in spans]

        return dataclasses.replace(self, words=moved(self.words), characters=moved(self.characters))

    def segments(self, *, pause: float = 0.6, longest: float = 7.0, letters: int = 84) -> list[dict[str, Any]]:
        """The words in pieces for subtitles: each ends at a pause, or before it grows too long.

        A word that is itself too long, as where a script has no spaces, is taken apart into its characters.

        Args:
            pause: seconds of silence that end a piece.
            longest: seconds a piece.
            letters: and letters, spaces included.

        Returns:
            For each piece `id`, `start`, `end`, `text` and `words`.
        """
        parts: list[tuple[str, dict[str, Any]]] = []  # what stands before a part, and the part
        for word in self.words:
            within = [word]
            if len(word["text"]) > letters or word["end"] - word["start"] > longest:
                within = [c for c in self.characters if word["start"] <= c["start"] < word["end"]] or [word]
            parts += [("" if index else " ", part) for index, part in enumerate(within)]
        groups: list[list[dict[str, Any]]] = []
        texts: list[str] = []
        for space, part in parts:
            text = f"{texts[-1]}{space}{part['text']}" if groups else ""
            fits = groups and part["start"] - groups[-1][-1]["end"] < pause and len(text) <= letters
            if fits and part["end"] - groups[-1][0]["start"] <= longest:
                groups[-1].append(part)
                texts[-1] = text
            else:
                groups.append([part])
                texts.append(part["text"])
        return [
            {"id": number, "start": group[0]["start"], "end": group[-1]["end"], "text": text, "words": group}
            for number, (group, text) in enumerate(zip(groups, texts, strict=True))
        ]


def in_one_language(
    model: Any, processor: Any, language: str | None, source: str = "The model", option: str = "language"
) -> tuple[Any, Any]:
    """The recogniser and the processor of one language, of those that a model holds; others as they are (MMS).

    Args:
        model: a CTC model.
        processor: its processor.
        language: one of the model's; may be None where it holds one.
        source: where the model is from, for messages.
        option: what names the language there.

    Raises:
        UsageError: if the model holds several and none, or another, is asked for.
    """
    held = getattr(model.config, "languages", ())
    if held and hasattr(model, "speaking"):
        if language is None and len(held) > 1:
            raise UsageError(f"{source} holds {', '.join(held)}; say which with {option}.")
        model, processor = model.speaking(language or held[0]), copy.deepcopy(processor)
        processor.set_target_lang(language or held[0])
    elif language is not None and language != processor.tokenizer.target_lang:
        raise UsageError(f"{source} does not hold several languages; load the adapters of {language} into it.")
    return model, processor


def _prepared(processor: Any, audio: Any) -> np.ndarray:
    return first_heard(processor(audio, sampling_rate=processor.feature_extractor.sampling_rate))


def transcribe_ctc(
    model: Any,
    processor: Any,
    audio: Float[np.ndarray, " samples"],
    *,
    chunk_length_s: float = 30.0,
    stride_length_s: float = 5.0,
    batch_size: int = 4,
    beam_width: int | None = None,
    language_model: NgramModel | str | os.PathLike[str] | None = None,
    alpha: float = 0.5,
    beta: float = 1.5,
    hotwords: Sequence[str] = (),
    hotword_weight: float = 10.0,
    lexicon: Mapping[str, Sequence[str]] | None = None,
    language: str | None = None,
    vad: bool | Mapping[str, float] = False,
    progress: Callable[[int, int], None] | None = None,
) -> Transcription:
    """Transcribe a recording of any length with a CTC model.

    Args:
        model: a CTC model of the wav2vec 2.0 family.
        processor: its processor.
        audio: waveform at the processor's rate.
        chunk_length_s: seconds a piece; see `chunked_logits`.
        stride_length_s: seconds thrown away at each inner edge.
        batch_size: pieces at a time.
        beam_width: search with that many prefixes; by default greedily, or with 100 if there is a language model, a
            hot word or a lexicon.
        language_model: of words, or the path of an ARPA file.
        alpha: its weight.
        beta: bonus for each word.
        hotwords: words that are likely to be said.
        hotword_weight: how likely, in natural logarithms.
        lexicon: the only words that there are, by their spelling; see `read_lexicon`.
        language: that is spoken, for a model that holds several; see `in_one_language`.
        vad: hear only where somebody is speaking, each region by itself: True, or what differs from the defaults of
            `audiozoo.audio.speech.SpeechOptions`.
        progress: called with the pieces done and the pieces in all; with `vad`, with the regions.
    """
    model, processor = in_one_language(model, processor, language)
    search = None
    if language_model is not None or hotwords or lexicon or (beam_width or 1) > 1:
        weights = {"alpha": alpha, "beta": beta, "hotword_weight": hotword_weight}
        search = processor.beam_search(language_model, hotwords=hotwords, lexicon=lexicon, **weights)
    hear = partial(
        _transcribe_region,
        model,
        processor,
        search=None if search is None else partial(search, beam_width=beam_width or 100),
        lexicon=lexicon,
        chunk_length_s=chunk_length_s,
        stride_length_s=stride_length_s,
        batch_size=batch_size,
    )
    if vad is False:
        return hear(audio, progress=progress)
    rate = processor.feature_extractor.sampling_rate
    regions = [(start, end) for start, end in spoken_samples(audio, rate, vad) if end - start >= SHORTEST * rate]
    heard = []
    for start, end in regions:
        heard.append(hear(audio[start:end]).later(start / rate))
        if progress is not None:
            progress(len(heard), len(regions))
    return Transcription(
        " ".join(part.text for part in heard if part.text),
        [word for part in heard for word in part.words],
        [character for part in heard for character in part.characters],
        len(audio) / rate,
    )


def _transcribe_region(
    model: Any,
    processor: Any,
    audio: Float[np.ndarray, " samples"],
    *,
    search: Callable[[Any], list[Hypothesis]] | None,
    lexicon: Mapping[str, Sequence[str]] | None,
    **pieces: Any,
) -> Transcription:
    """A region of a recording, or the whole, as `transcribe_ctc` has chosen to hear it."""
    logits = chunked_logits(model, _prepared(processor, audio), **pieces)
    tokenizer = processor.tokenizer
    rate = processor.feature_extractor.sampling_rate
    frame = _samples_a_row(model) / rate
    vocabulary = tokenizer.tokens()
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1))
    if search is not None:
        best = search(logits)[0]
        spans: list[Span] = []
        if best.tokens:
            aligned = forced_alignment(log_probs[None], np.asarray([best.tokens]), blank=tokenizer.pad_token_id)
            spans = aligned.spans(0, best.tokens)
    else:
        path = log_probs.argmax(axis=-1)
        spans = [
            Span(s.text, s.start, s.end, float(np.exp(log_probs[s.start : s.end, s.text]).mean()))
            for s in collapse(path, tokenizer.pad_token_id)
        ]
    spans = [s for s in spans if s.text < len(vocabulary) and s.text not in tokenizer.special_ids()]
    letters = [Span(vocabulary[s.text], s.start, s.end, s.score) for s in spans]
    words = words_of(letters, tokenizer.word_delimiter_token)
    if tokenizer.phonemes:
        words = [s for s in letters if s.text != tokenizer.word_delimiter_token]
    text = tokenizer.tokens_to_text([s.text for s in letters])
    if tokenizer.do_lower_case:
        letters, words = ([dataclasses.replace(s, text=s.text.lower()) for s in part] for part in (letters, words))
    if lexicon:
        text = best.text
        words = [dataclasses.replace(w, text=known) for w, known in zip(words, best.words, strict=False)]
    return Transcription(
        text,
        [w.seconds(frame) for w in words],
        [s.seconds(frame) for s in letters if s.text != tokenizer.word_delimiter_token],
        len(audio) / rate,
    )


def align(
    model: Any,
    processor: Any,
    audio: Float[np.ndarray, " samples"],
    text: str,
    *,
    star: bool = False,
    chunk_length_s: float = 30.0,
    stride_length_s: float = 5.0,
    batch_size: int = 4,
    window: int = 4096,
    language: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """When the words of a known text are said.

    Args:
        model: a CTC model of the wav2vec 2.0 family.
        processor: its processor.
        audio: waveform at the processor's rate.
        text: what is said. A word `<star>` stands for anything; several with no letter between are one.
        star: put a `<star>` before and after the text: the recording may begin and end with something else. It fits
            every frame perfectly, so of the letter beside it it leaves only the best frame.
        chunk_length_s: seconds a piece; see `chunked_logits`.
        stride_length_s: seconds thrown away at each inner edge.
        batch_size: pieces at a time.
        window: see `forced_alignment`.
        language: that is spoken, for a model that holds several; see `in_one_language`.
        progress: called with the pieces done and the pieces in all.

    Returns:
        For each word `text`, `start` and `end` in seconds and `score`, the mean probability of its letters. Words
        without a letter that the model knows are left out.

    Raises:
        UsageError: if no word is left, or the recording is too short for the text.
    """
    model, processor = in_one_language(model, processor, language)
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.tokens()
    delimiter = tokenizer.word_delimiter_token
    any_token = len(tokenizer.tokens(added=True))
    targets: list[int] = []
    words: list[tuple[str, int, int]] = []
    around = [STAR] if star else []
    for word in [*around, *text.replace(STAR, f" {STAR} ").split(), *around]:
        ids = [any_token] if word == STAR else tokenizer.word_ids(word)
        if not ids or ids == [any_token] == targets[-1:]:  # between two there would have to be a blank
            continue
        if targets and delimiter in vocabulary and any_token not in (ids[0], targets[-1]):
            targets.append(vocabulary.index(delimiter))
        words.append((word, len(targets), len(targets) + len(ids)))
        targets += ids
    if not any(word != STAR for word, _, _ in words):
        raise UsageError("The text has no letter that the model knows.")
    values = _prepared(processor, audio)
    logits = chunked_logits(
        model,
        values,
        chunk_length_s=chunk_length_s,
        stride_length_s=stride_length_s,
        batch_size=batch_size,
        progress=progress,
    )
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1))[:, :any_token]
    scores = np.full((len(log_probs), any_token + 1), LOG_ZERO, np.float32)
    scores[:, : log_probs.shape[1]], scores[:, any_token] = log_probs, 0
    aligned = forced_alignment(scores[None], np.asarray([targets]), blank=tokenizer.pad_token_id, window=window)
    spans = aligned.spans(0, list(range(len(targets))))
    frame = _samples_a_row(model) / processor.feature_extractor.sampling_rate
    result = []
    for word, first, following in words:
        if word == STAR:
            continue
        own = spans[first:following]
        frames = sum(s.end - s.start for s in own)
        score = sum(s.score * (s.end - s.start) for s in own) / frames
        result.append(Span(word, own[0].start, own[-1].end, score).seconds(frame))
    return result
