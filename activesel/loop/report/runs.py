# SPDX-License-Identifier: Apache-2.0
"""Runs read from `run.json`, grouped by configuration, compared with uniform sampling."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from activesel.ledger import learner_speedup
from activesel.loop import records
from activesel.loop.config import Config
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.report.parts import percent, signed, text
from activesel.loop.rho_config import RhoConfig

Run = dict[str, Any]

NAMES = {
    "classact": "ClassAct", "classact-ho": "ClassAct-HO", "classact-online": "ClassAct-Online",
    "rho": "RHO", "train-loss": "highest loss", "easy": "easy reference", "hard": "hard learner",
    "activeclip": "ActiveCLIP", "activesiglip": "ActiveSigLIP", "independent": "independent picks",
    "jest": "JEST", "jest-easy": "JEST (easy reference)", "flexi-jest": "Flexi-JEST",
    "jest++": "JEST++", "jest-pool": "JEST (pool reference)", "jest-emoji": "JEST (emoji)",
}  # fmt: skip
DATA = ("data", "subset", "mix", "noise", "rows")
BUDGET = ("updates", "warmup")
LEARNER = ("learner", "width", "patch", "keep", "loss", "schedule")
"""Settings a run shares with its baseline, beside the data."""

# 97.5 % quantiles of Student's t by degrees of freedom; beyond them the last, a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Loop:
    """What tells the records of one training loop from another's."""

    config: Any
    metric: str  # of a point of the curve
    title: str  # of the metric
    data: str
    line: str  # how to run a configuration again


LOOPS = (
    Loop(Config, "accuracy", "test accuracy", "Fashion-MNIST", "python -m activesel.loop.classify"),
    Loop(
        PairsConfig,
        "r10",
        "R@10",
        "icons and their captions",
        "python -m activesel.loop.contrastive",
    ),
    Loop(
        RhoConfig,
        "accuracy",
        "test accuracy",
        "RHO-LOSS's protocol",
        "python -m bench replicate rho",
    ),
)


def loop_of(config: Mapping[str, Any]) -> Loop | None:
    """The loop whose configuration has these fields."""
    known = (x for x in LOOPS if set(config) <= {f.name for f in fields(x.config)})
    return next(known, None)


def command(config: Mapping[str, Any]) -> str:
    """The line that runs `config` again.

    >>> command({"method": "classact", "rho": 2, "seed": 1, "updates": 2400})
    'python -m activesel.loop.classify --method classact --seed 1'
    """
    loop = loop_of(config)
    if loop is None:
        return "python -m activesel.loop.classify ..."
    if loop.config is RhoConfig:  # which has no command of its own
        return loop.line
    words: list[str] = []
    for f in fields(loop.config):
        default = None if f.default is MISSING else f.default
        value = config.get(f.name, default)
        as_default = value == default or (isinstance(value, list) and tuple(value) == default)
        if as_default and f.name not in ("method", "seed"):
            continue
        name, several = f"--{f.name.replace('_', '-')}", value if isinstance(value, list) else None
        if isinstance(value, bool):
            words.append(name if value else name.replace("--", "--no-", 1))
        else:
            words += [name, *map(str, several or [value])]
    return f"{loop.line} {shlex.join(words)}"


def check(run: Run, path: Path) -> Run:
    """`run`, if it holds what a report needs of a `run.json`.

    Raises:
        ValueError: it is of another schema version (says how to convert it), or lacks something.
    """
    config = run.get("config")
    config = config if isinstance(config, dict) else {}
    if run.get("schema") != records.SCHEMA:
        raise ValueError(
            f"{path} must be of schema {records.SCHEMA}, got {run.get('schema')!r}. To convert it "
            f"run the same again with this version: {command(config)} (or make the report with the "
            "version that made the run)"
        )
    loop = loop_of(config)
    if loop is None or not isinstance(config.get("method"), str):
        known = ", ".join(f"activesel.loop.{x.config.loop}" for x in LOOPS)
        raise ValueError(f"{path} must hold the config of a run of {known}, got {list(config)}")
    needs: dict[str, tuple[type, ...]] = {"updates": (int,), "seed": (int,)}
    _has(config, needs, path, "config")
    _has(run, {"name": (str,), "ledger": (dict,), "seconds": (int, float), "curve": (list,)}, path)
    _has(run["ledger"], {"total": (int, float)}, path, "ledger")
    numbers = dict.fromkeys(("update", "seconds", "flops_total", loop.metric), (int, float))
    for point in run["curve"] or [None]:
        _has(point, numbers, path, "curve")
    if loop.metric == "r10":
        _has(run.get("recall"), {"r10": (float,)}, path, "recall")
    else:
        _has(run, {"accuracy": (float,)}, path)
    return run


def _has(part: Any, needs: Mapping[str, tuple[type, ...]], path: Path, where: str = "it") -> None:
    for name, kinds in needs.items():
        value = part.get(name) if isinstance(part, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool):
            kind = kinds[-1].__name__
            raise ValueError(f"{path} must be a run's record, {where} with {name!r}: {kind}, "
                             f"got {str(value)[:60]}")  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone, by seed."""

    label: str
    family: str  # the label, whatever the budget
    loop: Loop
    runs: list[Run]
    paths: list[Path]

    @property
    def config(self) -> dict[str, Any]:
        return {k: v for k, v in self.runs[0]["config"].items() if k != "seed"}

    @property
    def uniform(self) -> bool:
        return bool(self.config["method"] == "uniform")

    @property
    def updates(self) -> int:
        return int(self.config["updates"])

    @property
    def seeds(self) -> list[int]:
        return [run["config"]["seed"] for run in self.runs]

    @property
    def metrics(self) -> list[float]:
        return [run["recall"]["r10"] if "recall" in run else run["accuracy"] for run in self.runs]

    @property
    def metric(self) -> float:
        return statistics.fmean(self.metrics)

    def mean(self, of: Callable[[Run], float | None]) -> float | None:
        """Of what each run says; None if one says nothing."""
        found = [of(run) for run in self.runs]
        return None if None in found else statistics.fmean(x for x in found if x is not None)

    @property
    def flops(self) -> float:
        return statistics.fmean(run["ledger"]["total"] for run in self.runs)

    @property
    def seconds(self) -> float:
        return statistics.fmean(run["seconds"] + sum(beside(run)) for run in self.runs)


def beside(run: Run) -> tuple[float, float]:
    """Seconds beside a run: to train its reference, and to ask it about every super-batch."""
    trained = (run.get("reference") or {}).get("seconds", 0.0)
    return trained, (run.get("reference_scoring_seconds") or {}).get("fresh", 0.0)


def groups(found: Sequence[tuple[Path, Run]]) -> list[Group]:
    """Runs by configuration, those of uniform first.

    Raises:
        ValueError: runs on different data, the same run twice, or curves that differ in length.
    """
    kinds = {path: _data(run) for path, run in found}
    if len(set(kinds.values())) > 1:
        said = "; ".join(f"{path}: {kind}" for path, kind in kinds.items())
        raise ValueError(f"runs of one report must be on the same data, got {said}")
    by_digest: dict[str, list[tuple[Path, Run]]] = {}
    for path, run in sorted(found, key=lambda pair: pair[1]["config"]["seed"]):
        config = {name: v for name, v in run["config"].items() if name != "seed"}
        same = by_digest.setdefault(records.digest(config), [])
        for other, there in same:
            if there["config"]["seed"] == run["config"]["seed"]:
                raise ValueError(f"runs must differ, got the same configuration: {other}, {path}")
            if [p["update"] for p in there["curve"]] != [p["update"] for p in run["curve"]]:
                raise ValueError(f"curves of {other} and {path} must have the same updates")
        same.append((path, run))
    configs = [pairs[0][1]["config"] for pairs in by_digest.values()]
    made = []
    for config, pairs in zip(configs, by_digest.values(), strict=True):
        loop = loop_of(config)
        assert loop is not None  # `check` saw to it
        paths, runs = zip(*pairs, strict=True)
        label, family = _label(config, configs), _label(config, configs, BUDGET)
        made.append(Group(label, family, loop, list(runs), list(paths)))
    return sorted(made, key=lambda g: (not g.uniform, g.config["method"], g.family, -g.updates))


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that differ in their budget alone, the largest first."""
    by_name: dict[str, list[Group]] = {}
    for group in groups:
        by_name.setdefault(group.family, []).append(group)
    return list(by_name.values())


def _data(run: Run) -> str:
    config = run["config"]
    loop = loop_of(config)
    said = [f"{name} {text(config[name])}" for name in DATA if name in config]
    return ", ".join([loop.data if loop else "", *said])


def _label(
    config: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    silent: Sequence[str] = (),
) -> str:
    """The method, and the settings in which it differs from others of the same method."""
    name = NAMES.get(config["method"], config["method"])
    same = [other for other in configs if other["method"] == config["method"]]
    names = dict.fromkeys(key for other in same for key in other if key not in ("seed", *silent))
    differ = [n for n in names if any(other.get(n) != config.get(n) for other in same)]
    said = [f"{n.replace('_', ' ')} {text(config.get(n))}" for n in differ]
    return f"{name}, {', '.join(said)}" if said else name


def baseline(group: Group, everything: Sequence[Group]) -> Group | None:
    """Uniform runs of the same learner with the most updates, and of those the best."""

    def shared(g: Group) -> list[Any]:
        return [g.config.get(name) for name in LEARNER]

    same = [g for g in everything if g.uniform and shared(g) == shared(group) and g is not group]
    return max(same, key=lambda g: (g.updates, g.metric), default=None)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t-interval of the mean; None for fewer than two values.

    >>> [round(end, 2) for end in interval([1.0, 2.0, 3.0])]
    [-0.48, 4.48]
    """
    if len(values) < 2:
        return None
    scale = STUDENT[min(len(values) - 1, len(STUDENT)) - 1]
    half = scale * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


def difference(group: Group, base: Group) -> tuple[float, tuple[float, float] | None]:
    """Of the means, and its 95 % interval over the seeds that both have."""
    theirs = dict(zip(base.seeds, base.metrics, strict=True))
    pairs = [m - theirs[s] for s, m in zip(group.seeds, group.metrics, strict=True) if s in theirs]
    mean, ends = group.metric - base.metric, interval(pairs)
    whole = len(pairs) == len(group.runs) == len(base.runs)  # else the middle is another
    return mean, ends if whole else None


def verdict(budgets: Sequence[Group], everything: Sequence[Group]) -> tuple[str, str]:
    """A headline and a sentence: what a method gained over uniform sampling, at what cost.

    Of several budgets the smallest counts that reaches uniform's metric, else the best.

    Args:
        budgets: a family.
        everything: where to find the baseline.
    """
    base = baseline(budgets[0], everything)
    title = budgets[0].loop.title
    if base is None or budgets[0].uniform:
        group = budgets[0]
        return "No baseline given" if base is None else "Baseline", (
            f"{group.label}: {title} {percent(group.metric)} after {group.updates:,} updates "
            f"({seeds(len(group.runs))}). Whether selection pays, only runs of uniform sampling "
            "and of a method can tell, on the same data and with the same learner."
        )
    enough = [g for g in budgets if g.metric >= base.metric]
    group = min(enough, key=lambda g: g.updates) if enough else max(budgets, key=lambda g: g.metric)
    gain, ends = difference(group, base)
    updates, flops = group.updates / base.updates, group.flops / base.flops
    if ends is None:
        chance = "no interval, with fewer than two seeds or other seeds than uniform's"
    else:
        within = "within chance" if ends[0] <= 0 <= ends[1] else "beyond chance"
        chance = f"{within}: 95 % interval {signed(ends[0])} to {signed(ends[1])}"
    if not enough:
        headline = "No speedup shown"
    elif flops < 1:
        headline = f"Compute speedup of {100 * (1 - flops):.0f} %"
    elif updates < 1:
        headline = f"Learner speedup of {100 * learner_speedup(updates):.0f} %, no compute speedup"
    else:
        headline = "No speedup at this budget"
    if headline[0] != "N" and (ends is None or ends[0] < 0):
        headline += ", going by the mean"
    which = "" if len(budgets) == 1 else (
        f", the smallest of {len(budgets)} budgets that suffices" if enough
        else f", the best of {len(budgets)} budgets"
    )  # fmt: skip
    points = signed(gain, 1 if abs(gain) > 5e-4 else 2)
    machine = "" if _machines([group, base]) == 1 else " (on another machine)"
    sentence = (
        f"{group.family} {'reaches' if enough else 'does not reach'} uniform's {title} "
        f"({percent(group.metric)} against {percent(base.metric)}, {points} points, "
        f"{chance}; {seeds(len(group.runs))}) with {more(updates, 'updates')}{which}. With every "
        f"cost counted it spends {more(flops, 'FLOPs')}, and took "
        f"{more(group.seconds / base.seconds, 'seconds')}{machine}."
    )
    return tuple(part.replace(" %", "\u00a0%") for part in (headline, sentence))  # type: ignore


def seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def more(ratio: float, what: str) -> str:
    """
    >>> more(0.67, "updates"), more(1.29, "FLOPs"), more(1.0, "updates")
    ('33 % fewer updates', '29 % more FLOPs', 'as many updates')
    """
    change = round(100 * (ratio - 1))
    if not change:
        return f"as many {what}"
    return f"{abs(change):,} % {'fewer' if change < 0 else 'more'} {what}"


def _machines(some: Sequence[Group]) -> int:
    return len({records.digest(run.get("environment") or {}) for g in some for run in g.runs})
