"""SeamlessM4T v2's foreign forms: Hugging Face directories, the authors' `seamlessM4T_v2_large.pt` and `vocoder_v2.pt`.

The authors' file has the names of fairseq2, or of fairseq before it. Both become those of `transformers` first, by
`ORIGINAL_NAMES`. Of fairseq's, two tables are in another order, and are put in order here: the tokens' first four rows,
and the characters, sorted there, as in the SentencePiece model `spm_char_lang38_tc.model` here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Config, SeamlessM4Tv2GenerationConfig
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from audiozoo.processors.seamless_m4t import SeamlessM4TProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion import code_hifigan_names as vocoder
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Operation, Rule, Table, Tensors, Tied, identity
from weights_conversion.seamless_m4t import (
    FAIRSEQ2_MARK,
    FAIRSEQ_MARK,
    FAIRSEQ_ROWS,
    LANGUAGES,
    ORIGINAL_NAMES,
    REMNANTS,
    SPEECH_ENCODER,
    TEXT_DECODER,
    TEXT_ENCODER,
    UNREAD,
    attention,
    bare,
    below,
    original_languages,
    original_processor,
    reordered,
    table_of,
    text_options,
    with_voice,
)
from weights_conversion.wav2vec2 import convolution, norm

MODEL_TYPE = "seamless_m4t_v2"
VOCODER = "SeamlessM4Tv2CodeHifiGan"
# Which of the checkpoint's parts each class does without.
WITHOUT = {
    "SeamlessM4Tv2Model": (),
    "SeamlessM4Tv2ForTextToText": ("speech_encoder", "t2u_model", "vocoder"),
    "SeamlessM4Tv2ForSpeechToText": ("text_encoder", "t2u_model", "vocoder"),
    "SeamlessM4Tv2ForTextToSpeech": ("speech_encoder",),
    "SeamlessM4Tv2ForSpeechToSpeech": ("text_encoder",),
}

_LAYER = "layers.{i}."
UNIT_DECODER = (
    *attention(_LAYER + "self_attn", _LAYER + "self_attn", "proj"),
    *norm(_LAYER + "{n:self_attn_layer_norm|conv_layer_norm}"),
    *convolution(_LAYER + "{c:conv1|conv2}"),
    *norm("layer_norm"),
    Rule("{e:embed_tokens|embed_char}.weight", "{e}.embedding"),
    Rule("{a:pos_emb_alpha|pos_emb_alpha_char}", "{a}"),
    *vocoder.variance_predictor_rules("duration_predictor.", "duration_predictor."),
)


def t2u_rules(foreign: str = "", ours: str = "", characters: Operation = identity) -> tuple[Rule, ...]:
    """The rules of the text-to-unit model."""
    decoder = tuple(
        dataclasses.replace(rule, foreign=("embed_char.weight",), ours=("embed_char.embedding",), operation=characters)
        if rule.match_foreign("embed_char.weight") and characters is not identity
        else rule
        for rule in UNIT_DECODER
    )
    if characters is not identity:
        decoder += (Rule("embed_tokens.weight", "embed_tokens.embedding"),)
    encoder = below(TEXT_ENCODER, f"{foreign}model.encoder.", f"{ours}model.encoder.")
    return (*encoder, *below(decoder, f"{foreign}model.decoder.", f"{ours}model.decoder."))


T2U_TIED = Tied("lm_head.weight", "model.decoder.embed_tokens.weight")


def t2u_table() -> Table:
    """The correspondence with `SeamlessM4Tv2TextToUnitForConditionalGeneration` alone."""
    return Table(t2u_rules(), tied=(T2U_TIED,))


def _rules(tokens: Operation = identity, characters: Operation = identity) -> tuple[Rule, ...]:
    return (
        Rule("shared.weight", "text_decoder.embed_tokens.embedding", tokens),
        *below(TEXT_ENCODER, "text_encoder."),
        *below(SPEECH_ENCODER, "speech_encoder."),
        *below(TEXT_DECODER, "text_decoder."),
        *t2u_rules("t2u_model.", "t2u_model.", characters),
    )


def _ignored(model_class: str) -> tuple[Ignore, ...]:
    if model_class not in WITHOUT:
        raise CheckpointError(f"There is no class {model_class} in SeamlessM4T v2; there are {', '.join(WITHOUT)}.")
    absent = (Ignore(rf"{part}\..*", f"a part that {model_class} does without") for part in WITHOUT[model_class])
    return (*UNREAD, *absent)


_TIED = (
    *(Tied(f"{part}.weight", "shared.weight") for part in ("lm_head", "text_encoder.embed_tokens")),
    Tied("text_decoder.embed_tokens.weight", "shared.weight"),
    Tied(f"t2u_model.{T2U_TIED.name}", f"t2u_model.{T2U_TIED.same_as}"),
)


def hugging_face_table(config: SeamlessM4Tv2Config, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes."""
    if model_class == VOCODER:
        return vocoder.vocoder_table(config.vocoder)
    rules = (*_rules(), *vocoder.vocoder_rules(config.vocoder, "vocoder.", "vocoder."))
    return Table(rules, renames=WEIGHT_NORM_RENAMES, ignored=_ignored(model_class), tied=_TIED)


# --- configurations --------------------------------------------------------------------------------------------------

_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(SeamlessM4Tv2Config) if f.name not in ("vocoder", "sampling_rate")
}
_VOCODER_DEFAULTS = {name: getattr(CodeHifiGanConfig(), name) for name in vocoder.VOCODER_KEPT}


def config_from_hugging_face(
    config: Mapping[str, Any], where: str = "config.json", *, weight_norm: bool = False
) -> SeamlessM4Tv2Config:
    """Our configuration from a `config.json`; `weight_norm` if the vocoder's kernels come in two parts."""
    sizes = CodeHifiGanConfig(**take(config, _VOCODER_DEFAULTS, where), weight_norm=weight_norm)
    taken = take(config, _DEFAULTS, where)
    for name in ("position_embeddings_type", "speech_encoder_chunk_size"):
        if name in config and config[name] is None:
            taken[name] = None
    return SeamlessM4Tv2Config(**taken, vocoder=sizes, sampling_rate=sizes.sampling_rate)


def generation_from_hugging_face(
    generation: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> SeamlessM4Tv2GenerationConfig:
    """Our generation settings from `generation_config.json`; the longest text may also stand in `config.json`."""
    tables: dict[str, Any] = {}
    for name in (*LANGUAGES, "char_to_id", "id_to_text"):
        number = name == "id_to_text"
        items = table_of(generation, name, where).items()
        tables[name] = tuple((int(k), str(v)) if number else (str(k), int(v)) for k, v in items)
    return SeamlessM4Tv2GenerationConfig(**tables, options=text_options(generation, config, where))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write."""
    config, name = model.config, type(model).__name__
    raw = dataclasses.asdict(config)
    raw |= {n: v for n, v in raw.pop("vocoder").items() if n != "weight_norm"}
    for first in ("rotary_embedding_base", "t2u_max_new_tokens", "t2u_decoder_start_token_id"):
        raw.pop(first, None)
    raw |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32", "is_encoder_decoder": True}
    files: dict[str, Any] = {"config.json": raw}
    if name != VOCODER:
        tables = dataclasses.asdict(model.generation_config)
        generation: dict[str, Any] = dict(tables.pop("options"))
        generation |= {table: {str(k): v for k, v in pairs} for table, pairs in tables.items() if pairs}
        generation |= {n: getattr(config, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
        files["generation_config.json"] = generation | {"decoder_start_token_id": config.decoder_start_token_id}
    return HuggingFaceForm(files, vocoder.folded(config, lambda config: hugging_face_table(config, name)))


# --- the authors' files ----------------------------------------------------------------------------------------------


CHARACTERS = "spm_char_lang38_tc.model"


def character_order(pieces: Sequence[str]) -> list[int]:
    """fairseq's row of each character of a SentencePiece model, whose first four pieces are control symbols."""
    row = {character: i for i, character in enumerate(sorted(pieces[4:]), start=4)}
    return [0, 1, 2, 3, *(row[character] for character in pieces[4:])]


def original_table(config: SeamlessM4Tv2Config, model_class: str, pieces: Sequence[str] | None = None) -> Table:
    """The correspondence with the authors' file; `pieces` are the characters, if it is one of fairseq's.

    The first four rows of the tokens are moved then, and the characters.
    """
    moved = () if pieces is None else (reordered(FAIRSEQ_ROWS), reordered(character_order(pieces)))
    voice = vocoder.original_table(config.vocoder).rules
    return Table(
        (*_rules(*moved), *below(tuple(voice), "vocoder.")),
        renames=ORIGINAL_NAMES,
        ignored=(*REMNANTS, *_ignored(model_class)),
        tied=_TIED,
    )


def character_pieces(directory: Path) -> list[str]:
    """The characters of the authors' SentencePiece model, control symbols first.

    Raises:
        SourceError: if it is not there.
    """
    path = directory / CHARACTERS
    if not path.is_file():
        raise SourceError(
            f"The characters of this checkpoint are in fairseq's order; {path}, which says ours, is missing."
        )
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def original_generation(path: Path, config: SeamlessM4Tv2Config) -> dict[str, Any]:
    """What a `generation_config.json` would say of the authors' file: languages, and how the tokens are spelt.

    The spelling is that of the two SentencePiece models beside it; without them there is none.
    """
    tables: dict[str, Any] = dict(original_languages(config))
    files = (path.parent / "tokenizer.model", path.parent / CHARACTERS)
    if tables and all(file.is_file() for file in files):
        tokenizer = original_processor(path, config).tokenizer
        spelt = ((i, tokenizer.token(i)) for i in range(config.vocab_size))
        tables["id_to_text"] = {i: text for i, text in spelt if text is not None}
        tables["char_to_id"] = {character: i for i, character in enumerate(character_pieces(path.parent))}
    return tables


def processor_of_file(path: Path) -> SeamlessM4TProcessor | None:
    """The processor of the authors' translator; None for a vocoder."""
    tensors = open_tensors(path)
    return None if vocoder.is_original(tensors) else original_processor(path, config_from_original(tensors))


def _is_original(tensors: Tensors) -> bool:
    """Are these the authors' tensors, and the second version's, which spells?"""
    names = bare(tensors)
    spells = {"decoder.embed_tokens_text.weight", "t2u_model.decoder_frontend.embed_char.weight"}
    return bool(names & {FAIRSEQ_MARK, FAIRSEQ2_MARK}) and bool(names & spells)


def config_from_original(tensors: Tensors) -> SeamlessM4Tv2Config:
    """Our configuration from shapes; heads are those of the released model, 64 channels each."""
    table = Table((), renames=ORIGINAL_NAMES)
    names = {table.today(name): name for name in tensors.names()}

    def shape(name: str) -> tuple[int, ...]:
        return tensors.shape(names[name])

    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in names)
        return 1 + max((int(m[1]) for m in found if m), default=-1)

    vocabulary, width = shape("shared.weight")
    heads = max(width // 64, 1)
    speech, unit = "speech_encoder.encoder.layers.", "t2u_model.model."
    distances = shape(f"{speech}0.self_attn.distance_embedding.weight")[0]
    ahead = distances // 9  # 8 of 73 in the released model
    return SeamlessM4Tv2Config(
        hidden_size=width,
        vocab_size=vocabulary,
        encoder_layers=count("text_encoder.layers."),
        encoder_ffn_dim=shape("text_encoder.layers.0.ffn.fc1.weight")[0],
        encoder_attention_heads=heads,
        decoder_layers=count("text_decoder.layers."),
        decoder_ffn_dim=shape("text_decoder.layers.0.ffn.fc1.weight")[0],
        decoder_attention_heads=heads,
        feature_projection_input_dim=shape("speech_encoder.feature_projection.projection.weight")[1],
        speech_encoder_layers=count(speech),
        speech_encoder_attention_heads=width // shape(f"{speech}0.self_attn.distance_embedding.weight")[1],
        left_max_position_embeddings=distances - 1 - ahead,
        right_max_position_embeddings=ahead,
        speech_encoder_intermediate_size=shape(f"{speech}0.ffn1.intermediate_dense.weight")[0],
        conv_depthwise_kernel_size=shape(f"{speech}0.conv_module.depthwise_conv.weight")[2],
        adaptor_kernel_size=shape("speech_encoder.adapter.layers.0.residual_conv.weight")[2],
        num_adapter_layers=count("speech_encoder.adapter.layers."),
        t2u_vocab_size=shape("t2u_model.lm_head.weight")[0],
        char_vocab_size=shape(f"{unit}decoder.embed_char.weight")[0],
        t2u_encoder_layers=count(f"{unit}encoder.layers."),
        t2u_encoder_ffn_dim=shape(f"{unit}encoder.layers.0.ffn.fc1.weight")[0],
        t2u_encoder_attention_heads=heads,
        t2u_decoder_layers=count(f"{unit}decoder.layers."),
        t2u_decoder_attention_heads=heads,
        t2u_variance_predictor_embed_dim=width,
        t2u_variance_predictor_hidden_dim=shape(f"{unit}decoder.duration_predictor.conv1.weight")[0],
    )


def recognise(path: Path) -> bool:
    """Is this the authors' model or vocoder?"""
    if not path.is_file() or path.suffix not in {".pt", ".pth"}:
        return False
    try:
        tensors = open_tensors(path)
    except (CheckpointError, SourceError):
        return False
    return vocoder.is_original(tensors) or _is_original(tensors)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory, or one of the authors' files.

    The vocoder is a file of its own there: the translator alone loads as `SeamlessM4Tv2ForSpeechToText` (by default) or
    as `SeamlessM4Tv2ForTextToText`; with the vocoder's file beside it, as any class.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir():
        raw, where = read_json(path / "config.json"), str(path / "config.json")
        name = model_class or str((raw.get("architectures") or ["SeamlessM4Tv2Model"])[0])
        tensors = open_tensors(path)
        apart = ("hifi_gan.conv_pre.weight_g", "hifi_gan.conv_pre.parametrizations.weight.original0")
        split = any(tensor.endswith(apart) for tensor in tensors.names())
        config = config_from_hugging_face(raw, where, weight_norm=split)
        attributes = {}
        if name != VOCODER:
            side = path / "generation_config.json"
            given = read_json(side) if side.is_file() else {}
            attributes = {"generation_config": generation_from_hugging_face(given, raw, str(side))}
        return ForeignCheckpoint(name, config, tensors, hugging_face_table(config, name), path, attributes)
    tensors = open_tensors(path)
    if vocoder.is_original(tensors):
        if model_class not in (None, VOCODER):
            raise CheckpointError(f"{path} holds a vocoder; it loads as {VOCODER}, not as {model_class}.")
        sizes = vocoder.config_from_original(tensors)
        return ForeignCheckpoint(
            VOCODER, SeamlessM4Tv2Config(vocoder=sizes), tensors, vocoder.original_table(sizes), path
        )
    if not _is_original(tensors):
        raise CheckpointError(f"{path} is none of SeamlessM4T v2's own files; give the directory with its config.json.")
    name, config = model_class or "SeamlessM4Tv2Model", config_from_original(tensors)
    if "vocoder" not in WITHOUT.get(name, ()):
        beside = path.parent / "vocoder_v2.pt"
        if not beside.is_file():
            raise SourceError(
                f"{name} speaks, and the vocoder is a file of its own: put vocoder_v2.pt beside {path}, or load "
                "SeamlessM4Tv2ForSpeechToText or SeamlessM4Tv2ForTextToText."
            )
        voice = open_tensors(beside)
        config = dataclasses.replace(config, vocoder=vocoder.config_from_original(voice))
        tensors = with_voice(tensors, voice, vocoder.original_table(config.vocoder))
    pieces = character_pieces(path.parent) if FAIRSEQ_MARK in bare(tensors) else None
    table = original_table(config, name, pieces)
    side = path.parent / "generation_config.json"
    given = read_json(side) if side.is_file() else original_generation(path, config)
    attributes = {"generation_config": generation_from_hugging_face(given, {}, str(side))}
    return ForeignCheckpoint(name, config, tensors, table, path, attributes)
