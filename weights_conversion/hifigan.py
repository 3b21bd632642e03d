"""HiFi-GAN's foreign forms: the authors' files, and the generators inside Hugging Face's and VITS' checkpoints.

The authors' `generator_v1` and `g_02500000` are pickles `{"generator": tensors}`; `do_02500000` holds `{"mpd": tensors,
"msd": tensors, …}` with the optimisers' states. Beside them lies the `config.json` of the training.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.hifigan import HifiGanConfig
from audiozoo.processors.hifigan import HifiGanProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion.readers import open_tensors
from weights_conversion.rules import (
    Arrays,
    Ignore,
    Operation,
    Rule,
    Table,
    conv1d,
    conv_transpose1d,
    identity,
    squeeze,
)

MODEL_TYPE = "speecht5_hifigan"

# The two spellings of a weight-normalised tensor that older files use, in today's.
WEIGHT_NORM_RENAMES = (
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)
# The last axis of a two-dimensional kernel that reaches over time only.
column_conv1d = squeeze(3) >> conv1d


def _taken_apart() -> Operation:
    """A folded kernel as magnitude and direction (ours): the direction is the kernel itself."""

    def forward(arrays: Arrays) -> Arrays:
        (kernel,) = arrays
        return np.sqrt(np.sum(np.square(kernel), axis=(1, 2), keepdims=True)), kernel

    def inverse(arrays: Arrays) -> Arrays:
        g, v = arrays
        norm = np.sqrt(np.sum(np.square(v), axis=(1, 2), keepdims=True))
        # Untouched since it was taken apart, it is the kernel, to the bit.
        same = g == norm
        return (np.where(same, v, v * (g / np.where(same, np.ones_like(norm), norm))),)

    return Operation("magnitude and direction", forward, inverse)


taken_apart = _taken_apart()


def folding(table: Table, layers: str) -> Table:
    """A table of whole kernels for a model that keeps some in magnitude and direction: these are folded on the way out.

    Args:
        table: of the model with whole kernels.
        layers: a regular expression of the paths of these kernels.
    """
    rules = []
    for rule in table.rules:
        ours = rule.ours if isinstance(rule.ours, str) else rule.ours[0]
        if re.fullmatch(layers, ours):
            rule = Rule(rule.foreign, (ours + "_g", ours + "_v"), taken_apart >> rule.operation, rule.numbers)
        rules.append(rule)
    return dataclasses.replace(table, rules=rules)


def kernel_rules(foreign: str, ours: str, operation: Operation, *, weight_norm: bool) -> tuple[Rule, ...]:
    """The rules of one convolution's kernel: whole, or magnitude and direction."""
    if not weight_norm:
        return (Rule(f"{foreign}.weight", f"{ours}.kernel", operation),)
    return (
        Rule(f"{foreign}.parametrizations.weight.original0", f"{ours}.kernel_g", operation),
        Rule(f"{foreign}.parametrizations.weight.original1", f"{ours}.kernel_v", operation),
    )


def generator_rules(config: HifiGanConfig, *, foreign: str = "", ours: str = "", upsampler: str = "upsampler") -> tuple:
    """The rules of a generator whose names begin with `foreign` there and `ours` here.

    Args:
        config: of the generator.
        foreign: prefix of the foreign names.
        ours: prefix of our paths.
        upsampler: what the transposed convolutions are called there: "upsampler", or "ups" in the authors' files.
    """
    part, ends = config.weight_norm, config.weight_norm and config.weight_norm_ends
    convs = "{convs:convs1|convs2}" if config.resblock == "1" else "{convs:convs}"
    block, up = f"resblocks.{{i}}.{convs}.{{j}}", f"{foreign}{upsampler}.{{i}}"
    rules = [
        *kernel_rules(f"{foreign}{{end:conv_pre|conv_post}}", f"{ours}{{end}}", conv1d, weight_norm=ends),
        *kernel_rules(up, f"{ours}upsampler.{{i}}", conv_transpose1d, weight_norm=part),
        *kernel_rules(f"{foreign}{block}", f"{ours}resblocks.{{i}}.{{convs}}.{{j}}", conv1d, weight_norm=part),
        Rule(f"{foreign}{block}.bias", f"{ours}resblocks.{{i}}.{{convs}}.{{j}}.bias"),
        Rule(f"{up}.bias", f"{ours}upsampler.{{i}}.bias"),
        Rule(f"{foreign}conv_pre.bias", f"{ours}conv_pre.bias"),
    ]
    if config.use_post_bias:
        rules.append(Rule(f"{foreign}conv_post.bias", f"{ours}conv_post.bias"))
    if config.condition_dim:
        rules += [
            Rule(f"{foreign}cond.weight", f"{ours}cond.kernel", conv1d),
            Rule(f"{foreign}cond.bias", f"{ours}cond.bias"),
        ]
    if config.normalize_before:
        rules += [Rule(f"{foreign}{{statistic:mean|scale}}", f"{ours}{{statistic}}", identity)]
    return tuple(rules)


def hugging_face_table(config: HifiGanConfig, model_class: str = "HifiGanGenerator") -> Table:
    """The correspondence with `SpeechT5HifiGan` and the other generators of `transformers`."""
    return Table(generator_rules(config), renames=WEIGHT_NORM_RENAMES)


def original_table(config: HifiGanConfig) -> Table:
    """The correspondence with the authors' `Generator`."""
    return Table(
        tuple(rule.prefixed("generator.", "") for rule in generator_rules(config, upsampler="ups")),
        renames=((r"^(?!generator\.)", "generator."), *WEIGHT_NORM_RENAMES),
    )


def period_rules(foreign: str = "discriminators.{i}.", ours: str = "discriminators.{i}.") -> tuple[Rule, ...]:
    """The rules of a period discriminator, whose foreign kernels are two-dimensional."""
    layer = "{layer:convs.0|convs.1|convs.2|convs.3|convs.4|conv_post}"
    return (
        *kernel_rules(f"{foreign}{layer}", f"{ours}{{layer}}", column_conv1d, weight_norm=True),
        Rule(f"{foreign}{layer}.bias", f"{ours}{{layer}}.bias"),
    )


MULTI_PERIOD_TABLE = Table(period_rules(), renames=WEIGHT_NORM_RENAMES)


def scale_rules(index: str, *, spectral_norm: bool = False) -> tuple[Rule, ...]:
    """The rules of the scale discriminator of that index, in both numberings."""
    foreign, ours = f"discriminators.{index}.", f"discriminators.{index}."
    rules: list[Rule] = []
    for layer in ("convs.{j}", "conv_post"):
        rules.append(Rule(f"{foreign}{layer}.bias", f"{ours}{layer}.bias"))
        if spectral_norm:
            rules += [
                Rule(f"{foreign}{layer}.weight_orig", f"{ours}{layer}.kernel", conv1d),
                Rule(f"{foreign}{layer}.weight_u", f"{ours}{layer}.u"),
                Rule(f"{foreign}{layer}.weight_v", f"{ours}{layer}.v"),
            ]
        else:
            rules += kernel_rules(f"{foreign}{layer}", f"{ours}{layer}", conv1d, weight_norm=True)
    return tuple(rules)


MULTI_SCALE_TABLE = Table(
    (*scale_rules("0", spectral_norm=True), *scale_rules("{i:1|2}")),
    # weight_v is the direction of a weight-normalised kernel, but in the first scale a singular vector.
    renames=tuple((rf"^(discriminators\.[1-9].*){pattern}", r"\1" + new) for pattern, new in WEIGHT_NORM_RENAMES),
)

DISCRIMINATOR_TABLE = Table(
    (
        *(rule.prefixed("mpd.", "mpd.") for rule in MULTI_PERIOD_TABLE.rules),
        *(rule.prefixed("msd.", "msd.") for rule in MULTI_SCALE_TABLE.rules),
    ),
    renames=tuple(
        (rf"^(mpd|msd\.discriminators\.[1-9])\b(.*){pattern}", r"\1\2" + new) for pattern, new in WEIGHT_NORM_RENAMES
    ),
    ignored=(Ignore(r"optim_[gd]\..*", "states of the optimisers"),),
)

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(HifiGanConfig)}
# What a `SpeechT5HifiGan`'s configuration says of them.
_KEPT = (
    "model_in_dim",
    "sampling_rate",
    "upsample_initial_channel",
    "upsample_rates",
    "upsample_kernel_sizes",
    "resblock_kernel_sizes",
    "resblock_dilation_sizes",
    "leaky_relu_slope",
    "normalize_before",
)


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> HifiGanConfig:
    """Our configuration from that of a `SpeechT5HifiGan`, whose checkpoints hold folded kernels."""
    folded = {"weight_norm": False, "normalize_before": True}
    return HifiGanConfig(**(folded | take(config, _DEFAULTS, where)))


def config_from_original(config: Mapping[str, Any], where: str = "config.json") -> HifiGanConfig:
    """Our configuration from the authors' `config.json`."""
    named = dict(config) | {"model_in_dim": config.get("num_mels", 80), "resblock": str(config.get("resblock", "1"))}
    return HifiGanConfig(**take(named, _DEFAULTS, where))


def recognise(path: Path) -> bool:
    """Is this one of the authors' generators, or the discriminators of one, which `open_checkpoint` refuses?"""
    if not path.is_file() or path.suffix not in {"", ".pt", ".pth", ".bin"}:
        return False
    try:
        names = open_tensors(path).names()
    except (CheckpointError, SourceError):
        return _holds_discriminators(path)
    others = ("enc_p", "dict.weight")  # what only a VITS and a vocoder of units have
    foreign = any(part in name for name in names for part in others)
    return any(name.endswith("ups.0.weight_g") for name in names) and not foreign


def _holds_discriminators(path: Path) -> bool:
    """Is this a `do_02500000`?"""
    try:
        names = open_tensors(path, root="").names()
    except (CheckpointError, SourceError):
        return False
    return any(name.startswith("mpd.discriminators.") for name in names)


def processor_of_file(path: Path) -> HifiGanProcessor:
    """The spectrograms of one of the authors' generators, from the configuration that lies beside it."""
    return HifiGanProcessor.from_directory(path if path.is_dir() else path.parent)


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open one of the authors' generators, or a directory of a Hugging Face one.

    Raises:
        SourceError: if the configuration that lies beside the weights is missing, or the file holds discriminators.
        CheckpointError: if the file is damaged or another class is asked for.
    """
    try:
        tensors = open_tensors(path)
    except CheckpointError:
        if path.is_file() and _holds_discriminators(path):
            raise SourceError(
                f"{path} holds the discriminators of a training, which make no sound; give the generator beside it, "
                f"{path.name.replace('do_', 'g_', 1)}."
            ) from None
        raise
    known = "SpeechT5HifiGan" if path.is_dir() else "HifiGanGenerator"
    if model_class not in (None, known):
        raise CheckpointError(f"{path} holds a HiFi-GAN generator; it loads as {known}, not as {model_class}.")
    directory = path if path.is_dir() else path.parent
    raw, where = read_json(directory / "config.json"), str(directory / "config.json")
    if path.is_dir():
        config = config_from_hugging_face(raw, where)
        return ForeignCheckpoint(known, config, tensors, hugging_face_table(config), path)
    config = config_from_original(raw, where)
    return ForeignCheckpoint(known, config, tensors, original_table(config), path)


def discriminators_beside(path: Path) -> Path | None:
    """The file of the discriminators that were trained with a generator, `do_02500000` with `g_02500000`, if any."""
    file = path.with_name(path.name.replace("g_", "do_", 1))
    return file if path.name.startswith("g_") and file.is_file() else None


def read_discriminators(path: Path, expected: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of a `HifiGanDiscriminator` by their paths, from the authors' file.

    Raises:
        CheckpointError: if they are not those that are `expected`, which have a `.shape` each.
    """
    tensors = open_tensors(path, root="")
    steps = DISCRIMINATOR_TABLE.plan(tensors, expected, where=str(path), model="HifiGanDiscriminator")
    return dict(DISCRIMINATOR_TABLE.read(tensors, steps))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A generator as the directory of a `SpeechT5HifiGan`: folded kernels, a standardised input."""
    config: HifiGanConfig = model.config
    if config.weight_norm or not config.normalize_before or config.resblock != "1" or not config.use_post_bias:
        raise CheckpointError(
            "transformers has no HiFi-GAN but SpeechT5's: folded kernels, residual blocks '1', a standardised input."
        )
    described: dict[str, Any] = {name: getattr(config, name) for name in _KEPT}
    described |= {"architectures": ["SpeechT5HifiGan"], "model_type": "speecht5_hifigan", "dtype": "float32"}
    return HuggingFaceForm({"config.json": described}, hugging_face_table(config))


__all__ = [
    "DISCRIMINATOR_TABLE",
    "MULTI_PERIOD_TABLE",
    "MULTI_SCALE_TABLE",
    "WEIGHT_NORM_RENAMES",
    "column_conv1d",
    "config_from_hugging_face",
    "config_from_original",
    "discriminators_beside",
    "generator_rules",
    "hugging_face",
    "hugging_face_table",
    "kernel_rules",
    "open_checkpoint",
    "original_table",
    "period_rules",
    "processor_of_file",
    "read_discriminators",
    "recognise",
    "scale_rules",
]
