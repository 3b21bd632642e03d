"""Bark's foreign forms: Hugging Face directories, of the whole or of one stage, and Suno's `.pt` files.

Suno publishes each stage as a dictionary with its sizes (`model_args`) and its tensors (`model`): `text.pt`,
`coarse.pt` and `fine.pt` are the small models, `text_2.pt`, `coarse_2.pt` and `fine_2.pt` the large ones. A directory
with one of each and with EnCodec's own file is a whole Bark; where there are both sizes, the large one is taken, as
Suno's code does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.decoding import GenerationConfig
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.bark import (
    BarkCoarseGenerationConfig,
    BarkConfig,
    BarkFineConfig,
    BarkFineGenerationConfig,
    BarkGenerationConfig,
    BarkSemanticGenerationConfig,
    BarkSubModelConfig,
)
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, encodec, read_json, take
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Constant, Ignore, Rule, Table, Tensors, Tied, identity, split, transpose

MODEL_TYPE = "bark"
WHOLE = "BarkModel"
# our class: (model_type, part of the whole, its configuration's name)
STAGES = {
    "BarkSemanticModel": ("semantic", "semantic", "semantic_config"),
    "BarkCoarseModel": ("coarse_acoustics", "coarse_acoustics", "coarse_acoustics_config"),
    "BarkFineModel": ("fine_acoustics", "fine_acoustics", "fine_acoustics_config"),
}
MODEL_TYPES = (MODEL_TYPE, *(kind for kind, _, _ in STAGES.values()))
CODEC = "codec_model"

# --- tables ----------------------------------------------------------------------------------------------------------


def _block(foreign: Mapping[str, str], layers: str) -> list[Rule]:
    """The rules of a block, and of what surrounds the blocks, by either project's names."""
    ours, qkv = "layers.{i}.", tuple(f"layers.{{i}}.attn.{p}_proj" for p in "qkv")
    rules = [
        Rule(f"{layers}{foreign['qkv']}.weight", tuple(f"{p}.kernel" for p in qkv), split(3) >> transpose),
        Rule(f"{layers}{foreign['qkv']}.bias", tuple(f"{p}.bias" for p in qkv), split(3)),
        Rule(f"{foreign['positions']}.weight", "position_embeds_layer.embedding"),
    ]
    for theirs, mine in (
        (foreign["out"], "attn.out_proj"),
        (foreign["in"], "mlp.in_proj"),
        (foreign["mlp_out"], "mlp.out_proj"),
    ):
        rules.append(Rule(f"{layers}{theirs}.weight", f"{ours}{mine}.kernel", transpose))
        rules.append(Rule(f"{layers}{theirs}.bias", f"{ours}{mine}.bias"))
    for theirs, mine in (
        (layers + foreign["norm_1"], ours + "layernorm_1"),
        (layers + foreign["norm_2"], ours + "layernorm_2"),
        (foreign["norm"], "layernorm_final"),
    ):
        rules.append(Rule(f"{theirs}.weight", f"{mine}.scale"))
        rules.append(Rule(f"{theirs}.bias", f"{mine}.bias"))
    return rules


_HUGGING_FACE = {
    "qkv": "attn.att_proj",
    "out": "attn.out_proj",
    "in": "mlp.in_proj",
    "mlp_out": "mlp.out_proj",
    "norm_1": "layernorm_1",
    "norm_2": "layernorm_2",
    "norm": "layernorm_final",
    "positions": "position_embeds_layer",
}
_SUNO = {
    "qkv": "attn.c_attn",
    "out": "attn.c_proj",
    "in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
    "norm_1": "ln_1",
    "norm_2": "ln_2",
    "norm": "transformer.ln_f",
    "positions": "transformer.wpe",
}


def _stage_table(config: BarkSubModelConfig, *, suno: bool) -> Table:
    """The correspondence of one stage."""
    names, layers = (_SUNO, "transformer.h.{i}.") if suno else (_HUGGING_FACE, "layers.{i}.")
    rules, tied = _block(names, layers), []
    if isinstance(config, BarkFineConfig):
        tables = "transformer.wtes.{k}.weight" if suno else "input_embeds_layers.{k}.weight"
        rules.append(Rule(tables, "input_embeds_layers.{k}.embedding", identity))
        if config.tie_word_embeddings:
            heads = range(config.n_codes_total - config.n_codes_given)
            tied = [Tied(f"lm_heads.{i}.weight", tables.format(k=i + 1)) for i in heads]
        else:
            rules.append(Rule("lm_heads.{k}.weight", "lm_heads.{k}.kernel", transpose))
    else:
        table = "transformer.wte.weight" if suno else "input_embeds_layer.weight"
        rules.append(Rule(table, "input_embeds_layer.embedding"))
        rules.append(Rule("lm_head.weight", "lm_head.kernel", transpose))
    if suno:
        mask = Ignore(r"transformer\.h\.\d+\.attn\.bias", "the table of the causal mask")
        return Table(tuple(rules), ((r"^_orig_mod\.", ""),), (mask,), tuple(tied))
    constants = []
    if not isinstance(config, BarkFineConfig):
        size = config.block_size

        def mask_table() -> np.ndarray:
            return np.tril(np.ones((1, 1, size, size), bool))

        constants = [Constant(f"layers.{i}.attn.bias", mask_table) for i in range(config.num_layers)]
    return Table(tuple(rules), tied=tuple(tied), constants=tuple(constants))


def _inside(table: Table, part: str, ours: str | None = None) -> Table:
    """A table one level deeper."""
    prefix, mine = f"{part}.", f"{part if ours is None else ours}.".lstrip(".")
    return Table(
        tuple(rule.prefixed(prefix, mine) for rule in table.rules),
        (),  # renames are given for the whole
        tuple(Ignore(re.escape(prefix) + i.pattern, i.reason) for i in table.ignored),
        tuple(Tied(prefix + t.name, prefix + t.same_as) for t in table.tied),
        tuple(Constant(prefix + c.name, c.value) for c in table.constants),
    )


def _joined(tables: list[Table], renames: Any) -> Table:
    return Table(
        tuple(r for t in tables for r in t.rules),
        tuple(renames),
        tuple(i for t in tables for i in t.ignored),
        tuple(p for t in tables for p in t.tied),
        tuple(c for t in tables for c in t.constants),
    )


def hugging_face_table(config: Any, model_class: str = WHOLE) -> Table:
    """The correspondence with what `save_pretrained` writes of the whole, or of one stage alone.

    Args:
        config: of the whole, or of the stage.
        model_class: the class.
    """
    if model_class in STAGES:
        return _stage_table(config, suno=False)
    if model_class != WHOLE:
        raise CheckpointError(f"{model_class} is not one of Bark's classes.")
    tables = [_inside(_stage_table(getattr(config, name), suno=False), part) for _, part, name in STAGES.values()]
    codec = encodec.hugging_face_table(config.codec_config)
    return _joined([*tables, _inside(codec, CODEC)], codec.renames)


def stage_of_whole_table(config: BarkConfig, model_class: str) -> Table:
    """The correspondence of one stage with a file that holds the whole."""
    _, part, name = STAGES[model_class]
    table = _inside(_stage_table(getattr(config, name), suno=False), part, "")
    others = "|".join([*(p for _, p, _ in STAGES.values() if p != part), CODEC])
    ignored = (*table.ignored, Ignore(rf"({others})\..*", "another part of the whole"))
    return dataclasses.replace(table, ignored=ignored)


def original_table(config: Any, model_class: str = WHOLE) -> Table:
    """The correspondence with Suno's file of one stage, or with a directory of them and EnCodec's."""
    if model_class in STAGES:
        return _stage_table(config, suno=True)
    tables = [_inside(_stage_table(getattr(config, name), suno=True), part) for _, part, name in STAGES.values()]
    codec = encodec.original_table(config.codec_config)
    return _joined([*tables, _inside(codec, CODEC)], [(r"^(\w+\.)_orig_mod\.", r"\1"), *codec.renames])


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _defaults(cls: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls)}


def stage_config(config: Mapping[str, Any], model_class: str, where: str) -> Any:
    """Our configuration of one stage from its part of a `config.json`."""
    cls = BarkFineConfig if model_class == "BarkFineModel" else BarkSubModelConfig
    # Other papers' files name some sizes in two ways, and so does transformers.
    renamed = {"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads", "vocab_size": "input_vocab_size"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    return cls(**take(config, _defaults(cls), where))


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> BarkConfig:
    """Our configuration from a `config.json`; a part that it does not name is as `transformers` has it."""
    parts = {}
    for model_class, (_, _, name) in STAGES.items():
        parts[name] = stage_config(_object(config, name, where), model_class, f"{where}: {name}")
    codec = encodec.config_from_hugging_face(_object(config, "codec_config", where), f"{where}: codec_config")
    return BarkConfig(**parts, codec_config=codec)


def _object(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {name} is {value!r}, which is no JSON object.")
    return value


_GENERATION = (
    ("semantic_config", BarkSemanticGenerationConfig),
    ("coarse_acoustics_config", BarkCoarseGenerationConfig),
    ("fine_acoustics_config", BarkFineGenerationConfig),
)
_SET_BY_STAGE = ("eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate")
_OPTIONS = {f.name: f.default for f in dataclasses.fields(GenerationConfig)}


def generation_from_hugging_face(raw: Mapping[str, Any], where: str = "generation_config.json") -> BarkGenerationConfig:
    """Our settings from a `generation_config.json`: numbers, and the options that are not at their defaults."""
    parts: dict[str, Any] = {}
    for name, cls in _GENERATION:
        given = _object(raw, name, where)
        taken = take(given, {n: d for n, d in _defaults(cls).items() if n not in ("options", "min_eos_p")}, where)
        if "options" in _defaults(cls):
            options = dict(_defaults(cls)["options"])
            for option, value in given.items():
                if option in _OPTIONS and option not in _SET_BY_STAGE and value is not None:
                    options[option] = tuple(value) if isinstance(value, list) else value
            kept = {n: v for n, v in options.items() if v != _OPTIONS[n]}
            taken["options"] = tuple(sorted(kept.items()))
            GenerationConfig.from_dict(kept)  # says so if a value makes no sense
        if isinstance(given.get("min_eos_p"), (int, float)):
            taken["min_eos_p"] = float(given["min_eos_p"])
        if name == "fine_acoustics_config" and "temperature" in given and given["temperature"] is None:
            taken["temperature"] = None
        parts[name] = cls(**taken)
    plain = take(raw, {"sample_rate": 24_000, "codebook_size": 1024}, where)
    return BarkGenerationConfig(**parts, **plain)


def _generation_to_hugging_face(config: BarkGenerationConfig) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name, _ in _GENERATION:
        part = dataclasses.asdict(getattr(config, name))
        files[name] = part | dict(part.pop("options", ()))
    files["semantic_config"]["semantic_pad_token"] = config.semantic_config.eos_token_id
    return files | {"sample_rate": config.sample_rate, "codebook_size": config.codebook_size, "model_type": MODEL_TYPE}


def hugging_face(model: Any) -> HuggingFaceForm:
    """A Bark, or one of its stages, as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    table = hugging_face_table(model.config, name)
    if name in STAGES:
        config = dataclasses.asdict(model.config) | {"model_type": STAGES[name][0]}
        return HuggingFaceForm({"config.json": config | {"architectures": [name], "dtype": "float32"}}, table)
    config = {}
    for kind, _, part in STAGES.values():
        config[part] = dataclasses.asdict(getattr(model.config, part)) | {"model_type": kind}
    codec = {n: v for n, v in dataclasses.asdict(model.config.codec_config).items() if not n.startswith("language_")}
    codec["codebook_dim"] = codec["hidden_size"]
    config["codec_config"] = codec | {"model_type": encodec.MODEL_TYPE}
    config |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32"}
    generation = _generation_to_hugging_face(model.generation_config)
    return HuggingFaceForm({"config.json": config, "generation_config.json": generation}, table)


# --- Suno's files ----------------------------------------------------------------------------------------------------

FILES = {"BarkSemanticModel": "text", "BarkCoarseModel": "coarse", "BarkFineModel": "fine"}
_ARGUMENTS = {
    "n_layer": "num_layers",
    "n_head": "num_heads",
    "n_embd": "hidden_size",
    "block_size": "block_size",
    "input_vocab_size": "input_vocab_size",
    "output_vocab_size": "output_vocab_size",
    "bias": "bias",
    "dropout": "dropout",
    "n_codes_total": "n_codes_total",
    "n_codes_given": "n_codes_given",
}


def _bare(tensors: Tensors) -> set[str]:
    return {name.removeprefix("_orig_mod.") for name in tensors.names()}


def _kind(tensors: Tensors) -> str | None:
    """Which stage a file of Suno's holds."""
    names = _bare(tensors)
    if {"transformer.wpe.weight", "transformer.wtes.0.weight"} <= names:
        return "BarkFineModel"
    if {"transformer.wpe.weight", "transformer.wte.weight", "lm_head.weight"} <= names:
        prefix = "" if "lm_head.weight" in tensors.names() else "_orig_mod."
        written = tensors.shape(prefix + "lm_head.weight")[0]
        # The semantic model reads texts, which it does not write; the coarse one reads what it writes.
        same = written == tensors.shape(prefix + "transformer.wte.weight")[0]
        return "BarkCoarseModel" if same else "BarkSemanticModel"
    return None


def config_from_original(tensors: Any, model_class: str) -> Any:
    """Our configuration of a stage from the `model_args` of its file."""
    arguments = tensors.metadata.get("model_args")
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"{tensors.path} has no model_args, which say how many heads it has.")
    arguments = dict(arguments)
    if "vocab_size" in arguments:
        arguments.setdefault("input_vocab_size", arguments["vocab_size"])
        arguments.setdefault("output_vocab_size", arguments["vocab_size"])
    cls = BarkFineConfig if model_class == "BarkFineModel" else BarkSubModelConfig
    named = {mine: arguments[theirs] for theirs, mine in _ARGUMENTS.items() if theirs in arguments}
    return cls(**take(named, _defaults(cls), str(tensors.path)))


class _Together:
    """Several files as one: each tensor's name begins with the part of the model that its file holds."""

    def __init__(self, parts: Mapping[str, Any]):
        self.parts = dict(parts)

    def names(self) -> list[str]:
        return [f"{part}.{name}" for part, tensors in self.parts.items() for name in tensors.names()]

    def _of(self, name: str) -> tuple[Any, str]:
        part, _, rest = name.partition(".")
        return self.parts[part], rest

    def shape(self, name: str) -> tuple[int, ...]:
        tensors, rest = self._of(name)
        return tensors.shape(rest)

    def dtype(self, name: str) -> np.dtype:
        tensors, rest = self._of(name)
        return tensors.dtype(rest)

    def read(self, name: str) -> np.ndarray:
        tensors, rest = self._of(name)
        return tensors.read(rest)


def _stage_file(path: Path, stem: str) -> Path | None:
    return next((f for f in (path / f"{stem}_2.pt", path / f"{stem}.pt") if f.is_file()), None)


def _open_suno_directory(path: Path) -> ForeignCheckpoint:
    parts, configs = {}, {}
    for model_class, (_, part, name) in STAGES.items():
        file = _stage_file(path, FILES[model_class])
        if file is None:
            stem = FILES[model_class]
            raise SourceError(f"{path} has neither {stem}_2.pt nor {stem}.pt, which hold Bark's {part} model.")
        tensors = open_tensors(file)
        if (kind := _kind(tensors)) != model_class:
            raise CheckpointError(f"{file} holds {f'a {kind}' if kind else 'something else'}, not a {model_class}.")
        parts[part], configs[name] = tensors, config_from_original(tensors, model_class)
    codecs = sorted([*path.glob("encodec*.th"), *path.glob("encodec*.pt"), *path.glob("encodec*.pth")])
    if not codecs:
        raise SourceError(
            f"{path} has no encodec_24khz-d7cc33bc.th; Suno's code downloads it apart. Put EnCodec's file there, or "
            "load a stage by itself."
        )
    codec = open_tensors(codecs[0])
    codec_config = encodec.config_from_original(codec)
    parts[CODEC] = codec
    config = BarkConfig(**configs, codec_config=codec_config)
    return ForeignCheckpoint(WHOLE, config, _Together(parts), original_table(config), path)


# --- the ways in -----------------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Is this one of Suno's files, or a directory of them?"""
    if path.is_dir():
        return all(_stage_file(path, stem) for stem in FILES.values())
    return path.suffix in {".pt", ".pth"} and _kind(open_tensors(path)) is not None


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory, one of Suno's files or a directory of them.

    A stage can be taken out of a directory that holds the whole, by its `model_class`.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return _open_hugging_face(path, model_class)
    if path.is_dir():
        if model_class not in STAGES:
            return _open_suno_directory(path)
        file = _stage_file(path, FILES[model_class])
        if file is None:
            raise SourceError(f"{path} has no file of Suno's that holds a {model_class}.")
        path = file
    tensors = open_tensors(path)
    name = _kind(tensors)
    if name is None:
        raise CheckpointError(f"{path} is none of Suno's files; give the directory that also holds its config.json.")
    if model_class not in (None, name):
        raise CheckpointError(f"{path} holds a {name}, not a {model_class}.")
    config = config_from_original(tensors, name)
    return ForeignCheckpoint(name, config, tensors, original_table(config, name), path)


def _open_hugging_face(path: Path, model_class: str | None) -> ForeignCheckpoint:
    where = str(path / "config.json")
    raw = read_json(path / "config.json")
    side = path / "generation_config.json"
    generation = generation_from_hugging_face(read_json(side) if side.is_file() else {}, str(side))
    tensors, attributes = open_tensors(path), {"generation_config": generation}
    alone = {kind: name for name, (kind, _, _) in STAGES.items()}.get(str(raw.get("model_type")))
    if alone is not None:
        if model_class not in (None, alone):
            raise CheckpointError(f"{path} holds a {alone}, not a {model_class}.")
        stage = stage_config(raw, alone, where)
        return ForeignCheckpoint(alone, stage, tensors, hugging_face_table(stage, alone), path, attributes)
    config, name = config_from_hugging_face(raw, where), model_class or WHOLE
    if name in STAGES:
        stage = getattr(config, STAGES[name][2])
        return ForeignCheckpoint(name, stage, tensors, stage_of_whole_table(config, name), path, attributes)
    return ForeignCheckpoint(name, config, tensors, hugging_face_table(config, name), path, attributes)
