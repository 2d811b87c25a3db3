# SPDX-License-Identifier: Apache-2.0
"""A contrastive training loop with joint selection: pairs of which most have nothing to do with
each other, a reference trained on few good ones, and the share of good pairs that is kept."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import activesel
from activesel.models import contrastive_loss

SUPER, KEEP, UPDATES, GOOD = 640, 128, 200, 0.2

torch.manual_seed(0)
look, say = torch.randn(8, 32), torch.randn(8, 32)  # how a thing looks, and what is said of it


def draw(rows: int, good: float = GOOD) -> tuple[Tensor, Tensor, Tensor]:
    """Images [rows, 32], texts [rows, 32], and which of them belong together."""
    thing, matches = torch.randn(rows, 8), torch.rand(rows) < good
    other = torch.where(matches[:, None], thing, torch.randn(rows, 8))
    return (thing @ look).tanh(), (other @ say).tanh(), matches


class Dual(nn.Module):
    """Anything with `forward_pairs(images, texts) -> Pairs` will do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, 32)) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward_pairs(self, images: Tensor, texts: Tensor) -> activesel.Pairs:
        image, text = (
            F.normalize(t(x), dim=1) for t, x in zip(self.towers, (images, texts), strict=True)
        )
        return activesel.Pairs(image, text, self.log_scale.exp(), self.bias)


def train(model: Dual, optimizer: torch.optim.Optimizer, images: Tensor, texts: Tensor) -> None:
    optimizer.zero_grad()
    contrastive_loss(model.forward_pairs(images, texts), "sigmoid").backward()
    optimizer.step()


reference = Dual(32)
optimizer = torch.optim.AdamW(reference.parameters(), 3e-3)
for _ in range(UPDATES):
    train(reference, optimizer, *draw(KEEP, good=1.0)[:2])

learner, online = Dual(256), Dual(32)
optimizer = torch.optim.AdamW(learner.parameters(), 1e-3)
sel = activesel.Selector(
    online, reference, keep=KEEP, chunks=16, optimizer=torch.optim.AdamW(online.parameters(), 3e-3)
)
kept = 0
for _ in range(UPDATES):
    images, texts, matches = batch = sel(draw(SUPER))
    kept += int(matches.sum())
    train(learner, optimizer, images, texts)
    sel.update(batch)

images, texts, _ = draw(500, good=1.0)
pairs = learner.forward_pairs(images, texts)
found = (pairs.image @ pairs.text.T).argmax(1) == torch.arange(500)
print(f"good pairs: {GOOD:.0%} of those drawn, {kept / (KEEP * UPDATES):.0%} of those kept")
print(f"right text found among 500: {found.float().mean():.0%} of images")
