"""Bad input for every public constructor and ``fit``, made from tables of values by kind.

``python -m tests.fuzz --seed 3 --n 2000`` draws pairs of bad values too. It prints what was not
refused by a message that names one of them, or refused at the cost of a changed model or estimator.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import spectralshell as ss
from spectralshell import datasets
from tests.fingerprints import model_fingerprint

NAN, INF = float("nan"), float("inf")

# What a parameter of any kind may be given by mistake.
VALUES: dict[str, Any] = {
    "none": None,
    "text": "seven",
    "empty text": "",
    "bytes": b"x",
    "true": True,
    "zero": 0,
    "minus one": -1,
    "fraction": 2.5,
    "nan": NAN,
    "infinite": INF,
    "minus infinite": -INF,
    "complex": 1 + 1j,
    "list": [1.0],
    "empty list": [],
    "pair": (2.0, 1.0),
    "dict": {},
    "object": object(),
    "array": np.ones((2, 2)),
    "tensor": torch.ones(3),
    "class": dict,
    "huge": 10**400,
}

# The labels above that are legal for a kind of parameter.
LEGAL: dict[str, set[str]] = {
    "real": {"zero", "minus one", "fraction"},
    "positive": {"fraction"},
    "not negative": {"fraction", "zero"},
    "ratio": {"fraction"},
    "share": set(),
    "counts from 0": {"zero", "huge"},
    "draws": set(),
    "draws from 0": {"zero"},
    # More than there is is all there is.
    "count": {"huge"},
    "optional count": {"none", "huge"},
    "level": {"zero", "huge"},
    "option": set(),
    "optional positive": {"none", "fraction"},
    "window": {"none"},
    "floor": set(),  # 2.5 lies above the largest eigenvalue
    "tail floor": {"none", "zero", "fraction"},
    "optional text": {"none", "text"},
    "selection": {"none", "empty text"},
    "dtype": {"none"},
    "device": set(),
    "n_jobs": {"none", "minus one", "huge"},
    "memory size": {"none", "huge"},
    "seed": {"none", "zero", "true"},  # as scikit-learn takes it
    "folder": {"none", "text"},
    "edges": {"none"},
    "y": set(VALUES),
}

RUNNING = {
    "residual": "option",
    "parameters": "selection",
    "chunk_size": "optional count",
    "max_memory": "memory size",
    "device": "device",
    "dtype": "dtype",
    "memory": "folder",
    "n_jobs": "n_jobs",
    "random_state": "seed",
    "verbose": "level",
}
SHELLS = {"q": "ratio", "lambda_0": "positive", "solver": "option", "n_steps": "count"}
MOTION = {"direction": "option", "derivative": "option", "step": "optional positive"}

ESTIMATORS: dict[str, dict[str, str]] = {
    "ShellEnergyEstimator": {**SHELLS, **RUNNING, "floor": "floor", "window": "window"},
    "ShellFluxEstimator": {
        **SHELLS,
        **MOTION,
        **RUNNING,
        "floor": "floor",
        "window": "window",
        "softness": "positive",
        "confidence": "share",
    },
    "ToeplitzDiagnostic": {
        **SHELLS,
        **MOTION,
        **RUNNING,
        "block_size": "count",
        "normalization": "option",
        "reducer": "option",
        "diagonal": "option",
        "window_shells": "count",
        "min_modes": "count",
        "n_null": "draws",
    },
    "JacobianBlockDiagnostic": {
        **MOTION,
        **RUNNING,
        "blocks": "option",
        "band": "counts from 0",
        "window_blocks": "count",
        "n_null": "draws from 0",
    },
}
CHEAP: dict[str, dict[str, Any]] = {
    "ToeplitzDiagnostic": {"n_steps": 4, "n_null": 2},
    "JacobianBlockDiagnostic": {"n_null": 2},
}
TAIL = {
    "window": "window",
    "cutoff": "option",
    "edges": "edges",
    "confidence": "share",
    "min_shells": "count",
    "floor": "tail floor",
}
SNAPSHOT = {
    "tau": "real",
    "batch": "batch",
    "state": "state",
    "name": "optional text",
    "n_samples": "optional count",
    "class_axis": "class axis",
}


@dataclass(frozen=True)
class Case:
    """One wrong call: what is called, which words its error must hold one of, and the call."""

    name: str
    words: tuple[str, ...]
    call: Callable[[], Any]
    legal: bool = False
    watched: tuple[Any, ...] = ()  # models and estimators that must stay as they were


def tiny_model() -> nn.Module:
    """Return a model of 8 parameters in float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).reshape(4, 3).cos()
Y = torch.linspace(1.0, -1.0, 8, dtype=torch.float64).reshape(4, 2)


def tiny_snapshots(model: nn.Module) -> list[ss.Snapshot]:
    """Return two batches of the model's state."""
    return ss.make_snapshots(model, [(X, Y), (X.flip(1), Y)])


def make(name: str, parameters: dict[str, Any]) -> Any:
    """Return an estimator that is cheap where the parameters do not say otherwise."""
    return getattr(ss, name)(**{**CHEAP.get(name, {}), **parameters})


def is_legal(kind: str, label: str) -> bool:
    """Return whether a parameter of a kind may have that value."""
    return label in LEGAL.get(kind, set())


def estimator_cases() -> Iterator[Case]:
    """Return each parameter of each estimator of snapshots with each value."""
    model = tiny_model()
    snapshots = tiny_snapshots(model)
    for name, kinds in ESTIMATORS.items():
        for parameter, kind in kinds.items():
            for label, value in VALUES.items():
                estimator = make(name, {parameter: value})
                yield Case(
                    f"{name}({parameter}={label})",
                    (parameter,),
                    lambda e=estimator: e.fit(snapshots),
                    is_legal(kind, label),
                    (model, estimator),
                )


def energies() -> pd.DataFrame:
    """Return a frame of shell energies with several taus and batches."""
    return datasets.make_grsd_spectra(1.5, n_batches=3, random_state=0)[0]


# What scikit-learn's own messages, and those about columns, call X.
X_WORDS = ("X", "array", "Complex data", "column", "shells", "edges")


def tail_cases() -> Iterator[Case]:
    """Return bad parameters of the tail fitter, and bad X, tau and batch."""
    array = np.array([2.0**-k for k in range(8)]) * np.linspace(0.9, 1.1, 24).reshape(3, 8)
    for parameter, kind in TAIL.items():
        for label, value in VALUES.items():
            fitter = ss.GRSDTailFitter(**{parameter: value})
            yield Case(
                f"GRSDTailFitter({parameter}={label})",
                (parameter,),
                lambda f=fitter: f.fit(array),
                is_legal(kind, label),
                (fitter,),
            )
    for label, value in VALUES.items():
        for parameter in ("tau", "batch"):
            fitter = ss.GRSDTailFitter()
            yield Case(
                f"GRSDTailFitter.fit({parameter}={label})",
                (parameter,),
                lambda f=fitter, p=parameter, v=value: f.fit(array, **{p: v}),
                label == "none" or (label == "tensor" and parameter == "tau"),
                (fitter,),
            )
        fitter = ss.GRSDTailFitter()
        yield Case(
            f"GRSDTailFitter.fit(X={label})",
            X_WORDS,
            lambda f=fitter, v=value: f.fit(v),
            label == "array",
            (fitter,),
        )
    for label, X_ in bad_energies(array).items():
        fitter = ss.GRSDTailFitter()
        yield Case(
            f"GRSDTailFitter.fit(X={label})",
            X_WORDS,
            lambda f=fitter, v=X_: f.fit(v),
            watched=(fitter,),
        )


def bad_energies(array: np.ndarray) -> dict[str, Any]:
    """Return arrays and frames that hold no shell energies."""
    frame = pd.DataFrame(array, columns=[f"shell[{2.0**k},{2.0 ** (k + 1)})" for k in range(8)])
    negative, infinite, missing = array.copy(), array.copy(), array.copy()
    negative[1, 2], infinite[1, 2], missing[1, 2] = -1.0, INF, NAN
    return {
        "negative": negative,
        "infinite entry": infinite,
        "missing entry": missing,
        "complex entries": array + 1j,
        "text entries": array.astype(str) + "x",
        "three dimensions": array[None],
        "one dimension": array[0],
        "ragged": [[1.0, 2.0], [1.0]],
        "empty rows": array[:0],
        "no columns": array[:, :0],
        "shells out of order": frame.iloc[:, ::-1],
        "a shell left out": frame.drop(columns=frame.columns[3]),
        "a shell twice": frame.iloc[:, [0, 1, 1, 2, 3, 4]],
        "a foreign column": frame.assign(lr=0.1),
        "a broken name": frame.rename(columns={frame.columns[2]: "shell[4,"}),
        "transposed": frame.T,
        "a tidy column": frame.assign(lambda_mid=1.0),
    }


class Moody(nn.Module):
    """Draws noise in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.linear(x), 0.5, training=True)


def snapshot_cases() -> Iterator[Case]:
    """Return bad arguments of a snapshot, found when it is made or measured."""
    model = tiny_model()

    def measured(*arguments: Any, **more: Any) -> Any:
        estimator = ss.ShellEnergyEstimator(solver="exact")
        return estimator.fit([ss.Snapshot(*arguments, **more)])

    legal = {
        "tau": LEGAL["real"],
        "batch": {"text", "empty text", "zero", "minus one", "huge"},
        "state": {"none"},
        "name": LEGAL["optional text"],
        "n_samples": {"none"},
        "class_axis": {"none", "zero", "minus one", "huge"},  # read for labels only
    }
    for parameter, allowed in legal.items():
        for label, value in VALUES.items():
            yield Case(
                f"Snapshot({parameter}={label})",
                (parameter,),
                lambda p=parameter, v=value: measured(model, X, Y, **{p: v}),
                label in allowed,
                (model,),
            )
    for label, value in VALUES.items():
        yield Case(f"Snapshot(model={label})", ("model",), lambda v=value: ss.Snapshot(v, X, Y))
        yield Case(
            f"Snapshot(inputs={label})",
            ("inputs",),
            lambda v=value: measured(model, v, Y),
            watched=(model,),
        )
        yield Case(
            f"Snapshot(targets={label})",
            ("targets",),
            lambda v=value: measured(model, X, v),
            watched=(model,),
        )
    bad_data = {
        "one NaN": (_with(X, NAN), Y, "inputs"),
        "one infinite input": (_with(X, INF), Y, "inputs"),
        "one infinite target": (X, _with(Y, INF), "targets"),
        "fewer targets": (X, Y[:3], "targets"),
        "more targets": (X, torch.cat([Y, Y]), "targets"),
        "targets to broadcast": (X, Y[:, :1], "targets"),
        "targets transposed": (X, Y.T, "targets"),
        "too many classes": (X, torch.tensor([0, 1, 2, 3]), "targets"),
        "no sample": (X[:0], Y[:0], "inputs"),
        "too wide": (torch.cat([X, X], 1), Y, "inputs"),
        "integer inputs": (X.long(), Y, "inputs"),
        "complex inputs": (X + 0j, Y, "inputs"),
        "complex targets": (X, Y + 1j, "targets"),
        "sparse inputs": (X.to_sparse(), Y, "inputs"),
        "sparse targets": (X, Y.to_sparse(), "targets"),
        "meta inputs": (X.to("meta"), Y, "inputs"),
        "meta targets": (X, Y.to("meta"), "targets"),
        "ragged inputs": ([[1.0, 2.0, 3.0], [1.0]], Y, "inputs"),
        "a wrong keyword": ({"images": X}, Y, "inputs"),
        "inputs too many": ((X, X), Y, "inputs"),
        "inputs as a set": ({1.0, 2.0}, Y, "inputs"),
        "nested None": ((X, None, {"a": object()}), Y, "inputs"),
    }
    for label, (inputs, targets, word) in bad_data.items():
        yield Case(
            f"Snapshot: {label}",
            (word,),
            lambda i=inputs, t=targets: measured(model, i, t),
            watched=(model,),
        )
    for label, (bad, words) in bad_models().items():
        yield Case(
            f"Snapshot: {label}",
            words,
            lambda m=bad: measured(m, X.float(), Y.float()),
            watched=(bad,),
        )
    for label, (state, words) in bad_states(model).items():
        yield Case(
            f"Snapshot: {label}",
            words,
            lambda s=state: measured(model, X, Y, state=s),
            watched=(model,),
        )


def _with(values: torch.Tensor, value: float) -> torch.Tensor:
    values = values.clone()
    values[1, 1] = value
    return values


def bad_models() -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Return models that cannot be measured, and the words that their errors need."""
    with_nan, infinite = tiny_model().float(), tiny_model().float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls complex modules new
        complex_model = tiny_model().to(torch.complex64)
    with torch.no_grad():
        with_nan[0].weight[0, 0] = NAN
        infinite[0].bias[0] = INF
    return {
        "a NaN weight": (with_nan, ("0.weight",)),
        "an infinite bias": (infinite, ("0.bias",)),
        "no parameters": (nn.Tanh(), ("Tanh",)),
        "all frozen": (tiny_model().float().requires_grad_(False), ("requires_grad",)),
        "dropout left on": (Moody(), ("Moody",)),
        "outputs as a tuple": (nn.LSTM(3, 2), ("model", "LSTM")),
        "meta parameters": (tiny_model().to("meta"), ("meta",)),
        "complex parameters": (complex_model, ("complex", "dtype", "inputs")),
        "one output": (nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), ("targets",)),
    }


def bad_states(model: nn.Module) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Return states that do not fit the model, and the words that their errors need."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {
        "a key too few": ({"0.weight": state["0.weight"]}, ("0.bias",)),
        "a key too many": ({**state, "2.weight": state["0.weight"]}, ("2.weight",)),
        "another shape": ({**state, "0.bias": torch.ones(3)}, ("0.bias",)),
        "a shape to broadcast": ({**state, "0.bias": torch.ones(1)}, ("0.bias",)),
        "integers": ({k: v.to(torch.int8) for k, v in state.items()}, ("0.weight", "state")),
        "booleans": ({k: v > 0 for k, v in state.items()}, ("0.weight", "state")),
        "complex numbers": ({k: v + 0j for k, v in state.items()}, ("0.weight", "state")),
        "NaN": ({**state, "0.bias": state["0.bias"] * NAN}, ("0.bias",)),
        "a number for a tensor": ({**state, "0.bias": 3.0}, ("0.bias", "state")),
        "text for a tensor": ({**state, "0.bias": "x"}, ("0.bias", "state")),
        "keys that are numbers": (dict(enumerate(state.values())), ("state", "0.weight")),
        "meta tensors": ({k: v.to("meta") for k, v in state.items()}, ("state", "meta")),
        "sparse tensors": ({k: v.to_sparse() for k, v in state.items()}, ("state", "0.weight")),
        "no file": ("/nowhere/at/all.safetensors", ("state", "nowhere")),
        "a folder": ("/", ("state",)),
    }


def list_cases() -> Iterator[Case]:
    """Return what is no list of snapshots, for every estimator of them."""
    model = tiny_model()
    snapshot = ss.Snapshot(model, X, Y)
    lists = {
        **VALUES,
        "a snapshot alone": snapshot,
        "list of models": [model],
        "a pair": [(model, X)],
        "four": [(model, X, Y, Y)],
        "a frame": pd.DataFrame(np.ones((2, 2))),
        "snapshot and number": [snapshot, 3],
        "the same twice": [snapshot, snapshot],
        "two of one label": [snapshot, ss.Snapshot(model, X, Y)],
        "list of None": [None],
        "nested": [[snapshot]],
    }
    for name in ESTIMATORS:
        for label, value in lists.items():
            estimator = getattr(ss, name)()
            yield Case(
                f"{name}.fit({label})",
                ("X",),
                lambda e=estimator, v=value: e.fit(v),
                watched=(model, estimator),
            )


def function_cases() -> Iterator[Case]:
    """Return bad arguments of the public functions beside the estimators."""
    model = tiny_model()
    for label, value in VALUES.items():
        yield Case(
            f"make_snapshots(batches={label})",
            ("batches",),
            lambda v=value: ss.make_snapshots(model, v),
            watched=(model,),
        )
        yield Case(
            f"make_snapshots(model={label})",
            ("model",),
            lambda v=value: ss.make_snapshots(v, [(X, Y)]),
        )
        for parameter, kind in {"q": "ratio", "lambda_0": "positive", "n_shells": "count"}.items():
            keywords = {"q": 2.0, "lambda_0": 1.0, "first": 0, "n_shells": 3, parameter: value}
            yield Case(
                f"ShellPartition({parameter}={label})",
                (parameter,),
                lambda k=keywords: ss.ShellPartition(**k),
                is_legal(kind, label) and label != "huge",
            )
        yield Case(
            f"cross_validate_exponent(estimator={label})",
            ("estimator",),
            lambda v=value: ss.cross_validate_exponent(v, energies()),
        )


def all_cases() -> list[Case]:
    """Return the fixed list."""
    return [
        *snapshot_cases(),
        *list_cases(),
        *function_cases(),
        *tail_cases(),
        *estimator_cases(),
    ]


def random_pairs(seed: int, n: int) -> Iterator[Case]:
    """Draw estimators with two bad parameters each; the error has to name one of them."""
    rng = np.random.default_rng(seed)
    model = tiny_model()
    snapshots = tiny_snapshots(model)
    labels = list(VALUES)
    for _ in range(n):
        name = str(rng.choice(list(ESTIMATORS)))
        kinds = ESTIMATORS[name]
        pair = [str(p) for p in rng.choice(list(kinds), 2, replace=False)]
        chosen = [str(label) for label in rng.choice(labels, 2)]
        legal = all(is_legal(kinds[p], v) for p, v in zip(pair, chosen, strict=True))
        estimator = make(name, {p: VALUES[v] for p, v in zip(pair, chosen, strict=True)})
        settings = ", ".join(f"{p}={v}" for p, v in zip(pair, chosen, strict=True))
        yield Case(
            f"{name}({settings})",
            tuple(pair),
            lambda e=estimator: e.fit(snapshots),
            legal,
            (model, estimator),
        )


def _observed(watched: tuple[Any, ...]) -> list[Any]:
    return [
        model_fingerprint(item) if isinstance(item, nn.Module) else copy.copy(vars(item))
        for item in watched
    ]


def fault(case: Case) -> str:
    """Return what is wrong with the answer to a case; empty where nothing is."""
    before = _observed(case.watched)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.call()
    except (TypeError, ValueError, FileNotFoundError) as error:
        text = str(error)
        if case.legal:
            return f"refused: {type(error).__name__}: {text}"
        if not any(re.search(rf"(?<!\w){re.escape(word)}", text) for word in case.words):
            return f"names none of {case.words}: {type(error).__name__}: {text}"
        if not _alike(_observed(case.watched), before):
            return "the model or the estimator is not as it was"
        return ""
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if case.legal else "accepted"


def _alike(after: list[Any], before: list[Any]) -> bool:
    return all(
        one.keys() == other.keys()
        and all(one[key] is other[key] or _equal(one[key], other[key]) for key in one)
        for one, other in zip(after, before, strict=True)
    )


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, (Mapping, tuple, bytes, str)) and one == other


def main() -> int:
    """Print the faults of the fixed list and of random pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=500)
    arguments = parser.parse_args()
    cases = [*all_cases(), *random_pairs(arguments.seed, arguments.n)]
    n_faults = 0
    for case in cases:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text = fault(case)
        if text:
            n_faults += 1
            sys.stdout.write(f"{case.name}: {text[:300]}\n")
    n_bad = sum(not case.legal for case in cases)
    sys.stdout.write(f"{len(cases)} cases, {n_bad} of them bad, {n_faults} faults\n")
    return n_faults > 0


if __name__ == "__main__":
    sys.exit(main())
