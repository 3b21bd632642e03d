"""SeamlessM4T v2 against `transformers`: speech and text to logits, text, and speech.

The published widths, vocoder and heads, random weights; two layers of each of the stacks, and 20,000 of the tokens, so
that both models fit side by side.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import random_model, randomised
from benchmarks.seamless_m4t import OPTIONS, SEED, SIZES, cases
from benchmarks.seamless_m4t import TABLES as FIRST

NAME = "SeamlessM4Tv2Model"
TABLES = FIRST | {
    "char_to_id": {chr(97 + i): 4 + i for i in range(26)},
    "id_to_text": {str(i): chr(97 + i % 26) + chr(97 + i // 26 % 26) for i in range(20_000)},
}
# Random weights: a symbol of control is never the likeliest unit.
QUIET = (0, 1, 2, 3, *range(10_004, 10_082))


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model, random weights, float32."""
    import torch
    import transformers

    theirs = randomised(transformers.SeamlessM4Tv2Model(transformers.SeamlessM4Tv2Config(**SIZES)), SEED)
    with torch.no_grad():
        theirs.t2u_model.lm_head.weight[list(QUIET)] = 0
    for name, table in TABLES.items():
        setattr(theirs.generation_config, name, table)
    return theirs


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with the same weights, made without the original."""
    from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Model
    from weights_conversion import seamless_m4t_v2 as conversion

    config = conversion.config_from_hugging_face(SIZES)
    table = conversion.hugging_face_table(config, NAME)
    ours = random_model(SeamlessM4Tv2Model, config, table, SEED)
    units = ours.t2u_model.model.decoder.embed_tokens.embedding
    units[...] = units[...].at[np.array(QUIET)].set(0)
    ours.generation_config = conversion.generation_from_hugging_face(TABLES, {}, "")
    return ours


CASES = cases(model, original, OPTIONS)
