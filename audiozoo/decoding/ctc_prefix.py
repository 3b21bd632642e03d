r"""What CTC thinks of a prefix: joint CTC/attention decoding (Watanabe et al., 2017; Hori et al., arXiv 1706.02737)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from audiozoo.layers.losses import LOG_ZERO


@dataclasses.dataclass(frozen=True)
class PrefixScorer:
    r"""A processor that mixes CTC's probability of each next token with the decoder's:

    $$(1 - w) \log p_{att}(c \mid h) + w\,[\log\psi(h c) - \log\psi(h)]$$

    where $\psi(h)$ is the probability of all label sequences that begin with $h$, and for the end of the text that of
    $h$ itself. With $\gamma^n_t$ and $\gamma^b_t$, the probabilities of $h$ after $t$ frames that end in its last label
    and in a blank,

    $$\psi(h c) = \sum_t \bigl(\gamma^b_{t-1} + [c \ne h_L]\,\gamma^n_{t-1}\bigr)\,p_t(c).$$

    They are computed anew for every prefix, in one scan over the frames, so that nothing moves with the beams.

    Attributes:
        log_probs: of the labels in each frame; one row for all beams of an example.
        lengths: frames that count, all by default.
        weight: $w$.
        prompt_length: tokens that are not labels, at the beginning.
        blank: the blank, which is never a token.
        eos_token_id: ends a text.
    """

    log_probs: Float[Array, "batch frames vocabulary"]
    lengths: Int[Array, " batch"] | None
    weight: float
    prompt_length: int
    blank: int
    eos_token_id: int

    def __call__(
        self, scores: Float[Array, "rows vocabulary"], tokens: Int[Array, "rows buffer"], length: Int[Array, ""]
    ) -> Float[Array, "rows vocabulary"]:
        """The mixture of log-probabilities, not normalised again; what CTC has no label for is no token."""
        whole, following = self.prefix(tokens[:, self.prompt_length :], length - self.prompt_length)
        labels = following.shape[1]
        attended, heard = scores[:, :labels], (following - whole[:, None]).astype(scores.dtype)
        forbidden = jnp.isneginf(attended) | (jnp.arange(labels) == self.blank)  # 0 times -inf is no number
        mixed = jnp.where(forbidden, -jnp.inf, (1 - self.weight) * attended + self.weight * heard)
        return jnp.pad(mixed, ((0, 0), (0, scores.shape[1] - labels)), constant_values=-jnp.inf)

    def prefix(
        self, labels: Int[Array, "rows buffer"], count: Int[Array, ""]
    ) -> tuple[Float[Array, " rows"], Float[Array, "rows vocabulary"]]:
        r"""$\log\psi(h)$ of the first `count` labels of each row, and $\log\psi(h c)$ for every next token $c$."""
        rows, room = labels.shape
        beams = rows // len(self.log_probs)
        log_probs = jnp.repeat(self.log_probs, beams, axis=0).swapaxes(0, 1)  # (frames, rows, vocabulary)
        frames, _, vocabulary = log_probs.shape
        lengths = jnp.full((rows,), frames) if self.lengths is None else jnp.repeat(self.lengths, beams, axis=0)
        # h': blank, h_1, blank, h_2, …, blank
        extended = jnp.full((rows, 2 * room + 1), self.blank, labels.dtype).at[:, 1::2].set(labels)
        before = jnp.pad(extended, ((0, 0), (2, 0)), constant_values=self.blank)[:, :-2]
        may_skip = (extended != self.blank) & (extended != before)
        last = jnp.take_along_axis(labels, jnp.broadcast_to(jnp.maximum(count - 1, 0), (rows, 1)), axis=1)
        repeats = jnp.arange(vocabulary) == last
        zero = jnp.asarray(LOG_ZERO, log_probs.dtype)

        def shifted(alpha: jax.Array, by: int) -> jax.Array:
            return jnp.pad(alpha, ((0, 0), (by, 0)), constant_values=LOG_ZERO)[:, : alpha.shape[1]]

        def at(alpha: jax.Array, index: jax.Array) -> jax.Array:
            here = jax.lax.dynamic_index_in_dim(alpha, jnp.maximum(index, 0), axis=1, keepdims=False)
            return jnp.where(index >= 0, here, zero)

        def step(carry: tuple, frame: tuple) -> tuple[tuple, None]:
            alpha, whole, following = carry
            scores, index = frame
            counts = (index < lengths)[:, None]
            in_blank, in_label = at(alpha, 2 * count), at(alpha, 2 * count - 1)
            either = jnp.logaddexp(in_blank, in_label)
            ready = jnp.where(repeats, in_blank[:, None], either[:, None])
            following = jnp.where(counts, jnp.logaddexp(following, ready + scores), following)
            emitted = jnp.take_along_axis(scores, extended, axis=1)
            skipped = jnp.where(may_skip, shifted(alpha, 2), zero)
            # What enters the last label from before it is what ψ(h) sums.
            entering = jnp.logaddexp(shifted(alpha, 1), skipped) + emitted
            whole = jnp.where(counts[:, 0], jnp.logaddexp(whole, at(entering, 2 * count - 1)), whole)
            alpha = jnp.where(counts, jnp.logaddexp(entering, alpha + emitted), alpha)
            return (alpha, whole, following), None

        start = jnp.where(jnp.arange(2 * room + 1) == 0, 0.0, zero) * jnp.ones((rows, 1), log_probs.dtype)
        empty = (start, jnp.full((rows,), zero), jnp.full((rows, vocabulary), zero))
        (alpha, whole, following), _ = jax.lax.scan(step, empty, (log_probs, jnp.arange(frames)))
        whole = jnp.where(count > 0, whole, 0.0)
        itself = jnp.logaddexp(at(alpha, 2 * count), at(alpha, 2 * count - 1))
        return whole, jnp.where(jnp.arange(vocabulary) == self.eos_token_id, itself[:, None], following)
