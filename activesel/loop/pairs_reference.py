# SPDX-License-Identifier: Apache-2.0
"""The data of a run on pairs, and references: trained once, asked once about every row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from activesel.cache import ReferenceCache, write_cache
from activesel.loop import records, training
from activesel.loop.icons import IconPairs, IconSplit, icons
from activesel.loop.pairs_config import PairsConfig, PairsReference
from activesel.loop.pairs_cost import build, pair_flops, train_flops
from activesel.loop.retrieval import embed, retrieval
from activesel.models import DualEncoder, contrastive_loss, load, save
from activesel.operands import Pairs


@lru_cache(maxsize=2)
def _icons(seed: int, mix: tuple[float, float, float], subset: str, noise: float) -> IconSplit:
    return icons(seed, mix, subset, noise)


def pairs_of(config: PairsConfig | PairsReference) -> IconSplit:
    """The data of a config; the last two are kept in memory."""
    return _icons(config.seed, config.mix, config.subset, config.noise)


def fresh(size: str, patch: int, split: IconSplit, config: Any, *purpose: str) -> DualEncoder:
    """New weights; the bias is the log-odds of a pair among `keep` texts, as in SigLIP."""
    with training.seeded(records.seed(config.seed, *purpose)):
        model = build(size, patch, len(split.words) + 2)
    nn.init.constant_(model.bias, -math.log(config.keep))
    return model


class _Rows:
    """Pairs as `write_cache` reads them."""

    def __init__(self, rows: IconPairs) -> None:
        self.rows, self.fingerprint = rows, rows.fingerprint

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield {"images": self.rows.images, "texts": self.rows.tokens, "id": self.rows.ids}


def reference(
    config: PairsReference,
    out: Path,
    split: IconSplit | None = None,
    device: str = "cpu",
) -> tuple[ReferenceCache, dict[str, Any]]:
    """Train a reference scorer and ask it about the pool, or load both if `out` holds them already.

    Returns:
        Its embeddings of the pool, and its record: recall on the test rows, FLOPs, seconds.

    Raises:
        ValueError: `out` holds it for other data, or damaged.
    """
    split = split or pairs_of(config)
    folder = out / config.name
    weights, cache, record = (folder / n for n in ("model.safetensors", "pool", "reference.json"))
    if record.is_file():
        model = load(weights, kind=DualEncoder)
        said = ReferenceCache(cache, data=split.pool.fingerprint, model=model, device=device)
        return said, records.read_json(record)
    model, entry = _train(config, out, split, device)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, weights)
    clock = training.Clock()
    with clock:
        write_cache(cache, model, _Rows(split.pool), kind="embeddings", overwrite=True)
    entry |= {"pool_seconds": clock.seconds, "pool_cpu_seconds": clock.cpu_seconds}
    records.write_json(record, entry)
    said = ReferenceCache(cache, data=split.pool.fingerprint, model=model, device=device)
    return said, entry


def _train(
    config: PairsReference, out: Path, split: IconSplit, device: str
) -> tuple[DualEncoder, dict[str, Any]]:
    images, tokens, before = _material(config, out, split)
    model = fresh(config.scorer, config.scorer_patch, split, config, "reference", config.part)
    model.to(device)

    def loss(index: Tensor) -> Tensor:
        pairs = model.forward_pairs(images[index].to(device), tokens[index].to(device))
        return contrastive_loss(pairs, config.loss)

    spent = training.fit(model, config, len(images), loss)
    flops = config.updates * train_flops(config.scorer, config.scorer_patch, config.keep)
    return model, {
        "config": asdict(config),
        "rows": len(images),
        "recall": recall_of(model, split.test),
        "flops": flops + before.get("flops", 0.0),
        **{name: value + before.get(name, 0.0) for name, value in spent.items()},
        "joined": before.get("joined"),
    }


def _material(
    config: PairsReference, out: Path, split: IconSplit
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Images and tokens that a reference is trained on, and what it cost to find them."""
    clean, pool = split.clean, split.pool
    if config.reference is not None:
        first, entry = reference(config.reference, out, split)
        said = first.lookup(pool.ids)
        assert isinstance(said, Pairs)
        aligned = (said.image * said.text).sum(1)
        best = pool.rows(aligned.topk(min(round(config.joined * len(clean)), len(pool))).indices)
        rank = len(pool) * pair_flops(config.scorer, config.scorer_patch)
        before = {
            "flops": entry["flops"] + rank,
            "seconds": entry["seconds"] + entry["pool_seconds"],
            "cpu_seconds": entry["cpu_seconds"] + entry["pool_cpu_seconds"],
            "joined": best.tiers,
        }
        images, tokens = (
            torch.cat([getattr(part, name) for part in (clean, best)])
            for name in ("images", "tokens")
        )
        return images, tokens, before
    rows = {"clean": clean, "pool": pool, "emoji": clean.rows(clean.emoji)}[config.part]
    return rows.images, rows.tokens, {}


def recall_of(model: DualEncoder, rows: IconPairs) -> dict[str, Any]:
    """R@1 and R@10 both ways, and `r10`, the mean of the two R@10."""
    found = retrieval(embed(model, rows.images, rows.tokens))
    return {**found, "r10": sum(way["10"] for way in found.values()) / len(found)}
