# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel doctor`: what runs here, why not the rest; that it would find a fault."""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from activesel import _native, _triton, doctor, ops, spec
from activesel.__main__ import main

CPU = "cpu"


def run(*options, **environment):
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ACTIVESEL_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-m", "activesel", "doctor", *options],
        env=env | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_healthy():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    assert done.stdout.endswith(": all that can run here is right\n")
    best = "native" if _native.available() else "torch"
    for stage, what in doctor.STAGES.items():
        line = next(line for line in done.stdout.splitlines() if what in line)
        taken = "torch" if stage == "scorer" else best  # no native kernel takes it
        assert line.split(what)[1].split()[:2] == [taken, "right"]
    assert "triton: Triton" in done.stdout and "cuda: CUDA kernels run on" in done.stdout


def test_the_variable_is_heeded():
    done = run(ACTIVESEL_BACKEND="torch")
    assert done.returncode == 0 and "auto takes torch: ACTIVESEL_BACKEND" in done.stdout


def test_a_variable_that_cannot_be_heeded():
    done = run(ACTIVESEL_BACKEND="cuda")
    assert done.returncode == 1
    assert "ACTIVESEL_BACKEND cannot run: CUDA kernels run on CUDA devices" in done.stdout


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("nurse", 2, "invalid choice: 'nurse'"),
        ("doctor --require torch", 2, "argument --require: invalid choice: 'torch'"),
        ("doctor --help", 0, "on every node of a cluster: python -m activesel doctor"),
    ],
)
def test_the_command_line(capsys, line, status, said):
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out = capsys.readouterr()
    assert stop.value.code == status and said in out.out + out.err


@pytest.mark.parametrize(
    ("stage", "what", "said"),
    [
        ("head", "score", "scores are off by 1.0e-04"),
        ("logits", "score", "scores are off by 1.0e-04"),
        ("scores", "score", "scores are off by 1.0e-04"),
        ("losses", "key", "keys are not"),
        ("losses", "topk", "rows, threshold are not"),
        ("topk", "topk", "rows, threshold are not"),
    ],
)
def test_a_wrong_kernel_is_found(monkeypatch, capsys, stage, what, said):
    class Wrong:
        @staticmethod
        def score(*args):
            scores, flags = spec.score(*args)
            return scores + 1e-4 * (what == "score"), flags

        @staticmethod
        def topk(keys, k):
            return spec.topk(-keys if what == "topk" else keys, k)

        @classmethod
        def select(cls, online, reference, targets, k, seed, step, temperature, offset, *loss):
            scores, flags = cls.score(online, reference, targets, *loss)
            noise = spec.noise(len(scores), seed, step + (what == "key"), offset)
            keys, _ = spec.key(scores, noise, temperature)
            indices, threshold, few = cls.topk(keys, k)
            return indices, scores, keys, threshold, flags | few

    monkeypatch.setitem(ops.MODULES, "torch", Wrong)
    assert said in doctor.check("torch", stage, torch.device("cpu"))
    monkeypatch.setattr(_triton, "reason", lambda device: "interpreted kernels are slow")
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cpu")])
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out and said in out and "not healthy" in out


def test_a_crash_hides_nothing(monkeypatch):
    def crash(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(_triton, "reason", lambda device: "interpreted kernels are slow")
    monkeypatch.setattr(spec, "topk", crash)
    faults = list(doctor.try_out(sick := doctor.Device(CPU, stages=doctor.plan(torch.device(CPU)))))
    assert "cpu: keys -> rows by torch: RuntimeError: out of luck" in faults
    outcomes = {stage: it.backends["torch"].outcome for stage, it in sick.stages.items()}
    assert outcomes["topk"] == "wrong" and outcomes["scores"] == "right"


def test_json():
    """One line, whose keys others may rely on."""
    done = run("--json", ACTIVESEL_TEST="heard")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert list(found) == [
        "host", "platform", "versions", "module", "driver", "tools", "environment",
        "devices", "missing", "faults", "healthy", "schema",
    ]  # fmt: skip
    assert found["schema"] == 1 and found["healthy"] is True and found["faults"] == []
    assert found["environment"]["ACTIVESEL_TEST"] == "heard"
    names = {"activesel", "Python", "torch", "triton", "numpy", "torch_cuda"}
    assert found["versions"].keys() == names and found["versions"]["torch"] == torch.__version__
    assert found["module"]["state"] == _native.reason()
    if _native.available():
        assert found["module"]["file"] == _native._module().__file__
    cpu = found["devices"][0]
    assert list(cpu) == ["device", "facts", "stages"] and cpu["device"] == "cpu"
    assert list(cpu["stages"]) == list(ops.STAGES)
    for stage in cpu["stages"].values():
        assert list(stage) == ["auto", "why", "backends"]
        assert list(stage["backends"]) == list(ops.BACKENDS[1:])
        torch_s, cuda_s = stage["backends"]["torch"], stage["backends"]["cuda"]
        assert torch_s["outcome"] == "right" and torch_s["seconds"] >= 0
        assert cuda_s["outcome"] == "cannot" and cuda_s["seconds"] is None and cuda_s["why"]


def test_nothing_but_json_where_json_is_asked_for(monkeypatch, capsys):
    def chatty(*_):
        print("chatter")
        return wrong

    monkeypatch.setattr(doctor, "check", chatty)
    monkeypatch.delenv("ACTIVESEL_BACKEND", raising=False)
    for wrong in ("", "bad"):
        assert main(["doctor", "--json"]) == bool(wrong)
        out = capsys.readouterr()
        assert json.loads(out.out)["healthy"] is not bool(wrong) and "chatter" in out.err


@pytest.mark.parametrize(
    ("installed", "said"), [("+cu13", "+cu13"), ("", ""), ("9", ""), (".dev1+cu13", "")]
)
def test_the_wheel_is_named(monkeypatch, installed, said):
    version = doctor.__version__
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version + installed)
    assert doctor.versions()["activesel"] == version + said
