"""wav2vec2-Conformer against `transformers` (eager): forwards of the published sizes, random weights."""

from __future__ import annotations

from benchmarks.wavlm import forwards

CASES = forwards(
    "wav2vec2_conformer",
    "Wav2Vec2ConformerConfig",
    (
        ("Wav2Vec2ConformerForCTC", "rel_pos_large", 1, 10, 3),
        ("Wav2Vec2ConformerForCTC", "rope_large", 8, 5, 2),
    ),
)
