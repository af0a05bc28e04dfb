"""Two real processes under torch.distributed, without Ray, train what one process trains."""

import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from eclipse_ray.cluster.gather import gather_slices
from eclipse_ray.config import load_config
from eclipse_ray.diffusion.training import run_fit, start_fit

CONFIG = load_config(
    None,
    {
        "denoiser.preset": "debug",
        "denoiser.variance_type": "learned_range",
        "denoiser.timestep_sampler": "loss_second_moment",
        "denoiser.iterations": 16,
        "denoiser.report_every": 16,
    },
).denoiser


def train(rank, world_size):
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (12, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fit = start_fit(CONFIG, 0, torch.device("cpu"))
    run_fit(
        fit,
        images[4:],
        images[:4],
        0,
        lambda _: None,
        lambda _: None,
        rank=rank,
        world_size=world_size,
        wrap=DistributedDataParallel if world_size > 1 else lambda module: module,
        gather=lambda part: gather_slices(part, CONFIG.batch_size),
    )
    return {"average": fit.average, **(fit.timestep_losses or {})}


def worker(rank, folder):
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # 5 images do not divide: this worker has 2 or 3 of them.
    part = torch.tensor([0.0, 1.0]) if rank == 0 else torch.tensor([2.0, 3.0, 4.0])
    assert gather_slices(part, 5).tolist() == [0, 1, 2, 3, 4]
    assert gather_slices(part.long(), 5).tolist() == [0, 1, 2, 3, 4]
    torch.save(train(rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_share_what_they_learn(tmp_path):
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    threads = torch.get_num_threads()
    alone = train(0, 1)
    torch.set_num_threads(threads)
    assert torch.equal(first["losses"], second["losses"])
    # Warmed up, or uniform draws were compared.
    assert int(alone["counts"].min()) >= 10
    assert torch.equal(first["counts"], alone["counts"])
    assert torch.allclose(first["losses"], alone["losses"], rtol=1e-3)
    for name, value in alone["average"].items():
        # Gradients are summed in another order; Adam turns that into parts of the learning rate of 1e-3.
        assert torch.allclose(first["average"][name], value, atol=2e-4), name


def test_a_single_process_needs_no_group():
    part = torch.arange(3)
    assert gather_slices(part, 3) is part
