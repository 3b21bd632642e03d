"""XLS-R's processor: wav2vec 2.0's, and for speech translation mBART-50's pieces of words in 52 languages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import SourceError, UsageError
from audiozoo.processors import read_json, token_lists
from audiozoo.processors.speech_to_text_2 import Speech2Text2Processor
from audiozoo.processors.wav2vec2 import Wav2Vec2FeatureExtractor, Wav2Vec2Processor
from audiozoo.processors.wav2vec2_bert import speech_extractor

# arXiv 2008.00401, Table 1: the 25 of mBART and 27 more, in the order of their tokens.
_CODES = """
ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO
ru_RU si_LK tr_TR vi_VN zh_CN af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF
pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI
"""
LANGUAGES = tuple(_CODES.split())


class MBart50Tokenizer:
    """Pieces of words by SentencePiece, languages behind them: a text is its language, its pieces, and an end.

    Args:
        model: a SentencePiece model's file (`sentencepiece.bpe.model`).
        tgt_lang: the language of the texts.

    Raises:
        SourceError: if there is no such file.
        UsageError: if there is no such language.
    """

    def __init__(self, model: str | os.PathLike[str], tgt_lang: str = "en_XX") -> None:
        import sentencepiece

        if not Path(model).is_file():
            raise SourceError(f"There is no file {model}.")
        self.file = Path(model)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        # <s>, <pad>, </s>, <unk>, then the pieces from the model's fourth on; then the languages, then <mask>.
        size = self.pieces.get_piece_size()
        self.lang_code_to_id = {code: size + 1 + i for i, code in enumerate(LANGUAGES)}
        self.bos_token_id, self.pad_token_id, self.eos_token_id, self.unk_token_id = 0, 1, 2, 3
        self.mask_token_id = size + 1 + len(LANGUAGES)
        self.set_target_lang(tgt_lang)

    def set_target_lang(self, target_lang: str) -> None:
        """Choose the language of the texts.

        Raises:
            UsageError: if there is no such language.
        """
        if target_lang not in self.lang_code_to_id:
            raise UsageError(f"There is no language {target_lang!r}; there are {', '.join(LANGUAGES[:8])} ….")
        self.target_lang = target_lang

    def __len__(self) -> int:
        return self.mask_token_id + 1

    def __call__(self, text: str | Sequence[str], padding: bool = False) -> dict[str, Any]:
        """Tokens of a text or several: its language, its pieces, `</s>`."""
        texts = [text] if isinstance(text, str) else list(text)
        rows = []
        for line in texts:
            pieces = [self.unk_token_id if i == 0 else i + 1 for i in self.pieces.encode(line)]
            rows.append([self.lang_code_to_id[self.target_lang], *pieces, self.eos_token_id])
        return token_lists(rows, self.pad_token_id, padding, alone=isinstance(text, str))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of tokens; with `skip_special_tokens` without languages, padding and ends."""
        special = {0: "<s>", 1: "<pad>", 2: "</s>", 3: "<unk>", self.mask_token_id: "<mask>"}
        special |= {index: code for code, index in self.lang_code_to_id.items()}
        pieces: list[str] = []
        for index in np.asarray(token_ids).reshape(-1).tolist():
            if index not in special:
                pieces.append(self.pieces.id_to_piece(index - 1))
            elif not skip_special_tokens:
                pieces.append(special[index])
        return "".join(pieces).replace("▁", " ").strip()

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Put the model's file into a directory, under the name that `from_directory` looks for."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sentencepiece.bpe.model").write_bytes(self.file.read_bytes())


class XLSRProcessor(Wav2Vec2Processor):
    """wav2vec 2.0's processor, with letters; of a checkpoint that translates, mBART-50's or Speech2Text2's pieces."""

    def __init__(self, feature_extractor: Wav2Vec2FeatureExtractor, tokenizer: Any = None) -> None:
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> XLSRProcessor:
        """From the files of a checkpoint directory."""
        folder = Path(directory)
        if Speech2Text2Processor.recognise(folder):
            found: Any = Speech2Text2Processor.from_directory(folder, target_lang)
            return cls(found.feature_extractor, found.tokenizer)
        if not (folder / "sentencepiece.bpe.model").is_file():
            found = Wav2Vec2Processor.from_directory(folder, target_lang)
            return cls(found.feature_extractor, found._tokenizer)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        language = target_lang or config.get("tgt_lang") or "en_XX"
        tokenizer = MBart50Tokenizer(folder / "sentencepiece.bpe.model", language)
        return cls(speech_extractor(folder), tokenizer)
