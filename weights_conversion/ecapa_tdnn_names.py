"""Microsoft's speaker verification: ECAPA-TDNN's names, and the files in which it stands behind a speech encoder.

`wavlm_large_finetune.pth` and its likes are `{"model": …}` without settings: `feature_extract.model.…` is the encoder
in fairseq's names, `feature_weight` mixes its layers, and the rest is ECAPA-TDNN.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weights_conversion import ForeignCheckpoint
from weights_conversion.readers import TensorSource, below
from weights_conversion.rules import Ignore, Rule, Table, Tensors, squeeze, transpose
from weights_conversion.wav2vec2 import OLD_WEIGHT_NORM, convolution, linear

FRONT = "feature_extract.model."
SUFFIX = "ForSpeakerVerification"


def batch_norm(foreign: str, ours: str, **numbers: Any) -> tuple[Rule, ...]:
    """Scale, bias and the running statistics."""
    pairs = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    return tuple(Rule(f"{foreign}.{theirs}", f"{ours}.{mine}", **numbers) for theirs, mine in pairs.items())


def _numbered(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Their `layer2` is our first block."""
    return tuple(Rule(r.foreign, r.ours, r.operation, {"i": (1, 2)}) for r in rules)


def _dense(foreign: str, ours: str) -> tuple[Rule, ...]:
    """A convolution of one tap as a linear map."""
    return Rule(f"{foreign}.weight", f"{ours}.kernel", squeeze(2) >> transpose), Rule(f"{foreign}.bias", f"{ours}.bias")


def _conv_relu_norm(foreign: str, ours: str) -> tuple[Rule, ...]:
    return (*convolution(f"{foreign}.conv", f"{ours}.conv"), *batch_norm(f"{foreign}.bn", f"{ours}.norm"))


_BLOCK, _OURS = "layer{i}.", "ecapa.blocks.{i}."
ECAPA = (
    Rule("feature_weight", "feature_weight"),
    *_conv_relu_norm("layer1", "ecapa.entry"),
    *_numbered(_conv_relu_norm(_BLOCK + "Conv1dReluBn1", _OURS + "reduce")),
    *_numbered(convolution(_BLOCK + "Res2Conv1dReluBn.convs.{j}", _OURS + "res2.parts.{j}.conv")),
    *_numbered(batch_norm(_BLOCK + "Res2Conv1dReluBn.bns.{j}", _OURS + "res2.parts.{j}.norm")),
    *_numbered(_conv_relu_norm(_BLOCK + "Conv1dReluBn2", _OURS + "expand")),
    *_numbered(linear(_BLOCK + "SE_Connect.linear1", _OURS + "squeeze.linear_1")),
    *_numbered(linear(_BLOCK + "SE_Connect.linear2", _OURS + "squeeze.linear_2")),
    *convolution("conv", "ecapa.aggregate"),
    *_dense("pooling.linear1", "ecapa.pooling.linear_1"),
    *_dense("pooling.linear2", "ecapa.pooling.linear_2"),
    *batch_norm("bn", "ecapa.norm"),
    *linear("linear", "ecapa.embedding"),
)
_IGNORED = (
    Ignore(r".*\.num_batches_tracked", "of no use outside PyTorch"),
    Ignore(r"loss_calculator\..*", "the classifier of its training"),
    Ignore(
        re.escape(FRONT) + r"(label_embs_concat|(final_proj|target_glu|quantizer|project_q|spk_proj"
        r"|(encoder\.)?layer_norm_for_extract)\..*)",
        "left over from pre-training",
    ),
)


def table(encoder: Table, prefix: str) -> Table:
    """The correspondence of a whole file.

    Args:
        encoder: that of the bare model.
        prefix: what our class calls it.
    """
    rules = [rule.prefixed(FRONT, f"{prefix}.") for rule in encoder.rules]
    return Table((*rules, *ECAPA), renames=OLD_WEIGHT_NORM, ignored=_IGNORED)


def is_verification(tensors: Tensors) -> bool:
    """Is this such a file?"""
    return {"feature_weight", "pooling.linear1.weight"} <= set(tensors.names())


def open_verification(
    path: Path,
    tensors: TensorSource,
    family: str,
    prefix: str,
    read_config: Callable[[TensorSource], Any],
    make_table: Callable[[Any, str], Table],
) -> ForeignCheckpoint:
    """Open such a file; what it does not say of the encoder is as in the published ones.

    Args:
        path: the file.
        tensors: the file, opened.
        family: the beginning of its classes, "WavLM".
        prefix: what they call the encoder, "wavlm".
        read_config: our configuration of the encoder.
        make_table: the correspondence of the encoder.
    """
    config = read_config(below(tensors, FRONT))
    layered = config.feat_extract_norm == "layer"
    gate = f"{FRONT}encoder.layers.0.self_attn.grep_a"
    heads = tensors.shape(gate)[1] if gate in tensors.names() else 12 if config.hidden_size == 768 else 16
    config = dataclasses.replace(config, do_stable_layer_norm=layered, num_attention_heads=heads)
    correspondence = table(make_table(config, f"{family}Model"), prefix)
    return ForeignCheckpoint(family + SUFFIX, config, tensors, correspondence, path)
