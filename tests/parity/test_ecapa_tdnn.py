"""Speaker verification by ECAPA-TDNN against PyTorch: taps, gradients, padding, and files in Microsoft's names."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

import audiozoo
from audiozoo.errors import CheckpointError
from audiozoo.layers.batch_norm import writable
from audiozoo.models import ecapa_tdnn, hubert, unispeech_sat, wav2vec2, wavlm
from audiozoo.models.ecapa_tdnn import EcapaTdnnConfig
from tests.parity import harness
from tests.parity.harness import blank
from tests.parity.speech_family import LAYER, TINY
from tests.parity.test_wav2vec2 import fairseq_names
from weights_conversion import ecapa_tdnn_names as names
from weights_conversion import hubert as hubert_conversion
from weights_conversion import unispeech_sat as sat_conversion
from weights_conversion import wav2vec2 as wav2vec2_conversion
from weights_conversion import wavlm as wavlm_conversion
from weights_conversion.rules import Table

SMALL = EcapaTdnnConfig(channels=9, aggregated=10, embedding=6, scale=3, bottleneck=5, attention=7)


class ConvReluBn(torch.nn.Module):
    def __init__(self, inputs, outputs, taps=1, dilation=1):
        super().__init__()
        self.conv = torch.nn.Conv1d(inputs, outputs, taps, padding=dilation * (taps // 2), dilation=dilation)
        self.bn = torch.nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(torch.relu(self.conv(x)))


class Res2(torch.nn.Module):
    def __init__(self, channels, dilation, scale):
        super().__init__()
        width = channels // scale
        conv = lambda: torch.nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)  # noqa: E731
        self.convs = torch.nn.ModuleList([conv() for _ in range(scale - 1)])
        self.bns = torch.nn.ModuleList([torch.nn.BatchNorm1d(width) for _ in range(scale - 1)])

    def forward(self, x):
        groups, out, before = x.chunk(len(self.convs) + 1, dim=1), [], 0
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=False):
            before = bn(torch.relu(conv(group + before)))
            out.append(before)
        return torch.cat([*out, groups[-1]], dim=1)


class Block(torch.nn.Module):
    def __init__(self, c, dilation):
        super().__init__()
        self.Conv1dReluBn1 = ConvReluBn(c.channels, c.channels)
        self.Res2Conv1dReluBn = Res2(c.channels, dilation, c.scale)
        self.Conv1dReluBn2 = ConvReluBn(c.channels, c.channels)
        self.SE_Connect = torch.nn.ModuleDict(
            {
                "linear1": torch.nn.Linear(c.channels, c.bottleneck),
                "linear2": torch.nn.Linear(c.bottleneck, c.channels),
            }
        )

    def forward(self, x):
        y = self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x)))
        weights = self.SE_Connect["linear2"](torch.relu(self.SE_Connect["linear1"](y.mean(dim=2))))
        return x + y * torch.sigmoid(weights)[..., None]


class Ecapa(torch.nn.Module):
    """The head as Microsoft's files name it: a computation of its own, from `(states, batch, frames, features)`."""

    def __init__(self, features, states, c):
        super().__init__()
        self.feature_weight = torch.nn.Parameter(torch.zeros(states))
        self.layer1 = ConvReluBn(features, c.channels, 5)
        for index, dilation in enumerate(c.dilations):
            setattr(self, f"layer{index + 2}", Block(c, dilation))
        self.conv = torch.nn.Conv1d(3 * c.channels, c.aggregated, 1)
        seen = c.aggregated * (3 if c.global_context else 1)
        self.pooling = torch.nn.ModuleDict(
            {
                "linear1": torch.nn.Conv1d(seen, c.attention, 1),
                "linear2": torch.nn.Conv1d(c.attention, c.aggregated, 1),
            }
        )
        self.bn = torch.nn.BatchNorm1d(2 * c.aggregated)
        self.linear = torch.nn.Linear(2 * c.aggregated, c.embedding)
        self.context = c.global_context

    def forward(self, states):
        x = torch.einsum("s,sbtc->bct", self.feature_weight.softmax(0), states) + 1e-6
        x = self.layer1(torch.nn.functional.instance_norm(x))
        blocks = []
        for layer in (self.layer2, self.layer3, self.layer4):
            x = layer(x)
            blocks.append(x)
        x = torch.relu(self.conv(torch.cat(blocks, dim=1)))
        seen = x
        if self.context:
            mean, variance = x.mean(dim=2, keepdim=True), x.var(dim=2, keepdim=True)
            seen = torch.cat([x, mean.expand_as(x), (variance + 1e-10).sqrt().expand_as(x)], dim=1)
        alpha = self.pooling["linear2"](torch.tanh(self.pooling["linear1"](seen))).softmax(dim=2)
        mean = (alpha * x).sum(dim=2)
        deviation = ((alpha * x**2).sum(dim=2) - mean**2).clamp(min=1e-9).sqrt()
        return self.linear(self.bn(torch.cat([mean, deviation], dim=1)))


class Head(nnx.Module):
    """Ours from the same states."""

    def __init__(self, features, states, c, rngs):
        self.feature_weight = nnx.Param(jnp.zeros((states,), jnp.float64))
        self.ecapa = ecapa_tdnn.EcapaTdnn(features, c, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, states, mask=None, train=False):
        x = jnp.einsum("s,sbtc->btc", jax.nn.softmax(self.feature_weight[...]), states) + 1e-6
        return self.ecapa(x, mask, train)


HEAD = Table(names.ECAPA, ignored=names._IGNORED)


def heads(config):
    reference = harness.randomise(Ecapa(9, 3, config), 0)
    model = blank(lambda: Head(9, 3, config, nnx.Rngs(0)))
    return reference, harness.port(reference, model, HEAD)


def states(frames=40):
    return np.random.default_rng(0).standard_normal((3, 2, frames, 9))


@pytest.mark.parametrize("config", [SMALL, dataclasses.replace(SMALL, global_context=True)], ids=["released", "paper"])
def test_head_gradients_statistics_and_padding(config):
    reference, model = heads(config)
    x = states()
    # Padding behind a shorter recording is not heard.
    mask = np.arange(40) < np.array([40, 29])[:, None]
    found = jax.jit(lambda m, x, mask: m(x, mask))(model, np.where(mask[None, ..., None], x, 7.0), mask)
    with torch.no_grad():
        for row, length in enumerate((40, 29)):
            alone = reference(torch.tensor(x[:, row : row + 1, :length]))
            harness.assert_close(found[row : row + 1], alone, name=f"embedding of {length} frames")
    if config.global_context:
        return
    # In training the batch's statistics count, and the running ones move.
    reference.train()
    weights = np.random.default_rng(1).standard_normal((2, config.embedding))

    def loss(m):
        graphdef, params, rest = nnx.split(m, nnx.Param, ...)
        return (nnx.merge(graphdef, params, writable(rest))(x, train=True) * weights).sum()

    their_loss = lambda: (reference(torch.tensor(x)) * torch.tensor(weights)).sum()  # noqa: E731
    compared = harness.compare_gradients(reference, their_loss, model, jax.jit(loss), HEAD)
    assert "ecapa.blocks.2.res2.parts.1.conv.kernel" in compared

    @jax.jit
    def moved(m):
        m = nnx.merge(*nnx.split(m))
        m(x, train=True)
        return m

    after = moved(model).ecapa.blocks[0].res2.parts[1].norm
    wanted = reference.layer2.Res2Conv1dReluBn.bns[1]
    harness.assert_close(after.mean, wanted.running_mean, name="running mean")
    harness.assert_close(after.var, wanted.running_var, name="running variance")


# --- files -----------------------------------------------------------------------------------------------------------

FAMILIES = {
    "WavLM": (wavlm, wavlm_conversion.microsoft_table, {}),
    "UniSpeechSat": (unispeech_sat, sat_conversion.microsoft_table, {"spk_proj.weight": (3, 4)}),
    "Hubert": (hubert, hubert_conversion.hubert_fairseq_table, {"label_embs_concat": (5, 4)}),
    "Wav2Vec2": (
        wav2vec2,
        wav2vec2_conversion.fairseq_table,
        {"quantizer.vars": (1, 6, 4), "project_q.weight": (4, 8)},
    ),
}
ENCODER = TINY | LAYER | {"hidden_size": 32, "num_attention_heads": 16, "intermediate_size": 24}
ENCODER |= {"conv_dim": (8,) * 7, "num_conv_pos_embedding_groups": 4, "num_hidden_layers": 2}
ENCODER |= {k: transformers.Wav2Vec2Config().to_dict()[k] for k in ("conv_kernel", "conv_stride")}
GATES = {
    "gru_rel_pos_linear": "grep_linear",
    "gru_rel_pos_const": "grep_a",
    "rel_attn_embed": "relative_attention_bias",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_microsofts_files(family, tmp_path, monkeypatch):
    """`wavlm_large_finetune.pth` and its likes: recognised, read strictly, and the same embeddings as PyTorch's."""
    models, make_table, more = FAMILIES[family]
    cls = getattr(models, f"{family}ForSpeakerVerification")
    monkeypatch.setattr(wav2vec2.Wav2Vec2ForSpeakerVerification, "ecapa_config", SMALL)
    with harness.precision("float32"):
        their_config = getattr(transformers, f"{family}Config")(**ENCODER, attn_implementation="eager")
        encoder = harness.randomise(getattr(transformers, f"{family}Model")(their_config), 5, torch.float32)
        head = harness.randomise(Ecapa(32, 3, SMALL), 6, torch.float32)
        inside = fairseq_names(encoder.state_dict(), layered=True)
        for theirs, original in GATES.items():
            inside = {name.replace(theirs, original): value for name, value in inside.items()}
        inside |= {name: torch.zeros(shape) for name, shape in more.items()}
        state = {names.FRONT + name: value for name, value in inside.items()} | head.state_dict()
        state["loss_calculator.projection.weight"] = torch.zeros(3, 2)
        path = tmp_path / "finetune.pth"
        torch.save({"model": state, "best_valid_eer": 0.0}, path)
        model = audiozoo.load(path)
        assert type(model) is cls
        assert model.config.num_attention_heads == 16
        assert model.config.do_stable_layer_norm
        if family == "WavLM":  # their layers are mixed alike
            x = np.random.default_rng(2).standard_normal((1, 4000)).astype(np.float32)
            with torch.no_grad():
                out = encoder(torch.tensor(x), output_hidden_states=True)
                wanted = head(torch.stack([*out.hidden_states[:-1], out.last_hidden_state]))
            harness.assert_close(jax.jit(lambda m: m(x).embeddings)(model), wanted, name="embedding")
        # The way back, to the bit.
        from audiozoo.loading import variables

        table = names.table(make_table(model.config, f"{family}Model"), models.__name__.rpartition(".")[2])
        back = dict(table.write({n: v[...] for n, v in variables(model).items()}))
        known = {table.today(name): value for name, value in state.items()}
        assert all(any(i.search(n) for i in map(_pattern, names._IGNORED)) for n in set(known) - set(back))
        for name, value in back.items():
            np.testing.assert_array_equal(value, known[name], err_msg=name)
        del state["layer3.conv.weight" if "layer3.conv.weight" in state else "layer3.SE_Connect.linear1.weight"]
        torch.save({"model": state}, path)
        with pytest.raises(CheckpointError, match=r"ecapa\.blocks\.1\.squeeze"):
            audiozoo.load(path)


def _pattern(ignore):
    import re

    return re.compile(rf"^(?:{ignore.pattern})$")


def test_the_published_file_has_so_many_tensors():
    """WavLM Large's has 711: the mixing weights, 488 of the encoder, 221 of the head and the classifier's one."""
    config = wavlm.WavLMConfig.large()
    model = harness.abstract(lambda: wavlm.WavLMForSpeakerVerification(config, rngs=nnx.Rngs(0)))
    from audiozoo.loading import variables

    table = names.table(wavlm_conversion.microsoft_table(config, "WavLMModel"), "wavlm")
    foreign = [name for step in table.steps_for(variables(model)) for name in step.foreign]
    assert sum(name.startswith(names.FRONT) for name in foreign) == 488
    norms = sum(name.endswith(".running_mean") for name in foreign)  # each has num_batches_tracked beside it
    assert len(foreign) + norms + 1 == 711
