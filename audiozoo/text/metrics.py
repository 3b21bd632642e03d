r"""Word and character error rates.

$$ \mathrm{WER} = \frac{S + D + I}{N} $$

with the substitutions, deletions and insertions of a shortest edit path from the reference ($N$ words) to the
hypothesis. Over several texts, errors and words are summed before dividing. Normalise both sides first
(`text.normalizers`): neither case nor punctuation is ignored here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from audiozoo.errors import UsageError


@dataclass(frozen=True)
class ErrorRate:
    """Counts of a shortest alignment; `float(result)` is the rate."""

    substitutions: int
    deletions: int
    insertions: int
    hits: int
    alignments: tuple[tuple[tuple[str | None, str | None], ...], ...]
    """Per text: `(reference unit, hypothesis unit)` pairs; `None` where one side has no counterpart."""

    @property
    def errors(self) -> int:
        """$S + D + I$."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def reference_length(self) -> int:
        """$N$."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """$(S + D + I) / N$; more than 1 is possible."""
        return self.errors / self.reference_length

    def __float__(self) -> float:
        return self.rate


def word_error_rate(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> ErrorRate:
    """Errors in words, which are what white space separates.

    Args:
        reference: what was said; one text or several.
        hypothesis: what was recognised, as many texts.

    Raises:
        UsageError: unequal numbers of texts, or no word in all references.
    """
    return _error_rate(reference, hypothesis, "word", str.split)


def character_error_rate(reference: str | Sequence[str], hypothesis: str | Sequence[str]) -> ErrorRate:
    """Errors in characters, spaces included; arguments and errors as for `word_error_rate`."""
    return _error_rate(reference, hypothesis, "character", list)


def _error_rate(
    reference: str | Sequence[str], hypothesis: str | Sequence[str], unit: str, split: Callable[[str], list[str]]
) -> ErrorRate:
    references = [reference] if isinstance(reference, str) else list(reference)
    hypotheses = [hypothesis] if isinstance(hypothesis, str) else list(hypothesis)
    if len(references) != len(hypotheses):
        raise UsageError(f"There are {len(references)} references but {len(hypotheses)} hypotheses.")
    counts = {"replace": 0, "delete": 0, "insert": 0, "equal": 0}
    alignments = []
    for said, heard in zip(map(split, references), map(split, hypotheses), strict=True):
        pairs: list[tuple[str | None, str | None]] = []
        for step in Levenshtein.opcodes(said, heard):
            left, right = said[step.src_start : step.src_end], heard[step.dest_start : step.dest_end]
            size = max(len(left), len(right))
            counts[step.tag] += size
            pairs += zip([*left, *[None] * (size - len(left))], [*right, *[None] * (size - len(right))], strict=True)
        alignments.append(tuple(pairs))
    if counts["replace"] + counts["delete"] + counts["equal"] == 0:
        raise UsageError(f"The reference holds no {unit}, so there is no error rate.")
    return ErrorRate(counts["replace"], counts["delete"], counts["insert"], counts["equal"], tuple(alignments))
