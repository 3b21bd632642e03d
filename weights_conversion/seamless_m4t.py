"""SeamlessM4T's foreign forms: Hugging Face directories, and the authors' `multitask_unity_{medium,large}.pt`.

The authors' file has the names of fairseq, or of fairseq2 after it. Both become those of `transformers` first, by
`ORIGINAL_NAMES`, which serve the second version's file as well. In fairseq's the first four rows of the tokens are in
another order, and the large model's has one row too many. Which languages the rows behind the pieces stand for is in
the authors' code, and here in `TEXT_LANGUAGES`; the pieces are in the `tokenizer.model` that lies beside the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.seamless_m4t import SeamlessM4TConfig, SeamlessM4TGenerationConfig
from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from audiozoo.processors.seamless_m4t import SeamlessM4TFeatureExtractor, SeamlessM4TProcessor, SeamlessM4TTokenizer
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, search_options, take
from weights_conversion import code_hifigan_names as vocoder
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Operation, Rule, Table, Tensors, Tied, conv1d, identity, squeeze, transpose
from weights_conversion.wav2vec2 import convolution, linear, norm

MODEL_TYPE = "seamless_m4t"
# Which of the checkpoint's parts each class does without.
WITHOUT = {
    "SeamlessM4TModel": (),
    "SeamlessM4TForTextToText": ("speech_encoder", "t2u_model", "vocoder"),
    "SeamlessM4TForSpeechToText": ("text_encoder", "t2u_model", "vocoder"),
    "SeamlessM4TForTextToSpeech": ("speech_encoder",),
    "SeamlessM4TForSpeechToSpeech": ("text_encoder",),
}

# --- parts that both versions share -----------------------------------------------------------------------------------


def attention(foreign: str, ours: str, style: str = "linear_") -> tuple[Rule, ...]:
    """The four maps of an attention; the Conformer's are `linear_q`, …, the others' `q_proj`, …."""
    if style != "linear_":
        return linear(f"{foreign}.{{p:q_proj|k_proj|v_proj|out_proj}}", f"{ours}.{{p:q_proj|k_proj|v_proj|out_proj}}")
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    return tuple(rule for n, m in names.items() for rule in linear(f"{foreign}.linear_{n}", f"{ours}.{m}"))


def feed_forward(foreign: str, ours: str) -> tuple[Rule, ...]:
    """The Conformer's feed-forward module."""
    return (*linear(f"{foreign}.intermediate_dense", f"{ours}.fc1"), *linear(f"{foreign}.output_dense", f"{ours}.fc2"))


UNREAD = (
    Ignore(r".*\.num_batches_tracked", "PyTorch's count of training steps, which nothing reads"),
    Ignore(r".*\.embed_positions\.inv_freq", "frequencies, which follow from the settings"),
)
_BLOCK = "encoder.layers.{i}."
CONFORMER = (
    *norm("feature_projection.layer_norm"),
    *linear("feature_projection.projection"),
    *norm(_BLOCK + "{n:ffn1_layer_norm|ffn2_layer_norm|self_attn_layer_norm|final_layer_norm}"),
    *feed_forward(_BLOCK + "{f:ffn1|ffn2}", _BLOCK + "{f:ffn1|ffn2}"),
    *attention(_BLOCK + "self_attn", _BLOCK + "self_attn"),
    Rule(_BLOCK + "self_attn.linear_pos.weight", _BLOCK + "self_attn.linear_pos.kernel", transpose),
    Rule(_BLOCK + "self_attn.{b:pos_bias_u|pos_bias_v}", _BLOCK + "self_attn.{b}"),
    Rule(_BLOCK + "self_attn.distance_embedding.weight", _BLOCK + "self_attn.distance_embedding.embedding"),
    *norm(_BLOCK + "conv_module.{n:layer_norm|depthwise_layer_norm|batch_norm}"),
    Rule(_BLOCK + "conv_module.batch_norm.running_mean", _BLOCK + "conv_module.batch_norm.mean"),
    Rule(_BLOCK + "conv_module.batch_norm.running_var", _BLOCK + "conv_module.batch_norm.var"),
    Rule(
        _BLOCK + "conv_module.{c:pointwise_conv1|pointwise_conv2}.weight",
        _BLOCK + "conv_module.{c}.kernel",
        squeeze(2) >> transpose,
    ),
    Rule(_BLOCK + "conv_module.depthwise_conv.weight", _BLOCK + "conv_module.depthwise_conv.kernel", conv1d),
    *norm("encoder.layer_norm"),
    *feed_forward("intermediate_ffn", "intermediate_ffn"),
)
LENGTH_ADAPTOR = (
    *norm("{n:residual_layer_norm|self_attn_layer_norm|ffn_layer_norm}"),
    *convolution("{c:residual_conv|self_attn_conv}"),
    *attention("self_attn", "self_attn"),
    *feed_forward("ffn", "ffn"),
)
SPEECH_ENCODER = (
    *CONFORMER,
    *(rule.prefixed("adapter.layers.{i}.", "adapter.{i}.") for rule in LENGTH_ADAPTOR),
    *norm("inner_layer_norm"),
)

_LAYER = "layers.{i}."
TEXT_ENCODER = (
    *attention(_LAYER + "self_attn", _LAYER + "self_attn", "proj"),
    *norm(_LAYER + "self_attn_layer_norm"),
    *linear(_LAYER + "ffn.{d:fc1|fc2}", _LAYER + "{d:fc1|fc2}"),
    *norm(_LAYER + "ffn_layer_norm", _LAYER + "final_layer_norm"),
    *norm("layer_norm"),
)
# Beside the embedding, whose name depends on who shares it.
TEXT_DECODER = (
    *TEXT_ENCODER,
    *attention(_LAYER + "cross_attention", _LAYER + "encoder_attn", "proj"),
    *norm(_LAYER + "cross_attention_layer_norm", _LAYER + "encoder_attn_layer_norm"),
)


def below(rules: tuple[Rule, ...], foreign: str, ours: str | None = None) -> tuple[Rule, ...]:
    """The same rules one level deeper."""
    return tuple(rule.prefixed(foreign, foreign if ours is None else ours) for rule in rules)


# --- Hugging Face ----------------------------------------------------------------------------------------------------

_EMBEDDING = Rule("embed_tokens.weight", "embed_tokens.embedding")
T2U = (*below(TEXT_ENCODER, "model.encoder."), *below((*TEXT_DECODER, _EMBEDDING), "model.decoder."))
_TIED = (
    *(Tied(f"{part}.weight", "shared.weight") for part in ("lm_head", "text_encoder.embed_tokens")),
    Tied("text_decoder.embed_tokens.weight", "shared.weight"),
    Tied("t2u_model.lm_head.weight", "t2u_model.model.decoder.embed_tokens.weight"),
)


class HuggingFaceTable(Table):
    """The correspondence with what `save_pretrained` writes: also PyTorch's counters, which nothing reads."""

    def write(self, parameters: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
        """Our parameters, and a counter for each batch normalisation."""
        yield from super().write(parameters)
        for step in self.steps_for(parameters):
            if step.foreign[0].endswith(".running_mean"):
                yield step.foreign[0].replace(".running_mean", ".num_batches_tracked"), np.zeros((), np.int64)


def _rules(tokens: Operation = identity) -> tuple[Rule, ...]:
    return (
        Rule("shared.weight", "text_decoder.embed_tokens.embedding", tokens),
        *below(TEXT_ENCODER, "text_encoder."),
        *below(SPEECH_ENCODER, "speech_encoder."),
        *below(TEXT_DECODER, "text_decoder."),
        *below(T2U, "t2u_model."),
    )


def _ignored(model_class: str) -> tuple[Ignore, ...]:
    if model_class not in WITHOUT:
        raise CheckpointError(f"There is no class {model_class} in SeamlessM4T; there are {', '.join(WITHOUT)}.")
    absent = (Ignore(rf"{part}\..*", f"a part that {model_class} does without") for part in WITHOUT[model_class])
    return (*UNREAD, *absent)


def hugging_face_table(config: SeamlessM4TConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes."""
    rules = (*_rules(), *vocoder.vocoder_rules(config.vocoder, "vocoder.", "vocoder."))
    return HuggingFaceTable(rules, renames=WEIGHT_NORM_RENAMES, ignored=_ignored(model_class), tied=_TIED)


_DEFAULTS = {
    f.name: f.default for f in dataclasses.fields(SeamlessM4TConfig) if f.name not in ("vocoder", "sampling_rate")
}
_VOCODER_DEFAULTS = {name: getattr(CodeHifiGanConfig(), name) for name in vocoder.VOCODER_KEPT}
LANGUAGES = ("text_decoder_lang_to_code_id", "t2u_lang_code_to_id", "vocoder_lang_code_to_id")


def table_of(generation: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """One of the tables in `generation_config.json`, or an empty one.

    Raises:
        CheckpointError: if it is no table.
    """
    table = generation.get(name) or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{where}: {name} is no table.")
    return table


def config_from_hugging_face(
    config: Mapping[str, Any], where: str = "config.json", *, weight_norm: bool = False
) -> SeamlessM4TConfig:
    """Our configuration from a `config.json`; `weight_norm` if the vocoder has magnitudes and directions."""
    sizes = CodeHifiGanConfig(**take(config, _VOCODER_DEFAULTS, where), weight_norm=weight_norm)
    taken = take(config, _DEFAULTS, where, nullable=("position_embeddings_type",))
    return SeamlessM4TConfig(**taken, vocoder=sizes, sampling_rate=sizes.sampling_rate)


def text_options(generation: Mapping[str, Any], config: Mapping[str, Any], where: str) -> tuple[tuple[str, Any], ...]:
    """How the checkpoint wants its text searched for; the longest text may also stand in `config.json`."""
    longest = generation.get("max_new_tokens") or config.get("max_new_tokens") or 256
    return search_options({**generation, "max_new_tokens": longest}, where)


def generation_from_hugging_face(
    generation: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> SeamlessM4TGenerationConfig:
    """Our generation settings from `generation_config.json`; the longest text may also stand in `config.json`."""
    tables = {n: tuple((str(k), int(v)) for k, v in table_of(generation, n, where).items()) for n in LANGUAGES}
    return SeamlessM4TGenerationConfig(**tables, options=text_options(generation, config, where))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A model as the directory that `save_pretrained` would write."""
    config, name = model.config, type(model).__name__
    raw = dataclasses.asdict(config)
    raw |= {n: v for n, v in raw.pop("vocoder").items() if n != "weight_norm"}
    raw |= {"architectures": [name], "model_type": MODEL_TYPE, "dtype": "float32", "is_encoder_decoder": True}
    tables = dataclasses.asdict(model.generation_config)
    generation: dict[str, Any] = dict(tables.pop("options"))
    generation |= {table: dict(pairs) for table, pairs in tables.items() if pairs}
    generation |= {n: getattr(config, n) for n in ("pad_token_id", "bos_token_id", "eos_token_id")}
    generation |= {"decoder_start_token_id": config.decoder_start_token_id}
    table = vocoder.folded(config, lambda config: hugging_face_table(config, name))
    return HuggingFaceForm({"config.json": raw, "generation_config.json": generation}, table)


# --- languages of the authors' files ---------------------------------------------------------------------------------

# NLLB's tokens behind the pieces, in the order of their rows, by the number of rows in the table.
TEXT_LANGUAGES = {
    256_102: """
        afr amh arb ary arz asm azj bel ben bos bul cat ceb ces ckb cmn cmn_Hant cym dan deu ell eng est eus fin fra fuv
        gaz gle glg guj heb hin hrv hun hye ibo ind isl ita jav jpn kan kat kaz khk khm kir kor lao lit lug luo lvs mai
        mal mar mkd mlt mni mya nld nno nob npi nya ory pan pbt pes pol por ron rus sat slk slv sna snd som spa srp swe
        swh tam tel tgk tgl tha tur ukr urd uzn vie yor yue zlm zul
    """,
    256_206: """
        ace ace_Latn acm acq aeb afr ajp aka amh apc arb ars ary arz asm ast awa ayr azb azj bak bam ban bel bem ben bho
        bjn bjn_Latn bod bos bug bul cat ceb ces cjk ckb crh cym dan deu dik dyu dzo ell eng epo est eus ewe fao pes fij
        fin fon fra fur fuv gla gle glg grn guj hat hau heb hin hne hrv hun hye ibo ilo ind isl ita jav jpn kab kac kam
        kan kas kas_Deva kat knc knc_Latn kaz kbp kea khm kik kin kir kmb kon kor kmr lao lvs lij lim lin lit lmo ltg
        ltz lua lug luo lus mag mai mal mar min mkd plt mlt mni khk mos mri zsm mya nld nno nob npi nso nus nya oci gaz
        ory pag pan pap pol por prs pbt quy ron run rus sag san sat scn shn sin slk slv smo sna snd som sot spa als srd
        srp ssw sun swe swh szl tam tat tel tgk tgl tha tir taq taq_Tfng tpi tsn tso tuk tum tur twi tzm uig ukr umb urd
        uzn vec vie war wol xho ydd yor yue cmn cmn_Hant zul
    """,
}
MARKS_BEHIND = 3  # rows behind the languages: for mined texts, and for two kinds of back-translated ones
UNIT_LANGUAGES = """
    arb ben cat ces cmn cym dan deu eng est fin fra hin ind ita jpn kan kor mlt nld pes pol por ron rus slk spa swe swh
    tam tel tgl tha tur ukr urd uzn vie
"""
UNVOICED = ("kan", "tam")  # languages that have units, and no voice


def original_languages(config: SeamlessM4TConfig) -> dict[str, dict[str, int]]:
    """The language tables of a `generation_config.json`, for one of the authors' files; empty for other sizes.

    A table of units ends with [mask, languages, languages, mask]; the second languages are used.
    """
    languages, of_units = TEXT_LANGUAGES.get(config.vocab_size, "").split(), UNIT_LANGUAGES.split()
    if not languages:
        return {}
    text, unit = config.vocab_size - MARKS_BEHIND - len(languages), config.t2u_vocab_size - 1 - len(of_units)
    voiced = [language for language in of_units if language not in UNVOICED]
    starts = ((languages, text), (of_units, unit), (voiced, 0))
    return {
        table: {language: first + i for i, language in enumerate(names)}
        for table, (names, first) in zip(LANGUAGES, starts, strict=True)
    }


def original_processor(path: Path, config: SeamlessM4TConfig) -> SeamlessM4TProcessor:
    """The processor of one of the authors' files: its tokenizer lies beside it, and knows no languages.

    Raises:
        SourceError: if the tokenizer is not there.
        CheckpointError: if nothing says which languages there are.
    """
    if any((path.parent / name).is_file() for name in ("tokenizer.json", "sentencepiece.bpe.model")):
        return SeamlessM4TProcessor.from_directory(path.parent)
    file, languages = path.parent / "tokenizer.model", original_languages(config)
    if not file.is_file():
        raise SourceError(f"The tokenizer is a file of its own: put tokenizer.model beside {path}.")
    if not languages:
        raise CheckpointError(f"{path} has {config.vocab_size} tokens, which no language list here fits.")
    added = {f"__{language}__": i for language, i in languages[LANGUAGES[0]].items()}
    return SeamlessM4TProcessor(SeamlessM4TFeatureExtractor(), SeamlessM4TTokenizer(file, added=added))


def processor_of_file(path: Path) -> SeamlessM4TProcessor:
    """The processor of the authors' file."""
    return original_processor(path, config_from_original(open_tensors(path)))


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
_CONFORMER, _ADAPTOR = r"^speech_encoder\.encoder\.layers\.(\d+)\.", r"^speech_encoder\.adapter\.layers\.(\d+)\."
_TEXT = r"^((?:text_encoder|text_decoder|t2u_model\.model\.encoder|t2u_model\.model\.decoder)\.layers\.\d+)\."
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
    (rf"{_CONFORMER}layer_norm\.", r"speech_encoder.encoder.layers.\1.final_layer_norm."),
    (rf"{_CONFORMER}conv_layer_norm\.", r"speech_encoder.encoder.layers.\1.conv_module.layer_norm."),
    (rf"{_CONFORMER}conv\.layer_norm\.", r"speech_encoder.encoder.layers.\1.conv_module.depthwise_layer_norm."),
    (rf"{_CONFORMER}conv\.", r"speech_encoder.encoder.layers.\1.conv_module."),
    (rf"{_CONFORMER}self_attn\.sdpa\.r_proj\.", r"speech_encoder.encoder.layers.\1.self_attn.linear_pos."),
    (rf"{_CONFORMER}self_attn\.sdpa\.([uv])_bias", r"speech_encoder.encoder.layers.\1.self_attn.pos_bias_\2"),
    (rf"{_CONFORMER}self_attn\.sdpa\.rel_k_embed\.", r"speech_encoder.encoder.layers.\1.self_attn.distance_embedding."),
    (r"^(speech_encoder\..*self_attn)\.(?:output_proj|out_proj)\.", r"\1.linear_out."),
    (r"^(speech_encoder\..*self_attn)\.([qkv])_proj\.", r"\1.linear_\2."),
    (rf"{_ADAPTOR}(?:ffn\.inner_proj|fc1)\.", r"speech_encoder.adapter.layers.\1.ffn.intermediate_dense."),
    (rf"{_ADAPTOR}(?:ffn\.output_proj|fc2)\.", r"speech_encoder.adapter.layers.\1.ffn.output_dense."),
    (rf"{_ADAPTOR}final_layer_norm\.", r"speech_encoder.adapter.layers.\1.ffn_layer_norm."),
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
REMNANTS = (
    Ignore(r".*\.version|.*\._float_tensor|.*\.mask_emb", "what fairseq writes beside the weights"),
    Ignore(r"decoder\.char_upsampler\.embed_tokens_char\.weight", "the characters again, as the upsampler had them"),
    Ignore(r"decoder\.alignment_encoder\..*", "the aligner, which training took durations from"),
    Ignore(r"decoder_target_letter_decoder\.proj\..*", "a projection of training alone"),
)
FAIRSEQ_ROWS = (1, 3, 0, 2)  # (BOS, PAD, EOS, UNK) -> (PAD, UNK, BOS, EOS)


def reordered(rows: Sequence[int]) -> Operation:
    """A table whose row i is the foreign row `rows[i]`; rows behind them stay.

    The table of the tokens is a gigabyte: on the way in, where it was just read from a file, it is changed itself.
    """

    def move(order: np.ndarray, copied: bool) -> Any:
        def apply(arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
            table = arrays[0]
            if len(table) < len(order):
                raise ValueError("fewer rows than are moved")
            if copied or not table.flags.writeable:
                table = table.copy()
            table[: len(order)] = table[order]
            return (table,)

        return apply

    order = np.asarray(rows)
    return Operation(f"reordered({len(rows)} rows)", move(order, False), move(np.argsort(order), True))


without_last = Operation(
    "without_last",
    lambda arrays: (arrays[0][:-1],),
    lambda arrays: (np.concatenate([arrays[0], np.zeros_like(arrays[0][:1])]),),
)
NLLB_100_ROWS = 256_103  # one more than there are tokens


def with_voice(translator: TensorSource, voice: TensorSource, table: Table) -> TensorSource:
    """The tensors of the translator and, with `vocoder.` in front, those of the vocoder, as one file."""
    tensors = {**translator, **{f"vocoder.{table.today(name)}": tensor for name, tensor in voice.items()}}
    return TensorSource(translator.path, translator.format, tensors, translator.metadata, translator.root)


FAIRSEQ_MARK = "encoder.w2v_encoder.w2v_model.encoder.layers.0.ffn1.layer_norm.weight"  # XLS-R has no Conformer
FAIRSEQ2_MARK = "speech_encoder.inner.layers.0.self_attn_layer_norm.weight"


def bare(tensors: Tensors) -> set[str]:
    """The names, without the `model.` that may stand in front of all of them."""
    return {name.removeprefix("model.") for name in tensors.names()}


def _is_original(tensors: Tensors) -> bool:
    """Are these the authors' tensors, and the first version's, which does not spell?"""
    names = bare(tensors)
    spells = {"decoder.embed_tokens_text.weight", "t2u_model.decoder_frontend.embed_char.weight"}
    return bool(names & {FAIRSEQ_MARK, FAIRSEQ2_MARK}) and not names & spells


def original_table(
    config: SeamlessM4TConfig, model_class: str, *, fairseq: bool = False, dummy_row: bool = False
) -> Table:
    """The correspondence with the authors' file.

    Args:
        config: its sizes.
        model_class: what is to be read of it.
        fairseq: the first four rows of the tokens are in fairseq's order.
        dummy_row: the last row belongs to no token.
    """
    tokens = identity
    if fairseq:
        tokens = without_last >> reordered(FAIRSEQ_ROWS) if dummy_row else reordered(FAIRSEQ_ROWS)
    voice = vocoder.original_table(config.vocoder).rules
    return Table(
        (*_rules(tokens), *below(tuple(voice), "vocoder.")),
        renames=ORIGINAL_NAMES,
        ignored=(*REMNANTS, *_ignored(model_class)),
        tied=_TIED,
    )


def config_from_original(tensors: Tensors) -> SeamlessM4TConfig:
    """Our configuration from shapes; heads have 64 channels, as in the released models."""
    table = Table((), renames=ORIGINAL_NAMES)
    names = {table.today(name): name for name in tensors.names()}

    def shape(name: str) -> tuple[int, ...]:
        return tensors.shape(names[name])

    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in names)
        return 1 + max((int(m[1]) for m in found if m), default=-1)

    vocabulary, width = shape("shared.weight")
    heads = max(width // 64, 1)
    speech, units = "speech_encoder.encoder.layers.", "t2u_model.model."
    pooling = shape("speech_encoder.adapter.layers.0.residual_conv.weight")[2]
    return SeamlessM4TConfig(
        hidden_size=width,
        vocab_size=vocabulary - (vocabulary == NLLB_100_ROWS),
        encoder_layers=count("text_encoder.layers."),
        encoder_ffn_dim=shape("text_encoder.layers.0.ffn.fc1.weight")[0],
        encoder_attention_heads=heads,
        decoder_layers=count("text_decoder.layers."),
        decoder_ffn_dim=shape("text_decoder.layers.0.ffn.fc1.weight")[0],
        decoder_attention_heads=heads,
        feature_projection_input_dim=shape("speech_encoder.feature_projection.projection.weight")[1],
        speech_encoder_layers=count(speech),
        speech_encoder_attention_heads=shape(f"{speech}0.self_attn.pos_bias_u")[0],
        speech_encoder_intermediate_size=shape(f"{speech}0.ffn1.intermediate_dense.weight")[0],
        conv_depthwise_kernel_size=shape(f"{speech}0.conv_module.depthwise_conv.weight")[2],
        adaptor_kernel_size=pooling,
        adaptor_stride=pooling,
        num_adapter_layers=count("speech_encoder.adapter.layers."),
        t2u_vocab_size=shape("t2u_model.lm_head.weight")[0],
        t2u_encoder_layers=count(f"{units}encoder.layers."),
        t2u_encoder_ffn_dim=shape(f"{units}encoder.layers.0.ffn.fc1.weight")[0],
        t2u_encoder_attention_heads=heads,
        t2u_decoder_layers=count(f"{units}decoder.layers."),
        t2u_decoder_ffn_dim=shape(f"{units}decoder.layers.0.ffn.fc1.weight")[0],
        t2u_decoder_attention_heads=heads,
    )


def recognise(path: Path) -> bool:
    """Is this the authors' model?"""
    if not path.is_file() or path.suffix not in {".pt", ".pth"}:
        return False
    try:
        return _is_original(open_tensors(path))
    except (CheckpointError, SourceError):
        return False


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a Hugging Face directory, or the authors' file.

    The vocoder is a file of its own there: what speaks needs `vocoder_36langs.pt` beside the translator.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir():
        raw, where = read_json(path / "config.json"), str(path / "config.json")
        name = model_class or str((raw.get("architectures") or ["SeamlessM4TModel"])[0])
        tensors = open_tensors(path)
        apart = ("hifi_gan.conv_pre.weight_g", "hifi_gan.conv_pre.parametrizations.weight.original0")
        split = any(tensor.endswith(apart) for tensor in tensors.names())
        config = config_from_hugging_face(raw, where, weight_norm=split)
        side = path / "generation_config.json"
        given = read_json(side) if side.is_file() else {}
        attributes = {"generation_config": generation_from_hugging_face(given, raw, str(side))}
        return ForeignCheckpoint(name, config, tensors, hugging_face_table(config, name), path, attributes)
    tensors = open_tensors(path)
    if not _is_original(tensors):
        raise CheckpointError(f"{path} is not SeamlessM4T's own file; give the directory that also holds config.json.")
    name, config = model_class or "SeamlessM4TModel", config_from_original(tensors)
    if "vocoder" not in WITHOUT.get(name, ()):
        beside = path.parent / "vocoder_36langs.pt"
        if not beside.is_file():
            raise SourceError(
                f"{name} speaks, and the vocoder is a file of its own: put vocoder_36langs.pt beside {path}, or load "
                "SeamlessM4TForSpeechToText or SeamlessM4TForTextToText."
            )
        voice = open_tensors(beside)
        config = dataclasses.replace(config, vocoder=vocoder.config_from_original(voice))
        tensors = with_voice(tensors, voice, vocoder.original_table(config.vocoder))
    names = bare(tensors)
    dummy = any(tensors.shape(n)[0] == NLLB_100_ROWS for n in tensors.names() if n.endswith("output_projection.weight"))
    table = original_table(config, name, fairseq=FAIRSEQ_MARK in names, dummy_row=dummy)
    side = path.parent / "generation_config.json"
    given = read_json(side) if side.is_file() else original_languages(config)
    attributes = {"generation_config": generation_from_hugging_face(given, {}, str(side))}
    return ForeignCheckpoint(name, config, tensors, table, path, attributes)
