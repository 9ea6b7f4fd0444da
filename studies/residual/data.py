"""CIFAR-10 in the forms people have it in."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FILE = "cifar10_6k.npz"
SHAPE = (3, 32, 32)
_RECORD = 1 + 3 * 32 * 32
_BINARY = "cifar-10-batches-bin"
_PICKLED = "cifar-10-batches-py"


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images: pixels of uint8, shape (N, 3, 32, 32), and labels of int64."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]

    def first(self, n_train: int, n_test: int) -> Images:
        """Return the first images of each part."""
        return Images(
            self.train_images[:n_train],
            self.train_labels[:n_train],
            self.test_images[:n_test],
            self.test_labels[:n_test],
        )

    def train_tensors(self) -> tuple[Tensor, Tensor]:
        """Return training images with mean 0 and variance 1 in each channel, and labels."""
        return self._tensors(self.train_images, self.train_labels)

    def test_tensors(self) -> tuple[Tensor, Tensor]:
        """Return test images on the scale of the training images, and labels."""
        return self._tensors(self.test_images, self.test_labels)

    def _tensors(self, images: NDArray[Any], labels: NDArray[Any]) -> tuple[Tensor, Tensor]:
        mean = self.train_images.mean(axis=(0, 2, 3), dtype=np.float64)
        scale = self.train_images.std(axis=(0, 2, 3), dtype=np.float64)
        shape = (1, 3, 1, 1)
        scaled = (images - mean.reshape(shape)) / scale.reshape(shape)
        return torch.from_numpy(scaled.astype(np.float32)), torch.from_numpy(labels)


def find_data() -> Path:
    """Return the path of the images that lie beside the project.

    Raises
    ------
    FileNotFoundError
        If they are neither in the folder that ``SPECTRALSHELL_DATA`` names nor in
        ``../shared/data``.
    """
    named = os.environ.get("SPECTRALSHELL_DATA")
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folders = [Path(named)] if named else [beside]
    for folder in folders:
        if (folder / FILE).exists():
            return folder / FILE
    raise FileNotFoundError(
        f"no {FILE} in {folders[0]}: set SPECTRALSHELL_DATA to its folder, or give your own "
        "CIFAR-10 with --data PATH (the archive from its home page, unpacked or not)."
    )


def load_images(path: Path) -> Images:
    """Read CIFAR-10.

    Parameters
    ----------
    path : Path
        An ``.npz`` file with ``X_train``, ``y_train``, ``X_test``, ``y_test`` (N × 32 × 32 × 3);
        the folder ``cifar-10-batches-bin`` or ``cifar-10-batches-py``, or one that holds either;
        or the ``.tar.gz`` of either.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If what is there is not CIFAR-10 in one of these forms.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no CIFAR-10 at {path}: there is nothing there.")
    if path.is_dir():
        return _from_files(path, {p.name: p.read_bytes for p in _folder(path).iterdir()})
    if path.suffix == ".npz":
        return _from_npz(path)
    if tarfile.is_tarfile(path):
        return _from_archive(path)
    raise ValueError(
        f"{path} is not CIFAR-10: expected an .npz file, the folder {_BINARY} or {_PICKLED}, or "
        "the .tar.gz of one of them."
    )


def _folder(path: Path) -> Path:
    inner = [path / name for name in (_BINARY, _PICKLED) if (path / name).is_dir()]
    return inner[0] if inner else path


def _from_npz(path: Path) -> Images:
    with np.load(path) as arrays:
        names = ("X_train", "y_train", "X_test", "y_test")
        missing = [name for name in names if name not in arrays]
        if missing:
            raise ValueError(f"{path} has no {', '.join(missing)}; expected {', '.join(names)}.")
        found = {name: arrays[name] for name in names}
    return Images(
        _channels_first(path, found["X_train"]),
        found["y_train"].astype(np.int64),
        _channels_first(path, found["X_test"]),
        found["y_test"].astype(np.int64),
    )


def _channels_first(path: Path, images: NDArray[Any]) -> NDArray[np.uint8]:
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3):
        raise ValueError(
            f"{path} holds images of {images.dtype} and shape {images.shape}; expected uint8 and "
            "(N, 32, 32, 3)."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _from_archive(path: Path) -> Images:
    with tarfile.open(path) as archive:
        members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}
        readers: dict[str, Callable[[], bytes]] = {
            name: (lambda m=member: archive.extractfile(m).read())
            for name, member in members.items()
        }
        return _from_files(path, readers)


def _from_files(path: Path, readers: dict[str, Callable[[], bytes]]) -> Images:
    """Read the parts that are there, in order; not all five training parts need to be."""
    for ending, read in ((".bin", _records), ("", _pickled)):
        train = sorted(n for n in readers if _is_part(n, "data_batch_", ending))
        test = f"test_batch{ending}"
        if train and test in readers:
            parts = [read(name, readers[name]()) for name in train]
            test_images, test_labels = read(test, readers[test]())
            return Images(
                np.concatenate([images for images, _ in parts]),
                np.concatenate([labels for _, labels in parts]),
                test_images,
                test_labels,
            )
    raise ValueError(
        f"{path} holds neither data_batch_1.bin … and test_batch.bin nor data_batch_1 … and "
        "test_batch, the files of the official CIFAR-10."
    )


def _is_part(name: str, start: str, ending: str) -> bool:
    return (
        name.startswith(start)
        and name.removeprefix(start).removesuffix(ending).isdigit()
        and (name.endswith(ending))
    )


def _records(name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the binary form: a byte of label, then red, green and blue planes."""
    if not content or len(content) % _RECORD:
        raise ValueError(f"{name} has {len(content)} bytes; expected a multiple of {_RECORD}.")
    rows = np.frombuffer(content, np.uint8).reshape(-1, _RECORD)
    return rows[:, 1:].reshape(-1, *SHAPE).copy(), rows[:, 0].astype(np.int64)


def _pickled(name: str, content: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read the Python form: a dictionary with ``data`` and ``labels``."""
    found = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(found, dict) or not {b"data", b"labels"} <= set(found):
        raise ValueError(f"{name} does not hold a dictionary with data and labels.")
    images = np.asarray(found[b"data"])
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != _RECORD - 1:
        raise ValueError(
            f"{name} holds data of {images.dtype} and shape {images.shape}; expected uint8 and "
            f"(N, {_RECORD - 1})."
        )
    return images.reshape(-1, *SHAPE), np.asarray(found[b"labels"], dtype=np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Loads numpy arrays in plain containers: a file from elsewhere must not run code."""

    _ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
        ("__builtin__", "bytes"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise ValueError(
                f"a CIFAR-10 file asks for {module}.{name}: it is not the official one."
            )
        return super().find_class(module, name)
