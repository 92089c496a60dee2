"""Round trip, causality and lengths of every pattern."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avray.nn.patterns import NOTHING, PATTERNS, Delay, Flatten, Layout, Parallel, read_pattern

patterns = st.sampled_from([Flatten(), Flatten(offsets=False), Delay(), Delay(by=2), Parallel()])
sizes = st.tuples(st.integers(0, 12), st.integers(1, 5), st.integers(2, 9))


def made(pattern, size) -> tuple[Layout, np.ndarray]:
    num_frames, num_codebooks, cardinality = size
    codes = np.random.default_rng(0).integers(0, cardinality, (num_frames, num_codebooks)).astype(np.uint16)
    return pattern.layout(num_codebooks, cardinality), codes


@given(patterns, sizes)
def test_codes_come_back(pattern, size):
    layout, codes = made(pattern, size)
    assert np.array_equal(layout.codes(layout.tokens(codes)), codes)


@given(patterns, sizes)
def test_lengths(pattern, size):
    layout, codes = made(pattern, size)
    tokens = layout.tokens(codes)
    assert tokens.shape == (layout.num_steps(len(codes)), layout.num_streams)
    assert layout.num_frames(len(tokens)) == len(codes)
    assert (tokens != NOTHING).sum() == codes.size
    assert tokens.max(initial=0) < layout.vocabulary


@given(patterns, sizes, st.integers(0, 11), st.integers(0, 4))
def test_a_token_depends_on_no_later_frame(pattern, size, frame, codebook):
    """Changing one code changes one step, and that of frame t, codebook k is never before t * stride: what a model
    reads up to a step is never ahead of the frame it draws there."""
    layout, codes = made(pattern, size)
    if frame >= len(codes) or codebook >= codes.shape[1]:
        return
    changed = codes.copy()
    changed[frame, codebook] = (changed[frame, codebook] + 1) % layout.cardinality
    differs = np.flatnonzero((layout.tokens(codes) != layout.tokens(changed)).any(axis=1))
    assert list(differs) == [frame * layout.stride + layout.delays[codebook]]


@given(patterns, sizes, st.integers(0, 11))
def test_steps_so_far_are_the_steps_of_the_frames_so_far(pattern, size, num_frames):
    """A stream cut after any frame is the layout of the frames up to there, where both have a token."""
    layout, codes = made(pattern, size)
    num_frames = min(num_frames, len(codes))
    short, long = layout.tokens(codes[:num_frames]), layout.tokens(codes)[: layout.num_steps(num_frames)]
    assert np.all((short == NOTHING) | (short == long))
    assert np.array_equal(layout.codes(layout.tokens(codes)[: len(short)])[:num_frames], codes[:num_frames])


@given(patterns, sizes)
def test_codebook_at_names_every_token(pattern, size):
    layout, codes = made(pattern, size)
    for step, row in enumerate(layout.tokens(codes)):
        for stream, token in enumerate(row):
            codebook = layout.codebook_at(step, stream)
            if token != NOTHING:
                assert layout.offsets[codebook] <= token < layout.offsets[codebook] + layout.cardinality
            elif step < layout.num_steps(len(codes)) - layout.lag:
                assert codebook is None


def test_steps_a_second():
    """At 75 frames a second and 4 codebooks: 300 steps flattened, 75 and three more delayed."""
    assert Flatten().layout(4, 1024).num_steps(75) == 300
    assert Delay().layout(4, 1024).num_steps(75) == 78
    assert Parallel().layout(4, 1024).num_steps(75) == 75


def test_delay_is_musicgens_staircase():
    tokens = Delay().layout(3, 10).tokens(np.arange(6).reshape(2, 3))
    assert tokens.tolist() == [[0, -1, -1], [3, 11, -1], [-1, 14, 22], [-1, -1, 25]]


def test_vocabulary():
    assert Flatten().layout(4, 1024).vocabulary == 4096
    assert Flatten(offsets=False).layout(4, 1024).vocabulary == 1024
    assert {name: kind().name for name, kind in PATTERNS.items()} == {name: name for name in PATTERNS}


def test_no_delay_is_refused():
    with pytest.raises(ValueError, match="parallel"):
        Delay(by=0)


def test_patterns_are_read_by_name():
    assert read_pattern("parallel") == Parallel()
    assert read_pattern({"name": "flatten", "offsets": False}) == Flatten(offsets=False)
    assert read_pattern(Delay(by=2)) == Delay(by=2)
    with pytest.raises(ValueError, match="flatten, delay, parallel"):
        read_pattern("spiral")
    with pytest.raises(ValueError, match="pattern.by"):
        read_pattern({"name": "parallel", "by": 2})
