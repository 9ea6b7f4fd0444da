"""Checkpoint files that are cut off, foreign or hostile: one clear error, nothing executed."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from spectralshell import Snapshot
from spectralshell.models.checkpoints.tensor_files import TensorFile
from spectralshell.operators import build_kernel

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
STATE = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
BATCH = (torch.ones(5, 3), torch.ones(5, 2))


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harmful(mark):
    """Calls that would leave a mark, read a file of the machine, or load another one."""
    return {
        "system": Runs(os.system, f"touch {mark}"),
        "eval": Runs(eval, f"open({str(mark)!r}, 'w')"),
        "open": Runs(open, str(mark), "w"),
        "import": Runs(__import__, "this"),
        "storage": Runs(torch.UntypedStorage.from_file, "/etc/passwd", False, 10),
        "load": Runs(torch.load, "/etc/passwd"),
        "hub": Runs(torch.hub.load, "owner/name", "model"),
    }


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def with_header(header, values=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def entry(*offsets, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def zipped(members, packing=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def changed_archive(change):
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members, next(name for name in members if name.endswith("/data/0")))
    return zipped(members)


def circle():
    content = {}
    content["state_dict"] = content
    return content


SAFE, ARCHIVE = save(STATE), saved(STATE)
LEGACY = saved(STATE, _use_new_zipfile_serialization=False)
HEADER = struct.unpack("<Q", SAFE[:8])[0]

FILES = {
    "empty": b"",
    "text": b"hello world, this is text\n" * 5,
    "page": b"<!DOCTYPE html><html>404</html>",
    "pointer of git": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n",
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    "gguf": b"GGUF" + bytes(100),
    "index": json.dumps({"weight_map": {"a": "../../../etc/passwd"}}).encode(),
    **{f"{n} bytes of safetensors": SAFE[:n] for n in (1, 8, 20, HEADER + 8, len(SAFE) - 1)},
    **{f"{n} bytes of an archive": ARCHIVE[:n] for n in (3, 100, len(ARCHIVE) - 1)},
    **{f"{n} bytes of a pickle": LEGACY[:n] for n in (1, 10, len(LEGACY) // 2)},
    "header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}" + b" " * 100,
    "overlap": with_header({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "hole": with_header({"a": entry(4, 12)}, bytes(12)),
    "beyond the end": with_header({"a": entry(0, 8000)}, bytes(8)),
    "negative offset": with_header({"a": entry(-8, 0)}, bytes(8)),
    "overflow": with_header({"a": entry(0, 8, shape=(2**62, 2**62))}, bytes(8)),
    "unknown type": with_header({"a": entry(0, 8, dtype="F3")}, bytes(8)),
    "list for a header": with_header([1, 2]),
    "broken header": with_header(b"{'a':"),
    "no tensors": with_header({"__metadata__": {"a": "b"}}),
    "name with a path": with_header({"../../etc/passwd": entry(0, 8)}, bytes(8)),
    "archive with a path": zipped({"../../evil": b"x", "archive/data.pkl": pickle.dumps({})}),
    "bomb": zipped({"a/data.pkl": bytes(10**6), "a/version": b"3"}, zipfile.ZIP_DEFLATED),
    "empty archive": zipped({}),
    "record missing": changed_archive(lambda members, name: members.pop(name)),
    "circle": saved(circle()),
    "list": saved([torch.ones(2)]),
    "tensor": saved(torch.ones(2)),
    "whole model": saved(MODEL),
    "other key": saved({"net": STATE, "epoch": 3}),
    "without memory": saved(STATE | {"0.weight": torch.ones(1).expand(10**6, 10**6)}),
    "deep": b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "long frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"K\x01.",
}


def check_refused(path):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its text is what is checked
        Snapshot(MODEL, *BATCH, state=path)
    text = str(caught.value)
    assert text.startswith("state: ")
    assert str(path) in text
    assert "weights_only" not in text
    assert len(text) < 600 + len(str(path))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_state_is_named_when_the_snapshot_is_made(tmp_path, kind, suffix):
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(FILES[kind])
    check_refused(path)


@pytest.mark.parametrize("name", harmful(""))
@pytest.mark.parametrize("form", ["archive", "legacy", "pickle", "first protocol"])
def test_code_in_a_file_is_not_run(tmp_path, name, form):
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    content = {"state_dict": STATE, "more": harmful(mark)[name]}
    if form == "pickle":
        written = pickle.dumps(harmful(mark)[name])
    elif form == "first protocol":
        written = pickle.dumps(harmful(mark)[name], protocol=0)
    else:
        written = saved(content, _use_new_zipfile_serialization=form == "archive")
    path.write_bytes(written)
    check_refused(path)
    assert not mark.exists()


def test_values_that_are_cut_off_are_named_when_they_are_read(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(changed_archive(lambda members, name: members.update({name: b"1234"})))
    snapshot = Snapshot(MODEL, *BATCH, state=path)
    with pytest.raises(ValueError, match=r"state: .*model\.pt' is not a readable checkpoint"):
        snapshot.load_state()


def test_folders_and_devices_are_named(tmp_path):
    check_refused(tmp_path)
    (tmp_path / "link.pt").symlink_to(tmp_path / "link.pt")
    for path in ("/dev/zero", tmp_path / "link.pt", tmp_path / "a\0b", "~/no_such_file.pt"):
        with pytest.raises(FileNotFoundError, match="state: there is no checkpoint file at"):
            Snapshot(MODEL, *BATCH, state=path)


def test_the_folder_of_the_user_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(STATE, tmp_path / "model.safetensors")
    state = Snapshot(MODEL, *BATCH, state="~/model.safetensors").load_state()
    assert torch.equal(state["0.weight"], STATE["0.weight"])


@pytest.mark.parametrize("form", ["safetensors", "archive", "legacy"])
def test_wrong_keys_are_found_when_the_snapshot_is_made(tmp_path, form):
    path = tmp_path / "model"
    other = {f"net.{name}": tensor for name, tensor in STATE.items()}
    archive = form == "archive"
    written = save(other) if form == "safetensors" else None
    path.write_bytes(written or saved(other, _use_new_zipfile_serialization=archive))
    with pytest.raises(ValueError, match=r"missing keys: 0.weight.*unexpected keys: net\.0"):
        Snapshot(MODEL, *BATCH, state=path)


def test_values_are_not_read_for_the_keys(tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(ARCHIVE)
    devices = []
    read = TensorFile.content
    monkeypatch.setattr(
        TensorFile, "content", lambda file, device: devices.append(device) or read(file, device)
    )
    Snapshot(MODEL, *BATCH, state=path)
    assert devices == ["meta"]


def counting_model():
    model = nn.Linear(3, 2)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("mask", torch.tensor([True, False]))
    return model


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch means to drop them; their files remain
    QUANTIZED = torch.quantize_per_tensor(torch.full((2, 3), 0.5), 0.25, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([torch.ones(3)] * 2, layout=torch.jagged)

REFUSED = {
    "int8": (
        "weight",
        torch.ones(2, 3, dtype=torch.int8),
        "'weight' in the mapping has dtype torch.int8.*depends on a scale",
    ),
    "bool": ("weight", torch.ones(2, 3, dtype=torch.bool), "depends on a scale"),
    "float8": ("weight", torch.ones(2, 3).to(torch.float8_e4m3fn), "depends on a scale"),
    "complex": ("weight", torch.ones(2, 3, dtype=torch.complex64), "do not fit into"),
    "sparse": ("weight", torch.ones(2, 3).to_sparse(), "is not dense"),
    "nested": ("weight", NESTED, "is not dense"),
    "meta": ("weight", torch.ones(2, 3, device="meta"), "holds no values"),
    "row": ("weight", torch.ones(1, 3), r"different shapes: weight \(1, 3\) instead of"),
    "scalar": ("bias", torch.tensor(1.0), r"different shapes: bias \(\) instead of"),
    "half a count": ("count", torch.tensor(3.5), "do not fit into"),
    "large mask": ("mask", torch.tensor([2, 0]), "do not fit into"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_numbers_of_another_kind_are_refused_by_name(kind, tmp_path):
    model = counting_model()
    name, value, message = REFUSED[kind]
    state = model.state_dict() | {name: value}
    with pytest.raises(ValueError, match=f"state: .*{message}"):
        Snapshot(model, *BATCH, state=state)
    if kind in ("int8", "bool", "float8"):  # known from the header
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="depends on a scale"):
            Snapshot(model, *BATCH, state=tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("weight", QUANTIZED, torch.full((2, 3), 0.5)),  # the scale is in the tensor
        ("weight", torch.full((2, 3), 0.5, dtype=torch.float64), torch.full((2, 3), 0.5)),
        ("count", torch.tensor(3.0), torch.tensor(3)),
        ("mask", torch.tensor([1, 0], dtype=torch.uint8), torch.tensor([True, False])),
    ],
    ids=["quantized", "float64", "count", "mask"],
)
def test_what_loses_nothing_is_converted(name, value, expected):
    model = counting_model()
    state = Snapshot(model, *BATCH, state=model.state_dict() | {name: value}).load_state()
    assert state[name].dtype == expected.dtype
    assert torch.equal(state[name], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_told(dtype, tmp_path):
    half = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    save_file(half, tmp_path / "half.safetensors")
    for state in (half, tmp_path / "half.safetensors"):
        kernel = build_kernel(Snapshot(MODEL, *BATCH, state=state))
        name = str(dtype).removeprefix("torch.")
        assert kernel.status == f"{name} checkpoint measured in float32"


def test_the_arrays_of_numpy_are_no_checkpoint(tmp_path):
    for name, write in (("a.npy", np.save), ("a.npz", np.savez)):
        write(tmp_path / name, np.ones(3))
        check_refused(tmp_path / name)
