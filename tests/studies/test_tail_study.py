"""The study of the tail fit sums up what it met."""

import numpy as np
import pandas as pd

from studies.tail.__main__ import summary
from studies.tail.data import EDGES, noise, template
from studies.tail.optimum import Definition

# A shell's energy is a sum over 61 cells, good to their width squared, 1e-4.
CELLS = 1e-4


def test_summary_counts_by_b():
    fits = pd.DataFrame(
        {
            "b": [0.85] * 4,
            "lower": [0.8, 0.9, 0.8, 0.8],
            "upper": [0.9, 1.0, 0.9, 0.9],
            "no_cutoff": [False, False, True, False],
            "degenerate": [False] * 4,
            "competing": [False, False, False, True],
        }
    )
    replicates = pd.DataFrame(
        {
            "b": [0.85] * 4,
            "fit": [0.86, 0.86, 0.7, 0.7],
            "definition": [0.86, 0.86 + 1e-9, 0.9, 0.9],
            "squares_ratio": [0.0, 0.0, -0.1, 0.1],
        }
    )
    row = [cell.strip() for cell in summary(fits, replicates).splitlines()[2].split("|")[1:-1]]
    expected = "0.85 4 4 0.5000 0.2500 0.2500 0.250 0.000 0.250 0.667 0.500 0.500 0.100"
    assert row == expected.split()


def test_definition_finds_a_template_without_noise():
    nodes, factors = noise(0)
    rows = template(1.3, nodes, np.ones_like(factors)).energies[::12]
    y = np.log(rows / np.diff(EDGES))
    best = Definition(EDGES[:-1], EDGES[1:]).minima(y, np.ones_like(y))[0]
    assert abs(best.b - 1.3) < CELLS
    assert best.squares < CELLS**2
