# SPDX-License-Identifier: Apache-2.0
"""The numbers in the GPU benchmark's rows: statistics, work, checks, and what the table says."""

import time

import pytest
import torch

pytest.importorskip("triton", reason="the benchmark times Triton kernels")

from activesel import Head, score, spec
from bench import scorer_predictions
from bench.gpu import baselines, report, targets, timing
from bench.gpu.baselines import Inputs
from bench.gpu.cases import work_of
from bench.gpu.plan import CASES
from bench.gpu.timing import Variant, WallClock, Work

BF16 = torch.bfloat16


# ---------------------------------------------------------------------------------------- timing


def test_turns_rotate_and_stop_in_time():
    calls, clock = [], iter(range(100))

    def sampler(name, seconds):
        def sample():
            calls.append(name)
            return seconds

        return sample

    samplers = {"a": sampler("a", 1.0), "b": sampler("b", 2.0), "c": sampler("c", 3.0)}
    times = timing.take_turns(samplers, 4.0, (2, 50), now=lambda: next(clock))
    assert times == {"a": [1.0] * 5, "b": [2.0] * 5, "c": [3.0] * 5}  # 2 unasked, then 1, 2, 3
    assert "".join(calls[:9]) == "abcbcacab"
    assert len(timing.take_turns(samplers, 1e9, (2, 7))["a"]) == 7


class Scripted(timing.EventClock):
    """Decides as the real clock does; a call takes the seconds it is told."""

    def __init__(self, seconds, capturable=True):
        self.seconds, self.capturable, self.calls = seconds, capturable, []

    def _between(self, function, calls, ahead=False):
        function()
        return self.seconds * (len(self.calls) if function == self.replay else 1)

    def _capture(self, variant, copies, calls):
        if not self.capturable:
            raise RuntimeError("not while capturing\nand so on")
        self.calls = [i % copies for i in range(calls)]
        return self

    def replay(self):
        """What a graph does."""


@pytest.mark.parametrize(
    "seconds, copies, settings, method",
    [
        (1e-5, 3, {}, "graph of 21"),
        (1e-5, 200, {}, "graph of 200"),
        (1e-4, 1, {"capturable": False}, "stream of 10, launches included (no graph: not while"),
        (1e-4, 1, {"from_python": True}, "stream of 10, launches included"),
        (5e-3, 2, {}, "stream of 1"),
    ],
)
def test_short_calls_are_captured(seconds, copies, settings, method):
    clock = Scripted(seconds, settings.pop("capturable", True))
    variant = Variant("any", lambda i: None, lambda out: "", **settings)
    sampler = clock.prepare(variant, copies)
    assert sampler.method.startswith(method) and sampler.sample() == pytest.approx(seconds)
    assert {clock.calls.count(i) for i in range(copies)} in ({0}, {len(clock.calls) // copies})


def variant(name, value, *, ours=False, seconds=0.0):
    def check(out):
        if out != 42:
            raise AssertionError(f"must be 42, got {out}")
        return "it is 42"

    def call(i):
        time.sleep(seconds)
        return value

    return Variant(name, call, check, ours=ours)


def test_what_is_wrong_is_not_timed():
    variants = [
        variant("ours", 42, ours=True), variant("slow", 42, seconds=0.02), variant("wrong", 41),
    ]  # fmt: skip
    row = timing.measure(variants, Work(flops=6), 2, WallClock(), 0.0, (3, 3))
    ours, slow, wrong = row["variants"]
    assert "failed" not in row and row["work"]["flops"] == 6 and row["first"] == "ours"
    assert ours["checked"] == "it is 42" and ours["rounds"] == 3
    assert ours["times_the_first"]["p50"] == 1.0
    assert slow["seconds"]["p50"] > 0.02 and slow["times_the_first"]["p50"] > 1
    assert wrong == {"name": "wrong", "error": "AssertionError: must be 42, got 41"}


def test_a_wrong_answer_of_ours_fails_the_case():
    variants = [variant("ours", 41, ours=True), variant("eager", 42)]
    row = timing.measure(variants, Work(), 1, WallClock(), 0.0, (2, 2))
    assert row["failed"] and row["first"] == "eager" and "seconds" not in row["variants"][0]


def test_floor_is_the_slowest_of_three():
    work = Work(flops=800, bytes=30, exps=100)
    assert work.floor({"flops": 100.0, "bytes": 10.0, "exps": 10.0}) == (10.0, "exps")
    assert work.floor({"flops": 100.0, "bytes": 10.0}) == (8.0, "flops")
    assert work.floor({}) == (0.0, "nothing")


def test_percent_of_the_best_ceiling_seen():
    entry = {"seconds": {"p50": 0.5}}
    content = {
        "rehearsal": True,
        "rows": [
            {"case": "a", "work": {"flops": 100, "bytes": 0, "exps": 0, "formula": ""},
             "variants": [entry, {"error": "x"}]},
            {"case": "ceilings", "ceilings": {"flops": 900.0}},
            {"case": "again", "ceilings": {"flops": 1000.0, "bytes": 5.0}},
        ]
    }  # fmt: skip
    report.rate_rows(content)
    assert entry["percent_of_roofline"] == pytest.approx(20.0)
    assert content["rows"][0]["floor"] == {"seconds": 0.1, "bound": "flops"}


def test_table_shows_what_was_measured():
    content = {
        "rehearsal": False,
        "machine": {"gpu": "NVIDIA X", "driver": "1", "torch": "2", "triton": None},
        "rows": [
            {"case": "lost", "error": "the process died"},
            {"case": "ceilings", "ceilings": {"bytes": 4e12, "flops": 8e14}},
            {"case": "right", "learnability_rms": 0.01, "kept": 20,
             "agreement": {"ours": {"overlap": 0.999, "error_rms": 1e-6}}},
            {"case": "fast", "work": {"flops": 8 * 10**11, "bytes": 0, "exps": 0, "formula": ""},
             "variants": [
                 {"name": "ours", "seconds": {"p20": 1e-3, "p50": 2e-3, "p80": 3e-3},
                  "times_the_first": {"p50": 1.0}, "peak_extra_bytes": 5_000_000, "method": "m"},
                 {"name": "eager", "error": "OutOfMemoryError: no"}]},
        ],
    }  # fmt: skip
    report.rate_rows(content)
    text = report.table(content)
    for part in (
        "lost: the process died", "4 TB/s, 800 TFLOP/s", "99.9000 % of the true 20",
        "floor 1 ms, products", "2.0000 ms [1.0000, 3.0000]", "50.0 % of roofline", "5.0 MB",
        "OutOfMemoryError: no",
    ):  # fmt: skip
        assert part in text, text


def found(name, seconds, times, extra=7_000_000):
    return {
        "name": name, "seconds": {"p50": seconds}, "times_the_first": {"p50": times},
        "peak_extra_bytes": extra,
    }  # fmt: skip


def test_targets_are_met_missed_or_not_measured():
    rows = [
        {"case": targets.HEAD, "first": "ours", "variants": [
            found("ours", 1.0, 1.0), found("eager, bf16 logits, 2 chunks", 4.0, 4.0),
            found("torch.compile", 0.9, 0.9)]},
        {"case": targets.TOPK, "first": "torch.topk, sort", "variants": [
            {"name": "ours, CUDA", "error": "wrong"}, found("torch.topk, sort", 1.0, 1.0)]},
        {"case": targets.TARGETS[4].case, "agreement": {"ours": {"overlap": 0.9899}}},
        {"case": targets.TARGETS[5].case, "error": "the process died"},
        {"case": targets.TARGETS[6].case, "first": "ours", "variants": [found("ours", 4e-3, 1.0)]},
        {"case": targets.TARGETS[7].case, "first": "ours", "variants": [
            found("ours", 0.1, 1.0), found("torch.compile, sums", 0.15, 1.5)]},
    ]  # fmt: skip
    outcomes = targets.compare(rows)
    met, numbers = ([t[name] for t in outcomes[:9]] for name in ("met", "found"))
    assert met == [True, False, True, None, False, None, True, False, True]
    assert numbers == [4, 0.9, 7, None, 0.9899, None, 4, 100, 1.5]
    rows[0]["variants"][0]["peak_extra_bytes"] = 9_000_000
    assert targets.compare(rows)[2]["met"] is False


def test_targets_of_scorers():
    """Each is held against a variant of the same row; costs are to be low, the rest high."""
    case = targets.MU
    mine = found("ours", 0.02, 1.0) | {"percent_of_roofline": 29.0}
    rest = [found("torch.compile, 20 chunks", 0.11, 5.5), found("eager, 20 chunks", 0.15, 7.5),
            found("features alone", 0.0196, 0.98), found("packing alone", 4e-4, 0.02),
            found("ours, fp8", 0.01, 0.5)]  # fmt: skip
    row = {"case": case, "first": "ours", "variants": [mine, *rest]}

    def outcome(what, against="", bound=1.0, row=row):
        return targets.Target(case, what, against, bound, bound).found(row)

    assert [t["met"] for t in targets.compare([row]) if t["case"] == case] == [
        False, True, False, False,
    ]  # fmt: skip
    assert outcome("% more", "features alone") == pytest.approx(100 * (1 / 0.98 - 1))
    assert outcome("% of it", "packing alone") == pytest.approx(2.0)
    assert outcome("% of roofline") == 29.0
    assert outcome("fp8 speedup", "torch.compile") == pytest.approx(11.0)
    without = {**row, "variants": [mine, *rest[:2], {"name": "features alone", "error": "wrong"}]}
    assert outcome("% more", "features alone", row=without) is None
    assert outcome("fp8 speedup", "torch.compile", row=without) is None
    assert outcome("speedup", "eager", row={**row, "first": "eager, 20 chunks"}) is None


def test_targets_name_cases_and_variants_that_exist():
    assert {t.case for t in targets.TARGETS} <= set(CASES)


def test_targets_of_scorers_are_those_of_the_cost_model():
    """Written twice, since the one is read where triton must not be imported yet."""
    assert list(targets.SCORERS) == list(scorer_predictions.CASES)
    for name, (s, images, _, bounds, aims) in scorer_predictions.CASES.items():
        said = targets.SCORERS[name]
        assert said == f"width {s.width}, depth {s.depth}, {s.tokens} tokens: B {images:,}"
        mine = [t for t in targets.TARGETS if t.case.endswith(said) and t.what == "speedup"]
        ways = {"eager": "eager", "torch": "torch.compile"}
        assert {t.against: (t.bound, t.aim) for t in mine} == {
            ways[way]: (bounds[way], aims[way]) for way in bounds
        }


# ----------------------------------------------------------------------------- work, truth, checks


def head_inputs(rows=64, classes=50, width=32, loss="softmax"):
    sides = [[torch.randn(rows, width).to(BF16), (torch.randn(classes, width) / 6).to(BF16)]
             for _ in range(2)]  # fmt: skip
    return Inputs(*sides, torch.randint(classes, (rows,)), loss)


def test_work_is_what_one_counts_by_hand():
    work = work_of(head_inputs(64, 50, 32), keep=16)
    assert work.flops == 2 * (2 * 64 * 50 * 32)
    assert work.bytes == 2 * (64 * 32 * 2 + 50 * 32 * 2) + 64 * 8 + 64 * 8 + 16 * 8
    assert work.exps == 2 * 64 * 50
    assert work_of(head_inputs(64, 50, 32, "sigmoid")).exps == 4 * 64 * 50
    cached = head_inputs()._replace(reference=[torch.randn(64)])
    assert work_of(cached).flops == 2 * 64 * 50 * 32 and work_of(cached).exps == 64 * 50
    logits = Inputs([torch.randn(10, 7)], [torch.randn(10, 7).to(BF16)], torch.zeros(10).long())
    assert work_of(logits) == Work(
        0, 10 * 7 * 4 + 10 * 7 * 2 + 80 + 80, 2 * 70, work_of(logits).formula
    )
    losses = Inputs([torch.randn(10)], [])
    assert (work_of(losses).bytes, work_of(losses).exps) == (40 + 80, 0)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_eager_computes_what_we_compute(loss):
    inputs = head_inputs(loss=loss)
    ours = score(
        online=Head(*inputs.online), reference=Head(*inputs.reference), targets=inputs.targets,
        loss=loss, backend="torch",
    )  # fmt: skip
    torch.testing.assert_close(baselines.scores(inputs, torch.float32), ours, rtol=1e-5, atol=1e-4)
    for chunks in (2, 5):
        part = baselines.chunked(inputs, torch.float32, chunks)
        torch.testing.assert_close(part, ours, rtol=1e-5, atol=1e-4)
    easy = inputs._replace(online=[])
    assert (baselines.scores(easy, torch.float32) < 0).all()


def test_checks_tell_ours_from_bf16_logits():
    """What passes as a baseline would not pass as ours."""
    inputs = head_inputs(256, 500, 64)
    exact, rounded = (baselines.scores(inputs, dtype) for dtype in (torch.float32, BF16))
    assert "256 scores within" in baselines.check_scores(inputs, exact)
    assert baselines.check_scores(inputs, rounded, baseline=True)
    with pytest.raises(AssertionError):
        baselines.check_scores(inputs, rounded)
    with pytest.raises(AssertionError, match="must be within"):
        baselines.check_scores(inputs, exact + 0.2, baseline=True)
    with pytest.raises(AssertionError, match="must be within"):
        baselines.check_scores(inputs, exact * torch.nan, baseline=True)


def test_checks_of_keys_and_rows_are_exact():
    scores, noise = torch.randn(100), (torch.tensor([1]), torch.tensor([2]), torch.ones(1))
    keys, _ = spec.key(scores, spec.noise(100, *noise[:2]), noise[2])
    assert baselines.check_keys(scores, keys, *noise) == "all keys bit for bit"
    wrong = keys.clone()
    wrong[3] = wrong[3].nextafter(torch.tensor(torch.inf))
    with pytest.raises(AssertionError, match="keys"):
        baselines.check_keys(scores, wrong, *noise)
    indices, threshold, _ = spec.topk(keys, 20)
    baselines.check_rows(keys, 20, indices, threshold)
    baselines.check_rows(keys, 20, baselines.kept(keys, 20), None)
    for bad in ((indices.flip(0), threshold), (indices, threshold + 1), (indices + 0 * 1, keys[0])):
        with pytest.raises(AssertionError, match="rows"):
            baselines.check_rows(keys, 20, *bad)
    with pytest.raises(AssertionError, match="rows"):
        baselines.check_rows(keys, 20, torch.arange(20), None)


# --------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_events_time_the_device():
    """A copy's time lies between what no memory reaches and what any does."""
    x = torch.randn(1 << 26, device="cuda")
    variant = Variant("clone", lambda i: x.clone(), lambda out: "not")
    sampler = timing.EventClock().prepare(variant, 2)
    bandwidth = 2 * x.nbytes / sampler.sample()
    assert sampler.method.startswith("graph") and 5e10 < bandwidth < 2e13
    assert timing.peak_memory(variant.call) == x.nbytes
    waiting = Variant("waits", lambda i: x.sum().item(), lambda out: "not")
    assert "no graph" in timing.EventClock().prepare(waiting, 1).method
