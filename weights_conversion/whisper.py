"""Whisper's foreign forms: Hugging Face directories, OpenAI's `.pt` files, `faster-whisper`'s CTranslate2 files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.whisper import WhisperConfig, WhisperGenerationConfig
from audiozoo.processors import extractor_settings
from audiozoo.processors.whisper import WhisperFeatureExtractor, WhisperProcessor
from audiozoo.text.whisper_tokenizer import LANGUAGES, WhisperTokenizer
from weights_conversion import (
    ForeignCheckpoint,
    HuggingFaceForm,
    labels_from_hugging_face,
    labels_to_hugging_face,
    read_json,
    search_options,
    take,
)
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import (
    Ignore,
    Rule,
    Table,
    Tied,
    conv1d,
    identity,
    split,
    split_dropping_zeros,
    transpose,
)

MODEL_TYPE = "whisper"

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_STACK = "{stack:encoder|decoder}"
_ENCODER = (
    Rule("encoder.{conv:conv1|conv2}.weight", "encoder.{conv}.kernel", conv1d),
    Rule("encoder.{conv:conv1|conv2}.bias", "encoder.{conv}.bias"),
)
_DECODER = (Rule("decoder.embed_tokens.weight", "decoder.embed_tokens.embedding"),)


def _transformer(stack: str) -> tuple[Rule, ...]:
    layer = stack + ".layers.{i}."
    attention = layer + "{attention:self_attn|encoder_attn}."
    return (
        Rule(stack + ".embed_positions.weight", stack + ".embed_positions.embedding"),
        Rule(attention + "{p:q_proj|k_proj|v_proj|out_proj}.weight", attention + "{p}.kernel", transpose),
        Rule(attention + "{p:q_proj|v_proj|out_proj}.bias", attention + "{p}.bias"),
        Rule(layer + "{fc:fc1|fc2}.weight", layer + "{fc}.kernel", transpose),
        Rule(layer + "{fc:fc1|fc2}.bias", layer + "{fc}.bias"),
        Rule(
            layer + "{norm:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}.weight",
            layer + "{norm}.scale",
        ),
        Rule(
            layer + "{norm:self_attn_layer_norm|encoder_attn_layer_norm|final_layer_norm}.bias",
            layer + "{norm}.bias",
        ),
        Rule(stack + ".layer_norm.weight", stack + ".layer_norm.scale"),
        Rule(stack + ".layer_norm.bias", stack + ".layer_norm.bias"),
    )


def _deeper(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return tuple(rule.prefixed("model.", "model.") for rule in rules)


def hugging_face_table(config: WhisperConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    whole = (*_ENCODER, *_DECODER, *_transformer(_STACK))
    # Early directories hold the bare model's names without "model.".
    old = ((r"^(encoder|decoder)\.", r"model.\1."),)
    tied = (Tied("proj_out.weight", "model.decoder.embed_tokens.weight"),) if config.tie_word_embeddings else ()
    untied = () if config.tie_word_embeddings else (Rule("proj_out.weight", "proj_out.kernel", transpose),)
    # A whole model's directory also loads as one of its parts.
    no_head = Ignore(r"proj_out\.weight", "this class has no language-model head")
    no_encoder = Ignore(r"model\.encoder\..*", "a decoder alone is given encoded audio")
    no_decoder = Ignore(r"decoder\..*", "a classifier has no decoder")
    if model_class == "WhisperModel":
        return Table(whole, renames=((r"^model\.", ""),), ignored=(no_head,))
    if model_class == "WhisperForConditionalGeneration":
        return Table((*_deeper(whole), *untied), renames=old, tied=tied)
    if model_class == "WhisperForCausalLM":
        return Table((*_deeper((*_DECODER, *_transformer("decoder"))), *untied), old, (no_encoder,), tied)
    if model_class == "WhisperForAudioClassification":
        classifier = (
            Rule("layer_weights", "layer_weights"),
            Rule("{part:projector|classifier}.weight", "{part}.kernel", transpose),
            Rule("{part:projector|classifier}.bias", "{part}.bias"),
        )
        rules = (*_ENCODER, *_transformer("encoder"), *classifier)
        return Table(rules, renames=((r"^model\.", ""),), ignored=(no_head, no_decoder))
    raise CheckpointError(f"{model_class} is not one of Whisper's classes.")


_CONFIG_DEFAULTS = {f.name: f.default for f in dataclasses.fields(WhisperConfig) if f.name != "id2label"}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> WhisperConfig:
    """Our configuration from a `config.json`."""
    return WhisperConfig(**(take(config, _CONFIG_DEFAULTS, where) | labels_from_hugging_face(config)))


# Options of the search that stand in fields of their own, or, `forced_decoder_ids`, in the prompt.
_NOT_OPTIONS = {f.name for f in dataclasses.fields(WhisperGenerationConfig)} | {"forced_decoder_ids"}


def generation_from_hugging_face(config: Mapping[str, Any], model: WhisperConfig) -> WhisperGenerationConfig:
    """Token ids and choices from a `generation_config.json`, or, for old directories, from `config.json`."""
    where = "generation_config.json"
    # Neither has a default in `transformers`.
    defaults = dataclasses.replace(
        _generation_defaults(model), begin_suppress_tokens=(), max_initial_timestamp_index=None
    )
    wanted = {f.name: getattr(defaults, f.name) for f in dataclasses.fields(WhisperGenerationConfig)}
    wanted |= {"language": "", "task": "", "max_initial_timestamp_index": 0}
    tables = {name: config.get(name) for name in ("lang_to_id", "task_to_id")}
    taken = take({k: v for k, v in config.items() if k not in (*tables, "options")}, wanted, where)
    for name, table in tables.items():
        if isinstance(table, Mapping):
            taken[name] = tuple((str(key), int(value)) for key, value in table.items())
    generation = dataclasses.replace(defaults, **taken, options=search_options(config, where, _NOT_OPTIONS))
    heads = _heads_there(generation.alignment_heads, model)
    generation = dataclasses.replace(generation, alignment_heads=heads)
    if generation.language is None and generation.task is None:
        # Older files say it by the tokens at the prompt's places.
        pairs = config.get("forced_decoder_ids") or ()
        forced = {pair[0]: pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2}
        names: dict[Any, str] = {token: name for name, token in generation.lang_to_id + generation.task_to_id}
        generation = dataclasses.replace(generation, language=names.get(forced.get(1)), task=names.get(forced.get(2)))
    return generation


# --- OpenAI ----------------------------------------------------------------------------------------------------------

_DIMS = {
    "n_mels": "num_mel_bins",
    "n_vocab": "vocab_size",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}


def _openai_table() -> Table:
    layer, ours = _STACK + ".blocks.{i}.", "model." + _STACK + ".layers.{i}."
    rules = [
        Rule("encoder.positional_embedding", "model.encoder.embed_positions.embedding"),
        Rule("decoder.positional_embedding", "model.decoder.embed_positions.embedding"),
        Rule("decoder.token_embedding.weight", "model.decoder.embed_tokens.embedding"),
        *(rule.prefixed("", "model.") for rule in _ENCODER),
    ]
    for theirs, mine in (("attn", "self_attn"), ("cross_attn", "encoder_attn")):
        for part, projection in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("out", "out_proj")):
            rules.append(Rule(f"{layer}{theirs}.{part}.weight", f"{ours}{mine}.{projection}.kernel", transpose))
            if part != "key":
                rules.append(Rule(f"{layer}{theirs}.{part}.bias", f"{ours}{mine}.{projection}.bias"))
        rules.append(Rule(f"{layer}{theirs}_ln.weight", f"{ours}{mine}_layer_norm.scale"))
        rules.append(Rule(f"{layer}{theirs}_ln.bias", f"{ours}{mine}_layer_norm.bias"))
    for theirs, mine in (("mlp.0", "fc1"), ("mlp.2", "fc2")):
        rules.append(Rule(f"{layer}{theirs}.weight", f"{ours}{mine}.kernel", transpose))
        rules.append(Rule(f"{layer}{theirs}.bias", f"{ours}{mine}.bias"))
    rules.append(Rule(f"{layer}mlp_ln.weight", f"{ours}final_layer_norm.scale"))
    rules.append(Rule(f"{layer}mlp_ln.bias", f"{ours}final_layer_norm.bias"))
    for stack, norm in (("encoder", "ln_post"), ("decoder", "ln")):
        rules.append(Rule(f"{stack}.{norm}.weight", f"model.{stack}.layer_norm.scale"))
        rules.append(Rule(f"{stack}.{norm}.bias", f"model.{stack}.layer_norm.bias"))
    return Table(rules)


OPENAI_TABLE = _openai_table()


def config_from_openai(dims: Mapping[str, Any]) -> WhisperConfig:
    """Our configuration from the `dims` of OpenAI's files."""
    missing = sorted(set(_DIMS) - set(dims))
    if missing:
        raise CheckpointError(f"the checkpoint's dims lack {', '.join(missing)}.")
    if dims.get("n_text_state", dims["n_audio_state"]) != dims["n_audio_state"]:
        raise CheckpointError("encoder and decoder of different widths are no Whisper model.")
    return _with_token_ids({mine: int(dims[theirs]) for theirs, mine in _DIMS.items()})


# --- CTranslate2 -----------------------------------------------------------------------------------------------------


def _ctranslate2_table() -> Table:
    layer, ours = _STACK + "/layer_{i}/", "model." + _STACK + ".layers.{i}."
    rules = [
        Rule("encoder/{conv:conv1|conv2}/weight", "model.encoder.{conv}.kernel", conv1d),
        Rule("encoder/{conv:conv1|conv2}/bias", "model.encoder.{conv}.bias"),
        Rule(f"{_STACK}/position_encodings/encodings", f"model.{_STACK}.embed_positions.embedding"),
        Rule("decoder/embeddings/weight", "model.decoder.embed_tokens.embedding"),
        Rule(f"{_STACK}/layer_norm/gamma", f"model.{_STACK}.layer_norm.scale"),
        Rule(f"{_STACK}/layer_norm/beta", f"model.{_STACK}.layer_norm.bias"),
    ]

    def projections(parts: str, attention: str) -> tuple[str, ...]:
        return tuple(f"{ours}{attention}.{part}_proj" for part in parts)

    def kernels(parts: str, attention: str) -> tuple[str, ...]:
        return tuple(f"{name}.kernel" for name in projections(parts, attention))

    own, cross = f"{layer}self_attention/", f"{layer}attention/"
    rules += [
        Rule(f"{own}linear_0/weight", kernels("qkv", "self_attn"), split(3) >> transpose),
        # The key has no bias; the fused tensor holds zeros in its place.
        Rule(
            f"{own}linear_0/bias",
            (f"{ours}self_attn.q_proj.bias", f"{ours}self_attn.v_proj.bias"),
            split_dropping_zeros((True, False, True)),
        ),
        Rule(f"{cross}linear_0/weight", f"{ours}encoder_attn.q_proj.kernel", transpose),
        Rule(f"{cross}linear_0/bias", f"{ours}encoder_attn.q_proj.bias"),
        Rule(f"{cross}linear_1/weight", kernels("kv", "encoder_attn"), split(2) >> transpose),
        Rule(f"{cross}linear_1/bias", f"{ours}encoder_attn.v_proj.bias", split_dropping_zeros((False, True))),
    ]
    for theirs, mine in (
        ("self_attention/linear_1", "self_attn.out_proj"),
        ("attention/linear_2", "encoder_attn.out_proj"),
        ("ffn/linear_0", "fc1"),
        ("ffn/linear_1", "fc2"),
    ):
        rules.append(Rule(f"{layer}{theirs}/weight", f"{ours}{mine}.kernel", transpose))
        rules.append(Rule(f"{layer}{theirs}/bias", f"{ours}{mine}.bias"))
    for theirs, mine in (
        ("self_attention", "self_attn_layer_norm"),
        ("attention", "encoder_attn_layer_norm"),
        ("ffn", "final_layer_norm"),
    ):
        rules.append(Rule(f"{layer}{theirs}/layer_norm/gamma", f"{ours}{mine}.scale", identity))
        rules.append(Rule(f"{layer}{theirs}/layer_norm/beta", f"{ours}{mine}.bias", identity))
    return Table(rules, tied=(Tied("decoder/projection/weight", "decoder/embeddings/weight"),))


CTRANSLATE2_TABLE = _ctranslate2_table()
_CTRANSLATE2_SETTINGS = {"alignment_heads", "lang_ids", "suppress_ids"}  # in the `config.json` beside a `model.bin`


def config_from_ctranslate2(tensors: TensorSource) -> WhisperConfig:
    """Our configuration from the shapes, names and scalars of a CTranslate2 `model.bin`."""
    names = tensors.names()

    def layers(stack: str) -> int:
        indices = [n.split("/")[1].removeprefix("layer_") for n in names if n.startswith(f"{stack}/layer_")]
        return 1 + max(int(i) for i in indices if i.isdigit())

    def heads(stack: str) -> int:
        return int(tensors.metadata["scalars"][f"{stack}/num_heads"])

    try:
        width, mels, _ = tensors.shape("encoder/conv1/weight")
        return _with_token_ids(
            {
                "vocab_size": tensors.shape("decoder/embeddings/weight")[0],
                "num_mel_bins": mels,
                "d_model": width,
                "encoder_layers": layers("encoder"),
                "encoder_attention_heads": heads("encoder"),
                "encoder_ffn_dim": tensors.shape("encoder/layer_0/ffn/linear_0/bias")[0],
                "decoder_layers": layers("decoder"),
                "decoder_attention_heads": heads("decoder"),
                "decoder_ffn_dim": tensors.shape("decoder/layer_0/ffn/linear_0/bias")[0],
                "max_source_positions": tensors.shape("encoder/position_encodings/encodings")[0],
                "max_target_positions": tensors.shape("decoder/position_encodings/encodings")[0],
            }
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{tensors.path} is a CTranslate2 file, but not of a Whisper model ({error}).") from None


# --- token ids, for files that do not list them ----------------------------------------------------------------------

_ENGLISH_VOCABULARY = 51864  # larger vocabularies are multilingual and have one token more per further language
_LANGUAGES_OF_51865 = 99


def _with_token_ids(sizes: dict[str, Any]) -> WhisperConfig:
    multilingual = sizes["vocab_size"] > _ENGLISH_VOCABULARY
    end = 50257 if multilingual else 50256
    sizes.setdefault("encoder_ffn_dim", 4 * sizes["d_model"])
    sizes.setdefault("decoder_ffn_dim", 4 * sizes["d_model"])
    return WhisperConfig(**sizes, pad_token_id=end, eos_token_id=end, bos_token_id=end, decoder_start_token_id=end + 1)


# (decoder layer, head) pairs of the released models whose attention follows the words, by (vocabulary, encoder
# layers, decoder layers). large-v1 and large-v2 have the same sizes: v2's are given, v1's taken for its file alone.
_LARGE_V1_HEADS = "9.19 11.2 11.4 11.17 22.7 22.11 22.17 23.2 23.15"
_ALIGNMENT_HEADS: dict[tuple[int, int, int], str] = {
    (51864, 4, 4): "1.0 2.0 2.5 3.0 3.1 3.2 3.3 3.4",
    (51865, 4, 4): "2.2 3.0 3.2 3.3 3.4 3.5",
    (51864, 6, 6): "3.3 4.7 5.1 5.5 5.7",
    (51865, 6, 6): "3.1 4.2 4.3 4.7 5.1 5.2 5.4 5.6",
    (51864, 12, 12): "6.6 7.0 7.3 7.8 8.2 8.5 8.7 9.0 9.4 9.8 9.10 10.0 10.1 10.2 10.3 10.6 10.11 11.2 11.4",
    (51865, 12, 12): "5.3 5.9 8.0 8.4 8.7 8.8 9.0 9.7 9.9 10.5",
    (
        51864,
        24,
        24,
    ): "11.4 14.1 14.12 14.14 15.4 16.0 16.4 16.9 17.12 17.14 18.7 18.10 18.15 20.0 20.3 20.9 20.14 21.12",
    (51865, 24, 24): "13.15 15.4 15.15 16.1 20.0 23.4",
    (51865, 32, 32): "10.12 13.17 16.11 16.12 16.13 17.15 17.16 18.4 18.11 18.19 19.11 21.2 21.3 22.3 22.9 22.12 23.5 "
    "23.7 23.13 25.5 26.1 26.12 27.15",
    (51866, 32, 32): "7.0 10.17 12.18 13.12 16.1 17.14 19.11 21.4 24.1 25.6",
    (51866, 32, 4): "2.4 2.11 3.3 3.6 3.11 3.14",
}


def _alignment_heads(config: WhisperConfig, file: str = "") -> tuple[tuple[int, int], ...]:
    sizes = (config.vocab_size, config.encoder_layers, config.decoder_layers)
    known = _LARGE_V1_HEADS if file == "large-v1.pt" else _ALIGNMENT_HEADS.get(sizes)
    if known:
        pairs = [pair.split(".") for pair in known.split()]
        return tuple((int(layer), int(head)) for layer, head in pairs)
    # Without a list, every head of the upper half of the decoder, as OpenAI's code does.
    layers, heads = config.decoder_layers, config.decoder_attention_heads
    return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))


def _heads_there(listed: Iterable[Any], config: WhisperConfig) -> tuple[tuple[int, int], ...]:
    """Of these alignment heads those that the decoder has; if it has none of them, those of its size.

    Distilled models come with the list of the deeper decoder that they were made from.
    """
    pairs = [(int(layer), int(head)) for layer, head in listed]
    there = [(i, j) for i, j in pairs if i < config.decoder_layers and j < config.decoder_attention_heads]
    return _alignment_heads(config) if pairs and not there else tuple(there)


def _languages(config: WhisperConfig) -> int:
    """How many languages a multilingual vocabulary of this size has."""
    return _LANGUAGES_OF_51865 + max(0, config.vocab_size - 51865)


def _generation_defaults(config: WhisperConfig, file: str = "") -> WhisperGenerationConfig:
    """The ids that follow from the vocabulary's size: end, start, languages, tasks, and so on, in this order."""
    start = config.decoder_start_token_id
    multilingual = config.vocab_size > _ENGLISH_VOCABULARY
    count = _languages(config)
    languages = tuple((f"<|{code}|>", start + 1 + i) for i, code in enumerate(list(LANGUAGES)[:count]))
    # An English-only vocabulary has the languages' places too.
    translate = start + 1 + (count if multilingual else _LANGUAGES_OF_51865)
    return WhisperGenerationConfig(
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        decoder_start_token_id=start,
        prev_sot_token_id=translate + 3,
        no_timestamps_token_id=translate + 5,
        is_multilingual=multilingual,
        lang_to_id=languages if multilingual else (),
        task_to_id=(("translate", translate), ("transcribe", translate + 1)) if multilingual else (),
        begin_suppress_tokens=(220, config.eos_token_id),
        alignment_heads=_alignment_heads(config, file),
        max_length=config.max_target_positions,
    )


# --- the three ways in, and the way out ------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Is this an OpenAI `.pt` file, or a CTranslate2 directory or `model.bin`, of a Whisper model?"""
    if path.is_dir():
        weights = path / "model.bin"
        if not weights.is_file():  # a processor was asked for alone; of a hub repository no more is there then
            return (path / "config.json").is_file() and set(read_json(path / "config.json")) >= _CTRANSLATE2_SETTINGS
        return not _architectures(path) and _is_whisper(weights)
    return path.suffix in {".pt", ".bin"} and _is_whisper(path)


def processor_of_file(path: Path) -> WhisperProcessor:
    """The processor of an OpenAI or CTranslate2 file: by what lies beside it, mel channels and vocabulary by the model.

    Beside OpenAI's files there is seldom a tokenizer; it is then that of their package `openai-whisper`.

    Raises:
        SourceError: if there is no vocabulary.
    """
    if path.is_dir() and not (path / "model.bin").is_file():
        return WhisperProcessor.from_directory(path)
    tensors, folder = open_tensors(path), path if path.is_dir() else path.parent
    openais = tensors.format == "pytorch"
    config = config_from_openai(tensors.metadata["dims"]) if openais else config_from_ctranslate2(tensors)
    features = WhisperFeatureExtractor(config.num_mel_bins)
    if extractor_settings(folder) is not None:
        features = WhisperFeatureExtractor.from_directory(folder)
    if not openais:
        processor = WhisperProcessor.from_directory(folder)
        return WhisperProcessor(features, processor.tokenizer, processor.generation_config)
    multilingual = config.vocab_size > _ENGLISH_VOCABULARY
    languages = _languages(config) if multilingual else None
    # A `*.tiktoken` does not say how many languages there are.
    vocabulary = folder / ("multilingual.tiktoken" if multilingual else "gpt2.tiktoken")
    if vocabulary.is_file():
        tokenizer = WhisperTokenizer.from_tiktoken(vocabulary, languages, multilingual=multilingual)
    elif any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return WhisperProcessor(features, WhisperTokenizer.from_directory(folder))
    else:
        tokenizer = WhisperTokenizer.from_openai_package(multilingual, languages)
    if tokenizer.vocabulary_size != config.vocab_size:
        raise SourceError(
            f"The tokenizer for {path} has {tokenizer.vocabulary_size} tokens and the model {config.vocab_size}; "
            "they do not belong together."
        )
    return WhisperProcessor(features, tokenizer)


def _architectures(directory: Path) -> list[str]:
    config = directory / "config.json"
    return (read_json(config).get("architectures") or []) if config.is_file() else []


def _is_whisper(path: Path) -> bool:
    tensors = open_tensors(path)
    if tensors.format == "pytorch":
        return "dims" in tensors.metadata and "encoder.positional_embedding" in tensors
    return tensors.format == "ctranslate2" and "encoder/conv1/weight" in tensors


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Whisper checkpoint of any of the three forms.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    wanted = "WhisperForConditionalGeneration"
    if path.is_dir() and (path / "config.json").is_file():
        raw = read_json(path / "config.json")
        if (architectures := raw.get("architectures")) or "model_type" in raw:
            return _open_hugging_face(path, model_class or (architectures or [wanted])[0])
    if model_class not in (None, wanted):
        raise CheckpointError(f"{path} holds a whole Whisper model; it loads as {wanted}, not as {model_class}.")
    tensors = open_tensors(path)
    if tensors.format == "pytorch":
        dims = tensors.metadata.get("dims")
        if not isinstance(dims, Mapping):
            raise CheckpointError(f"{path} holds no dims, so it is not one of OpenAI's Whisper files.")
        config, table = config_from_openai(dims), OPENAI_TABLE
        generation = _generation_defaults(config, path.name)
    elif tensors.format == "ctranslate2":
        config, table = config_from_ctranslate2(tensors), CTRANSLATE2_TABLE
        generation = _generation_defaults(config)
        directory = path if path.is_dir() else path.parent
        if (directory / "config.json").is_file():
            side = read_json(directory / "config.json")
            generation = dataclasses.replace(
                generation,
                alignment_heads=_heads_there(side.get("alignment_heads") or generation.alignment_heads, config),
                suppress_tokens=tuple(side.get("suppress_ids") or ()),
                begin_suppress_tokens=tuple(side.get("suppress_ids_begin") or generation.begin_suppress_tokens),
            )
    else:
        raise SourceError(
            f"{path} is a bare {tensors.format} file; give the directory that also holds its config.json."
        )
    return ForeignCheckpoint(wanted, config, tensors, table, path, {"generation_config": generation})


def _open_hugging_face(directory: Path, model_class: str) -> ForeignCheckpoint:
    raw = read_json(directory / "config.json")
    config = config_from_hugging_face(raw, str(directory / "config.json"))
    side = directory / "generation_config.json"
    older = {"begin_suppress_tokens": [220, config.eos_token_id]} | raw
    generation = generation_from_hugging_face(read_json(side) if side.is_file() else older, config)
    attributes = {"generation_config": generation} if model_class == "WhisperForConditionalGeneration" else {}
    return ForeignCheckpoint(
        model_class, config, open_tensors(directory), hugging_face_table(config, model_class), directory, attributes
    )


def hugging_face(model: Any) -> HuggingFaceForm:
    """A Whisper model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config: dict[str, Any] = dataclasses.asdict(model.config)
    labels = config.pop("id2label")
    config |= {
        "architectures": [name],
        "model_type": MODEL_TYPE,
        "is_encoder_decoder": name != "WhisperForCausalLM",
        "num_hidden_layers": model.config.encoder_layers,
        "begin_suppress_tokens": [220, model.config.eos_token_id],
        "dtype": jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype.name,
    }
    if name == "WhisperForAudioClassification":
        config |= labels_to_hugging_face(labels)
    files: dict[str, Mapping[str, Any]] = {"config.json": config}
    if name == "WhisperForConditionalGeneration":
        generation = dataclasses.asdict(model.generation_config)
        for table in ("lang_to_id", "task_to_id"):
            generation[table] = dict(generation[table])
        if not model.generation_config.is_multilingual:
            del generation["lang_to_id"], generation["task_to_id"]
        generation |= {"bos_token_id": model.config.bos_token_id} | dict(generation.pop("options"))
        files["generation_config.json"] = {name: value for name, value in generation.items() if value is not None}
    return HuggingFaceForm(files, hugging_face_table(model.config, name))
