"""T5's tokenizer, from `tokenizer.json` or from the sentencepiece model `spiece.model`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.text.batches import padded, texts_of, tokens_of

PAD, EOS = "<pad>", "</s>"
SENTINEL = re.compile(r"<extra_id_\d+>")


class T5Tokenizer:
    """Text to tokens and back: `text </s>`, padded with `<pad>`.

    Args:
        encode: a text's tokens, without `</s>`.
        decode: the text of tokens that are no special ones.
        special: the special tokens' numbers by their text; `<pad>` and `</s>` among them.
        files: what `save` writes, by name.
        model_max_length: tokens that padding to "max_length" gives where the call names no length.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int]], str],
        special: dict[str, int],
        files: dict[str, bytes],
        model_max_length: int = 512,
    ):
        if missing := [token for token in (PAD, EOS) if token not in special]:
            raise CheckpointError(f"The vocabulary lacks {', '.join(missing)}, which T5's has.")
        self._encode, self._decode, self.files = encode, decode, files
        self.special, self.model_max_length = special, model_max_length
        self.pad_token_id, self.eos_token_id = special[PAD], special[EOS]

    @classmethod
    def from_tokenizers(cls, content: str, **settings: Any) -> T5Tokenizer:
        """From the content of a `tokenizer.json`."""
        backend = tokenizers.Tokenizer.from_str(content)
        backend.no_padding()
        backend.no_truncation()
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        special |= {t: i for t in (PAD, EOS) if (i := backend.token_to_id(t)) is not None}
        return cls(
            lambda text: tokens_of(backend, text),
            lambda ids: backend.decode(ids, skip_special_tokens=False),
            special,
            {"tokenizer.json": content.encode()},
            **settings,
        )

    @classmethod
    def from_sentencepiece(cls, model: bytes, extra_ids: int = 100, **settings: Any) -> T5Tokenizer:
        """From the content of a `spiece.model`; the sentinels `<extra_id_0>` … are counted down from the end."""
        backend = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = backend.get_piece_size()
        special = {f"<extra_id_{i}>": size + extra_ids - 1 - i for i in range(extra_ids)}
        special |= {t: i for t in (PAD, EOS, "<unk>") if backend.id_to_piece(i := backend.piece_to_id(t)) == t}

        def encode(text: str) -> list[int]:
            ids, start = [], 0
            for match in SENTINEL.finditer(text):
                if match[0] in special:
                    ids += [*backend.encode(text[start : match.start()]), special[match[0]]]
                    start = match.end()
            return ids + backend.encode(text[start:])

        return cls(encode, lambda ids: backend.decode(ids), special, {"spiece.model": model}, **settings)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> T5Tokenizer:
        """From a checkpoint's files.

        Raises:
            SourceError: if there are none.
            CheckpointError: if they are damaged or another model's.
        """
        folder = Path(directory)
        settings: dict[str, Any] = {}
        try:
            if (folder / "tokenizer_config.json").is_file():
                content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
                settings["model_max_length"] = min(int(content.get("model_max_length", 512)), 512)
            if (folder / "tokenizer.json").is_file():
                return cls.from_tokenizers((folder / "tokenizer.json").read_text(encoding="utf-8"), **settings)
            if (folder / "spiece.model").is_file():
                return cls.from_sentencepiece((folder / "spiece.model").read_bytes(), **settings)
        except CheckpointError:
            raise
        except Exception as problem:  # the libraries' errors are bare Exceptions
            raise CheckpointError(f"The tokenizer's files in '{folder}' cannot be read ({problem}).") from None
        raise SourceError(f"'{folder}' has neither tokenizer.json nor spiece.model; those of t5-base fit.")

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the file that it was made from, and `tokenizer_config.json`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>", "tokenizer_class": "T5Tokenizer"}
        settings |= {"model_max_length": self.model_max_length}  # type: ignore[dict-item]
        for name, content in {**self.files, "tokenizer_config.json": json.dumps(settings, indent=2).encode()}.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_bytes(content)
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
            text: the text or texts; an empty one is `</s>` alone.
            padding: `True` or "longest"; "max_length"; `False` or "do_not_pad", for texts of one length.
            truncation: cut what is longer than `max_length`, keeping the `</s>`.
            max_length: tokens, `</s>` included; `model_max_length` by default.

        Returns:
            `input_ids` and `attention_mask`, int32 `(batch, time)`.

        Raises:
            UsageError: for something that is not text, unequal lengths without padding, or an unknown padding.
        """
        texts = texts_of(text, padding)
        limit = max_length or self.model_max_length
        rows = []
        for one in texts:
            ids = self._encode(one)
            rows.append([*(ids[: limit - 1] if truncation else ids), self.eos_token_id])
        return padded(rows, padding, limit, self.pad_token_id)

    def decode(self, token_ids: Any) -> str:
        """The text of one row of tokens, without special ones."""
        special = set(self.special.values())
        return self._decode([i for i in np.asarray(token_ids).tolist() if i not in special])

    def batch_decode(self, sequences: Any) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in sequences]
