"""The authors' `audiocraft`, as it is on PyPI, without most of what it asks for.

It is pinned to a PyTorch of 2023, and asks for packages that do not matter here (files, clusters, logs). Empty modules
stand in for those, and for its own packages' `__init__`, which would import all of it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch

_ABSENT = ("av", "demucs", "dora", "flashy", "julius", "num2words", "omegaconf", "spacy", "torchaudio", "xformers")
_BARE = ("audiocraft", *(f"audiocraft.{name}" for name in ("data", "losses", "models", "modules", "utils")))


class Spectrogram(torch.nn.Module):
    """torchaudio's, of the squared magnitude, normalised by the window."""

    def __init__(self, n_fft, win_length, hop_length, power, center, pad, normalized):
        super().__init__()
        assert (power, center, pad, normalized) == (2, True, 0, True)
        self.n_fft, self.hop, self.window = n_fft, hop_length, torch.hann_window(win_length)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        z = torch.stft(flat, self.n_fft, self.hop, window=self.window, return_complex=True) / self.window.norm()
        return z.abs().pow(2).reshape(*x.shape[:-1], *z.shape[1:])


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return mock.MagicMock(spec_set=None, __path__=[], __name__=spec.name, __spec__=spec)

    def exec_module(self, module):
        pass


def averager(decay):
    """flashy's: an exponential moving average that is unbiased from the first step on."""
    sums, weights = {}, {}

    def update(metrics):
        for name, value in metrics.items():
            sums[name] = decay * sums.get(name, 0.0) + value.item()
            weights[name] = decay * weights.get(name, 0.0) + 1
        return {name: sums[name] / weights[name] for name in sums}

    return update


def audiocraft(**wanted: str) -> types.SimpleNamespace:
    """Modules of the package, by the names that they are to have."""
    found = importlib.util.find_spec("audiocraft")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the authors' package is not installed: pip install --no-deps audiocraft==1.3.0")
    root = Path(next(iter(found.submodule_search_locations)))
    before = set(sys.modules)
    finder = _StandIns()
    with mock.patch.dict(sys.modules), mock.patch.object(sys, "meta_path", [finder, *sys.meta_path]):
        for name in _BARE:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
        builders = types.ModuleType("audiocraft.models.builders")
        builders.get_debug_compression_model = builders.get_debug_lm_model = None
        builders.get_wrapped_compression_model = lambda codec, config: codec
        loaders = types.ModuleType("audiocraft.models.loaders")
        loaders.load_compression_model = loaders.load_lm_model = None
        sys.modules |= {"audiocraft.models.builders": builders, "audiocraft.models.loaders": loaders}
        importlib.import_module("torchaudio").transforms.Spectrogram = Spectrogram
        importlib.import_module("xformers.ops").unbind = torch.unbind
        flashy = importlib.import_module("flashy")
        flashy.averager, flashy.distrib.average_metrics = averager, lambda metrics, _: metrics
        modules = {key: importlib.import_module(f"audiocraft.{name}") for key, name in wanted.items()}
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in _ABSENT}
    return types.SimpleNamespace(**modules)
