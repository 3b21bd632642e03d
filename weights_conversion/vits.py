"""VITS' foreign forms: Hugging Face directories, the authors' and MMS' `.pth`, Piper's `.ckpt` and `.onnx`.

The authors' names run through three of them: `enc_p` (text encoder), `enc_q` (posterior encoder), `flow`, `dp`
(duration predictor), `dec` (decoder), `emb_g` (voices). A `.pth` has them below `model`, with the sizes in a
`config.json` beside it. A Piper `.ckpt` has them below `state_dict`, after `model_g.`, with the sizes among the
hyper-parameters. A Piper `.onnx` is an exported graph: most tensors kept their names; the rest are found by the node
that reads them, never by number; what only training needs is not there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.vits import VitsConfig
from audiozoo.processors.vits import VitsProcessor
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, read_json, take
from weights_conversion.hifigan import WEIGHT_NORM_RENAMES, folding, generator_rules, kernel_rules, taken_apart
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import (
    Ignore,
    Rule,
    Table,
    Tensors,
    conv1d,
    permute,
    squeeze,
    transpose,
)

MODEL_TYPE = "vits"

# A 1×1 convolution that is a linear map: (out, in, 1) -> (in, out).
pointwise = squeeze(2) >> permute(1, 0)
column = squeeze(1)


def _wavenet(foreign: str, ours: str, config: VitsConfig, *, folded: bool = False) -> list[Rule]:
    layers = ["{part:in_layers|res_skip_layers}.{j}"] + (["{part:cond_layer}"] if config.speaker_embedding_size else [])
    rules = []
    for layer in layers:
        mine = f"{ours}.{layer}"
        if folded:
            pair = (f"{mine}.kernel_g", f"{mine}.kernel_v")
            rules.append(Rule(f"{foreign}.{layer}.weight", pair, taken_apart >> conv1d))
        else:
            rules += kernel_rules(f"{foreign}.{layer}", mine, conv1d, weight_norm=True)
        rules.append(Rule(f"{foreign}.{layer}.bias", f"{mine}.bias"))
    return rules


def _conv(foreign: str, ours: str) -> list[Rule]:
    return [Rule(f"{foreign}.weight", f"{ours}.kernel", conv1d), Rule(f"{foreign}.bias", f"{ours}.bias")]


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face_table(config: VitsConfig, model_class: str = "VitsModel") -> Table:
    """The correspondence with what `save_pretrained` writes."""
    layer = "text_encoder.encoder.layers.{i}"
    norm = layer + ".{norm:layer_norm|final_layer_norm}"
    projection = layer + ".attention.{p:q_proj|k_proj|v_proj|out_proj}"
    rules = [
        Rule("text_encoder.embed_tokens.weight", "text_encoder.embed_tokens.embedding"),
        Rule(projection + ".weight", projection + ".kernel", transpose),
        Rule(layer + ".attention.{e:emb_rel_k|emb_rel_v}", layer + ".attention.{e}"),
        Rule(norm + ".weight", norm + ".scale"),
        Rule(norm + ".bias", norm + ".bias"),
        *_conv(layer + ".feed_forward.{c:conv_1|conv_2}", layer + ".feed_forward.{c}"),
        *_conv("text_encoder.project", "text_encoder.project"),
        *_conv("flow.flows.{i}.{c:conv_pre|conv_post}", "flow.flows.{i}.{c}"),
        *_wavenet("flow.flows.{i}.wavenet", "flow.flows.{i}.wavenet", config),
        *generator_rules(config.decoder, foreign="decoder.", ours="decoder."),
    ]
    if config.use_bias:
        rules.append(Rule(projection + ".bias", projection + ".bias"))
    if config.has_posterior:
        rules += _conv("posterior_encoder.{c:conv_pre|conv_proj}", "posterior_encoder.{c}")
        rules += _wavenet("posterior_encoder.wavenet", "posterior_encoder.wavenet", config)
    if config.num_speakers > 1:
        rules.append(Rule("embed_speaker.weight", "embed_speaker.embedding"))
    dp = "duration_predictor."
    if config.use_stochastic_duration_prediction:
        for where in ("{post:post_|}", "{flows:flows|post_flows}.{i}."):
            rules += _separable(dp + where + "conv_dds")
            rules += _conv(dp + where + "{c:conv_pre|conv_proj}", dp + where + "{c}")
        rules.append(Rule(*(2 * (dp + "{flows:flows|post_flows}.0.{a:translate|log_scale}",)), column))
    else:
        rules += _conv(dp + "{c:conv_1|conv_2|proj}", dp + "{c}")
        rules.append(Rule(dp + "{n:norm_1|norm_2}.weight", dp + "{n}.scale"))
        rules.append(Rule(dp + "{n:norm_1|norm_2}.bias", dp + "{n}.bias"))
    if config.speaker_embedding_size:
        rules += _conv(dp + "cond", dp + "cond")
    return Table(rules, renames=WEIGHT_NORM_RENAMES)


def _separable(where: str) -> list[Rule]:
    norm = where + ".{n:norms_1|norms_2}.{j}"
    return [
        *_conv(where + ".{d:convs_dilated|convs_pointwise}.{j}", where + ".{d}.{j}"),
        Rule(norm + ".weight", norm + ".scale"),
        Rule(norm + ".bias", norm + ".bias"),
    ]


_OURS_ALONE = {"resblock", "decoder_weight_norm", "has_posterior"}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(VitsConfig) if f.name not in _OURS_ALONE}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> VitsConfig:
    """Our configuration from a `config.json`."""
    return VitsConfig(**take(config, _DEFAULTS, where))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A VITS model as the directory that `save_pretrained` would write.

    Raises:
        CheckpointError: for a model that `transformers` cannot hold.
    """
    config: VitsConfig = model.config
    if config.resblock != "1":
        raise CheckpointError(
            "transformers' VitsModel has HiFi-GAN's residual blocks '1' only; this voice (Piper low or medium) has '2'."
        )
    if not config.has_posterior:
        raise CheckpointError(
            "transformers' VitsModel wants a posterior encoder, which a file made for synthesis alone does not hold."
        )
    described = {k: v for k, v in dataclasses.asdict(config).items() if k not in _OURS_ALONE}
    described |= {"architectures": ["VitsModel"], "model_type": MODEL_TYPE, "dtype": "float32"}
    return HuggingFaceForm({"config.json": described}, _folding_table(config))


def _folding_table(config: VitsConfig) -> Table:
    """Hugging Face's table; a decoder that is kept in magnitude and direction is folded on its way out."""
    if not config.decoder_weight_norm:
        return hugging_face_table(config)
    plain = hugging_face_table(dataclasses.replace(config, decoder_weight_norm=False))
    return folding(plain, r"decoder\.(upsampler|resblocks)\..*\.kernel")


# --- the authors' names ----------------------------------------------------------------------------------------------


def original_table(config: VitsConfig, *, prefix: str = "", folded: bool = False) -> Table:
    """The correspondence with the authors' `SynthesizerTrn`, after `prefix`.

    Args:
        config: of the model.
        prefix: what stands before the names: "" in a `.pth`, "model_g." in a Piper `.ckpt`.
        folded: whether weight normalisation is folded into the kernels, as in an `.onnx`.
    """
    attention, layer = "enc_p.encoder.attn_layers.{i}.", "text_encoder.encoder.layers.{i}."
    rules = [
        Rule("enc_p.emb.weight", "text_encoder.embed_tokens.embedding"),
        *_conv("enc_p.proj", "text_encoder.project"),
        Rule(attention + "{e:emb_rel_k|emb_rel_v}", layer + "attention.{e}"),
        *_conv("enc_p.encoder.ffn_layers.{i}.{c:conv_1|conv_2}", layer + "feed_forward.{c}"),
    ]
    for theirs, mine in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "out_proj")):
        rules.append(Rule(f"{attention}conv_{theirs}.weight", f"{layer}attention.{mine}.kernel", pointwise))
        rules.append(Rule(f"{attention}conv_{theirs}.bias", f"{layer}attention.{mine}.bias"))
    for theirs, mine in (("norm_layers_1", "layer_norm"), ("norm_layers_2", "final_layer_norm")):
        rules.append(Rule(f"enc_p.encoder.{theirs}.{{i}}.gamma", f"{layer}{mine}.scale"))
        rules.append(Rule(f"enc_p.encoder.{theirs}.{{i}}.beta", f"{layer}{mine}.bias"))
    # Every second of the authors' flows is a permutation, which holds nothing.
    even: dict[str, tuple[int, int]] = {"i": (2, 0)}
    coupling = []
    for theirs, mine in (("pre", "conv_pre"), ("post", "conv_post")):
        coupling += _conv(f"flow.flows.{{i}}.{theirs}", f"flow.flows.{{i}}.{mine}")
    coupling += _wavenet("flow.flows.{i}.enc", "flow.flows.{i}.wavenet", config, folded=folded)
    rules += [dataclasses.replace(rule, numbers=even) for rule in coupling]
    rules += generator_rules(config.decoder, foreign="dec.", ours="decoder.", upsampler="ups")
    if config.has_posterior:
        for theirs, mine in (("pre", "conv_pre"), ("proj", "conv_proj")):
            rules += _conv(f"enc_q.{theirs}", f"posterior_encoder.{mine}")
        rules += _wavenet("enc_q.enc", "posterior_encoder.wavenet", config, folded=folded)
    if config.num_speakers > 1:
        rules.append(Rule("emb_g.weight", "embed_speaker.embedding"))
    rules += _original_duration_predictor(config)
    if config.speaker_embedding_size:
        rules += _conv("dp.cond", "duration_predictor.cond")
    ignored = [Ignore(r"model_(d|mrd)\..*", "discriminators are not part of the model")]
    return Table([rule.prefixed(prefix, "") for rule in rules], renames=WEIGHT_NORM_RENAMES, ignored=ignored)


def _original_duration_predictor(config: VitsConfig) -> list[Rule]:
    ours = "duration_predictor."
    if not config.use_stochastic_duration_prediction:
        rules = _conv("dp.{c:conv_1|conv_2|proj}", ours + "{c}")
        rules.append(Rule("dp.{n:norm_1|norm_2}.gamma", ours + "{n}.scale"))
        rules.append(Rule("dp.{n:norm_1|norm_2}.beta", ours + "{n}.bias"))
        return rules
    rules = []
    # (their prefix, ours, how their number of a flow follows from ours): 0, then 1, 3, 5, 7 with permutations between.
    places: list[tuple[str, str, str, dict[str, tuple[int, int]]]] = [("dp.", ours, "convs", {})]
    if config.has_posterior:
        places.append(("dp.post_", ours + "post_", "convs", {}))
    flows = "{flows:flows|post_flows}" if config.has_posterior else "{flows:flows}"
    places.append((f"dp.{flows}.{{i}}.", f"{ours}{flows}.{{i}}.", "convs", {"i": (2, -1)}))
    for theirs, mine, dds, numbers in places:
        found = []
        for a, b in (("pre", "conv_pre"), ("proj", "conv_proj")):
            found += _conv(theirs + a, mine + b)
        for a, b in (("convs_sep", "convs_dilated"), ("convs_1x1", "convs_pointwise")):
            found += _conv(f"{theirs}{dds}.{a}.{{j}}", f"{mine}conv_dds.{b}.{{j}}")
        norm = "{n:norms_1|norms_2}.{j}"
        found.append(Rule(f"{theirs}{dds}.{norm}.gamma", f"{mine}conv_dds.{norm}.scale"))
        found.append(Rule(f"{theirs}{dds}.{norm}.beta", f"{mine}conv_dds.{norm}.bias"))
        rules += [dataclasses.replace(rule, numbers=numbers) for rule in found]
    rules.append(Rule(f"dp.{flows}.0.m", f"{ours}{flows}.0.translate", column))
    rules.append(Rule(f"dp.{flows}.0.logs", f"{ours}{flows}.0.log_scale", column))
    return rules


def config_from_tensors(tensors: Tensors, prefix: str = "", *, folded: bool = False, **known: Any) -> VitsConfig:
    """What the tensors' names and shapes say about the sizes, and what is `known` otherwise (rates, heads, dilations).

    Raises:
        CheckpointError: if they are not VITS'.
    """
    names = [name.removeprefix(prefix) for name in tensors.names() if name.startswith(prefix)]
    present = set(names)

    def count(pattern: str) -> int:
        found = [int(m[1]) for name in names if (m := re.match(pattern, name))]
        return 1 + max(found) if found else 0

    def shape(name: str) -> tuple[int, ...]:
        for candidate in (name, name + "_v", re.sub(r"weight$", "parametrizations.weight.original1", name)):
            if candidate in present:
                return tensors.shape(prefix + candidate)
        raise KeyError(name)

    try:
        vocabulary, hidden = shape("enc_p.emb.weight")
        upsamplings = count(r"dec\.ups\.(\d+)\.")
        kernels = count(r"dec\.resblocks\.(\d+)\.") // upsamplings
        first = "convs1" if any(".convs1." in name for name in names) else "convs"
        flow_size = shape("enc_p.proj.weight")[0] // 2
        stochastic = "dp.flows.0.m" in present
        has_posterior = any(name.startswith("enc_q.") for name in names)
        ffn_dim, _, ffn_taps = shape("enc_p.encoder.ffn_layers.0.conv_1.weight")
        sizes: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": count(r"enc_p\.encoder\.attn_layers\.(\d+)\."),
            "window_size": shape("enc_p.encoder.attn_layers.0.emb_rel_k")[1] // 2,
            "ffn_dim": ffn_dim,
            "ffn_kernel_size": ffn_taps,
            "flow_size": flow_size,
            "use_stochastic_duration_prediction": stochastic,
            "prior_encoder_num_flows": (count(r"flow\.flows\.(\d+)\.") + 1) // 2,
            "prior_encoder_num_wavenet_layers": count(r"flow\.flows\.0\.enc\.in_layers\.(\d+)\."),
            "upsample_initial_channel": shape("dec.conv_pre.weight")[0],
            "upsample_kernel_sizes": tuple(shape(f"dec.ups.{i}.weight")[2] for i in range(upsamplings)),
            "resblock": "1" if first == "convs1" else "2",
            "resblock_kernel_sizes": tuple(shape(f"dec.resblocks.{i}.{first}.0.weight")[2] for i in range(kernels)),
            "wavenet_kernel_size": shape("flow.flows.0.enc.in_layers.0.weight")[2],
            "decoder_weight_norm": not folded,
            "has_posterior": has_posterior,
        }
        if has_posterior:
            sizes["spectrogram_bins"] = shape("enc_q.pre.weight")[1]
            sizes["posterior_encoder_num_wavenet_layers"] = count(r"enc_q\.enc\.in_layers\.(\d+)\.")
        if "emb_g.weight" in present:
            sizes["num_speakers"], sizes["speaker_embedding_size"] = shape("emb_g.weight")
        elif "dec.cond.weight" in present:  # one voice trained with several voices' settings: of no use, but there
            sizes["speaker_embedding_size"] = shape("dec.cond.weight")[1]
        if stochastic:
            sizes["duration_predictor_kernel_size"] = shape("dp.convs.convs_sep.0.weight")[2]
            sizes["duration_predictor_num_flows"] = count(r"dp\.flows\.(\d+)\.") // 2
            sizes["depth_separable_num_layers"] = count(r"dp\.convs\.convs_sep\.(\d+)\.")
            splines = max(i for i in range(1, 2 * sizes["duration_predictor_num_flows"], 2))
            sizes["duration_predictor_flow_bins"] = (shape(f"dp.flows.{splines}.proj.weight")[0] + 1) // 3
        else:
            sizes["duration_predictor_filter_channels"], _, taps = shape("dp.conv_1.weight")
            sizes["duration_predictor_kernel_size"] = taps
    except (KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"the tensors are not those of a VITS model: {error} is missing.") from None
    sizes |= known
    sizes.setdefault("upsample_rates", tuple(size // 2 for size in sizes["upsample_kernel_sizes"]))
    default = ((1, 3, 5),) * kernels if first == "convs1" else ((1, 2), (2, 6), (3, 12))
    sizes.setdefault("resblock_dilation_sizes", default)
    return VitsConfig(**sizes)


def _known_from_original(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' `config.json` says that the tensors do not."""
    model, data = config.get("model", {}), config.get("data", {})
    known: dict[str, Any] = {}
    if "n_heads" in model:
        known["num_attention_heads"] = int(model["n_heads"])
    if "upsample_rates" in model:
        known["upsample_rates"] = tuple(model["upsample_rates"])
    if "resblock_dilation_sizes" in model:
        known["resblock_dilation_sizes"] = tuple(tuple(d) for d in model["resblock_dilation_sizes"])
    if "sampling_rate" in data:
        known["sampling_rate"] = int(data["sampling_rate"])
    return known


# --- Piper -----------------------------------------------------------------------------------------------------------


def _beside(path: Path) -> Path | None:
    """The settings of a voice of Piper's: `voice.onnx.json`, `voice.json`, or the `config.json` of its training."""
    places = (Path(f"{path}.json"), path.with_suffix(".json"), path.parent / "config.json")
    return next((place for place in places if place.is_file()), None)


def processor_of_file(path: Path) -> VitsProcessor:
    """The processor of a voice of the authors', MMS' or Piper's, from what lies beside it.

    Raises:
        SourceError: if nothing there says how it reads.
        CheckpointError: for phonemes that are not made here.
    """
    if path.is_dir():
        return VitsProcessor.from_directory(path)
    side = _beside(path)  # of this voice, where a directory holds several
    if side is not None and "phoneme_id_map" in read_json(side):
        return VitsProcessor.from_piper(side)
    return VitsProcessor.from_directory(path.parent)


def _known_from_piper(path: Path) -> dict[str, Any]:
    """What the `.onnx.json` beside a voice says: rate and scales."""
    side = _beside(path)
    if side is None:
        return {}
    raw = read_json(side)
    known: dict[str, Any] = {}
    if isinstance(rate := raw.get("audio", {}).get("sample_rate"), int):
        known["sampling_rate"] = rate
    inference = raw.get("inference", {})
    for theirs, mine in (("noise_scale", "noise_scale"), ("noise_w", "noise_scale_duration")):
        if isinstance(inference.get(theirs), int | float):
            known[mine] = float(inference[theirs])
    if isinstance(scale := inference.get("length_scale"), int | float) and scale > 0:
        known["speaking_rate"] = 1.0 / scale
    return known


def _minus_log(x: np.ndarray) -> np.ndarray:
    return -np.log(x)


class PiperGraph:
    """The tensors of an exported Piper voice under the authors' names, recovered through the graph."""

    def __init__(self, tensors: TensorSource):
        self.tensors, self.path = tensors, tensors.path
        nodes = tensors.metadata["graph"]["nodes"]
        self.named: dict[str, str] = {}
        self.computed: dict[str, Callable[[np.ndarray], np.ndarray]] = {}  # what undoes what the export computed
        here = set(tensors.names())
        for name in here:
            if re.match(r"(enc_p|dp|flow|dec|emb_g|enc_q)\.", name):
                self.named[name] = name
        self.strides, self.dilations, self.heads = {}, {}, 2
        for node in nodes:
            place = node["name"].strip("/").replace("/", ".")
            data = [name for name in node["inputs"] if name in here]
            if node["op_type"] in ("Conv", "ConvTranspose"):
                module = place.rpartition(".")[0]
                kernel = node["inputs"][1]
                if kernel in here and not re.match(r"(enc_p|dp|flow|dec|emb_g|enc_q)\.", kernel):
                    # A folded kernel without a name: the bias beside it still has its own.
                    if len(node["inputs"]) > 2 and node["inputs"][2].endswith(".bias"):
                        module = node["inputs"][2].removesuffix(".bias")
                    self.named[f"{module}.weight"] = kernel
                self.strides[module] = (node["attributes"].get("strides") or [1])[0]
                self.dilations[module] = (node["attributes"].get("dilations") or [1])[0]
            elif node["op_type"] == "Gather" and place in ("enc_p.emb.Gather", "emb_g.Gather") and data:
                self.named[f"{place.removesuffix('.Gather')}.weight"] = data[0]
            elif re.fullmatch(r"dp\.flows\.0\.(Exp|Mul)(_\d+)?", place) and data:
                # x · exp(-log s): PyTorch of one version computed the power on export, of another the negative alone.
                self.named["dp.flows.0.logs"] = data[0]
                self.computed["dp.flows.0.logs"] = _minus_log if node["op_type"] == "Mul" else np.negative
        # Heads: the query's channels over the width of the relative keys.
        if "enc_p.encoder.attn_layers.0.emb_rel_k" in self.named:
            width = self.shape("enc_p.encoder.attn_layers.0.emb_rel_k")[2]
            self.heads = self.shape("enc_p.encoder.attn_layers.0.conv_q.weight")[0] // width

    def names(self) -> list[str]:
        """The recovered names."""
        return list(self.named)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self.tensors.shape(self.named[name])

    def dtype(self, name: str) -> np.dtype:
        """The dtype of one tensor."""
        return self.tensors.dtype(self.named[name])

    def read(self, name: str) -> np.ndarray:
        """One tensor's values."""
        array = self.tensors.read(self.named[name])
        return self.computed[name](array) if name in self.computed else array

    def known(self) -> dict[str, Any]:
        """What the graph's attributes say about the sizes: strides, dilations, heads."""
        stages = sorted(int(m[1]) for name in self.strides if (m := re.fullmatch(r"dec\.ups\.(\d+)", name)))
        rates = tuple(int(self.strides[f"dec.ups.{i}"]) for i in stages)
        blocks: dict[int, dict[int, int]] = {}
        for name, dilation in self.dilations.items():
            if match := re.fullmatch(r"dec\.resblocks\.(\d+)\.convs1?\.(\d+)", name):
                blocks.setdefault(int(match[1]), {})[int(match[2])] = int(dilation)
        kernels = len(blocks) // max(len(rates), 1)
        dilations = tuple(tuple(blocks[i][j] for j in sorted(blocks[i])) for i in range(kernels))
        return {"upsample_rates": rates, "resblock_dilation_sizes": dilations, "num_attention_heads": self.heads}


# --- the ways in -----------------------------------------------------------------------------------------------------


def recognise(path: Path) -> bool:
    """Is this a VITS `.pth`, or a Piper `.ckpt` or `.onnx`?"""
    if path.is_dir():
        return _weights_in(path) is not None
    if path.suffix not in {".pth", ".pt", ".ckpt", ".onnx"}:
        return False
    try:
        names = open_tensors(path).names()
    except (CheckpointError, SourceError):
        return False
    return any(re.match(r"(model\.|model_g\.)?enc_p\.proj\.weight$", name) for name in names)


def _weights_in(directory: Path) -> Path | None:
    """The one file of the authors' or Piper's in a directory; of several `G_*.pth` the last."""
    for pattern in ("*.onnx", "G_*.pth", "pretrained_*.pth", "*.ckpt"):
        found = sorted(directory.glob(pattern), key=lambda p: (len(p.name), p.name))
        if found:
            return found[-1]
    return None


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a VITS checkpoint of any of the forms.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if model_class not in (None, "VitsModel"):
        raise CheckpointError(f"{path} holds a VITS model; it loads as VitsModel, not as {model_class}.")
    if path.is_dir():
        if (weights := _weights_in(path)) is not None and not any(path.glob("*.safetensors")):
            return open_checkpoint(weights, model_class)
        config = config_from_hugging_face(read_json(path / "config.json"), str(path / "config.json"))
        return ForeignCheckpoint("VitsModel", config, open_tensors(path), hugging_face_table(config), path)
    tensors = open_tensors(path)
    if tensors.format == "onnx":
        graph = PiperGraph(tensors)
        known = {"sampling_rate": 22_050} | graph.known() | _known_from_piper(path)
        config = config_from_tensors(graph, folded=True, **known)
        folded = not any(name.endswith(".weight_g") for name in graph.names())  # as the export's constants were
        return ForeignCheckpoint("VitsModel", config, graph, original_table(config, folded=folded), path)
    prefix = next((p for p in ("model_g.", "model.", "") if f"{p}enc_p.emb.weight" in tensors), None)
    if prefix is None:
        raise CheckpointError(f"{path} holds no VITS model: there is no enc_p.emb.weight in it.")
    known = {"sampling_rate": 22_050}
    if prefix == "model_g.":
        known |= _known_from_hyper_parameters(tensors.metadata.get("hyper_parameters")) | _known_from_piper(path)
    elif (path.parent / "config.json").is_file():
        known |= _known_from_original(read_json(path.parent / "config.json"))
    config = config_from_tensors(tensors, prefix, **known)
    return ForeignCheckpoint("VitsModel", config, tensors, original_table(config, prefix=prefix), path)


def _known_from_hyper_parameters(values: Any) -> dict[str, Any]:
    """What a Piper `.ckpt` says of itself that the tensors do not."""
    if not isinstance(values, Mapping):
        return {}
    known: dict[str, Any] = {}
    if isinstance(values.get("sample_rate"), int):
        known["sampling_rate"] = values["sample_rate"]
    if isinstance(values.get("n_heads"), int):
        known["num_attention_heads"] = values["n_heads"]
    for name in ("upsample_rates", "resblock_dilation_sizes"):
        value = values.get(name)
        if isinstance(value, list | tuple):
            known[name] = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    return known
