"""Pop2Piano's foreign forms: Hugging Face directories, and the authors' Lightning checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError
from audiozoo.models.pop2piano import Pop2PianoConfig, Pop2PianoGenerationConfig
from audiozoo.processors.pop2piano import Pop2PianoProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, search_options, take
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tensors, Tied, transpose
from weights_conversion.t5_names import stack

MODEL_TYPE = "pop2piano"
CLASS = "Pop2PianoForConditionalGeneration"


def _rules(inside: str) -> tuple[Rule, ...]:
    """`inside` stands before the names of the T5."""
    return (
        Rule(f"{inside}shared.weight", "shared.embedding"),
        Rule("mel_conditioner.embedding.weight", "mel_conditioner.embedding.embedding"),
        *stack(f"{inside}encoder.", "encoder.", decoder=False),
        *stack(f"{inside}decoder.", "decoder.", decoder=True),
        Rule(f"{inside}lm_head.weight", "lm_head.kernel", transpose),
    )


def _tied(inside: str) -> tuple[Tied, ...]:
    return tuple(
        Tied(f"{inside}{part}.embed_tokens.weight", f"{inside}shared.weight") for part in ("encoder", "decoder")
    )


# Files of transformers 4 hold a table in the first cross-attention that nothing reads.
_UNREAD = Ignore(
    r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    "a table of cross-attention, which has no positions",
)
TABLE = Table(_rules(""), ignored=(_UNREAD,), tied=_tied(""))
ORIGINAL_TABLE = Table(
    _rules("transformer."),
    ignored=(_UNREAD, Ignore(r"spectrogram\..*", "windows and mel filters, which follow from the settings")),
    tied=_tied("transformer."),
)


def hugging_face_table(config: Pop2PianoConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes."""
    if model_class != CLASS:
        raise CheckpointError(f"{model_class} is not one of Pop2Piano's classes.")
    return TABLE


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Pop2PianoConfig) if f.name != "scale_decoder_outputs"}
_GENERATION = ("max_length", "pad_token_id", "eos_token_id", "decoder_start_token_id")


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> Pop2PianoConfig:
    """Our configuration from a `config.json`; what it does not say is as `transformers` has it.

    There `tie_word_embeddings` says whether the decoder's output is scaled; files written by `transformers` 5 say it
    once more, in `scale_decoder_outputs`, and that counts.
    """
    defaults = _DEFAULTS | {"dense_act_fn": "relu"}
    taken = take(config, defaults, where)
    taken.setdefault("dense_act_fn", "relu")
    taken.setdefault("num_decoder_layers", taken.get("num_layers", Pop2PianoConfig.num_layers))
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return Pop2PianoConfig(**taken, scale_decoder_outputs=bool(scaled))


def generation_from_hugging_face(
    generation: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Pop2PianoGenerationConfig:
    """Our generation settings from `generation_config.json`, else from `config.json`, else the released ones."""
    default = Pop2PianoGenerationConfig()
    merged = {n: value for n in _GENERATION if (value := generation.get(n, config.get(n))) is not None}
    taken = take(merged, {n: getattr(default, n) for n in _GENERATION}, where)
    composers = generation.get("composer_to_feature_token", config.get("composer_to_feature_token"))
    if composers is not None:
        if not isinstance(composers, Mapping) or not composers:
            raise CheckpointError(f"{where}: composer_to_feature_token is no table of names and numbers.")
        taken["composer_to_feature_token"] = tuple((str(k), int(v)) for k, v in composers.items())
    return Pop2PianoGenerationConfig(**taken, options=search_options(generation, where, _GENERATION))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A Pop2Piano as the directory that `save_pretrained` would write."""
    config = dataclasses.asdict(model.config)
    ids = dataclasses.asdict(model.generation_config)
    composers = dict(ids.pop("composer_to_feature_token"))
    scaled = config["scale_decoder_outputs"]
    config |= {"architectures": [CLASS], "model_type": MODEL_TYPE, "dtype": "float32", "is_encoder_decoder": True}
    config |= {"tie_word_embeddings": scaled} | {n: ids[n] for n in _GENERATION if n != "max_length"}
    generation = dict(ids.pop("options")) | ids | {"composer_to_feature_token": composers}
    files = {"config.json": config, "generation_config.json": generation}
    return HuggingFaceForm(files, hugging_face_table(model.config, CLASS))


# --- the authors' file -----------------------------------------------------------------------------------------------


def config_from_original(tensors: Tensors) -> Pop2PianoConfig:
    """Our configuration from shapes: the T5 of transformers 4.16, with gates gelu_new, its output not scaled."""
    shape, names = tensors.shape, tensors.names()

    def count(part: str) -> int:
        found = (re.match(rf"transformer\.{part}\.block\.(\d+)\.", name) for name in names)
        return 1 + max(int(m[1]) for m in found if m)

    first = "transformer.encoder.block.0.layer."
    inner, width = shape(first + "0.SelfAttention.q.weight")
    buckets, heads = shape(first + "0.SelfAttention.relative_attention_bias.weight")
    gated = first + "1.DenseReluDense.wi_0.weight" in names
    return Pop2PianoConfig(
        vocab_size=shape("transformer.shared.weight")[0],
        composer_vocab_size=shape("mel_conditioner.embedding.weight")[0],
        d_model=width,
        d_kv=inner // heads,
        d_ff=shape(first + ("1.DenseReluDense.wi_0.weight" if gated else "1.DenseReluDense.wi.weight"))[0],
        num_layers=count("encoder"),
        num_decoder_layers=count("decoder"),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        dense_act_fn="gelu_new" if gated else "relu",
    )


def processor_of_file(path: Path) -> Pop2PianoProcessor:
    """What belongs to the authors' file, which holds none of it: what lies beside it, else what they released."""
    return Pop2PianoProcessor.from_directory(path.parent)


_MARKS = {"transformer.shared.weight", "mel_conditioner.embedding.weight", "transformer.lm_head.weight"}


def recognise(path: Path) -> bool:
    """Is this the authors' checkpoint?"""
    if path.is_dir() or path.suffix not in {".ckpt", ".pt", ".pth"}:
        return False
    return set(open_tensors(path).names()) >= _MARKS


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory or the authors' file.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if model_class not in (None, CLASS):
        raise CheckpointError(f"{path} holds a Pop2Piano; it loads as {CLASS}, not as {model_class}.")
    if path.is_dir():
        raw = read_json(path / "config.json")
        side = path / "generation_config.json"
        generation = read_json(side) if side.is_file() else {}
        config = config_from_hugging_face(raw, str(path / "config.json"))
        ids = generation_from_hugging_face(generation, raw, str(side))
        table = hugging_face_table(config, CLASS)
        return ForeignCheckpoint(CLASS, config, open_tensors(path), table, path, {"generation_config": ids})
    tensors = open_tensors(path)
    if not set(tensors.names()) >= _MARKS:
        raise CheckpointError(
            f"{path} is not Pop2Piano's own file; give the directory that also holds its config.json."
        )
    return ForeignCheckpoint(CLASS, config_from_original(tensors), tensors, ORIGINAL_TABLE, path)
