# SPDX-License-Identifier: Apache-2.0
"""Records of runs for tests of reports, and what a page of one holds."""

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

from activesel.loop import records
from activesel.loop.config import Config
from activesel.loop.pairs_config import PairsConfig
from activesel.loop.report import report

LINES = ("learner", "scoring_online", "scoring_reference", "online_training")


def record(config, metric=0.86, flops=3e12, seconds=50.0, **more):
    """What `run.json` of a run with this configuration holds."""
    pairs = isinstance(config, PairsConfig)
    uniform = config.method == "uniform"
    ledger = {**dict.fromkeys(LINES, 0.0), "learner": flops / (1 if uniform else 2)}
    ledger["scoring_online"] = flops - ledger["learner"]
    curve = [
        {
            "update": config.updates * i // 3,
            ("r10" if pairs else "accuracy"): metric * i / 3,
            "seconds": seconds * i / 3,
            "flops_total": flops * i / 3,
            **({f"kept_{t}": 10 * i for t in ("clean", "noisy", "logo")} if pairs else {}),
            **({} if pairs else {"kept": 100 * i, "kept_mislabelled": 4 * i}),
        }
        for i in (1, 2, 3)
    ]
    ways = {way: {"1": metric / 10, "10": metric} for way in ("image_to_text", "text_to_image")}
    kept = {"clean": 30, "noisy": 30, "logo": 30}
    own = (
        {"recall": {**ways, "r10": metric}, "kept": kept, "pool": kept}
        if pairs
        else {"accuracy": metric, "worst_class": metric - 0.2, "kept": 300, "kept_mislabelled": 12,
              "by_class": [metric - 0.2, *[metric] * 9], "base_rate": 0.1}
    )  # fmt: skip
    return {
        "schema": 1,
        "name": config.name,
        "config": json.loads(json.dumps(asdict(config))),
        "environment": {"python": "3.11", "cores": 2},
        **own,
        "reference": None if uniform else {"accuracy": 0.8, "flops": 1e11, "seconds": 5.0},
        "ledger": {**ledger, "total": flops},
        "seconds": seconds,
        "curve": curve,
        **more,
    }


def put(folder, content, name=None):
    """Write a record as a loop does; its path."""
    folder = folder / "runs" / (name or content["name"])
    folder.mkdir(parents=True)
    records.write_json(folder / "run.json", content)
    return folder / "run.json"


def uniform(seed=0, updates=2400, metric=0.86, **more):
    return record(Config("uniform", updates=updates, seed=seed), metric, 6e12, 80.0, **more)


def method(seed=0, updates=1608, metric=0.87, flops=5e12, **more):
    return record(Config("classact", updates=updates, seed=seed), metric, flops, **more)


class Page(HTMLParser):
    """What a browser would make of it, as far as these tests ask."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.said, self.open = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub("[ \n]+", " ", " ".join(self.said))  # \xa0 stays

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.said.append(text)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def whole_in_itself(page):
    """No script, no address that leaves the page, and everything named for those who cannot see."""
    assert not {"script", "iframe", "object", "embed", "form"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("data:", "#")), (tag, value)
    assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:url\(#|href="#)([^)"]+)', page.source)
    assert set(targets) <= set(ids)
    assert all(image.get("alt") for image in page.all("img"))
    assert all(cell.get("scope") in ("col", "row") for cell in page.all("th"))
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    pictures = [a for tag, a in page.tags if tag == "div" and a.get("role") == "img"]
    assert len(pictures) == len(page.all("svg")) and all(a["aria-label"] for a in pictures)


def make(paths, tmp_path):
    out = tmp_path / "report.html"
    report(paths, out)
    page = Page(out)
    whole_in_itself(page)
    return page
