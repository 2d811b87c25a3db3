# SPDX-License-Identifier: Apache-2.0
"""Train a dual encoder on selected icon-text pairs: `python -m activesel.loop.contrastive`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from activesel.cache import ReferenceCache
from activesel.joint import joint_select
from activesel.ledger import Ledger
from activesel.loop import data, records, training
from activesel.loop.icons import TIERS, IconSplit, icons
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.pairs_cost import pair_flops, price
from activesel.loop.pairs_reference import fresh, pairs_of, recall_of, reference
from activesel.models import contrastive_loss
from activesel.operands import Pairs, untouched
from activesel.selector import Selector


def prepare(configs: Sequence[PairsConfig]) -> None:
    """Fetch and render what is missing; better once than by every worker."""
    for subset in dict.fromkeys(config.subset for config in configs):
        icons(subset=subset)


class PairsTrainer(training.Trainer):
    """One run on pairs: learner, online scorer, and what the reference said of the pool.

    Attributes:
        counts: "kept" and "drawn", how often each row was; "scored", the sum of the batches'
            learnability; "compared" [n, 2], that of a joint and an independent pick from the same
            super-batch. Learnability is per pair kept.
    """

    def __init__(
        self,
        config: PairsConfig,
        split: IconSplit,
        reference: ReferenceCache | None,
        reference_flops: float = 0.0,
        device: str = "cpu",
    ) -> None:
        recipe, seed = config.recipe, config.seed
        ui = config.rows == "ui"
        self.rows = split.pool.rows(~split.pool.emoji) if ui else split.pool
        self.test = split.test.rows(~split.test.emoji) if ui else split.test
        learner = fresh(config.learner, config.patch, split, config, "learner")
        models = {"learner": learner}
        if recipe.online == "scorer" and config.online == "recipe":
            models["online"] = fresh(config.scorer, config.scorer_patch, split, config, "online")
        rates = {"learner": config.lr, "online": config.online_lr}
        super().__init__(config, models, rates, device)
        self.learner, self.coarse, self.reference = learner, learner.at(config.coarse), reference
        self.online = models.get("online") or {
            None: None, "scorer": learner, "coarse": self.coarse
        }[recipe.online]  # fmt: skip
        self.selector = Selector(
            self.online,
            reference,
            keep=config.keep,
            method=recipe.selector,
            loss=config.loss,
            chunks=None if recipe.selector == "uniform" else config.picks,
            optimizer=self.optimizers.get("online"),
            temperature=config.temperature,
            seed=records.seed(seed, "selection"),
            id_key=3,
        )
        self._order = records.seed(seed, "order")
        self.compares = recipe.selector != "uniform" and recipe.how != "dot"
        compared = -(-config.updates // config.compare_every) if self.compares else 0
        self.counts = {
            "kept": torch.zeros(len(self.rows), dtype=torch.int32),
            "drawn": torch.zeros(len(self.rows), dtype=torch.int32),
            "scored": torch.zeros(1, dtype=torch.float64),
            "compared": torch.zeros(compared, 2, dtype=torch.float64),
        }
        self.per_update = price(config, "online" in models)
        self.once = Ledger(reference_training=reference_flops)

    @property
    def cached_ledger(self) -> Ledger:
        """FLOPs so far, had the reference been asked about each row of the pool but once."""
        c = self.config
        once = len(self.rows) * pair_flops(c.scorer, c.scorer_patch) if c.reference else 0.0
        return replace(self.ledger, scoring_reference=once)

    def choose(self) -> tuple[Any, Any]:
        rows, config = self.rows, self.config
        index = data.draw(self.step, config.super_batch, len(rows), self._order)
        batch = self.place(rows.images[index], rows.tokens[index], index, rows.ids[index])
        return batch, self.selector(batch)

    def count(self, batch: Any, kept: Any) -> None:
        for name, index in (("drawn", batch[2]), ("kept", kept[2])):
            self.counts[name][index.cpu()] += 1  # no row is in a batch twice
        last, keep = self.selector.last, self.config.keep
        if not self.compares or last is None or last.batch_score is None:
            return
        score = float(last.batch_score) / keep
        self.counts["scored"] += score
        number, rest = divmod(self.step, self.config.compare_every)
        if rest == 0:
            joint = self.config.picks != 1
            other = self._other(batch, 1 if joint else self.config.chunks) / keep
            both = (score, other) if joint else (other, score)
            self.counts["compared"][number] = torch.tensor(both, dtype=torch.float64)

    def _other(self, batch: Any, chunks: int) -> float:
        """Learnability of what would be kept of the same super-batch with other chunks."""
        online = None
        if self.online is not None:
            with untouched(self.online):
                online = self.online.forward_pairs(batch[0], batch[1])
        said = self.reference.lookup(batch[3]) if self.reference is not None else None
        picked = joint_select(
            online=online,
            reference=said if isinstance(said, Pairs) else None,
            k=self.config.keep,
            chunks=chunks,
            loss=self.config.loss,
            temperature=self.config.temperature,
            seed=self.selector.seed,
            step=self.step,
        )
        assert picked.batch_score is not None
        return float(picked.batch_score)

    def learn(self, kept: Any) -> None:
        images, tokens, _ = kept
        if self.config.recipe.flexi:
            fine = self.learner.forward_pairs(images[0::2], tokens[0::2])
            rest = self.coarse.forward_pairs(images[1::2], tokens[1::2])
            image = torch.cat([fine.image, rest.image])
            text = torch.cat([fine.text, rest.text])
            pairs = Pairs(image, text, fine.scale, fine.bias)
        else:
            pairs = self.learner.forward_pairs(images, tokens)
        training.descend(self.optimizers["learner"], contrastive_loss(pairs, self.config.loss))
        if "online" in self.models:
            self.selector.update(kept)

    def kept(self) -> dict[str, int]:
        """How many of the rows kept so far were of each tier."""
        kept, tier = self.counts["kept"], self.rows.tier
        return {name: int(kept[tier == number].sum()) for name, number in TIERS.items()}

    def measure(self, last: bool) -> dict[str, float]:
        self.recall = recall_of(self.learner, self.test)
        ways = ("image_to_text", "text_to_image")
        return {
            **{f"{way}_{k}": self.recall[way][k] for way in ways for k in ("1", "10")},
            "r10": self.recall["r10"],
            **{f"kept_{name}": count for name, count in self.kept().items()},
            "batch_learnability": float(self.counts["scored"]) / self.step,
        }


def run(
    config: PairsConfig,
    out: Path,
    split: IconSplit | None = None,
    checkpoint_every: int = 200,
    on_update: Callable[[PairsTrainer], object] | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train from the last checkpoint, or from the start, to the end; a finished run is just read.

    Args:
        config: the run.
        out: folder of all runs; this one writes `run.json`, `run.csv` and `kept.safetensors` (how
            often each row was drawn and kept) into `<out>/<config.name>/`.
        split: the data; the icons of the config if not given.
        checkpoint_every: updates between checkpoints.
        on_update: called after every update; what it raises interrupts the run.
        device: where to train.

    Returns:
        The content of `run.json`.

    Raises:
        ValueError: a damaged checkpoint or one of another config.
    """
    folder = out / config.name
    if (folder / "run.json").is_file():
        return records.read_json(folder / "run.json")
    split = split or pairs_of(config)
    said, entry = (
        reference(config.reference, out, split, device) if config.reference else (None, None)
    )
    trainer = PairsTrainer(config, split, said, entry["flops"] if entry else 0.0, device)
    curve = training.train(trainer, folder, checkpoint_every, on_update)
    counts, rows = trainer.counts, trainer.rows
    records.write_tensors(
        folder / "kept.safetensors",
        {"ids": rows.ids, "kept": counts["kept"], "drawn": counts["drawn"]},
    )
    compared = counts["compared"]
    cached = trainer.cached_ledger
    scored = config.updates * config.super_batch
    result = {
        "recall": trainer.recall,
        "kept": trainer.kept(),
        "pool": rows.tiers,
        "batch_learnability": {
            "mean": float(counts["scored"]) / config.updates,
            **dict(zip(("joint", "independent"), compared.mean(0).tolist(), strict=True)),
            "every": config.compare_every,
            "compared": compared.tolist(),
        }
        if trainer.compares
        else None,
        "reference": entry,
        "reference_scoring_seconds": {
            "fresh": entry["pool_seconds"] * scored / len(split.pool),
            "cached": entry["pool_seconds"],
        }
        if entry
        else None,
        "ledger_cached": {**asdict(cached), "total": cached.total},
    }
    return training.finish(trainer, folder, curve, result)


def main() -> None:
    """Command line: every field of `PairsConfig`, and the folder to write to."""
    import tyro
    from rich.console import Console
    from rich.progress import Progress

    def command(config: PairsConfig, out: Path = Path("runs")) -> None:
        """Train a dual encoder on selected pairs; stop it at any time, the same line goes on."""
        with Progress(transient=True) as progress:
            bar = progress.add_task(config.name, total=config.updates)
            result = run(
                config,
                out,
                on_update=lambda trainer: progress.update(bar, completed=trainer.step),
            )
        kept, recall = result["kept"], result["recall"]
        total = sum(kept.values())
        shares = ", ".join(f"{name} {count / total:.1%}" for name, count in kept.items())
        Console(highlight=False).print(
            f"R@10 {recall['r10']:.4f}, R@1 {recall['image_to_text']['1']:.4f} image to text, "
            f"{recall['text_to_image']['1']:.4f} text to image; kept {shares}; "
            f"{result['ledger']['total']:.3g} FLOPs, {result['seconds']:.0f} s; "
            f"{out / config.name}/run.json",
            soft_wrap=True,
        )

    tyro.cli(command, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    main()
