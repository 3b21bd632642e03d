"""Losses that many papers share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audiozoo.errors import UsageError
from audiozoo.layers.basic import at_least_float32, check_ids

IGNORED_LABEL = -100
LOG_ZERO = -1e30  # finite, so that sums of impossible paths have a gradient (of zero) and not NaN


def cross_entropy(
    logits: Float[Array, "*positions classes"], labels: Int[Array, "*positions"], *, label_smoothing: float = 0.0
) -> Float[Array, ""]:
    r"""Mean of $-\log\operatorname{softmax}(\text{logits})_\text{label}$ over the positions whose label is not -100.

    With `label_smoothing` $\epsilon$ the target is $1-\epsilon$ on the label plus $\epsilon/C$ on every class.
    With no label left the loss is 0, where PyTorch gives NaN.

    Raises:
        UsageError: for a label that is no class, as far as `check_ids` sees it; -1 would be the last one. And if there
            is not one label for each position.
    """
    if labels.shape != logits.shape[:-1]:
        raise UsageError(f"There are labels of shape {labels.shape} for positions of shape {logits.shape[:-1]}.")
    kept = labels != IGNORED_LABEL
    targets = jnp.where(kept, labels, 0)
    check_ids(targets, logits.shape[-1])
    logits = at_least_float32(logits)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = log_normaliser - chosen
    if label_smoothing:
        uniform = log_normaliser - logits.mean(axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * uniform
    return jnp.where(kept, losses, 0.0).sum() / jnp.maximum(kept.sum(), 1)


def shift_tokens_right(labels: Int[Array, "batch time"], pad: int, start: int) -> Int[Array, "batch time"]:
    """Decoder inputs for teacher forcing: `start`, then the labels but the last; ignored labels become padding."""
    shifted = jnp.concatenate([jnp.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
    return jnp.where(shifted == IGNORED_LABEL, pad, shifted)


def ctc_loss(
    logits: Float[Array, "batch frames vocabulary"],
    labels: Int[Array, "batch tokens"],
    logit_lengths: Int[Array, " batch"] | None = None,
    *,
    blank: int = 0,
    reduction: str = "sum",
    zero_infinity: bool = False,
) -> Float[Array, "*batch"]:
    r"""Connectionist temporal classification (Graves et al., ICML 2006): $-\log p(\text{labels} \mid \text{logits})$.

    The labels $l$ with blanks between and around them, $l'$, are read by the forward recursion (Eq. 6 and 7 there)

    $$\alpha_t(s) = y^t_{l'_s} \bigl(\alpha_{t-1}(s) + \alpha_{t-1}(s-1) + [l'_s \ne b,\ l'_s \ne l'_{s-2}]\,
    \alpha_{t-1}(s-2)\bigr)$$

    in logarithms, over all frames at once for the batch. It agrees with `torch.nn.functional.ctc_loss`; the softmax is
    taken here, in float32 or wider.

    Args:
        logits: unnormalised scores.
        labels: targets; entries below 0 (-100), and blanks, are left out wherever they stand.
        logit_lengths: frames that count, all by default.
        blank: the blank's index.
        reduction: "sum"; "mean" (each item divided by its number of labels, then the mean); "none", one value an item.
        zero_infinity: give 0 instead of infinity, with no gradient, for an item with too few frames for its labels.
    """
    if reduction not in ("sum", "mean", "none"):
        raise UsageError(f"There is no reduction {reduction!r} of the CTC loss; there are sum, mean and none.")
    log_probs = jax.nn.log_softmax(at_least_float32(logits), axis=-1)
    batch, frames, _ = log_probs.shape
    if logit_lengths is None:
        logit_lengths = jnp.full((batch,), frames)
    kept = (labels >= 0) & (labels != blank)
    targets = jnp.take_along_axis(labels, jnp.argsort(~kept, axis=1, stable=True), axis=1)
    counts = kept.sum(axis=1)
    valid = jnp.arange(labels.shape[1]) < counts[:, None]
    targets = jnp.where(valid, targets, blank)
    # l': blank, l_1, blank, l_2, ..., blank
    extended = jnp.full((batch, 2 * labels.shape[1] + 1), blank, targets.dtype).at[:, 1::2].set(targets)
    two_before = jnp.pad(extended, ((0, 0), (2, 0)), constant_values=blank)[:, :-2]
    may_skip = (extended != blank) & (extended != two_before)
    emissions = jnp.take_along_axis(log_probs, extended[:, None, :], axis=2).swapaxes(0, 1)  # (frames, batch, l')

    def shifted(alpha: jax.Array, by: int) -> jax.Array:
        return jnp.pad(alpha, ((0, 0), (by, 0)), constant_values=LOG_ZERO)[:, : alpha.shape[1]]

    def step(alpha: jax.Array, frame: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        emission, index = frame
        skipped = jnp.where(may_skip, shifted(alpha, 2), LOG_ZERO)
        new = jnp.logaddexp(jnp.logaddexp(alpha, shifted(alpha, 1)), skipped) + emission
        return jnp.where((index < logit_lengths)[:, None], new, alpha), None

    start = jnp.where(jnp.arange(extended.shape[1]) < 2, emissions[0], LOG_ZERO)
    alpha, _ = jax.lax.scan(step, start, (emissions[1:], jnp.arange(1, frames)))
    last = 2 * counts[:, None]
    at_blank = jnp.take_along_axis(alpha, last, axis=1)[:, 0]
    at_label = jnp.take_along_axis(alpha, jnp.maximum(last - 1, 0), axis=1)[:, 0]
    losses = -jnp.logaddexp(at_blank, jnp.where(counts > 0, at_label, LOG_ZERO))
    repeats = ((targets[:, 1:] == targets[:, :-1]) & valid[:, 1:]).sum(axis=1)
    losses = jnp.where(logit_lengths > 0, losses, 0.0)  # that no frame says nothing is certain
    losses = jnp.where(counts + repeats <= logit_lengths, losses, 0.0 if zero_infinity else jnp.inf)
    if reduction == "sum":
        return losses.sum()
    return (losses / jnp.maximum(counts, 1)).mean() if reduction == "mean" else losses
