# SPDX-License-Identifier: Apache-2.0
"""`python -m activesel doctor`: what runs here, why not the rest; that it would find a fault."""

import os
import subprocess
import sys

import pytest
import torch

from activesel import _native, doctor, ops, spec


def run(**environment):
    env = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ACTIVESEL_BACKEND")
    }
    return subprocess.run(
        [sys.executable, "-m", "activesel", "doctor"],
        env=env | environment, capture_output=True, text=True,
    )  # fmt: skip


def test_healthy():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch {torch.__version__}" in done.stdout
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


def test_unknown_commands():
    done = subprocess.run(
        [sys.executable, "-m", "activesel", "nurse"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "invalid choice: 'nurse'" in done.stderr


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
    assert not doctor.examine(torch.device("cpu"))
    out = capsys.readouterr().out
    assert "WRONG" in out and said in out


def test_a_crash_hides_nothing(monkeypatch, capsys):
    def crash(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(spec, "topk", crash)
    monkeypatch.setitem(doctor.STAGES, "topk", "keys -> rows")
    assert not doctor.examine(torch.device("cpu"))
    out = capsys.readouterr().out
    assert "losses -> scores" in out and "RuntimeError: out of luck" in out
