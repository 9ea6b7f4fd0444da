"""One contender in a process of its own, driven by lines of JSON: ``python -m benchmarks.worker``.

Requests (``do``) and what they answer:

- ``setup`` (contender, problem, arrays, options): make the network and its data.
- ``prepare``: what is done once before many runs → ``seconds``.
- ``result`` (path): run once, write the result as ``.npy`` → ``seconds``, ``facts``.
- ``time``: run once → ``seconds``.
- ``peak``: prepare and run once, on a problem not run yet → ``bytes`` above the network and
  its data, not counting what preparation needed only in passing (compilers).
- ``describe``: versions and threads.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.problems import Problem, load_arrays
from benchmarks.registry import PACKAGES, contender_class
from benchmarks.resident_memory import peak_bytes, release, reset_peak, resident_bytes


class Worker:
    """Answers requests, one method each."""

    def setup(
        self, contender: str, problem: dict[str, Any], arrays: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        state, data = load_arrays(Path(arrays))
        self.contender = contender_class(contender)(Problem(**problem), state, data, options)
        return {}

    def prepare(self) -> dict[str, Any]:
        start = time.perf_counter()
        self.contender.prepare()
        return {"seconds": time.perf_counter() - start}

    def result(self, path: str) -> dict[str, Any]:
        start = time.perf_counter()
        result = self.contender.run()
        seconds = time.perf_counter() - start
        np.save(path, self.contender.as_array(result))
        return {"seconds": seconds, "facts": self.contender.facts()}

    def time(self) -> dict[str, Any]:
        start = time.perf_counter()
        result = self.contender.run()
        seconds = time.perf_counter() - start
        del result
        return {"seconds": seconds}

    def peak(self) -> dict[str, Any]:
        release()
        before = resident_bytes()
        self.contender.prepare()
        release()
        reset_peak()
        result = self.contender.run()
        highest = peak_bytes()
        del result
        return {"bytes": highest - before, "facts": self.contender.facts()}

    def describe(self, environment: str) -> dict[str, Any]:
        known = {name: version(name) for name in PACKAGES[environment]}
        return {"python": platform.python_version(), **known}


def main() -> None:
    """Answer until the input ends."""
    # Libraries print: only answers go to what was standard output.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": True, **getattr(worker, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
