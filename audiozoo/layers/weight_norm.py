r"""Weight normalisation (arXiv 1602.07868, Eq. 2): a kernel as magnitude and direction, $W = g\,V / \lVert V \rVert$.

Both are parameters, so that training has the dynamics that the checkpoints were trained with; inference wants their
product, computed once: `fold_weight_norm`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from audiozoo.layers.basic import at_least_float32
from audiozoo.layers.convolution import Conv1d, ConvTranspose1d

Model = TypeVar("Model", bound=nnx.Module)


def norm_except(v: Float[Array, "time inputs outputs"], axis: int) -> Float[Array, "#time #inputs #outputs"]:
    r"""$\lVert V \rVert$ over all axes but one, which keeps its length; in float32 or wider."""
    others = tuple(i for i in range(v.ndim) if i != axis)
    return jnp.sqrt(jnp.sum(jnp.square(at_least_float32(v)), axis=others, keepdims=True))


def weight_normalised(
    g: Float[Array, "#time #inputs #outputs"], v: Float[Array, "time inputs outputs"], axis: int
) -> Float[Array, "time inputs outputs"]:
    r"""$W = g\,V / \lVert V \rVert$, the norm taken over all axes but `axis`."""
    return (v * (g / norm_except(v, axis))).astype(v.dtype)


class _WeightNorm(nnx.Module):
    """What the two layers below share: `kernel_g` and `kernel_v` in place of `kernel`, until they are folded."""

    axis: int
    kernel: Any
    kernel_g: Any
    kernel_v: Any

    def normalise(self) -> None:
        r"""Replace `kernel` by $V$ = `kernel` and $g = \lVert V \rVert$, which stand for the same weight."""
        if hasattr(self, "kernel"):
            v = self.kernel[...]
            del self.kernel
            self.kernel_g = nnx.Param(norm_except(v, self.axis).astype(v.dtype))
            self.kernel_v = nnx.Param(v)

    def fold(self) -> None:
        """Replace `kernel_g` and `kernel_v` by the `kernel` that they stand for."""
        if not hasattr(self, "kernel"):
            kernel = self.weight()
            del self.kernel_g, self.kernel_v
            self.kernel = nnx.Param(kernel)

    def weight(self) -> Float[Array, "time inputs outputs"]:
        """The kernel that is applied."""
        if hasattr(self, "kernel"):
            return self.kernel[...]
        return weight_normalised(self.kernel_g[...], self.kernel_v[...], self.axis)


class WeightNormConv1d(_WeightNorm, Conv1d):
    """A `Conv1d` whose kernel is `kernel_g`, `kernel_v`.

    With `dim` 0, PyTorch's default, there is a magnitude for each output channel: `kernel_g` is `(1, 1, out)`. With
    `dim` 2 there is one for each tap, `(time, 1, 1)`, as in wav2vec 2.0's positional convolution. `kernel_v` is
    `(time, in / groups, out)`. Where the checkpoint holds the product alone (`folded`), there is one `kernel`, until
    `apply_weight_norm` takes it apart for training.
    """

    def __init__(self, *args: Any, dim: int = 0, folded: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # PyTorch's axes (out, in, time) in our order (time, in, out).
        self.axis = {0: 2, 1: 1, 2: 0}[dim]
        if not folded:
            self.normalise()


class WeightNormConvTranspose1d(_WeightNorm, ConvTranspose1d):
    """A `ConvTranspose1d` whose kernel is `kernel_g`, `kernel_v`.

    PyTorch's dimension 0 is the input channel here: `kernel_g` is `(1, in, 1)`; `kernel_v` is `(time, in, out)`.
    """

    def __init__(self, *args: Any, folded: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.axis = 1
        if not folded:
            self.normalise()


def fold_weight_norm(model: Model) -> Model:
    """A copy of the model in which every weight-normalised layer has its one kernel, for inference."""
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _WeightNorm):
            module.fold()
    return model


def apply_weight_norm(model: Model) -> Model:
    """A copy of the model in which every folded layer is weight-normalised again; for training."""
    model = nnx.merge(*nnx.split(model))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, _WeightNorm):
            module.normalise()
    return model


__all__ = [
    "WeightNormConv1d",
    "WeightNormConvTranspose1d",
    "apply_weight_norm",
    "fold_weight_norm",
    "norm_except",
    "weight_normalised",
]
