"""Bark's processor: WordPiece ids of a text, padded to 256, and voice presets."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import check_return_tensors, read_json, write_json
from audiozoo.text.batches import tokens_of
from audiozoo.text.sentences import SENTENCE_END, sentences

# What a voice preset holds: semantic tokens (X,), two coarse codebooks (2, Y) and all eight (8, Y).
PARTS = {"semantic_prompt": 1, "coarse_prompt": 2, "fine_prompt": 2}
INDEX = "speaker_embeddings_path.json"
FOLDERS = ("speaker_embeddings", "prompts", "assets/prompts")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPOKEN = 40  # tokens of a text that are said in some 12 seconds; Bark stops after 15
_SOFTER_ENDS = (re.compile(r"(?<=[,;:])\s+|(?<=[，、；：])\s*"), re.compile(r"\s+"))


def check_voice_preset(preset: Mapping[str, Any], name: str = "The voice preset") -> dict[str, np.ndarray]:
    """The three arrays of a voice preset, whole numbers of the right shapes.

    Raises:
        UsageError: if one is missing or of another shape.
    """
    arrays = {}
    for part, dimensions in PARTS.items():
        if part not in preset:
            raise UsageError(f"{name} has no {part}; it needs {', '.join(PARTS)}.")
        array = np.asarray(preset[part])
        if array.ndim != dimensions or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
            raise UsageError(
                f"{name}'s {part} must be {dimensions}-dimensional and hold token numbers; it is a "
                f"{array.dtype} array of shape {array.shape}."
            )
        arrays[part] = array.astype(np.int32)
    return arrays


def load_voice_preset(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """A voice preset from an `.npz` file, as Suno's package ships 271 of.

    Raises:
        SourceError: if there is no such file.
        UsageError: if it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceError(f"There is no voice preset {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return check_voice_preset({name: file[name] for name in file.files}, str(path))
    except UsageError:
        raise
    except Exception as problem:  # zipfile's, NumPy's and the system's errors
        raise UsageError(f"{path} is no voice preset ({problem}).") from None


def save_voice_preset(path: str | os.PathLike[str], history: Mapping[str, Any]) -> None:
    """Write what `generate(…, return_history=True)` gave as an `.npz` that Suno's code and `transformers` read.

    Raises:
        UsageError: if it is no history, or the file's name does not end in `.npz`.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UsageError(f"A voice preset is an .npz file; {path.name} is not named so.")
    arrays = check_voice_preset(history, "The history")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    try:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class BarkProcessor:
    """Texts and voice presets to a Bark's inputs.

    Args:
        backend: BERT's tokenizer, of the `tokenizers` library; the checkpoint's is `bert-base-multilingual-cased`.
        voices: files of each named voice preset: one `.npz`, or one `.npy` for each part.
        max_length: tokens that every text is padded to, and that the model reads.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        voices: Mapping[str, Path | Mapping[str, Path]] | None = None,
        max_length: int = 256,
    ):
        missing = [token for token in _SPECIAL[:2] if backend.token_to_id(token) is None]
        if missing:
            raise CheckpointError(f"The vocabulary lacks {', '.join(missing)}, which BERT's has.")
        backend.no_padding()
        backend.no_truncation()
        self.backend, self.voices, self.max_length = backend, dict(voices or {}), max_length
        self.pad_token_id = int(backend.token_to_id("[PAD]") or 0)

    @classmethod
    def from_vocabulary(
        cls, vocabulary: Mapping[str, int], voices: Mapping[str, Any] | None = None, *, lower_case: bool = False
    ) -> BarkProcessor:
        """From the pieces of words of a `vocab.txt`, whose lines are numbered from 0."""
        backend = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocabulary), unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens([token for token in _SPECIAL if token in vocabulary])
        return cls(backend, voices)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> BarkProcessor:
        """From a checkpoint's files: `tokenizer.json` or `vocab.txt`, and its voice presets.

        Presets are those that `speaker_embeddings_path.json` lists, and the `.npz` files in the folders
        `speaker_embeddings`, `prompts` and `assets/prompts`.

        Raises:
            SourceError: if there is no tokenizer.
            CheckpointError: if a file is damaged or names files elsewhere.
        """
        folder = Path(directory)
        voices = _voices(folder)
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as problem:  # the library's errors are bare Exceptions
                raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read ({problem}).") from None
            return cls(backend, voices)
        if not (folder / "vocab.txt").is_file():
            raise SourceError(
                f"'{folder}' has neither tokenizer.json nor vocab.txt; those of bert-base-multilingual-cased fit."
            )
        try:
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError:
            raise CheckpointError(f"{folder / 'vocab.txt'} is no text in UTF-8.") from None
        settings = folder / "tokenizer_config.json"
        lower = bool(read_json(settings).get("do_lower_case", False)) if settings.is_file() else False
        vocabulary = {line.rstrip("\r"): index for index, line in enumerate(lines) if line}
        return cls.from_vocabulary(vocabulary, voices, lower_case=lower)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer and voice presets as `transformers` reads them."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "tokenizer.json", json.loads(self.backend.to_str()))
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        settings: dict[str, Any] = dict(zip(names, _SPECIAL, strict=True))
        lower = bool(getattr(self.backend.normalizer, "lowercase", False))
        settings |= {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
        write_json(folder / "tokenizer_config.json", settings)
        index: dict[str, Any] = {"repo_or_path": str(folder)}
        for name in self.voices:
            index[name] = {}
            for part, array in self.voice_preset(name).items():
                file = Path(FOLDERS[0]) / f"{name}_{part}.npy"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                np.save(folder / file, array)
                index[name][part] = str(file)
        write_json(folder / INDEX, index)

    @property
    def available_voice_presets(self) -> list[str]:
        """The names that `voice_preset` knows."""
        return list(self.voices)

    def voice_preset(self, preset: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A voice preset given by name, by file, or as its three arrays.

        Raises:
            UsageError: if it is none of them.
        """
        if isinstance(preset, Mapping):
            return check_voice_preset(preset)
        name = os.fspath(preset)
        if name in self.voices:
            files = self.voices[name]
            if isinstance(files, Path):
                return load_voice_preset(files)
            try:
                arrays = {part: np.load(file, allow_pickle=False) for part, file in files.items()}
            except (OSError, ValueError, EOFError) as problem:
                raise CheckpointError(f"The voice preset {name} cannot be read ({problem}).") from None
            return check_voice_preset(arrays, f"The voice preset {name}")
        for path in (Path(name), Path(f"{name}.npz")):
            if path.suffix == ".npz" and path.is_file():
                return load_voice_preset(path)
        known = f"; there are {', '.join(sorted(self.voices))}" if self.voices else ""
        raise UsageError(f"There is no voice preset {name!r}, neither by that name nor as an .npz file{known}.")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return tokens_of(self.backend, text)

    def sentences(self, text: str) -> list[str]:
        """The sentences of a text, each short enough for the model to say; long ones are cut at commas and spaces.

        A blank line ends a sentence too, as a heading does.

        Raises:
            UsageError: if there is nothing to say.
        """
        whole = (part.strip() for sentence in sentences(text) for part in SENTENCE_END.split(sentence))
        said = filter(self.encode, whole)  # none of signs that the tokenizer leaves out
        found = [part for sentence in said for part in self._cut(sentence, _SOFTER_ENDS)]
        if not found:
            raise UsageError("There is nothing to say: the text is empty.")
        return found

    def _cut(self, text: str, ends: Sequence[re.Pattern[str]]) -> list[str]:
        """Parts of a text that the model can say, as long as may be, cut at the first kind of end that will do."""
        limit = min(self.max_length, SPOKEN)
        if not ends or len(self.encode(text)) <= limit:
            return [text]
        parts: list[str] = []
        for piece in filter(None, ends[0].split(text)):
            for part in self._cut(piece, ends[1:]):
                longer = f"{parts[-1]} {part}" if parts else ""
                if parts and len(self.encode(longer)) <= limit:
                    parts[-1] = longer
                else:
                    parts.append(part)
        return parts

    def __call__(
        self,
        text: str | Sequence[str],
        voice_preset: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        *,
        max_length: int | None = None,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Ids of texts, all padded to one length, and the history prompt of a voice.

        Args:
            text: one text or several.
            voice_preset: a name, an `.npz` file, or the three arrays; one for all texts.
            max_length: tokens to pad to; the model's by default. Longer texts stay, with a warning: the model does not
                read what is beyond.
            return_attention_mask: return which tokens are text.
            return_tensors: "np" or `None`; results are NumPy arrays.

        Returns:
            `input_ids`, `attention_mask`, int32 `(batch, time)`, and with a voice `history_prompt`.

        Raises:
            UsageError: if there is no text.
        """
        check_return_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(one, str) for one in texts):
            raise UsageError("Bark says a text or a list of texts, at least one.")
        rows = [self.encode(one) for one in texts]
        for one, row in zip(texts, rows, strict=True):
            if not row:
                raise UsageError(f"There is nothing to say in {one!r}.")
        limit = self.max_length if max_length is None else max_length
        if max(map(len, rows)) > limit:
            lost = max(len(row) - limit for row in rows)
            warnings.warn(
                f"A text has {lost} tokens more than the {limit} that Bark reads; they will not be said. "
                "audiozoo.models.bark.speak says long texts sentence by sentence.",
                stacklevel=2,
            )
        length = max(limit, *map(len, rows))
        input_ids = np.full((len(rows), length), self.pad_token_id, np.int32)
        attention_mask = np.zeros((len(rows), length), np.int32)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if return_attention_mask:
            inputs["attention_mask"] = attention_mask
        if voice_preset is not None:
            inputs["history_prompt"] = self.voice_preset(voice_preset)
        return inputs


def _voices(folder: Path) -> dict[str, Path | Mapping[str, Path]]:
    """The voice presets of a directory, by name."""
    voices: dict[str, Any] = {}
    for name in FOLDERS:
        for file in sorted((folder / name).rglob("*.npz")):
            voices[file.relative_to(folder / name).with_suffix("").as_posix()] = file
    if (folder / INDEX).is_file():
        for name, parts in read_json(folder / INDEX).items():
            if name == "repo_or_path":
                continue
            if not isinstance(parts, Mapping) or not all(isinstance(parts.get(part), str) for part in PARTS):
                raise CheckpointError(f"{folder / INDEX}: {name} does not name the files {', '.join(PARTS)}.")
            for file in parts.values():
                if os.path.isabs(file) or ".." in Path(file).parts:
                    raise CheckpointError(f"{folder / INDEX}: {name} names {file}, which lies outside the checkpoint.")
            voices[name] = {part: folder / parts[part] for part in PARTS}
    return voices
