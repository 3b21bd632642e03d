"""MusicGen against `transformers` (its default attention): the decoder's forward, and whole generation with guidance.

musicgen-small's size, random weights.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from benchmarks.framework import Case, Run, random_model, randomised, tensor, within

SEED, STEPS, SECONDS = 0, 250, 5.0
TEXT = np.arange(1, 13, dtype=np.int64)[None] * 97 % 32_000
SMALL = 0.125  # T5 scales queries by how their weights start; with larger ones rounding grows eightfold a layer
CLASS = "MusicgenForConditionalGeneration"


@functools.lru_cache(maxsize=1)
def model() -> Any:
    """Ours, with random weights drawn by name."""
    from audiozoo.loading import variables, with_variables
    from audiozoo.models.musicgen import MusicgenConfig, MusicgenForConditionalGeneration
    from weights_conversion.musicgen import hugging_face_table

    config = MusicgenConfig.small()
    table = hugging_face_table(config, CLASS)
    ours = random_model(MusicgenForConditionalGeneration, config, table, SEED)
    values = {name: variable[...] for name, variable in variables(ours).items()}
    return with_variables(ours, {name: v * SMALL if _is_query(name) else v for name, v in values.items()})


@functools.lru_cache(maxsize=1)
def original() -> Any:
    """`transformers`' model, the same random weights, float32."""
    import torch
    import transformers

    from weights_conversion.musicgen import hugging_face

    config = transformers.MusicgenConfig.from_dict(dict(hugging_face(model()).files["config.json"]))
    with torch.device("meta"):
        theirs = transformers.MusicgenForConditionalGeneration(config)
    theirs = theirs.to_empty(device="cpu")
    theirs.text_encoder.encoder.embed_tokens.weight = theirs.text_encoder.shared.weight  # tied, until it was emptied
    randomised(theirs, SEED)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if _is_query(name):
                weight *= SMALL
    for module in theirs.modules():
        if hasattr(module, "make_weights"):
            module.weights = module.get_embedding(module.num_positions, module.embedding_dim)
    for name, buffer in theirs.named_buffers():
        if name.endswith((".stride", ".kernel_size", ".padding_total")):  # integers that the codec computes with
            _restore(theirs, name, buffer)
    ids = {"pad_token_id": 2048, "bos_token_id": 2048, "decoder_start_token_id": 2048}
    theirs.generation_config.update(**ids, do_sample=False, guidance_scale=3.0)
    return theirs


def _is_query(name: str) -> bool:
    return name.startswith("text_encoder") and name.endswith((".self_attention.q.kernel", ".SelfAttention.q.weight"))


def _restore(theirs: Any, name: str, buffer: Any) -> None:
    """The value of a buffer of `EncodecConv1d` from the convolution beside it."""
    module = theirs.get_submodule(name.rpartition(".")[0])
    conv = module.conv
    effective = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
    values = {"stride": conv.stride[0], "kernel_size": effective, "padding_total": effective - conv.stride[0]}
    buffer.fill_(values[name.rpartition(".")[2]])


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(0, 2048, (4, STEPS)), rng.standard_normal((1, 12, 1024)).astype(np.float32)


def our_forward() -> Run:
    import jax.numpy as jnp

    import audiozoo

    run, (ids, states) = audiozoo.jit(model().decoder), map(jnp.asarray, _inputs())
    return lambda: np.asarray(run(ids, encoder_hidden_states=states).logits)


def their_forward() -> Run:
    import torch

    theirs, (ids, states) = original(), map(tensor, _inputs())

    def run() -> Any:
        with torch.inference_mode():
            return theirs.decoder(ids, encoder_hidden_states=states, use_cache=False).logits.float().numpy()

    return run


def our_generate() -> Run:
    ours = model()
    options = {"do_sample": False, "guidance_scale": 3.0, "max_new_tokens": STEPS + 3}
    return lambda: ours.generate(TEXT.astype(np.int32), np.ones(TEXT.shape, np.int32), **options)


def their_generate() -> Run:
    import torch

    theirs, ids = original(), tensor(TEXT)
    return lambda: theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS + 3).numpy()


def sounds_alike(ours: Any, theirs: Any) -> str:
    """Greedy codes may part at a near tie in float32; until then the waveform is the same."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"shapes {ours.shape} and {theirs.shape}")
    apart = np.flatnonzero(np.abs(ours - theirs).max(axis=(0, 1)) > 1e-3 * np.abs(theirs).max())
    same = ours.shape[2] if not apart.size else int(apart[0])
    if same < 0.1 * ours.shape[2]:
        raise AssertionError(f"the waveforms part after {same} samples")
    return f"same waveform for {same / ours.shape[2]:.0%}"


CASES = (
    Case(
        f"decoder forward, {STEPS} steps",
        our_forward,
        {"transformers": their_forward},
        target=1.5,
        agreement=within(1e-4),
        repeats=3,
    ),
    Case(
        f"generate {SECONDS:g} s, guidance",
        our_generate,
        {"transformers": their_generate},
        target=2.0,
        agreement=sounds_alike,
        repeats=2,
    ),
)
