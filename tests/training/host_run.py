"""One of several processes that train together; alone without an address.

python -m tests.training.host_run DIRECTORY [HOST:PORT,COUNT,INDEX]
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import audiozoo
from audiozoo import sharding
from audiozoo.recipes import recipe, run
from audiozoo.training import hosts
from audiozoo.training.loop import Options
from tests.training import tiny


def main(directory, address=""):
    if address:
        hosts.connect(address)
    # Kernels of 4,096 numbers are divided among the hosts (`fsdp`), all of them within a host (`tensor`), when read.
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
    model = audiozoo.load(Path(directory) / "init", param_dtype="float64", mesh=mesh, rules=sharding.TRAINING_RULES)
    kernel = model.wav2vec2.encoder.layers[0].feed_forward.intermediate_dense.kernel[...]
    assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}
    losses = []
    settings = {
        "batch_size": 8,
        "steps": 4,
        "held_steps": 0,
        "learning_rate": 1e-2,
        "schedule": "constant",
        "warmup": 0,
        "epsilon": 1e-5,  # the bias of keys has no gradient: Adam would divide rounding by rounding
    }
    trained = run.train(
        recipe("wav2vec2_ctc"),
        Path(directory) / "set.jsonl",
        Path(directory) / ("alone" if not address else "together"),
        model=model,
        processor=tiny.PROCESSOR,
        settings=settings,
        mesh=mesh,
        options=Options(average=0.9),
        evaluation=Path(directory) / "held.jsonl",
        evaluate_every=2,
        log_every=1,
        report=lambda step, metrics: losses.append([step, metrics]),
    )
    total = sum(float(np.abs(np.asarray(leaf)).sum()) for leaf in jax.tree.leaves(trained))
    kept = [[s, {k: v for k, v in m.items() if k != "steps_a_second"}] for s, m in losses]
    here = [jax.process_count(), jax.device_count(), jax.local_device_count()]
    print(json.dumps({"devices": here, "losses": kept, "total": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
