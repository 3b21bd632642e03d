"""Every golden case with its parameters divided over eight devices: `python -m tests.golden.on_devices`, 8 devices.

Prints a JSON object: for each case how many parameters lie divided, and what went wrong, if anything did.
"""

import json

import jax
from flax import nnx

from audiozoo import sharding
from tests.golden import golden

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
RULES = (*sharding.TRANSFORMER, sharding.fsdp(16, "fsdp", whole=r"depthwise", combine=True))  # small ones too


def main() -> None:
    """All cases, in float64."""
    jax.config.update("jax_enable_x64", True)
    mesh, found = sharding.make_mesh(MESH), {}
    for case in golden.cases():
        divided = 0

        def divide(model):
            nonlocal divided
            model = sharding.shard(model, mesh, RULES)
            leaves = jax.tree.leaves(nnx.state(model, golden.VARIABLES))
            divided = sum(not leaf.sharding.is_fully_replicated for leaf in leaves)
            return model

        try:
            golden.compare(case, golden.read(case.path), "float64", jax.default_backend(), divide)
            found[case.name] = [divided, ""]
        except Exception as problem:  # the test shows it under the case's name
            found[case.name] = [divided, f"{type(problem).__name__}: {problem}"]
        jax.clear_caches()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
