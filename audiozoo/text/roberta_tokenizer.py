"""RoBERTa's byte-level tokenizer, from `tokenizer.json` or from `vocab.json` and `merges.txt`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.text.batches import padded, texts_of, tokens_of

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class RobertaTokenizer:
    """Text to tokens and back: `<s> text </s>`, padded with `<pad>`.

    Args:
        backend: a tokenizer of the `tokenizers` library that has RoBERTa's special tokens.
        model_max_length: tokens that padding to "max_length" gives where the call names no length.
    """

    def __init__(self, backend: tokenizers.Tokenizer, model_max_length: int = 512):
        missing = [token for token in SPECIAL_TOKENS[:3] if backend.token_to_id(token) is None]
        if missing:
            raise CheckpointError(f"The vocabulary lacks {', '.join(missing)}, which RoBERTa's has.")
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.model_max_length = backend, model_max_length
        ids = [int(backend.token_to_id(token) or 0) for token in SPECIAL_TOKENS[:3]]
        self.bos_token_id, self.pad_token_id, self.eos_token_id = ids

    @classmethod
    def from_vocabulary(cls, vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> RobertaTokenizer:
        """From a vocabulary in GPT-2's spelling of bytes, and its merges in order."""
        ids = dict(vocabulary)
        backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(t, lstrip=t == "<mask>", special=True) for t in SPECIAL_TOKENS])
        ends = [(token, int(backend.token_to_id(token) or 0)) for token in ("</s>", "<s>")]
        backend.post_processor = processors.RobertaProcessing(ends[0], ends[1], add_prefix_space=False)
        return cls(backend)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> RobertaTokenizer:
        """From a checkpoint's files.

        Raises:
            SourceError: if there are none.
            CheckpointError: if they are damaged or another model's.
        """
        folder = Path(directory)
        try:
            if (folder / "tokenizer.json").is_file():
                tokenizer = cls(tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
            elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
                vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
                lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
                pairs = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
                tokenizer = cls.from_vocabulary(vocabulary, [(first, second) for first, second in pairs])
            else:
                raise SourceError(
                    f"'{folder}' has no tokenizer.json, nor vocab.json with merges.txt; those of roberta-base fit."
                )
            settings = folder / "tokenizer_config.json"
            if settings.is_file():
                longest = json.loads(settings.read_text(encoding="utf-8")).get("model_max_length", 512)
                tokenizer.model_max_length = min(int(longest), 512)
        except (SourceError, CheckpointError):
            raise
        except Exception as problem:  # the library's errors are bare Exceptions
            raise CheckpointError(f"The tokenizer's files in '{folder}' cannot be read ({problem}).") from None
        return tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` as `transformers` reads them."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
        settings = {
            **dict(zip(names, SPECIAL_TOKENS, strict=True)),
            "cls_token": "<s>",
            "sep_token": "</s>",
            "model_max_length": self.model_max_length,
            "tokenizer_class": "RobertaTokenizer",
        }
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        }
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / name)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Tokens of a text or of several.

        Args:
            text: the text or texts.
            padding: `True` or "longest"; "max_length"; `False` or "do_not_pad", for texts of one length.
            truncation: cut what is longer than `max_length`, keeping the `</s>`.
            max_length: tokens, special ones included; `model_max_length` by default.

        Returns:
            `input_ids` and `attention_mask`, int32 `(batch, time)`.

        Raises:
            UsageError: for something that is not text, unequal lengths without padding, or an unknown padding.
        """
        texts = texts_of(text, padding)
        limit = max_length or self.model_max_length
        if limit < 2:
            raise UsageError(f"max_length is {limit}; <s> and </s> alone are two tokens.")
        rows = []
        for one in texts:
            ids = tokens_of(self.backend, one)
            rows.append([self.bos_token_id, *(ids[: limit - 2] if truncation else ids), self.eos_token_id])
        return padded(rows, padding, limit, self.pad_token_id)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of one row of tokens."""
        return self.backend.decode([int(i) for i in np.asarray(token_ids)], skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]
