# SPDX-License-Identifier: Apache-2.0
"""What the parts share: runs of uniform's budgets, a setting over its seeds, tables, words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from activesel.ledger import TRAIN
from activesel.loop.config import Config, Method
from bench import study
from bench.aggregate import seconds, spread
from bench.common import Row, Scale
from bench.equivalence import Beta, beta

PERCENT = 67
BUDGETS: dict[Scale, tuple[int, ...]] = {
    "smoke": (100, PERCENT, 50, 133),
    "full": (100, PERCENT, 50, 80, 133),
    "gpu": (100, PERCENT, 50, 80, 133),
}
"""Of uniform, in % of its updates, the most important first."""
QUIET = ("method", "rho", "temperature", "updates", "scorer")


def over_seeds(
    scale: Scale, method: Method, percent: float = PERCENT, **settings: Any
) -> list[Config]:
    """The runs of one setting."""
    return [study.classify(scale, method, percent, s, **settings) for s in study.SEEDS[scale]]


def queue(scale: Scale, settings: Iterable[Sequence[Config]]) -> list[Config]:
    """Uniform's two main budgets, the settings seed by seed, then the rest of uniform's budgets."""
    uniform = [over_seeds(scale, "uniform", percent) for percent in BUDGETS[scale]]
    ours = sorted((c for configs in settings for c in configs), key=lambda config: config.seed)
    flat = [c for configs in uniform for c in configs]
    main = 2 * len(study.SEEDS[scale])
    return list(dict.fromkeys([*flat[:main], *ours, *flat[main:]]))


def finished(found: Iterable[Row], configs: Iterable[Any]) -> list[Row]:
    """Of `found` the runs of `configs`, by seed."""
    names = {config.name for config in configs}
    runs = [run for run in found if run["name"] in names]
    return sorted(runs, key=lambda run: int(run["config"]["seed"]))


def each(values: Iterable[float]) -> Row:
    """`spread`, with the values themselves."""
    by_seed = [float(value) for value in values]
    return {**spread(by_seed), "by_seed": by_seed}


def paired(ours: Iterable[Row], theirs: Iterable[Row], name: str = "accuracy") -> Row | None:
    """Difference of two settings, seed by seed; None if they share no seed."""
    other = {run["config"]["seed"]: run[name] for run in theirs}
    seeds = [run for run in ours if run["config"]["seed"] in other]
    return each(run[name] - other[run["config"]["seed"]] for run in seeds) if seeds else None


def saved(found: Beta, cost: float = 1.0) -> Row:
    """1 - cost * beta; `clamped` is it with its interval, all held to uniform's budgets.

    >>> saved(Beta(0.8, 0.7, None, "0.80 (0.70 to > 0.90)"))["text"]
    '+20 % (< +10 % to +30 %)'
    """
    said = re.findall(r"([<>]?) ?(\d+\.\d+)", found.text)
    exact = (found.value, found.low, found.high)
    ends = [1 - cost * (e or float(x)) for e, (_, x) in zip(exact, said, strict=False)]
    flip = {"<": "> ", ">": "< ", "": ""}
    words = [f"{flip[s]}{100 * x:+.0f} %" for (s, _), x in zip(said, ends, strict=True)]
    return {
        "value": None if found.value is None else 1 - cost * found.value,
        "low": None if found.high is None else 1 - cost * found.high,
        "high": None if found.low is None else 1 - cost * found.low,
        "clamped": [ends[0], *ends[:0:-1]],
        "text": words[0] if len(words) == 1 else f"{words[0]} ({words[2]} to {words[1]})",
    }


def positive(found: Row) -> bool | None:
    """Whether a speedup is above 0; None where it is only known to lie beyond a bound that is not.

    >>> positive({"value": None, "clamped": [-0.3], "text": "< -30 %"})
    False
    """
    bound = found["clamped"][0]
    if found["value"] is not None:
        return bool(bound > 0)
    return {"<": False if bound <= 0 else None, ">": True if bound >= 0 else None}[found["text"][0]]


def row(label: str, configs: Sequence[Config], found: Sequence[Row], scale: Scale) -> Row | None:
    """One setting over its seeds, held against uniform's budgets; None if it has not been run.

    Shares and accuracies are in [0, 1]. `gain` is over uniform with as many updates, `gain_full`
    over its full budget, both seed by seed. Compute speedups charge the run and all of its
    reference, against what uniform needs for the same accuracy; `published` leaves the training of
    the online scorer out.
    """
    runs = finished(found, configs)
    if not runs:
        return None
    config, updates = configs[0], configs[0].updates
    budgets = {
        c[0].updates: same
        for percent in BUDGETS[scale]
        if (same := finished(found, c := over_seeds(scale, "uniform", percent)))
    }
    full = study.classify(scale, "uniform").updates
    lines = {k: float(np.mean([run["ledger"][k] for run in runs])) for k in runs[0]["ledger"]}
    learner, total = lines["learner"], lines["total"]
    entry: Row = {
        "label": label,
        **{name: getattr(config, name) for name in QUIET},
        "share_of_updates": updates / full,
        "seeds": [run["config"]["seed"] for run in runs],
        "f_ratio": TRAIN * (lines["scoring_reference"] or lines["scoring_online"])
        / (config.rho * learner) if config.method != "uniform" else None,
        "accuracy": each(run["accuracy"] for run in runs),
        "worst_class": each(run["worst_class"] for run in runs),
        "wrong_kept": each(run["kept_mislabelled"] / run["kept"] for run in runs),
        "base_rate": float(np.mean([run["base_rate"] for run in runs])),
        "gain": paired(runs, budgets.get(updates, [])),
        "gain_full": paired(runs, budgets.get(full, [])),
        "flops": lines,
        "flops_share": total / (learner * full / updates),
        "seconds": float(np.mean([seconds(run) for run in runs])),
        "cpu_seconds": float(np.mean([seconds(run, "cpu_seconds") for run in runs])),
    }  # fmt: skip
    if config.method == "uniform" or not budgets:
        return entry
    grid = {u: [run["accuracy"] for run in same] for u, same in budgets.items()}
    ratio = beta(updates, entry["accuracy"]["by_seed"], grid)
    everything = saved(ratio, total / learner)
    plain = budgets.get(full) or next(iter(budgets.values()))
    pace = np.mean([seconds(run) / run["config"]["updates"] for run in plain])
    return {
        **entry,
        "beta": asdict(ratio),
        "learner_speedup": saved(ratio),
        "compute_speedup": everything,
        "compute_speedup_published": saved(ratio, (total - lines["online_training"]) / learner),
        "compute_positive": positive(everything),
        "wall_speedup": saved(ratio, float(entry["seconds"] / updates / pace)),
    }


def uniform_rows(found: Sequence[Row], scale: Scale) -> list[Row]:
    """Uniform at every budget it was run with, the smallest first."""
    rows = (
        row(f"uniform, {percent} %", over_seeds(scale, "uniform", percent), found, scale)
        for percent in sorted(BUDGETS[scale])
    )
    return [entry for entry in rows if entry]


def flat(entry: Mapping[str, Any]) -> Row:
    """A row for a spreadsheet: means and values under their own name, intervals beside.

    >>> flat({"gain": {"mean": 1.0, "std": 0.1, "low": 0.5, "high": 1.5, "by_seed": [1.0]}})
    {'gain': 1.0, 'gain_low': 0.5, 'gain_high': 1.5}
    """
    cells: Row = {}
    for name, value in entry.items():
        if isinstance(value, Mapping):
            centre = next((value[k] for k in ("mean", "value") if k in value), None)
            if "low" in value:
                cells |= {name: centre, f"{name}_low": value["low"], f"{name}_high": value["high"]}
                cells |= {f"{name}_text": value["text"]} if "text" in value else {}
            else:
                cells |= {f"{name}_{k}": v for k, v in value.items()}
        else:
            cells[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    return cells


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(entry: Row | None, form: str = ".1f") -> str:
    """Mean and half-width of the 95 % interval, in %; a dash where nothing was measured.

    >>> percent({"mean": 0.5, "low": 0.4, "high": 0.6}), percent(None)
    ('50.0 ± 10.0', '-')
    """
    if entry is None:
        return "-"
    mean = f"{100 * entry['mean']:{form}}"
    if entry["high"] is None:
        return mean
    return f"{mean} ± {50 * (entry['high'] - entry['low']):{form.lstrip('+')}}"


def points(entry: Row | None) -> str:
    """The same of a difference: with its sign, finer."""
    return percent(entry, "+.2f")


def sign(entry: Row | None) -> int:
    """1 or -1 where the whole 95 % interval is above or below 0, else 0."""
    if entry is None or entry["low"] is None:
        return 0
    return int(entry["low"] > 0) - int(entry["high"] < 0)


def told(entry: Row) -> str:
    """The same in words, "above", "below" or "not told apart from"."""
    return {1: "above", -1: "below", 0: "not told apart from"}[sign(entry)]


def name(entry: Row, content: Row) -> str:
    """Label, with its number of seeds where some are missing."""
    n, of = len(entry["seeds"]), len(content["seeds"])
    return str(entry["label"]) if n == of else f"{entry['label']} ({n} of {of} seeds)"


def setup(content: Row) -> str:
    """What was run, in a sentence or two."""
    c = content["config"]
    wrong = next((r["base_rate"] for r in content["rows"]), c["noise"])
    return (
        f"Fashion-MNIST with {100 * wrong:.0f} % wrong labels; learner `{c['learner']}`, uniform's "
        f"full budget {content['updates']:,} updates of {c['keep']} rows, every run decayed to "
        f"zero over its own. Seeds: {len(content['seeds'])}; ± and brackets are 95 % t-intervals."
    )


def unfinished(content: Row) -> list[str]:
    """A sentence where runs are missing."""
    n = len(content.get("missing", ()))
    return [f"**Unfinished: {n} runs are missing.**"] if n else []


def basis(scale: Scale, rows: Sequence[Row]) -> Row:
    """What the content of every part on Fashion-MNIST begins with."""
    config = study.classify(scale, "classact", PERCENT)
    return {
        "updates": study.classify(scale, "uniform").updates,
        "percent": PERCENT,
        "seeds": list(study.SEEDS[scale]),
        "config": {**asdict(config), "seed": None},
        "rows": list(rows),
    }


def picture(content: Row, part: str, alt: str) -> str:
    """Markdown of a part's picture, as seen from `docs/`."""
    folder = "gpu" if content.get("scale") == "gpu" else "cpu"
    return f"![{alt}](../bench/results/{folder}/replicate-{part}.svg)"
