"""The driver's side: worker processes, and runs that take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.problems import Problem, make_data, save_arrays
from benchmarks.registry import JAX, TORCH, environment_of

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))


class WorkerError(RuntimeError):
    """A contender failed, or its process ended."""


@dataclass
class Workplace:
    """Where workers find their interpreters and data.

    Parameters
    ----------
    pythons : dict of str to Path
        Environment → interpreter.
    scratch : Path
        Folder of arrays, results and the workers' messages.
    threads : int
        What every contender may use.
    """

    pythons: dict[str, Path]
    scratch: Path
    threads: int = CORES
    known: dict[str, Path] = field(default_factory=dict)

    @property
    def messages(self) -> Path:
        """What the workers print."""
        return self.scratch / "messages.log"

    @classmethod
    def create(cls, jax_python: Path, scratch: Path, threads: int = CORES) -> Workplace:
        scratch.mkdir(parents=True, exist_ok=True)
        return cls({TORCH: Path(sys.executable), JAX: jax_python}, scratch.resolve(), threads)

    def arrays(self, problem: Problem) -> Path:
        """Return the file of the problem's state and data, written when first asked for."""
        if problem.name not in self.known:
            # The workers in the other environment have no torch.
            from benchmarks.networks_torch import initial_state

            path = self.scratch / f"{problem.name}.npz"
            save_arrays(path, initial_state(problem), make_data(problem))
            self.known[problem.name] = path
        return self.known[problem.name]

    def worker(self, contender: str, problem: Problem, options: dict[str, Any]) -> WorkerProcess:
        """Start a worker and set it up; raises WorkerError."""
        python = self.pythons[environment_of(contender)]
        process = WorkerProcess(python, self.messages, self.threads)
        try:
            self.set_up(process, contender, problem, options)
        except WorkerError:
            process.close()
            raise
        return process

    def set_up(
        self,
        process: WorkerProcess,
        contender: str,
        problem: Problem,
        options: dict[str, Any],
    ) -> None:
        """Give a worker another contender of its environment."""
        process.ask(
            "setup",
            contender=contender,
            problem=problem.as_json(),
            arrays=str(self.arrays(problem)),
            options=options,
        )

    def peak(self, contender: str, problem: Problem, options: dict[str, Any]) -> dict[str, Any]:
        """Measure the memory of one run in a process that ran only a tiny problem before.

        The tiny one loads what libraries load when they are first used.
        """
        with self.worker(contender, problem.tiny(), options) as process:
            process.ask("prepare")
            process.ask("time")
            self.set_up(process, contender, problem, options)
            return process.ask("peak")

    def versions(self, environment: str) -> dict[str, str]:
        """Return the versions of an environment's packages."""
        with WorkerProcess(self.pythons[environment], self.messages, self.threads) as process:
            return process.ask("describe", environment=environment)


class WorkerProcess:
    """A running worker; closing it ends the process."""

    def __init__(self, python: Path, messages: Path, threads: int) -> None:
        if not python.exists():
            raise WorkerError(f"no interpreter at {python}: make benchmark creates it")
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        settings = dict.fromkeys(names, str(threads))
        settings |= {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
        self._messages = messages.open("a")
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env=os.environ | settings,
        )

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; raises WorkerError."""
        try:
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if not answer.pop("ok"):
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
