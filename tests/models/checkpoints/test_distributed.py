"""States that several ranks saved in pieces, read in one process without a process group."""

import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from spectralshell import Checkpoint, Snapshot
from tests.models.checkpoints.kinds import copied, plain_model, save_distributed

BATCH = (torch.ones(5, 3), torch.ones(5, 2))
N_RANKS = 2


def train_and_save(rank, port, folder):
    """One rank of a run under FSDP2; the first one keeps what the whole state is."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", rank=rank, world_size=N_RANKS)
    torch.set_num_threads(1)
    model = plain_model()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (N_RANKS,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    content = {
        "app": {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
    }
    dcp.save(content, checkpoint_id=f"{folder}/step-1")
    whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_what_ranks_saved_in_pieces_is_read_whole(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train_and_save, (port, str(tmp_path)), nprocs=N_RANKS)
    assert len(list((tmp_path / "step-1").glob("*.distcp"))) == N_RANKS
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    state = Checkpoint(tmp_path / "step-1", key="app.model")
    found = Snapshot(plain_model(1), *BATCH, state=state).load_state()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(ValueError, match=r"key='app"):
        Snapshot(plain_model(1), *BATCH, state=tmp_path / "step-1")


@pytest.mark.parametrize("path", ["dcp", "dcp/.metadata"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_state_alone_and_one_in_a_dictionary(tmp_path, path, nested):
    model = plain_model()
    save_distributed(
        {"model": model.state_dict()} if nested else model.state_dict(), tmp_path / "dcp"
    )
    found = Snapshot(plain_model(1), *BATCH, state=tmp_path / path).load_state()
    assert all(torch.equal(found[name], tensor) for name, tensor in copied(model).items())


def test_types_and_scalars_stay(tmp_path):
    model = nn.BatchNorm1d(3).to(torch.float64)
    model(torch.randn(4, 3, dtype=torch.float64))
    save_distributed(model.state_dict(), tmp_path / "dcp")
    data = torch.ones(2, 3, dtype=torch.float64)
    found = Snapshot(nn.BatchNorm1d(3).to(torch.float64), data, data, state=tmp_path / "dcp")
    assert all(torch.equal(found.load_state()[n], t) for n, t in copied(model).items())


def test_the_values_of_an_optimiser_are_not_read(tmp_path, monkeypatch):
    model = plain_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    save_distributed(content, tmp_path / "dcp")
    from spectralshell.models.checkpoints import distributed

    read = []
    original = distributed.read_tensor
    monkeypatch.setattr(
        distributed, "read_tensor", lambda *given: read.append(given) or original(*given)
    )
    snapshot = Snapshot(plain_model(1), *BATCH, state=tmp_path / "dcp")
    assert read == []
    snapshot.load_state()
    assert len(read) == len(model.state_dict())
