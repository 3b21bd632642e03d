"""Every tolerance of every test, in one table.

A value *a* agrees with its reference *b* when

    |a - b| <= atol + rtol * max(|b|, rms(b))

that is, relative to the value itself, or for a value near zero to the root mean square of its array. An entry looser
than the two defaults (1e-9 in float64, 1e-4 in float32) says why; `tests/test_tolerances.py` insists on it. An entry is
never loosened to make a test pass: find the cause, or name it here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Tolerance:
    """How far two arrays may be apart, and why if that is further than usual."""

    rtol: float
    atol: float = 0.0
    reason: str = ""


ANY = "any"

# (kind, dtype, backend) -> tolerance; the backend "any" holds where no backend of that name is listed.
TABLE: dict[tuple[str, str, str], Tolerance] = {
    # Live parity on tiny configurations.
    ("tap", "float64", ANY): Tolerance(1e-9, 1e-12),
    ("output", "float64", ANY): Tolerance(1e-9, 1e-12),
    ("gradient", "float64", ANY): Tolerance(1e-9, 1e-12),
    # One full published configuration.
    ("output", "float32", ANY): Tolerance(1e-4, 1e-6),
    ("gradient", "float32", ANY): Tolerance(1e-4, 1e-6),
    # Features computed from a waveform, against the original's float32 extractor.
    ("features", "float32", ANY): Tolerance(1e-5, 1e-5),
    # The same, where the original transforms in float32 (torch.stft) and ours in float64.
    ("features by torch.stft", "float32", ANY): Tolerance(
        1e-5,
        1e-4,
        "the original's own rounding: against an exact float64 transform torch.stft is off by up to 2e-5 on speech and "
        "6e-5 on bird song, in bands 80 dB below the loudest of their frame; ours by 2e-7",
    ),
    # The single-precision log-mel that is compiled with a model, against the double-precision one.
    ("features in float32", "float32", ANY): Tolerance(
        1e-5,
        2e-4,
        "rounding of a float32 transform in bands 80 dB below the loudest of their frame: 2e-5 on speech, 1e-4 on bird "
        "song, the same size as torch.stft's",
    ),
    # The same model in half precision against itself in float32.
    ("output", "bfloat16", ANY): Tolerance(
        5e-2, 5e-2, "bfloat16 keeps 8 bits of mantissa: 2^-8 = 4e-3 a rounding, through some ten layers of them"
    ),
    # Golden files, made in float64 by the original and read on any backend.
    ("golden", "float64", "cpu"): Tolerance(1e-9, 1e-12),
    ("golden", "float32", ANY): Tolerance(1e-4, 1e-6),
    ("golden", "float32", "tpu"): Tolerance(
        5e-4, 5e-5, "a TPU's float32 product at `highest` is six bfloat16 passes, and its exp and erf are polynomials"
    ),
    ("golden", "bfloat16", ANY): Tolerance(
        5e-2, 5e-2, "bfloat16 keeps 8 bits of mantissa: 2^-8 = 4e-3 a rounding, through some ten layers of them"
    ),
    # Scores of a search over logits that are equal to the bit: sums of a few tens of float32 log-probabilities.
    ("scores", "float32", ANY): Tolerance(1e-5, 1e-5),
    # Whisper's word times, in seconds, against those of the pipeline of `transformers`.
    ("word times", "float64", ANY): Tolerance(
        0.0,
        0.31,
        "two readings of the same attention: the pipeline's is that of the decoding, with the time tokens between the "
        "words; ours that of the text alone after <|notimestamps|>, as in openai-whisper. Half of 182 times are equal, "
        "nine in ten are at most 0.04 s apart, and the farthest 0.30 s: where one word ends in a pause",
    ),
    # One device against several, and one layout of the same sum against another.
    ("sharded", "float64", ANY): Tolerance(1e-9, 1e-12),
    ("sharded", "float32", ANY): Tolerance(1e-5, 1e-6),
}


def tolerance(kind: str, dtype: object, backend: str = ANY) -> Tolerance:
    """The entry for this kind of comparison, dtype and backend."""
    name = str(dtype)
    if (kind, name, backend) in TABLE:
        return TABLE[kind, name, backend]
    return TABLE[kind, name, ANY]


def assert_close(ours: Any, reference: Any, kind: str) -> None:
    """`ours` agrees with the reference, by the entry for this kind and the dtype of `ours`."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    allowed = tolerance(kind, ours.dtype)
    scale = np.maximum(np.abs(reference), np.sqrt(np.mean(np.square(reference))))
    excess = np.abs(ours - reference) - allowed.atol - allowed.rtol * scale
    assert excess.max() <= 0, f"off by {np.abs(ours - reference).max():.2e}"
