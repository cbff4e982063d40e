import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import (
    OrderSpec,
    Purpose,
    clip_ref,
    mix,
    permute,
    random_units,
)
from pipeline.errors import ConfigError, DataError

ORDER = OrderSpec(seed=7, sizes=(40, 9, 1), weights=(0.7, 0.2, 0.1), block=20)
FROZEN = [(1, 4, 0), (2, 0, 0), (0, 34, 0), (0, 6, 0), (1, 3, 274), (0, 9, 17500000)]


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_a_permutation_reaches_every_value_once(size, key):
    assert sorted(permute(value, size, key) for value in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_unrelated():
    size = 1000
    identity = np.arange(size)
    images = [[permute(value, size, mix(key)) for value in range(size)] for key in range(20)]
    correlations = [np.corrcoef(identity, image)[0, 1] for image in images]
    correlations += [np.corrcoef(images[0], image)[0, 1] for image in images[1:]]
    # A correlation of 1000 random pairs has deviation 0.032.
    assert np.abs(correlations).max() < 0.15


def test_the_first_value_of_a_permutation_is_uniform_over_keys():
    counts = np.bincount([permute(0, 10, mix(key)) for key in range(5000)], minlength=10)
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 27.9  # 0.1 % of true uniforms lie above, at 9 degrees of freedom


def test_weights_hold_exactly_in_every_block():
    for block in range(5):
        positions = range(block * 20, (block + 1) * 20)
        assert Counter(clip_ref(ORDER, p).source for p in positions) == {0: 14, 1: 4, 2: 2}


def test_weights_that_do_not_divide_a_block_hold_to_one_clip_at_every_block_border():
    order = OrderSpec(seed=1, sizes=(50, 50, 50), weights=(1.0, 1.0, 1.0), block=100)
    counts = Counter()
    for block in range(7):
        counts.update(clip_ref(order, p).source for p in range(block * 100, (block + 1) * 100))
        exact = (block + 1) * 100 / 3
        assert counts[1] == int(exact)
        assert counts[2] == int(exact)
        assert abs(counts[0] - exact) < 2


def test_a_rare_source_comes_up_though_it_has_less_than_one_slot_in_a_block():
    order = OrderSpec(seed=1, sizes=(50, 50), weights=(0.99, 0.01), block=20)
    assert Counter(clip_ref(order, p).source for p in range(2000))[1] == 20


def test_every_sample_comes_once_in_each_epoch_of_its_source():
    seen = Counter()
    for position in range(3000):
        ref = clip_ref(ORDER, position)
        seen[ref.source, ref.epoch, ref.sample] += 1
    assert set(seen.values()) == {1}
    for source, size in enumerate(ORDER.sizes):
        epochs = [epoch for s, epoch, _ in seen if s == source]
        # Every epoch but the one in progress is complete.
        assert all(epochs.count(epoch) == size for epoch in range(max(epochs)))


def test_the_second_epoch_has_another_order():
    order = OrderSpec(seed=3, sizes=(50,), weights=(1.0,))
    # Smaller than a block: also there an epoch ends before the next begins.
    samples = [clip_ref(order, position).sample for position in range(100)]
    assert sorted(samples[:50]) == sorted(samples[50:])
    assert samples[:50] != samples[50:]


def test_a_position_of_a_thousand_million_is_found_without_its_predecessors():
    order = OrderSpec(seed=3, sizes=(22_000_000, 1_000_000), weights=(0.8, 0.2))
    refs = {clip_ref(order, 10**9 + offset) for offset in range(1000)}
    assert Counter(ref.source for ref in refs) == {0: 800, 1: 200}
    assert {ref.epoch for ref in refs if ref.source == 0} <= {36, 37}
    begin = time.process_time()
    for offset in range(1000):
        clip_ref(order, 2 * 10**9 + offset)
    assert time.process_time() - begin < 0.5


def test_the_order_is_the_same_in_every_release():
    # Frozen values: if they change, ORDER_VERSION of cursor.py has to, and old runs cannot resume.
    refs = [clip_ref(ORDER, position) for position in (0, 1, 19, 20, 12_345, 10**9)]
    assert [(ref.source, ref.sample, ref.epoch) for ref in refs] == FROZEN


def test_substitutes_come_from_the_same_source_and_are_never_the_bad_sample():
    for position in range(200):
        bad = clip_ref(ORDER, position)
        for attempt in range(1, 6):
            ref = clip_ref(ORDER, position, attempt)
            assert (ref.source, ref.epoch, ref.attempt) == (bad.source, bad.epoch, attempt)
            assert ref.sample != bad.sample or ORDER.sizes[bad.source] == 1


def test_random_numbers_differ_by_seed_position_and_purpose():
    keys = [(1, 5, Purpose.CROP), (2, 5, Purpose.CROP), (1, 6, Purpose.CROP)]
    keys.append((1, 5, Purpose.CLIP_START))
    draws = [tuple(random_units(*key, 3)) for key in keys]
    assert len({unit for draw in draws for unit in draw}) == 12
    assert draws == [tuple(random_units(*key, 3)) for key in keys]


def test_random_numbers_are_uniform():
    units = np.concatenate([random_units(1, p, Purpose.CROP, 4) for p in range(5000)])
    assert 0.0 <= units.min() < 0.001
    assert 0.999 < units.max() < 1.0
    counts, _ = np.histogram(units, bins=10, range=(0.0, 1.0))
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9  # exceeded by 0.1 % of uniforms


@pytest.mark.parametrize(
    ("sizes", "weights", "block", "error", "word"),
    [
        ((), (), 1000, ConfigError, "at least one source"),
        ((5,), (1.0, 2.0), 1000, ConfigError, "as many weights"),
        ((5, 0), (1.0, 1.0), 1000, DataError, "source 1 has no samples"),
        ((5, 5), (1.0, 0.0), 1000, ConfigError, "source 1 has weight 0.0"),
        ((5,) * 40, (1.0,) * 40, 1000, ConfigError, "do not fit a mixture block of 1000"),
    ],
)
def test_a_mixture_that_cannot_be_dealt_is_refused(sizes, weights, block, error, word):
    with pytest.raises(error, match=word):
        OrderSpec(seed=0, sizes=sizes, weights=weights, block=block)
