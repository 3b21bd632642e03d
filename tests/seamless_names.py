"""What SeamlessM4T's authors call their tensors, by the names of `transformers`: in fairseq2, and in fairseq before."""

from __future__ import annotations

import re


def fairseq2_names(name: str) -> str | None:
    """A name of `transformers` as the authors' fairseq2 has it; None for what it does not hold."""
    fixed = {
        "shared.weight": "final_proj.weight",
        "text_encoder.embed_tokens.weight": "text_encoder_frontend.embed.weight",
        "text_decoder.embed_tokens.weight": "text_decoder_frontend.embed.weight",
        "t2u_model.lm_head.weight": "t2u_model.final_proj.weight",
        "t2u_model.model.decoder.embed_tokens.weight": "t2u_model.decoder_frontend.embed.weight",
    }
    if name in fixed or name.startswith(("vocoder", "lm_head")):
        return fixed.get(name)
    front = "t2u_model.model.decoder."
    if name.startswith(front + "duration_predictor"):
        inner = re.sub(r"(conv[12])", r"\1.0", name.removeprefix(front))
        return f"t2u_model.decoder_frontend.variance_adaptor.{inner}"
    if name.startswith((front + "embed_char", front + "pos_emb")):
        return f"t2u_model.decoder_frontend.{name.removeprefix(front)}"
    if not name.startswith("speech_encoder"):
        name = name.replace("t2u_model.model.", "t2u_model.").replace("out_proj", "output_proj")
        name = name.replace("cross_attention", "encoder_decoder_attn")
        name = name.replace("ffn.fc1", "ffn.inner_proj").replace("ffn.fc2", "ffn.output_proj")
        if name.startswith("t2u_model.decoder"):
            name = re.sub(r"\.(conv[12])\.", r".conv1d.\1.", name).replace("conv_layer_norm", "conv1d_layer_norm")
        return name
    for a, b in (
        ("speech_encoder.feature_projection.layer_norm", "speech_encoder_frontend.post_extract_layer_norm"),
        ("speech_encoder.feature_projection.projection", "speech_encoder_frontend.model_dim_proj"),
        ("speech_encoder.inner_layer_norm", "speech_encoder.layer_norm"),
        ("speech_encoder.encoder.layer_norm", "speech_encoder.inner_layer_norm"),
        ("speech_encoder.intermediate_ffn.intermediate_dense", "speech_encoder.proj1"),
        ("speech_encoder.intermediate_ffn.output_dense", "speech_encoder.proj2"),
    ):
        if name.startswith(a):
            return name.replace(a, b)
    name = name.replace("conv_module.layer_norm", "conv_layer_norm")
    name = name.replace("conv_module.depthwise_layer_norm", "conv.layer_norm").replace("conv_module", "conv")
    if "adapter" not in name:
        name = name.replace("final_layer_norm", "layer_norm")
    name = name.replace("linear_out", "output_proj").replace("linear_pos", "sdpa.r_proj")
    name = name.replace("distance_embedding", "sdpa.rel_k_embed")
    name = re.sub(r"pos_bias_([uv])", r"sdpa.\1_bias", re.sub(r"linear_([qkv])", r"\1_proj", name))
    name = name.replace("intermediate_dense", "inner_proj").replace("output_dense", "output_proj")
    return name.replace("encoder.layers", "inner.layers").replace("adapter.layers", "adaptor_layers")


# How fairseq calls what is alike in both versions, by fairseq2's names.
W2V = "encoder.w2v_encoder.w2v_model."
FAIRSEQ_SPEECH = (
    (r"^speech_encoder_frontend\.post_extract_layer_norm", W2V + "layer_norm"),
    (r"^speech_encoder_frontend\.model_dim_proj", W2V + "post_extract_proj"),
    (r"^speech_encoder\.inner_layer_norm", W2V + "encoder.layer_norm"),
    (r"^speech_encoder\.proj1", "encoder.adaptor.proj.0"),
    (r"^speech_encoder\.proj2", "encoder.adaptor.proj.2"),
    (r"^speech_encoder\.layer_norm", "encoder.adaptor.out_ln"),
    (r"^speech_encoder\.adaptor_layers\.(\d+)\.residual_conv", r"encoder.adaptor.layers.\1.residual_pool.1"),
    (r"^speech_encoder\.adaptor_layers\.(\d+)\.self_attn_conv", r"encoder.adaptor.layers.\1.attn_pool.1"),
)


def fairseq_names(name: str) -> str:
    """A name of fairseq2 as fairseq has it, in the first version."""
    front, inside = r"^speech_encoder\.inner\.layers\.(\d+)\.", W2V
    pairs = (
        *FAIRSEQ_SPEECH,
        (r"^speech_encoder\.adaptor_layers", "encoder.adaptor.layers"),
        (front + r"conv_layer_norm", inside + r"encoder.layers.\1.conv_module.layer_norm"),
        (front + r"conv\.", inside + r"encoder.layers.\1.conv_module."),
        (front + r"ffn(1|2)_layer_norm", inside + r"encoder.layers.\1.ffn\2.layer_norm"),
        (front + r"ffn(1|2)\.inner_proj", inside + r"encoder.layers.\1.ffn\2.w_1"),
        (front + r"ffn(1|2)\.output_proj", inside + r"encoder.layers.\1.ffn\2.w_2"),
        (front + r"self_attn\.output_proj", inside + r"encoder.layers.\1.self_attn.linear_out"),
        (front + r"self_attn\.([qkv])_proj", inside + r"encoder.layers.\1.self_attn.linear_\2"),
        (front + r"self_attn\.sdpa\.r_proj", inside + r"encoder.layers.\1.self_attn.linear_pos"),
        (front + r"self_attn\.sdpa\.([uv])_bias", inside + r"encoder.layers.\1.self_attn.pos_bias_\2"),
        (front + r"layer_norm", inside + r"encoder.layers.\1.final_layer_norm"),
        (front, inside + r"encoder.layers.\1."),
        (r"^final_proj", "target_letter_decoder.output_projection"),
        (r"^text_decoder_frontend\.embed", "target_letter_decoder.embed_tokens"),
        (r"^text_encoder_frontend\.embed", "text_encoder.embed_tokens"),
        (r"^t2u_model\.decoder_frontend\.embed", "decoder.embed_tokens"),
        (r"^t2u_model\.final_proj", "decoder.output_projection"),
        (r"^t2u_model\.decoder\.", "decoder."),
        (r"^t2u_model\.encoder\.", "synthesizer_encoder."),
        (r"^text_decoder\.", "target_letter_decoder."),
    )
    for pattern, new in pairs:
        if re.search(pattern, name):
            name = re.sub(pattern, new, name)
            break
    if "w2v_encoder" not in name:
        name = name.replace("ffn.inner_proj", "fc1").replace("ffn.output_proj", "fc2")
        name = name.replace("ffn_layer_norm", "final_layer_norm").replace("encoder_decoder_attn", "encoder_attn")
        name = name.replace("attn.output_proj", "attn.out_proj")
    return name
