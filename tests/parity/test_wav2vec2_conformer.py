"""wav2vec2-Conformer against `transformers`: every tap, head and gradient, with each kind of positions; its files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo import loading, registry
from audiozoo.errors import CheckpointError
from audiozoo.layers import activations
from audiozoo.models import conformer, wav2vec2_conformer
from audiozoo.models.wav2vec2 import sample_negative_indices
from tests.parity import harness, speech_family
from tests.parity.seamless_family import exact_positions
from tests.parity.speech_family import EVERYTHING, LENGTHS, NO_DROPOUT, from_s3prl, jitted, padded, waves
from weights_conversion import wav2vec2_conformer as conversion
from weights_conversion.readers import open_tensors

TINY = speech_family.TINY | {
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "hidden_act": "swish",
    "conv_depthwise_kernel_size": 5,
}
POSITIONS = ("relative", "rotary", None)
STILL = NO_DROPOUT | {"conformer_conv_dropout": 0.0}
ADAPTED = {"add_adapter": True, "num_adapter_layers": 2, "output_hidden_size": 14}
FAMILY = speech_family.Family("Wav2Vec2Conformer", "Wav2Vec2ConformerConfig", wav2vec2_conformer, conversion, TINY)


@pytest.fixture(autouse=True)
def _exact_positions():
    with exact_positions():
        yield


def pair(head: str, seed: int = 0, **changes):
    """See `Family.pair`; the frequencies of rotary positions, float32 there, are exact."""
    reference, model, table = FAMILY.pair(head, seed, **changes)
    encoder = getattr(reference, "wav2vec2_conformer", reference).encoder
    if hasattr(encoder.embed_positions, "inv_freq"):
        encoder.embed_positions.inv_freq = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    return reference, model, table


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("ForPreTraining", {"position_embeddings_type": "relative"}),
        ("ForXVector", {"position_embeddings_type": "rotary", "feat_extract_norm": "group", "conv_bias": False}),
        ("ForCTC", ADAPTED | {"position_embeddings_type": None, "layer_norm_eps": 1e-3, "hidden_act": "gelu"}),
    ],
    ids=["relative", "rotary", "none"],
)
def test_every_tap_and_output(head, changes):
    reference, model, table = pair(head, **changes)
    x, mask = padded()
    ours = {"hidden_states_before_norm": True} | ({"ignore_dilation": True} if head == "ForXVector" else {})
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING),
        model,
        lambda: model(jnp.asarray(x), jnp.asarray(mask), **EVERYTHING, **ours),
        table,
        minimum=50,
        compiled=True,
    )
    assert len(harness.compare_outputs(taps.ours, taps.reference)) >= 6


def test_bare_model():
    reference, model, _ = pair("Model", seed=1)
    x, mask = padded()
    run = jitted(model, **EVERYTHING, hidden_states_before_norm=True)
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask), **EVERYTHING)
        alone = reference(torch.tensor(x), **EVERYTHING)
    harness.compare_outputs(run(input_values=x, attention_mask=mask), theirs)
    harness.compare_outputs(run(input_values=x), alone)
    states = jitted(model, output_hidden_states=True)(input_values=x).hidden_states
    harness.assert_close(states[-1], alone.last_hidden_state)


@pytest.mark.parametrize("positions", POSITIONS)
def test_pretraining_loss_and_every_gradient(positions):
    reference, model, table = pair("ForPreTraining", **STILL, position_embeddings_type=positions)
    x, mask = padded()
    spans = speech_family.spans()
    negatives = np.asarray(sample_negative_indices(jax.random.key(1), jnp.asarray(spans), 4))
    kwargs = {
        "attention_mask": torch.tensor(mask),
        "mask_time_indices": torch.tensor(spans),
        "sampled_negative_indices": torch.tensor(negatives),
    }
    given = [jnp.asarray(a) for a in (x, mask, spans, negatives)]
    with speech_family.reference_in_double():
        compared = harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), **kwargs).loss,
            model,
            jax.jit(lambda m: m(*given).loss),
            table,
        )
    assert "wav2vec2_conformer.encoder.layers.1.conv_module.batch_norm.scale" in compared
    assert len(compared) > 85


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("ForCTC", np.array([[3, 4, 4, 7, -100], [1, 2, 5, -100, -100]])),
        ("ForSequenceClassification", np.array([0, 3])),
    ],
)
def test_heads_and_their_gradients(head, labels):
    changes = {"use_weighted_layer_sum": head != "ForCTC", "num_hidden_layers": 1, "mask_time_prob": 0.0}
    reference, model, table = pair(head, **STILL, **changes)
    x, mask = padded()
    given = [jnp.asarray(a) for a in (x, mask, labels)]
    # Which of the last block's states is mixed differs between versions of `transformers`.
    extra = {"hidden_states_before_norm": True} if head != "ForCTC" else {}
    with speech_family.reference_in_double():
        harness.compare_gradients(
            reference,
            lambda: reference(torch.tensor(x), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss,
            model,
            jax.jit(lambda m: m(*given, **extra).loss),
            table,
        )


def test_a_padded_batch_is_its_items():
    x, mask = padded()
    found = {}
    for masked in (False, True):
        _, model, _ = pair("ForCTC", masked_convolution=masked)
        alone = jitted(model)(input_values=x[1:, : LENGTHS[1]]).logits
        together = jitted(model)(input_values=x, attention_mask=mask).logits[1:, : alone.shape[1]]
        found[masked] = np.abs(together - alone).max()
    assert found[False] > 1e-3
    harness.assert_close(together, alone)


def test_mutations_are_noticed():
    reference, model, _ = pair("ForCTC")
    x, mask = padded()
    with torch.no_grad():
        theirs = reference(torch.tensor(x), attention_mask=torch.tensor(mask))
    mutations = [
        *harness.perturbations(model, count=3, exclude=r".*(masked_spec_embed|pos_conv_embed.*)"),
        harness.dropped(model, "wav2vec2_conformer.encoder.layers.1.self_attn.pos_bias_v"),
        harness.dropped(model, "wav2vec2_conformer.encoder.layers.0.conv_module.batch_norm.mean"),
        harness.Replaced(activations.ACTIVATIONS, "gelu", activations.gelu_tanh),
        harness.Replaced(conformer, "relative_shift", lambda scores: scores[..., : scores.shape[2]]),
    ]
    check = lambda: harness.compare_outputs(jitted(model)(input_values=x, attention_mask=mask), theirs)  # noqa: E731
    assert harness.assert_detects(check, mutations) == 7


@pytest.mark.parametrize("size", ["rel_pos_large", "rope_large"])
def test_published_sizes(size):
    config = getattr(wav2vec2_conformer.Wav2Vec2ConformerConfig, size)()
    names = set(transformers.Wav2Vec2ConformerConfig().to_dict()) - {"id2label", "output_hidden_size"}
    theirs = transformers.Wav2Vec2ConformerConfig(**{k: v for k, v in vars(config).items() if k in names})
    name = "Wav2Vec2ConformerForPreTraining"
    with harness.precision("float32"):
        harness.assert_same_shapes(
            lambda: getattr(transformers, name)(theirs),
            lambda: getattr(wav2vec2_conformer, name)(config, rngs=nnx.Rngs(0)),
            conversion.hugging_face_table(config, name),
        )


@pytest.mark.slow
def test_full_size_in_float32():
    sizes = vars(wav2vec2_conformer.Wav2Vec2ConformerConfig.rel_pos_large())
    names = set(transformers.Wav2Vec2ConformerConfig().to_dict()) - {"id2label", "output_hidden_size"}
    with harness.precision("float32"):
        theirs_config = transformers.Wav2Vec2ConformerConfig(
            **{k: v for k, v in sizes.items() if k in names} | {"num_hidden_layers": 2}
        )
        reference = harness.randomise(transformers.Wav2Vec2ConformerForCTC(theirs_config), 0, torch.float32)
        reference, model, _ = FAMILY.ported(reference, "Wav2Vec2ConformerForCTC")
        x = speech_family.waves(1, 16_000).astype(np.float32)
        with torch.no_grad():
            theirs = reference(torch.tensor(x))
        harness.compare_outputs(jitted(model)(input_values=x), theirs)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        ("Model", {"position_embeddings_type": "rotary"}),
        ("ForPreTraining", {}),
        ("ForCTC", ADAPTED | {"position_embeddings_type": None}),
        ("ForSequenceClassification", {"use_weighted_layer_sum": True, "position_embeddings_type": "rotary"}),
        ("ForXVector", {"mask_time_prob": 0.0, "feat_extract_norm": "group"}),
    ],
)
def test_hugging_face_directories(head, changes, tmp_path):
    FAMILY.round_trip(head, tmp_path, **changes)
    theirs, ours = (open_tensors(tmp_path / side) for side in ("theirs", "ours"))
    assert sorted(ours.names()) == sorted(theirs.names())
    for name in theirs.names():
        np.testing.assert_array_equal(ours.read(name), theirs.read(name), err_msg=name)


@pytest.fixture(scope="module")
def fairseq_model():
    """The pure-PyTorch copy of fairseq's wav2vec 2.0."""
    return from_s3prl("wav2vec2/wav2vec2_model.py")


SETTINGS = {
    "conv_feature_layers": "[(16, 10, 5)] + [(12, 3, 2)] + [(18, 2, 2)]",
    "extractor_mode": "layer_norm",
    "layer_norm_first": True,
    "conv_bias": True,
    "encoder_layers": 2,
    "encoder_embed_dim": 24,
    "encoder_ffn_embed_dim": 40,
    "encoder_attention_heads": 3,
    "conv_pos": 8,
    "conv_pos_groups": 3,
    "quantize_targets": True,
    "final_dim": 6,
    "latent_vars": 5,
    "latent_groups": 2,
    "latent_dim": 8,
    "num_negatives": 4,
    "dropout": 0.0,
    "attention_dropout": 0.1,
    "layer_type": "conformer",
    "attn_type": "espnet",
    "depthwise_conv_kernel_size": 5,
}


@pytest.mark.parametrize(("theirs", "ours"), [("rel_pos", "relative"), ("rope", "rotary")])
def test_fairseqs_own_model_and_file(theirs, ours, fairseq_model, tmp_path):
    """Its network under its own names: what it computes, and its file, which no other paper takes for its own."""
    settings = SETTINGS | {"pos_enc_type": theirs}
    with harness.precision("float32"):
        theirs_config = fairseq_model.Wav2Vec2Config(**settings)
        reference = harness.randomise(fairseq_model.Wav2Vec2Model(theirs_config), 6, torch.float32)
        state = reference.state_dict()
        file = tmp_path / "LL_relpos_PT_no_FT"
        torch.save({"model": state, "cfg": {"model": {"_name": "wav2vec2", **settings}}}, file)
        model = audiozoo.load(file)
        assert type(model).__name__ == "Wav2Vec2ConformerForPreTraining"
        assert loading.paper_of(file).name == "wav2vec2_conformer"
        assert [p.name for p in registry.PAPERS if p.conversion.recognise(file)] == ["wav2vec2_conformer"]
        config = model.config
        assert (config.position_embeddings_type, config.num_attention_heads) == (ours, 3)
        assert (config.attention_dropout, config.conformer_conv_dropout, config.codevector_dim) == (0.0, 0.0, 8)
        x, mask = padded()
        x = x.astype(np.float32)
        with torch.no_grad():
            context = reference(torch.tensor(x), torch.tensor(mask == 0), mask=False, features_only=True)
        heard = jitted(model.wav2vec2_conformer)(input_values=x, attention_mask=mask)
        frames = model.wav2vec2_conformer.frame_lengths(LENGTHS[1])
        harness.assert_close(heard.last_hidden_state[0], context["x"][0])
        harness.assert_close(heard.last_hidden_state[1, :frames], context["x"][1, :frames])
        np.testing.assert_array_equal(model.project_hid.kernel[...].T, state["final_proj.weight"])

        # Fine-tuned, the network lies two levels deeper; what a file does not say of it follows from its shapes.
        tuned = {
            f"w2v_encoder.w2v_model.{k}": v for k, v in state.items() if not k.startswith(("quant", "proj", "fin"))
        }
        tuned |= {"w2v_encoder.proj.weight": torch.ones(9, 24), "w2v_encoder.proj.bias": torch.zeros(9)}
        known = {name: settings[name] for name in ("conv_feature_layers", "layer_norm_first")}
        outer = {"_name": "wav2vec_ctc", "w2v_args": {"model": known}}
        torch.save({"model": tuned, "cfg": {"model": outer}}, tmp_path / "tuned.pt")
        recogniser = audiozoo.load(tmp_path / "tuned.pt")
        assert type(recogniser).__name__ == "Wav2Vec2ConformerForCTC"
        assert (recogniser.config.vocab_size, recogniser.config.num_attention_heads) == (9, 3)
        assert recogniser.config.position_embeddings_type == ours

        absolute = {k: v for k, v in state.items() if "pos_bias" not in k and "rotary" not in k}
        torch.save({"model": absolute, "cfg": {"model": known}}, tmp_path / "absolute.pt")
        with pytest.raises(CheckpointError, match="with relative or rotary positions"):
            conversion.open_checkpoint(tmp_path / "absolute.pt")


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_dropouts(positions):
    rates = harness.rates(transformers.Wav2Vec2ConformerConfig())
    reference, model, _ = pair("ForCTC", position_embeddings_type=positions, **rates)
    harness.compare_in_training(reference, model, {"input_values": waves()})
