# SPDX-License-Identifier: Apache-2.0
"""`python -m bench ledger`: any pair of models, a table, JSON and CSV, one last line."""

import csv
import json

import pytest

from activesel.ledger import LINES, Cost, Plan, cost, selection_flops
from activesel.models import vit
from bench import common, ledger

MODELS = """
import torch

class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4)

    def forward(self, tokens):
        return self.head(self.table(tokens).mean(1))

def big():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 32), torch.nn.Linear(32, 4))

small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
number = 3
"""


@pytest.fixture
def run(tmp_path, capsys):
    def run(*args, **settings):
        ledger.command(*args, out=tmp_path / "ledger", **settings)
        lines = capsys.readouterr().out.splitlines()
        assert lines[-1].startswith("--result ")
        content = common.read(tmp_path / "ledger.json")
        with open(tmp_path / "ledger.csv") as file:
            rows = list(csv.DictReader(file))
        return content, rows, json.loads(lines[-1].removeprefix("--result ")), "\n".join(lines)

    return run


@pytest.fixture
def models(tmp_path):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return str(path)


def test_by_default_ti_scores_for_b(run):
    content, rows, result, printed = run()
    assert [r["column"] for r in rows] == ["as published", "computed", "everything charged"]
    assert result["as_published"] == pytest.approx(0.0307, abs=1e-4)
    assert result["everything_charged"] == pytest.approx(-0.0273, abs=1e-4)
    assert result["compute_positive"] is False and result["learner_speedup"] == pytest.approx(0.18)
    assert result["beta_max"] == pytest.approx(0.797, abs=1e-3)
    for row in content["rows"]:
        total = sum(row[f"flops_{line}"] for line in LINES)
        assert row["flops_total"] == pytest.approx(total)
    everything = content["rows"][-1]
    assert everything["beta_max_reference_training_free"] == pytest.approx(0.857, abs=1e-3)
    for line in LINES:
        assert line.replace("_", " ") in printed
    assert content["f_ratio"] == pytest.approx(0.0713, abs=1e-4)
    assert "+3.1%" in ledger.text(content) and "-2.7%" in ledger.text(content)


def test_any_size_image_and_patch(run):
    content, rows, result, _ = run("mini@28/7", "nano@28/7", classes=10, beta=0.7, rho=3, runs=4)
    shapes = {"image_size": 28, "patch": 7, "classes": 10}
    big, small = (cost(vit(size, **shapes), (3, 28, 28)) for size in ("mini", "nano"))
    selection = selection_flops(1, 10, 2)
    plan = Plan(big, small, rho=3, beta=0.7, runs=4, selection=selection)
    expected = plan.everything()
    assert result["everything_charged"] == pytest.approx(expected.compute_speedup)
    assert float(rows[2]["flops_selection"]) == pytest.approx(expected.lines["selection"])
    assert content["rows_read"] == pytest.approx(2.1) and content["bytes_read"] == 0


def test_models_by_python_path(run, models):
    content, _, result, _ = run(
        f"{models}:big@3x4x4", f"{models}:small@3x4x4", reference=f"{models}:Tower@7:int64"
    )
    assert content["forward_flops"] == [2 * (48 * 32 + 32 * 4), 2 * 48 * 4, 2 * 8 * 4]
    assert result["learner"].endswith("big@3x4x4")


@pytest.mark.parametrize(
    "name, message",
    [
        ("Bx", "model must be one of femto, .*Ti, S, B, L, with @pixels/patch .*, got 'Bx'"),
        ("B@224", "model must be B@pixels/patch, got B@224"),
        ("B@224/15", "image_size must be a multiple of patch=15"),
        ("nowhere.py:big@4", "model must be in a file that exists, got nowhere.py"),
        ("no_such_module:big@4", "model must be in a module that can be imported"),
        ("FILE:medium@4", "model must be one of .*big.*, got 'medium'"),
        ("FILE:big@", "model must end with the shapes of a row"),
        ("FILE:big@4:text", "model must end with the shapes of a row"),
    ],
)
def test_unknown_names_list_the_known(name, message, models):
    with pytest.raises(ValueError, match=message):
        ledger.subject(name.replace("FILE", models))


def test_what_makes_no_model_is_refused(models):
    with pytest.raises(TypeError, match="number must be a model or make one, got int"):
        ledger.subject(f"{models}:number@4")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"method": "clasact"}, "method must be one of uniform, .*got 'clasact'"),
        ({"rho": 0.5}, "rho must be at least 1, got 0.5"),
        ({"beta": -1}, "beta must be at least 0, got -1"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ledger.command("nano@28/7", "femto@28/7", out=tmp_path / "ledger", **settings)
    assert not list(tmp_path.iterdir()), "nothing is written then"


def test_seconds_here_and_on_another_machine(run, tmp_path):
    names = ("micro@28/7", "femto@28/7")
    content, _, result, printed = run(*names, time=True, rows=2, classes=10)
    spent = content["seconds"]
    assert spent["total"] == pytest.approx(sum(spent["lines"].values()))
    assert result["wall_speedup"] == pytest.approx(1 - spent["total"] / spent["uniform"])
    assert f"{spent['forward_share']:.0%} of the learner's step" in " ".join(printed.split())
    (tmp_path / "ledger.json").rename(tmp_path / "theirs.json")
    theirs = run(*names, system=tmp_path / "theirs.json", classes=10, beta=0.5)[0]["seconds"]
    assert theirs["forward"] == spent["forward"]
    learner = Cost(spent["forward"][0], spent["backward"][0])
    assert theirs["lines"]["learner_forward"] == pytest.approx(0.5 * learner.forward)
    with pytest.raises(ValueError, match="must be of learner nano@28/7, got micro@28/7"):
        run("nano@28/7", "femto@28/7", system=tmp_path / "theirs.json")
    run(*names)
    (tmp_path / "ledger.json").rename(tmp_path / "none.json")
    with pytest.raises(ValueError, match="must hold seconds: write it with --time"):
        run(*names, system=tmp_path / "none.json")
