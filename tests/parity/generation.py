"""Whole models under the options of `generate` against `transformers`: whether each reaches the search of this model.

The search itself is compared option by option in `test_decoding.py`. Here many are given at once, so that few programs
are compiled, and each must matter: without it the original gives another text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import SequenceBiasLogitsProcessor

Generate = Callable[..., Any]


def livelier(decoder: torch.nn.Module) -> None:
    """Random decoders repeat their last token; here what the layers add counts more, beside the embedding."""
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(("fc2.weight", "out_proj.weight", ".wo.weight", ".o.weight")):
                weight *= 4


@contextlib.contextmanager
def biases_in_single() -> Iterator[None]:
    """The original assigns biases of the default dtype to an array of float32, an error where that is float64."""
    prepare = SequenceBiasLogitsProcessor._prepare_bias_variables

    def prepare_in_single(self: Any, scores: torch.Tensor) -> None:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            prepare(self, scores)
        finally:
            torch.set_default_dtype(default)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceBiasLogitsProcessor, "_prepare_bias_variables", prepare_in_single)
        yield


def compare(theirs: Generate, ours: Generate, prompt: int, options: dict[str, Any]) -> None:
    """The same texts, up to their ends: behind these the original writes no padding whose id is 0.

    Args:
        theirs: the original's tokens under options, the prompt included.
        ours: likewise.
        prompt: tokens of the prompt.
        options: with a list of ends, `eos_token_id`.
    """
    ends = options["eos_token_id"]

    def texts(generate: Generate, options: dict[str, Any]) -> list[list[int]]:
        rows = np.asarray(generate(**options)).tolist()
        lengths = [next((i + 1 for i in range(prompt, len(row)) if row[i] in ends), len(row)) for row in rows]
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    with torch.no_grad(), biases_in_single():
        wanted = texts(theirs, options)
        assert texts(ours, options) == wanted
        for name in options.keys() - {"eos_token_id", "num_beams"}:
            rest = {other: value for other, value in options.items() if other != name}
            assert texts(theirs, rest) != wanted, f"{name} changes nothing here"
