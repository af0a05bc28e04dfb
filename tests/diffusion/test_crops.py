"""Random crops: inside the image, everywhere equally often, the same for any number of workers."""

import torch

from eclipse_ray.diffusion.training import _draw_batch, centre_crops, crops, image_buffer
from tests.diffusion.test_training import debug


def numbered(*sizes):
    """Images whose red is the row, green the column and blue the image's number."""
    images = []
    for number, (height, width) in enumerate(sizes):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        images.append(torch.stack([rows, columns, torch.full_like(rows, number)], dim=-1).to(torch.uint8))
    return image_buffer(torch.cat([image.flatten() for image in images]), torch.tensor(sizes))


def test_a_crop_is_a_piece_of_its_image():
    images = numbered((16, 16), (20, 40), (90, 17))
    indices = torch.tensor([2, 0, 1, 1])
    cut = crops(images, indices, torch.rand(4, 2, dtype=torch.float64), 16)
    for crop, index in zip(cut, indices.tolist(), strict=True):
        assert (crop[..., 2] == index).all()
        assert (crop[:, 0, 0] == crop[0, 0, 0] + torch.arange(16)).all()
        assert (crop[0, :, 1] == crop[0, 0, 1] + torch.arange(16)).all()


def test_every_position_is_equally_likely():
    places = torch.rand(6000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cut = crops(numbered((18, 17)), torch.zeros(6000, dtype=torch.int64), places, 16)
    down, across = torch.bincount(cut[:, 0, 0, 0]), torch.bincount(cut[:, 0, 0, 1])
    assert len(down) == 3
    assert len(across) == 2
    # Four standard deviations of a binomial count.
    assert (down - 2000).abs().max() < 150
    assert (across - 3000).abs().max() < 160


def test_an_image_of_the_training_size_is_taken_whole():
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(crops(images, indices, torch.rand(3, 2), 16), images[indices])


def test_the_centre_crop_is_the_middle():
    cut = centre_crops(numbered((20, 16), (16, 33)), 16)
    assert cut[:, 0, 0].tolist() == [[2, 0, 0], [0, 9, 1]]


def test_two_workers_cut_the_crops_of_one():
    config, images = debug(batch_size=8), numbered((40, 30), (16, 90), (17, 17))
    whole = _draw_batch(config, images, 3, 0, 0, 1)[0]
    halves = [_draw_batch(config, images, 3, 0, rank, 2)[0] for rank in range(2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, _draw_batch(config, images, 4, 0, 0, 1)[0])
