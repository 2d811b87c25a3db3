# SPDX-License-Identifier: Apache-2.0
"""The documents' figures, written from bench/results and from nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from activesel.loop import records
from bench import (
    aggregate,
    agreement,
    classify,
    common,
    joint,
    kernels,
    ledger,
    pairs,
    pairs_text,
    pareto,
    peers,
    scorer_agreement,
    scorer_text,
    speed,
    summary,
    wheels,
)
from bench.aggregate import interval
from bench.replicate import command as replicate

ROOT = Path(__file__).parent.parent
README, DETAILS = ROOT / "README.md", ROOT / "docs" / "results.md"
BENCH, CLUSTERS = ROOT / "docs" / "bench.md", ROOT / "docs" / "clusters.md"
Row = dict[str, Any]


def command(check: bool = False) -> None:
    """Rewrite the figures of README.md and of the pages in docs/ that have any.

    Args:
        check: change nothing; exit with 1 if there is something to change.
    """
    for page in (README, *BLOCKS):
        before = page.read_text()
        after = render(before, page)
        if check and after != before:
            sys.exit(f"{page.name} is stale: python -m bench readme")
        if after != before:
            records.write_text(page, after)


def render(text: str, page: Path = README) -> str:
    """`text` of a page with all marked parts replaced; a part without results is left empty.

    Raises:
        ValueError: a marker is missing for which there are results.
    """
    if page == README:
        found = {name: content for name, (source, _) in ALL.items() if (content := _load(source))}
        return _replace(text, "summary", summary.summary(found), page)
    for name, (source, write) in BLOCKS[page].items():
        content = _load(source)
        if content or _mark(name).search(text):
            text = _replace(text, name, write(content) if content else "", page)
    return text


def _load(source: Path) -> Row | None:
    return json.loads(source.read_text()) if source.is_file() else None


def _mark(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)


def _replace(text: str, name: str, body: str, page: Path) -> str:
    if not _mark(name).search(text):
        raise ValueError(f"{page.name} must hold <!-- {name} --> and <!-- /{name} -->, got no pair")
    return _mark(name).sub(rf"\g<1>{_literal(body)}{chr(10) if body else ''}\g<2>", text)


def _literal(text: str) -> str:
    return text.replace("\\", r"\\")


def classification(content: Row) -> str:
    """Table, sentences and picture of the classification runs."""
    full = content["updates"]
    rows = [_find(content, "uniform", full)]
    at = round(full * classify.PERCENT / 100)
    rows += [
        _find(content, method, at, **classify.SETTINGS.get(method, {}))
        for method in ("uniform", "hard", "easy")
    ]
    ours = content["beta"].get("classact", {}).get("at")
    budgets = sorted({at, round(0.75 * full)} | ({round(full * ours)} if ours else set()))
    rows += [_find(content, "classact", u, **content["settings"]["classact"]) for u in budgets]
    rows += [_find(content, m, at) for m in ("classact-ho", "classact-online", "rho")]
    lines = [
        "| method | updates | test accuracy, % | wrong labels kept, % | FLOPs, all counted "
        "| learner speedup | compute speedup |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in rows if row),
    ]
    path = f"../{classify.RESULTS.with_suffix('.svg').relative_to(ROOT)}"
    return "\n".join(
        [
            *lines,
            "",
            _setup(content),
            "",
            _findings(content),
            "",
            f"![Test accuracy against the budget of updates, and all methods at one]({path})",
        ]
    )


def _find(content: Row, method: str, updates: int, **settings: float) -> Row | None:
    for cell in content["cells"]:
        same = all(cell[name] == value for name, value in settings.items())
        if cell["method"] == method and cell["updates"] == updates and same:
            return dict(cell)
    return None


def _line(row: Row) -> str:
    wrong = row["mislabelled"]
    share = 1 - row["compute_speedup_if_reached"]
    reached = row["reaches_uniform"] and row["share_of_updates"] < 1
    speedups = (
        [f"{100 * row[f'{kind}_speedup_if_reached']:+.0f} %" for kind in ("learner", "compute")]
        if reached
        else ["-", "-"]
    )
    cells = [
        aggregate.label(row),
        f"{100 * row['share_of_updates']:.0f} %",
        interval(row["accuracy"]),
        interval({**wrong["seeds"], "mean": wrong["share"]}),
        f"{100 * share:.0f} %",
        *speedups,
    ]
    return f"| {' | '.join(cells)} |"


def _setup(content: Row) -> str:
    config, base = content["config"], content["noise"]
    return (
        f"Fashion-MNIST with {100 * base:.0f} % wrong labels, which the references see too; "
        f"{len(content['seeds'])} seeds, ± is the 95 % t-interval. Learner: ViT "
        f"`{config['learner']}`, {content['updates']:,} updates of {config['keep']} rows for "
        f"uniform; scorers: `{config['scorer']}`. Every run decays to zero over its own updates. A "
        "speedup is given only where the mean accuracy reaches that of uniform with its full "
        "budget; FLOPs count learner, scoring, and the training of both scorers."
    )


def _findings(content: Row) -> str:
    names = {"classact": "ClassAct", "rho": "RHO"}
    sentences = [_beta(names[m], entry) for m, entry in content["beta"].items() if m in names]
    sentences.append(
        "(Models as small as these run far below what their FLOPs promise, so processor time says "
        "little about larger ones.)"
    )
    claims = content["targets"]
    for name, claim, yes, no in (
        (
            "classact",
            "classact_keeps_fewer_mislabelled_than_base_rate",
            "At every budget ClassAct keeps fewer wrong labels than there are in the data.",
            "ClassAct does not keep fewer wrong labels than there are in the data at every budget.",
        ),
        (
            "easy",
            "easy_keeps_under_half_of_base_rate",
            "Easy keeps under half of them.",
            "Easy keeps more than half of them.",
        ),
    ):
        if claims[claim] is not None:
            sentences.append(yes if claims[claim] else no)
        else:
            sentences.append(f"The share of wrong labels was not measured for {name}.")
    if content["missing"]:
        total = content["finished"] + len(content["missing"])
        sentences.append(f"**Unfinished: {len(content['missing'])} of {total} runs are missing.**")
    return " ".join(sentences)


def _beta(name: str, entry: Row) -> str:
    flops = 100 * (1 - entry["flops_share_there"])
    time = entry["cpu_seconds_share_there"]
    cost = (
        f"{abs(flops):.0f} % {'fewer' if flops >= 0 else 'more'} FLOPs, in {time:.1f} times the "
        "processor time"
    )
    if entry["beta"] is None:
        gain = 100 * entry["accuracy_gain_there"]["mean"]
        return (
            f"{name} does **not** reach uniform's accuracy at any budget tried (up to "
            f"{100 * max(entry['budgets']):.0f} % of the updates); its best, {gain:+.1f} points, "
            f"takes {100 * entry['at']:.0f} % and {cost}."
        )
    return (
        f"{name} reaches uniform's accuracy with {100 * entry['beta']:.0f} % of the updates and "
        f"{cost}."
    )


def speeds(content: Row) -> str:
    """Table of how many times faster than eager torch, and the machine."""
    times: dict[str, dict[int, Row]] = {}
    for row in content["rows"]:
        times.setdefault(row["case"], {})[row["threads"]] = row
    threads = sorted({row["threads"] for row in content["rows"]})
    header = [f"{n} thread{'s' if n > 1 else ''}" for n in threads]
    lines = [
        f"| times faster than eager torch | {' | '.join(header)} |",
        f"|---|{'---|' * len(threads)}",
    ]
    for case, by_threads in times.items():
        cells = [
            f"{row['ratio']:.1f} ({row['ours_us']:,.0f} µs)" if (row := by_threads.get(n)) else "-"
            for n in threads
        ]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    slower = [row for row in content["rows"] if row["ratio"] < row["target"]]
    machine = content["machine"]
    said = (
        f"Medians of interleaved turns in one process on {machine['cpu']}, {machine['cores']} "
        f"cores, torch {machine['torch']}; eager is two `F.cross_entropy`, Gumbel noise, `topk`, "
        "`sort`."
    )
    if slower:
        missed = "; ".join(
            f"{row['case']} at {row['threads']} ({row['ratio']:.1f}, wanted {row['target']:g})"
            for row in slower
        )
        said += f" Short of what we aimed at: {missed}."
    return "\n".join([*lines, "", said])


NAMES = {"native": "activesel, native", "triton": "activesel, Triton (interpreted)"}


def agreements(content: Row) -> str:
    """Table of how many of the right rows each way of scoring keeps."""
    lines = ["| scores | of the right rows kept | error, rms |", "|---|---|---|"]

    def line(name: str, found: Row) -> str:
        return f"| {name} | {found['overlap']:.1%} | {found['error_rms']:.0e} |"

    found: Row = {}
    for backend, row in content["backends"].items():
        found = row["agreement"]
        lines.append(line(NAMES[backend], found["ours"]))
    lines += [line(f"torch: {name}", other) for name, other in found.items() if name != "ours"]
    rms = next(iter(content["backends"].values()))["learnability_rms"]
    said = (
        f"Top fifth of {content['rows']:,} rows by learnability at T = 0, {content['classes']:,} "
        f"classes, {content['features']} features, everything given in bf16; right is what float64 "
        f"keeps. The two models differ little, learnability rms {rms:.3f}."
    )
    return "\n".join([*lines, "", said])


Block = tuple[Path, Callable[[Row], str]]
BLOCKS: dict[Path, dict[str, Block]] = {
    DETAILS: {
        "classify": (classify.RESULTS, classification),
        "pairs": (pairs.RESULTS, pairs_text.image_text),
        "speed": (speed.RESULTS, speeds),
        "joint": (joint.RESULTS, summary.joint_table),
        "agreement": (agreement.RESULTS, agreements),
        "scorer-agreement": (scorer_agreement.RESULTS, scorer_agreement.table),
        "scorer-cost": (scorer_text.RESULTS, scorer_text.predictions),
    },
    BENCH: {
        name: (common.results("full", name).with_suffix(".json"), write)
        for name, write in {
            "ledger": ledger.text,
            **{f"replicate-{name}": replicate.part(name).text for name in replicate.PARTS},
            "pareto": pareto.text,
            "peers": peers.text,
            "kernels": kernels.text,
        }.items()
    },
    CLUSTERS: {"wheels": (wheels.RESULTS, wheels.table)},
}
ALL = {name: block for blocks in BLOCKS.values() for name, block in blocks.items()}
