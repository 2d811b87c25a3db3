# SPDX-License-Identifier: Apache-2.0
"""A whole training loop with selection: noisy labels, and the share of wrong ones that is kept."""

import torch
import torch.nn.functional as F
from torch import nn

import activesel

SUPER, KEEP, UPDATES, WRONG = 512, 128, 300, 0.2

torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 5))


def draw(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, labels of which a fifth are random, and which of them are wrong."""
    x = torch.randn(rows, 16)
    with torch.no_grad():
        right = teacher(x).argmax(-1)
    y = torch.where(torch.rand(rows) < WRONG, torch.randint(5, (rows,)), right)
    return x, y, y != right


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 5))


reference = network(16)  # a small model, trained first, on the same noisy labels
optimizer = torch.optim.AdamW(reference.parameters(), 1e-2)
for _ in range(UPDATES):
    x, y, _ = draw(KEEP)
    train(reference, optimizer, x, y)

learner, online = network(256), network(16)
optimizer = torch.optim.AdamW(learner.parameters(), 1e-3)
sel = activesel.Selector(
    online,
    reference,
    keep=KEEP,
    temperature=0.5,
    label_smoothing=0.2,
    optimizer=torch.optim.AdamW(online.parameters(), 1e-2),
)
seen = kept = 0
for _ in range(UPDATES):
    batch = draw(SUPER)
    seen += int(batch[2].sum())
    x, y, wrong = batch = sel(batch)
    kept += int(wrong.sum())
    train(learner, optimizer, x, y)
    sel.update(batch)

x, _, _ = draw(10_000)
accuracy = (learner(x).argmax(-1) == teacher(x).argmax(-1)).float().mean()
drawn_wrong, kept_wrong = seen / (SUPER * UPDATES), kept / (KEEP * UPDATES)
print(f"wrong labels: {drawn_wrong:.1%} of the rows drawn, {kept_wrong:.1%} of the rows kept")
print(f"accuracy of the learner on clean rows: {accuracy:.1%}")
