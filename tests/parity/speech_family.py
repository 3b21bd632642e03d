"""What the parity tests of wav2vec 2.0's descendants share: a tiny configuration, pairs of models, padded waves."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from tests.parity import harness

TINY = {
    "vocab_size": 11,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "conv_dim": (16, 12, 18),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 3,
    "num_codevectors_per_group": 5,
    "codevector_dim": 8,
    "proj_codevector_dim": 6,
    "num_negatives": 4,
    "classifier_proj_size": 7,
    "tdnn_dim": (10, 9, 8),
    "tdnn_kernel": (3, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 6,
    "num_labels": 5,
}
LAYER = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
NO_DROPOUT = {
    "hidden_dropout": 0.0,
    "activation_dropout": 0.0,
    "attention_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
}
EVERYTHING = {"output_attentions": True, "output_hidden_states": True}
FRAMES = 34  # of 700 samples
LENGTHS = (700, 480)


@dataclass(frozen=True)
class Family:
    """One paper: its originals' names, our module and its conversion."""

    prefix: str
    config_class: str
    models: Any
    conversion: Any
    tiny: dict[str, Any]

    def their_config(self, **changes: Any) -> Any:
        """The original's configuration, tiny unless changed."""
        return getattr(transformers, self.config_class)(**(self.tiny | changes), attn_implementation="eager")

    def pair(self, head: str, seed: int = 0, **changes: Any) -> tuple[Any, Any, Any]:
        """The original with random weights, ours with the same, and the table between them."""
        theirs_config = self.their_config(**changes)
        name = self.prefix + head
        reference = harness.randomise(getattr(transformers, name)(theirs_config), seed)
        return self.ported(reference, name)

    def ported(self, reference: Any, name: str) -> tuple[Any, Any, Any]:
        """Ours with an original's weights."""
        config = self.conversion.config_from_hugging_face(reference.config.to_dict())
        dtype = str(next(reference.parameters()).dtype).removeprefix("torch.")
        model = harness.blank(lambda: getattr(self.models, name)(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
        table = self.conversion.hugging_face_table(config, name)
        return reference, harness.port(reference, model, table), table

    def round_trip(self, head: str, directory: Any, **changes: Any) -> Any:
        """What `save_pretrained` writes loads; what we export loads there, and back, to the bit. Returns our model."""
        from audiozoo import checkpoints
        from audiozoo.loading import convert, variables
        from weights_conversion.readers import write_safetensors

        name = self.prefix + head
        with harness.precision("float32"):
            reference = harness.randomise(getattr(transformers, name)(self.their_config(**changes)), 2, torch.float32)
            reference.save_pretrained(directory / "theirs")
            foreign = self.conversion.open_checkpoint(directory / "theirs")
            assert foreign.model_class == name
            model = convert(foreign, getattr(self.models, name))
            form = self.conversion.hugging_face(model)
            with checkpoints.written_whole(directory / "ours") as folder:
                for file, content in form.files.items():
                    (folder / file).write_text(json.dumps(content))
                write_safetensors(folder, form.table.write({n: v[...] for n, v in variables(model).items()}))
            back, info = getattr(transformers, name).from_pretrained(directory / "ours", output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            for key, tensor in reference.state_dict().items():
                np.testing.assert_array_equal(back.state_dict()[key], tensor, err_msg=key)
            config = back.config.to_dict()
            for key, value in form.files["config.json"].items():
                if key in config and key not in ("dtype", "architectures", "id2label"):
                    assert json.dumps(config[key]) == json.dumps(value), key
        return model


def from_s3prl(file: str) -> Any:
    """A copy of authors' code that s3prl ships ("hubert/hubert_model.py"), imported alone; skipped without s3prl."""
    spec = importlib.util.find_spec("s3prl")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("s3prl, which holds copies of the authors' models, is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / "upstream" / file
    name = "s3prl.upstream." + file.removesuffix(".py").replace("/", ".")
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def waves(batch: int = 2, samples: int = 700, seed: int = 0) -> np.ndarray:
    """Noise."""
    return np.random.default_rng(seed).standard_normal((batch, samples))


def padded() -> tuple[np.ndarray, np.ndarray]:
    """Two waves, the second shorter, and their mask."""
    x = waves()
    mask = np.zeros(x.shape, np.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return np.where(mask, x, 0), mask


def jitted(model: Any, **static: Any) -> Any:
    """Our model's call, compiled."""
    graphdef, state = nnx.split(model)
    call = jax.jit(lambda state, kwargs: nnx.merge(graphdef, state)(**kwargs, **static))
    return lambda **kwargs: call(state, {k: jnp.asarray(v) for k, v in kwargs.items()})


@contextlib.contextmanager
def reference_in_double() -> Iterator[None]:
    """The originals cast to float32 in their losses; inside this their casts go to float64."""
    log_softmax, to_float = torch.nn.functional.log_softmax, torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    torch.nn.functional.log_softmax = lambda x, dim=None, dtype=None, **kw: log_softmax(x, dim=dim, **kw)
    try:
        yield
    finally:
        torch.Tensor.float = to_float
        torch.nn.functional.log_softmax = log_softmax


@contextlib.contextmanager
def masked(backbone: Any, spans: np.ndarray) -> Iterator[None]:
    """The original's backbone with these frames masked, also outside training."""
    original = backbone._mask_hidden_states

    def mask(x: Any, mask_time_indices: Any = None, attention_mask: Any = None) -> Any:
        return original(x, torch.tensor(spans), attention_mask)

    backbone._mask_hidden_states = mask
    try:
        yield
    finally:
        del backbone._mask_hidden_states


def spans(seed: int = 0) -> np.ndarray:
    """Masked frames of both items."""
    chosen = np.zeros((2, FRAMES), bool)
    chosen[0, 3:9] = chosen[0, 20:27] = chosen[1, 8:15] = True
    return np.roll(chosen, seed, axis=1)
