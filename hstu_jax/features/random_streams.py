"""Random generators of the host pipeline, each a function of what it is for and nothing else.

Here: the names of the streams and how (seed, stream, epoch or step, group) becomes a generator.
Not here: what is drawn (`windows.py`: orders, `negatives.py`: items). Dropout is not here either:
it runs on the device with jax's own bits.
"""

import enum

import numpy as np

_WORD = 2**64


class Stream(enum.IntEnum):
    """What a generator is for; streams never share a number. Values are part of the format."""

    WINDOW_ORDER = 1
    STEP_ORDER = 2
    NEGATIVES = 3
    EVAL_NEGATIVES = 4
    ABLATION = 5
    HARD_NEGATIVES = 6
    EVAL_HARD_NEGATIVES = 7


def generator(*, seed: int, stream: Stream, major: int, minor: int = 0) -> np.random.Generator:
    """The generator of one (seed, stream, major, minor).

    Philox is counter based: (seed, stream) is its key and (major, minor) the upper half of its
    256-bit counter, so two generators never overlap and none depends on what others drew.

    Args:
        seed: of the run; any integer.
        stream: what is drawn.
        major: epoch or step, from 0.
        minor: group, from 0.
    """
    # As arrays: NumPy turns a list that holds a number above 2**63 into floats.
    key = np.array([seed % _WORD, int(stream)], dtype=np.uint64)
    counter = np.array([0, 0, minor, major], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
