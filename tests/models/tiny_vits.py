"""A VITS small enough to compile in a second, with random weights everywhere."""

from __future__ import annotations

import dataclasses
import functools

from audiozoo.models.vits import VitsConfig, VitsModel
from tests.models.random_model import random_model

CONFIG = VitsConfig(
    vocab_size=28,
    hidden_size=16,
    num_hidden_layers=1,
    window_size=2,
    ffn_dim=16,
    flow_size=8,
    spectrogram_bins=33,
    num_speakers=3,
    speaker_embedding_size=4,
    upsample_initial_channel=16,
    upsample_rates=(4, 2),
    upsample_kernel_sizes=(8, 4),
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1, 2),),
    resblock="2",
    depth_separable_num_layers=1,
    duration_predictor_num_flows=2,
    prior_encoder_num_flows=1,
    prior_encoder_num_wavenet_layers=1,
    posterior_encoder_num_wavenet_layers=2,
    speaking_rate=0.25,
)
# With durations that are not sampled, and half as much to compile.
PLAIN = dataclasses.replace(CONFIG, use_stochastic_duration_prediction=False, duration_predictor_filter_channels=8)


@functools.cache
def build(config: VitsConfig = CONFIG) -> VitsModel:
    """The model."""
    return random_model(lambda rngs: VitsModel(config, rngs=rngs))
