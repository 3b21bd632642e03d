"""fairseq S2T's processor: normalised Kaldi filterbanks in, pieces of words out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from audiozoo.audio.features import double_precision_on_cpu, kaldi_fbank
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.processors import (
    FeatureExtractor,
    check_return_tensors,
    extractor_settings,
    pad_batch,
    padded_labels,
    read_json,
    read_vocabulary,
    settings_of,
    tidied,
    token_lists,
    waveform_batch,
    write_json,
)
from audiozoo.processors.wav2vec2 import fairseq_symbols

VARIANCE_FLOOR = 1e-10  # of fairseq
CHUNK = 512  # frames that one row of a compiled program transforms
ROWS = 4  # such rows at a time, at most: what they become on the way stays in the caches
STATISTICS = ("mean", "std")  # of a corpus, by their names in files
LANGUAGES = {"mustc": ("pt", "fr", "ru", "nl", "ro", "it", "es", "de")}


@partial(jax.jit, static_argnames=("n_mels", "sampling_rate", "dither"))
def _fbank(x: jax.Array, n_mels: int, sampling_rate: int, dither: float = 0.0, key: Any = None) -> jax.Array:
    return kaldi_fbank(x * 2**15, n_mels, sampling_rate, dither=dither, key=key)


def filterbanks(
    waveforms: Sequence[Float[np.ndarray, " time"]],
    n_mels: int = 80,
    sampling_rate: int = 16_000,
    *,
    dither: float = 0.0,
    key: jax.Array | None = None,
) -> list[Float[np.ndarray, "frames mels"]]:
    """Kaldi's log-mel energies of waveforms in [-1, 1], scaled to 16-bit integers; frames of 25 ms every 10 ms.

    All waveforms are cut into stretches of 512 frames, which a program transforms four at a time, in float64 on the
    CPU: no length compiles anew, and an hour takes two seconds.

    Args:
        waveforms: of at least one frame each.
        n_mels: bands.
        sampling_rate: Hz.
        dither: standard deviation of noise in units of 16-bit integers; needs `key`.
        key: of `jax.random`.

    Returns:
        float32.
    """
    hop, window = int(sampling_rate * 0.010), int(sampling_rate * 0.025)
    counts = [1 + (len(w) - window) // hop for w in waveforms]
    pieces = [(row, start) for row, count in enumerate(counts) for start in range(0, count, CHUNK)]
    features = [np.empty((count, n_mels), np.float32) for count in counts]
    samples = (CHUNK - 1) * hop + window
    for first in range(0, len(pieces), ROWS):
        part = pieces[first : first + ROWS]
        batch = np.zeros((1 << (len(part) - 1).bit_length(), samples))
        for filled, (row, start) in zip(batch, part, strict=False):
            stretch = waveforms[row][start * hop : start * hop + samples]
            filled[: len(stretch)] = stretch
        noise = None if key is None else jax.random.fold_in(key, first)
        with double_precision_on_cpu():
            done = np.asarray(_fbank(jnp.asarray(batch), n_mels, sampling_rate, dither, noise))
        for transformed, (row, start) in zip(done, part, strict=False):
            target = features[row][start : start + CHUNK]
            target[...] = transformed[: len(target)]
    return features


def padded_filterbanks(
    waveforms: Float[Array, "batch time"],
    lengths: Int[Array, " batch"],
    n_mels: int = 80,
    sampling_rate: int = 16_000,
    *,
    floor: float = VARIANCE_FLOOR,
    added: float = 0.0,
    correction: int = 0,
    means: bool = True,
    variances: bool = True,
) -> tuple[Float[Array, "batch frames mels"], Bool[Array, "batch frames"]]:
    r"""Normalised filterbanks of padded waveforms inside `jax.jit`, in their own dtype, and which frames are real.

    Args:
        waveforms: in [-1, 1].
        lengths: samples of each that are real.
        n_mels: bands.
        sampling_rate: Hz.
        floor: least variance.
        added: to the variance.
        correction: the variance is divided by the number of frames less this.
        means: bring each band to mean 0 over the real frames.
        variances: bring each band to variance 1.
    """
    x = kaldi_fbank(waveforms * 2**15, n_mels, sampling_rate)
    counts = 1 + (lengths - int(sampling_rate * 0.025)) // int(sampling_rate * 0.010)
    real = jnp.arange(x.shape[1]) < counts[:, None]

    def over_time(values: jax.Array, count: jax.Array) -> jax.Array:
        total = jnp.where(real[..., None], values, 0).sum(axis=1, keepdims=True)
        return total / jnp.maximum(count, 1)[:, None, None].astype(values.dtype)

    mean = over_time(x, counts)
    variance = over_time(jnp.square(x - mean), counts - correction)
    if means:
        x = x - mean
    return x / jnp.sqrt(jnp.maximum(variance, floor) + added) if variances else x, real


def utterance_cmvn(
    features: Float[np.ndarray, "frames mels"], means: bool = True, variances: bool = True
) -> Float[np.ndarray, "frames mels"]:
    r"""Each band to mean 0 and variance 1 over the utterance: $(x - \mu) / \sqrt{\max(\sigma^2, 10^{-10})}$.

    The floor is fairseq's. `transformers` has none, and makes digital silence infinite.
    """
    x = features.astype(np.float64)
    mean, variance = x.mean(axis=0), x.var(axis=0)
    if means:
        x = x - mean
    if variances:
        x = x / np.sqrt(np.maximum(variance, VARIANCE_FLOOR))
    return x.astype(np.float32)


@dataclass(frozen=True)
class GlobalCMVN:
    """Each band by its mean and deviation over a whole corpus, for speech whose end has not come yet.

    Attributes:
        mean: of each band.
        std: standard deviation of each band.
    """

    mean: Float[np.ndarray, " mels"]
    std: Float[np.ndarray, " mels"]

    @classmethod
    def of(cls, features: Iterable[Float[np.ndarray, "frames mels"]]) -> GlobalCMVN:
        """The statistics of a corpus, recording by recording."""
        count, total, squares = 0, 0.0, 0.0
        for x in features:
            count, total = count + len(x), total + x.sum(axis=0, dtype=np.float64)
            squares = squares + np.square(x, dtype=np.float64).sum(axis=0)
        mean = np.asarray(total) / max(count, 1)
        return cls(mean, np.sqrt(np.maximum(np.asarray(squares) / max(count, 1) - mean**2, VARIANCE_FLOOR)))

    @classmethod
    def of_names(cls, arrays: Mapping[str, Any]) -> GlobalCMVN:
        """From the `mean` and `std` of a file.

        Raises:
            UsageError: if they are not one finite number each for every band, or a deviation is not positive.
        """
        try:
            mean, std = (np.asarray(arrays[name], np.float64) for name in STATISTICS)
        except (KeyError, TypeError, ValueError):
            raise UsageError("The statistics of a corpus are numbers, `mean` and `std` of each band.") from None
        if mean.ndim != 1 or mean.shape != std.shape:
            raise UsageError(
                f"The statistics of a corpus, `mean` and `std`, have shapes {mean.shape} and {std.shape}; each has one "
                "number for every band."
            )
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise UsageError("The statistics of a corpus must be finite, and every `std` more than 0.")
        return cls(mean, std)

    @classmethod
    def from_npz(cls, path: str | os.PathLike[str]) -> GlobalCMVN:
        """From fairseq's `gcmvn.npz`.

        Raises:
            SourceError: if there is no such file, or something else in it.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls.of_names(file)
        except UsageError as error:
            raise SourceError(f"{path}: {error}") from None
        except Exception:  # what a damaged file raises is of many kinds
            raise SourceError(f"{path} is no file of statistics (.npz with `mean` and `std`).") from None

    def __call__(self, features: Float[np.ndarray, "frames mels"]) -> Float[np.ndarray, "frames mels"]:
        """Normalised frames.

        Raises:
            UsageError: if they have another number of bands.
        """
        if np.shape(self.mean) != features.shape[1:]:
            bands = features.shape[1]
            raise UsageError(f"Frames of {bands} bands cannot be normalised by statistics of {np.size(self.mean)}.")
        return ((features - self.mean) / self.std).astype(np.float32)


def stream_filterbanks(
    blocks: Iterable[Float[np.ndarray, " samples"]],
    cmvn: GlobalCMVN | None = None,
    n_mels: int = 80,
    sampling_rate: int = 16_000,
) -> Iterator[Float[np.ndarray, "frames mels"]]:
    """Filterbanks while the speaker speaks: of each block of samples the frames that it completes.

    Args:
        blocks: a waveform in [-1, 1], block by block, of any lengths.
        cmvn: how the frames are normalised.
        n_mels: bands.
        sampling_rate: Hz.
    """
    hop, window = int(sampling_rate * 0.010), int(sampling_rate * 0.025)
    rest = np.zeros(0, np.float32)
    for block in blocks:
        rest = np.concatenate([rest, np.asarray(block, np.float32)])
        if len(rest) >= window:
            (frames,) = filterbanks([rest], n_mels, sampling_rate)
            rest = rest[len(frames) * hop :]
            yield frames if cmvn is None else cmvn(frames)


class Speech2TextFeatureExtractor(FeatureExtractor):
    """Waveforms to model inputs; the arguments are the fields of `preprocessor_config.json`.

    Args:
        feature_size: mel bands, as files call them twice.
        sampling_rate: Hz.
        num_mel_bins: mel bands.
        padding_value: what shorter utterances are padded with, after normalisation.
        dither: noise against digital silence, in units of 16-bit integers; 0 in the released checkpoints.
        do_ceptral_normalize: whether to normalise at all (so spelt in the files).
        normalize_means: bring each band to mean 0.
        normalize_vars: bring each band to variance 1.
        global_cmvn: `mean` and `std` of each band over a corpus, to normalise by; from fairseq's files, and unknown to
            `transformers`.
    """

    global_cmvn: Mapping[str, Sequence[float]] | None = None

    def __init__(
        self,
        feature_size: int = 80,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 80,
        padding_value: float = 0.0,
        dither: float = 0.0,
        do_ceptral_normalize: bool = True,
        normalize_means: bool = True,
        normalize_vars: bool = True,
        global_cmvn: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.num_mel_bins = num_mel_bins
        self.padding_value = padding_value
        self.dither = dither
        self.do_ceptral_normalize = do_ceptral_normalize
        self.normalize_means = normalize_means
        self.normalize_vars = normalize_vars
        if global_cmvn is not None:  # a file without it is the one that `transformers` writes
            if (bands := len(GlobalCMVN.of_names(global_cmvn).mean)) != num_mel_bins:
                raise UsageError(f"global_cmvn is of {bands} bands, and the features have {num_mel_bins}.")
            self.global_cmvn = global_cmvn

    @property
    def of_corpus(self) -> GlobalCMVN | None:
        """The statistics of the corpus, if features are normalised by them."""
        return None if self.global_cmvn is None else GlobalCMVN.of_names(self.global_cmvn)

    def normalised(self, features: Float[np.ndarray, "frames mels"]) -> Float[np.ndarray, "frames mels"]:
        """The frames of one utterance, by its own statistics, those of the corpus, or none."""
        if self.do_ceptral_normalize:
            features = utterance_cmvn(features, self.normalize_means, self.normalize_vars)
        corpus = self.of_corpus
        return features if corpus is None else corpus(features)

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Speech2TextFeatureExtractor:
        """From `preprocessor_config.json`, `processor_config.json` or fairseq's `config….yaml`; else the defaults."""
        folder = Path(directory)
        return cls.of_settings(extractor_settings(folder) or _fairseq_features(folder), folder)

    def saved_besides(self) -> dict[str, Any]:
        """What `transformers` also writes into `preprocessor_config.json`."""
        return {"return_attention_mask": True}

    def in_jax(
        self, waveforms: Float[Array, "batch time"], lengths: Int[Array, " batch"]
    ) -> tuple[Float[Array, "batch frames mels"], Int[Array, "batch frames"]]:
        """`input_features` and `attention_mask` of padded waveforms inside `jax.jit`, without dither: to train."""
        wanted = {"means": self.do_ceptral_normalize and self.normalize_means}
        wanted["variances"] = self.do_ceptral_normalize and self.normalize_vars
        x, real = padded_filterbanks(waveforms, lengths, self.num_mel_bins, self.sampling_rate, **wanted)
        if (corpus := self.of_corpus) is not None:
            x = (x - jnp.asarray(corpus.mean, x.dtype)) / jnp.asarray(corpus.std, x.dtype)
        return jnp.where(real[..., None], x, self.padding_value), real.astype(jnp.int32)

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        *,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        key: jax.Array | None = None,
    ) -> dict[str, np.ndarray]:
        """Features of one waveform or of a batch of any lengths.

        Args:
            raw_speech: float waveform `(time,)`, array `(batch, time)`, or list of waveforms.
            sampling_rate: Hz of `raw_speech`, to be checked.
            padding: `True` or "longest", "max_length", or `False` (then all must have one length).
            max_length: frames.
            truncation: cut what is longer than `max_length`, before it is normalised.
            pad_to_multiple_of: round the frames up.
            return_attention_mask: leave the mask out if False.
            return_tensors: "np" or `None`; results are NumPy arrays.
            key: randomness of `dither`.

        Returns:
            `input_features` float32 `(batch, frames, num_mel_bins)` and `attention_mask` int32 `(batch, frames)`.

        Raises:
            AudioError: empty, not finite, integer, stereo, at another rate, or shorter than one window (25 ms).
        """
        check_return_tensors(return_tensors)
        window = int(self.sampling_rate * 0.025)
        waveforms = waveform_batch(raw_speech, sampling_rate, self.sampling_rate, minimum_samples=window)
        if self.dither and key is None:
            raise UsageError("Dither is random: give the processor a key of jax.random.")
        features = filterbanks(waveforms, self.num_mel_bins, self.sampling_rate, dither=self.dither, key=key)
        if truncation and max_length is not None:
            longest = (
                max_length if not pad_to_multiple_of else -(-max_length // pad_to_multiple_of) * pad_to_multiple_of
            )
            features = [x[:longest] for x in features]
        features = [self.normalised(x) for x in features]
        batch, mask = pad_batch(
            features,
            padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_value=self.padding_value,
        )
        inputs = {"input_features": batch}
        return inputs if return_attention_mask is False else inputs | {"attention_mask": mask}


def _fairseq_settings(folder: Path) -> dict[str, Any]:
    """What fairseq's `config….yaml` says, or nothing if there is none, or several.

    Raises:
        CheckpointError: if it is no YAML.
    """
    import yaml

    files = sorted(folder.glob("config*.yaml"))
    if len(files) != 1:
        return {}
    try:
        found = yaml.safe_load(files[0].read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        raise CheckpointError(f"'{files[0]}' is no YAML.") from None
    return found if isinstance(found, dict) else {}


def _fairseq_features(folder: Path) -> dict[str, Any]:
    """The settings of the features in fairseq's words.

    Raises:
        CheckpointError: for normalisation by a corpus whose statistics are not there.
    """
    settings = _fairseq_settings(folder)
    transforms = settings.get("transforms") or {}
    used = ["utterance_cmvn"]
    if settings:
        of_tests = transforms.get("_eval")
        used = (transforms.get("*") if of_tests is None else of_tests) or []
    of_corpus = None
    if "global_cmvn" in used:
        named = Path(str((settings.get("global_cmvn") or {}).get("stats_npz_path", "gcmvn.npz")))
        found = next((path for path in (folder / named.name, folder / named) if path.is_file()), None)
        if found is None:
            raise CheckpointError(
                f"The model in '{folder}' was trained on features that its corpus normalises; put the statistics "
                f"beside it, as {named.name}."
            )
        statistics = GlobalCMVN.from_npz(found)
        of_corpus = {name: getattr(statistics, name).tolist() for name in STATISTICS}
    bands, cmvn = int(settings.get("input_feat_per_channel") or 80), settings.get("utterance_cmvn") or {}
    return {
        "num_mel_bins": bands,
        "feature_size": bands,
        "do_ceptral_normalize": "utterance_cmvn" in used,
        "normalize_means": bool(cmvn.get("norm_means", True)),
        "normalize_vars": bool(cmvn.get("norm_vars", True)),
        "global_cmvn": of_corpus,
    }


class Speech2TextTokenizer:
    """Pieces of words: SentencePiece cuts the text, a vocabulary of its own numbers the pieces.

    Args:
        encoder: tokens and their numbers.
        model: a SentencePiece model's file (`sentencepiece.bpe.model`).
        do_upper_case: decoded text in capitals.
        do_lower_case: text to encode in small letters.
        lang_codes: "mustc" for the multilingual checkpoint, whose texts begin with a language; "all" for all that the
            vocabulary has, of which `transformers` does not know.
        tgt_lang: the language of the texts.
        clean_up_tokenization_spaces: decoded text has no space before a full stop, a comma and so on.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if special tokens are missing.
        UsageError: if there is no such language.
    """

    def __init__(
        self,
        encoder: dict[str, int],
        model: str | os.PathLike[str],
        do_upper_case: bool = False,
        do_lower_case: bool = False,
        lang_codes: str | None = None,
        tgt_lang: str | None = None,
        clean_up_tokenization_spaces: bool = False,
    ) -> None:
        import sentencepiece

        if not Path(model).is_file():
            raise SourceError(f"There is no file {model}.")
        if missing := [token for token in ("<s>", "<pad>", "</s>", "<unk>") if token not in encoder]:
            raise CheckpointError(f"The vocabulary has no {', '.join(missing)}.")
        self.encoder = dict(encoder)
        self.decoder = {index: token for token, index in encoder.items()}
        self.file = Path(model)
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.do_upper_case, self.do_lower_case = do_upper_case, do_lower_case
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.bos_token_id, self.pad_token_id = encoder["<s>"], encoder["<pad>"]
        self.eos_token_id, self.unk_token_id = encoder["</s>"], encoder["<unk>"]
        self.lang_codes = lang_codes
        languages = _languages(encoder) if lang_codes is not None else []
        if lang_codes in LANGUAGES:
            languages = [code for code in LANGUAGES[lang_codes] if code in languages]
        self.lang_code_to_id = {code: encoder[f"<lang:{code}>"] for code in languages}
        self.tgt_lang: str | None = None
        if self.lang_code_to_id:
            self.set_target_lang(tgt_lang or next(iter(self.lang_code_to_id)))
        elif tgt_lang is not None:
            self.tgt_lang = tgt_lang  # of a checkpoint with one language, which needs no token
        special = ["<s>", "</s>", "<unk>", "<pad>", *(f"<lang:{code}>" for code in languages)]
        self.special = {token: encoder[token] for token in special}
        self._cut = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Speech2TextTokenizer:
        """From `vocab.json` and `sentencepiece.bpe.model`, or from fairseq's `X.txt` and `X.model`."""
        folder = Path(directory)
        config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        if (folder / "vocab.json").is_file():
            cases = ("do_upper_case", "do_lower_case", "clean_up_tokenization_spaces")
            settings: dict[str, Any] = {name: bool(config.get(name, False)) for name in cases}
            settings |= {"lang_codes": config.get("lang_codes"), "tgt_lang": target_lang or config.get("tgt_lang")}
            model = folder / "sentencepiece.bpe.model"
            return cls(read_vocabulary(folder / "vocab.json"), model, **settings_of(cls, settings, folder))
        models = [model for model in sorted(folder.glob("*.model")) if model.with_suffix(".txt").is_file()]
        named = Path(str(_fairseq_settings(folder).get("vocab_filename", ""))).stem
        models = [model for model in models if model.stem == named] or models
        if len(models) != 1:
            count = "several files" if models else "no file"
            raise SourceError(f"'{folder}' has no vocab.json, and {count} X.model with an X.txt beside it.")
        tokens = fairseq_symbols(models[0].with_suffix(".txt"))
        encoder = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *tokens])}
        languages = _languages(encoder)
        known = "mustc" if set(languages) <= set(LANGUAGES["mustc"]) else "all"
        return cls(encoder, models[0], lang_codes=known if languages else None, tgt_lang=target_lang)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "vocab.json", self.encoder)
        (folder / "sentencepiece.bpe.model").write_bytes(self.file.read_bytes())
        fields = {"do_upper_case": self.do_upper_case, "do_lower_case": self.do_lower_case, "tgt_lang": self.tgt_lang}
        fields |= {"lang_codes": self.lang_codes, "tokenizer_class": type(self).__name__}
        fields |= {"clean_up_tokenization_spaces": self.clean_up_tokenization_spaces}
        write_json(folder / "tokenizer_config.json", fields)

    def __len__(self) -> int:
        return len(self.encoder)

    def set_target_lang(self, target_lang: str) -> None:
        """Choose the language of the texts.

        Raises:
            UsageError: if there is no such language.
        """
        if target_lang not in self.lang_code_to_id:
            known = ", ".join(self.lang_code_to_id) or "none to choose"
            raise UsageError(f"There is no language {target_lang!r}; there are {known}.")
        self.tgt_lang = target_lang

    def tokenize(self, text: str) -> list[str]:
        """The pieces of a text; special tokens written out in it stay whole."""
        pieces: list[str] = []
        for part in self._cut.split(text):
            if part in self.special:
                pieces.append(part)
            elif part:
                pieces += self.pieces.encode(part.lower() if self.do_lower_case else part, out_type=str)
        return pieces

    def __call__(self, text: str | Sequence[str], padding: bool = False) -> dict[str, Any]:
        """Tokens of a text or several: the language if there are several, its pieces, `</s>`."""
        texts = [text] if isinstance(text, str) else list(text)
        prefix = [self.lang_code_to_id[self.tgt_lang]] if self.lang_code_to_id and self.tgt_lang else []
        rows = []
        for line in texts:
            ids = [self.encoder.get(piece, self.unk_token_id) for piece in self.tokenize(line)]
            rows.append([*prefix, *ids, self.eos_token_id])
        return token_lists(rows, self.pad_token_id, padding, alone=isinstance(text, str))

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """The text of tokens; with `skip_special_tokens` without languages, padding and ends."""
        text = ""
        pieces: list[str] = []

        def spoken() -> str:
            line = self.pieces.decode(pieces)
            return line.upper() if self.do_upper_case else line

        for index in np.asarray(token_ids).reshape(-1).tolist():
            token = self.decoder.get(index, "<unk>")
            if token not in self.special:
                pieces.append(token)
            elif not skip_special_tokens:
                text += spoken() + token + " "
                pieces = []
        text = (text + spoken()).strip()
        return tidied(text) if self.clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]


def _languages(encoder: dict[str, int]) -> list[str]:
    return [token[6:-1] for token in encoder if re.fullmatch(r"<lang:.+>", token)]


class Speech2TextProcessor:
    """Feature extractor and tokenizer of one checkpoint, called as the `transformers` class is.

    Attributes:
        feature_extractor: waveforms to filterbanks.
        tokenizer: pieces of words.
    """

    def __init__(self, feature_extractor: Speech2TextFeatureExtractor, tokenizer: Speech2TextTokenizer) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str], target_lang: str | None = None) -> Speech2TextProcessor:
        """From the files of a checkpoint directory."""
        tokenizer = Speech2TextTokenizer.from_directory(directory, target_lang)
        return cls(Speech2TextFeatureExtractor.from_directory(directory), tokenizer)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files that `from_directory` and `transformers` read."""
        self.feature_extractor.save(directory)
        self.tokenizer.save(directory)

    def __call__(
        self,
        audio: Any = None,
        sampling_rate: int | None = None,
        *,
        text: str | Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Model inputs of audio, of text, or of both for training.

        Args:
            audio: see `Speech2TextFeatureExtractor.__call__`, which also takes `options`.
            sampling_rate: Hz of `audio`.
            text: a text or several; alone, `options` are those of the tokenizer.
            options: passed on.

        Returns:
            `input_features` and `attention_mask` of audio; `input_ids` of text; of both, the former and `labels`,
            padded with -100.
        """
        if audio is None:
            if text is None:
                raise UsageError("Give the processor audio, text, or both.")
            return self.tokenizer(text, **options)
        inputs: dict[str, Any] = dict(self.feature_extractor(audio, sampling_rate, **options))
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            inputs["labels"] = padded_labels([self.tokenizer(t)["input_ids"] for t in texts])
        return inputs

    def set_target_lang(self, target_lang: str) -> None:
        """See `Speech2TextTokenizer.set_target_lang`."""
        self.tokenizer.set_target_lang(target_lang)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """See `Speech2TextTokenizer.decode`."""
        return self.tokenizer.decode(token_ids, skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """`decode` of every row."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens)
