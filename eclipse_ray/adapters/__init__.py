"""For loops of others: a purified folder as a torch dataset, and compensation as a transform of one image.

Needs torch alone besides this package, not torchvision; for the Adversarial Robustness Toolbox see `adapters.art`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from eclipse_ray import compensation, ledger
from eclipse_ray.config import CompensationConfig, load_config
from eclipse_ray.datasets.memory import load_images
from eclipse_ray.storage.store import Store


class Compensate:
    """A transform, as torchvision's are called: float (3, H, W) in [0, 1] to the same, with new draws every time.

    Draws come from torch's global generator, which a DataLoader seeds anew for each worker and epoch.
    """

    def __init__(self, config: CompensationConfig | None = None) -> None:
        self.config = config or CompensationConfig()

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image, compensated in mode `augment`. Raises ValueError for a bad shape or integer pixels."""
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise ValueError(f"expected float (3, H, W) in [0, 1], got {image.dtype} {tuple(image.shape)}")
        if self.config.mode != "augment":
            return image
        generator = torch.Generator(image.device).manual_seed(int(torch.randint(2**62, (1,))))
        return compensation.augment(image[None], self.config, generator)[0].to(image.dtype)

    def __repr__(self) -> str:
        return f"Compensate({self.config!r})"


class PurifiedImages(Dataset[tuple[Tensor, int]]):
    """The images of a folder that purify wrote, float32 (3, H, W) in [0, 1], each with its label (-1: none).

    Held in memory as uint8, so they must share one size. Where the run left compensation to the training loader
    (mode `augment`, the default), every access draws it anew; `transform` comes after that. Raises InputError for
    a folder that is no dataset or not finished.
    """

    def __init__(self, folder: str, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        settings = ledger.recorded_settings(Store(folder))
        found = load_images(folder, load_config().data)
        self.ids, self.classes, self.images = found.ids, found.classes, torch.from_numpy(found.images)
        self.labels = [-1] * len(found.ids) if found.labels is None else found.labels.tolist()
        config = settings.compensation if settings else CompensationConfig(mode="none")
        self.compensate = Compensate(config) if config.mode == "augment" else None
        self.transform = transform

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].permute(2, 0, 1).float() / 255
        if self.compensate is not None:
            image = self.compensate(image)
        return (image if self.transform is None else self.transform(image)), self.labels[index]
