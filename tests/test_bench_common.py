# SPDX-License-Identifier: Apache-2.0
"""What the bench's commands share: files, schema, memory, runs that resume."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import common, study


def test_files_are_what_was_written(tmp_path):
    rows = [{"a": 1, "b": "x,y"}, {"a": 2, "c": None}]
    content = {**common.header(), "scale": "smoke", "rows": rows, "none": []}
    path = tmp_path / "deep" / "table.v2"  # a dot is part of a name, not a suffix
    files = common.write(path, content, rows)
    assert [file.name for file in files] == ["table.v2.json", "table.v2.csv"]
    assert common.read(files[0]) == json.loads(json.dumps(content))
    assert '\n  {"a": 1, "b": "x,y"},\n' in files[0].read_text(), "one line per row"
    with open(files[1], newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [{"a": "1", "b": "x,y", "c": ""}, {"a": "2", "b": "", "c": ""}]
    assert sorted(p.name for p in path.parent.iterdir()) == ["table.v2.csv", "table.v2.json"]


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused_with_the_way_to_convert(schema, tmp_path):
    file = tmp_path / "old.json"
    made = {"schema": schema, "version": "9.1", "command": "python -m bench pareto --scale full"}
    file.write_text(json.dumps(made))
    with pytest.raises(ValueError) as error:
        common.read(file)
    for part in ("must be of schema 1, got", repr(schema), "activesel 9.1", made["command"]):
        assert part in str(error.value)


def test_no_result_file_is_half_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        common.read(tmp_path / "none.json")
    (tmp_path / "cut.json").write_text('{"schema": 1, "rows": [')
    with pytest.raises(ValueError, match="must hold a JSON object"):
        common.read(tmp_path / "cut.json")


def test_the_last_line_is_for_scripts(capsys):
    common.result({"beta": 0.67, "text": 'a "quote"'})
    line = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(line.removeprefix("--result ")) == {"beta": 0.67, "text": 'a "quote"'}


def test_only_what_fits_is_run_and_the_rest_is_named():
    kept, left = common.fitting(["small", "large"], {"small": 10, "large": 2 << 30}.get, 1 << 30)
    assert kept == ["small"]
    assert left == ["large left out: needs 2,048 MB, 1,024 MB available"]
    assert common.fitting([1], lambda _: 1)[0] == [1] and common.memory() > 1 << 20


def test_committed_scales_write_apart():
    folders = {scale: common.results(scale, "x").parent for scale in ("smoke", "full", "gpu")}
    assert folders["smoke"] == Path("runs/smoke")
    assert {f.name for f in folders.values()} == {"smoke", "cpu", "gpu"}
    assert len({common.runs(scale) for scale in folders}) == 3


@pytest.mark.parametrize("scale", ["smoke", "full", "gpu"])
def test_a_share_of_the_updates(scale):
    full, part = (study.classify(scale, "classact", percent) for percent in (100, 67))
    assert part.updates == round(0.67 * full.updates)
    assert (part.rho, part.temperature, part.noise) == (2, 0.5, 0.1)
    assert study.classify(scale, "classact", rho=8).rho == 8
    assert study.pairs(scale, "jest", 50).updates == study.pairs(scale, "jest").updates // 2


def test_runs_stop_in_time_and_go_on(tmp_path, capsys):
    """After no time at all nothing is finished; the same call finishes; then nothing is left."""
    configs = [study.classify("smoke", "uniform", 30, seed) for seed in (0, 1)]
    found, missing = study.gather(configs, "smoke", minutes=0.0, folder=tmp_path)
    assert not found and missing == configs
    assert "stopped after 0 minutes; the same line goes on" in capsys.readouterr().out
    found, missing = study.gather(configs + configs, "smoke", folder=tmp_path)
    assert [run["name"] for run in found] == [c.name for c in configs] and not missing
    again, _ = study.gather(configs, "smoke", aggregate_only=True, folder=tmp_path)
    assert again == found


def test_a_wrong_name_is_one_clear_line():
    line = [sys.executable, "-m", "bench", "ledger", "--learner", "XXL"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: .*must be one of femto, pico, .*got 'XXL'", done.stderr)
