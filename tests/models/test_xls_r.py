"""XLS-R: its published sizes, by shapes, and its sampling of languages."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from audiozoo.models import xls_r
from audiozoo.models.xls_r import XLSRConfig


@pytest.mark.parametrize(
    ("size", "width", "head"), [("xls_r_300m", 1024, 64), ("xls_r_1b", 1280, 80), ("xls_r_2b", 1920, 120)]
)
def test_sizes(size, width, head):
    config = getattr(XLSRConfig, size)()
    assert config.hidden_size == width
    assert config.hidden_size // config.num_attention_heads == head
    assert config.do_stable_layer_norm


def test_small_languages_are_drawn_more_often():
    hours = [900.0, 90.0, 10.0]
    np.testing.assert_allclose(xls_r.language_probabilities(hours, 1.0), [0.9, 0.09, 0.01], rtol=1e-6)
    np.testing.assert_allclose(xls_r.language_probabilities(hours, 0.0), [1 / 3] * 3, rtol=1e-6)
    half = np.sqrt([0.9, 0.09, 0.01])
    wanted = half / half.sum()
    np.testing.assert_allclose(xls_r.language_probabilities(hours, 0.5), wanted, rtol=1e-6)
    drawn = np.bincount(xls_r.sample_languages(jax.random.key(0), hours, 0.5, 20_000), minlength=3) / 20_000
    np.testing.assert_allclose(drawn, wanted, atol=0.01)
    with pytest.raises(ValueError, match="more than 0 hours"):
        xls_r.language_probabilities([1.0, 0.0], 0.5)
