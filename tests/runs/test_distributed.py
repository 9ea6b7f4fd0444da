"""Of several processes one writes, and training is that without a recorder."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from spectralshell.runs import TrainingRecorder, TrainingRun


def _work(rank, directory, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    recorder = TrainingRecorder(model, optimizer, f"{directory}/run", resume=True)
    assert recorder.restore() == 0
    with recorder:
        for step in range(4):
            generator = torch.Generator().manual_seed(10 * step + rank)
            loss = model(torch.randn(4, 3, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.log(loss=loss)
    torch.save(model.module.state_dict(), f"{directory}/model-{rank}.pt")
    dist.destroy_process_group()


def _free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_rank_0_writes_alone(tmp_path):
    mp.start_processes(_work, args=(str(tmp_path), _free_port()), nprocs=2, start_method="fork")
    model = nn.Linear(3, 1)
    run = TrainingRun(tmp_path / "run", model)
    assert run.history["step"].tolist() == [1, 2, 3, 4]
    assert run.states["step"].tolist() == [0, 1, 2, 3, 4]
    last = run.snapshots([(torch.ones(4, 3), torch.zeros(4, 1))])[-1].load_state()
    for rank in range(2):
        trained = torch.load(tmp_path / f"model-{rank}.pt", weights_only=True)
        assert all(torch.equal(trained[name], last[name]) for name in last)
