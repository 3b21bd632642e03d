r"""How good a model is, in numbers: of texts, classes, pairs of voices, waveforms and units.

Each function takes what was wanted and what came, for all of a test set, and returns plain numbers. Texts are scored by
the packages that papers score with: jiwer (error rates) and sacrebleu (BLEU and chrF).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from audiozoo.errors import UsageError


def _package(name: str, does: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UsageError(f'{does} with the package {name}: pip install "audiozoo[train]".') from None


# --- texts -----------------------------------------------------------------------------------------------------------


def error_rates(references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    r"""Word and character error rates, $(S + D + I) / N$ with the counts of all texts summed first.

    Raises:
        UsageError: jiwer is missing, or the references hold no word.
    """
    jiwer = _package("jiwer", "Error rates are computed")
    if not any(reference.split() for reference in references):
        raise UsageError("The references hold no word, so there is no error rate.")
    words = jiwer.process_words(list(references), list(hypotheses))
    characters = jiwer.process_characters(list(references), list(hypotheses))
    return {
        "wer": float(words.wer),
        "cer": float(characters.cer),
        "substitutions": words.substitutions,
        "deletions": words.deletions,
        "insertions": words.insertions,
        "words": words.hits + words.substitutions + words.deletions,
    }


def translation_scores(
    references: Sequence[str], hypotheses: Sequence[str], *, tokenize: str = "13a"
) -> dict[str, float]:
    """BLEU and chrF of a whole set, from 0 to 100, by sacrebleu.

    Args:
        references: one a text.
        hypotheses: as many.
        tokenize: sacrebleu's tokenizer of BLEU: "13a"; "zh", "ja-mecab", "ko-mecab", "char" or "flores200" elsewhere.

    Raises:
        UsageError: sacrebleu is missing, or has no such tokenizer.
    """
    sacrebleu = _package("sacrebleu", "Translations are scored")
    known = sacrebleu.metrics.BLEU.TOKENIZERS
    if tokenize not in known:
        raise UsageError(f"There is no tokenizer {tokenize!r} of BLEU; there are {', '.join(sorted(known))}.")
    try:
        bleu = sacrebleu.corpus_bleu(list(hypotheses), [list(references)], tokenize=tokenize)
    except (ImportError, RuntimeError, OSError) as error:  # a tokenizer that wants a package or a download of its own
        raise UsageError(f"sacrebleu's tokenizer {tokenize!r} cannot be used: {error}") from None
    return {"bleu": float(bleu.score), "chrf": float(sacrebleu.corpus_chrf(list(hypotheses), [list(references)]).score)}


# --- classes ---------------------------------------------------------------------------------------------------------


def accuracy(targets: Int[np.ndarray, " items"], scores: Float[np.ndarray, "items classes"], top: int = 1) -> float:
    """The share of items whose class is among the `top` best scored; ties go to the class that comes first."""
    best = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, :top]
    return float((best == np.asarray(targets)[:, None]).any(axis=1).mean())


def average_precision(relevant: Bool[np.ndarray, " items"], scores: Float[np.ndarray, " items"]) -> float:
    r"""$\sum_n (R_n - R_{n-1})\, P_n$ over the falling thresholds: items of the same score are found together.

    Without a relevant item it is not defined, and not a number.
    """
    relevant, scores = np.asarray(relevant, bool), np.asarray(scores, np.float64)
    if not relevant.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(relevant[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # of each run of equal scores
    precision = found[last] / (last + 1)
    return float(np.sum(np.diff(found[last] / found[-1], prepend=0.0) * precision))


def mean_average_precision(
    targets: Bool[np.ndarray, "items classes"], scores: Float[np.ndarray, "items classes"]
) -> float:
    """mAP: the mean over the classes that have an item, as AudioSet is scored."""
    targets = np.asarray(targets, bool)
    classes = np.flatnonzero(targets.any(axis=0))
    if not len(classes):
        raise UsageError("No item is of any class, so there is no mean average precision.")
    return float(np.mean([average_precision(targets[:, c], np.asarray(scores)[:, c]) for c in classes]))


def recalls(
    similarities: Float[np.ndarray, "queries items"],
    relevant: Bool[np.ndarray, "queries items"],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Retrieval: the share of queries with a relevant item among the best `k`, and mAP among the best 10.

    The average precision of a query is $1/\\min(R, 10)$ times the sum of the precisions at its relevant items among
    the first ten, where $R$ items are relevant.
    """
    similarities, relevant = np.asarray(similarities), np.asarray(relevant, bool)
    ranked = np.take_along_axis(relevant, np.argsort(-similarities, axis=1, kind="stable"), axis=1)
    result = {f"recall@{k}": float(ranked[:, :k].any(axis=1).mean()) for k in ks}
    ten = ranked[:, :10]
    precision = np.cumsum(ten, axis=1) / np.arange(1, ten.shape[1] + 1)
    result["map@10"] = float(((precision * ten).sum(axis=1) / np.minimum(relevant.sum(axis=1), 10)).mean())
    return result


# --- pairs -----------------------------------------------------------------------------------------------------------


def equal_error_rate(same: Bool[np.ndarray, " pairs"], scores: Float[np.ndarray, " pairs"]) -> tuple[float, float]:
    """The rate at which as many different pairs are accepted as same ones refused, and the threshold there.

    The two rates are step functions of the threshold; where they cross between two steps, they are joined by straight
    lines, as is usual on a ROC curve.

    Raises:
        UsageError: there are no pairs of one of the two kinds.
    """
    same, scores = np.asarray(same, bool), np.asarray(scores, np.float64)
    if same.all() or not same.any():
        raise UsageError("An equal error rate needs pairs of the same and of different voices.")
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    thresholds = np.append(np.inf, scores[order][last])  # accepted is what scores at least this
    accepted = np.append(0.0, np.cumsum(~same[order])[last] / (~same).sum())
    refused = 1 - np.append(0.0, np.cumsum(same[order])[last] / same.sum())
    index = int(np.argmax(accepted >= refused))
    if accepted[index] == refused[index]:
        return float(accepted[index]), float(thresholds[index])
    # a + t Δa = r + t Δr
    gap = refused[index - 1] - accepted[index - 1]
    t = gap / (gap + accepted[index] - refused[index])
    return float(accepted[index - 1] + t * (accepted[index] - accepted[index - 1])), float(thresholds[index])


# --- waveforms -------------------------------------------------------------------------------------------------------


def si_snr(
    reference: Float[np.ndarray, "*channels samples"], estimate: Float[np.ndarray, "*channels samples"]
) -> float:
    r"""Scale-invariant signal-to-noise ratio in dB, a mean over channels (arXiv 1811.02508, Eq. 3, of zero mean):

    $$ 10 \log_{10} \frac{\lVert \alpha s \rVert^2}{\lVert \alpha s - \hat s \rVert^2}, \qquad
       \alpha = \frac{\hat s^\top s}{\lVert s \rVert^2} $$

    Of a silent reference it is not defined, and not a number.
    """
    s, e = (np.asarray(x, np.float64) for x in (reference, estimate))
    s, e = s - s.mean(axis=-1, keepdims=True), e - e.mean(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        target = (e * s).sum(axis=-1, keepdims=True) / np.square(s).sum(axis=-1, keepdims=True) * s
        return float(np.mean(10 * np.log10(np.square(target).sum(axis=-1) / np.square(target - e).sum(axis=-1))))


# --- units and times -------------------------------------------------------------------------------------------------


def unit_quality(phones: Sequence[Any], units: Sequence[int]) -> dict[str, float]:
    r"""How well units stand for phones (HuBERT, §IV-E), from the frames' joint distribution $p(y, z)$.

    Phone purity: $\sum_z \max_y p(y, z)$. Cluster purity: $\sum_y \max_z p(y, z)$. PNMI: $I(y; z) / H(y)$, how much of
    the phones' uncertainty the units take away.
    """
    if not len(phones) or len(phones) != len(units):
        raise UsageError(f"Units are judged frame by frame; there are {len(phones)} phones and {len(units)} units.")
    _, y = np.unique(np.asarray(phones), return_inverse=True)
    _, z = np.unique(np.asarray(units), return_inverse=True)
    joint = np.zeros((y.max() + 1, z.max() + 1))
    np.add.at(joint, (y, z), 1 / len(y))
    p_y, p_z = joint.sum(axis=1), joint.sum(axis=0)
    held = joint > 0
    information = float((joint[held] * np.log(joint[held] / np.outer(p_y, p_z)[held])).sum())
    entropy = float(-(p_y * np.log(p_y)).sum())
    return {
        "phone_purity": float(joint.max(axis=0).sum()),
        "cluster_purity": float(joint.max(axis=1).sum()),
        "pnmi": information / entropy if entropy else float("nan"),
    }


def boundary_errors(
    wanted: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> Float[np.ndarray, " boundaries"]:
    """Seconds between the wanted and the found beginnings and ends of words, which are equally many."""
    if len(wanted) != len(found):
        raise UsageError(f"There are {len(wanted)} words to be found and {len(found)} that were.")
    return np.abs([a[edge] - b[edge] for a, b in zip(wanted, found, strict=True) for edge in ("start", "end")])
