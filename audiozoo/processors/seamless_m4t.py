"""SeamlessM4T's processor, of both versions: Kaldi filterbanks in pairs, or text with its language in front."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    pad_batch,
    padded_labels,
    read_json,
    read_vocabulary,
    waveform_batch,
    write_json,
)
from audiozoo.processors.speech_to_text import filterbanks, padded_filterbanks
from audiozoo.text.batches import tokens_of


def normalised(features: Float[np.ndarray, "frames mels"]) -> Float[np.ndarray, "frames mels"]:
    r"""Each band to mean 0 and variance 1 over the utterance: $(x - \mu) / \sqrt{s^2 + 10^{-7}}$, $s^2$ unbiased."""
    x = features.astype(np.float64)
    variance = x.var(axis=0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    return ((x - x.mean(axis=0)) / np.sqrt(variance + 1e-7)).astype(np.float32)


class SeamlessM4TFeatureExtractor(FeatureExtractor):
    """Waveforms to model inputs; the arguments are the fields of `preprocessor_config.json`.

    Args:
        feature_size: mel bands, as files call them twice.
        sampling_rate: Hz.
        num_mel_bins: mel bands.
        padding_value: what shorter utterances are padded with.
        stride: frames of 10 ms side by side in one of the model's.
    """

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 80,
        padding_value: float = 0.0,
        stride: int = 2,
    ) -> None:
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.padding_value = padding_value
        self.stride = stride

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> SeamlessM4TFeatureExtractor:
        """From `preprocessor_config.json` or `processor_config.json`; else the defaults."""
        folder = Path(directory)
        return cls.of_settings(extractor_settings(folder) or {}, folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"return_attention_mask": True}

    def in_jax(
        self, waveforms: Float[Array, "batch time"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch steps features"], Int[Array, "batch steps"]]:
        """`input_features` and `attention_mask` of padded waveforms inside `jax.jit`: to train."""
        x, real = padded_filterbanks(
            waveforms, lengths, self.num_mel_bins, self.sampling_rate, floor=0.0, added=1e-7, correction=1
        )
        x = jnp.where(real[..., None], x, self.padding_value)
        missing = -x.shape[1] % self.stride
        x = jnp.pad(x, ((0, 0), (0, missing), (0, 0)), constant_values=self.padding_value)
        real = jnp.pad(real, ((0, 0), (0, missing)))
        # A step counts as speech if its second frame does.
        return x.reshape(len(x), -1, self.stride * x.shape[2]), real[:, 1 :: self.stride].astype(jnp.int32)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = 2,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        do_normalize_per_mel_bins: bool = True,
    ) -> dict[str, np.ndarray]:
        """Features of one waveform or of a batch of any lengths.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            padding: `True` or "longest", "max_length", or `False` (then all must have one length).
            max_length: frames of 10 ms.
            truncation: cut what is longer than `max_length`.
            pad_to_multiple_of: round the frames up; what then does not fill a stride is left out.
            return_attention_mask: leave the mask out if False.
            return_tensors: "np" or `None`; results are NumPy arrays.
            do_normalize_per_mel_bins: bring each band to mean 0 and variance 1 over the utterance.

        Returns:
            `input_features` float32 `(batch, frames / stride, stride · num_mel_bins)` and `attention_mask` int32.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or too short for one step.
        """
        check_return_tensors(return_tensors)
        window, hop = int(self.sampling_rate * 0.025), int(self.sampling_rate * 0.010)
        least = window + (self.stride - 1) * hop
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=least)
        features = filterbanks(waveforms, self.num_mel_bins, self.sampling_rate)
        if do_normalize_per_mel_bins:
            features = [normalised(x) for x in features]
        batch, mask = pad_batch(
            features,
            padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_value=self.padding_value,
        )
        steps = batch.shape[1] // self.stride
        batch = batch[:, : steps * self.stride].reshape(len(batch), steps, -1)
        inputs = {"input_features": batch}
        if return_attention_mask is False:
            return inputs
        # A step counts as speech if its second frame does.
        return inputs | {"attention_mask": mask[:, : steps * self.stride][:, 1 :: self.stride]}


class SentencePieces:
    """A SentencePiece model with NLLB's numbers: padding in front of its pieces, added tokens behind them.

    Args:
        content: of the model's file.
        added: tokens that are not in it, and their numbers: languages above all.
    """

    def __init__(self, content: bytes, added: Mapping[str, int]) -> None:
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.special = dict(added) | {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3}
        self._names = {index: token for token, index in self.special.items()}
        self._cut = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def __len__(self) -> int:
        return max(self.pieces.get_piece_size(), *self.special.values()) + 1

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's pieces; special tokens written out in it stay whole."""
        parts = self._cut.split(text)
        return [i for part in parts for i in ([self.special[part]] if part in self.special else self._encoded(part))]

    def _encoded(self, text: str) -> list[int]:
        return [index + 1 for index in self.pieces.encode(text)]

    def token(self, index: int) -> str | None:
        """The piece or special token of a number, or None if there is none."""
        if index in self._names:
            return self._names[index]
        return self.pieces.id_to_piece(index - 1) if 0 < index <= self.pieces.get_piece_size() else None

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of numbers; what has none is left out."""
        tokens = [self.token(i) or "" for i in ids if not (skip_special_tokens and i in self._names)]
        if tokens:
            tokens[0] = tokens[0].removeprefix("▁")
        return "".join(tokens).replace("▁", " ")


class SeamlessM4TTokenizer:
    """NLLB's pieces of words, with a language in front: `<language> … </s>`, or `</s> <language> … </s>` for targets.

    Args:
        file: a `tokenizer.json`, or a SentencePiece model (`….model`).
        src_lang: language of the texts to translate, until another is named.
        tgt_lang: language of target texts, likewise.
        added: for a SentencePiece model: `__eng__` and all the other tokens that are not in it, and their numbers.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if it is damaged or lacks special tokens.
    """

    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int], bool], str]
    _token: Callable[[int], str | None]

    def __init__(
        self,
        file: str | os.PathLike[str],
        src_lang: str = "eng",
        tgt_lang: str = "fra",
        added: Mapping[str, int] | None = None,
    ) -> None:
        if not Path(file).is_file():
            raise SourceError(f"There is no file {file}.")
        self.file, self.src_lang, self.tgt_lang = Path(file), src_lang.strip("_"), tgt_lang.strip("_")
        read = self._from_sentencepiece if self.file.suffix == ".model" else self._from_tokenizers
        try:
            special = read(added or {})
        except Exception as error:  # the libraries raise nothing narrower
            library = "sentencepiece" if self.file.suffix == ".model" else "tokenizers"
            raise CheckpointError(f"'{file}' is no tokenizer of the library {library} ({error}).") from None
        if missing := [token for token in ("<pad>", "<unk>", "<s>", "</s>") if token not in special]:
            raise CheckpointError(f"'{file}' has no {', '.join(missing)}.")
        self.special = special
        self.pad_token_id, self.unk_token_id = special["<pad>"], special["<unk>"]
        self.bos_token_id, self.eos_token_id = special["<s>"], special["</s>"]
        self.lang_code_to_id = {
            name.strip("_"): index for name, index in special.items() if name.startswith("__") and name.endswith("__")
        }

    def _from_tokenizers(self, added: Mapping[str, int]) -> dict[str, int]:
        import tokenizers

        backend = tokenizers.Tokenizer.from_file(str(self.file))
        backend.no_padding()
        backend.no_truncation()
        self._size = backend.get_vocab_size()
        self._encode = lambda text: tokens_of(backend, text)
        self._decode = lambda ids, skip: backend.decode(ids, skip_special_tokens=skip)
        self._token = backend.id_to_token
        special = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        control = {token: backend.token_to_id(token) for token in ("<pad>", "<unk>", "<s>", "</s>")}
        return special | {token: index for token, index in control.items() if index is not None}

    def _from_sentencepiece(self, added: Mapping[str, int]) -> dict[str, int]:
        backend = SentencePieces(self.file.read_bytes(), added)
        self._size, self._token = len(backend), backend.token
        self._encode, self._decode = backend.encode, backend.decode
        return backend.special

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> SeamlessM4TTokenizer:
        """From `tokenizer.json`, or from `sentencepiece.bpe.model`, with the languages of `tokenizer_config.json`."""
        folder = Path(directory)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        languages: dict[str, Any] = {name: str(config[name]) for name in ("src_lang", "tgt_lang") if config.get(name)}
        if (folder / "tokenizer.json").is_file():
            return cls(folder / "tokenizer.json", **languages)
        file = folder / "sentencepiece.bpe.model"
        if not file.is_file():
            raise SourceError(f"'{folder}' has no tokenizer.json and no sentencepiece.bpe.model.")
        if "added_tokens_decoder" in config:
            added = {str(token["content"]): int(i) for i, token in config["added_tokens_decoder"].items()}
        elif (folder / "added_tokens.json").is_file():
            added = read_vocabulary(folder / "added_tokens.json")
        else:
            raise CheckpointError(f"'{folder}' does not say which tokens its languages are: see added_tokens.json.")
        return cls(file, **languages, added=added)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        fields: dict[str, Any] = {"src_lang": self.src_lang, "tgt_lang": self.tgt_lang}
        fields["tokenizer_class"] = type(self).__name__
        name = self.file.name
        if self.file.suffix == ".model":
            name = "sentencepiece.bpe.model"
            fields["added_tokens_decoder"] = {str(i): {"content": t, "special": True} for t, i in self.special.items()}
            fields["additional_special_tokens"] = [f"__{language}__" for language in self.lang_code_to_id]
        (folder / name).write_bytes(self.file.read_bytes())
        write_json(folder / "tokenizer_config.json", fields)

    def __len__(self) -> int:
        return self._size

    def token(self, index: int) -> str | None:
        """The piece of a number, "▁" for its spaces; None if there is none."""
        return self._token(index)

    def language(self, name: str) -> int:
        """The token of a language; `eng` and `__eng__` are the same.

        Raises:
            UsageError: if there is no such language.
        """
        code = name.replace("__", "")
        if code not in self.lang_code_to_id:
            known = ", ".join(sorted(self.lang_code_to_id)) or "none"
            raise UsageError(f"The tokenizer has no language {name!r}; there are {known}.")
        return self.lang_code_to_id[code]

    def _rows(self, text: str | Sequence[str], prefix: list[int]) -> list[list[int]]:
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(line, str) for line in texts):
            raise UsageError("Give one text, or a list of texts.")
        return [[*prefix, *self._encode(line), self.eos_token_id] for line in texts]

    def _padded(self, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return ids, mask

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        *,
        text_target: str | Sequence[str] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> dict[str, np.ndarray]:
        """Tokens of one text or several, padded to the longest.

        Args:
            text: to translate.
            text_target: translations; they come back as `labels`, with -100 behind each, or by themselves as
                `input_ids`.
            src_lang: language of `text`.
            tgt_lang: language of `text_target`.

        Returns:
            `input_ids` and `attention_mask`, int32 `(batch, time)`, and `labels` with both kinds of text.

        Raises:
            UsageError: without a text; for an unknown language.
        """
        if text is None and text_target is None:
            raise UsageError("Give text, text_target, or both.")
        target: list[list[int]] = []
        if text_target is not None:
            target = self._rows(text_target, [self.eos_token_id, self.language(tgt_lang or self.tgt_lang)])
        rows = target if text is None else self._rows(text, [self.language(src_lang or self.src_lang)])
        ids, mask = self._padded(rows)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return inputs | {"labels": padded_labels(target)} if text is not None and target else inputs

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self._decode(np.asarray(ids).reshape(-1).tolist(), skip_special_tokens)

    def batch_decode(self, ids: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens) for row in ids]


class SeamlessM4TProcessor:
    """Feature extractor and tokenizer together."""

    def __init__(self, feature_extractor: SeamlessM4TFeatureExtractor, tokenizer: SeamlessM4TTokenizer) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> SeamlessM4TProcessor:
        """Both from a checkpoint's directory."""
        return cls(
            SeamlessM4TFeatureExtractor.from_directory(directory), SeamlessM4TTokenizer.from_directory(directory)
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write both."""
        self.feature_extractor.save(directory)
        self.tokenizer.save(directory)

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        text: str | Sequence[str] | None = None,
        text_target: str | Sequence[str] | None = None,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **options: Any,
    ) -> dict[str, np.ndarray]:
        """Inputs of the model, of speech or of text.

        Args:
            audio: waveforms; see `SeamlessM4TFeatureExtractor`.
            sampling_rate: Hz of `audio`.
            text: texts to translate; see `SeamlessM4TTokenizer`.
            text_target: translations, which come back as `labels`, with -100 behind each.
            src_lang: language of `text`.
            tgt_lang: language of `text_target`.
            options: of the feature extractor.

        Raises:
            UsageError: for speech and text at once, or neither.
        """
        if audio is not None and text is not None:
            raise UsageError("Give speech or text, not both: the model translates one of them.")
        if audio is None:
            return self.tokenizer(text, text_target=text_target, src_lang=src_lang, tgt_lang=tgt_lang)
        inputs = self.feature_extractor(audio, sampling_rate, **options)
        if text_target is None:
            return inputs
        target = self.tokenizer(text_target=text_target, tgt_lang=tgt_lang)
        return inputs | {"labels": np.where(target["attention_mask"], target["input_ids"], -100)}

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(self, ids: Any, skip_special_tokens: bool = False) -> list[str]:
        """The text of each row."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens)
