"""fairseq's `xm_transformer`, XLS-R before mBART's decoder: `xls_r_…_21_en.pt`; and mBART's names."""

from __future__ import annotations

import dataclasses
import re

from audiozoo.errors import CheckpointError
from audiozoo.models.mbart import MBartConfig
from audiozoo.models.xls_r import SpeechEncoderDecoderConfig
from weights_conversion import speech_to_text, wav2vec2
from weights_conversion.readers import TensorSource
from weights_conversion.rules import Ignore, Rule, Table, Tied, transpose
from weights_conversion.wav2vec2 import OLD_WEIGHT_NORM, convolution, linear, norm

MBART = (
    Rule("model.decoder.{e:embed_tokens|embed_positions}.weight", "model.decoder.{e}.embedding"),
    *norm("model.decoder.{n:layer_norm|layernorm_embedding}"),
    *(rule.prefixed("model.", "model.") for rule in speech_to_text.BLOCKS),
)

_SPEECH = "encoder.w2v_encoder.w2v_model."
_ADAPTER = (
    *linear("encoder.w2v_encoder.proj", "encoder.adapter.proj"),
    *norm("encoder.w2v_proj_ln", "encoder.adapter.proj_layer_norm"),
    *convolution("encoder.adaptor.layers.{i}", "encoder.adapter.layers.{i}.conv"),
)
_REMNANTS = (
    Ignore(r"decoder\.(version|embed_positions\._float_tensor)", "fairseq's own marks"),
    Ignore(re.escape(_SPEECH) + r"(quantizer|project_q|final_proj|target_glu)(\..*)?", "left over from pre-training"),
)


def fairseq_table(config: SpeechEncoderDecoderConfig, model_class: str = "SpeechEncoderDecoderModel") -> Table:
    """The correspondence with the names of fairseq's architecture `xm_transformer`."""
    if model_class != "SpeechEncoderDecoderModel" or (config.encoder_type, config.decoder_type) != (
        "wav2vec2",
        "mbart",
    ):
        raise CheckpointError("fairseq's files of speech translation load as SpeechEncoderDecoderModel, with mBART.")
    speech = wav2vec2.fairseq_table(config.encoder, "Wav2Vec2Model")
    head = "decoder.output_projection.weight"
    rules = [rule.prefixed(_SPEECH, "encoder.") for rule in speech.rules]
    for rule in MBART:
        (foreign,), (ours,) = rule._foreign, rule._ours  # type: ignore[attr-defined]
        rules.append(Rule(foreign.removeprefix("model."), f"decoder.{ours}", rule.operation))
    tied: tuple[Tied, ...] = ()
    if config.decoder.tie_word_embeddings:
        tied = (Tied(head, "decoder.embed_tokens.weight"),)
    else:
        rules.append(Rule(head, "decoder.lm_head.kernel", transpose))
    return Table((*rules, *_ADAPTER), renames=OLD_WEIGHT_NORM, ignored=_REMNANTS, tied=tied)


def config_from_fairseq(tensors: TensorSource) -> SpeechEncoderDecoderConfig:
    """Our configuration from the settings and shapes of a fairseq file.

    Raises:
        CheckpointError: for what `xm_transformer` can be told to be and no released checkpoint of XLS-R is.
    """
    settings, names = wav2vec2.fairseq_settings(tensors.metadata), tensors.names()
    inner = settings["_inner"]
    convolutions = [n for n in names if re.fullmatch(r"encoder\.adaptor\.layers\.\d+\.weight", n)]
    if not convolutions:
        raise CheckpointError("The file has no encoder.adaptor.layers, so it is no translation model of XLS-R.")
    output, _, taps = tensors.shape(convolutions[0])
    if taps != 3:
        raise CheckpointError(f"The convolutions behind the encoder have {taps} taps; those of XLS-R have 3.")
    encoder = dataclasses.replace(
        wav2vec2.config_from_fairseq(tensors, _SPEECH),
        hidden_act=str(inner.get("activation_fn") or "gelu"),  # outside it is the decoder's
        add_adapter=True,
        adapter_stride=int(settings.get("adaptor_stride") or 2),
        num_adapter_layers=len(convolutions),
    )
    if "encoder.w2v_encoder.proj.weight" in names:
        encoder = dataclasses.replace(encoder, output_hidden_size=output // 2)
    vocabulary, width = tensors.shape("decoder.embed_tokens.weight")
    blocks = [n for n in names if re.fullmatch(r"decoder\.layers\.\d+\.fc1\.weight", n)]
    tied = settings.get("share_decoder_input_output_embed", settings.get("share_all_embeddings", True))
    decoder = MBartConfig(
        vocab_size=vocabulary,
        max_position_embeddings=tensors.shape("decoder.embed_positions.weight")[0] - 2,  # two rows are padding's
        d_model=width,
        decoder_layers=len(blocks),
        decoder_attention_heads=int(settings.get("decoder_attention_heads") or 16),
        decoder_ffn_dim=tensors.shape(blocks[0])[0],
        activation_function=str(settings["_own"].get("activation_fn") or "gelu"),
        dropout=float(settings.get("decoder_dropout") or 0.0),
        attention_dropout=float(settings.get("decoder_attention_dropout") or 0.0),
        activation_dropout=float(settings.get("decoder_activation_dropout") or 0.0),
        decoder_layerdrop=float(settings.get("decoder_layerdrop") or 0.0),
        scale_embedding=not settings.get("no_scale_embedding"),
        tie_word_embeddings=bool(tied) or "decoder.output_projection.weight" not in names,
    )
    return SpeechEncoderDecoderConfig(encoder, decoder)


def is_xm_transformer(tensors: TensorSource) -> bool:
    """Is this a translation model of XLS-R?"""
    names = set(tensors.names())
    return {f"{_SPEECH}encoder.layers.0.fc1.weight", "decoder.layers.0.encoder_attn.k_proj.weight"} <= names
