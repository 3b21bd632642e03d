"""Recordings and texts of any length for models that write a text for a short one: cut, decode, join.

An encoder-decoder that was trained on sentences forgets the middle of a long recording. Cut into pieces of some twenty
seconds, each cut in the quietest moment of its last third, it hears sentences again, and the pieces' times are the
segments'. Where nobody speaks it writes something all the same; with `vad` it does not hear that. A long text is cut
behind sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from audiozoo.audio.speech import spoken_samples
from audiozoo.decoding.encoders import alone
from audiozoo.errors import AudioError, UsageError
from audiozoo.text.sentences import SENTENCE_END

QUIET = 0.2  # seconds over which loudness is judged
SHORTEST = 0.1  # seconds; what is shorter is not worth a text


def quiet_cuts(waveform: Float[np.ndarray, " samples"], sampling_rate: int, longest: float) -> list[tuple[int, int]]:
    """Cut a waveform into pieces of at most `longest` seconds, each at the quietest 0.2 s of its last third.

    Returns:
        First sample and the one behind the last, of each piece.
    """
    if not longest > 1:
        raise UsageError(f"Pieces of {longest} s are too short; they need more than a second.")
    block = max(1, int(QUIET * sampling_rate / 10))
    count = len(waveform) // block
    energy = np.square(waveform[: count * block].reshape(count, block).astype(np.float32)).mean(axis=1)
    loudness = np.convolve(energy, np.full(10, 0.1), mode="same")
    size, start = int(longest * sampling_rate), 0
    pieces = []
    while len(waveform) - start > size:
        first, last = (start + 2 * size // 3) // block, (start + size) // block
        cut = (first + int(np.argmin(loudness[first:last]))) * block
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(waveform))]


def in_language(
    model: Any, processor: Any, language: str | None, source: str = "The model", option: str = "language"
) -> dict[str, int]:
    """Options of `generate` that make a model write a language.

    Args:
        model: gives tokens by `generate`.
        processor: its processor, which knows the languages' tokens.
        language: a code, or a code's first part: "de" also finds "de_DE"; None is what the checkpoint says.
        source: where the model is from, for messages.
        option: what names the language there.

    Raises:
        UsageError: if the model does not know the language, has no choice, or has a choice and none was made.
    """
    codes: dict[str, int] = getattr(processor.tokenizer, "lang_code_to_id", {})
    if not codes:
        if language is not None:
            raise UsageError(f"{source} writes one language, whichever it is; leave {option} out.")
        return {}
    if language is None:
        search, name = model.generation_config, "forced_bos_token_id"
        own = dict(search.options).get(name, getattr(search, name, None))
        if own is None:
            raise UsageError(f"{source} writes {', '.join(codes)}; say which with {option}.")
        return {name: own}
    found = [code for code in codes if code == language] or [c for c in codes if c.split("_")[0] == language]
    if len(found) != 1:
        raise UsageError(f"{source} does not write {language!r}; it knows {', '.join(codes)}.")
    return {"forced_bos_token_id": codes[found[0]]}


def write_pieces(
    model: Any,
    processor: Any,
    waveform: Float[np.ndarray, " samples"],
    *,
    longest: float = 20.0,
    batch_size: int = 4,
    vad: bool | Mapping[str, float] = False,
    progress: Callable[[float, float], None] | None = None,
    generate: Callable[..., Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Recognise or translate a recording of any length with an encoder-decoder of speech and text.

    Pieces of a batch are padded to whole multiples of a few seconds and batches to `batch_size`, so that few shapes are
    compiled.

    Args:
        model: gives tokens by `generate` (`Speech2TextForConditionalGeneration`, `SpeechEncoderDecoderModel`, …).
        processor: its processor.
        waveform: mono, at the processor's rate.
        longest: seconds of a piece.
        batch_size: pieces at a time.
        vad: hear only where somebody is speaking: True, or what differs from the defaults of
            `audiozoo.audio.speech.SpeechOptions`. Without any speech the text is empty.
        progress: called with the seconds done and the seconds in all.
        generate: gives tokens in place of `model.generate`, for what makes more than these.
        options: of `generate`.

    Returns:
        `text`, and `segments` with `start`, `end` (seconds) and `text` each.

    Raises:
        AudioError: if there is nothing to hear.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; at least one piece has to be heard at a time.")
    rate = processor.feature_extractor.sampling_rate
    if len(waveform) < SHORTEST * rate:
        raise AudioError(f"The recording has {len(waveform) / rate:.2f} s; that is too short for words.")
    pieces = [
        (start + first, start + last)
        for start, end in spoken_samples(waveform, rate, vad)
        for first, last in quiet_cuts(waveform[start:end], rate, longest)
        if last - first >= SHORTEST * rate
    ]
    batch_size, listener = max(1, min(batch_size, len(pieces))), alone(model)
    # SpeechT5 hears waveforms; the bands that its extractor speaks of are those of the speech that it makes.
    extractor = processor.feature_extractor
    filterbanks = hasattr(extractor, "num_mel_bins") and not hasattr(extractor, "spectrograms")
    multiple = 256 if filterbanks else 4 * rate  # of frames of 10 ms, or of samples
    segments: list[dict[str, Any]] = []
    for first in range(0, len(pieces), batch_size):
        part = pieces[first : first + batch_size]
        heard = [waveform[start:end] for start, end in part]
        heard += [heard[0]] * (batch_size - len(part))
        inputs = processor(
            heard, sampling_rate=rate, padding=True, pad_to_multiple_of=multiple, return_attention_mask=True
        )
        tokens = np.asarray((generate or listener.generate)(**inputs, **options))
        best = tokens[:: len(tokens) // batch_size]  # the first of `num_return_sequences`
        for (start, end), row in zip(part, best, strict=False):
            text = processor.decode(row, skip_special_tokens=True).strip()
            segments.append({"start": start / rate, "end": end / rate, "text": text})
        if progress is not None:
            progress(part[-1][1] / rate, len(waveform) / rate)
    return {"text": " ".join(s["text"] for s in segments if s["text"]), "segments": segments}


def sentence_cuts(text: str, longest: int = 300) -> list[str]:
    """A text's lines; one of more than `longest` characters as pieces of whole sentences, as many as fit in each.

    A sentence of more than three times as many is cut between words: no translation of it would come to its end.
    """
    pieces = []
    for line in filter(None, (" ".join(line.split()) for line in text.splitlines())):
        start, ends = 0, [*(end.end() for end in SENTENCE_END.finditer(line)), len(line)]
        while start < len(line):
            ends = [end for end in ends if end > start]
            end = max((end for end in ends if end <= start + longest), default=ends[0])
            if end - start > 3 * longest:
                end = line.rfind(" ", start, start + 3 * longest) + 1 or start + 3 * longest
            pieces.append(line[start:end].strip())
            start = end
    return [piece for piece in pieces if piece]


def translate_pieces(
    processor: Any,
    text: str,
    generate: Callable[..., Any],
    *,
    batch_size: int = 4,
    progress: Callable[[float, float], None] | None = None,
    **options: Any,
) -> list[str]:
    """Translate a text of any length, piece by piece (see `sentence_cuts`), in few shapes.

    Args:
        processor: makes a model's inputs of texts, and texts of tokens.
        text: to be translated.
        generate: gives tokens of inputs.
        batch_size: pieces at a time.
        progress: called with the pieces done and the pieces in all.
        options: of the processor.

    Returns:
        The translation of each piece.

    Raises:
        UsageError: if there is nothing to translate.
    """
    pieces = sentence_cuts(text)
    if not pieces:
        raise UsageError("There is nothing to translate: the text is empty.")
    batch_size = min(batch_size, len(pieces))
    found: list[str] = []
    for first in range(0, len(pieces), batch_size):
        part = pieces[first : first + batch_size]
        inputs = processor(text=part + part[:1] * (batch_size - len(part)), **options)
        room = -inputs["input_ids"].shape[1] % 32
        padding = {"input_ids": processor.tokenizer.pad_token_id, "attention_mask": 0}
        inputs = {n: np.pad(inputs[n], ((0, 0), (0, room)), constant_values=v) for n, v in padding.items()}
        tokens = np.asarray(generate(**inputs))
        found += [processor.decode(row, skip_special_tokens=True).strip() for row in tokens[: len(part)]]
        if progress is not None:
            progress(first + len(part), len(pieces))
    return found
