"""What the whole field shares and no paper here introduced, with the numerics that the published checkpoints expect."""

from audiozoo.layers.abstract import abstract
from audiozoo.layers.activations import ACTIVATIONS, activation, gelu
from audiozoo.layers.attention import (
    Causal,
    KeyValues,
    Mask,
    MultiHeadAttention,
    attend,
    attend_without_weights,
    causal_mask,
    merge_heads,
    relative_to_absolute,
    split_heads,
)
from audiozoo.layers.basic import (
    Dropout,
    Embed,
    GroupNorm,
    LayerNorm,
    Linear,
    check_frames,
    check_ids,
    check_mask,
    dropout,
    promote,
)
from audiozoo.layers.blocks import in_blocks
from audiozoo.layers.convolution import Conv1d, ConvTranspose1d
from audiozoo.layers.fused import fused_attention
from audiozoo.layers.positions import fairseq_sinusoids, sinusoids
from audiozoo.layers.stacking import layer_drop, scan_layers, stack_layers, unstack_layers

__all__ = [
    "ACTIVATIONS",
    "Causal",
    "Conv1d",
    "ConvTranspose1d",
    "Dropout",
    "Embed",
    "GroupNorm",
    "KeyValues",
    "LayerNorm",
    "Linear",
    "Mask",
    "MultiHeadAttention",
    "abstract",
    "activation",
    "attend",
    "attend_without_weights",
    "causal_mask",
    "check_frames",
    "check_ids",
    "check_mask",
    "dropout",
    "fairseq_sinusoids",
    "fused_attention",
    "gelu",
    "in_blocks",
    "layer_drop",
    "merge_heads",
    "promote",
    "relative_to_absolute",
    "scan_layers",
    "sinusoids",
    "split_heads",
    "stack_layers",
    "unstack_layers",
]
