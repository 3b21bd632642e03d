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

import numpy as np

from audiozoo.decoding import GenerationConfig
from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.seamless_m4t_v2 import SeamlessM4Tv2Config, SeamlessM4Tv2GenerationConfig
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion import code_hifigan_names as vocoder
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES
from weights_conversion.readers import open_tensors
from weights_conversion.rules import Ignore, Operation, Rule, Table, Tensors, Tied, identity
from weights_conversion.seamless_m4t import SPEECH_ENCODER, TEXT_DECODER, TEXT_ENCODER, UNREAD, attention, below
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


def reordered(rows: Sequence[int]) -> Operation:
    """A table whose row i is the foreign row `rows[i]`; rows behind them stay."""

    def move(order: np.ndarray) -> Any:
        def apply(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            if len(arrays[0]) < len(order):
                raise ValueError("fewer rows than are moved")
            return (np.concatenate([arrays[0][order], arrays[0][len(order) :]]),)

        return apply

    order = np.asarray(rows)
    return Operation(f"reordered({len(rows)} rows)", move(order), move(np.argsort(order)))


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


def _rules(config: SeamlessM4Tv2Config, tokens: Operation = identity, characters: Operation = identity) -> tuple:
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
    rules = (*_rules(config), *vocoder.vocoder_rules(config.vocoder, "vocoder.", "vocoder."))
    return Table(rules, renames=WEIGHT_NORM_RENAMES, ignored=_ignored(model_class), tied=_TIED)


# --- configurations --------------------------------------------------------------------------------------------------

_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(SeamlessM4Tv2Config) if f.name not in ("vocoder", "sampling_rate")
}
_VOCODER_DEFAULTS = {name: getattr(CodeHifiGanConfig(), name) for name in vocoder.VOCODER_KEPT}
_LANGUAGES = ("text_decoder_lang_to_code_id", "t2u_lang_code_to_id", "vocoder_lang_code_to_id")


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
    for name in (*_LANGUAGES, "char_to_id", "id_to_text"):
        table = generation.get(name) or {}
        if not isinstance(table, Mapping):
            raise CheckpointError(f"{where}: {name} is no table.")
        number = name == "id_to_text"
        tables[name] = tuple((int(k), str(v)) if number else (str(k), int(v)) for k, v in table.items())
    known = {f.name for f in dataclasses.fields(GenerationConfig)}
    left_out = {"pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "output_scores"}
    options = {"max_new_tokens": config.get("max_new_tokens") or 256}
    options |= {n: v for n, v in generation.items() if n in known - left_out and v is not None}
    chosen = tuple((name, value) for name, value in options.items() if value != getattr(GenerationConfig(), name))
    return SeamlessM4Tv2GenerationConfig(**tables, options=chosen)


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
    return HuggingFaceForm(files, hugging_face_table(config, name))


# --- the authors' files ----------------------------------------------------------------------------------------------

_W = r"w2v_encoder\.w2v_model\."
_S2, _T2 = r"^speech_encoder\.inner\.layers\.(\d+)\.", r"^t2u_model\.decoder\.layers\.(\d+)\."
# fairseq's names as fairseq2's, where they differ by more than what stands in front.
FAIRSEQ_NAMES: tuple[tuple[str, str], ...] = (
    (rf"^encoder\.{_W}layer_norm\.", "speech_encoder_frontend.post_extract_layer_norm."),
    (rf"^encoder\.{_W}post_extract_proj\.", "speech_encoder_frontend.model_dim_proj."),
    (rf"^encoder\.{_W}encoder\.layer_norm\.", "speech_encoder.inner_layer_norm."),
    (rf"^encoder\.{_W}encoder\.layers\.", "speech_encoder.inner.layers."),
    (r"^encoder\.adaptor\.proj\.0\.", "speech_encoder.proj1."),
    (r"^encoder\.adaptor\.proj\.2\.", "speech_encoder.proj2."),
    (r"^encoder\.adaptor\.out_ln\.", "speech_encoder.layer_norm."),
    (r"^encoder\.adaptor\.layers\.(\d+)\.residual_pool\.1\.", r"speech_encoder.adaptor_layers.\1.residual_conv."),
    (r"^encoder\.adaptor\.layers\.(\d+)\.attn_pool\.1\.", r"speech_encoder.adaptor_layers.\1.self_attn_conv."),
    (r"^encoder\.adaptor\.layers\.", "speech_encoder.adaptor_layers."),
    (rf"{_S2}conv_module\.layer_norm2\.", r"speech_encoder.inner.layers.\1.conv.layer_norm."),
    (rf"{_S2}conv_module\.layer_norm\.", r"speech_encoder.inner.layers.\1.conv_layer_norm."),
    (rf"{_S2}conv_module\.", r"speech_encoder.inner.layers.\1.conv."),
    (rf"{_S2}ffn(1|2)\.layer_norm\.", r"speech_encoder.inner.layers.\1.ffn\2_layer_norm."),
    (rf"{_S2}ffn(1|2)\.w_1\.", r"speech_encoder.inner.layers.\1.ffn\2.inner_proj."),
    (rf"{_S2}ffn(1|2)\.w_2\.", r"speech_encoder.inner.layers.\1.ffn\2.output_proj."),
    (rf"{_S2}self_attn\.linear_out\.", r"speech_encoder.inner.layers.\1.self_attn.output_proj."),
    (rf"{_S2}self_attn\.linear_([qkv])\.", r"speech_encoder.inner.layers.\1.self_attn.\2_proj."),
    (rf"{_S2}self_attn\.rel_k_embedding\.", r"speech_encoder.inner.layers.\1.self_attn.sdpa.rel_k_embed."),
    (rf"{_S2}final_layer_norm\.", r"speech_encoder.inner.layers.\1.layer_norm."),
    (r"^text_encoder\.embed_tokens\.", "text_encoder_frontend.embed."),
    (r"^target_letter_decoder\.embed_tokens\.", "text_decoder_frontend.embed."),
    (r"^target_letter_decoder\.output_projection\.", "final_proj."),
    (r"^target_letter_decoder\.", "text_decoder."),
    (r"^synthesizer_encoder\.", "t2u_model.encoder."),
    (r"^decoder\.embed_tokens_text\.", "t2u_model.decoder_frontend.embed_char."),
    (r"^decoder\.embed_tokens(_unit)?\.", "t2u_model.decoder_frontend.embed."),
    (r"^decoder\.var_adaptor\.", "t2u_model.decoder_frontend.variance_adaptor."),
    (r"^decoder\.dec_pos_emb_alpha", "t2u_model.decoder_frontend.pos_emb_alpha"),
    (r"^decoder\.char_upsampler\.pos_emb_alpha", "t2u_model.decoder_frontend.pos_emb_alpha_char"),
    (r"^decoder\.output_projection\.", "t2u_model.final_proj."),
    (r"^decoder\.(layers|layer_norm)\.", r"t2u_model.decoder.\1."),
    (rf"{_T2}layer_norm\.", r"t2u_model.decoder.layers.\1.self_attn_layer_norm."),
    (rf"{_T2}ffn\.ffn\.0\.", r"t2u_model.decoder.layers.\1.conv1d.conv1."),
    (rf"{_T2}ffn\.ffn\.2\.", r"t2u_model.decoder.layers.\1.conv1d.conv2."),
    (rf"{_T2}ffn\.layer_norm\.", r"t2u_model.decoder.layers.\1.conv1d_layer_norm."),
)
_BLOCK, _POOL = r"^speech_encoder\.encoder\.layers\.(\d+)\.", r"^speech_encoder\.adapter\.layers\.(\d+)\."
_TEXT = r"^((?:text_encoder|text_decoder|t2u_model\.model\.encoder)\.layers\.\d+)\."
# fairseq2's names (and what fairseq's have in common with them) as those of `transformers`.
ORIGINAL_NAMES: tuple[tuple[str, str], ...] = (
    (r"^(?:model\.)?(?=speech_encoder|text_|t2u_model|final_proj|encoder\.|decoder\.|target_|synth)", ""),
    *FAIRSEQ_NAMES,
    (r"^speech_encoder_frontend\.post_extract_layer_norm\.", "speech_encoder.feature_projection.layer_norm."),
    (r"^speech_encoder_frontend\.model_dim_proj\.", "speech_encoder.feature_projection.projection."),
    (r"^speech_encoder\.layer_norm\.", "speech_encoder.inner_layer_norm\0."),
    (r"^speech_encoder\.inner_layer_norm\.", "speech_encoder.encoder.layer_norm."),
    ("\0", ""),
    (r"^speech_encoder\.proj1\.", "speech_encoder.intermediate_ffn.intermediate_dense."),
    (r"^speech_encoder\.proj2\.", "speech_encoder.intermediate_ffn.output_dense."),
    (r"^speech_encoder\.inner\.layers\.", "speech_encoder.encoder.layers."),
    (r"^speech_encoder\.adaptor_layers\.", "speech_encoder.adapter.layers."),
    (rf"{_BLOCK}layer_norm\.", r"speech_encoder.encoder.layers.\1.final_layer_norm."),
    (rf"{_BLOCK}conv_layer_norm\.", r"speech_encoder.encoder.layers.\1.conv_module.layer_norm."),
    (rf"{_BLOCK}conv\.layer_norm\.", r"speech_encoder.encoder.layers.\1.conv_module.depthwise_layer_norm."),
    (rf"{_BLOCK}conv\.", r"speech_encoder.encoder.layers.\1.conv_module."),
    (rf"{_BLOCK}self_attn\.sdpa\.rel_k_embed\.", r"speech_encoder.encoder.layers.\1.self_attn.distance_embedding."),
    (r"^(speech_encoder\..*self_attn)\.(?:output_proj|out_proj)\.", r"\1.linear_out."),
    (r"^(speech_encoder\..*self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (rf"{_POOL}(?:ffn\.inner_proj|fc1)\.", r"speech_encoder.adapter.layers.\1.ffn.intermediate_dense."),
    (rf"{_POOL}(?:ffn\.output_proj|fc2)\.", r"speech_encoder.adapter.layers.\1.ffn.output_dense."),
    (rf"{_POOL}final_layer_norm\.", r"speech_encoder.adapter.layers.\1.ffn_layer_norm."),
    (r"^(speech_encoder\..*ffn[12])\.inner_proj\.", r"\1.intermediate_dense."),
    (r"^(speech_encoder\..*ffn[12])\.output_proj\.", r"\1.output_dense."),
    (r"^text_decoder_frontend\.embed\.", "text_decoder.embed_tokens."),
    (r"^text_encoder_frontend\.embed\.", "text_encoder.embed_tokens."),
    (r"^final_proj\.", "shared."),
    (r"^t2u_model\.final_proj\.", "t2u_model.lm_head."),
    (r"^t2u_model\.decoder_frontend\.embed\.", "t2u_model.model.decoder.embed_tokens."),
    (r"^t2u_model\.decoder_frontend\.variance_adaptor\.", "t2u_model.model.decoder."),
    (r"^t2u_model\.decoder_frontend\.", "t2u_model.model.decoder."),
    (r"^t2u_model\.(encoder|decoder)\.", r"t2u_model.model.\1."),
    (r"(duration_predictor\.conv[12])\.0\.", r"\1."),
    (r"^(t2u_model\.model\.decoder\.layers\.\d+)\.conv1d\.", r"\1."),
    (r"^(t2u_model\.model\.decoder\.layers\.\d+)\.conv1d_layer_norm\.", r"\1.conv_layer_norm."),
    (r"^((?:text_|t2u_).*self_attn)\.output_proj\.", r"\1.out_proj."),
    (rf"{_TEXT}(?:encoder_decoder_attn|encoder_attn)\.output_proj\.", r"\1.cross_attention.out_proj."),
    (rf"{_TEXT}(?:encoder_decoder_attn|encoder_attn)", r"\1.cross_attention"),
    (rf"{_TEXT}(?:ffn\.inner_proj|fc1)\.", r"\1.ffn.fc1."),
    (rf"{_TEXT}(?:ffn\.output_proj|fc2)\.", r"\1.ffn.fc2."),
    (rf"{_TEXT}final_layer_norm\.", r"\1.ffn_layer_norm."),
)
# What the loader of the authors leaves out as well.
_REMNANTS = (
    Ignore(r".*\.version|.*\._float_tensor|.*\.mask_emb", "what fairseq writes beside the weights"),
    Ignore(r"decoder\.char_upsampler\.embed_tokens_char\.weight", "the characters again, as the upsampler had them"),
    Ignore(r"decoder\.alignment_encoder\..*", "the aligner, which training took durations from"),
    Ignore(r"decoder_target_letter_decoder\.proj\..*", "a projection of training alone"),
)
FAIRSEQ_ROWS = (1, 3, 0, 2)  # (BOS, PAD, EOS, UNK) -> (PAD, UNK, BOS, EOS)


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
        (*_rules(config, *moved), *below(tuple(voice), "vocoder.")),
        renames=ORIGINAL_NAMES,
        ignored=(*_REMNANTS, *_ignored(model_class)),
        tied=_TIED,
    )


class WithVoice:
    """The tensors of the translator and, with `vocoder.` in front, those of the vocoder, as one file."""

    def __init__(self, translator: Tensors, voice: Tensors, table: Table):
        self.owners = {name: (translator, name) for name in translator.names()}
        self.owners |= {f"vocoder.{table.today(name)}": (voice, name) for name in voice.names()}

    def names(self) -> list[str]:
        """Every tensor's name."""
        return list(self.owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor, without reading it."""
        owner, inner = self.owners[name]
        return owner.shape(inner)

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor, without reading it."""
        owner, inner = self.owners[name]
        return owner.dtype(inner)

    def read(self, name: str) -> np.ndarray:
        """One tensor's values."""
        owner, inner = self.owners[name]
        return owner.read(inner)


def character_pieces(directory: Path) -> list[str]:
    """The characters of the authors' SentencePiece model, control symbols first.

    Raises:
        SourceError: if it is not there.
    """
    path = directory / "spm_char_lang38_tc.model"
    if not path.is_file():
        raise SourceError(
            f"The characters of this checkpoint are in fairseq's order; {path}, which says ours, is missing."
        )
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


_FAIRSEQ_MARK = "encoder.w2v_encoder.w2v_model.encoder.layers.0.self_attn_layer_norm.weight"
_FAIRSEQ2_MARK = "speech_encoder.inner.layers.0.self_attn_layer_norm.weight"


def _bare(tensors: Tensors) -> set[str]:
    return {name.removeprefix("model.") for name in tensors.names()}


def _is_original(tensors: Tensors) -> bool:
    """Are these the authors' tensors, and the second version's, which spells?"""
    names = _bare(tensors)
    spells = {"decoder.embed_tokens_text.weight", "t2u_model.decoder_frontend.embed_char.weight"}
    return bool(names & {_FAIRSEQ_MARK, _FAIRSEQ2_MARK}) and bool(names & spells)


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
    source: Tensors = tensors
    if "vocoder" not in WITHOUT.get(name, ()):
        beside = path.parent / "vocoder_v2.pt"
        if not beside.is_file():
            raise SourceError(
                f"{name} speaks, and the vocoder is a file of its own: put vocoder_v2.pt beside {path}, or load "
                "SeamlessM4Tv2ForSpeechToText or SeamlessM4Tv2ForTextToText."
            )
        voice = open_tensors(beside)
        config = dataclasses.replace(config, vocoder=vocoder.config_from_original(voice))
        source = WithVoice(tensors, voice, vocoder.original_table(config.vocoder))
    pieces = character_pieces(path.parent) if _FAIRSEQ_MARK in _bare(tensors) else None
    table = original_table(config, name, pieces)
    attributes = {}
    side = path.parent / "generation_config.json"
    if side.is_file():
        attributes = {"generation_config": generation_from_hugging_face(read_json(side), {}, str(side))}
    return ForeignCheckpoint(name, config, source, table, path, attributes)
