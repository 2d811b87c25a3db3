# SPDX-License-Identifier: Apache-2.0
"""Side by side with peers: probes against what is known, gates, gaps, and what is written."""

import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import activesel
from bench import common, peers
from bench.kernels.place import Place
from bench.peers import probes, sizes, table, workloads
from bench.peers.sizes import KINDS, Workload

CPU = torch.device("cpu")
TINY = {
    "logits": (40, 30, 9),
    "head": (40, 30, 8, 9),
    "sample": (40, 9),
    "top": (40, 9),
    "joint": (200, 40, 16),
    "backprop": (40, 10),
}
PEERS = {
    "logits": {"ours", "eager", "torch.compile"},
    "head": {"ours", "eager", "torch.compile"},
    "sample": {
        "ours", "torch.multinomial", "eager Gumbel, topk, sort", "torch.compile", "numpy choice",
    },
    "top": {"ours", "torch.topk, sort", "torch.topk"},
    "joint": {
        "ours", "eager, running sums", "dense JEST", "dense JEST, matrix-vector products",
    },
    "backprop": {"ours", "argsort, numpy choice"},
}  # fmt: skip
COLUMNS = {
    "workload", "peer", "seconds", "seconds_p20", "seconds_p80", "times_ours", "times_ours_p20",
    "times_ours_p80", "extra_bytes", "syncs", "flops", "flops_formula", "bytes_formula", "checked",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One turn each, nothing compiled, Composer as if it were not there, small workloads."""
    monkeypatch.setattr(Place, "compile", lambda self, function: function)
    monkeypatch.setattr("bench.kernels.place.ROUNDS", (2, 2))
    monkeypatch.setattr(workloads, "composer", lambda: None)
    monkeypatch.setattr("bench.kernels.builders.DRAWS", 600)
    monkeypatch.setitem(sizes.SIZES, "smoke", {kind: [TINY[kind]] for kind in ("top", "sample")})
    with torch.no_grad():
        yield


def at():
    return Place("cpu", 0.0)


# ------------------------------------------------------------------------------------------ probes

x = torch.rand(100)


@pytest.mark.parametrize(
    "call, count",
    [
        (lambda: x.multinomial(5), 2),
        (lambda: x[x > 0.5], 1),
        (lambda: bool(x.sum() > 1), 1),
        (lambda: [x.sum().item() for _ in range(3)], 3),
        (lambda: x.nonzero(), 1),
        (lambda: x.tolist(), 1),
        (lambda: x.cpu().numpy(), 1),
        (lambda: x.to("cpu"), 1),
        (lambda: x.to(device="cpu"), 1),
        (lambda: x.to(torch.float64).topk(3), 0),
    ],
)
def test_host_waits_are_counted(call, count):
    assert probes.syncs(call, CPU) == count
    assert torch.Tensor.cpu is torch._C.TensorBase.cpu, "watched no longer"


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
@pytest.mark.parametrize("make", [torch.ones, lambda n: np.ones(n, np.float32)])
def test_memory_of_a_known_allocation(make):
    page = 2 << 20  # a huge one: Linux may round either end up to it
    assert 19.5e6 < probes.memory(lambda: make(5_000_000), CPU) < 20e6 + 2 * page
    assert probes.memory(lambda: None, CPU) < page


def test_memory_where_nothing_can_tell(monkeypatch):
    def peak(_):
        raise FileNotFoundError

    monkeypatch.setattr(probes.joint, "peak", peak)
    assert probes.memory(lambda: None, CPU) is None


def test_flops_of_known_products():
    a, b, v = torch.ones(5, 7), torch.ones(7, 3), torch.ones(7)
    assert probes.flops(lambda: a @ b) == 2 * 5 * 7 * 3
    assert probes.flops(lambda: a @ v) == 2 * 5 * 7
    head = activesel.Head(a, torch.ones(4, 7))
    targets = torch.zeros(5, dtype=torch.int64)
    assert probes.flops(lambda: activesel.score(online=head, targets=targets)) == 2 * 5 * 7 * 4


# --------------------------------------------------------------------------------------- workloads


@pytest.mark.parametrize("kind", TINY)
def test_workloads_are_checked_and_measured(kind):
    rows, left_out = table.measure(Workload(kind, TINY[kind]), at())
    names = {row["peer"] for row in rows}
    assert names >= PEERS[kind] and rows[0]["peer"] == "ours"
    assert all(set(row) >= COLUMNS for row in rows)
    assert all(row["seconds"] > 0 and row["checked"] for row in rows)
    assert rows[0]["times_ours"] == 1.0
    assert all("pip install" in line for line in left_out), left_out
    if hasattr(F, "linear_cross_entropy") and kind == "head":
        assert names > {"F.linear_cross_entropy", "F.linear_cross_entropy, chunked"}
    if kind in ("head", "joint"):
        counted = {row["peer"]: row["flops"] for row in rows}
        assert counted["ours"] == rows[0]["flops_formula"] > 0
        assert min(counted.values()) > 0.9 * counted["ours"]  # ours adds the batch's own score
    if kind == "sample":
        waits = {row["peer"]: row["syncs"] for row in rows}
        assert waits["torch.multinomial"] == 2 and waits["eager Gumbel, topk, sort"] == 0


def test_kinds_have_sizes_at_every_scale():
    assert set(KINDS) == set(TINY)
    for scale in ("full", "gpu"):
        assert set(sizes.SIZES[scale]) == set(KINDS)
        every = sizes.every(scale)
        assert len({str(w) for w in every}) == len(every) and all(w.need() > 0 for w in every)


def test_a_wrong_result_of_ours_stops_everything(monkeypatch, tmp_path):
    right = activesel.sample

    def wrong(*args, **kwargs):
        picked = right(*args, **kwargs)
        picked.indices[0] = picked.indices[1]
        return picked

    monkeypatch.setattr(activesel, "sample", wrong)
    with pytest.raises(table.Wrong, match="rows must be those of the specification"):
        table.measure(Workload("top", TINY["top"]), at())
    with pytest.raises(SystemExit, match="nothing is timed"):
        peers.command("smoke", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_wrong_peer_is_left_out_and_the_others_are_not(monkeypatch):
    monkeypatch.setattr("bench.kernels.builders.multinomial", lambda s, k: s.topk(k).indices)
    rows, left_out = table.measure(Workload("sample", TINY["sample"]), at())
    assert "torch.multinomial" not in {row["peer"] for row in rows} and len(rows) == 4
    (line,) = left_out
    assert line.startswith("torch.multinomial left out of sample 40 -> 9: AssertionError: row")


def test_what_is_missing_is_named_with_its_command():
    for kind, name, package in (
        ("logits", "quack", "quack-kernels"),
        ("head", "liger", "liger-kernel"),
        ("top", "flashinfer", "flashinfer-python"),
        ("backprop", "Composer", "mosaicml"),
    ):
        left_out = " ".join(Workload(kind, TINY[kind]).make(at()).left_out)
        assert f"{name} left out" in left_out and package in left_out and "pip install" in left_out


def test_old_torch_lacks_a_peer(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    made = Workload("head", TINY["head"]).make(at())
    assert any("pip install 'torch>=2.13'" in line for line in made.left_out)


def by_law(x, y, model, loss, keep=0.5):
    """Selective backprop as Composer's function has it: inputs and outputs, and its law."""
    losses = loss(model(x), y, reduction="none").double()
    p = workloads.by_rank(len(x), keep, CPU).double().softmax(0).numpy()
    rows = losses.argsort()[np.random.choice(len(x), int(keep * len(x)), replace=False, p=p)]
    return x[rows], y[rows]


def uniformly(x, y, model, loss, keep=0.5):
    rows = torch.from_numpy(np.random.permutation(len(x))[: int(keep * len(x))])
    return x[rows], y[rows]


@pytest.mark.parametrize("select, right", [(by_law, True), (uniformly, False)])
def test_composer_is_held_against_the_law(select, right, monkeypatch):
    monkeypatch.setattr(workloads, "composer", lambda: select)
    rows, left_out = table.measure(Workload("backprop", TINY["backprop"]), at())
    assert ("Composer" in {row["peer"] for row in rows}) == right
    assert any(line.startswith("Composer left out of") for line in left_out) != right


def test_numpy_goes_on_as_if_nothing_had_been_drawn():
    np.random.seed(1)
    expected = np.random.random(3)
    np.random.seed(1)
    with workloads.numpy_seed(7):
        np.random.random(5)
    assert (np.random.random(3) == expected).all()


def test_composer_that_fails_to_import_is_missing(monkeypatch):
    monkeypatch.undo()
    broken = types.ModuleType("composer.functional")
    monkeypatch.setitem(sys.modules, "composer", types.ModuleType("composer"))
    monkeypatch.setitem(sys.modules, "composer.functional", broken)
    assert workloads.composer() is None
    broken.select_using_loss = by_law
    assert workloads.composer() is by_law
    assert importlib.import_module("composer.functional") is broken


def test_the_dense_matrix_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(Place, "free", lambda self: 1000)
    made = Workload("joint", TINY["joint"]).make(at())
    assert [v.name for v in made.variants] == ["ours", "eager, running sums"]
    assert made.left_out[0].startswith("dense JEST with B = 200 left out: needs")


# ----------------------------------------------------------------------------------------- command


def test_the_table_is_written_and_resumes(tmp_path, capsys):
    out = tmp_path / "out"
    peers.command("smoke", minutes=0.0, out=out)
    assert "unfinished: 2 of 2 workloads are missing" in capsys.readouterr().out
    assert common.read(tmp_path / "out.json")["missing"] == [
        "top-k (T = 0) 40 -> 9",
        "sample 40 -> 9",
    ]
    peers.command("smoke", out=out)
    content = common.read(tmp_path / "out.json")
    assert not content["missing"] and len(content["rows"]) == 3 + 5
    assert any("pip install flashinfer-python" in line for line in content["left_out"])
    assert content["threads"] >= 1 and set(content["backends"]) >= {"topk", "joint"}
    said = capsys.readouterr().out
    result = json.loads(said.splitlines()[-1].removeprefix("--result "))
    assert result["workloads"] == 2 and result["missing"] == 0
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert len(lines) == 9 and set(lines[0].split(",")) >= COLUMNS


def test_what_is_finished_is_not_measured_again(tmp_path, monkeypatch):
    out = tmp_path / "out"
    peers.command("smoke", out=out)
    content = common.read(tmp_path / "out.json")
    last = content["rows"][-1]["workload"]
    rows = [row for row in content["rows"] if row["workload"] != last]
    common.write(out, content | {"rows": rows, "missing": [last]}, rows)
    measured = []
    right = table.measure
    monkeypatch.setattr(table, "measure", lambda w, *a: measured.append(str(w)) or right(w, *a))
    peers.command("smoke", out=out)
    assert measured == [last] and len(common.read(tmp_path / "out.json")["rows"]) == 8


def test_what_does_not_fit_is_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Place, "free", lambda self: 100)
    peers.command("smoke", out=tmp_path / "out")
    content = common.read(tmp_path / "out.json")
    assert not content["rows"] and "sample 40 -> 9 left out: needs" in " ".join(content["left_out"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="scale must be one of smoke, full, gpu"):
        peers.command("huge")
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        peers.command(threads=0)


def test_the_page_says_who_is_faster_and_who_is_not_there():
    row = {
        "workload": "sample 40 -> 9", "peer": "ours", "seconds": 1e-3, "times_ours": 1.0,
        "times_ours_p20": 1.0, "times_ours_p80": 1.0, "extra_bytes": 2e6, "syncs": 1, "flops": 0,
    }  # fmt: skip
    other = row | {"peer": "numpy choice", "times_ours": 0.5, "extra_bytes": None, "flops": 3e9}
    content = {
        "rows": [row, other], "missing": ["joint"], "left_out": ["liger left out: no GPU"],
        "device": "any", "threads": 2, "backends": {"topk": "native"},
    }  # fmt: skip
    text = peers.text(content)
    assert "| sample 40 -> 9 | ours | 1.000 | 1.00 | 2.0 | 1 | - |" in text
    assert "|  | numpy choice | 1.000 | 0.50 (1.00 to 1.00) | - | 1 | 3.00 |" in text
    assert "Faster than activesel: numpy choice for sample 40 -> 9 (0.50)." in text
    assert "**Unfinished: joint.**" in text and "liger left out: no GPU." in text
