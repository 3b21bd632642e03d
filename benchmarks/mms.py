"""MMS against `transformers` (eager): four recordings in four languages, at the width of a billion parameters.

Six of the 48 blocks, random weights. The original has one language at a time, so it takes the recordings one by one;
the time that it needs to exchange the adapters between them is not counted.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor
from benchmarks.wav2vec2 import waves

LANGUAGES = ("eng", "fra", "swh", "tam")


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, of four languages."""
    from audiozoo.models.mms import MMSConfig, MMSForCTC

    published = dataclasses.replace(MMSConfig.mms_1b_all(), num_hidden_layers=6)
    config = dataclasses.replace(published, languages=LANGUAGES, vocab_sizes=(154,) * 4)
    return random_model(MMSForCTC, config)


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model of one language."""
    import transformers

    names = set(transformers.Wav2Vec2Config().to_dict()) - {"id2label", "output_hidden_size"}
    fields = {k: v for k, v in vars(model().config).items() if k in names}
    config = transformers.Wav2Vec2Config(**fields, attn_implementation="eager")
    return randomised(transformers.Wav2Vec2ForCTC(config), 0)


def our_forward() -> Run:
    import jax

    import audiozoo

    run, x = audiozoo.jit(model()), jax.numpy.asarray(waves(4, 5))
    index = model().language_index(LANGUAGES, 4)
    return lambda: np.asarray(run(x, languages=index).logits)


def their_forward() -> Run:
    import torch

    theirs, x = original(), tensor(waves(4, 5))

    def run() -> Any:
        with torch.inference_mode():
            return torch.cat([theirs(row[None]).logits for row in x]).float().numpy()

    return run


CASES = (
    Case(
        "forward, 4 x 5 s, 4 languages, 6 blocks", our_forward, {"transformers": their_forward}, target=1.5, repeats=4
    ),
)
