"""What the originals call the parts of a vocoder of units, alone or inside a SeamlessM4T.

The authors' `vocoder_36langs.pt` and `vocoder_v2.pt` are pickles `{"generator": tensors}` or `{"model": tensors}`, the
names of the second kind with `code_generator.` in front.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from audiozoo.models.speech_resynthesis import CodeHifiGanConfig
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES, folding, generator_rules
from weights_conversion.rules import Rule, Table, Tensors, conv1d, transpose


def variance_predictor_rules(foreign: str, ours: str, inside: str = "") -> tuple[Rule, ...]:
    """The rules of a duration predictor; `inside` stands between a convolution's name and its tensors there."""
    return (
        Rule(f"{foreign}{{c:conv1|conv2}}{inside}.weight", f"{ours}{{c}}.kernel", conv1d),
        Rule(f"{foreign}{{c:conv1|conv2}}{inside}.bias", f"{ours}{{c}}.bias"),
        Rule(f"{foreign}{{n:ln1|ln2}}.weight", f"{ours}{{n}}.scale"),
        Rule(f"{foreign}{{n:ln1|ln2}}.bias", f"{ours}{{n}}.bias"),
        Rule(f"{foreign}proj.weight", f"{ours}proj.kernel", transpose),
        Rule(f"{foreign}proj.bias", f"{ours}proj.bias"),
    )


def vocoder_rules(config: CodeHifiGanConfig, foreign: str = "", ours: str = "") -> tuple[Rule, ...]:
    """The rules of a vocoder by the names of `transformers`, below `foreign` there and `ours` here."""
    tables = "{e:unit_embedding|speaker_embedding|language_embedding}"
    return (
        Rule(f"{foreign}{tables}.weight", f"{ours}{{e}}.embedding"),
        *variance_predictor_rules(f"{foreign}dur_predictor.", f"{ours}dur_predictor."),
        *generator_rules(config.generator, foreign=f"{foreign}hifi_gan.", ours=f"{ours}hifi_gan."),
    )


def vocoder_table(config: CodeHifiGanConfig) -> Table:
    """The correspondence with `SeamlessM4TCodeHifiGan` and `SeamlessM4Tv2CodeHifiGan`."""
    return Table(vocoder_rules(config), renames=WEIGHT_NORM_RENAMES)


def folded(config: Any, table_of: Callable[[Any], Table]) -> Table:
    """A table for export: `transformers` has whole kernels, which a vocoder from the authors' file does not.

    Args:
        config: of a model with a vocoder inside.
        table_of: the table by a configuration.
    """
    if not config.vocoder.weight_norm:
        return table_of(config)
    whole = dataclasses.replace(config, vocoder=dataclasses.replace(config.vocoder, weight_norm=False))
    return folding(table_of(whole), r"(vocoder\.)?hifi_gan\..*\.kernel")


def original_table(config: CodeHifiGanConfig) -> Table:
    """The correspondence with the authors' `CodeGenerator`, whose kernels are weight-normalised."""
    prefix = "code_generator."
    generator = generator_rules(config.generator, foreign=prefix, ours="hifi_gan.", upsampler="ups")
    return Table(
        (
            Rule(f"{prefix}dict.weight", "unit_embedding.embedding"),
            Rule(f"{prefix}spkr.weight", "speaker_embedding.embedding"),
            Rule(f"{prefix}lang.weight", "language_embedding.embedding"),
            *variance_predictor_rules(f"{prefix}dur_predictor.", "dur_predictor.", inside=".0"),
            *generator,
        ),
        renames=((r"^(?:generator\.|model\.)?(?:code_generator\.)?", prefix), *WEIGHT_NORM_RENAMES),
    )


# Tensors that only a vocoder of units with languages has.
MARKS = ("dict.weight", "lang.weight", "spkr.weight", "dur_predictor.proj.weight", "ups.0.weight_g")


def is_original(tensors: Tensors) -> bool:
    """Are these the tensors of the authors' vocoder?"""
    names = tensors.names()
    return all(any(name.endswith(mark) for name in names) for mark in MARKS)


def config_from_original(tensors: Tensors) -> CodeHifiGanConfig:
    """Our configuration from the tables' shapes; strides and dilations are those of the released vocoders."""
    shapes = {mark: tensors.shape(next(n for n in tensors.names() if n.endswith(mark))) for mark in MARKS[:3]}
    pre = next(n for n in tensors.names() if n.endswith("conv_pre.weight_v"))
    units, languages, speakers = (shapes[mark] for mark in MARKS[:3])
    return CodeHifiGanConfig(
        unit_hifi_gan_vocab_size=units[0],
        unit_embed_dim=units[1],
        vocoder_num_langs=languages[0],
        lang_embed_dim=languages[1],
        vocoder_num_spkrs=speakers[0],
        spkr_embed_dim=speakers[1],
        upsample_initial_channel=tensors.shape(pre)[0],
        weight_norm=True,
    )


VOCODER_KEPT = tuple(name for name in CodeHifiGanConfig.__dataclass_fields__ if name != "weight_norm")
