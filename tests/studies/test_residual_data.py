"""CIFAR-10 is read the same from every form that people have it in."""

import pickle
import tarfile

import numpy as np
import pytest

from studies.residual.data import find_data, load_images

N_TRAIN, N_TEST = 7, 4


@pytest.fixture
def images():
    """Random pixels, channels first, with labels: training parts of 4 and 3 images, and a test."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (N_TRAIN + N_TEST, 3, 32, 32)).astype(np.uint8)
    return pixels, rng.integers(0, 10, N_TRAIN + N_TEST)


def parts(images):
    pixels, labels = images
    ends = {"data_batch_1": slice(0, 4), "data_batch_2": slice(4, 7), "test_batch": slice(7, None)}
    return {name: (pixels[rows], labels[rows]) for name, rows in ends.items()}


def write_npz(folder, images):
    first = images[0].transpose(0, 2, 3, 1)
    path = folder / "images.npz"
    np.savez(
        path, X_train=first[:N_TRAIN], y_train=images[1][:N_TRAIN], X_test=first[N_TRAIN:],
        y_test=images[1][N_TRAIN:], classes=np.array(["plane"]),
    )  # fmt: skip
    return path


def write_binary(folder, images):
    target = folder / "cifar-10-batches-bin"
    target.mkdir()
    for name, (pixels, labels) in parts(images).items():
        rows = np.concatenate([labels[:, None].astype(np.uint8), pixels.reshape(-1, 3072)], axis=1)
        (target / f"{name}.bin").write_bytes(rows.tobytes())
    (target / "batches.meta.txt").write_text("airplane")
    return target


def write_pickled(folder, images):
    target = folder / "cifar-10-batches-py"
    target.mkdir()
    for name, (pixels, labels) in parts(images).items():
        content = {
            b"data": pixels.reshape(-1, 3072),
            b"labels": labels.tolist(),
            b"batch_label": b"",
        }
        (target / name).write_bytes(pickle.dumps(content, protocol=2))
    (target / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"airplane"]}))
    return target


def write_archive(folder, images, write):
    inside = folder / "unpacked"
    inside.mkdir()
    path = folder / "cifar-10.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        unpacked = write(inside, images)
        archive.add(unpacked, arcname=unpacked.name)
    return path


FORMS = {
    "npz": write_npz,
    "binary": write_binary,
    "folder of binary": lambda folder, images: write_binary(folder, images).parent,
    "python": write_pickled,
    "binary archive": lambda folder, images: write_archive(folder, images, write_binary),
    "python archive": lambda folder, images: write_archive(folder, images, write_pickled),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images(form, tmp_path, images):
    found = load_images(FORMS[form](tmp_path, images))
    assert np.array_equal(np.concatenate([found.train_images, found.test_images]), images[0])
    assert np.array_equal(np.concatenate([found.train_labels, found.test_labels]), images[1])
    assert found.train_labels.dtype == np.int64
    assert len(found.train_images) == N_TRAIN


def test_tensors_have_unit_scale_of_the_training_images(tmp_path, images):
    found = load_images(write_npz(tmp_path, images))
    inputs, targets = found.train_tensors()
    assert inputs.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (inputs.std(dim=(0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    assert targets.tolist() == images[1][:N_TRAIN].tolist()
    test_inputs, _ = found.test_tensors()
    assert test_inputs.mean(dim=(0, 2, 3)).abs().max() > 1e-4  # not its own mean


def test_first_images(tmp_path, images):
    found = load_images(write_npz(tmp_path, images)).first(3, 2)
    assert (len(found.train_images), len(found.test_labels)) == (3, 2)


def test_pickles_cannot_run_code(tmp_path, images):
    folder = write_pickled(tmp_path, images)
    (folder / "data_batch_1").write_bytes(pickle.dumps(print))
    with pytest.raises(ValueError, match=r"builtins\.print"):
        load_images(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_1.bin", b"12345", "3073"),
        ("other.txt", b"", "neither"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_images(tmp_path / "nowhere")


def test_data_is_found_through_the_environment(tmp_path, monkeypatch, images):
    monkeypatch.setenv("SPECTRALSHELL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="SPECTRALSHELL_DATA"):
        find_data()
    write_npz(tmp_path, images).rename(tmp_path / "cifar10_6k.npz")
    assert find_data() == tmp_path / "cifar10_6k.npz"
