"""A step of training against `transformers` (eager): forward, backward and AdamW, the loop's own compiled step.

Published sizes, random weights, batches of full length, dropout off on both sides so that the losses can be compared:
that of the first step, which shows forward and loss, and that of the second, which shows gradients and optimiser. One
row has the dropout that wav2vec 2.0 was trained with, and compares times alone. PyTorch's AdamW is its default, tensor
by tensor, and in a second column the fused one.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks import wav2vec2, whisper
from benchmarks.framework import Case, Run, random_model, threads

RATE, LEARNING_RATE, DECAY = 16_000, 1e-4, 0.01
CLASSES = {"wav2vec2": "Wav2Vec2ForCTC", "whisper": "WhisperForConditionalGeneration"}
CONVOLUTIONS = r"\.feature_extractor\."
LETTERS, TOKENS = 40, 64
DROPOUT = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout")
STILL = dict.fromkeys((*DROPOUT, "layerdrop", "mask_time_prob", "mask_feature_prob", "dropout"), 0.0)


def batch(paper: str, rows: int, seconds: int) -> dict[str, np.ndarray]:
    """Noise and random labels."""
    rng = np.random.default_rng(2)
    if paper == "wav2vec2":
        values = rng.standard_normal((rows, seconds * RATE)).astype(np.float32)
        labels = rng.integers(5, 32, (rows, LETTERS)).astype(np.int32)
        return {"input_values": values, "attention_mask": np.ones(values.shape, np.int32), "labels": labels}
    features = rng.uniform(-1, 1.5, (rows, 80, 100 * seconds)).astype(np.float32)
    return {"input_features": features, "labels": rng.integers(0, 50_000, (rows, TOKENS)).astype(np.int32)}


def losses(step: Any) -> Run:
    """One step a call; the first call takes two and returns both losses."""
    calls: Iterator[int] = iter((2,))
    return lambda: [float(step()) for _ in range(next(calls, 1))]


def our_step(paper: str, size: str, rows: int, seconds: int, frozen: str | None, dropout: bool) -> Run:
    from audiozoo import registry
    from audiozoo.recipes.objectives import CTC, Seq2Seq
    from audiozoo.recipes.settings import Settings
    from audiozoo.training.loop import Trainer
    from audiozoo.training.parameters import Trainable

    row, name = registry.paper(paper), CLASSES[paper]
    config = getattr(row.config_class, size)()
    if not dropout:
        known = {f.name for f in dataclasses.fields(config)}
        config = dataclasses.replace(config, **{n: v for n, v in STILL.items() if n in known})
    table = importlib.import_module(f"weights_conversion.{paper}").hugging_face_table(config, name)
    model = random_model(row.model_class(name), config, table, wav2vec2.SEED)
    settings = Settings("the same on both sides", 1000, rows, LEARNING_RATE, weight_decay=DECAY)
    objective = CTC() if paper == "wav2vec2" else Seq2Seq(features="given")
    task = objective.task(model, SimpleNamespace(), settings, Trainable(frozen=frozen))
    trainer = Trainer(task)
    state, data = trainer.init(), trainer.put(batch(paper, rows, seconds))

    def step() -> Any:
        nonlocal state
        state, metrics = trainer.step(state, data)
        return metrics["loss"]

    return losses(step)


def their_step(paper: str, size: str, rows: int, seconds: int, frozen: bool, dropout: bool, fused: bool) -> Run:
    import copy

    import torch

    torch.set_num_threads(threads())
    theirs = copy.deepcopy((wav2vec2 if paper == "wav2vec2" else whisper).original(size))
    if paper == "wav2vec2":
        theirs.config.ctc_loss_reduction = "mean"  # labels are of one length: the mean over letters
    if not dropout:
        for name in STILL:
            if hasattr(theirs.config, name):
                setattr(theirs.config, name, 0.0)
        for module in theirs.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("dropout", "dropout_p", "activation_dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    theirs.train()
    if frozen:
        theirs.freeze_feature_encoder()
    parameters = [p for p in theirs.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": DECAY}]
    groups += [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, fused=fused or None)
    data = {name: torch.from_numpy(array) for name, array in batch(paper, rows, seconds).items()}
    data["labels"] = data["labels"].long()

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = theirs(**data).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return losses(step)


def same_losses(ours: Any, theirs: Any) -> str:
    """The losses of two steps are equal to float32's rounding."""
    apart = np.abs(np.asarray(ours) - theirs) / np.abs(theirs)
    if apart.max() > 1e-3:
        raise AssertionError(f"the losses are {ours} and {theirs}")
    return f"losses {theirs[0]:.4f}, {theirs[1]:.4f}; max diff {apart.max():.0e}"


def case(
    name: str,
    paper: str,
    size: str,
    rows: int,
    seconds: int,
    *,
    frozen: str | None = None,
    dropout: bool = False,
    repeats: int = 5,
) -> Case:
    """A row."""
    references = {
        label: functools.partial(their_step, paper, size, rows, seconds, frozen is not None, dropout, fused)
        for label, fused in (("transformers", False), ("transformers, fused AdamW", True))
    }
    ours = functools.partial(our_step, paper, size, rows, seconds, frozen, dropout)
    return Case(name, ours, references, 1.3, None if dropout else same_losses, repeats)


CASES = (
    case("wav2vec 2.0 base, CTC, 4 x 5 s, convolutions frozen", "wav2vec2", "base", 4, 5, frozen=CONVOLUTIONS),
    case("wav2vec 2.0 base, CTC, 4 x 5 s, all trained", "wav2vec2", "base", 4, 5),
    case(
        "wav2vec 2.0 base, CTC, 4 x 5 s, frozen, dropout", "wav2vec2", "base", 4, 5, frozen=CONVOLUTIONS, dropout=True
    ),
    case("Whisper tiny, 4 x 30 s, 64 tokens", "whisper", "tiny", 4, 30),
)
