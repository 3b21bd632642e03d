"""Random spans: how many there are, how long, and where."""

import jax
import jax.numpy as jnp
import numpy as np

from audiozoo.layers.masking import span_mask


def drawn(count, *args, **kwargs):
    """`count` draws, of a key each."""
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: span_mask(key, *args, **kwargs)))(keys))


def test_as_many_as_the_share_says():
    """5.1 and 3.3 spans of one step are 5 and 3, or 6 and 4, rounded up as often as the rest says."""
    masks = drawn(2000, 3, 17, probability=0.3, span=1, lengths=jnp.asarray([17, 11, 17]))
    counts = masks.sum(axis=2)
    assert set(counts[:, 0]) == {5, 6}
    assert set(counts[:, 1]) == {3, 4}
    np.testing.assert_array_equal(counts[:, 0], counts[:, 2])
    np.testing.assert_allclose(counts.mean(axis=0), [5.1, 3.3, 5.1], atol=0.03)
    assert (counts[:, 1] == 4)[counts[:, 0] == 6].all()  # the batch is rounded together
    assert not masks[:, 1, 11:].any()
    assert (drawn(20, 1, 17, probability=1.0, span=1)).all()  # without replacement


def test_one_span_lies_anywhere_inside():
    masks = drawn(4000, 2, 12, probability=0.0, span=4, minimum=1, lengths=jnp.asarray([12, 7]))
    for row, places in ((0, 9), (1, 4)):
        starts = masks[:, row].argmax(axis=1)
        np.testing.assert_array_equal(
            masks[:, row], (np.arange(12) >= starts[:, None]) & (np.arange(12) < starts[:, None] + 4)
        )
        np.testing.assert_allclose(np.bincount(starts, minlength=places) / 4000, np.full(places, 1 / places), atol=0.03)


def test_no_more_than_there_is_room_for():
    """Of the spans asked for, a third of the length; and one for each place of a short row."""
    masks = drawn(500, 3, 9, probability=9.0, span=3, lengths=jnp.asarray([9, 4, 2]))
    assert masks.sum(axis=2).max(axis=0).tolist() == [9, 4, 0]
    assert masks[:, 0].sum(axis=1).min() == 5  # three spans that overlap as much as they can
    assert masks[:, 1].all(where=np.arange(9) < 4)
    assert drawn(50, 1, 9, probability=0.0, span=3, minimum=2).sum(axis=2).min() >= 4
    assert not drawn(50, 1, 9, probability=0.0, span=3).any()
