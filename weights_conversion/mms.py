"""MMS's foreign forms: a directory with the adapters of several languages, and fairseq's file of all languages.

The network is wav2vec 2.0's. fairseq's `mms1b_all.pt` holds beside the network each language's adapters, head and
alphabet: `{"model": …, "adapter": {"eng": {"model": …, "task_state": {"target_dictionary": …}}, …}}`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.mms import MMSConfig
from audiozoo.models.wav2vec2 import Wav2Vec2Config
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, wav2vec2
from weights_conversion.alphabets import vocabularies
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Rule, Table, Tensors, permute
from weights_conversion.wav2vec2 import ATTENTION_ADAPTERS, BACKBONE, family_table, languages_of

MODEL_TYPE = "mms"  # of no published directory: those say wav2vec2, and load as one language
processor_of_file = alphabets.processor_of_file

_TURNED = permute(0, 2, 1)  # (languages, out, in) -> (languages, in, out)
_BLOCK = "encoder.layers.{i}.adapter_layer."
STACKED_ADAPTERS = (
    Rule(_BLOCK + "norm.weight", _BLOCK + "norm.scale"),
    Rule(_BLOCK + "norm.bias", _BLOCK + "norm.bias"),
    Rule(_BLOCK + "{map:linear_1|linear_2}.weight", _BLOCK + "{map}.kernel", _TURNED),
    Rule(_BLOCK + "{map:linear_1|linear_2}.bias", _BLOCK + "{map}.bias"),
)
STACKED_HEADS = (Rule("lm_head.weight", "lm_head.kernel", _TURNED), Rule("lm_head.bias", "lm_head.bias"))


# fairseq's adapters have a leading axis already, of length one.
FAIRSEQ_HEADS = (Rule("proj.weight", "lm_head.kernel", _TURNED), Rule("proj.bias", "lm_head.bias"))
FAIRSEQ_ADAPTERS = (
    *(Rule(f"{_BLOCK}W_{x}", f"{_BLOCK}linear_{i}.kernel", _TURNED) for i, x in enumerate("ab", 1)),
    *(Rule(f"{_BLOCK}b_{x}", f"{_BLOCK}linear_{i}.bias") for i, x in enumerate("ab", 1)),
    Rule(f"{_BLOCK}ln_W", f"{_BLOCK}norm.scale"),
    Rule(f"{_BLOCK}ln_b", f"{_BLOCK}norm.bias"),
)
_FRONT = "w2v_encoder.w2v_model."


def is_of_a_language(name: str) -> bool:
    """Whether a tensor belongs to one language: its adapters and its head."""
    return ".adapter_layer." in name or _is_head(name)


def _is_head(name: str) -> bool:
    return name.startswith(("lm_head.", "w2v_encoder.proj."))


class SeveralLanguages:
    """A checkpoint's tensors, those of the languages side by side: a source for the engine of `rules`.

    Heads are padded with zeros to the largest alphabet.

    Args:
        common: the network, with the adapters and head of one language.
        languages: adapters and head of each.
        leading: whether adapters have a leading axis of length one, which becomes that of the languages.

    Raises:
        CheckpointError: if a language lacks a tensor, or has one too many.
    """

    def __init__(self, common: Tensors, languages: Mapping[str, TensorSource], leading: bool = False):
        self.common, self.languages, self.leading = common, languages, leading
        wanted = {name for name in common.names() if is_of_a_language(name)}
        (bias,) = (name for name in wanted if _is_head(name) and name.endswith("bias"))
        for language, tensors in languages.items():
            if wrong := sorted(wanted ^ set(tensors.names())):
                raise CheckpointError(f"The adapter for {language!r} does not fit the model: {', '.join(wrong[:5])}.")
        self.sizes = tuple(tensors.shape(bias)[0] for tensors in languages.values())

    def names(self) -> list[str]:
        """Every tensor's name, those of the languages once."""
        return self.common.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """With the languages in front, where a tensor belongs to one."""
        if not is_of_a_language(name):
            return self.common.shape(name)
        shape = next(iter(self.languages.values())).shape(name)
        if _is_head(name):
            shape = (max(self.sizes), *shape[1:])
        elif self.leading:
            shape = shape[1:]
        return (len(self.languages), *shape)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor, without reading it."""
        return self.common.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor's values, of all languages."""
        if not is_of_a_language(name):
            return self.common.read(name)
        result = np.zeros(self.shape(name), self.dtype(name))
        for row, (language, tensors) in enumerate(self.languages.items()):
            value = tensors.read(name)
            if self.leading and not _is_head(name):
                value = value[0] if len(value) == 1 else value
            fits = value.shape[1:] == result.shape[2:] and len(value) <= result.shape[1]
            if not fits or (len(value) < result.shape[1] and not _is_head(name)):
                raise CheckpointError(f"{name} of the adapter for {language!r} is {value.shape}, unlike the others.")
            result[row, : len(value)] = value
        return result


def hugging_face_table(config: MMSConfig, model_class: str) -> Table:
    """The correspondence with `save_pretrained`'s names, languages in front; without any, wav2vec 2.0's."""
    if model_class != "MMSForCTC":
        return wav2vec2.hugging_face_table(config, model_class)
    backbone = (*(rule for rule in BACKBONE if rule not in ATTENTION_ADAPTERS), *STACKED_ADAPTERS)
    return family_table(config, "MMSForCTC", family="MMS", backbone=backbone, heads={"ForCTC": STACKED_HEADS})


def fairseq_table(config: MMSConfig, model_class: str = "MMSForCTC") -> Table:
    """The correspondence with fairseq's names, languages in front."""
    if model_class != "MMSForCTC":
        return wav2vec2.fairseq_table(config, model_class)
    alone = wav2vec2.fairseq_table(config, "Wav2Vec2ForCTC")
    network = [rule for rule in alone.rules if not re.search(r"adapter_layer|lm_head", str(rule.ours))]
    adapters = [rule.prefixed("", "wav2vec2.") for rule in FAIRSEQ_ADAPTERS]
    return dataclasses.replace(alone, rules=(*network, *adapters, *FAIRSEQ_HEADS))


def hugging_face(model: Any) -> HuggingFaceForm:
    """There is no Hugging Face directory of several languages in one model.

    Raises:
        CheckpointError: always, with what to do.
    """
    raise CheckpointError(f"A {type(model).__name__} has no such form; export model.speaking(language), one at a time.")


def unpack_languages(path: Path, directory: Path, languages: Sequence[str] | None = None) -> list[str]:
    """Write fairseq's languages as a Hugging Face directory has them: adapters, a nested `vocab.json`, `target_lang`.

    With what `audiozoo export mms1b_all.pt DIRECTORY` writes, the directory is whole.

    Args:
        path: fairseq's file.
        directory: where to.
        languages: those that are wanted; all by default.

    Returns:
        The languages.

    Raises:
        SourceError: if the file lacks one of them.
    """
    found, nested = languages_of(open_tensors(path)), vocabularies(path)
    chosen = list(languages or found)
    if missing := sorted(set(chosen) - set(found)):
        raise SourceError(f"{path} has no adapter for {', '.join(missing)}.")
    fairseq, hub = wav2vec2.fairseq_table(Wav2Vec2Config(), "Wav2Vec2ForCTC"), wav2vec2.adapter_table()
    directory.mkdir(parents=True, exist_ok=True)
    for language in chosen:
        values = wav2vec2.parameters_of(found[language], fairseq, f"{path}, {language}")
        file = directory / f"adapter.{language}.safetensors"
        save_file(dict(hub.write(values)), directory / f".{file.name}", metadata={"format": "pt"})
        (directory / f".{file.name}").replace(file)
    letters = {language: nested[language] for language in chosen}
    (directory / "vocab.json").write_text(json.dumps(letters, ensure_ascii=False), encoding="utf-8")
    settings = {"target_lang": chosen[0], "tokenizer_class": "Wav2Vec2CTCTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (directory / "preprocessor_config.json").write_text(json.dumps(_EXTRACTOR), encoding="utf-8")
    return chosen


# Recordings of mean 0 and variance 1, as MMS reads them.
_EXTRACTOR = {
    "feature_extractor_type": "Wav2Vec2FeatureExtractor",
    "do_normalize": True,
    "return_attention_mask": True,
    "feature_size": 1,
    "sampling_rate": 16_000,
    "padding_side": "right",
    "padding_value": 0.0,
}


def fairseq_checkpoint(model: Any) -> dict[str, Any]:
    """A `MMSForCTC` as fairseq's file holds it, in NumPy arrays: the network with its first language, and "adapter".

    `torch.save` of it with arrays made tensors, and with fairseq's "cfg" beside them, is such a file.
    """
    config = model.config
    values = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    network: dict[str, np.ndarray] = {}
    own: dict[str, dict[str, np.ndarray]] = {language: {} for language in config.languages}
    for name, value in fairseq_table(config).write(values):
        front = "w2v_encoder." if name.startswith("proj.") else _FRONT
        if not is_of_a_language(full := front + name):
            network[full] = value
            continue
        for row, (language, size) in enumerate(zip(config.languages, config.vocab_sizes, strict=True)):
            own[language][full] = value[row, :size] if _is_head(full) else value[row : row + 1]
    network |= own[config.languages[0]]
    return {"model": network, "adapter": {language: {"model": part} for language, part in own.items()}}


def recognise(path: Path) -> bool:
    """Nothing is MMS's alone: its files and directories are wav2vec 2.0's, and load as one language."""
    return False


def adapters_of(directory: Path) -> dict[str, Path]:
    """The file of every language whose adapters lie in a directory."""
    files = [p for p in sorted(directory.glob("adapter.*.*")) if p.suffix in {".safetensors", ".bin"}]
    return {file.name.removeprefix("adapter.").removesuffix(file.suffix): file for file in files}


def open_checkpoint(
    path: Path, model_class: str | None = None, languages: Sequence[str] | None = None
) -> ForeignCheckpoint:
    """Open a directory as a recogniser of the languages whose `adapter.<language>.safetensors` it holds, or a file.

    Args:
        path: the directory, or fairseq's `mms1b_….pt`.
        model_class: "MMSForCTC" by default.
        languages: those that are wanted; all by default, each of which takes two million parameters.

    Raises:
        SourceError: if there are no adapters, or a language has none.
        CheckpointError: if they do not fit the model.
    """
    if model_class not in (None, "MMSForCTC"):
        return wav2vec2.open_checkpoint(path, model_class)
    foreign = None
    found: Mapping[str, Any]
    if path.is_dir():
        found = adapters_of(path)
    else:
        foreign = wav2vec2.open_checkpoint(path, "Wav2Vec2ForCTC")
        found = languages_of(foreign.tensors)  # type: ignore[arg-type]
    if not found:
        raise SourceError(f"{path} holds no adapter.<language>.safetensors, nor fairseq's languages.")
    if missing := sorted(set(languages or ()) - set(found)):
        raise SourceError(f"{path} has no adapter for {', '.join(missing)}; it has {', '.join(list(found)[:12])} …")
    found = {language: found[language] for language in languages or found}
    if foreign is None:
        foreign = wav2vec2.open_checkpoint(path, "Wav2Vec2ForCTC")
        found = {language: open_tensors(file) for language, file in found.items()}
    tensors = SeveralLanguages(foreign.tensors, found, leading=path.is_file())
    files = list(found)
    make_table = fairseq_table if path.is_file() else hugging_face_table
    fields = {f.name: getattr(foreign.config, f.name) for f in dataclasses.fields(Wav2Vec2Config)}
    fields |= {"languages": tuple(files), "vocab_sizes": tensors.sizes, "vocab_size": max(tensors.sizes)}
    config = MMSConfig(**fields)
    return dataclasses.replace(
        foreign,
        model_class="MMSForCTC",
        config=config,
        tensors=tensors,
        table=make_table(config, "MMSForCTC"),
    )
