"""Rotary angles without float64, for the graphs of every target.

A position times a float32 frequency loses bits: at position 2048 the angle is off by 1e-4. float64 keeps them, but
browsers, LiteRT and other small runtimes do not compute in it. So a position is split into digits,
p = 64² a + 64 b + c, and the cosine and sine of each digit's angle are looked up in tables made here in float64. The
graph adds the angles: cos(x + y) = cos x cos y - sin x sin y. That takes a few float32 operations, is as accurate
as float32 allows at every position, and needs neither a cosine nor a large number at run time, so it also survives a
conversion of the graph to float16.
"""

from __future__ import annotations

import numpy as np

from gptconvert.model.tensors import Array
from reference_model.config import Rotary

#: Rows of a table, and number of tables: positions are below ``BASE ** DIGITS``, 128 times GPT-J's context.
BASE, DIGITS = 64, 3
POSITIONS = BASE**DIGITS


def rotary_tables(rotary: Rotary) -> list[tuple[Array, Array]]:
    """(cos, sin) of each digit's angles, each [BASE, 1, width] in float32, from the lowest digit to the highest.

    The features are laid out for the pairing of ``rotary``; the lowest digit's have its magnitude.
    """
    frequency = np.array(rotary.frequencies)  # (width/2)
    frequency = np.repeat(frequency, 2) if rotary.interleaved else np.tile(frequency, 2)  # (width)
    digit = np.arange(BASE, dtype=np.float64)[:, np.newaxis, np.newaxis]  # (BASE, 1, 1)
    tables = []
    for place in range(DIGITS):
        angle, size = digit * BASE**place * frequency, 1.0 if place else rotary.magnitude  # (BASE, 1, width)
        tables.append(((size * np.cos(angle)).astype(np.float32), (size * np.sin(angle)).astype(np.float32)))
    return tables
