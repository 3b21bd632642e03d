"""Speech2Text2: no `transformers` of today has it, so the originals are PyTorch's own layers, and 4.40.2 where it is.

PyTorch's Transformer decoder keeps no keys and values between tokens, so there the forward over whole texts is timed.
For whole translations, behind the wav2vec 2.0 of today's `transformers`, the same blocks are written with PyTorch's
functions, keys and values kept: less than a `generate` has to do. The last `transformers` that had the model runs in a
process of its own, of an interpreter that AUDIOZOO_TRANSFORMERS_4_40 names (tests/golden/cases/speech_to_text_2.py says
how to make one); as all contenders it has its turn alone, on as many threads.
"""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.framework import Case, Factory, Run, dtype, random_model, same_tokens, tensor, threads, within
from benchmarks.wav2vec2 import waves

TOKENS, FRAMES = 48, 500
OLD = os.environ.get("AUDIOZOO_TRANSFORMERS_4_40", "")


@functools.lru_cache(maxsize=1)
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of eight texts, and what the encoder makes of ten seconds for each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 10_000, (8, TOKENS)).astype(np.int32)
    return tokens, rng.standard_normal((8, FRAMES, 256)).astype(np.float32)


@functools.lru_cache(maxsize=1)
def both() -> tuple[Any, dict[str, np.ndarray]]:
    """Ours with random weights, and the weights under their foreign names."""
    from audiozoo.loading import variables
    from audiozoo.models.speech_to_text_2 import Speech2Text2Config, Speech2Text2ForCausalLM
    from weights_conversion.speech_to_text_2 import hugging_face_table

    config = Speech2Text2Config.covost_en_de()
    table = hugging_face_table(config)
    model = random_model(Speech2Text2ForCausalLM, config, table)
    return model, dict(table.write({name: np.asarray(v[...]) for name, v in variables(model).items()}))


def our_forward() -> Run:
    import jax

    import audiozoo

    tokens, memory = map(jax.numpy.asarray, inputs())
    run = audiozoo.jit(both()[0])
    return lambda: np.asarray(run(tokens, None, memory).logits)


def their_forward() -> Run:
    import torch

    from audiozoo.layers import fairseq_sinusoids

    torch.set_num_threads(threads())
    model, state = both()
    config = model.config
    tokens, memory = map(tensor, inputs())
    layers = []
    for i in range(config.decoder_layers):
        at = f"model.decoder.layers.{i}."
        layer = torch.nn.TransformerDecoderLayer(
            config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim, 0.0, batch_first=True
        ).eval()
        given: dict[str, Any] = {}
        for ours, theirs in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
            for kind in ("weight", "bias"):
                parts = [state[f"{at}{theirs}.{p}_proj.{kind}"] for p in "qkv"]
                given[f"{ours}.in_proj_{kind}"] = tensor(np.concatenate(parts))
                given[f"{ours}.out_proj.{kind}"] = tensor(state[f"{at}{theirs}.out_proj.{kind}"])
        names = {"linear1": "fc1", "linear2": "fc2", "norm1": "self_attn_layer_norm"}
        names |= {"norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
        for o, t in names.items():
            given |= {f"{o}.{k}": tensor(state[f"{at}{t}.{k}"]) for k in ("weight", "bias")}
        layer.load_state_dict(given)
        layers.append(layer)
    embedding = tensor(state["model.decoder.embed_tokens.weight"])
    head = tensor(state["lm_head.weight"])
    positions = tensor(fairseq_sinusoids(TOKENS + 2, config.d_model)[2:].astype(np.float32))
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)

    def run() -> Any:
        with torch.inference_mode():
            x = embedding[tokens.long()] * config.d_model**0.5 + positions
            for layer in layers:
                x = layer(x, memory, tgt_mask=causal)
            return (x @ head.T).numpy()

    return run


# --- whole translations ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def translator() -> Any:
    """wav2vec 2.0 LARGE and the decoder of English to German, random weights."""
    from audiozoo.models.speech_to_text_2 import Speech2Text2Config
    from audiozoo.models.wav2vec2 import Wav2Vec2Config
    from audiozoo.models.xls_r import SpeechEncoderDecoderConfig, SpeechEncoderDecoderModel
    from weights_conversion.xls_r import hugging_face_table

    parts = (Wav2Vec2Config.large_lv60(), Speech2Text2Config.covost_en_de(), "wav2vec2", "speech_to_text_2")
    config = SpeechEncoderDecoderConfig(*parts)
    return random_model(SpeechEncoderDecoderModel, config, hugging_face_table(config, "SpeechEncoderDecoderModel"))


@functools.lru_cache(maxsize=1)
def exported() -> tempfile.TemporaryDirectory[str]:
    """A Hugging Face directory of it."""
    import audiozoo

    directory = tempfile.TemporaryDirectory()
    audiozoo.export(translator(), Path(directory.name) / "model")
    return directory


def our_translation(beams: int) -> Run:
    x, options = waves(1, 10), {"num_beams": beams, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    return lambda: np.asarray(translator().generate(x, **options))[0, 1:]


def written_in_pytorch() -> Run:
    """Greedy search with PyTorch's functions; the encoder is `transformers`'."""
    import torch
    import torch.nn.functional as F
    import transformers
    from safetensors.torch import load_file

    from audiozoo.layers import fairseq_sinusoids

    torch.set_num_threads(threads())
    directory = Path(exported().name) / "model"
    kind = getattr(torch, dtype())
    w = {name: value.to(kind) for name, value in load_file(directory / "model.safetensors").items()}
    config, ours = translator().config.decoder, translator().config.encoder
    names = set(transformers.Wav2Vec2Config().to_dict()) - {"id2label"}
    sizes = transformers.Wav2Vec2Config(
        **{k: v for k, v in vars(ours).items() if k in names}, attn_implementation="eager"
    )
    encoder = transformers.Wav2Vec2Model(sizes).to(kind).eval()
    own = {k.removeprefix("encoder."): v for k, v in w.items() if k.startswith("encoder.")}
    missing, unexpected = encoder.load_state_dict(own, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"masked_spec_embed"}, missing
    x, heads = tensor(waves(1, 10)), config.decoder_attention_heads
    positions = tensor(fairseq_sinusoids(TOKENS + 4, config.d_model)[2:].astype(np.float32))
    table = w["decoder.model.decoder.embed_tokens.weight"]
    blocks = [f"decoder.model.decoder.layers.{i}." for i in range(config.decoder_layers)]

    def linear(x: Any, name: str) -> Any:
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x: Any, name: str) -> Any:
        return F.layer_norm(x, (config.d_model,), w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x: Any) -> Any:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(x: Any, name: str, key: Any, value: Any) -> Any:
        y = F.scaled_dot_product_attention(split(linear(x, f"{name}.q_proj")), key, value)
        return linear(y.transpose(1, 2).flatten(2), f"{name}.out_proj")

    def run() -> Any:
        with torch.inference_mode():
            memory = linear(encoder(x).last_hidden_state, "enc_to_dec_proj")
            source = [[split(linear(memory, f"{at}encoder_attn.{p}_proj")) for p in "kv"] for at in blocks]
            past: list[Any] = [None] * len(blocks)
            token, said = torch.tensor([[config.eos_token_id]]), []
            for t in range(TOKENS):
                y = table[token] * config.d_model**0.5 + positions[t]
                for i, at in enumerate(blocks):
                    new = [split(linear(y, f"{at}self_attn.{p}_proj")) for p in "kv"]
                    past[i] = new if t == 0 else [torch.cat(pair, 2) for pair in zip(past[i], new, strict=True)]
                    y = norm(y + attend(y, f"{at}self_attn", *past[i]), f"{at}self_attn_layer_norm")
                    y = norm(y + attend(y, f"{at}encoder_attn", *source[i]), f"{at}encoder_attn_layer_norm")
                    y = norm(y + linear(F.relu(linear(y, f"{at}fc1")), f"{at}fc2"), f"{at}final_layer_norm")
                logits = linear(y, "decoder.lm_head")
                if t < TOKENS - 1:
                    logits[..., config.eos_token_id] = -torch.inf
                    token = logits[:, -1:].argmax(-1)
                else:  # what is cut short ends all the same
                    token = torch.tensor([[config.eos_token_id]])
                said.append(int(token))
        return np.asarray(said)

    return run


SERVER = """
import sys, numpy as np, torch, transformers
directory, audio, threads, dtype, beams, tokens = sys.argv[1:]
torch.set_num_threads(int(threads))
kind = getattr(torch, dtype)
model = transformers.SpeechEncoderDecoderModel.from_pretrained(directory).to(kind).eval()
x = torch.from_numpy(np.load(audio)).to(kind)
options = {"num_beams": int(beams), "max_new_tokens": int(tokens), "min_new_tokens": int(tokens), "do_sample": False}
for _ in sys.stdin:
    with torch.inference_mode():
        print(*model.generate(x, forced_eos_token_id=2, **options)[0, 1:].tolist(), flush=True)
"""


def old_transformers(beams: int) -> Run:
    """Each call asks a process of that version for a translation, and waits for its tokens."""
    audio = Path(exported().name) / "audio.npy"
    np.save(audio, waves(1, 10))
    arguments = [Path(exported().name) / "model", audio, threads(), dtype(), beams, TOKENS]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [OLD, "-c", SERVER, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept,
    )  # fmt: skip
    asked, told = process.stdin, process.stdout
    assert asked is not None
    assert told is not None

    def run() -> Any:
        asked.write("once more\n")
        asked.flush()
        line = told.readline()
        if not line:
            raise RuntimeError(f"{OLD} ended with {process.wait()}")
        return np.asarray(list(map(int, line.split())))

    return run


def originals(beams: int) -> dict[str, Factory]:
    """Those that there are; the target is about the first."""
    found: dict[str, Factory] = {}
    if OLD:
        found["transformers 4.40.2"] = functools.partial(old_transformers, beams)
    if beams == 1:
        found["PyTorch, keys and values kept"] = written_in_pytorch
    return found


CASES = (
    Case(
        f"forward, 8 texts of {TOKENS} tokens, memory of 10 s",
        our_forward,
        {"torch.nn.TransformerDecoderLayer": their_forward},
        target=1.0,
        agreement=within(1e-3),
    ),
    *(
        Case(
            f"translate 10 s into {TOKENS} tokens, {beams} beam{'s' if beams > 1 else ''}",
            functools.partial(our_translation, beams),
            originals(beams),
            target=2.0,
            agreement=same_tokens,
            repeats=3,
        )
        for beams in ((1, 5) if OLD else (1,))
    ),
)
