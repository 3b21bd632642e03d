"""SeamlessM4T's foreign forms: Hugging Face directories, and the authors' `multitask_unity_*.pt`."""

from __future__ import annotations

from weights_conversion.rules import Ignore, Rule, conv1d, squeeze, transpose
from weights_conversion.wav2vec2 import convolution, linear, norm

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
_POOL = "adapter.layers.{i}.", "adapter.{i}."
SPEECH_ENCODER = (
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
    *(
        rule.prefixed(*_POOL)
        for rule in (
            *norm("{n:residual_layer_norm|self_attn_layer_norm|ffn_layer_norm}"),
            *convolution("{c:residual_conv|self_attn_conv}"),
            *attention("self_attn", "self_attn"),
            *feed_forward("ffn", "ffn"),
        )
    ),
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
