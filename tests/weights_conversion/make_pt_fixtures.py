"""Writes the PyTorch files in `data/`, which the tests read without PyTorch (made with torch 2.13, omegaconf 2.4).

    python tests/weights_conversion/make_pt_fixtures.py

Every ramp is `arange(n) / 8 - 1` in the dtype of its tensor, which `test_readers.py` computes with NumPy.
"""

import argparse
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

DATA = Path(__file__).parent / "data"


def ramp(*shape, dtype=torch.float32):
    return (torch.arange(int(np.prod(shape)), dtype=torch.float64) / 8 - 1).to(dtype).reshape(shape)


def views():
    base = ramp(6, 4)
    return OrderedDict(
        base=base,
        transposed=base.T,
        shared_row=base[2],
        stepped=base[::2, 1::2],
        half=ramp(3, 5, dtype=torch.float16),
        bfloat16=ramp(3, 5, dtype=torch.bfloat16),
        double=ramp(2, 3, dtype=torch.float64),
        integers=torch.arange(7),
        flags=torch.tensor([True, False, True]),
        scalar=torch.tensor(2.5),
        empty=torch.zeros(0, 3),
        expanded=torch.tensor([1.5]).expand(4),
        parameter=torch.nn.Parameter(ramp(2, 2)),
        complex=torch.complex(ramp(3), ramp(3)).conj(),
        float8=ramp(4, dtype=torch.float8_e4m3fn),
        unsigned16=torch.arange(5).to(torch.uint16),
    )


def fairseq():
    module = types.ModuleType("fairseq.data.dictionary")

    class Dictionary:
        def __init__(self):
            self.symbols, self.indices = ["<s>", "|", "E"], {"<s>": 0, "|": 1, "E": 2}

    Dictionary.__module__, Dictionary.__qualname__ = module.__name__, "Dictionary"
    module.Dictionary = Dictionary
    sys.modules.update({"fairseq": types.ModuleType("fairseq"), "fairseq.data": types.ModuleType("fairseq.data")})
    sys.modules[module.__name__] = module
    return {
        "args": argparse.Namespace(arch="wav2vec2", encoder_layers=2, extra=[1, (2, 3)]),
        "cfg": OmegaConf.create({"model": {"_name": "hubert", "layers": [1, 2], "dropout": 0.1, "path": None}}),
        "model": OrderedDict({"encoder.weight": ramp(2, 3), "encoder.bias": ramp(3)}),
        "task_state": {"target_dictionary": Dictionary()},
        "optimizer_history": [{"num_updates": 7, "loss": np.float64(1.25)}],
        "last_optimizer_state": {"state": {0: {"exp_avg": ramp(3)}}, "moments": [ramp(2), ramp(3)]},
        "statistics": np.arange(6, dtype=np.float32).reshape(2, 3),
    }


def openai():
    return {
        "dims": {"n_mels": 80, "n_audio_ctx": 1500},
        "model_state_dict": {"encoder.conv1.weight": ramp(2, 3, 3, dtype=torch.float16)},
    }


def main():
    DATA.mkdir(exist_ok=True)
    torch.save(views(), DATA / "views.pt")
    old = {name: tensor for name, tensor in views().items() if name not in ("float8", "unsigned16")}
    torch.save(old, DATA / "views_legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(fairseq(), DATA / "fairseq.pt")
    torch.save(fairseq(), DATA / "fairseq_protocol4.pt", pickle_protocol=4)
    torch.save(openai(), DATA / "openai.pt")
    torch.save(openai(), DATA / "openai_legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
