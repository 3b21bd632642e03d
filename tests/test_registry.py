"""The registry against the README, and its look-ups."""

from __future__ import annotations

from pathlib import Path

import pytest

import audiozoo
from audiozoo import registry
from audiozoo.errors import UsageError

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readme_holds_the_generated_table():
    text = README.read_text(encoding="utf-8")
    _, rest = text.split("<!-- papers: audiozoo list --markdown -->\n")
    assert rest.split("<!-- end of papers -->")[0] == registry.markdown_table()


def test_models_are_listed_with_paper_and_licence():
    models = audiozoo.list_models()
    assert len(models) == sum(len(paper.checkpoints) for paper in registry.PAPERS)
    tiny = next(m for m in audiozoo.list_models("whisper") if m.checkpoint == "openai/whisper-tiny.en")
    assert (tiny.paper, tiny.size, tiny.licence) == ("whisper", "tiny_en", "Apache-2.0")


@pytest.mark.parametrize("look_up", [registry.paper, audiozoo.list_models])
def test_a_misspelt_paper_is_met_with_the_nearest(look_up):
    with pytest.raises(UsageError, match="did you mean 'whisper'"):
        look_up("whispr")


def test_a_misspelt_class_is_met_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'WhisperForCausalLM'"):
        registry.paper_of_class("WhisperForCausalML")
