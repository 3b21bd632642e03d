"""AST's foreign forms: Hugging Face directories, the project's own `.pth` files, and DeiT's ImageNet weights.

Files that `transformers` writes, and those on the hub, hold old names (`encoder.layer.0.attention.attention.query`);
models of `transformers` 5 in memory have short ones (`layers.0.attention.q_proj`). Both are read, the old ones written.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from audiozoo.errors import CheckpointError
from audiozoo.models.audio_spectrogram_transformer import (
    SPECIAL_TOKENS,
    ASTConfig,
    ASTForAudioClassification,
    resize_position_embeddings,
    sum_channels,
)
from audiozoo.processors import extractor_settings
from audiozoo.processors.audio_spectrogram_transformer import (
    AUDIOSET,
    ESC50,
    SPEECH_COMMANDS,
    ASTFeatureExtractor,
)
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    labels_from_hugging_face,
    labels_to_hugging_face,
    read_json,
    take,
    warn_of_nameless_classes,
)
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tensors, conv2d, split, transpose

MODEL_TYPE = "audio-spectrogram-transformer"
CLASSIFIER = "ASTForAudioClassification"
BASE = "audio_spectrogram_transformer."
HEAD_WIDTH = 64  # channels of a head in every released model; their files do not say it

# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _linear(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.kernel", transpose), Rule(f"{foreign}.bias", f"{ours}.bias")


def _norm(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.scale"), Rule(f"{foreign}.bias", f"{ours}.bias")


# Within `encoder.layer.{i}.` of a file, within `layers.{i}.` in memory and here.
_SPELLINGS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _base(in_memory: bool = False) -> tuple[Rule, ...]:
    layer, norm = "layers.{i}." if in_memory else "encoder.layer.{i}.", "{n:layernorm_before|layernorm_after}"
    token = "embeddings.{token:cls_token|distillation_token|position_embeddings}"
    patches = "embeddings.patch_embeddings.projection."
    linears = [
        rule
        for old, new in _SPELLINGS.items()
        for rule in _linear(layer + (new if in_memory else old), "layers.{i}." + new)
    ]
    return (
        Rule(token, token),
        Rule(f"{patches}weight", f"{patches}kernel", conv2d),
        Rule(f"{patches}bias", f"{patches}bias"),
        *linears,
        *_norm(layer + norm, "layers.{i}." + norm),
        *_norm("layernorm", "layernorm"),
    )


_TODAY = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    *((rf"\.{re.escape(new)}\.", f".{old}.") for old, new in _SPELLINGS.items()),
)


def hugging_face_table(config: ASTConfig, model_class: str, in_memory: bool = False) -> Table:
    """The correspondence with what `save_pretrained` writes for that class.

    Args:
        config: ours.
        model_class: a class's name.
        in_memory: write the names of `state_dict()`; read those alone.
    """
    renames = () if in_memory else _TODAY
    if model_class == "ASTModel":
        head = Ignore(r"classifier\..*", "the bare model has no classifier")
        return Table(_base(in_memory), renames=((rf"^{re.escape(BASE)}", ""), *renames), ignored=(head,))
    if model_class == CLASSIFIER:
        rules = (
            *(rule.prefixed(BASE, BASE) for rule in _base(in_memory)),
            *_norm("classifier.layernorm", "classifier.layernorm"),
            *_linear("classifier.dense", "classifier.dense"),
        )
        # A directory of the bare model lacks the prefix; its head is then to be initialised.
        return Table(rules, renames=((r"^(embeddings|encoder|layers|layernorm)\.", rf"{BASE}\1."), *renames))
    raise CheckpointError(f"{model_class} is not one of AST's classes.")


_DERIVED = ("id2label", "classifier_layer_norm_eps", "problem_type")
_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ASTConfig) if f.name not in _DERIVED}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> ASTConfig:
    """Our configuration from a `config.json`."""
    taken = take(config, _CONFIG_DEFAULTS, where)
    eps = taken.get("layer_norm_eps", ASTConfig.layer_norm_eps)
    taken |= take(config, {"classifier_layer_norm_eps": eps}, where)
    taken.setdefault("classifier_layer_norm_eps", eps)
    taken |= take(config, {"problem_type": ""}, where)
    taken |= labels_from_hugging_face(config)
    return ASTConfig(**taken)


def hugging_face(model: Any) -> HuggingFaceForm:
    """An AST as the directory that `save_pretrained` would write.

    `transformers` has one eps for all LayerNorms; the head's own, where it differs, is written beside it for us.
    """
    name = type(model).__name__
    config: dict[str, Any] = dataclasses.asdict(model.config)
    config |= labels_to_hugging_face(config["id2label"])
    if config["classifier_layer_norm_eps"] == config["layer_norm_eps"]:
        del config["classifier_layer_norm_eps"]
    config |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32"}
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- the project's own files -----------------------------------------------------------------------------------------


def _timm_rules(ours: str) -> tuple[Rule, ...]:
    """The names of `timm`'s DeiT, below `v.` in the project's files."""
    theirs, mine = "blocks.{i}.", ours + "layers.{i}."
    parts = tuple(f"{mine}attention.{p}_proj" for p in "qkv")
    return (
        Rule("cls_token", f"{ours}embeddings.cls_token"),
        Rule("dist_token", f"{ours}embeddings.distillation_token"),
        Rule("pos_embed", f"{ours}embeddings.position_embeddings"),
        Rule("patch_embed.proj.weight", f"{ours}embeddings.patch_embeddings.projection.kernel", conv2d),
        Rule("patch_embed.proj.bias", f"{ours}embeddings.patch_embeddings.projection.bias"),
        Rule(f"{theirs}attn.qkv.weight", tuple(f"{p}.kernel" for p in parts), split(3) >> transpose),
        Rule(f"{theirs}attn.qkv.bias", tuple(f"{p}.bias" for p in parts), split(3)),
        *_linear(f"{theirs}attn.proj", f"{mine}attention.o_proj"),
        *_linear(f"{theirs}mlp.fc1", f"{mine}mlp.fc1"),
        *_linear(f"{theirs}mlp.fc2", f"{mine}mlp.fc2"),
        *_norm(f"{theirs}norm1", f"{mine}layernorm_before"),
        *_norm(f"{theirs}norm2", f"{mine}layernorm_after"),
        *_norm("norm", f"{ours}layernorm"),
    )


_IMAGE_HEADS = r"(head|head_dist)\.(weight|bias)"

ORIGINAL_TABLE = Table(
    (
        *(rule.prefixed("v.", "") for rule in _timm_rules(BASE)),
        *_norm("mlp_head.0", "classifier.layernorm"),
        *_linear("mlp_head.1", "classifier.dense"),
    ),
    renames=((r"^module\.", ""),),  # what DataParallel puts in front
    ignored=(Ignore(rf"v\.{_IMAGE_HEADS}", "DeiT's heads for ImageNet, which AST leaves behind unused"),),
)

DEIT_TABLE = Table(
    _timm_rules(BASE), ignored=(Ignore(_IMAGE_HEADS, "DeiT's heads for ImageNet, which know no sounds"),)
)

ORIGINAL_EPS: dict[str, Any] = {"layer_norm_eps": 1e-6, "classifier_layer_norm_eps": 1e-5}
_STRIDES, _LENGTHS, _MELS = (10, 12, 14, 16), (1024, 512, 128), 128


def _sizes(tensors: Tensors, prefix: str) -> dict[str, Any]:
    """Widths and depth, from shapes."""
    names = tensors.names()
    layers = {int(m[1]) for n in names if (m := re.match(rf"{re.escape(prefix)}blocks\.(\d+)\.", n))}
    width = tensors.shape(f"{prefix}cls_token")[-1]
    if width % HEAD_WIDTH:
        raise CheckpointError(f"the width {width} is no multiple of {HEAD_WIDTH}, the width of a head in DeiT.")
    return {
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_WIDTH,
        "intermediate_size": tensors.shape(f"{prefix}blocks.0.mlp.fc1.bias")[0],
        "patch_size": tensors.shape(f"{prefix}patch_embed.proj.weight")[-1],
    }


def _grid_from(patches: int, patch: int, path: Path) -> dict[str, Any]:
    """Strides and length, which the file does not hold: from its name (`audioset_12_12_0.4467.pth`) and its patches.

    Without strides in the name, the released strides and lengths are tried for the number of patches.
    """
    named = re.search(r"_(\d{1,2})_(\d{1,2})_", path.name)
    for strides in [(int(named[1]), int(named[2]))] if named else [(s, s) for s in _STRIDES]:
        rows = (_MELS - patch) // strides[0] + 1
        columns, rest = divmod(patches, rows)
        if rest or not columns:
            continue
        shortest = (columns - 1) * strides[1] + patch
        fits = [n for n in _LENGTHS if (n - patch) // strides[1] + 1 == columns]
        if fits or named:
            length = fits[0] if fits else shortest
            return {"frequency_stride": strides[0], "time_stride": strides[1], "max_length": length}
    raise CheckpointError(
        f"{path} has positions for {patches} patches, which no released stride and length give; put the strides into "
        "the file's name (audioset_10_10_….pth)."
    )


def _labels_beside(path: Path, count: int) -> tuple[str, ...]:
    """The names of the classes, which the file does not hold, from the project's list of them if it lies beside.

    `class_labels_indices.csv`, also `esc_…` and `speechcommands_…`, has the columns index, mid and display_name.
    """
    for table in sorted(path.parent.glob("*class_labels_indices.csv")):
        try:
            with table.open(encoding="utf-8", newline="") as file:
                names = {int(row["index"]): row["display_name"] for row in csv.DictReader(file)}
        except (KeyError, TypeError, ValueError, csv.Error) as problem:
            raise CheckpointError(f"{table} is no list of classes: index, mid, display_name ({problem}).") from None
        if set(names) == set(range(count)):
            return tuple(names[i] for i in range(count))
    return tuple(f"LABEL_{i}" for i in range(count))


def config_from_original(tensors: Tensors, path: Path) -> ASTConfig:
    """Our configuration from the shapes in one of the project's files, from its name, and from what lies beside it."""
    prefix = "module.v." if "module.v.cls_token" in tensors.names() else "v."
    sizes = _sizes(tensors, prefix)
    patches = tensors.shape(f"{prefix}pos_embed")[1] - SPECIAL_TOKENS
    labels = tensors.shape(f"{prefix.removesuffix('v.')}mlp_head.1.weight")[0]
    return ASTConfig(
        **sizes,
        **_grid_from(patches, sizes["patch_size"], path),
        **ORIGINAL_EPS,
        id2label=_labels_beside(path, labels),
    )


def features_of(config: ASTConfig) -> ASTFeatureExtractor:
    """The features that the project's code computes for a model: each task has its own length and values."""
    settings = {task["max_length"]: task for task in (AUDIOSET, ESC50, SPEECH_COMMANDS)}
    known: dict[str, Any] = settings.get(config.max_length, AUDIOSET) | {"max_length": config.max_length}
    return ASTFeatureExtractor(num_mel_bins=config.num_mel_bins, **known)


def processor_of_file(path: Path) -> ASTFeatureExtractor:
    """The features of one of the project's files: by settings that lie beside it, else those of its task."""
    if extractor_settings(path.parent) is not None:
        return ASTFeatureExtractor.from_directory(path.parent)
    return features_of(config_from_original(open_tensors(path), path))


# --- DeiT ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageWeights:
    """DeiT's tensors as AST starts from them: patch weights for one channel, positions for the spectrogram's grid.

    Attributes:
        tensors: of a distilled DeiT.
        config: of the AST to be.
    """

    tensors: Tensors
    config: ASTConfig

    def names(self) -> list[str]:
        """Every tensor's name."""
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives."""
        shape = self.tensors.shape(name)
        if name == "patch_embed.proj.weight":
            return (shape[0], 1, *shape[2:])
        if name == "pos_embed":
            rows, columns = self.config.grid
            return (1, SPECIAL_TOKENS + rows * columns, shape[2])
        return shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor."""
        return self.tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        """One tensor, changed where AST differs."""
        array = self.tensors.read(name)
        if name == "patch_embed.proj.weight":
            return sum_channels(array)
        if name == "pos_embed":
            side = round((array.shape[1] - SPECIAL_TOKENS) ** 0.5)
            return resize_position_embeddings(array, (side, side), self.config.grid)
        return array


def config_from_deit(tensors: Tensors, **changes: Any) -> ASTConfig:
    """The configuration of an AST that starts from these DeiT weights; by default for AudioSet at stride 10."""
    default = ASTConfig.audioset_10_10()
    return dataclasses.replace(default, **(_sizes(tensors, "") | ORIGINAL_EPS | changes))


def from_deit(
    path: str | Path, *, rngs: nnx.Rngs, dtype: Any = None, param_dtype: Any = jnp.float32, **changes: Any
) -> ASTForAudioClassification:
    """An AST for training, from ImageNet weights (§2.2 of the paper).

    Args:
        path: a distilled DeiT of `timm` or of the DeiT project (`deit_base_distilled_patch16_384-d0272ac0.pth`).
        rngs: for the head, which starts at random.
        dtype: of the computation.
        param_dtype: of the parameters.
        changes: fields of `ASTConfig`: `id2label`, `max_length`, `time_stride`, `frequency_stride`, `num_mel_bins`,
            `hidden_dropout_prob` …; sizes come from the file.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if it is damaged or no distilled DeiT.
    """
    path = Path(path)
    with open_tensors(path) as tensors:
        if not _is_deit(tensors.names()):
            raise CheckpointError(f"{path} is no distilled DeiT: it lacks dist_token or blocks.0.attn.qkv.weight.")
        config = config_from_deit(tensors, **changes)
        model = ASTForAudioClassification(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        flat = {".".join(map(str, p)): (p, v) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
        source, shapes = ImageWeights(tensors, config), {name: leaf[...] for name, (_, leaf) in flat.items()}
        steps = DEIT_TABLE.plan(source, shapes, where=str(path), model=CLASSIFIER, may_be_absent=r"classifier\..*")
        for name, array in DEIT_TABLE.read(source, steps):
            place, leaf = flat[name]
            flat[name] = (place, leaf.replace(jnp.asarray(np.ascontiguousarray(array), param_dtype)))
    nnx.update(model, nnx.from_flat_state(list(flat.values())))
    return model


def is_deit(path: Path) -> bool:
    """Is this a file of a distilled DeiT?"""
    return path.is_file() and _is_deit(open_tensors(path).names())


def _is_deit(names: list[str]) -> bool:
    return {"dist_token", "pos_embed", "blocks.0.attn.qkv.weight"} <= set(names)


# --- the ways in -----------------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Is this one of the project's `.pth` files?"""
    if path.is_dir() or path.suffix not in {".pth", ".pt"}:
        return False
    names = set(open_tensors(path).names())
    return any({f"{p}v.dist_token", f"{p}mlp_head.1.weight"} <= names for p in ("", "module."))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory or one of the project's files.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir():
        raw = read_json(path / "config.json")
        config = config_from_hugging_face(raw, str(path / "config.json"))
        name = model_class or str((raw.get("architectures") or [CLASSIFIER])[0])
        return ForeignCheckpoint(name, config, open_tensors(path), hugging_face_table(config, name), path)
    tensors = open_tensors(path)
    if _is_deit(tensors.names()):
        raise CheckpointError(
            f"{path} is a DeiT for images: `audiozoo train ast --init` starts from it, and from_deit of "
            "weights_conversion.audio_spectrogram_transformer makes an AST of it."
        )
    if not recognise(path):
        raise CheckpointError(f"{path} is none of AST's own files; give the directory that also holds its config.json.")
    if model_class not in (None, CLASSIFIER):
        raise CheckpointError(f"{path} holds a whole classifier; it loads as {CLASSIFIER}, not as {model_class}.")
    config = config_from_original(tensors, path)
    if config.id2label[:1] == ("LABEL_0",):
        warn_of_nameless_classes(
            path,
            config.num_labels,
            "the project's list of them beside it: class_labels_indices.csv, from egs/audioset/data of its repository "
            "(esc_… and speechcommands_… for the other tasks).",
        )
    return ForeignCheckpoint(CLASSIFIER, config, tensors, ORIGINAL_TABLE, path)
