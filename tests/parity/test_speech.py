"""Where somebody is speaking, against faster-whisper's copy of Silero's rules and its network."""

from __future__ import annotations

import faster_whisper.vad as original
import numpy as np
import pytest

from audiozoo.audio.speech import SpeechOptions, regions_of

CHUNK = 512 / 16_000


@pytest.mark.parametrize("seed", range(30))
def test_rules(seed, monkeypatch):
    """Of random probabilities the same regions; behind them it is quiet, or the original's last one has no end."""
    random = np.random.default_rng(seed)
    options = SpeechOptions(
        threshold=random.choice([0.3, 0.5, 0.7]),
        min_speech_s=random.choice([0.0, 0.1, 0.25]),
        min_silence_s=random.choice([0.1, 0.32, 1.0]),
        pad_s=random.choice([0.0, 0.032, 0.4]),
    )
    steps = random.normal(0, 0.25, 2_000) * (random.random(2_000) < 0.3)
    probabilities = np.append(np.abs((np.cumsum(steps) + 1) % 2 - 1), np.zeros(100))  # a walk, reflected at 0 and 1
    monkeypatch.setattr(original, "get_vad_model", lambda: lambda samples: probabilities)
    wanted = original.get_speech_timestamps(
        np.zeros(len(probabilities) * 512, np.float32),
        threshold=options.threshold,
        min_speech_duration_ms=1000 * options.min_speech_s,
        min_silence_duration_ms=1000 * options.min_silence_s,
        speech_pad_ms=1000 * options.pad_s,
    )
    found = regions_of(probabilities, len(probabilities) * CHUNK, options)
    assert wanted
    np.testing.assert_allclose(found, [(w["start"] / 16_000, w["end"] / 16_000) for w in wanted], rtol=0, atol=1e-4)
