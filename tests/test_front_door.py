"""What `import audiozoo` offers, and what it says to a call that makes no sense."""

from __future__ import annotations

import subprocess
import sys

import jax
import pytest
from flax import nnx

import audiozoo
from audiozoo.layers import Linear


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
@pytest.mark.parametrize("dtype", ["bf16", "int8", 3])
def test_a_dtype_that_is_none_is_refused_before_anything_is_read(name, dtype):
    with pytest.raises(audiozoo.UsageError, match="is no dtype of a model; take float32"):
        audiozoo.load("no/such", **{name: dtype})


@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_float64_is_not_rounded_without_a_word(name):
    with jax.enable_x64(False), pytest.raises(audiozoo.UsageError, match=r"float64 needs .*jax_enable_x64"):
        audiozoo.load("no/such", **{name: "float64"})
    with jax.enable_x64(True), pytest.raises(audiozoo.SourceError):
        audiozoo.load("no such", **{name: "float64"})


def test_a_head_to_draw_is_named_by_a_regular_expression():
    with pytest.raises(audiozoo.UsageError, match=r"initialize='\(' is not a regular expression"):
        audiozoo.load("no/such", initialize="(")


def test_only_what_can_be_called_is_compiled():
    with pytest.raises(audiozoo.UsageError, match="A Linear has no method 'generat'"):
        audiozoo.jit(Linear(2, 3, rngs=nnx.Rngs(0)), "generat")


def test_what_compiles_itself_is_not_compiled():
    class Writer(nnx.Module):
        def generate(self):
            return None

    with pytest.raises(audiozoo.UsageError, match="generate compiles its own loop"):
        audiozoo.jit(Writer(), "generate")


@pytest.mark.parametrize("write", [audiozoo.save, audiozoo.export])
def test_a_processor_that_is_not_there_is_missed_before_anything_is_written(write, tmp_path):
    with pytest.raises(audiozoo.SourceError, match="no directory with a processor's files"):
        write(Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path / "out", processor_from=tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_an_authors_vocabulary_goes_along(tmp_path):
    for name in ("dict.ltr.txt", "multilingual.tiktoken", "notes.txt"):
        (tmp_path / name).write_text("")
    assert {file.name for file in audiozoo._processor_files(tmp_path)} == {"dict.ltr.txt", "multilingual.tiktoken"}


def test_submodules_are_there_when_they_are_asked_for():
    wanted = "audiozoo.audio.read, audiozoo.sharding.make_mesh, audiozoo.packaged.whisper"
    program = f"import audiozoo; print(*(found.__name__ for found in ({wanted})))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["read", "make_mesh", "whisper"], done.stderr
    with pytest.raises(AttributeError, match="no attribute 'adio'"):
        _ = audiozoo.adio
