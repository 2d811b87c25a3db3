# SPDX-License-Identifier: Apache-2.0
"""The README's figures are those of the committed results."""

import re

import pytest

from bench import readme, summary

PAGES = [readme.README, *readme.BLOCKS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_step_with_the_results(page):
    text = page.read_text()
    assert readme.render(text, page) == text, "python -m bench readme"


def test_pages_need_their_markers():
    with pytest.raises(ValueError, match=r"README.md must hold <!-- summary -->"):
        readme.render("no markers here")
    with pytest.raises(ValueError, match=r"results.md must hold <!-- classify -->"):
        readme.render("no markers here", readme.DETAILS)


def test_pictures_named_are_there():
    for page in PAGES:
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", page.read_text()):
            assert (page.parent / picture).is_file(), picture


def test_speed_table_tells_what_fell_short():
    rows = [
        {"case": "one", "threads": n, "ratio": r, "ours_us": 10.0, "target": 4.0}
        for n, r in ((1, 5.0), (2, 3.0))
    ]
    machine = {"cpu": "any", "cores": 2, "torch": "2.13"}
    text = readme.speeds({"rows": rows, "machine": machine})
    assert "| one | 5.0 (10 µs) | 3.0 (10 µs) |" in text
    assert "Short of what we aimed at: one at 2 (3.0, wanted 4)" in text


def test_agreement_table_names_everyone():
    found = {
        "ours": {"overlap": 1.0, "error_rms": 3e-7},
        "bf16": {"overlap": 0.5, "error_rms": 0.02},
    }
    row = {"agreement": found, "learnability_rms": 0.0141}
    content = {"backends": {"native": row}, "rows": 16384, "classes": 1000, "features": 192}
    text = readme.agreements(content)
    assert "| activesel, native | 100.0% | 3e-07 |" in text and "| torch: bf16 | 50.0% |" in text
    assert "16,384 rows" in text and "rms 0.014" in text


def test_the_summary_tells_what_did_not_pay():
    speedup = {"label": "JEST", "budgets": [0.5, 1.0], "at": None}
    assert summary._speedup(speedup).startswith("JEST does **not** reach uniform's R@10 with up to")
    reached = {"at": 0.5, "learner_speedup": 0.5, "compute_speedup": -0.1}
    text = summary._speedup({**speedup, **reached, "compute_speedup_cached": 0.2})
    assert "50 % fewer updates: 10 % more FLOPs" in text and "20 % fewer with the ref" in text
    short = {"rows": [{"ratio": 0.9, "target": 1.0}, {"ratio": 5.0, "target": 4.0}]}
    assert (
        "0.9 to 5 times" in summary.speed(short)[0] and "(1 of 2 figures" in summary.speed(short)[0]
    )


def test_joint_table_shows_targets_and_memory():
    row = {"rows": 8, "seconds": 1.0, "cpu_seconds": 1.0}
    content = {
        "rows": [
            {**row, "method": m, "loss": "sigmoid", "threads": n, "ratio": r, "ratio_cpu": r + 1}
            for m, r in (("ours", 1.0), ("published", 20.0), ("incremental", 1.5))
            for n in (1, 2)
        ],
        "shape": {"keep": 4, "width": 2, "chunks": 2},
        "targets": {"published": 12.0, "incremental": 1.2},
        "machine": {"cpu": "any", "cores": 2, "torch": "2.13"},
        "extra_bytes": {"ours": 6e6, "published": 8e8},
        "cpu_seconds_per_row": {"8": 4e-5, "16": 5e-5},
    }
    text = summary.joint_table(content)
    assert (
        "| dense, as published: masked product, sigmoid | 12 | 20.0 (21.0) | 20.0 (21.0) |" in text
    )
    assert "40 at 8, 50 at 16" in text and "ours 6, published 800" in text
    assert "20 times as fast as the published" in summary.joint(content)[0]


def test_the_summary_of_the_bench_says_what_holds_and_what_does_not():
    spread = {"mean": 0.0045, "low": 0.003, "high": 0.006}
    row = {"method": "classact", "f_ratio": 0.1, "scorer": "nano", "compute_positive": False}
    content = {
        "rows": [{"method": "uniform"}, row, {**row, "f_ratio": 0.01, "scorer": "pico"}],
        "slopes": {"classact": spread, "easy": {**spread, "mean": 0.02}, "difference": spread},
        "verdict": "the opposite",
        "seeds": [0, 1, 2],
    }
    (text,) = summary.scaling(content)
    assert "10 to 100 times cheaper" in text and "0.45 ± 0.15 points" in text
    assert "degrades **faster**" in text and "pays with none of them" in text
    content["rows"][2]["compute_positive"], content["verdict"] = True, "holds"
    assert "more slowly" in summary.scaling(content)[0]
    unsure = summary.scaling({**content, "verdict": "not shown"})[0]
    assert "a difference of 0.45 ± 0.15, within chance with 3 seeds." in unsure
    assert "pays with pico" in summary.scaling(content)[0]
    assert summary.scaling({**content, "slopes": None}) == []

    free = {"label": "b", "gap_closed": 0.75, "extra_flops": 0.0}
    dear = {**free, "label": "a", "extra_flops": 0.4}
    gap = {"gap": spread, "rows": [{"label": "c"}, dear, free], "above_plain": ["a", "b"]}
    assert "b of the online scorer close 75 %" in summary.online(gap)[0]
    assert "close" not in summary.online({**gap, "above_plain": ["a"]})[0]
    assert summary.online({**gap, "gap": None}) == []

    run = {"updates": 9, "schedule": "decayed", "method": "uniform", "label": "uniform"}
    rows = [{**run, "accuracy": {**spread, "mean": 0.9}}]
    rows += [{**rows[0], "method": "rho", "label": "RHO", "compute_speedup": {"text": "-300 %"}}]
    rows += [{**rows[0], "schedule": "constant", "label": "never"}]
    (text,) = summary.rho({"rows": rows, "updates": 9, "data": "any"})
    assert "RHO 90.0 ± 0.1 %; compute speedup, everything charged: -300 %." in text
    assert "never" not in text and summary.rho({"rows": rows[:1], "updates": 9}) == []
    found = {"agree": 8, "claims": 9, "classact": 3.07, "classact_online_charged": -2.77}
    assert "8 of 9" in summary.published({"headline": found})[0]
