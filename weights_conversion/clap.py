"""CLAP's foreign forms: Hugging Face directories, of both towers or one, and LAION's own `.pt` files."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo import hub
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.clap import ClapAudioConfig, ClapConfig
from audiozoo.models.roberta import RobertaConfig
from audiozoo.models.swin import relative_position_index
from audiozoo.processors import extractor_settings
from audiozoo.processors.clap import ClapFeatureExtractor, ClapProcessor
from audiozoo.text.roberta_tokenizer import RobertaTokenizer
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Rule, Step, Table, Tensors, conv1d, conv2d, split, squeeze, transpose

MODEL_TYPE = "clap"
BOTH, TEXT, AUDIO = "ClapModel", "ClapTextModelWithProjection", "ClapAudioModelWithProjection"
_TOWER_TYPES = {TEXT: "clap_text_model", AUDIO: "clap_audio_model"}
TEXT_HEAD_WIDTH = 64  # channels of a head in RoBERTa, which LAION's files do not say
_POINTWISE = {"2d": squeeze(3) >> squeeze(2) >> transpose, "1d": squeeze(2) >> transpose}

# --- rules that both spellings share ---------------------------------------------------------------------------------


def _linear(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.kernel", transpose), Rule(f"{foreign}.bias", f"{ours}.bias")


def _norm(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.scale"), Rule(f"{foreign}.bias", f"{ours}.bias")


def _batch_norm(foreign: str, ours: str) -> tuple[Rule, ...]:
    statistics = (Rule(f"{foreign}.running_mean", f"{ours}.mean"), Rule(f"{foreign}.running_var", f"{ours}.var"))
    return (*_norm(foreign, ours), *statistics)


def _conv(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.kernel", conv2d), Rule(f"{foreign}.bias", f"{ours}.bias")


def _fusion(foreign: str, ours: str, kind: str) -> tuple[Rule, ...]:
    """Attentional fusion: `Sequential(conv, norm, relu, conv, norm)`, the global one after a pooling."""
    rules: list[Rule] = []
    for branch, first in (("{branch:local_att|local_att2}", 0), ("global_att", 1)):
        for conv, norm, number in ((first, first + 1, 1), (first + 3, first + 4, 2)):
            theirs, mine = f"{foreign}.{branch}", f"{ours}.attention.{branch}"
            rules += [
                Rule(f"{theirs}.{conv}.weight", f"{mine}.conv{number}.kernel", _POINTWISE[kind]),
                Rule(f"{theirs}.{conv}.bias", f"{mine}.conv{number}.bias"),
                *_batch_norm(f"{theirs}.{norm}", f"{mine}.norm{number}"),
            ]
    return tuple(rules)


_TEXT_LAYER = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
}


def _roberta(foreign: str, ours: str) -> tuple[Rule, ...]:
    """RoBERTa under the names of `transformers`, which LAION's files hold as well."""
    table = "{table:word|position|token_type}_embeddings"
    theirs, mine = foreign + "encoder.layer.{i}.", ours + "layers.{i}."
    return (
        Rule(f"{foreign}embeddings.{table}.weight", f"{ours}embeddings.{table}.embedding"),
        *_norm(f"{foreign}embeddings.LayerNorm", f"{ours}embeddings.layernorm"),
        *(rule for a, b in _TEXT_LAYER.items() for rule in _linear(theirs + a, mine + b)),
        *_norm(theirs + "attention.output.LayerNorm", mine + "attention_layernorm"),
        *_norm(theirs + "output.LayerNorm", mine + "layernorm"),
        *_linear(f"{foreign}pooler.dense", f"{ours}pooler.dense"),
    )


_COUNTERS = Ignore(r"(.*\.)?num_batches_tracked", "PyTorch's count of training steps, which nothing reads")
_TABLES = Ignore(
    r"(.*\.)?(relative_position_index|position_ids|token_type_ids|attn_mask)", "tables that follow from the sizes"
)

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_SWIN_LAYER = {
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _audio() -> tuple[Rule, ...]:
    encoder = "audio_model.audio_encoder."
    stage, block = encoder + "layers.{i}.", encoder + "layers.{i}.blocks.{j}."
    table, norm = "attention.{}relative_position_bias_table", "{n:layernorm_before|layernorm_after}"
    embed = encoder + "patch_embed."
    return (
        *_batch_norm(f"{encoder}batch_norm", f"{encoder}batch_norm"),
        *_conv(f"{embed}proj", f"{embed}proj"),
        *_norm(f"{embed}norm", f"{embed}norm"),
        *_conv(f"{embed}mel_conv2d", f"{embed}mel_conv2d"),
        *_fusion(f"{embed}fusion_model", f"{embed}fusion_model", "2d"),
        *(rule for a, b in _SWIN_LAYER.items() for rule in _linear(block + a, block + b)),
        *_norm(block + norm, block + norm),
        Rule(block + table.format("self."), block + table.format("")),
        *_norm(stage + "downsample.norm", stage + "downsample.norm"),
        Rule(stage + "downsample.reduction.weight", stage + "downsample.reduction.kernel", transpose),
        *_norm(f"{encoder}norm", f"{encoder}norm"),
        *_linear("audio_projection.linear{k}", "audio_projection.linear{k}"),
    )


def _text() -> tuple[Rule, ...]:
    return *_roberta("text_model.", "text_model."), *_linear("text_projection.linear{k}", "text_projection.linear{k}")


@dataclass(frozen=True)
class HuggingFaceTable(Table):
    """The table of a Hugging Face class, which lacks some of our parameters and has buffers of its own.

    Attributes:
        config: ours, from which the buffers follow.
        left_out: regular expression of our parameters that the class has no place for.
    """

    config: ClapConfig = dataclasses.field(default_factory=ClapConfig)
    left_out: str = r"audio_model\.tagging_head\..*|(text|audio)_transform\..*"

    def steps_for(self, paths: Iterable[str]) -> list[Step]:
        """As for every table, without what the class has no place for."""
        return super().steps_for(path for path in paths if not re.fullmatch(self.left_out, path))

    def write(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters, and the class's buffers."""
        yield from super().write(parameters)
        for path in parameters:
            if path.endswith(".relative_position_bias_table"):
                window = (round(len(parameters[path]) ** 0.5) + 1) // 2
                name = path.replace(".relative_position_bias_table", ".self.relative_position_index")
                yield name, np.ascontiguousarray(relative_position_index(window), np.int64)
            elif path == "text_model.embeddings.position_embeddings.embedding":
                length = len(parameters[path])
                yield "text_model.embeddings.position_ids", np.arange(length, dtype=np.int64)[None]
                yield "text_model.embeddings.token_type_ids", np.zeros((1, length), np.int64)
        for step in self.steps_for(parameters):
            if step.foreign[0].endswith(".running_mean"):
                yield step.foreign[0].replace(".running_mean", ".num_batches_tracked"), np.zeros((), np.int64)


def hugging_face_table(config: ClapConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    ignored = [_COUNTERS, _TABLES]
    other = "the class holds one tower only"
    if model_class == BOTH:
        rules: tuple[Rule, ...] = (Rule("logit_scale_{k:a|t}", "logit_scale_{k:a|t}"), *_text(), *_audio())
    elif model_class == TEXT:
        rules = _text()
        ignored.append(Ignore(r"(audio_model|audio_projection)\..*|logit_scale_[at]", other))
    elif model_class == AUDIO:
        rules = _audio()
        ignored.append(Ignore(r"(text_model|text_projection)\..*|logit_scale_[at]", other))
    else:
        raise CheckpointError(f"{model_class} is not one of CLAP's classes.")
    return HuggingFaceTable(rules, ignored=tuple(ignored), config=config)


def _defaults(config: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in without}


_TEXT_DEFAULTS = _defaults(ClapConfig().text_config)
_AUDIO_DEFAULTS = _defaults(ClapAudioConfig(), ("tagging_head", "spec_augment", "fusion_type"))
_OWN_DEFAULTS = _defaults(ClapConfig(), ("text_config", "audio_config", "embedding_mlps"))


def _text_config(config: Mapping[str, Any], where: str) -> RobertaConfig:
    return RobertaConfig(**(_TEXT_DEFAULTS | take(config, _TEXT_DEFAULTS, where)))


def _audio_config(config: Mapping[str, Any], where: str) -> ClapAudioConfig:
    pairs = {n: [config[n]] * 2 for n in ("patch_size", "patch_stride") if isinstance(config.get(n), int)}
    if config.get("patch_embed_input_channels", 1) != 1:
        raise CheckpointError(f"{where}: patch_embed_input_channels is not 1; CLAP hears mono sound.")
    fusion = take(config, {"fusion_type": ""}, where)
    return ClapAudioConfig(**take({**config, **pairs}, _AUDIO_DEFAULTS, where), **fusion)


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> ClapConfig:
    """Our configuration from a `config.json`, of the whole model or of one tower."""
    own = take(config, _OWN_DEFAULTS, where)
    kind = config.get("model_type", MODEL_TYPE)
    if kind == _TOWER_TYPES[TEXT]:
        return ClapConfig(text_config=_text_config(config, where), **own)
    if kind == _TOWER_TYPES[AUDIO]:
        return ClapConfig(audio_config=_audio_config(config, where), **own)
    text, audio = (config.get(f"{tower}_config") or {} for tower in ("text", "audio"))
    return ClapConfig(
        text_config=_text_config(text, f"{where}, text_config"),
        audio_config=_audio_config(audio, f"{where}, audio_config"),
        **own,
    )


def hugging_face(model: Any) -> HuggingFaceForm:
    """A CLAP as the directory that `save_pretrained` would write; the tagging head and LAION's MLPs stay behind.

    Raises:
        CheckpointError: for a way of fusing that `transformers` does not know.
    """
    name, config = type(model).__name__, model.config
    if config.audio_config.fusion not in (None, "aff_2d") and name != TEXT:
        raise CheckpointError(
            f"This model fuses features by {config.audio_config.fusion}; transformers knows aff_2d alone."
        )
    text = {**dataclasses.asdict(config.text_config), "model_type": _TOWER_TYPES[TEXT]}
    audio = {**dataclasses.asdict(config.audio_config), "model_type": _TOWER_TYPES[AUDIO]}
    del audio["tagging_head"], audio["spec_augment"]
    shared = {n: getattr(config, n) for n in ("projection_dim", "projection_hidden_act")}
    if name == BOTH:
        file = {"text_config": text | shared, "audio_config": audio | shared, "model_type": MODEL_TYPE, **shared}
        file["logit_scale_init_value"] = config.logit_scale_init_value
    else:
        file = (text if name == TEXT else audio) | shared
    file |= {"architectures": [name], "dtype": "float32"}
    return HuggingFaceForm({"config.json": file}, hugging_face_table(config, name))


# --- LAION's own files -----------------------------------------------------------------------------------------------


def _htsat(ours: str) -> tuple[Rule, ...]:
    """The names of HTSAT's project, below `audio_branch.`."""
    encoder = f"{ours}audio_encoder."
    theirs, mine, stage = "layers.{i}.blocks.{j}.", encoder + "layers.{i}.blocks.{j}.", encoder + "layers.{i}."
    parts = tuple(f"{mine}attention.{p}_proj" for p in "qkv")
    mel = f"{encoder}mel_fusion."
    return (
        *_batch_norm("bn0", f"{encoder}batch_norm"),
        *_conv("patch_embed.proj", f"{encoder}patch_embed.proj"),
        *_norm("patch_embed.norm", f"{encoder}patch_embed.norm"),
        *_conv("patch_embed.mel_conv2d", f"{encoder}patch_embed.mel_conv2d"),
        *_fusion("patch_embed.fusion_model", f"{encoder}patch_embed.fusion_model", "2d"),
        Rule("mel_conv1d.0.weight", f"{mel}mel_conv1d.kernel", conv1d),
        Rule("mel_conv1d.0.bias", f"{mel}mel_conv1d.bias"),
        *_batch_norm("mel_conv1d.1", f"{mel}norm"),
        *_fusion("fusion_model", f"{mel}fusion_model", "1d"),
        Rule(f"{theirs}attn.relative_position_bias_table", f"{mine}attention.relative_position_bias_table"),
        Rule(f"{theirs}attn.qkv.weight", tuple(f"{p}.kernel" for p in parts), split(3) >> transpose),
        Rule(f"{theirs}attn.qkv.bias", tuple(f"{p}.bias" for p in parts), split(3)),
        *_linear(f"{theirs}attn.proj", f"{mine}attention.o_proj"),
        *_linear(f"{theirs}mlp.fc{{k}}", f"{mine}mlp.fc{{k}}"),
        *_norm(f"{theirs}norm1", f"{mine}layernorm_before"),
        *_norm(f"{theirs}norm2", f"{mine}layernorm_after"),
        *_norm("layers.{i}.downsample.norm", stage + "downsample.norm"),
        Rule("layers.{i}.downsample.reduction.weight", stage + "downsample.reduction.kernel", transpose),
        *_norm("norm", f"{encoder}norm"),
        *_conv("tscam_conv", f"{ours}tagging_head.tscam_conv"),
    )


def _sequential(foreign: str, ours: str, second: int) -> tuple[Rule, ...]:
    return *_linear(f"{foreign}.0", f"{ours}.linear1"), *_linear(f"{foreign}.{second}", f"{ours}.linear2")


ORIGINAL_TABLE = Table(
    (
        Rule("logit_scale_{k:a|t}", "logit_scale_{k:a|t}"),
        *_roberta("text_branch.", "text_model."),
        *(rule.prefixed("audio_branch.", "") for rule in _htsat("audio_model.")),
        *_sequential("text_projection", "text_projection", 2),
        *_sequential("audio_projection", "audio_projection", 2),
        *_sequential("text_transform.sequential", "text_transform", 3),
        *_sequential("audio_transform.sequential", "audio_transform", 3),
    ),
    renames=((r"^module\.", ""),),  # what distributed training puts in front
    ignored=(
        _COUNTERS,
        _TABLES,
        Ignore(r"audio_branch\.(spectrogram|logmel)_extractor\..*", "the Fourier transform and mel filters as kernels"),
        Ignore(r"audio_branch\.head\..*", "a layer that the released code makes and never calls"),
        Ignore(r"(.*\.)?global_att2\..*", "the second global attention of iAFF, which the released code never calls"),
    ),
)


def _fusion_of(names: set[str], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """How the model fuses, from what it has."""
    if shapes["audio_branch.patch_embed.proj.weight"][1] == 4:
        return "channel_map"
    for dimension, marker, place in (
        ("2d", "patch_embed.mel_conv2d.weight", "patch_embed.fusion_model"),
        ("1d", "mel_conv1d.0.weight", "fusion_model"),
    ):
        if f"audio_branch.{marker}" in names:
            found = {n.split(".")[-3] for n in names if n.startswith(f"audio_branch.{place}.")}
            return f"{'iaff' if 'local_att2' in found else 'aff' if found else 'daf'}_{dimension}"
    return None


def config_from_original(tensors: Tensors) -> ClapConfig:
    """Our configuration from the shapes in one of LAION's files."""
    today = {ORIGINAL_TABLE.today(name): name for name in tensors.names()}
    names, shapes = set(today), {new: tensors.shape(old) for new, old in today.items()}
    audio, text = "audio_branch.", "text_branch."
    blocks = [re.match(r"audio_branch\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.weight", n) for n in names]
    found = [(int(m[1]), int(m[2])) for m in blocks if m]
    stages = range(1 + max(i for i, _ in found))
    tables = [shapes[f"{audio}layers.{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    window = (round(tables[0][0] ** 0.5) + 1) // 2
    width, _, high, wide = shapes[f"{audio}patch_embed.proj.weight"]
    masks = shapes.get(f"{audio}layers.0.blocks.1.attn_mask")
    fusion = _fusion_of(names, shapes)
    place = "patch_embed.fusion_model" if fusion and fusion.endswith("2d") else "fusion_model"
    narrow = shapes.get(f"{audio}{place}.local_att.0.weight", (1, 4))
    audio_config = ClapAudioConfig(
        window_size=window,
        num_mel_bins=shapes[f"{audio}bn0.weight"][0],
        spec_size=round(masks[0] ** 0.5) * window * high if masks else ClapAudioConfig.spec_size,
        patch_size=(high, wide),
        patch_stride=(high, wide),
        num_classes=shapes.get(f"{audio}tscam_conv.weight", (ClapAudioConfig.num_classes,))[0],
        hidden_size=shapes[f"{audio}norm.weight"][0],
        depths=tuple(1 + max(j for k, j in found if k == i) for i in stages),
        num_attention_heads=tuple(table[1] for table in tables),
        enable_fusion=fusion is not None,
        fusion_type=fusion,
        patch_embeds_hidden_size=width,
        enable_patch_layer_norm=f"{audio}patch_embed.norm.weight" in names,
        hidden_dropout_prob=0.0,
        drop_path_rate=0.1,
        qkv_bias=f"{audio}layers.0.blocks.0.attn.qkv.bias" in names,
        mlp_ratio=shapes[f"{audio}layers.0.blocks.0.mlp.fc1.bias"][0] / width,
        aff_block_r=narrow[1] // narrow[0],
        tagging_head=f"{audio}tscam_conv.weight" in names,
        spec_augment=True,
    )
    layers = [int(m[1]) for n in names if (m := re.match(r"text_branch\.encoder\.layer\.(\d+)\.", n))]
    words = shapes[f"{text}embeddings.word_embeddings.weight"]
    if words[1] % TEXT_HEAD_WIDTH:
        raise CheckpointError(f"the text tower's width {words[1]} is no multiple of {TEXT_HEAD_WIDTH}, a head's.")
    text_config = RobertaConfig(
        vocab_size=words[0],
        hidden_size=words[1],
        num_hidden_layers=1 + max(layers),
        num_attention_heads=words[1] // TEXT_HEAD_WIDTH,
        intermediate_size=shapes[f"{text}encoder.layer.0.intermediate.dense.bias"][0],
        max_position_embeddings=shapes[f"{text}embeddings.position_embeddings.weight"][0],
        type_vocab_size=shapes[f"{text}embeddings.token_type_embeddings.weight"][0],
    )
    return ClapConfig(
        text_config,
        audio_config,
        projection_dim=shapes["text_projection.0.bias"][0],
        embedding_mlps="text_transform.sequential.0.weight" in names,
    )


ROBERTA = "FacebookAI/roberta-base"  # whose tokenizer LAION's code takes
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def processor_of_file(path: Path) -> ClapProcessor:
    """What belongs to one of LAION's files, which holds neither settings nor a tokenizer: those of LAION's code.

    Settings and a tokenizer that lie beside the file come first; the tokenizer is looked for in the hub, too, and where
    it is not found, the processor reads sounds only.
    """
    folder, audio = path.parent, config_from_original(open_tensors(path)).audio_config
    if extractor_settings(folder) is not None:
        features = ClapFeatureExtractor.from_directory(folder)
    else:
        features = ClapFeatureExtractor.laion(audio.enable_fusion)
        features.feature_size = audio.num_mel_bins
    for look in (lambda: folder, lambda: hub.resolve(ROBERTA, patterns=_TOKENIZER_FILES)):
        try:
            return ClapProcessor(features, RobertaTokenizer.from_directory(look()))
        except SourceError:
            continue
    return ClapProcessor(features, None)


_MARKS = {
    "audio_branch.bn0.weight",
    "audio_branch.patch_embed.proj.weight",
    "logit_scale_a",
    "text_projection.0.weight",
}

# --- the ways in -----------------------------------------------------------------------------------------------------


def _names(tensors: Tensors) -> set[str]:
    return {ORIGINAL_TABLE.today(name) for name in tensors.names()}


def recognise(path: Path) -> bool:
    """Is this one of LAION's `.pt` files?"""
    if path.is_dir() or path.suffix not in {".pt", ".pth"}:
        return False
    return _names(open_tensors(path)) >= _MARKS


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory or one of LAION's files.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir():
        raw = read_json(path / "config.json")
        config = config_from_hugging_face(raw, str(path / "config.json"))
        name = model_class or str((raw.get("architectures") or [BOTH])[0])
        return ForeignCheckpoint(name, config, open_tensors(path), hugging_face_table(config, name), path)
    tensors = open_tensors(path)
    names = _names(tensors)
    if not names >= _MARKS:
        raise CheckpointError(f"{path} is none of LAION's files; give the directory that also holds its config.json.")
    if "text_branch.embeddings.word_embeddings.weight" not in names:
        raise CheckpointError(f"{path} has a text tower that is no RoBERTa; the published checkpoints have one.")
    if model_class not in (None, BOTH):
        raise CheckpointError(f"{path} holds both towers; it loads as {BOTH}, not as {model_class}.")
    return ForeignCheckpoint(BOTH, config_from_original(tensors), tensors, ORIGINAL_TABLE, path)
