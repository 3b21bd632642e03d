"""MusicGen's foreign forms: Hugging Face directories, and the authors' `state_dict.bin` beside a codec.

The authors' file holds the language model and its projections, with their configuration as YAML under `xp.cfg`. The
codec is in `compression_state_dict.bin`, or that names one of the hub. T5 is in neither: a directory `t5-base` beside
them is taken (AudioGen: `t5-large`), else the hub's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo import hub
from audiozoo.errors import CheckpointError, SourceError, UsageError
from audiozoo.models.encodec import EncodecConfig
from audiozoo.models.musicgen import MusicgenConfig, MusicgenGenerationConfig
from audiozoo.models.t5 import T5Config
from audiozoo.processors.encodec import EncodecFeatureExtractor
from audiozoo.processors.musicgen import MusicgenMelodyFeatureExtractor, MusicgenMelodyProcessor, MusicgenProcessor
from audiozoo.text.t5_tokenizer import T5Tokenizer
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, encodec, read_json, search_options, take
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table, Tensors, Tied, fuse, split, transpose
from weights_conversion.t5_names import stack

WHOLE, MELODY = "MusicgenForConditionalGeneration", "MusicgenMelodyForConditionalGeneration"
DECODER, MELODY_DECODER = "MusicgenForCausalLM", "MusicgenMelodyForCausalLM"
CLASSES = {WHOLE: "musicgen", MELODY: "musicgen_melody", DECODER: "musicgen_decoder"}
CLASSES |= {MELODY_DECODER: "musicgen_melody_decoder"}
MODEL_TYPES = tuple(CLASSES.values())
MODEL_TYPE = MODEL_TYPES[0]

# --- tables ----------------------------------------------------------------------------------------------------------

_LINEARS = "{p:self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.out_proj|fc1|fc2}"
_CROSS_LINEARS = "encoder_attn.{p:q_proj|k_proj|v_proj|out_proj}"
_NORMS = "{n:self_attn_layer_norm|final_layer_norm}"
# Older files keep the table of positions, which follows from the sizes.
_POSITIONS = Ignore(r"(.*\.)?embed_positions\.weights", "the table of positions, which follows from the sizes")


def _norm(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.scale"), Rule(f"{foreign}.bias", f"{ours}.bias")


def _linear(foreign: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{foreign}.weight", f"{ours}.kernel", transpose), Rule(f"{foreign}.bias", f"{ours}.bias")


def _streams(config: MusicgenConfig, embeddings: str, heads: str) -> tuple[Rule, Rule]:
    """One table, and one map, of ours for those of all streams."""
    count = config.num_codebooks
    return (
        Rule(tuple(embeddings.format(k) for k in range(count)), "model.embed_tokens.embedding", fuse(count)),
        Rule(tuple(heads.format(k) for k in range(count)), "lm_heads.kernel", fuse(count) >> transpose),
    )


def decoder_rules(config: MusicgenConfig, cross: bool) -> tuple[Rule, ...]:
    """`transformers`' `MusicgenForCausalLM`."""
    layer = "layers.{i}."
    rules: list[Rule] = [
        *_streams(config, "model.decoder.embed_tokens.{}.weight", "lm_heads.{}.weight"),
        Rule(f"model.decoder.{layer}{_LINEARS}.weight", f"model.{layer}{_LINEARS}.kernel", transpose),
        *_norm(f"model.decoder.{layer}{_NORMS}", f"model.{layer}{_NORMS}"),
        *_norm("model.decoder.layer_norm", "model.layer_norm"),
    ]
    if cross:
        attention = f"{layer}{_CROSS_LINEARS}"
        rules.append(Rule(f"model.decoder.{attention}.weight", f"model.{attention}.kernel", transpose))
        rules += _norm(f"model.decoder.{layer}encoder_attn_layer_norm", f"model.{layer}encoder_attn_layer_norm")
    return tuple(rules)


def original_decoder_rules(config: MusicgenConfig, cross: bool) -> tuple[Rule, ...]:
    """The authors' `LMModel`: queries, keys and values fused, norms and maps by other names."""
    theirs, ours = "transformer.layers.{i}.", "model.layers.{i}."

    def attention(there: str, here: str) -> tuple[Rule, Rule]:
        parts = tuple(f"{ours}{here}.{p}_proj.kernel" for p in "qkv")
        return (
            Rule(f"{theirs}{there}.in_proj_weight", parts, split(3) >> transpose),
            Rule(f"{theirs}{there}.out_proj.weight", f"{ours}{here}.out_proj.kernel", transpose),
        )

    rules: list[Rule] = [
        *_streams(config, "emb.{}.weight", "linears.{}.weight"),
        *attention("self_attn", "self_attn"),
        Rule(f"{theirs}linear1.weight", f"{ours}fc1.kernel", transpose),
        Rule(f"{theirs}linear2.weight", f"{ours}fc2.kernel", transpose),
        *_norm(f"{theirs}norm1", f"{ours}self_attn_layer_norm"),
        *_norm(f"{theirs}norm2", f"{ours}final_layer_norm"),
        *_norm("out_norm", "model.layer_norm"),
    ]
    if cross:
        rules += [*attention("cross_attention", "encoder_attn")]
        rules += _norm(f"{theirs}norm_cross", f"{ours}encoder_attn_layer_norm")
    return tuple(rules)


def _text_rules(foreign: str) -> tuple[tuple[Rule, ...], tuple[Tied, ...]]:
    rules = (
        Rule(f"{foreign}shared.weight", "text_encoder.shared.embedding"),
        *stack(f"{foreign}encoder.", "text_encoder.encoder.", decoder=False),
    )
    return rules, (Tied(f"{foreign}encoder.embed_tokens.weight", f"{foreign}shared.weight"),)


def _prefixed(rules: Any, foreign: str, ours: str) -> tuple[Rule, ...]:
    return tuple(rule.prefixed(foreign, ours) for rule in rules)


def hugging_face_table(config: MusicgenConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes, now or before."""
    if model_class not in CLASSES:
        raise CheckpointError(f"{model_class} is not one of MusicGen's classes.")
    melody = model_class in (MELODY, MELODY_DECODER)
    decoder = decoder_rules(config, cross=not melody)
    if model_class in (DECODER, MELODY_DECODER):
        return Table(decoder, ignored=(_POSITIONS,))
    text, tied = _text_rules("text_encoder.")
    codec = encodec.hugging_face_table(config.audio_encoder).rules
    rules = [*text, *_prefixed(codec, "audio_encoder.", "audio_encoder."), *_prefixed(decoder, "decoder.", "decoder.")]
    if config.text_encoder.d_model != config.hidden_size:
        rules += _linear("enc_to_dec_proj", "enc_to_dec_proj")
    if melody and config.num_chroma != config.hidden_size:
        rules += _linear("audio_enc_to_dec_proj", "audio_enc_to_dec_proj")
    return Table(tuple(rules), renames=WEIGHT_NORM_RENAMES, ignored=(_POSITIONS,), tied=tied)


_CONDITIONERS = "condition_provider.conditioners."
_WINDOW = Ignore(
    r"condition_provider\.conditioners\.self_wav\.chroma\..*", "the chromagram's window and filters, which follow"
)


def original_table(config: MusicgenConfig, model_class: str, codec: Table | None = None) -> Table:
    """The correspondence with the authors' language model, joined with a codec and a T5 by `Joined`.

    Args:
        config: our configuration.
        model_class: ours.
        codec: the codec's own table, AudioCraft's by default.
    """
    melody = model_class == MELODY
    text, tied = _text_rules("text_encoder.")
    codec = codec or encodec.original_table(config.audio_encoder)
    rules = [
        *_prefixed(original_decoder_rules(config, cross=not melody), "", "decoder."),
        *_linear(f"{_CONDITIONERS}description.output_proj", "enc_to_dec_proj"),
        *_prefixed(codec.rules, "audio_encoder.", "audio_encoder."),
        *text,
    ]
    if melody:
        rules += _linear(f"{_CONDITIONERS}self_wav.output_proj", "audio_enc_to_dec_proj")
    unread = Ignore(r"text_encoder\.(decoder|lm_head)\..*", "T5's decoder, which has no use here")
    return Table(tuple(rules), renames=WEIGHT_NORM_RENAMES, ignored=(_WINDOW, unread), tied=tied)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_DECODER_FIELDS = (
    "vocab_size",
    "num_codebooks",
    "audio_channels",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "ffn_dim",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
)
_T5_FIELDS = {f.name: f.default for f in dataclasses.fields(T5Config) if f.name not in ("gated", "dense_act_fn")}
_DEFAULT = MusicgenConfig()


def t5_from_hugging_face(config: Mapping[str, Any], where: str) -> T5Config:
    """A T5's configuration; what the file does not say is as `transformers`' `T5Config` has it."""
    defaults = {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    taken = defaults | take(config, _T5_FIELDS, where)
    taken.setdefault("num_decoder_layers", taken["num_layers"])
    name = str(config.get("feed_forward_proj", "relu"))
    gated, act = name.startswith("gated-"), name.removeprefix("gated-")
    return T5Config(**taken, gated=gated, dense_act_fn="gelu_new" if name == "gated-gelu" else act)


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> MusicgenConfig:
    """Our configuration from the `config.json` of a whole model, or of a decoder alone.

    Raises:
        CheckpointError: for what the model cannot be.
    """
    whole = "decoder" in config
    decoder = config["decoder"] if whole else config
    fields = {name: getattr(_DEFAULT, name) for name in _DECODER_FIELDS}
    taken = take(decoder, fields, where)
    if whole:
        text, audio = config.get("text_encoder", {}), config.get("audio_encoder", {})
        for part, kind in ((text, "t5"), (audio, "encodec")):
            if part.get("model_type", kind) != kind:
                raise CheckpointError(f"{where}: MusicGen's parts are a T5 and an EnCodec, not a {part['model_type']}.")
        taken["text_encoder"] = t5_from_hugging_face(text, where)
        taken["audio_encoder"] = encodec.config_from_hugging_face(audio, where)
        taken |= take(config, {"num_chroma": 12, "chroma_length": 235, "segment_duration": 30.0}, where)
    size = taken.get("vocab_size", _DEFAULT.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "decoder_start_token_id"):
        if decoder.get(name, size) not in (None, size):
            raise CheckpointError(f"{where}: {name} is {decoder[name]}; MusicGen's special token is {size}.")
    if decoder.get("cross_attention_hidden_size") is not None:
        raise CheckpointError(f"{where}: a decoder with cross_attention_hidden_size is none that was published.")
    try:
        return MusicgenConfig(**taken)
    except UsageError as problem:
        raise CheckpointError(f"{where}: {problem}") from None


def generation_from_hugging_face(generation: Mapping[str, Any], where: str) -> MusicgenGenerationConfig:
    """Our settings from a `generation_config.json`; what it does not say is as in the paper."""
    named = {f.name: f.default for f in dataclasses.fields(MusicgenGenerationConfig) if f.name != "others"}
    others = search_options(generation, where, named)
    return MusicgenGenerationConfig(**take(generation, named, where), others=others)


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write.

    Raises:
        UsageError: for a pattern that `transformers` does not have.
    """
    ours, name = model.config, type(model).__name__
    standard = tuple(k // ours.audio_channels for k in range(ours.num_codebooks))
    if ours.pattern != "delay" or ours.stream_delays != standard:
        raise UsageError("transformers has MusicGen's delay pattern only; keep this model with audiozoo.save.")
    melody = name in (MELODY, MELODY_DECODER)
    ids = {"pad_token_id": ours.special_token_id, "bos_token_id": ours.special_token_id}
    decoder: dict[str, Any] = {field: getattr(ours, field) for field in _DECODER_FIELDS}
    # transformers needs the last of these where it is given labels, and its own files lack it.
    ids |= {"decoder_start_token_id": ours.special_token_id}
    decoder |= {"model_type": CLASSES[MELODY_DECODER if melody else DECODER], "dtype": "float32", **ids}
    config = decoder
    if name in (WHOLE, MELODY):
        codec = {n: v for n, v in dataclasses.asdict(ours.audio_encoder).items() if not n.startswith("language_model")}
        codec |= {"model_type": encodec.MODEL_TYPE, "codebook_dim": codec["hidden_size"]}
        text = dataclasses.asdict(ours.text_encoder)
        gated, act = text.pop("gated"), text.pop("dense_act_fn").replace("gelu_new", "gelu")
        text |= {"model_type": "t5", "feed_forward_proj": f"gated-{act}" if gated else act}
        text |= {"is_encoder_decoder": False, "use_cache": False, "tie_encoder_decoder": False}
        config = {"model_type": CLASSES[name], "dtype": "float32", "is_encoder_decoder": True}
        config |= {"text_encoder": text, "audio_encoder": codec, "decoder": decoder}
        if melody:
            config |= {"num_chroma": ours.num_chroma, "chroma_length": ours.chroma_length}
        if ours.segment_duration != _DEFAULT.segment_duration:  # transformers does not know it
            config["segment_duration"] = ours.segment_duration
    config["architectures"] = [name]
    generation = dataclasses.asdict(model.generation_config) | ids
    generation |= dict(generation.pop("others"))
    files = {"config.json": config, "generation_config.json": generation}
    return HuggingFaceForm(files, hugging_face_table(ours, name))


# --- the authors' files ----------------------------------------------------------------------------------------------


class Joined:
    """Several files as one: the names of each behind a prefix."""

    def __init__(self, parts: Mapping[str, Tensors]):
        self.places = {prefix + name: (part, name) for prefix, part in parts.items() for name in part.names()}

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        part, inner = self.places[name]
        return part.shape(inner)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor, without reading it."""
        part, inner = self.places[name]
        return part.dtype(inner)

    def read(self, name: str) -> np.ndarray:
        """One tensor's values."""
        part, inner = self.places[name]
        return part.read(inner)


def config_from_audiocraft(
    tensors: Tensors, text: str, codec: EncodecConfig, text_encoder: T5Config, where: str
) -> tuple[MusicgenConfig, MusicgenGenerationConfig]:
    """Our configuration from the language model's shapes and its `xp.cfg`, and how it is sampled.

    Raises:
        CheckpointError: for another architecture than MusicGen's.
    """
    import yaml

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for n in tensors.names() if (m := re.match(pattern, n))), default=-1)

    try:
        tree = yaml.safe_load(text)
        tree = encodec.resolved(tree, tree)
        lm, fuser = tree["transformer_lm"], tree["fuser"]
        pattern = tree["codebooks_pattern"]
        modeling, stereo = pattern["modeling"], bool((tree.get("interleave_stereo_codebooks") or {}).get("use"))
        prefixed = list(fuser.get("prepend") or [])
        if stereo and tree["interleave_stereo_codebooks"].get("per_timestep"):
            raise CheckpointError(f"{where}: streams of left and right that take turns in time are none of MusicGen's.")
        if prefixed not in ([], ["self_wav", "description"]) or fuser.get("sum") or fuser.get("input_interpolate"):
            raise CheckpointError(f"{where}: fuser {dict(fuser)} is none of MusicGen's.")
        if fuser.get("cross_attention_pos_emb") or not lm.get("norm_first"):
            raise CheckpointError(f"{where}: MusicGen's decoder has its norms first, and no positions in the text.")
        names = {"delay": "delay", "parallel": "delay", "unroll": "flatten", "coarse_first": "coarse_first"}
        if modeling not in names or lm.get("positional_embedding", "sin") != "sin":
            raise CheckpointError(f"{where}: the pattern {modeling!r}, or its positions, are none of the paper's.")
        if lm.get("past_context") is not None or not lm.get("causal", True):
            raise CheckpointError(f"{where}: MusicGen's decoder looks back at all steps, and at none that follow.")
        streams = count(r"emb\.(\d+)\.")
        entries, width = tensors.shape("emb.0.weight")
        order, delays = dict(pattern.get(modeling) or {}), None
        if modeling == "delay":
            delays = tuple(order.pop("delays", None) or range(streams))
        elif modeling == "parallel":
            delays = (0,) * streams
        # What else there is to say of a pattern says nothing by default.
        plain = {"flattening": list(range(streams)), "delays": [0] * (streams - (modeling == "coarse_first"))}
        if odd := {n: v for n, v in order.items() if v and v != plain.get(n)}:
            raise CheckpointError(f"{where}: the pattern {modeling} with {odd} is none of the released ones.")
        melody, segment = {}, float((tree.get("dataset") or {}).get("segment_duration", _DEFAULT.segment_duration))
        if prefixed:
            chroma = tree["conditioners"]["self_wav"]["chroma_stem"]
            samples = segment * tree["sample_rate"]
            hop = chroma.get("winhop") or 2 ** chroma["radix2_exp"] // 4
            melody = {"num_chroma": chroma["n_chroma"], "chroma_length": 1 + int(samples) // hop}
        config = MusicgenConfig(
            text_encoder=text_encoder,
            audio_encoder=codec,
            vocab_size=entries - 1,
            num_codebooks=streams,
            audio_channels=2 if stereo else 1,
            hidden_size=width,
            num_hidden_layers=count(r"transformer\.layers\.(\d+)\."),
            num_attention_heads=lm["num_heads"],
            ffn_dim=tensors.shape("transformer.layers.0.linear1.weight")[0],
            activation_function=lm.get("activation", "gelu"),
            dropout=float(lm.get("dropout", 0.0)),
            attention_dropout=float(lm.get("attention_dropout") or lm.get("dropout", 0.0)),
            pattern=names[modeling],
            delays=delays,
            mask_text=False,
            segment_duration=segment,
            **melody,
        )
        guidance = float((tree.get("classifier_free_guidance") or {}).get("inference_coef", 3.0))
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"{where} is not the configuration of a MusicGen ({problem!r}).") from None
    except UsageError as problem:
        raise CheckpointError(f"{where}: {problem}") from None
    return config, MusicgenGenerationConfig(guidance_scale=guidance)


_MARKS = {"emb.0.weight", "linears.0.weight", "out_norm.weight", f"{_CONDITIONERS}description.output_proj.weight"}
_T5_NAMES = {768: "t5-base", 1024: "t5-large", 512: "t5-small"}


def _file(path: Path) -> Path:
    return path / "state_dict.bin" if path.is_dir() else path


def recognise(path: Path) -> bool:
    """Is this the authors' language model, or a directory that holds it?"""
    file = _file(path)
    if file.suffix not in {".bin", ".pt", ".th"} or not file.is_file():
        return False
    return set(open_tensors(file).names()) >= _MARKS


def _codec(folder: Path) -> tuple[TensorSource, EncodecConfig, Table]:
    """The codec that lies beside the language model, or that is named there."""
    file = folder / "compression_state_dict.bin"
    if not file.is_file():
        raise SourceError(f"{folder} has no compression_state_dict.bin, the codec of the language model.")
    named = encodec.pretrained_name(file)
    if named is None:
        opened = encodec.open_checkpoint(file)
    else:
        opened = encodec.open_checkpoint(hub.resolve(named))
    assert isinstance(opened.tensors, TensorSource)
    return opened.tensors, opened.config, opened.table


def _text_encoder(folder: Path, width: int) -> tuple[TensorSource, T5Config]:
    """T5, from a directory beside the language model or from the hub."""
    name = _T5_NAMES.get(width, "t5-base")
    beside = folder / name
    try:
        path = beside if beside.is_dir() else hub.resolve(name)
    except SourceError as problem:
        raise SourceError(
            f"The authors' files do not hold the text encoder, {name}: put its directory at {beside}. ({problem})"
        ) from None
    return open_tensors(path), t5_from_hugging_face(read_json(path / "config.json"), str(path / "config.json"))


def _open_original(path: Path, model_class: str | None) -> ForeignCheckpoint:
    file = _file(path)
    language_model = open_tensors(file)
    names = set(language_model.names())
    if not names >= _MARKS:
        raise CheckpointError(f"{file} is not MusicGen's own file; give the directory that also holds its config.json.")
    text = language_model.metadata.get("xp.cfg")
    if not isinstance(text, str):
        raise CheckpointError(f"{file} lacks xp.cfg, the configuration of its language model.")
    codec, codec_config, codec_table = _codec(file.parent)
    width = language_model.shape(f"{_CONDITIONERS}description.output_proj.weight")[1]
    t5, t5_config = _text_encoder(file.parent, width)
    where = f"{file}: xp.cfg"
    config, generation = config_from_audiocraft(language_model, text, codec_config, t5_config, where)
    name = MELODY if f"{_CONDITIONERS}self_wav.output_proj.weight" in names else WHOLE
    if model_class not in (None, name):
        raise CheckpointError(f"{file} holds a {name}, not a {model_class}.")
    joined = Joined({"": language_model, "audio_encoder.": codec, "text_encoder.": t5})
    table = original_table(config, name, codec_table)
    return ForeignCheckpoint(name, config, joined, table, path, {"generation_config": generation})


def processor_of_file(path: Path) -> MusicgenProcessor:
    """The processor of the authors' files, with the tokenizer that lies with T5: they do not say how texts are read.

    Raises:
        SourceError: if there is no tokenizer with T5.
    """
    original = _open_original(path, None)
    config, folder = original.config, _file(path).parent
    name = _T5_NAMES.get(config.text_encoder.d_model, "t5-base")
    tokenizer = T5Tokenizer.from_directory(folder / name if (folder / name).is_dir() else hub.resolve(name))
    rate = config.audio_encoder.sampling_rate
    if original.model_class == MELODY:
        chroma = {"feature_size": config.num_chroma, "num_chroma": config.num_chroma}
        return MusicgenMelodyProcessor(MusicgenMelodyFeatureExtractor(sampling_rate=rate, **chroma), tokenizer)
    extractor = EncodecFeatureExtractor(config.audio_channels, rate, padding_side="left")
    return MusicgenProcessor(extractor, tokenizer)


# --- the ways in -----------------------------------------------------------------------------------------------------


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory, or the authors' files.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if not (path.is_dir() and (path / "config.json").is_file()):
        return _open_original(path, model_class)
    raw = read_json(path / "config.json")
    config = config_from_hugging_face(raw, str(path / "config.json"))
    side = path / "generation_config.json"
    generation = generation_from_hugging_face(read_json(side) if side.is_file() else {}, str(side))
    named = {kind: cls for cls, kind in CLASSES.items()}.get(str(raw.get("model_type")), WHOLE)
    name = model_class or next(iter(raw.get("architectures") or []), named)
    table = hugging_face_table(config, name)
    return ForeignCheckpoint(name, config, open_tensors(path), table, path, {"generation_config": generation})
