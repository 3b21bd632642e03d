"""Writes `data/whisper_openai.pt`, a tiny Whisper as OpenAI publishes them (made with torch 2.13).

    python -m tests.weights_conversion.make_whisper_pt

Its tensors are those of `tests.random_weights`, keyed by OpenAI's names, in float16; the test makes them again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx

from audiozoo.loading import variables
from audiozoo.models.whisper import WhisperForConditionalGeneration
from tests.random_weights import random_tensor
from weights_conversion.whisper import OPENAI_TABLE, config_from_openai

PATH = Path(__file__).parent / "data" / "whisper_openai.pt"
DIMS = {
    "n_mels": 6,
    "n_audio_ctx": 7,
    "n_audio_state": 8,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "n_vocab": 19,
    "n_text_ctx": 9,
    "n_text_state": 8,
    "n_text_head": 4,
    "n_text_layer": 1,
}


def tensors() -> dict[str, np.ndarray]:
    """OpenAI's names and the values."""
    config = config_from_openai(DIMS)
    model = nnx.eval_shape(lambda: WhisperForConditionalGeneration(config, rngs=nnx.Rngs(0)))
    expected, found = variables(model), {}
    for step in OPENAI_TABLE.steps_for(expected):
        blank = tuple(np.empty(tuple(expected[path].shape)) for path in step.ours)
        for name, array in zip(step.foreign, step.operation.inverse(blank), strict=True):
            found[name] = random_tensor(name, array.shape, seed=0).astype(np.float16)
    return found


def main() -> None:
    import torch

    state = {name: torch.from_numpy(array) for name, array in tensors().items()}
    torch.save({"dims": DIMS, "model_state_dict": state}, PATH)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
