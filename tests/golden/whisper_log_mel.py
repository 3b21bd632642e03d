"""Golden log-mel features of Whisper: `python -m tests.golden.whisper_log_mel` writes `whisper_log_mel.npz`.

The reference is the NumPy path of `transformers.WhisperFeatureExtractor`, which transforms in float64. Every fifth
frame is kept.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

EVERY = 5


def waveform() -> np.ndarray:
    """1.7 s at 16 kHz: a rising tone that fades, noise, and a silent end; float32 `(27_200,)`."""
    t = np.arange(27_200) / 16_000
    chirp = 0.6 * np.sin(2 * np.pi * (100 * t + 1_500 * t**2)) * np.exp(-2 * t)
    noise = 0.02 * np.random.default_rng(0).standard_normal(t.shape)
    return ((chirp + noise) * (t < 1.5)).astype(np.float32)


def main() -> None:
    """Run the reference and write the file."""
    import transformers

    features = {}
    for n_mels in (80, 128):
        extractor = transformers.WhisperFeatureExtractor(feature_size=n_mels)
        features[f"mel_{n_mels}"] = extractor._np_extract_fbank_features([waveform()], "cpu")[0][:, ::EVERY]
    versions = json.dumps({"transformers": transformers.__version__, "numpy": np.__version__})
    path = Path(__file__).with_suffix(".npz")
    np.savez_compressed(path, every=EVERY, versions=versions, **{k: v.astype(np.float32) for k, v in features.items()})
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
