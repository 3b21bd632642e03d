"""HuBERT's foreign forms: Hugging Face directories, fairseq's `.pt` files, and scikit-learn's clusters of units."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from audiozoo.errors import CheckpointError, SourceError
from audiozoo.models.hubert import HubertConfig
from weights_conversion import ForeignCheckpoint, HuggingFaceForm, alphabets, labels_from_hugging_face, take
from weights_conversion import ecapa_tdnn_names as ecapa
from weights_conversion.alphabets import symbols_of
from weights_conversion.readers import TensorSource, open_tensors
from weights_conversion.rules import Ignore, Rule, Table
from weights_conversion.wav2vec2 import (
    BACKBONE,
    config_to_hugging_face,
    convolution,
    fairseq_settings,
    fairseq_table,
    family_table,
    linear,
    network_sizes,
    norm,
    open_hugging_face,
    settings_fields,
)

MODEL_TYPE = "hubert"
processor_of_file = alphabets.processor_of_file
FAMILY, PREFIX = "Hubert", "hubert"

# --- Hugging Face ----------------------------------------------------------------------------------------------------

_POSITIONS = "encoder.pos_conv_embed."
BATCH_NORM = (
    convolution(f"{_POSITIONS}conv")[0],  # the weight alone; both forms have the bias
    *norm(f"{_POSITIONS}batch_norm"),
    Rule(f"{_POSITIONS}batch_norm.running_mean", f"{_POSITIONS}batch_norm.mean"),
    Rule(f"{_POSITIONS}batch_norm.running_var", f"{_POSITIONS}batch_norm.var"),
    Rule(f"{_POSITIONS}batch_norm.num_batches_tracked", f"{_POSITIONS}num_batches_tracked"),
)
_PREDICTION = (*linear("final_proj"), Rule("label_embeddings", "label_embeddings"))
_LEFT_OVER = Ignore(r"final_proj\..*|label_embeddings", "left over from pre-training")


def hugging_face_table(config: HubertConfig, model_class: str) -> Table:
    """The correspondence with what `save_pretrained` writes for that class."""
    backbone = (*BACKBONE, *BATCH_NORM) if config.conv_pos_batch_norm else BACKBONE
    heads = {"ForPreTraining": _PREDICTION}
    table = family_table(config, model_class, family=FAMILY, prefix=PREFIX, backbone=backbone, heads=heads)
    if model_class == "HubertForPreTraining":
        return table
    return dataclasses.replace(table, ignored=(*table.ignored, _LEFT_OVER))


_CONFIG_DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(HubertConfig) if f.name != "id2label"}


def config_from_hugging_face(config: Mapping[str, Any], where: str = "config.json") -> HubertConfig:
    """Our configuration from a `config.json`."""
    return HubertConfig(**take(config, _CONFIG_DEFAULTS, where), **labels_from_hugging_face(config))


def hugging_face(model: Any) -> HuggingFaceForm:
    """A HuBERT model as the directory that `save_pretrained` would write."""
    name = type(model).__name__
    config = config_to_hugging_face(model.config, name, MODEL_TYPE)
    return HuggingFaceForm({"config.json": config}, hugging_face_table(model.config, name))


# --- fairseq ---------------------------------------------------------------------------------------------------------


def hubert_fairseq_table(config: HubertConfig, model_class: str) -> Table:
    """The correspondence with fairseq's names, of pre-trained and of fine-tuned files."""
    bare = fairseq_table(config, f"{FAMILY}Model", family=FAMILY)
    if model_class == f"{FAMILY}Model":
        other = Ignore(r"final_proj\..*|label_embs_concat|target_glu\..*", "no part of this class")
        return dataclasses.replace(bare, ignored=(*bare.ignored, other))
    rules = [rule.prefixed("", f"{PREFIX}.") for rule in bare.rules]
    if model_class == "HubertForPreTraining":
        rules += [*linear("final_proj"), Rule("label_embs_concat", "label_embeddings")]
        return Table(rules, renames=bare.renames)
    if model_class == "HubertForCTC":
        other = Ignore(r"final_proj\..*|label_embs_concat|target_glu\..*", "left over from pre-training")
        return Table((*rules, *linear("proj", "lm_head")), renames=bare.renames, ignored=(other,))
    raise CheckpointError(
        f"fairseq's files load as HubertModel, HubertForPreTraining or HubertForCTC, not {model_class}."
    )


def config_from_fairseq(tensors: TensorSource) -> HubertConfig:
    """Our configuration from the settings and shapes of a fairseq file."""
    settings = fairseq_settings(tensors.metadata)
    table = hubert_fairseq_table(HubertConfig(), "HubertForPreTraining")
    names = {table.today(name): name for name in tensors.names()}
    fields = network_sizes(tensors, names) | settings_fields(settings, _CONFIG_DEFAULTS)
    fields.setdefault("num_attention_heads", 12 if fields["hidden_size"] == 768 else 16)
    fields.setdefault("do_stable_layer_norm", fields["feat_extract_norm"] == "layer")
    if "label_embs_concat" in names:
        total, width = tensors.shape(names["label_embs_concat"])
        clusters = _clusters(tensors.metadata, total)
        untied = bool(settings.get("untie_final_proj"))
        fields |= {"num_clusters": clusters, "proj_codevector_dim": width, "untie_final_proj": untied}
    if "proj.weight" in names:
        fields["vocab_size"] = tensors.shape(names["proj.weight"])[0]
    return HubertConfig(**fields, frame_rule="samples")


def _clusters(metadata: Mapping[str, Any], total: int) -> tuple[int, ...]:
    """Clusters of every set of labels: from the dictionaries in the file where they add up, else one set."""
    state = metadata.get("task_state")
    dictionaries = state.get("dictionaries") if isinstance(state, Mapping) else None
    counts = [len(symbols_of(dictionary)) for dictionary in dictionaries or []]
    return tuple(counts) if sum(counts) == total else (total,)


def _is_fairseqs(tensors: TensorSource) -> bool:
    names = tensors.names()
    if tensors.format != "pytorch" or not any(n.endswith("feature_extractor.conv_layers.0.0.weight") for n in names):
        return False
    foreign = ("relative_attention_bias", "grep_linear", "spk_proj", "quantizer", "layer_norm_for_extract", "_prenet.")
    if any(word in name for name in names for word in foreign):
        return False
    settings = fairseq_settings(tensors.metadata)
    inner = settings["_inner"]
    said = [str(s.get(k)) for s in (settings, inner) for k in ("_name", "arch") if s.get(k)]
    named = any(name.startswith("hubert") for name in said)
    return named or (any(n.endswith("label_embs_concat") for n in names) and not any("wavlm" in n for n in said))


def recognise(path: Path) -> bool:
    """Is this one of fairseq's `.pt` files of HuBERT?"""
    return path.is_file() and path.suffix in {".pt", ".pth", ".bin"} and _is_fairseqs(open_tensors(path))


def open_checkpoint(path: Path, model_class: str | None = None) -> ForeignCheckpoint:
    """Open a HuBERT checkpoint of either form.

    Raises:
        SourceError: if files are missing.
        CheckpointError: if they are damaged or hold something else.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return open_hugging_face(path, model_class, config_from_hugging_face, hugging_face_table)
    tensors = open_tensors(path)
    if not _is_fairseqs(tensors):
        raise SourceError(f"{path} is no HuBERT of fairseq's, and has no config.json beside it.")
    names = tensors.names()
    if ecapa.is_verification(tensors):
        return ecapa.open_verification(path, tensors, FAMILY, PREFIX, config_from_fairseq, hubert_fairseq_table)
    if model_class is None:
        model_class = "HubertModel"
        if any(name.endswith("label_embs_concat") for name in names):
            model_class = "HubertForPreTraining"
        elif any(name.endswith("w2v_encoder.proj.weight") for name in names):
            model_class = "HubertForCTC"
    config = config_from_fairseq(tensors)
    return ForeignCheckpoint(model_class, config, tensors, hubert_fairseq_table(config, model_class), path)


# --- scikit-learn's k-means ------------------------------------------------------------------------------------------


class _Named:
    """Stands for an object of a class that is not looked up, let alone called; keeps its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)


class _JoblibReader(pickle._Unpickler):
    """Reads joblib's pickles, whose arrays lie between the instructions, without calling anything they name."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    stack: list[Any]

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.file = file

    def find_class(self, module: str, name: str) -> Any:
        """The type of an array's elements, or a stand-in."""
        return np.dtype if (module, name) == ("numpy", "dtype") else type(name, (_Named,), {})

    def load_build(self) -> None:
        """Give an object its state; behind that of an array lie its values."""
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]
        wrapper = self.stack[-1]
        if type(wrapper).__name__ == "NumpyArrayWrapper":
            if getattr(wrapper, "numpy_array_alignment_bytes", None) is not None:
                self.file.read(self.file.read(1)[0])
            if wrapper.dtype.hasobject:
                raise CheckpointError("The file holds an array of objects.")
            count = int(np.prod(wrapper.shape, dtype=np.int64))
            data = self.file.read(count * wrapper.dtype.itemsize)
            self.stack[-1] = np.frombuffer(data, wrapper.dtype).reshape(wrapper.shape, order=wrapper.order)

    dispatch[pickle.BUILD[0]] = load_build


def read_kmeans(path: Path) -> np.ndarray:
    """Centroids `(clusters, channels)` from scikit-learn's `MiniBatchKMeans` in a joblib file, uncompressed.

    fairseq's `hubert_base_ls960_L9_km500.bin` is one; give the result to `audiozoo.decoding.units.KMeans`.

    Raises:
        SourceError: if there is no such file.
        CheckpointError: if it holds something else.
    """
    if not Path(path).is_file():
        raise SourceError(f"There is no file {path}.")
    with Path(path).open("rb") as file:
        try:
            found = getattr(_JoblibReader(file).load(), "cluster_centers_", None)
        except (pickle.UnpicklingError, ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise CheckpointError(f"{path} is no uncompressed joblib file of k-means ({error}).") from None
    if not isinstance(found, np.ndarray) or found.ndim != 2:
        raise CheckpointError(f"{path} holds no cluster_centers_ of k-means.")
    return np.array(found)
