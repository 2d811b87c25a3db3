# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are named, with what was expected and what came."""

import math
import re

import numpy as np
import pytest
import torch
from conftest import MODULES

import activesel
from activesel import Head, Selector, sample, score, select, spec

LOSSES, LOGITS, LABELS = torch.zeros(4), torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
TOKENS, TOKEN_LABELS = torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)
FEATURES, WEIGHT = torch.zeros(4, 5), torch.zeros(3, 5)
ONLINE = dict(online=LOGITS, targets=LABELS)
META = torch.zeros(4, 3, device="meta")

SAMPLE = [  # arguments of sample, exception, parts of the message
    (dict(k=5), ValueError, ["k", "[0, 4]", "5"]),
    (dict(k=-1), ValueError, ["k", "[0, 4]", "-1"]),
    (dict(k=1.0), TypeError, ["k", "int", "float"]),
    (dict(k=True), TypeError, ["k", "int", "bool"]),
    (dict(k=None), TypeError, ["k", "int", "NoneType"]),
    (dict(temperature=-1.0), ValueError, ["temperature", ">= 0", "-1.0"]),
    (dict(temperature=math.nan), ValueError, ["temperature", ">= 0", "nan"]),
    (dict(temperature=-math.inf), ValueError, ["temperature", ">= 0", "-inf"]),
    (dict(temperature=1e-39), ValueError, ["temperature", "1/T", "1e-39"]),
    (dict(temperature=1e-300), ValueError, ["temperature", "1/T", "1e-300"]),
    (dict(temperature="hot"), TypeError, ["temperature", "str"]),
    (dict(temperature=None), TypeError, ["temperature", "NoneType"]),
    (dict(temperature=torch.tensor([-1.0])), ValueError, ["temperature", ">= 0", "-1.0"]),
    (dict(temperature=torch.tensor(math.nan)), ValueError, ["temperature", ">= 0", "nan"]),
    (dict(temperature=torch.tensor([1e-39])), ValueError, ["temperature", "1/T"]),
    (dict(temperature=torch.ones(2)), ValueError, ["temperature", "one element", "(2,)"]),
    (dict(temperature=torch.ones(1).double()), TypeError, ["temperature", "float32", "float64"]),
    (dict(temperature=META[:1, 0]), RuntimeError, ["temperature", "cpu", "meta"]),
    (dict(seed=1 << 64), ValueError, ["seed", "64 bits", str(1 << 64)]),
    (dict(seed=-(1 << 63) - 1), ValueError, ["seed", "64 bits"]),
    (dict(seed=1.5), TypeError, ["seed", "int", "float"]),
    (dict(seed="a"), TypeError, ["seed", "int", "str"]),
    (dict(seed=torch.zeros(1)), TypeError, ["seed", "int64", "float32"]),
    (dict(seed=torch.zeros(3).long()), ValueError, ["seed", "one element", "(3,)"]),
    (dict(step=-1), ValueError, ["step", "[0, 2^32)", "-1"]),
    (dict(step=1 << 32), ValueError, ["step", "[0, 2^32)", str(1 << 32)]),
    (dict(step=0.5), TypeError, ["step", "int", "float"]),
    (dict(step=torch.zeros(1).int()), TypeError, ["step", "int64", "int32"]),
    (dict(offset=-1), ValueError, ["offset", "0", "-1"]),
    (dict(offset=0.5), TypeError, ["offset", "int", "float"]),
    (dict(offset=(1 << 63) - 2), ValueError, ["offset", str((1 << 63) - 2)]),
    (dict(offset=1 << 70), ValueError, ["offset", str(1 << 70)]),
    (dict(backend="gpu"), ValueError, ["backend", "torch", "gpu"]),
    (dict(backend="cuda"), RuntimeError, ["backend", "cuda"]),
    (dict(scores=[1.0, 2.0]), TypeError, ["scores", "Tensor", "list"]),
    (dict(scores=LOGITS), ValueError, ["scores", "[B]", "(4, 3)"]),
    (dict(scores=torch.tensor(1.0)), ValueError, ["scores", "[B]", "()"]),
    (dict(scores=LABELS), TypeError, ["float32", "int64"]),
    (dict(scores=LOSSES.double()), TypeError, ["float32", "float64"]),
    (dict(scores=torch.zeros(0), k=1), ValueError, ["k", "[0, 0]", "1"]),
]

SCORE = [  # arguments of score
    (dict(), ValueError, ["online or reference", "None"]),
    (dict(online=LOGITS), ValueError, ["targets", "online", "None"]),
    (dict(reference=LOGITS), ValueError, ["targets", "reference", "None"]),
    (dict(online=LOSSES, targets=LABELS), ValueError, ["targets", "losses"]),
    (dict(online=[LOSSES]), TypeError, ["online", "Tensor, Head, Forward or Pairs", "list"]),
    (dict(online=(FEATURES, WEIGHT), targets=LABELS), TypeError, ["online", "Head", "tuple"]),
    (dict(online=LOGITS.long(), targets=LABELS), TypeError, ["online", "float32", "int64"]),
    (dict(online=LOGITS.double(), targets=LABELS), TypeError, ["online", "float32", "float64"]),
    (dict(online=LOGITS.bool(), targets=LABELS), TypeError, ["online", "bool"]),
    (dict(online=LOGITS + 0j, targets=LABELS), TypeError, ["online", "complex64"]),
    (dict(online=torch.tensor(0.0)), ValueError, ["online", "losses", "()"]),
    (dict(online=torch.zeros(1, 2, 3, 4)), ValueError, ["online", "(1, 2, 3, 4)"]),
    (dict(online=LOSSES, reference=LOSSES[:3]), ValueError, ["reference", "4 rows", "3"]),
    (dict(**ONLINE, reference=torch.zeros(4, 2)), ValueError, ["classes", "[2, 3]"]),
    (dict(**ONLINE, reference=torch.zeros(3, 3)), ValueError, ["reference", "4 rows", "3"]),
    (dict(**ONLINE, reference=TOKENS), ValueError, ["targets", "reference", "[4, 2]"]),
    (dict(**ONLINE, reference=META), RuntimeError, ["reference", "cpu", "meta"]),
    (dict(online=LOGITS, targets=LABELS[:3]), ValueError, ["targets", "[4]", "[3]"]),
    (dict(online=LOGITS, targets=TOKEN_LABELS), ValueError, ["targets", "[4]", "[4, 2]"]),
    (dict(online=TOKENS, targets=LABELS), ValueError, ["targets", "[4, 2]", "[4]"]),
    (dict(online=LOGITS, targets=torch.zeros(4, 2)), ValueError, ["targets", "[4, 3]", "[4, 2]"]),
    (dict(online=LOGITS, targets=LOGITS.double()), TypeError, ["targets", "float64"]),
    (dict(online=LOGITS, targets=LABELS.bool()), TypeError, ["targets", "bool"]),
    (dict(online=LOGITS, targets=[0, 0, 0, 0]), TypeError, ["targets", "Tensor", "list"]),
    (dict(online=LOGITS, targets=META), RuntimeError, ["targets", "cpu", "meta"]),
    (dict(online=LOGITS, targets=LABELS + 3), ValueError, ["targets", "[0, C)", "3"]),
    (dict(online=LOGITS, targets=LABELS - 1), ValueError, ["targets", "[0, C)", "-1"]),
    (dict(online=TOKENS, targets=TOKEN_LABELS + 9), ValueError, ["targets", "[0, C)", "9"]),
    (dict(online=Head(FEATURES, WEIGHT), targets=LABELS + 3), ValueError, ["targets", "[0, C)"]),
    (dict(**ONLINE, loss="mse"), ValueError, ["loss", "softmax", "'mse'"]),
    (dict(**ONLINE, loss=None), ValueError, ["loss", "softmax", "None"]),
    (dict(**ONLINE, label_smoothing=-0.1), ValueError, ["label_smoothing", "[0, 1]", "-0.1"]),
    (dict(**ONLINE, label_smoothing=1.5), ValueError, ["label_smoothing", "[0, 1]", "1.5"]),
    (dict(**ONLINE, label_smoothing=math.nan), ValueError, ["label_smoothing", "nan"]),
    (dict(**ONLINE, label_smoothing="a"), TypeError, ["label_smoothing", "str"]),
    (dict(**ONLINE, ignore_index=0.5), TypeError, ["ignore_index", "int", "float"]),
    (dict(online=torch.zeros(4, 0), targets=LABELS), ValueError, ["online", "one class", "0"]),
    (dict(online=Head(FEATURES, WEIGHT)), ValueError, ["targets", "online", "None"]),
    (
        dict(online=Head(LOSSES, WEIGHT), targets=LABELS),
        ValueError,
        ["online.features", "[B, D]", "(4,)"],
    ),
    (
        dict(online=Head(FEATURES, WEIGHT.T), targets=LABELS),
        ValueError,
        ["online.weight", "[C, 5]", "(5, 3)"],
    ),
    (
        dict(online=Head(FEATURES, WEIGHT, LOSSES), targets=LABELS),
        ValueError,
        ["online.bias", "[3]", "(4,)"],
    ),
    (
        dict(reference=Head(FEATURES.long(), WEIGHT), targets=LABELS),
        TypeError,
        ["reference.features", "float32", "int64"],
    ),
    (
        dict(online=Head(FEATURES, None), targets=LABELS),
        TypeError,
        ["online.weight", "Tensor", "NoneType"],
    ),
    (
        dict(online=Head(FEATURES, WEIGHT.to("meta")), targets=LABELS),
        RuntimeError,
        ["online", "cpu", "meta"],
    ),
]


def check(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is missing in: {message}"


@pytest.mark.parametrize(("arguments", "error", "parts"), SAMPLE)
def test_sample(arguments, error, parts):
    check(lambda: sample(**{"scores": LOSSES, "k": 2, "seed": 0, **arguments}), error, parts)


@pytest.mark.parametrize(("arguments", "error", "parts"), SCORE)
def test_score_and_select(arguments, error, parts):
    check(lambda: score(**arguments), error, parts)
    check(lambda: select(**arguments, k=2, seed=0), error, parts)


def test_numpy_integers_are_integers():
    a = sample(LOSSES, np.int64(2), seed=np.int64(1), step=np.int32(3))
    assert torch.equal(a.keys, sample(LOSSES, 2, seed=1, step=3).keys)


@pytest.mark.parametrize("temperature", [1e39, 1e300])
def test_temperature_beyond_float32_is_infinite(temperature):
    """It draws uniformly, as its limit does, or is refused by name; it does not overflow."""
    assert torch.equal(
        sample(LOSSES + 5, 2, temperature, seed=0).keys, sample(LOSSES, 2, math.inf, seed=0).keys
    )


def test_out_of_range_target_is_flagged_and_scores_nan(module):
    """What a device that must not be looked at returns instead of an error."""
    labels = torch.tensor([0, 3, -7, -100])
    scores, flags = module.score([torch.randn(4, 3)], [], labels, "softmax", 0.0, -100)
    assert scores.isnan().tolist() == [False, True, True, True]
    assert int(flags) == spec.BAD_TARGET | spec.NONFINITE_SCORE
    _, flags = module.score(
        [torch.randn(4, 5), torch.randn(3, 5)], [], labels, "sigmoid", 0.0, -100
    )
    assert int(flags) == spec.BAD_TARGET | spec.NONFINITE_SCORE


def test_bad_environment_variable_is_named(monkeypatch):
    monkeypatch.setenv("ACTIVESEL_BACKEND", "fast")
    check(lambda: sample(LOSSES, 2), ValueError, ["ACTIVESEL_BACKEND", "torch", "fast"])
    sample(LOSSES, 2, backend="torch")  # said in the call: the variable is not asked


def test_environment_variable_chooses(monkeypatch):
    from activesel import ops

    monkeypatch.setenv("ACTIVESEL_BACKEND", "torch")
    assert ops.choose("auto", torch.device("cpu")) == ("torch", "ACTIVESEL_BACKEND")


def test_missing_native_module_is_explained(monkeypatch):
    monkeypatch.setattr(MODULES["native"], "available", lambda: False)
    monkeypatch.setattr(MODULES["native"], "reason", lambda: "no compiler was found")
    check(lambda: sample(LOSSES, 2, backend="native"), RuntimeError, ["native", "no compiler"])
    assert activesel.ops.choose("auto", torch.device("cpu"))[0] == "torch"


LINEAR = torch.nn.Linear(5, 3)
OPTIMIZER = torch.optim.SGD(LINEAR.parameters(), lr=0.1)

SELECTOR = [  # arguments of Selector
    (dict(keep=0), ValueError, ["keep", ">= 1", "0"]),
    (dict(keep=2.5), TypeError, ["keep", "int", "float"]),
    (dict(method="best"), ValueError, ["method", "uniform", "'best'"]),
    (dict(online=None), ValueError, ["online", "learnability", "None"]),
    (dict(reference=None), ValueError, ["reference", "learnability", "None"]),
    (dict(loss="mse"), ValueError, ["loss", "softmax", "'mse'"]),
    (dict(temperature=-1.0), ValueError, ["temperature", ">= 0", "-1.0"]),
    (dict(temperature=math.nan), ValueError, ["temperature", ">= 0", "nan"]),
    (dict(seed=1 << 64), ValueError, ["seed", "64 bits", str(1 << 64)]),
    (dict(train_reference=True), ValueError, ["reference_optimizer", "None"]),
    (dict(method="rho_loss", optimizer=OPTIMIZER), ValueError, ["optimizer", "rho_loss"]),
    (dict(method="rho_loss", temperature=0.5), ValueError, ["temperature", "rho_loss", "0.5"]),
    (dict(start=-1), ValueError, ["start", "-1"]),
    (dict(start=5, end=4), ValueError, ["end", "4"]),
    (dict(warmup=-1), ValueError, ["warmup", "-1"]),
]


@pytest.mark.parametrize(("arguments", "error", "parts"), SELECTOR)
def test_selector(arguments, error, parts):
    check(
        lambda: Selector(**{"online": LINEAR, "reference": LINEAR, "keep": 2, **arguments}),
        error,
        parts,
    )


def test_selector_calls():
    sel = Selector(LINEAR, LINEAR, keep=6)
    check(lambda: sel((FEATURES, LABELS)), ValueError, ["batch", "keep=6", "4"])
    check(lambda: sel(("no", "tensor")), TypeError, ["batch", "tensor", "tuple"])
    check(lambda: sel.update((FEATURES, LABELS)), RuntimeError, ["optimizer", "None"])
    sel = Selector(LINEAR, LINEAR, keep=2, id_key="id")
    check(lambda: sel({"x": FEATURES}), ValueError, ["batch", "id_key", "'id'"])
    check(lambda: sel((FEATURES, LABELS)), ValueError, ["batch", "id_key", "tuple"])


def test_failed_call_leaves_the_selector_as_it_was():
    sel = Selector(LINEAR, LINEAR, keep=2)
    with pytest.raises(ValueError, match=re.escape("[0, C)")):
        sel((FEATURES, LABELS + 9))
    assert (sel.step, sel.examples_scored, sel.examples_trained, sel.last) == (0, 0, 0, None)
