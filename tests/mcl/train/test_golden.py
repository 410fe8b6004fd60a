"""A real run, from photographs through DALI to the optimiser, gives the stored results."""

from pathlib import Path

import numpy as np

from tests.fp64 import fast_convolutions
from tests.mcl.train import golden


def test_twenty_steps_in_float64(tmp_path: Path) -> None:
    with fast_convolutions():
        found = np.array(list(golden.steps(tmp_path)))
    expected = np.array(golden.read())
    assert found.shape == expected.shape == (20, 6)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
