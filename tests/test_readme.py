# SPDX-License-Identifier: Apache-2.0
"""The README's figures are those of the committed results."""

import re

import pytest

from bench import readme


@pytest.mark.parametrize("page", [readme.README, readme.DETAILS], ids=lambda page: page.name)
def test_pages_are_in_step_with_the_results(page):
    text = page.read_text()
    assert readme.render(text, page) == text, "python -m bench readme"


def test_pages_need_their_markers():
    with pytest.raises(ValueError, match=r"README.md must hold <!-- summary -->"):
        readme.render("no markers here")
    with pytest.raises(ValueError, match=r"results.md must hold <!-- classify -->"):
        readme.render("no markers here", readme.DETAILS)


def test_pictures_named_are_there():
    for page in (readme.README, readme.DETAILS):
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
