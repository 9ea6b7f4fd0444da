"""Parameters that say where and how the work is run: a wrong one is named before anything is."""

import numpy as np
import pytest

from spectralshell import (
    JacobianBlockDiagnostic,
    ShellEnergyEstimator,
    ShellFluxEstimator,
    ToeplitzDiagnostic,
)

ESTIMATORS = [
    ShellEnergyEstimator,
    ShellFluxEstimator,
    ToeplitzDiagnostic,
    JacobianBlockDiagnostic,
]

WRONG = [
    ("n_jobs", "two"),
    ("n_jobs", 1.5),
    ("n_jobs", True),
    ("n_jobs", 0),
    ("random_state", "seed"),
    ("random_state", -1),
    ("random_state", 1.5),
    ("random_state", 2**40),
    ("random_state", np.random.default_rng(0)),
    ("memory", 5),
    ("memory", ""),
    ("device", "meta"),
    ("device", "gpu"),
    ("device", 3),
    ("dtype", "float16"),
    ("verbose", -1),
    ("chunk_size", 0),
    ("max_memory", "much"),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_parameter_is_named(estimator, name, value, measured_trajectory):
    made = estimator(**{name: value})
    with pytest.raises((TypeError, ValueError), match=name):
        made.fit(measured_trajectory[:1])
    assert not [attribute for attribute in vars(made) if attribute.endswith("_")]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_memory_in_a_file_is_named(estimator, measured_trajectory, tmp_path):
    file = tmp_path / "cache"
    file.write_text("")
    for path in (file, str(file)):
        with pytest.raises(ValueError, match=r"memory=.*is a file; pass the path of a folder"):
            estimator(memory=path).fit(measured_trajectory[:1])
