"""SEW and SEW-D against `transformers` (eager): forwards. Published sizes, random weights."""

from __future__ import annotations

from benchmarks.wavlm import forwards

CASES = forwards(
    "sew",
    "SEWConfig",
    (
        ("SEWForCTC", "sew_tiny", 1, 10, 10),
        ("SEWForCTC", "sew_small", 8, 5, 4),
        ("SEWDForCTC", "sew_d_tiny", 1, 10, 10),
        ("SEWDForCTC", "sew_d_mid", 8, 5, 4),
    ),
)
