"""The Conformer, w2v-BERT 2.0 with its length adaptor, and NLLB, alone, against `transformers` in float64."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import M2M100Config, M2M100Model
from transformers import SeamlessM4TConfig as TheirConfig
from transformers import SeamlessM4Tv2Config as TheirSecondConfig
from transformers.models.seamless_m4t import modeling_seamless_m4t as first
from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as second

from audiozoo.loading import variables
from audiozoo.models import conformer, nllb
from audiozoo.models.conformer import ConformerConfig
from audiozoo.models.seamless_m4t import SeamlessM4TConfig, SeamlessM4TSpeechEncoder
from tests.parity import harness
from tests.parity.seamless_family import exact_positions
from weights_conversion.rules import Ignore, Rule, Table
from weights_conversion.seamless_m4t import SPEECH_ENCODER, TEXT_DECODER, TEXT_ENCODER, UNREAD

TINY = {
    "hidden_size": 24,
    "vocab_size": 50,
    "encoder_layers": 2,
    "encoder_ffn_dim": 20,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 20,
    "decoder_attention_heads": 2,
    "feature_projection_input_dim": 10,
    "speech_encoder_layers": 2,
    "speech_encoder_attention_heads": 3,
    "speech_encoder_intermediate_size": 20,
    "conv_depthwise_kernel_size": 5,
    "adaptor_kernel_size": 4,
    "adaptor_stride": 4,
}
OURS = SeamlessM4TConfig(**TINY)
SIZES = ("layers", "attention_heads", "ffn_dim")
SHAW = {"left_max_position_embeddings": 4, "right_max_position_embeddings": 2}


@dataclasses.dataclass(frozen=True)
class SecondConfig(SeamlessM4TConfig):
    """The second version's Conformer."""

    chunk_size: int | None = None
    left_chunk_num: int = 0

    @property
    def conformer(self) -> ConformerConfig:
        return dataclasses.replace(
            super().conformer,
            position_embeddings_type="relative_key",
            causal_convolution=True,
            chunk_size=self.chunk_size,
            left_chunk_num=self.left_chunk_num,
            **SHAW,
        )


@pytest.fixture(scope="module", autouse=True)
def _exact_positions():
    with exact_positions():
        yield


def speech_encoder(cls, theirs, ours):
    reference = harness.randomise(cls(theirs), seed=1)
    table = Table(SPEECH_ENCODER, ignored=UNREAD)
    factory = lambda: SeamlessM4TSpeechEncoder(ours, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
    return reference, harness.ported(reference, factory, table), table


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    mask = np.ones((2, 37), np.int64)
    mask[1, 22:] = 0
    return rng.standard_normal((2, 37, 10)), mask


VERSIONS = {
    "first": (first.SeamlessM4TSpeechEncoder, TheirConfig, {}, OURS),
    "second": (second.SeamlessM4Tv2SpeechEncoder, TheirSecondConfig, SHAW, SecondConfig(**TINY)),
    "chunks": (
        second.SeamlessM4Tv2SpeechEncoder,
        TheirSecondConfig,
        SHAW | {"speech_encoder_chunk_size": 10, "speech_encoder_left_chunk_num": 1},
        SecondConfig(**TINY, chunk_size=10, left_chunk_num=1),
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_speech_encoder(version, frames):
    cls, config, changes, ours = VERSIONS[version]
    # In "eager", the second version's attention adds its mask of truth values to the scores: ones, where nothing is 0.
    theirs = config(**(TINY | changes), attn_implementation="eager" if version == "first" else "sdpa")
    reference, model, table = speech_encoder(cls, theirs, ours)
    x, mask = frames
    options = {"output_attentions": version == "first", "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), torch.tensor(mask), **options),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **options),
        table,
        minimum=40,
        skip={r".*\.distance_embedding": "read as a table, not called"},
        compiled=True,
    )
    harness.compare_outputs(taps.ours, taps.reference)


EMBEDDING = Rule("embed_tokens.weight", "embed_tokens.embedding")


@pytest.fixture(scope="module")
def text():
    """An encoder and a decoder with one embedding each, of the first version."""
    theirs = TheirConfig(**TINY, attn_implementation="eager")
    pairs = []
    for cls, ours, rules in (
        (first.SeamlessM4TEncoder, nllb.NllbEncoder, TEXT_ENCODER),
        (first.SeamlessM4TDecoder, nllb.NllbDecoder, (*TEXT_DECODER, EMBEDDING)),
    ):
        reference = harness.randomise(cls(theirs), seed=2)
        ignored = (Ignore(r"embed_tokens\.weight", "the decoder's"),) if ours is nllb.NllbEncoder else ()
        table = Table(rules, ignored=ignored)
        factory = lambda ours=ours: ours(OURS.text, param_dtype=jnp.float64, rngs=nnx.Rngs(0))  # noqa: E731
        pairs.append((reference, harness.ported(reference, factory, table), table))
    return pairs


def sentences():
    rng = np.random.default_rng(3)
    ids, mask = rng.integers(1, 50, (2, 9)), np.ones((2, 9), np.int64)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return ids, mask


def test_text_encoder(text):
    reference, model, table = text[0]
    ids, mask = sentences()
    embedded = np.asarray(reference.embed_tokens(torch.tensor(ids)).detach())
    options = {"output_attentions": True, "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(ids), torch.tensor(mask), **options),
        model,
        lambda: model(jnp.asarray(embedded), jnp.asarray(mask), input_ids=jnp.asarray(ids), **options),
        table,
        minimum=20,
        compiled=True,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def test_text_decoder(text):
    reference, model, table = text[1]
    ids, mask = sentences()
    memory = np.random.default_rng(4).standard_normal((2, 7, 24))
    seen = np.ones((2, 7), np.int64)
    seen[0, 5:] = 0
    options = {"output_attentions": True, "output_hidden_states": True}
    taps = harness.compare_taps(
        reference,
        lambda: reference(*map(torch.tensor, (ids, mask, memory, seen)), use_cache=False, **options),
        model,
        lambda: model(*map(jnp.asarray, (ids, mask, memory, seen)), **options),
        table,
        minimum=20,
        compiled=True,
    )
    harness.compare_outputs(taps.ours, taps.reference)


def test_decoder_token_by_token(text):
    """With a cache, a token's position counts all that came before it, and padding in between has none."""
    reference, model, _ = text[1]
    ids = np.random.default_rng(6).integers(1, 50, (2, 6))
    ids[0, 3] = 0
    memory = np.random.default_rng(4).standard_normal((2, 7, 24))

    @jax.jit
    def steps(model):
        cache, states = model.start(jnp.asarray(memory), 6), []
        for i in range(6):
            out = model(jnp.asarray(ids[:, i : i + 1]), past_key_values=cache, cache_position=jnp.int32(i))
            cache = out.past_key_values
            states.append(out.last_hidden_state[:, 0])
        return jnp.stack(states, axis=1)

    past, theirs = None, []
    with torch.no_grad():
        for i in range(6):
            out = reference(
                torch.tensor(ids[:, i : i + 1]),
                encoder_hidden_states=torch.tensor(memory),
                past_key_values=past,
                use_cache=True,
            )
            past = out.past_key_values
            theirs.append(out.last_hidden_state[:, 0])
    harness.assert_close(steps(model), torch.stack(theirs, 1), name="states")


@pytest.mark.parametrize("kind", ["rotary", None])
def test_other_positions(kind, frames):
    theirs = TheirConfig(**TINY, position_embeddings_type=kind or "none", attn_implementation="eager")
    ours = dataclasses.replace(OURS, position_embeddings_type=kind)
    reference, model, _ = speech_encoder(first.SeamlessM4TSpeechEncoder, theirs, ours)
    if kind == "rotary":  # random values went into it
        reference.encoder.embed_positions.inv_freq = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    x, mask = frames
    with torch.no_grad():
        output = reference(torch.tensor(x), torch.tensor(mask))
    found = jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask)))(model)
    harness.assert_close(found.last_hidden_state, output.last_hidden_state, name="states")


@pytest.mark.parametrize("version", ["first", "second"])
def test_padding_changes_nothing(version, frames):
    """Told so, an item of a padded batch is the item alone, however long; the original's padding leaks into its end.

    Of two layers in the length adaptor the original tells the second one that it has the frames of the first.
    """
    cls, config, changes, ours = VERSIONS[version]
    layers = 1 if version == "first" else 2
    changes, ours = changes | {"num_adapter_layers": layers}, dataclasses.replace(ours, num_adapter_layers=layers)
    reference, model, _ = speech_encoder(cls, config(**(TINY | changes), attn_implementation="sdpa"), ours)
    x, leaks = frames[0], []
    run = jax.jit(lambda m, x, mask, kept: m(x, mask, batch_invariant=kept).last_hidden_state, static_argnums=3)
    alone = jax.jit(lambda m, x: m(x).last_hidden_state)
    for length in (22, 21, 20, 1):
        mask = (np.arange(37) < np.array([[37], [length]])).astype(np.int64)
        wanted = alone(model, jnp.asarray(x[1:, :length]))
        frames_out = wanted.shape[1]
        pooled = int(ours.pooled(np.array(length)))
        assert frames_out == (pooled if layers == 1 else int(ours.pooled(np.array(pooled))))
        together = run(model, jnp.asarray(x), jnp.asarray(mask), True)
        harness.assert_close(together[1:, :frames_out], np.asarray(wanted), name=f"{length} frames")
        leaking = run(model, jnp.asarray(x), jnp.asarray(mask), False)
        with torch.no_grad():
            theirs = reference(torch.tensor(x), torch.tensor(mask)).last_hidden_state
        if frames_out == pooled:
            harness.assert_close(leaking[1:, :frames_out], theirs[1:, :frames_out], name=f"{length} frames, leaking")
        else:
            assert np.abs(leaking[1, :frames_out] - theirs[1, :frames_out].numpy()).max() > 1e-3
        leaks.append(np.abs(leaking[1, :frames_out] - wanted[0]).max() > 1e-3)
        np.testing.assert_array_equal(model.frame_mask(jnp.asarray(mask), together.shape[1]).sum(axis=1)[1], frames_out)
    assert leaks == [False, True, True, True]


def test_gradients_of_the_encoders(frames):
    for version in ("first", "second"):
        cls, config, changes, ours = VERSIONS[version]
        theirs = config(**(TINY | changes))
        reference, model, table = speech_encoder(cls, theirs, ours)
        x, mask = frames
        weight = np.random.default_rng(9).standard_normal((2, 10, 24))
        compared = harness.compare_gradients(
            reference,
            lambda: (reference(torch.tensor(x), torch.tensor(mask))[0] * torch.tensor(weight)).sum(),  # noqa: B023
            model,
            jax.jit(lambda m: (m(jnp.asarray(x), jnp.asarray(mask)).last_hidden_state * weight).sum()),  # noqa: B023
            table,
        )
        assert len(compared) > 60


def test_training_normalises_by_all_frames(frames):
    """In training BatchNorm's statistics are those of all frames of the batch, padding included, as in the original."""
    cls, config, _, ours = VERSIONS["first"]
    still = {"adaptor_dropout": 0.0, "speech_encoder_layerdrop": 0.0, "speech_encoder_dropout": 0.0}
    reference, model, table = speech_encoder(cls, config(**(TINY | still)), dataclasses.replace(ours, **still))
    x, mask = frames

    def train(model):
        output = model(jnp.asarray(x), jnp.asarray(mask), key=jax.random.key(0)).last_hidden_state
        return output, variables(model)

    output, after = jax.jit(train)(model)
    with torch.no_grad():
        harness.assert_close(output, reference.train()(torch.tensor(x), torch.tensor(mask)).last_hidden_state)
    found, before = (
        dict(table.write({name: np.asarray(v[...]) for name, v in state.items()}))
        for state in (after, variables(model))
    )
    moved = {name: tensor for name, tensor in reference.state_dict().items() if ".running_" in name}
    assert len(moved) == 2 * TINY["speech_encoder_layers"]
    for name, tensor in moved.items():
        harness.assert_close(found[name], tensor, name=name)
        assert np.abs(found[name] - before[name]).max() > 1e-3


def test_mutations_are_noticed(frames):
    cls, config, changes, ours = VERSIONS["first"]
    reference, model, _ = speech_encoder(cls, config(**(TINY | changes)), ours)
    x, mask = frames
    with torch.no_grad():
        output = reference(torch.tensor(x), torch.tensor(mask)).last_hidden_state
    run = jax.jit(lambda m: m(jnp.asarray(x), jnp.asarray(mask)).last_hidden_state)
    mutations = [
        *harness.perturbations(model, count=3),
        harness.dropped(model, "encoder.layers.1.self_attn.pos_bias_v"),
        harness.dropped(model, "encoder.layers.0.conv_module.batch_norm.mean"),
    ]
    harness.assert_detects(lambda: harness.assert_close(run(model), output), mutations)


@pytest.mark.parametrize("size", ["dense_600m", "dense_1_3b", "dense_3_3b"])
def test_published_sizes_of_nllb(size):
    """Encoder, decoder and one embedding have as many parameters as the original with these sizes, at no memory."""
    config = getattr(nllb.NllbConfig, size)()
    fields = {"vocab_size", "d_model", *(f"{p}_{n}" for p in ("encoder", "decoder") for n in SIZES)}
    with torch.device("meta"):
        reference = M2M100Model(M2M100Config(**{name: getattr(config, name) for name in fields}))
    parts = [harness.abstract(lambda c=c: c(config, rngs=nnx.Rngs(0))) for c in (nllb.NllbEncoder, nllb.NllbDecoder)]
    count = sum(math.prod(v.shape) for part in parts for v in variables(part).values())
    assert count == sum(p.numel() for p in reference.parameters())
    assert abs(count / 1e9 - {"dense_600m": 0.615, "dense_1_3b": 1.37, "dense_3_3b": 3.34}[size]) < 0.01


def test_tables_are_the_originals():
    """Where the originals round angles to float32, ours are as close as that rounding, at every length used."""
    assert conformer.relative_sinusoids(3, 8).shape == (5, 8)
    half = 64
    ids = np.full((1, 1000), 7)
    ours = np.asarray(nllb.sinusoids_of(jnp.asarray(ids), 2 * half, padding=1, dtype=jnp.float32))[0]
    exact = np.arange(2, 1002)[:, None] * np.exp(-np.log(1e4) / (half - 1) * np.arange(half))
    np.testing.assert_allclose(ours, np.concatenate([np.sin(exact), np.cos(exact)], 1), atol=2e-4)
