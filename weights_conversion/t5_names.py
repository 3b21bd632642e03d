"""What `transformers` calls the parts of a T5, for the papers that have one inside."""

from __future__ import annotations

from weights_conversion.rules import Rule, transpose


def stack(foreign: str, ours: str, decoder: bool) -> tuple[Rule, ...]:
    """The rules of an encoder or a decoder.

    Args:
        foreign: what stands before its names there, with a dot at the end.
        ours: what stands before them here.
        decoder: whether it is a decoder.
    """
    last = 2 if decoder else 1
    theirs, mine = foreign + "block.{i}.layer.", ours + "block.{i}."

    def linear(there: str, here: str) -> Rule:
        return Rule(f"{theirs}{there}.weight", f"{mine}{here}.kernel", transpose)

    def norm(there: int, here: str) -> Rule:
        return Rule(f"{theirs}{there}.layer_norm.weight", f"{mine}{here}.scale")

    rules = [
        linear("0.SelfAttention.{p:q|k|v|o}", "self_attention.{p:q|k|v|o}"),
        norm(0, "self_attention_norm"),
        linear(f"{last}.DenseReluDense.{{p:wi|wi_0|wi_1|wo}}", "feed_forward.{p:wi|wi_0|wi_1|wo}"),
        norm(last, "feed_forward_norm"),
        # The first block holds the table that all of them use.
        Rule(
            f"{foreign}block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{ours}relative_attention_bias"
        ),
        Rule(f"{foreign}final_layer_norm.weight", f"{ours}final_layer_norm.scale"),
    ]
    if decoder:
        rules += [
            linear("1.EncDecAttention.{p:q|k|v|o}", "cross_attention.{p:q|k|v|o}"),
            norm(1, "cross_attention_norm"),
        ]
    return tuple(rules)
