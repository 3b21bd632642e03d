"""Texts of several lengths as one array: what tokenizers with `transformers`' options of padding share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers

from audiozoo.errors import CheckpointError, UsageError


def texts_of(text: str | Sequence[str], padding: bool | str) -> list[str]:
    """A text or several, as a list.

    Raises:
        UsageError: for something that is not text or not Unicode, and for an unknown padding.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts or not all(isinstance(one, str) for one in texts):
        raise UsageError("The tokenizer takes a text or a list of texts, at least one.")
    for one in texts:
        try:
            one.encode()
        except UnicodeEncodeError:  # bytes of a command line that are no UTF-8
            raise UsageError(f"{one!r} is no text in UTF-8.") from None
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise UsageError(f"There is no padding {padding!r}; choose longest, max_length or do_not_pad.")
    return texts


def tokens_of(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """A text's tokens by a tokenizer of the library `tokenizers`, with none around them.

    Raises:
        CheckpointError: if neither the text nor the token for what is unknown is in its vocabulary.
    """
    try:
        return list(backend.encode(text, add_special_tokens=False).ids)
    except Exception as problem:  # the library raises nothing narrower
        raise CheckpointError(f"The checkpoint's tokenizer cannot read {text!r:.60} ({problem}).") from None


def padded(rows: Sequence[Sequence[int]], padding: bool | str, limit: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, int32 `(batch, time)`; "max_length" pads to `limit` at least.

    Raises:
        UsageError: for rows of several lengths without padding.
    """
    length = max(map(len, rows))
    if padding == "max_length":
        length = max(length, limit)
    elif padding in (False, "do_not_pad") and min(map(len, rows)) < length:
        raise UsageError("Texts of several lengths do not make one array; choose padding='longest'.")
    input_ids = np.full((len(rows), length), pad_token_id, np.int32)
    attention_mask = np.zeros((len(rows), length), np.int32)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        attention_mask[index, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
