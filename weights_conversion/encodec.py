"""EnCodec's foreign forms: Hugging Face directories, the authors' `.th` files, AudioCraft's compression models.

A `.th` file is a bare dictionary of tensors, of a codec or of its language model; what it does not say (sampling rate,
bandwidths) follows from which of the two released models it is. AudioCraft's `compression_state_dict.bin` holds
its whole configuration, as YAML under `xp.cfg`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, UsageError
from audiozoo.models.encodec import EncodecConfig
from audiozoo.processors import extractor_settings
from audiozoo.processors.encodec import EncodecFeatureExtractor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES, kernel_rules
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import (
    Operation,
    Rule,
    Table,
    Tensors,
    conv1d,
    conv2d,
    conv_transpose1d,
    split,
    stack,
    transpose,
)

MODEL_TYPE = "encodec"
CODEC, LANGUAGE_MODEL = "EncodecModel", "EncodecLanguageModel"

# --- tables ----------------------------------------------------------------------------------------------------------


def _places(config: EncodecConfig) -> dict[str, str]:
    """Where in the two lists of layers the convolutions, transposed convolutions, blocks and LSTMs are."""
    blocks, stages = config.num_residual_layers, len(config.upsampling_ratios)
    step, lstm = blocks + 2, int(config.num_lstm_layers > 0)
    last = step * stages + 2 + lstm
    encoder = [0, *(step * (i + 1) for i in range(stages)), last]
    places = {
        "encoder conv": encoder,
        "encoder block": [step * i + 1 + j for i in range(stages) for j in range(blocks)],
        "encoder lstm": [last - 2] * lstm,
        "decoder conv": [0, last],
        "decoder transposed": [step * i + 2 + lstm for i in range(stages)],
        "decoder block": [step * i + 3 + lstm + j for i in range(stages) for j in range(blocks)],
        "decoder lstm": [1] * lstm,
    }
    return {name: "{i:" + "|".join(map(str, indices)) + "}" for name, indices in places.items() if indices}


def _convolution(config: EncodecConfig, foreign: str, ours: str, operation: Operation, inner: str) -> list[Rule]:
    """The rules of one convolution; `inner` is what lies between its name and its weight in the authors' files."""
    normed = config.norm_type == "weight_norm"
    rules = [*kernel_rules(f"{foreign}{inner}", f"{ours}.conv", operation, weight_norm=normed)]
    rules.append(Rule(f"{foreign}{inner}.bias", f"{ours}.conv.bias"))
    if not normed:
        norm = foreign + ("" if inner == ".conv" else inner.rpartition(".")[0]) + ".norm"
        rules += [Rule(f"{norm}.weight", f"{ours}.norm.scale"), Rule(f"{norm}.bias", f"{ours}.norm.bias")]
    return rules


def _codec_rules(config: EncodecConfig, original: bool) -> tuple[Rule, ...]:
    layers = "model" if original else "layers"
    plain, transposed = (".conv.conv", ".convtr.convtr") if original else (".conv", ".conv")
    rules: list[Rule] = []
    for name, index in _places(config).items():
        side, kind = name.split()
        foreign, ours = f"{side}.{layers}.{index}", f"{side}.layers.{index}"
        if kind == "conv":
            rules += _convolution(config, foreign, ours, conv1d, plain)
        elif kind == "transposed":
            rules += _convolution(config, foreign, ours, conv_transpose1d, transposed)
        elif kind == "block":
            rules += _convolution(config, f"{foreign}.block.{{j}}", f"{ours}.block.{{j}}", conv1d, plain)
            if config.use_conv_shortcut:
                rules += _convolution(config, f"{foreign}.shortcut", f"{ours}.shortcut", conv1d, plain)
        else:
            for theirs, mine in (("ih", "input"), ("hh", "recurrent")):
                rules += [
                    Rule(f"{foreign}.lstm.weight_{theirs}_l{{l}}", f"{ours}.layers.{{l}}.{mine}_kernel", transpose),
                    Rule(f"{foreign}.lstm.bias_{theirs}_l{{l}}", f"{ours}.layers.{{l}}.{mine}_bias"),
                ]
    book = "quantizer.vq.layers.{}._codebook." if original else "quantizer.layers.{}.codebook."
    for name in ("embed", "embed_avg", "cluster_size", "inited"):
        names = tuple(book.format(k) + name for k in range(config.num_quantizers))
        rules.append(Rule(names, f"quantizer.{name}", stack(0)))
    return tuple(rules)


def hugging_face_table(config: EncodecConfig, model_class: str = CODEC) -> Table:
    """The correspondence with `transformers`' `EncodecModel`; older files spell weight normalisation otherwise."""
    if model_class != CODEC:
        raise CheckpointError(f"transformers has no {model_class}; it has {CODEC}.")
    if not config.num_lstm_layers:
        raise CheckpointError("transformers has no EnCodec without an LSTM (num_lstm_layers=0).")
    return Table(_codec_rules(config, original=False), renames=WEIGHT_NORM_RENAMES)


def original_table(config: EncodecConfig) -> Table:
    """The correspondence with the authors' `EncodecModel`, which is AudioCraft's too."""
    return Table(_codec_rules(config, original=True), renames=WEIGHT_NORM_RENAMES)


def language_model_table(config: EncodecConfig) -> Table:
    """The correspondence with the authors' `LMModel`."""
    books, layer = range(config.num_quantizers), "transformer.layers.{i}."
    parts = tuple(f"layers.{{i}}.{p}_proj" for p in "qkv")
    rules = [
        Rule(tuple(f"emb.{k}.weight" for k in books), "emb", stack(0)),
        Rule(tuple(f"linears.{k}.weight" for k in books), "kernel", transpose >> stack(0)),
        Rule(tuple(f"linears.{k}.bias" for k in books), "bias", stack(0)),
        Rule("transformer.norm_in.weight", "norm_in.scale"),
        Rule("transformer.norm_in.bias", "norm_in.bias"),
        Rule(f"{layer}self_attn.in_proj_weight", tuple(f"{p}.kernel" for p in parts), split(3) >> transpose),
        Rule(f"{layer}self_attn.in_proj_bias", tuple(f"{p}.bias" for p in parts), split(3)),
        Rule(f"{layer}{{n:norm1|norm2}}.weight", "layers.{i}.{n}.scale"),
        Rule(f"{layer}{{n:norm1|norm2}}.bias", "layers.{i}.{n}.bias"),
    ]
    for theirs, mine in (("self_attn.out_proj", "out_proj"), ("linear1", "linear1"), ("linear2", "linear2")):
        rules.append(Rule(f"{layer}{theirs}.weight", f"layers.{{i}}.{mine}.kernel", transpose))
        rules.append(Rule(f"{layer}{theirs}.bias", f"layers.{{i}}.{mine}.bias"))
    return Table(tuple(rules))


def _discriminator_rules() -> tuple[Rule, ...]:
    scale, normed = "discriminators.{i}.", "{layer:convs.1|convs.2|convs.3|convs.4|conv_post}"
    first = f"{scale}convs.0"
    return (
        Rule(f"{first}.conv.weight", f"{first}.kernel", conv2d),
        Rule(f"{first}.conv.bias", f"{first}.bias"),
        *kernel_rules(f"{scale}{normed}.conv", f"{scale}{{layer}}", conv2d, weight_norm=True),
        Rule(f"{scale}{normed}.conv.bias", f"{scale}{{layer}}.bias"),
    )


DISCRIMINATOR_TABLE = Table(_discriminator_rules(), renames=WEIGHT_NORM_RENAMES)

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_FIELDS = {f.name: f.default for f in dataclasses.fields(EncodecConfig)}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> EncodecConfig:
    """Our configuration from a `config.json`."""
    try:
        return EncodecConfig(**take(config, _FIELDS, where))
    except UsageError as problem:
        raise CheckpointError(f"{where}: {problem}") from None


def hugging_face(model: Any) -> HuggingFaceForm:
    """A codec as the directory that `save_pretrained` would write.

    Raises:
        UsageError: for a language model, which `transformers` does not have.
    """
    name = type(model).__name__
    if name != CODEC:
        raise UsageError(f"transformers has no {name}; keep it with audiozoo.save.")
    config: dict[str, Any] = dataclasses.asdict(model.config)
    for field, default in _FIELDS.items():
        if field.startswith("language_model") and config[field] == default:
            del config[field]
    config["codebook_dim"] = config["hidden_size"]
    config |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32"}
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config))


# --- the authors' files ----------------------------------------------------------------------------------------------


def _count(tensors: Tensors, pattern: str) -> int:
    found = [int(m[1]) for n in tensors.names() if (m := re.match(pattern, n))]
    return max(found) + 1 if found else 0


def config_from_original(tensors: Tensors) -> EncodecConfig:
    """Our configuration from the shapes in one of the authors' codecs."""
    names, conv = set(tensors.names()), "encoder.model.{}.conv.conv"

    def kernel(index: int) -> tuple[int, ...]:
        for leaf in ("weight_v", "parametrizations.weight.original1", "weight"):
            if (name := f"{conv.format(index)}.{leaf}") in names:
                return tensors.shape(name)
        raise CheckpointError(f"{conv.format(index)} has no weight.")

    grouped = "encoder.model.0.conv.norm.weight" in names
    base = EncodecConfig.encodec_48khz() if grouped else EncodecConfig.encodec_24khz()
    last = _count(tensors, r"encoder\.model\.(\d+)\.") - 1
    strided = [i for i in range(1, last) if f"{conv.format(i)}.bias" in names]
    books = _count(tensors, r"quantizer\.vq\.layers\.(\d+)\.")
    size, channels = tensors.shape("quantizer.vq.layers.0._codebook.embed")
    filters, audio, taps = kernel(0)
    config = dataclasses.replace(
        base,
        num_filters=filters,
        audio_channels=audio,
        kernel_size=taps,
        last_kernel_size=kernel(last)[2],
        hidden_size=channels,
        codebook_size=size,
        upsampling_ratios=tuple(kernel(i)[2] // 2 for i in reversed(strided)),
        num_residual_layers=strided[0] - 2 if strided else 0,
        num_lstm_layers=_count(tensors, rf"encoder\.model\.{last - 2}\.lstm\.weight_ih_l(\d+)"),
        use_conv_shortcut="encoder.model.1.shortcut.conv.conv.bias" in names,
    )
    return config if config.num_quantizers == books else _with_bandwidth_of(config, books)


def _with_bandwidth_of(config: EncodecConfig, books: int) -> EncodecConfig:
    """With the one bandwidth that pays for all codebooks, and no less for being rounded."""
    bandwidth = books * config.frame_rate * config.bits_per_codebook / 1000
    config = dataclasses.replace(config, target_bandwidths=(bandwidth,))
    if config.num_quantizers < books:
        config = dataclasses.replace(config, target_bandwidths=(math.nextafter(bandwidth, math.inf),))
    return config


def config_from_language_model(tensors: Tensors) -> EncodecConfig:
    """The configuration of the codec that a language model is for, from its number of codebooks, 32 or 16."""
    books = _count(tensors, r"emb\.(\d+)\.")
    base = EncodecConfig.encodec_48khz() if books == 16 else EncodecConfig.encodec_24khz()
    entries, width = tensors.shape("emb.0.weight")
    config = dataclasses.replace(
        base,
        codebook_size=entries - 1,
        language_model_size=width,
        language_model_layers=_count(tensors, r"transformer\.layers\.(\d+)\."),
    )
    return config if config.num_quantizers == books else _with_bandwidth_of(config, books)


# --- AudioCraft ------------------------------------------------------------------------------------------------------


def resolved(tree: Any, root: Any) -> Any:
    """A YAML tree with `${a.b}` replaced by what stands there."""
    if isinstance(tree, Mapping):
        return {key: resolved(value, root) for key, value in tree.items()}
    if isinstance(tree, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", tree)):
        value = root
        for part in match[1].split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise CheckpointError(f"xp.cfg refers to {match[1]}, which it does not hold.")
            value = value[part]
        return resolved(value, root)
    return tree


def config_from_audiocraft(text: str, where: str = "xp.cfg") -> EncodecConfig:
    """Our configuration from the YAML of an AudioCraft experiment.

    Raises:
        CheckpointError: for YAML that is damaged, and for architectures that are not EnCodec's.
    """
    import yaml

    try:
        tree = yaml.safe_load(text)
        tree = resolved(tree, tree)
        seanet, rvq = tree["seanet"], tree["rvq"]
        decoder = seanet.get("decoder") or {}
        refused = {
            "activation": seanet.get("activation", "ELU") != "ELU",
            "disable_norm_outer_blocks": bool(seanet.get("disable_norm_outer_blocks")),
            "decoder.final_activation": decoder.get("final_activation") is not None,
            "norm": seanet.get("norm") not in ("weight_norm", "time_group_norm"),
        }
        if wrong := [name for name, bad in refused.items() if bad]:
            raise CheckpointError(f"{where}: seanet.{wrong[0]} is not what EnCodec's models have.")
        ratios, rate = tuple(seanet["ratios"]), int(tree["sample_rate"])
        config = EncodecConfig(
            sampling_rate=rate,
            audio_channels=int(tree["channels"]),
            normalize=bool((tree.get("encodec") or {}).get("renormalize", False)),
            hidden_size=seanet["dimension"],
            num_filters=seanet["n_filters"],
            num_residual_layers=seanet["n_residual_layers"],
            upsampling_ratios=ratios,
            norm_type=seanet["norm"],
            kernel_size=seanet["kernel_size"],
            last_kernel_size=seanet["last_kernel_size"],
            residual_kernel_size=seanet["residual_kernel_size"],
            dilation_growth_rate=seanet["dilation_base"],
            use_causal_conv=seanet["causal"],
            pad_mode=seanet["pad_mode"],
            compress=seanet["compress"],
            num_lstm_layers=seanet["lstm"],
            trim_right_ratio=float(decoder.get("trim_right_ratio", 1.0)),
            codebook_size=rvq["bins"],
            use_conv_shortcut=not seanet["true_skip"],
        )
        return _with_bandwidth_of(config, rvq["n_q"])
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{where} is not the configuration of an EnCodec ({problem!r}).") from None
    except UsageError as problem:
        raise CheckpointError(f"{where}: {problem}") from None


def pretrained_name(path: Path) -> str | None:
    """The hub's codec that one of AudioCraft's files names instead of holding one."""
    name = open_tensors(path, root="").metadata.get("pretrained")
    return name if isinstance(name, str) else None


# --- the ways in -----------------------------------------------------------------------------------------------------


def _kind(names: list[str]) -> str | None:
    if {"encoder.model.0.conv.conv.bias", "quantizer.vq.layers.0._codebook.embed"} <= set(names):
        return CODEC
    if {"transformer.norm_in.weight", "emb.0.weight", "linears.0.weight"} <= set(names):
        return LANGUAGE_MODEL
    return None


def processor_of_file(path: Path) -> EncodecFeatureExtractor:
    """Waveforms as the model in a file reads them; settings that lie beside the file come first."""
    if extractor_settings(path.parent) is not None:
        return EncodecFeatureExtractor.from_directory(path.parent)
    config = open_checkpoint(path).config
    return EncodecFeatureExtractor(
        feature_size=config.audio_channels,
        sampling_rate=config.sampling_rate,
        chunk_length_s=config.chunk_length_s,
        overlap=config.overlap,
    )


def recognise(path: Path) -> bool:
    """Is this one of the authors' files, or of AudioCraft's?"""
    if path.is_dir() or path.suffix not in {".th", ".bin", ".pt", ".pth"}:
        return False
    return _kind(open_tensors(path).names()) is not None


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory, one of the authors' files or one of AudioCraft's.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir():
        raw = read_json(path / "config.json")
        config = config_from_hugging_face(raw, str(path / "config.json"))
        name = model_class or CODEC
        return ForeignCheckpoint(name, config, open_tensors(path), hugging_face_table(config, name), path)
    tensors = open_tensors(path)
    name = _kind(tensors.names()) or ""
    if not name:
        raise CheckpointError(f"{path} is no file of EnCodec's authors, nor of AudioCraft's.")
    if model_class not in (None, name):
        raise CheckpointError(f"{path} holds a {name}, not a {model_class}.")
    if name == LANGUAGE_MODEL:
        config = config_from_language_model(tensors)
        return ForeignCheckpoint(name, config, tensors, language_model_table(config), path)
    config = _config_of(tensors, path)
    return ForeignCheckpoint(name, config, tensors, original_table(config), path)


def _config_of(tensors: TensorSource, path: Path) -> EncodecConfig:
    text = tensors.metadata.get("xp.cfg")
    return config_from_audiocraft(text, f"{path}: xp.cfg") if isinstance(text, str) else config_from_original(tensors)
