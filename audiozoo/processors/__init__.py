"""From waveforms and text to a model's inputs, with Hugging Face's names and layouts, and back to text.

One module a paper; what they share is here: reading a batch out of whatever the user gives, padding it, and one clear
sentence for what cannot be used.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints

import numpy as np

from audiozoo.audio.files import check_waveform
from audiozoo.errors import AudioError, CheckpointError, SourceError, UsageError

LARGEST = 1_000_000  # size that a setting can have: Hz, samples, bands, frames


def waveform_batch(
    waveforms: Any, sampling_rate: int | None, expected_rate: int, minimum_samples: int
) -> list[np.ndarray]:
    """The mono waveforms in `waveforms`, each checked, as float32 `(time,)`.

    Args:
        waveforms: one waveform (array `(time,)` or list of floats), or a batch (array `(batch, time)`, or a list of
            waveforms of any lengths).
        sampling_rate: Hz, as the caller says; `None` warns.
        expected_rate: Hz that the model was trained with.
        minimum_samples: the fewest samples that a waveform may have.

    Raises:
        AudioError: in a batch, the sentence begins with the index of the waveform.
    """
    if sampling_rate is None:
        warnings.warn(
            f"No sampling_rate was given; the waveform is taken to be at {expected_rate} Hz, as the model expects.",
            stacklevel=3,
        )
    if isinstance(waveforms, list | tuple):
        if not waveforms:
            raise AudioError("The waveform is empty (0 samples).")
        batched = np.ndim(waveforms[0]) > 0
    else:
        shape = np.shape(waveforms)
        batched = len(shape) > 1
        if len(shape) > 2:
            raise AudioError(
                f"The waveforms have shape {shape}; (time,) or (batch, time), one channel each, is expected."
            )
        if batched and 0 < shape[1] <= 2 and shape[0] >= minimum_samples:
            raise AudioError(
                f"The waveform has shape {shape}, which looks like (time, channels), but one channel is expected; "
                "average the channels, or read the file with audiozoo.audio.read(path, mono=True)."
            )
    if not batched:
        samples = check_waveform(waveforms, sampling_rate, expected_rate, minimum_samples=minimum_samples)
        return [samples.astype(np.float32, copy=False)]
    checked = []
    for index, waveform in enumerate(waveforms):
        try:
            samples = check_waveform(waveform, sampling_rate, expected_rate, minimum_samples=minimum_samples)
        except AudioError as problem:
            raise AudioError(f"Item {index} of the batch: {problem}") from None
        checked.append(samples.astype(np.float32, copy=False))
    if not checked:
        raise AudioError("The batch is empty (0 waveforms).")
    return checked


def pad_batch(
    waveforms: Sequence[np.ndarray],
    padding: bool | str,
    *,
    max_length: int | None = None,
    truncation: bool = False,
    pad_to_multiple_of: int | None = None,
    padding_value: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Waveforms, or frames of features, of one length, and which of them are real.

    Args:
        waveforms: float32 `(time,)` or `(time, channels)` each.
        padding: `True` or "longest"; "max_length" (what is longer stays, unless there is `truncation`); `False` or
            "do_not_pad" (then they must have one length already).
        max_length: samples, or frames.
        truncation: cut what is longer than `max_length`.
        pad_to_multiple_of: round the length up to a multiple.
        padding_value: what fills.

    Returns:
        float32 `(batch, time)` or `(batch, time, channels)`, and an int32 mask of 0 and 1, `(batch, time)`.
    """
    if padding not in (True, False, "longest", "max_length", "do_not_pad"):
        raise UsageError(f"There is no padding '{padding}'; choose longest, max_length or do_not_pad.")
    if (truncation or padding == "max_length") and max_length is None:
        raise UsageError("Padding to max_length and truncation need a max_length.")

    def rounded(length: int) -> int:
        return length if not pad_to_multiple_of else -(-length // pad_to_multiple_of) * pad_to_multiple_of

    if truncation and max_length is not None:
        waveforms = [waveform[: rounded(max_length)] for waveform in waveforms]
    lengths = [len(waveform) for waveform in waveforms]
    length = max(lengths)
    if padding in (True, "longest"):
        length = rounded(length)
    elif padding == "max_length" and max_length is not None:
        length = max(length, rounded(max_length))
    elif min(lengths) < length:
        raise UsageError(
            f"Recordings of {min(lengths)} to {length} steps do not make one array; choose padding='longest'."
        )
    batch = np.full((len(waveforms), length, *waveforms[0].shape[1:]), padding_value, np.float32)
    mask = np.zeros((len(waveforms), length), np.int32)
    for row, waveform in enumerate(waveforms):
        batch[row, : len(waveform)] = waveform
        mask[row, : len(waveform)] = 1
    return batch, mask


def token_lists(rows: Sequence[list[int]], pad_token_id: int, padding: bool, *, alone: bool) -> dict[str, Any]:
    """Tokens of texts as `input_ids` and `attention_mask`.

    Args:
        rows: the tokens of each text.
        pad_token_id: what fills.
        padding: bring all to one length.
        alone: there is one text, and no batch.
    """
    longest = max(map(len, rows)) if padding else 0
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    ids = [row + [pad_token_id] * (longest - len(row)) for row in rows]
    return {"input_ids": ids[0], "attention_mask": mask[0]} if alone else {"input_ids": ids, "attention_mask": mask}


def padded_labels(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Tokens of texts as targets, int32 `(batch, tokens)`; -100, which no loss counts, behind those of a text."""
    labels = np.full((len(rows), max(map(len, rows))), -100, np.int32)
    for row, ids in zip(labels, rows, strict=True):
        row[: len(ids)] = ids
    return labels


def tidied(text: str) -> str:
    """A text without spaces before a full stop, a comma and so on, as `transformers` 4 decoded every text."""
    for spaced, tidy in _TIDIED:
        text = text.replace(spaced, tidy)
    return text


_TIDIED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def zero_mean_unit_variance(waveform: np.ndarray) -> np.ndarray:
    r"""$(x - \bar x) / \sqrt{\mathrm{var}(x) + 10^{-7}}$ over one unpadded waveform."""
    return (waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)


def check_return_tensors(return_tensors: str | None) -> None:
    """Outputs are NumPy arrays, which JAX takes as they are; anything else gets a sentence."""
    if return_tensors not in (None, "np"):
        raise UsageError(
            f"audiozoo's processors return NumPy arrays; return_tensors='{return_tensors}' is not offered."
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise CheckpointError(f"'{path}' is not valid JSON ({problem}); it may be truncated.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' does not hold a JSON object.")
    return content


def extractor_settings(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's files say of its feature extractor, or None if there are none of these files.

    Raises:
        SourceError: if there is no such directory.
        CheckpointError: if a file is no JSON object.
    """
    if not folder.is_dir():
        raise SourceError(f"There is no directory '{folder}'.")
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder / "preprocessor_config.json")
    if (folder / "processor_config.json").is_file():
        return read_json(folder / "processor_config.json").get("feature_extractor", {})
    return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value out of JSON is of a type; whole numbers are numbers, and lists may be tuples."""
    if get_origin(kind) in (Union, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    kind, parts = get_origin(kind) or kind, get_args(kind)
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    if kind is tuple:
        return isinstance(value, list | tuple) and all(_is(one, parts[0]) for one in value)
    return isinstance(value, kind)


def settings_of(cls: Any, fields: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Those of a file's fields that are arguments of a class, each of the type that the argument has.

    Raises:
        CheckpointError: if one is of another type, or a size is less than 1 or absurd.
    """
    types = {name: kind for name, kind in get_type_hints(cls.__init__).items() if name in fields}
    for name, kind in types.items():
        if not _is(fields[name], kind):
            wanted = cls.__init__.__annotations__[name]  # as it is written
            raise CheckpointError(f"'{source}' has {name} {fields[name]!r:.60}, which is no {wanted}.")
        if kind is int and not 1 <= fields[name] <= LARGEST:
            raise CheckpointError(
                f"'{source}' has {name} {fields[name]}; it must be at least 1, and at most {LARGEST:,}."
            )
    return {name: fields[name] for name in types}


def read_vocabulary(path: Path) -> dict[str, int]:
    """The tokens and their numbers in a checkpoint's `vocab.json`.

    Raises:
        CheckpointError: if what stands beside a token cannot be its number.
    """
    return numbered(read_json(path), path)


def numbered(vocabulary: Mapping[str, Any], source: Path) -> dict[str, int]:
    """A vocabulary out of a file, whose tokens have numbers from 0 on.

    Raises:
        CheckpointError: if what stands beside a token cannot be its number.
    """
    for token, index in vocabulary.items():
        if not _is(index, int) or index < 0:
            raise CheckpointError(f"'{source}' gives the token {token!r} the number {index!r:.60}.")
    return dict(vocabulary)


class FeatureExtractor:
    """A feature extractor: its arguments are the fields of its `preprocessor_config.json`."""

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], source: Path) -> Self:
        """The extractor that a file's fields describe; those that it does not know are passed over.

        Raises:
            CheckpointError: they are another extractor's, or see `settings_of`.
        """
        kind = settings.get("feature_extractor_type", cls.__name__)
        if kind != cls.__name__:
            raise CheckpointError(f"'{source}' holds the settings of a {kind}, not of a {cls.__name__}.")
        try:
            return cls(**settings_of(cls, settings, source))
        except UsageError as error:
            raise CheckpointError(f"'{source}': {error}") from None

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {}

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `preprocessor_config.json` as `transformers` does."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        named = {"padding_side": "right", "feature_extractor_type": type(self).__name__}
        fields = named | vars(self) | self.saved_besides()
        write_json(folder / "preprocessor_config.json", dict(sorted(fields.items())))
