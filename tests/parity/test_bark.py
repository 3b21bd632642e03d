"""Bark against `transformers` and Suno's own package in float64; tokens exactly, whatever samples them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from transformers.models.bark import generation_configuration_bark as settings

from audiozoo.models import bark
from audiozoo.models.bark import BarkFineModel, BarkModel, BarkSemanticModel
from tests.models.tiny_bark import CONFIG, FINE, GENERATION, SEMANTIC
from tests.parity import harness
from weights_conversion.bark import (
    config_from_hugging_face,
    generation_from_hugging_face,
    hugging_face_table,
    stage_config,
)

IDS = np.random.default_rng(1).integers(0, 40, (2, 8))
MASK = (np.arange(8) < np.array([[5], [7]])).astype(np.int64)
STAGES = ("semantic_config", "coarse_acoustics_config", "fine_acoustics_config")
EVERYTHING = {"output_attentions": True, "output_hidden_states": True}


def history(semantic: int = 9, frames: int = 14) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(semantic)
    return {
        "semantic_prompt": rng.integers(0, 40, semantic),
        "coarse_prompt": rng.integers(0, 16, (2, frames)),
        "fine_prompt": rng.integers(0, 16, (8, frames)),
    }


def torched(x):
    return None if x is None else {name: torch.tensor(array) for name, array in x.items()}


def pair(seed: int = 0, dtype=None, **changes):
    """Theirs and ours with the same random weights."""
    theirs = transformers.BarkConfig(**(CONFIG | changes))
    reference = transformers.BarkModel(theirs)
    whole = settings.BarkGenerationConfig(**GENERATION)
    reference.generation_config = settings.BarkGenerationConfig(**GENERATION)
    for name in STAGES:  # as `generate` wants them, and `from_pretrained` leaves them
        setattr(reference.generation_config, name, getattr(whole, name).to_dict())
    reference = harness.randomise(reference, seed)
    config = config_from_hugging_face(theirs.to_dict())
    table = hugging_face_table(config)
    model = harness.ported(reference, lambda: BarkModel(config, param_dtype=dtype, rngs=nnx.Rngs(0)), table)
    model.generation_config = generation_from_hugging_face(whole.to_dict())
    return reference, model, table


@pytest.fixture(scope="module")
def tiny():
    return pair(dtype=jnp.float64)


def stages(reference):
    config = reference.generation_config
    return {
        "semantic_generation_config": settings.BarkSemanticGenerationConfig(**config.semantic_config),
        "coarse_generation_config": settings.BarkCoarseGenerationConfig(**config.coarse_acoustics_config),
        "fine_generation_config": settings.BarkFineGenerationConfig(**config.fine_acoustics_config),
    }


class Noise:
    """Stands for `torch.multinomial`: the most probable token after adding Gumbel noise, a block of it a call."""

    def __init__(self, noise):
        self.noise, self.calls, self.probabilities = np.asarray(noise), 0, []

    def __call__(self, probabilities, num_samples=1, **_):
        assert num_samples == 1
        self.probabilities.append(probabilities.detach().numpy().copy())
        noise = torch.tensor(self.noise[self.calls]).reshape(probabilities.shape)
        self.calls += 1
        return torch.argmax(torch.log(probabilities) + noise, dim=-1, keepdim=True)


def gumbel(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).gumbel(size=shape)


# --- one forward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_causal_taps_and_outputs(bias):
    """Both causal models are one class; with biases, and with padding on the right."""
    theirs = transformers.models.bark.BarkSemanticConfig(**(SEMANTIC | {"bias": bias}))
    reference = harness.randomise(transformers.models.bark.BarkSemanticModel(theirs))
    config = stage_config(theirs.to_dict(), "BarkSemanticModel", "config.json")
    table = hugging_face_table(config, "BarkSemanticModel")
    create = functools.partial(BarkSemanticModel, config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model = harness.ported(reference, create, table)
    ids, mask = IDS + 48, MASK
    taps = harness.compare_taps(
        reference,
        lambda: reference(torch.tensor(ids), attention_mask=torch.tensor(mask), use_cache=False, **EVERYTHING),
        model,
        lambda: model(jnp.asarray(ids), attention_mask=jnp.asarray(mask), **EVERYTHING),
        table,
        minimum=16,
    )
    assert "output.attentions[1]" in harness.compare_outputs(taps.ours, taps.reference)
    embedded = reference.input_embeds_layer(torch.tensor(ids))
    positions = np.arange(8)[None] + 3
    with torch.no_grad():
        wanted = reference(inputs_embeds=embedded, position_ids=torch.tensor(positions), use_cache=False).logits
    ours = model(inputs_embeds=jnp.asarray(embedded.detach().numpy()), position_ids=jnp.asarray(positions)).logits
    harness.assert_close(ours, wanted, name="logits of embeddings at other positions")


@pytest.mark.parametrize("tied", [True, False])
def test_fine_taps_and_outputs(tied):
    theirs = transformers.models.bark.BarkFineConfig(**(FINE | {"tie_word_embeddings": tied, "bias": not tied}))
    reference = harness.randomise(transformers.models.bark.BarkFineModel(theirs))
    config = stage_config(theirs.to_dict(), "BarkFineModel", "config.json")
    table = hugging_face_table(config, "BarkFineModel")
    create = functools.partial(BarkFineModel, config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model = harness.ported(reference, create, table)
    codes, mask = np.random.default_rng(0).integers(0, 17, (2, 9, 8)), np.ones((2, 9), np.int64)
    mask[1, 6:] = 0
    for book in (7, 1):
        taps = harness.compare_taps(
            reference,
            lambda book=book: reference(book, torch.tensor(codes), attention_mask=torch.tensor(mask), **EVERYTHING),
            model,
            lambda book=book: model(book, jnp.asarray(codes), jnp.asarray(mask), **EVERYTHING),
            table,
            minimum=16,
        )
        harness.compare_outputs(taps.ours, taps.reference)


def test_mutations_are_noticed(tiny):
    reference, model, _ = tiny
    with torch.no_grad():
        theirs = reference.semantic(torch.tensor(IDS + 48), use_cache=False).logits
        codes = np.random.default_rng(0).integers(0, 17, (1, 9, 8))
        fine = reference.fine_acoustics(3, torch.tensor(codes)).logits

    def check():
        both = jax.jit(
            lambda m: (m.semantic(jnp.asarray(IDS + 48)).logits, m.fine_acoustics(3, jnp.asarray(codes)).logits)
        )
        ours, ours_fine = both(model)
        harness.assert_close(ours, theirs)
        harness.assert_close(ours_fine, fine)

    unread = r"(codec_model|coarse_acoustics)\..*|.*embeds_layers?\..*"
    mutations = [
        *harness.perturbations(model, count=2, exclude=unread),
        harness.dropped(model, "fine_acoustics.layers.1.layernorm_2.bias"),
        harness.Replaced(bark, "gelu", lambda x: jax.nn.gelu(x, approximate=True)),
    ]
    assert harness.assert_detects(check, mutations) == 4


# --- losses: transformers has none; its logits under PyTorch's cross-entropy -----------------------------------------


def test_losses_and_every_gradient(tiny):
    reference, model, _ = tiny
    rng = np.random.default_rng(4)
    ids = model.generation_config.semantic_config
    text = np.where(MASK, IDS + ids.text_encoding_offset, ids.text_pad_token)
    before = bark._padded(history()["semantic_prompt"][None, -6:], 8, 40)
    spoken = rng.integers(0, 40, (2, 6))
    spoken[:, 5], spoken[1, 4:] = 40, (40, -100)

    def semantic_reference():
        table = reference.semantic.input_embeds_layer
        parts = [table(torch.tensor(text)) + table(torch.tensor(before)), table(torch.full((2, 1), 99))]
        inputs = torch.cat([*parts, table(torch.tensor(np.where(spoken < 0, 40, spoken)[:, :-1]))], dim=1)
        logits = reference.semantic(inputs_embeds=inputs, use_cache=False).logits[:, 8:]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 48), torch.tensor(spoken).reshape(-1))

    def semantic(m):
        return bark.semantic_loss(m, jnp.asarray(text), jnp.asarray(spoken), jnp.asarray(before))

    window, coarse = rng.integers(0, 40, (2, 8)), 40 + rng.integers(0, 16, (2, 10)) + np.arange(10) % 2 * 16
    coarse[0, 8:] = -100

    def coarse_reference():
        inputs = np.concatenate([window, np.full((2, 1), 74), np.where(coarse < 0, 72, coarse)[:, :-1]], axis=1)
        logits = reference.coarse_acoustics(torch.tensor(inputs), use_cache=False).logits[:, 8:]
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 80), torch.tensor(coarse).reshape(-1))

    codes, known, lengths = rng.integers(0, 16, (2, 9, 8)), np.array([0, 3]), np.array([7, 9])

    def fine_reference():
        frame = np.arange(9)
        asked, real = frame >= known[:, None], frame < lengths[:, None]
        inputs = codes.copy()
        inputs[:, :, 4:][asked] = 16
        inputs[~real] = 16
        labels = np.where(asked & real, codes[:, :, 4], -100)
        logits = reference.fine_acoustics(4, torch.tensor(inputs)).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, 20), torch.tensor(labels).reshape(-1))

    fine_arrays = (jnp.asarray(codes), 4, jnp.asarray(known), jnp.asarray(lengths))
    for part, name, theirs, ours in (
        ("semantic", "BarkSemanticModel", semantic_reference, semantic),
        (
            "coarse_acoustics",
            "BarkCoarseModel",
            coarse_reference,
            lambda m: bark.coarse_loss(m, jnp.asarray(window), jnp.asarray(coarse)),
        ),
        ("fine_acoustics", "BarkFineModel", fine_reference, lambda m: bark.fine_loss(m, *fine_arrays)),
    ):
        stage = getattr(model, part)
        table = hugging_face_table(stage.config, name)
        compared = harness.compare_gradients(getattr(reference, part), theirs, stage, jax.jit(ours), table)
        assert {"layers.0.attn.k_proj.kernel", "position_embeds_layer.embedding"} <= set(compared)


def test_labels_predict_the_next_token(tiny):
    """`labels` of the causal call are aligned with the input, those of the fine one with the frames."""
    _, model, _ = tiny
    ids = jnp.asarray(IDS)
    out = model.semantic(ids, labels=ids)
    wanted = -jax.nn.log_softmax(out.logits[:, :-1])[jnp.arange(2)[:, None], jnp.arange(7), ids[:, 1:]].mean()
    harness.assert_close(out.loss, np.asarray(wanted), name="loss")
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (1, 9, 8)))
    fine = model.fine_acoustics(2, codes, labels=codes[:, :, 2])
    wanted = -jax.nn.log_softmax(fine.logits)[0, jnp.arange(9), codes[0, :, 2]].mean()
    harness.assert_close(fine.loss, np.asarray(wanted), name="fine loss")


# --- generation, against transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, history(), history(5, 7)], ids=["no history", "history", "short history"])
def test_greedy_tokens_of_every_stage(tiny, given):
    """Two rows as long as each other: `transformers` is right about those."""
    reference, model, _ = tiny
    options = {"semantic_max_new_tokens": 22, "semantic_min_new_tokens": 22}
    call = {"history_prompt": torched(given), "attention_mask": torch.tensor(MASK)}
    config = stages(reference)
    semantic = reference.semantic.generate(
        torch.tensor(IDS), config["semantic_generation_config"], max_new_tokens=22, min_new_tokens=22, **call
    )
    coarse = reference.coarse_acoustics.generate(
        semantic.clone(),
        config["semantic_generation_config"],
        config["coarse_generation_config"],
        16,
        torched(given),
    )
    fine = reference.fine_acoustics.generate(coarse, **config, codebook_size=16, history_prompt=torched(given))
    audio = reference.generate(torch.tensor(IDS), **call, **options)
    waveform, lengths, said = model.generate(IDS, given, True, attention_mask=MASK, return_history=True, **options)
    np.testing.assert_array_equal(np.stack([h["semantic_prompt"] for h in said]), semantic)
    frames = np.stack([h["coarse_prompt"] for h in said]).swapaxes(1, 2)
    np.testing.assert_array_equal(frames.reshape(2, -1), (coarse - 40) % 16)
    np.testing.assert_array_equal(np.stack([h["fine_prompt"] for h in said]), fine)
    harness.assert_close(waveform, audio, name="waveform")
    assert lengths.tolist() == [33 * 4] * 2
    assert len({row.tobytes() for row in semantic.numpy()}) == 2


def test_a_batch_is_its_items(tiny):
    """A row's tokens are those it has alone; in `transformers` the padding of the fine stage alters the shorter row."""
    reference, model, _ = tiny
    config = stages(reference)
    eos = 40
    semantic = np.random.default_rng(0).integers(0, 40, (2, 20))
    semantic[0, 11:] = eos
    given = None
    waveform, samples, said = model.semantic_to_waveform(semantic, given)
    assert samples.tolist() == [16 * 4, 30 * 4]
    coarse, lengths = reference.coarse_acoustics.generate(
        torch.tensor(semantic),
        config["semantic_generation_config"],
        config["coarse_generation_config"],
        16,
        torched(given),
        return_output_lengths=True,
    )
    assert lengths.tolist() == [2 * len(h["fine_prompt"][0]) for h in said]
    together = reference.fine_acoustics.generate(coarse, **config, codebook_size=16, history_prompt=torched(given))
    for row, length in enumerate((11, 20)):
        alone = reference.coarse_acoustics.generate(
            torch.tensor(semantic[row : row + 1, :length]),
            config["semantic_generation_config"],
            config["coarse_generation_config"],
            16,
            torched(given),
        )
        np.testing.assert_array_equal(alone[0], coarse[row, : alone.shape[1]])
        fine = reference.fine_acoustics.generate(alone, **config, codebook_size=16, history_prompt=torched(given))
        np.testing.assert_array_equal(said[row]["fine_prompt"], fine[0])
        agrees = torch.equal(together[row, :, : fine.shape[2]], fine[0])
        assert agrees == (row == 1), "transformers' batch is right about the longest row alone"
        with torch.no_grad():
            audio = reference.codec_decode(fine)[0]
        harness.assert_close(waveform[row, : samples[row]], audio, name=f"waveform {row}")
        assert not waveform[row, samples[row] :].any()


@pytest.mark.parametrize("given", [None, history()], ids=["no history", "history"])
def test_sampled_tokens_with_the_same_noise(tiny, given, monkeypatch):
    """`transformers` at temperature 0.7, top-k 9 and top-p 0.9, its noise replaced by ours."""
    reference, model, _ = tiny
    config, options = stages(reference), {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9}
    noise = gumbel(22, 2, 48)
    monkeypatch.setattr(torch, "multinomial", Noise(noise))
    length = {"max_new_tokens": 22, "min_new_tokens": 22}
    semantic = reference.semantic.generate(
        torch.tensor(IDS), config["semantic_generation_config"], torched(given), **options, **length
    )
    ours = model.semantic.generate(IDS, None, given, noise=jnp.asarray(noise), **options, **length)
    np.testing.assert_array_equal(ours, semantic)
    noise = gumbel(66, 2, 80)
    monkeypatch.setattr(torch, "multinomial", Noise(noise))
    coarse = reference.coarse_acoustics.generate(
        semantic.clone(),
        config["semantic_generation_config"],
        config["coarse_generation_config"],
        16,
        torched(given),
        **options,
    )
    padded = jnp.asarray(np.concatenate([noise, np.zeros((30, 2, 80))]))
    np.testing.assert_array_equal(
        model.coarse_acoustics.generate(ours, None, None, 16, given, noise=padded, **options), coarse
    )
    windows = 5
    noise = gumbel(windows * 6, 2, 16, 16)
    first = 8 if given else 0  # frames of the first window that are known

    class FineNoise(Noise):
        def __call__(self, probabilities, **kwargs):
            asked = probabilities.shape[0] // 2
            block = self.noise[self.calls][:, 16 - asked :].reshape(2 * asked, 16)
            self.calls += 1
            self.probabilities.append(probabilities)
            return torch.argmax(torch.log(probabilities) + torch.tensor(block), dim=-1, keepdim=True)

    sampler = FineNoise(noise)
    monkeypatch.setattr(torch, "multinomial", sampler)
    fine = reference.fine_acoustics.generate(
        coarse, **config, codebook_size=16, history_prompt=torched(given), temperature=0.6
    )
    blocks = jnp.asarray(noise.reshape(windows, 6, 2, 16, 16))
    theirs = model.fine_acoustics.generate(coarse, None, None, None, 16, given, temperature=0.6, noise=blocks)
    np.testing.assert_array_equal(theirs, fine)
    assert sampler.probabilities[0].shape[0] == 2 * (16 - first)
    assert (np.asarray(theirs) != model.fine_acoustics.generate(coarse, None, None, None, 16, given)).any()


def test_min_eos_p(tiny):
    """From which probability on speech ends: as the call says, or the checkpoint, which `transformers` ignores."""
    reference, model, _ = tiny
    ids, config = torch.tensor(IDS), reference.generation_config

    def theirs(**options):
        own = stages(reference)["semantic_generation_config"]
        return reference.semantic.generate(ids, own, max_new_tokens=20, **options).numpy()

    lengths = set()
    for threshold in (None, 0.2, 0.05, 0.04, 0.03, 1e-3):
        ours = model.semantic.generate(IDS, max_new_tokens=20, min_eos_p=threshold)
        np.testing.assert_array_equal(ours, theirs(min_eos_p=threshold))
        lengths.add((ours != 40).sum())
    assert len(lengths) > 2
    eager = dataclasses.replace(model.generation_config.semantic_config, min_eos_p=0.0455)
    unasked = model.semantic.generate(IDS, eager, max_new_tokens=20)
    np.testing.assert_array_equal(unasked, theirs(min_eos_p=0.0455))
    config.semantic_config["min_eos_p"] = 0.0455
    try:
        ignoring = reference.generate(ids, semantic_max_new_tokens=20)
        obeying = reference.generate(ids, semantic_max_new_tokens=20, semantic_min_eos_p=0.0455)
    finally:
        config.semantic_config["min_eos_p"] = None
    before, model.generation_config = (
        model.generation_config,
        dataclasses.replace(model.generation_config, semantic_config=eager),
    )
    try:
        ours = model.generate(IDS, semantic_max_new_tokens=20)
    finally:
        model.generation_config = before
    assert ours.shape == obeying.shape != ignoring.shape


def test_beams_and_options_of_the_search(tiny):
    reference, model, _ = tiny
    config = stages(reference)
    options = {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "max_new_tokens": 9}
    theirs = reference.semantic.generate(torch.tensor(IDS), config["semantic_generation_config"], **options)
    ours = model.semantic.generate(IDS, **options)
    np.testing.assert_array_equal(ours, theirs)
    semantic = np.random.default_rng(0).integers(0, 40, (2, 14))
    del options["max_new_tokens"]
    coarse = reference.coarse_acoustics.generate(
        torch.tensor(semantic),
        config["semantic_generation_config"],
        config["coarse_generation_config"],
        16,
        torched(history()),
        **options,
    )
    np.testing.assert_array_equal(
        model.coarse_acoustics.generate(semantic, None, None, 16, history(), **options), coarse
    )


def test_a_history_of_one_token_is_none(tiny):
    """Two semantic tokens are the least that a coarse history can use; of fewer, both originals take all, by [-0:]."""
    reference, model, _ = tiny
    given, config = history(1, 2), stages(reference)
    theirs = reference.coarse_acoustics.preprocess_histories(
        12, 3.0, 1, config["semantic_generation_config"], 16, torched(given)
    )
    assert [x.shape[1] for x in theirs] == [1, 2]
    assert [len(x) for x in model.coarse_acoustics.histories(given, model.generation_config)] == [0, 0]
    given = history(6, 9)
    theirs = reference.coarse_acoustics.preprocess_histories(
        12, 75 / 49.9 * 2, 1, config["semantic_generation_config"], 16, torched(given)
    )
    for ours, wanted in zip(model.coarse_acoustics.histories(given, model.generation_config), theirs, strict=True):
        np.testing.assert_array_equal(ours, wanted[0])


def test_lengths_are_the_originals():
    """Frames for 1 to 768 semantic tokens, in the arithmetic of either original."""
    ids = bark.BarkGenerationConfig()
    ratio = 75 / 49.9 * 2
    for count in range(1, 769):
        suno = int(np.round(np.floor(count * ratio / 2) * 2))
        assert 2 * ids.frames(count) == suno
        assert suno == int(torch.round(torch.floor(torch.tensor([count]) * ratio / 2) * 2).int())


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["bark_small", "bark"])
def test_published_sizes(size):
    ours = getattr(bark.BarkConfig, size)()
    parts = {}
    for name in STAGES:
        parts[name] = dataclasses.asdict(getattr(ours, name))
    theirs = transformers.BarkConfig(**parts, codec_config={})
    count = harness.assert_same_shapes(
        lambda: transformers.BarkModel(theirs), lambda: BarkModel(ours, rngs=nnx.Rngs(0)), hugging_face_table(ours)
    )
    assert round(count / 1e6) == {"bark_small": 413, "bark": 1109}[size]


def test_a_published_size_in_float32():
    """The fine model of `suno/bark-small`: 12 blocks of width 768."""
    config = bark.BarkConfig.bark_small().fine_acoustics_config
    with harness.precision("float32"):
        theirs = transformers.models.bark.BarkFineConfig(**dataclasses.asdict(config))
        reference = harness.randomise(transformers.models.bark.BarkFineModel(theirs))
        model = harness.ported(
            reference, lambda: BarkFineModel(config, rngs=nnx.Rngs(0)), hugging_face_table(config, "BarkFineModel")
        )
        codes = np.random.default_rng(0).integers(0, 1025, (1, 40, 8))
        with torch.no_grad():
            wanted = reference(4, torch.tensor(codes)).logits
        found = jax.jit(lambda m: m(4, jnp.asarray(codes)).logits)(model)
        harness.assert_close(found, wanted, name="logits")


@pytest.mark.parametrize("name", ["BarkSemanticModel", "BarkFineModel"])
def test_dropouts(name):
    fine, kinds = name == "BarkFineModel", transformers.models.bark
    kind, sizes = (kinds.BarkFineConfig, FINE) if fine else (kinds.BarkSemanticConfig, SEMANTIC)
    theirs = kind(**(sizes | {"dropout": 0.3}), attn_implementation="eager")
    reference = harness.randomise(getattr(kinds, name)(theirs))
    config = stage_config(theirs.to_dict(), name, "config.json")
    create = functools.partial(getattr(bark, name), config, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    model = harness.ported(reference, create, hugging_face_table(config, name))
    ids = np.random.default_rng(0).integers(0, 17, (2, 9, 8)) if fine else IDS
    harness.compare_in_training(reference, model, {"input_ids": ids} | ({"codebook_idx": 3} if fine else {}))
