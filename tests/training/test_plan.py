"""`audiozoo plan`: the very step, compiled for TPUs. Without their compiler (libtpu, the extra `tpu`) it is skipped."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from audiozoo.cli import app
from audiozoo.errors import UsageError
from audiozoo.models.wav2vec2_bert import Wav2Vec2BertConfig
from audiozoo.recipes import plan
from audiozoo.recipes.plan import Amount
from audiozoo.training import hlo, tpu
from audiozoo.training.loop import Options, Trainer
from tests.models.random_model import random_model
from tests.training import small_plans as small

pytestmark = pytest.mark.skipif(
    not tpu.compiler_is_there(), reason="the TPU's compiler is not installed: pip install 'audiozoo[tpu]'"
)
MESH = "data=2,fsdp=2"


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """A program that was compiled for one paper is not compiled again for the next, and none with much effort."""
    compile, reports = tpu.compile, {}

    def once(function, *arguments, **keywords):
        lowered = function.lower(*arguments, **keywords)
        text = re.sub(r'jax.result_info = "[^"]*"', "", lowered.as_text())  # names of parameters
        if text not in reports:
            reports[text] = compile(SimpleNamespace(lower=lambda: lowered))
        return reports[text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "compile", once)
        # Random numbers by the TPU's own generator, as the default one is a long program at every dropout; and products
        # as they are outside of tests, in one pass of bfloat16 instead of six.
        quick = {
            "jax_exec_time_optimization_effort": -1.0,
            "jax_default_prng_impl": "rbg",
            "jax_default_matmul_precision": None,
        }
        before = {name: getattr(jax.config, name) for name in quick}
        for name, value in quick.items():
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def mesh():
    return tpu.topology_mesh("v5e:2x2", MESH)


def options(paper):
    # SpeechT5's guided attention loss reads the weights of every layer, which a stack does not give.
    return Options(stack=paper != "speecht5")


@pytest.mark.parametrize("paper", small.CONFIGURATIONS)
def test_every_paper_compiles(paper, mesh):
    """Forward and a step of training for four chips, parameters and moments divided, sums over chips in the step."""
    choice = small.choice(paper)
    report, _ = plan.forward(choice, plan.inputs(choice, small.AMOUNT), mesh, stack=True)
    assert report.fits
    assert report.program.flops > 0
    report, trained = plan.training(choice, small.AMOUNT, mesh, recipe=small.recipe(paper), options=options(paper))
    assert report.fits
    assert trained["optimizer"] > 0
    assert report.program.flops > 0
    assert {"all-reduce", "reduce-scatter"} & {c.kind for c in report.program.collectives}
    line = report.roofline(tpu.chip("v5e"))
    assert 0 < line.seconds < 1


def test_the_command_prints_what_one_chip_needs():
    arguments = ["plan", "bark:bark_small", "--topology=v5e:2x2", f"--mesh={MESH}", "--batch=4", "--seconds=1"]
    changes = ["--config=num_layers=2", "--config=hidden_size=256", "--config=num_heads=4", "--tokens=64"]
    changes += ["--config=input_vocab_size=1024", "--config=output_vocab_size=1024"]
    done = CliRunner().invoke(app, [*arguments, *changes, "--train", "--json"])
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    layer = 4 * 256 * 256 + 2 * 4 * 256 * 256 + 2 * 256
    count = 2 * layer + 256 * (1024 + 1024 + 1024) + 256
    assert told["parameters"] == count
    assert told["chips"] == 4
    assert told["fits"]
    # Parameters are halved over `fsdp`, but for those too short to be; moments are two for each parameter.
    assert count * 4 / 2 <= told["bytes_of_parameters"] < 1.02 * count * 4 / 2
    assert told["bytes_of_optimizer"] == pytest.approx(2 * told["bytes_of_parameters"], rel=1e-3)
    kinds = {c["kind"] for c in told["collectives"]}
    assert "all-gather" in kinds
    products = 2 * (layer - 2 * 256) + 256 * 1024
    assert told["flops"] >= 3 * 2 * products * 64  # one recording of 64 tokens a chip
    assert told["flops"] < 1.2 * 3 * 2 * products * 64
    line = told["roofline"]
    assert line["seconds"] == max(line["compute"], line["memory"], line["network"])
    done = CliRunner().invoke(app, [*arguments, *changes])
    assert re.search(r"parameters +[\d.]+ MB\n", done.stdout)
    assert "it fits" in done.stdout
    assert "https://docs.cloud.google.com/tpu/docs/v5e" in done.stdout


def test_fused_attention_moves_less_and_its_products_are_counted():
    """One causal layer: scores stay on the chip, and the gradient makes them anew in both its kernels."""
    config = {"num_layers": 1, "hidden_size": 256, "num_heads": 8, "input_vocab_size": 256, "output_vocab_size": 256}
    plain, fused = (
        plan.plan(
            "bark:bark_small",
            "v5e:2x2",
            MESH,
            Amount(4, 1.0, 1024),
            train=True,
            config=config,
            options=Options(fused_attention=kernel),
        ).report
        for kernel in (False, True)
    )
    scores = 2 * 1024 * 1024 * 256  # a product, of one recording a chip
    assert fused.program.flops == pytest.approx(plain.program.flops + (2 + 4 + 3 - 6) * scores)
    assert fused.program.bytes < 0.6 * plain.program.bytes


def test_what_is_of_training_is_not_of_a_forward_pass():
    done = CliRunner().invoke(app, ["plan", "bark:bark_small", "--remat=layers"])
    assert isinstance(done.exception, UsageError)
    assert "add --train" in str(done.exception)


def test_what_does_not_fit_is_told():
    """A batch that four chips of 16 GB cannot hold: the compiler's refusal is the answer, not an error."""
    made = plan.plan(
        "bark:bark_small",
        "v5e:2x2",
        "fsdp=4",
        Amount(4096, 1.0, 1024),
        train=True,
        config={"num_layers": 1},
        options=Options(stack=True),
    )
    assert not made.report.fits
    assert made.report.needed > 16e9
    assert "It does not fit" in made.text()
    assert made.as_dict()["fits"] is False


def test_it_is_the_step_that_training_runs():
    """On one CPU: the program of the planned trainer, of shapes alone, is the program of a trainer of arrays."""
    choice, row = small.choice("wav2vec2"), small.recipe("wav2vec2")
    processor = plan._processor(choice, small.AMOUNT)
    planned = plan.trainer(choice, row, processor, None, options=Options(stack=True), dtype=None)
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(planned.abstract()))
    cls = choice.paper.model_class(choice.model_class)
    model = random_model(lambda rngs: cls(choice.config, rngs=rngs))
    task = row.objective.task(model, processor, row.settings, plan.Trainable(frozen=row.settings.frozen))
    trained = Trainer(task, Options(stack=True))
    batch = plan.example(row, choice, processor, small.AMOUNT)
    texts = [t.step.lower(t.abstract(), batch).as_text() for t in (planned, trained)]
    assert texts[0] == texts[1]


def test_mistakes_get_a_sentence():
    amount = Amount(4, 1.0)
    for match, call in {
        "There is no model 'nothing'": lambda: plan.choose("nothing"),
        "has no size 'huge'": lambda: plan.choose("whisper:huge"),
        "is no field of WhisperConfig": lambda: plan.choose("whisper:tiny", config={"width": 3}),
        "There is no topology 'v5e:3x9x2'": lambda: tpu.devices("v5e:3x9x2"),
        "write v5e:8x8": lambda: tpu.devices("gpu:8"),
        "needs 8 devices, and there are 4": lambda: tpu.topology_mesh("v5e:2x2", "data=8"),
        "A batch of 3 cannot be divided among 4": lambda: plan.plan("whisper:tiny", "v5e:2x2", MESH, Amount(3, 1.0)),
        "plan another class": lambda: plan.inputs(plan.choose("bark:bark", "BarkModel"), amount),
    }.items():
        with pytest.raises(UsageError, match=match):
            call()


def test_sizes_of_checkpoints_by_name():
    choice = plan.choose("openai/whisper-large-v3")
    assert (choice.model_class, choice.config.encoder_layers) == ("WhisperForConditionalGeneration", 32)
    shapes = plan.inputs(choice, Amount(2, 30.0, 16))
    assert shapes["input_features"].shape == (2, 128, 3000)
    assert math.prod(shapes["decoder_input_ids"].shape) == 32
    assert jnp.dtype(shapes["input_features"].dtype) == np.float32
    assert hlo.collectives_by_kind([hlo.Collective("all-gather", 2, 8, 3)]) == {"all-gather": (3, 12.0)}


def test_a_translator_may_hear_features():
    choice = plan.choose("xls_r:xls_r_300m")
    config = dataclasses.replace(choice.config, encoder=Wav2Vec2BertConfig.w2v_bert_2(), encoder_type="wav2vec2-bert")
    choice = dataclasses.replace(choice, config=config)
    shapes = plan.inputs(choice, Amount(2, 30.0, 16))
    assert shapes["input_features"].shape == (2, 1500, 160)
    model = choice.create(jnp.float32, jnp.float32)
    assert jax.eval_shape(lambda m, given: m(**given).logits, model, shapes).shape == (2, 16, config.decoder.vocab_size)
