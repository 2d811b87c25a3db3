# SPDX-License-Identifier: Apache-2.0
"""What `python -m activesel report` refuses, and that it leaves no half page behind."""

import functools
import json
import sys
from pathlib import Path

import pytest
import reports
from reports import method, record

from activesel import __main__
from activesel.loop.config import Config
from activesel.loop.report import report


@pytest.fixture
def put(tmp_path):
    return functools.partial(reports.put, tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"schema": 2}, r"schema 1, got 2. To convert it run the same again .* --method classact"),
        ({"config": {"method": "dream"}, "curve": []}, "config with 'updates': int, got None"),
        ({"config": {"made": "up"}}, r"must hold the config of a run of .*, got \['made'\]"),
        ({"curve": []}, "curve with 'update': float, got None"),
        ({"curve": [{"update": 1}]}, "curve with 'seconds': float"),
        ({"ledger": {"total": True}}, "ledger with 'total': float, got True"),
        ({"accuracy": "high"}, "'accuracy': float, got high"),
    ],
)
def test_damaged_records(put, tmp_path, change, said):
    path = put({**method(), **change})
    with pytest.raises(ValueError, match=said):
        report([path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_other_refusals(put, tmp_path, capsys):
    good, other = put(method()), put(method(), "copy")
    noisy = put(record(Config("classact", noise=0.4)), "noisy")
    short = put({**method(1), "curve": method(1)["curve"][:2]}, "short")
    foreign, list_, text, old = (tmp_path / f"{name}.json" for name in "abcd")
    foreign.write_text('{"schema": 9, "version": "7.0", "command": "python -m bench pareto"}')
    list_.write_text("[1]")
    text.write_bytes(b"\xff\xfe not JSON")
    old.write_text("{}")
    page = tmp_path / "page.html"
    cases = [
        ([tmp_path / "nowhere.json"], page, "No such file or directory"),
        ([tmp_path], page, "Is a directory"),
        ([list_], page, "must hold a JSON object, got list"),
        ([text], page, "must hold a JSON object, got"),
        ([old], page, "must be a run.json, or a result file of schema 1, got neither"),
        ([foreign], page, "got schema 9 (written by activesel 7.0). To convert it run the command"),
        ([good, other], page, "runs must differ, got the same configuration"),
        ([good, short], page, "must have the same updates"),
        ([good, noisy], page, "must be on the same data, got"),
        ([good], tmp_path / "no" / "page.html", "the folder of"),
        ([good], tmp_path, "a folder or one of the inputs"),
        ([good], good, "a folder or one of the inputs"),
    ]
    for paths, out, said in cases:
        with pytest.raises(SystemExit) as stop:
            __main__.main(["report", *map(str, paths), "-o", str(out)])
        assert stop.value.code == 2 and said in capsys.readouterr().err, said
    assert not page.exists() and json.loads(good.read_text())["schema"] == 1
    with pytest.raises(ValueError, match="at least one file"):
        report([], page)


def test_page_is_written_whole_or_not_at_all(put, tmp_path, monkeypatch):
    path, out = put(method()), tmp_path / "page.html"
    out.write_text("the last one")

    def fail(self, text, encoding):
        with open(self, "w") as file:
            file.write("half")
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        report([path], out)
    assert out.read_bytes() == b"the last one" and len(list(tmp_path.iterdir())) == 2


def test_without_matplotlib(put, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'activesel\[loop\]'"):
        report([put(method())], tmp_path / "page.html")
