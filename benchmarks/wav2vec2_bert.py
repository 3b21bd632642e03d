"""w2v-BERT against `transformers` (eager): forwards of 2.0's size, random weights."""

from __future__ import annotations

import numpy as np

from benchmarks.wavlm import forwards


def features(batch: int, seconds: int) -> np.ndarray:
    """Noise of variance 1, float32 `(batch, steps, 160)`."""
    return np.random.default_rng(1).standard_normal((batch, 50 * seconds, 160)).astype(np.float32)


CASES = forwards(
    "wav2vec2_bert",
    "Wav2Vec2BertConfig",
    (("Wav2Vec2BertForCTC", "w2v_bert_2", 1, 10, 3), ("Wav2Vec2BertForCTC", "w2v_bert_2", 8, 5, 2)),
    features,
)
