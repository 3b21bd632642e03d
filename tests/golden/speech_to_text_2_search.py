"""Golden searches and gradients of Speech2Text2: `python -m tests.golden.speech_to_text_2_search`.

Tokens of greedy and beam search, every parameter's gradient summarised, and texts of the tokenizer, by
`transformers` 4.40.2 in float64 (see `cases/speech_to_text_2.py` for how to get it). Tokens do not survive half
precision, hence a file beside that of the case.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).with_suffix(".npz")
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1, "max_length": 12},
    "beam": {"num_beams": 5, "max_length": 12, "num_return_sequences": 3},
    "penalty": {"num_beams": 3, "max_length": 10, "length_penalty": 0.5, "no_repeat_ngram_size": 2},
    "early": {"num_beams": 4, "max_length": 9, "early_stopping": True, "forced_eos_token_id": 2},
}
TOKENS = [
    "<s>", "<pad>", "</s>", "<unk>", "der@@", "hund", "l@@", "äu@@", "ft", ".", ",", "er", "'s", "'", "d@@", "e@@", "r",
]  # fmt: skip
VOCABULARY = {token: index for index, token in enumerate(TOKENS)}
MERGES = [("d", "e"), ("de", "r</w>"), ("h", "u"), ("f", "t</w>"), ("ä", "u"), ("e", "r</w>")]
DECODED = [[0, 5, 9, 2, 1, 1], [4, 5, 6, 7, 8, 10, 11, 12, 9, 2], [11, 13, 5, 3, 6], [2, 14, 15, 16]]
ENCODED = ["Der hund läuft .", "der", "  er   läuft xyz", "d"]


def summary(gradient: np.ndarray) -> np.ndarray:
    """Its norm, its sum, and its product with 1, 2, 3 …, which tells a transposed one."""
    flat = np.asarray(gradient, np.float64).reshape(-1)
    return np.array([np.sqrt(np.sum(flat**2)), flat.sum(), flat @ np.arange(1, 1 + flat.size)])


def main() -> None:
    """Run the original and write the file."""
    import torch
    import transformers

    from tests.golden.cases import speech_to_text_2 as case
    from tests.parity import harness

    arrays: dict[str, np.ndarray] = {}
    with harness.precision("float64"):
        model = case.with_exact_positions(harness.randomise(case.reference(), case.case().seed))
        x = {name: torch.from_numpy(array) for name, array in case.inputs().items()}
        x["labels"] = x["labels"].long()
        model(**x).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                arrays[f"gradient.{name}"] = summary(parameter.grad.numpy())
        del x["labels"]
        for name, options in SEARCHES.items():
            with torch.no_grad():
                found = model.generate(**x, **case.SPECIAL, **options, do_sample=False)
            arrays[f"tokens.{name}"] = found.numpy().astype(np.int32)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(VOCABULARY))
        (Path(folder) / "merges.txt").write_text("".join(f"{a} {b}\n" for a, b in MERGES))
        both = {"vocab_file": f"{folder}/vocab.json", "do_lower_case": True}
        tokenizer = transformers.Speech2Text2Tokenizer(**both, merges_file=f"{folder}/merges.txt")
        texts = {
            "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in DECODED],
            "untidied": [tokenizer.decode(i, clean_up_tokenization_spaces=False) for i in DECODED],
            "encoded": [tokenizer(text)["input_ids"] for text in ENCODED],
        }
    with torch.device("meta"):
        sizes = {"vocab_size": 10_224, "decoder_layers": 7}
        decoder = transformers.Speech2Text2Config(**sizes, tie_word_embeddings=False)
        count = sum(p.numel() for p in transformers.Speech2Text2ForCausalLM(decoder).parameters() if p.requires_grad)
    texts["parameters"] = count
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    np.savez_compressed(PATH, texts=json.dumps(texts), versions=json.dumps(versions), **arrays)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
