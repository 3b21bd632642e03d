"""Speech2Text2's processor: wav2vec 2.0's waveforms in, byte-pair pieces of words, joined by "@@ ", out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.processors import read_json, read_vocabulary, tidied, token_lists, write_json
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor, Wav2Vec2Processor, fairseq_symbols
from audiozoo.processors.wav2vec2_bert import speech_extractor

CONTINUED, WORD_END = "@@ ", "</w>"


def _fairseq_dictionary(folder: Path) -> Path | None:
    """fairseq's list of pieces, where nothing else says what they are."""
    found = sorted(folder.glob("dict.*.txt"))
    others = any((folder / name).is_file() for name in ("vocab.json", "sentencepiece.bpe.model"))
    return found[0] if len(found) == 1 and not others else None


class Speech2Text2Tokenizer:
    """Byte-pair pieces (arXiv 1508.07909) as subword-nmt writes them; without merges, as published, it only decodes.

    Args:
        encoder: tokens and their numbers.
        merges: pairs in the order in which they are merged, or None.
        do_lower_case: text to encode in small letters.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        merges: Sequence[tuple[str, str]] | None = None,
        do_lower_case: bool = False,
    ) -> None:
        if missing := [token for token in ("<s>", "<pad>", "</s>", "<unk>") if token not in encoder]:
            raise CheckpointError(f"The vocabulary has no {', '.join(missing)}.")
        self.encoder, self.do_lower_case = dict(encoder), do_lower_case
        self.decoder = {index: token for token, index in encoder.items()}
        self.ranks = None if merges is None else {pair: rank for rank, pair in enumerate(merges)}
        self.bos_token_id, self.pad_token_id = encoder["<s>"], encoder["<pad>"]
        self.eos_token_id, self.unk_token_id = encoder["</s>"], encoder["<unk>"]

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Speech2Text2Tokenizer:
        """From `vocab.json` and, if it is there, `merges.txt`; or from fairseq's `dict.X.txt`, which only decodes."""
        folder = Path(directory)
        if (dictionary := _fairseq_dictionary(folder)) is not None:
            pieces = ["<s>", "<pad>", "</s>", "<unk>", *fairseq_symbols(dictionary)]
            return cls({piece: i for i, piece in enumerate(pieces)})
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        merges = None
        if (folder / "merges.txt").is_file():
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[:-1]
            merges = [(left, right) for left, right in (line.split()[:2] for line in lines)]
        return cls(read_vocabulary(folder / "vocab.json"), merges, bool(config.get("do_lower_case", False)))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` 4.40 read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.encoder)
        if self.ranks is not None:
            (folder / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in self.ranks), encoding="utf-8")
        fields = {"do_lower_case": self.do_lower_case, "tokenizer_class": type(self).__name__}
        write_json(folder / "tokenizer_config.json", fields)

    def __len__(self) -> int:
        return len(self.encoder)

    def _pieces(self, word: str) -> list[str]:
        """A word's letters, merged pair by pair, the earliest learnt first; all but the last marked as going on."""
        ranks = self.ranks or {}
        pieces = [*word[:-1], word[-1] + WORD_END]
        while len(pieces) > 1:
            best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                joined = tuple(pieces[i : i + 2]) == best
                merged.append("".join(best) if joined else pieces[i])
                i += 2 if joined else 1
            pieces = merged
        pieces[-1] = pieces[-1].removesuffix(WORD_END)
        return [piece + CONTINUED.strip() for piece in pieces[:-1]] + pieces[-1:]

    def __call__(self, text: str | Sequence[str], padding: bool = False) -> dict[str, Any]:
        """Tokens of a text or several, nothing before and nothing after.

        Raises:
            UsageError: if the checkpoint has no merges.
        """
        if self.ranks is None:
            raise UsageError("This vocabulary has no merges.txt: it decodes tokens, but no text can be encoded.")
        texts = [text] if isinstance(text, str) else list(text)
        rows = []
        for line in texts:
            words = (line.lower() if self.do_lower_case else line).split()
            rows.append([self.encoder.get(p, self.unk_token_id) for word in words for p in self._pieces(word)])
        return token_lists(rows, self.pad_token_id, padding, alone=isinstance(text, str))

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = True
    ) -> str:
        """The text of tokens.

        Args:
            token_ids: tokens.
            skip_special_tokens: leave out beginnings, ends, padding and what is unknown.
            clean_up_tokenization_spaces: no space before a full stop, a comma and so on, as `transformers` 4 had it.
        """
        special = {self.bos_token_id, self.pad_token_id, self.eos_token_id, self.unk_token_id}
        indices = np.asarray(token_ids).reshape(-1).tolist()
        tokens = [self.decoder.get(i, "<unk>") for i in indices if not (skip_special_tokens and i in special)]
        text = "".join(" ".join(tokens).split(CONTINUED))
        return tidied(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens, **options) for row in sequences]


class Speech2Text2Processor(Wav2Vec2Processor):
    """wav2vec 2.0's processor with byte-pair pieces for letters."""

    def __init__(self, feature_extractor: Wav2Vec2FeatureExtractor, tokenizer: Any = None) -> None:
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Speech2Text2Processor:
        """From the files of a checkpoint directory.

        Raises:
            UsageError: for a language: such a checkpoint has one.
        """
        if target_lang is not None:
            raise UsageError("A Speech2Text2 checkpoint translates into one language; leave target_lang out.")
        return cls(speech_extractor(directory), Speech2Text2Tokenizer.from_directory(directory))

    @staticmethod
    def recognise(directory: str | os.PathLike[str]) -> bool:
        """Does a directory of a translator hold a vocabulary of this kind?"""
        folder = Path(directory)
        if not (folder / "vocab.json").is_file():
            return _fairseq_dictionary(folder) is not None
        said = []
        for name in ("tokenizer_config.json", "config.json"):
            config = read_json(folder / name) if (folder / name).is_file() else {}
            own = config.get("config") or {}  # a native checkpoint keeps the sizes one level down
            decoder = config.get("decoder") or {}
            said += [config.get("tokenizer_class"), decoder.get("model_type"), own.get("decoder_type")]
        return any(name in ("Speech2Text2Tokenizer", "speech_to_text_2") for name in said)
