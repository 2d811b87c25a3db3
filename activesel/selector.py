# SPDX-License-Identifier: Apache-2.0
"""`Selector`: selection with a memory, for training loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from activesel.operands import Forward, Operand, untouched
from activesel.select import Loss, Selection, sample, select

Method = Literal["uniform", "hard", "easy", "learnability", "rho_loss"]
NEEDS = {  # method: (online, reference)
    "uniform": (False, False),
    "hard": (True, False),
    "easy": (False, True),
    "learnability": (True, True),
    "rho_loss": (True, True),
}
QUANTILES = (0.025, 0.25, 0.5, 0.75, 0.975)


class Selector:
    """Keep the rows of each super-batch worth training on; train the online scorer beside.

    Call it on a super-batch after the transfer to the device and before the learner's forward; it
    returns the ``keep`` rows chosen, in the batch's own structure. ``update`` is one step of the
    online scorer on those rows.

    Args:
        online: scorer trained along (None for ``easy`` and ``uniform``); for ``rho_loss`` the
            learner itself.
        reference: scorer already trained, or trained beside (``train_reference``). Not needed for
            ``hard``, ``uniform``.
        keep: rows to keep of each super-batch. The batch it is given must have at least that many.
        method: score that decides. ``hard`` = l_online; ``easy`` = -l_reference; ``learnability``
            and ``rho_loss`` = l_online - l_reference, the latter always the k highest (temperature
            0); ``uniform`` runs no scorer.
        loss: "softmax", "sigmoid", or a callable ``(model, batch) -> [B]`` losses that replaces
            ``inputs`` too.
        inputs: ``inputs(batch) -> (x, targets)``; by default the batch's first two elements.
        optimizer: the online scorer's, used by ``update``.
        label_smoothing: of the targets ``update`` trains the online scorer on, in [0, 1]; scores
            and the reference are never smoothed. It keeps the online scorer less confident than
            the reference, so that wrong labels, which surprise both, score low.
        reference_optimizer: the reference's, used by ``update`` with ``train_reference``.
        train_reference: train the reference beside, on the whole super-batch (ClassAct-Online). The
            super-batch is kept until ``update``.
        temperature: >= 0, see `select`; may be reassigned at any time.
        seed: 64 bits; with the step, the whole state of the noise.
        id_key: entry of a dict batch that is removed before the learner sees the rows; the ids of
            the rows kept are in ``kept_ids``.
        start, end: calls before ``start`` and from ``end`` on keep rows uniformly, without scoring.
        warmup: calls from ``start`` over which 1/T rises linearly to its value.

    Attributes:
        last: `Selection` of the last call, None before it or when nothing had to be chosen.

    Source: Evans et al. 2023 (arXiv:2312.05328), Mindermann et al. 2022 (arXiv:2206.07137).

    Example:
        >>> import torch, activesel
        >>> online, reference = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
        >>> opt = torch.optim.AdamW(online.parameters())
        >>> sel = activesel.Selector(online, reference, keep=2, optimizer=opt)
        >>> batch = sel((torch.randn(8, 4), torch.randint(3, (8,))))
        >>> sel.update(batch)
        >>> batch[0].shape
        torch.Size([2, 4])
        >>> sel.metrics()["activesel/examples_scored"]
        tensor(8)
        >>> sel.load_state_dict(sel.state_dict())
    """

    def __init__(
        self,
        online: Any = None,
        reference: Any = None,
        *,
        keep: int,
        method: Method = "learnability",
        loss: Loss | Callable[[Any, Any], Tensor] = "softmax",
        inputs: Callable[[Any], tuple[Any, Tensor]] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        label_smoothing: float = 0.0,
        reference_optimizer: torch.optim.Optimizer | None = None,
        train_reference: bool = False,
        temperature: float | Tensor = 1.0,
        seed: int = 0,
        id_key: str | None = None,
        start: int = 0,
        end: int | None = None,
        warmup: int = 0,
    ) -> None:
        if method not in NEEDS:
            raise ValueError(f"method must be one of {', '.join(NEEDS)}, got {method!r}")
        for model, name, needed in zip(
            (online, reference), ("online", "reference"), NEEDS[method], strict=True
        ):
            if needed and model is None:
                raise ValueError(f'{name} must be given for method "{method}", got None')
        if not isinstance(keep, int) or isinstance(keep, bool):
            raise TypeError(f"keep must be an int, got {type(keep).__name__}")
        if not -(1 << 63) <= seed < 1 << 64:
            raise ValueError(f"seed must fit in 64 bits, got {seed}")
        if keep < 1:
            raise ValueError(f"keep must be >= 1, got {keep}")
        if not callable(loss) and loss not in ("softmax", "sigmoid"):
            raise ValueError(f'loss must be "softmax", "sigmoid" or callable, got {loss!r}')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if callable(loss) and label_smoothing:
            raise ValueError(f"label_smoothing must be 0 for a callable, got {label_smoothing}")
        if train_reference and (reference is None or reference_optimizer is None):
            raise ValueError("train_reference needs reference and reference_optimizer, got None")
        if method == "rho_loss":
            if optimizer is not None:
                raise ValueError(
                    'optimizer must be None for "rho_loss": the learner\'s own loop trains it'
                )
            if not isinstance(temperature, Tensor) and temperature not in (0.0, 1.0):
                raise ValueError(f'temperature is 0 for "rho_loss", got {temperature}')
            temperature = 0.0
        if not isinstance(temperature, Tensor) and not temperature >= 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        if start < 0 or warmup < 0 or (end is not None and end < start):
            raise ValueError(f"0 <= start <= end and warmup >= 0, got {start=}, {end=}, {warmup=}")
        self.online, self.reference = online, reference
        self.keep, self.method, self.loss, self.inputs = keep, method, loss, inputs
        self.optimizer, self.reference_optimizer = optimizer, reference_optimizer
        self.label_smoothing = label_smoothing
        self.train_reference, self.temperature, self.id_key = train_reference, temperature, id_key
        self.start, self.end, self.warmup = start, end, warmup
        self.seed, self.step, self.examples_scored, self.examples_trained = seed, 0, 0, 0
        self.last: Selection | None = None
        self.kept_ids: Any = None
        self._clock: tuple[Tensor, Tensor] | None = None  # seed and step on the device
        self._super_batch: Any = None

    def __call__(self, batch: Any) -> Any:
        """Return the rows kept, in the structure of ``batch``."""
        batch, ids = self._split_ids(batch)
        rows, device = self._rows(batch)
        if rows < self.keep:
            raise ValueError(f"batch must have at least keep={self.keep} rows, got {rows}")
        if self._clock is None or self._clock[0].device != device:
            self._clock = _int64(self.seed, device), _int64(self.step, device)
        self._super_batch = batch if self.train_reference else None
        self.last = self._choose(batch, rows) if rows > self.keep else None
        self._clock[1].add_(1)
        self.step += 1
        self.examples_trained += self.keep
        self.kept_ids = self.last.take(ids) if self.last else ids
        return self.last.take(batch) if self.last else batch

    def update(self, batch: Any) -> None:
        """One step of the online scorer on the rows kept, and of a reference trained beside.

        Raises RuntimeError without an optimizer, or when the reference's super-batch is not there
        yet.
        """
        if self.optimizer is None and not self.train_reference:
            raise RuntimeError(f'update needs an optimizer, got None (method "{self.method}")')
        if self.train_reference and self._super_batch is None:
            raise RuntimeError("update with train_reference must follow a call on a super-batch")
        if self.optimizer is not None:
            self._train(self.online, self.optimizer, batch, self.label_smoothing)
        if self.train_reference:
            self._train(self.reference, self.reference_optimizer, self._super_batch)
            self._super_batch = None

    def metrics(self) -> dict[str, Tensor]:
        """Device scalars about the last selection, named "activesel/..."; nothing waits or prints.

        ``gain`` is the mean score of the rows kept minus that of all rows; ``ess`` is the effective
        fraction of the super-batch, (sum p)^2 / (B sum p^2) with p = softmax(score / T): 1 is
        uniform, 1/B has collapsed.
        """
        out: dict[str, Tensor] = {}
        device = self._clock[0].device if self._clock else torch.device("cpu")
        for name in ("step", "examples_scored", "examples_trained"):
            out[name] = torch.full((), getattr(self, name), device=device)
        if self.last is not None:
            s = self.last.scores
            finite = s.isfinite()
            clean = s.where(finite, torch.nan)
            kept = clean[self.last.indices]
            for q, value in zip(QUANTILES, clean.nanquantile(s.new_tensor(QUANTILES)), strict=True):
                out[f"score_p{100 * q:g}"] = value
            out["score_mean"], out["score_kept_mean"] = clean.nanmean(), kept.nanmean()
            out["gain"] = out["score_kept_mean"] - out["score_mean"]
            out["nonfinite"], out["flags"] = (~finite).sum(), self.last.flags
            out["threshold"] = self.last.threshold
            t = torch.as_tensor(self.last.temperature, dtype=torch.float32, device=s.device)
            top = clean.nan_to_num(nan=-torch.inf).max()
            below = torch.where(t.isinf() | (s == top), 0.0, (s - top) / t)  # T = 0: -inf
            p = torch.where(finite, below, -torch.inf).softmax(0)
            out["ess"] = 1.0 / (s.shape[0] * p.square().sum())
        return {f"activesel/{name}": value for name, value in out.items()}

    def state_dict(self) -> dict[str, Any]:
        """Seed, step, counters, and what `update` trains with its optimizers; never the learner."""
        state: dict[str, Any] = {"version": 1, "seed": self.seed, "step": self.step}
        state |= {
            "examples_scored": self.examples_scored,
            "examples_trained": self.examples_trained,
        }
        for name, part in self._owned().items():
            state[name] = part.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Nothing is changed when it does not fit (ValueError)."""
        owned = self._owned()
        counters = ("seed", "step", "examples_scored", "examples_trained")
        expected = {"version", *counters, *owned}
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, got {type(state).__name__}")
        if state.get("version") != 1:
            raise ValueError(f"state version must be 1, got {state.get('version')!r}")
        if set(state) != expected:
            raise ValueError(f"state must have {sorted(expected)}, got {sorted(state)}")
        for name in counters:
            low, high = (-(1 << 63), 1 << 64) if name == "seed" else (0, 1 << 63)
            high = 1 << 32 if name == "step" else high
            if not isinstance(state[name], int) or not low <= state[name] < high:
                raise ValueError(
                    f"state {name} must be an int in [{low}, {high}), got {state[name]!r}"
                )
        before = {name: copy.deepcopy(part.state_dict()) for name, part in owned.items()}
        try:
            for name, part in owned.items():
                part.load_state_dict(copy.deepcopy(state[name]))
        except Exception as error:  # whatever a corrupt file makes them raise
            for name, part in owned.items():
                part.load_state_dict(before[name])
            raise ValueError(f"state of {name} must fit it: {error}") from error
        for name in counters:
            setattr(self, name, state[name])
        self._clock, self.last, self._super_batch = None, None, None

    # -------------------------------------------------------------------------------------- inside

    def _owned(self) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if self.optimizer is not None:
            parts |= {"online": self.online, "optimizer": self.optimizer}
        if self.train_reference:
            parts |= {"reference": self.reference, "reference_optimizer": self.reference_optimizer}
        return parts

    def _active(self) -> bool:
        begun = self.step >= self.start and (self.end is None or self.step < self.end)
        return begun and self.method != "uniform"

    def _choose(self, batch: Any, rows: int) -> Selection:
        assert self._clock is not None
        seed, step = self._clock
        if not self._active():
            zeros = torch.zeros(rows, device=seed.device)
            return sample(zeros, self.keep, float("inf"), seed, step)
        ramp = (self.step - self.start + 1) / self.warmup if self.warmup else 1.0
        temperature = self.temperature / min(ramp, 1.0)
        use_online, use_reference = NEEDS[self.method]
        if callable(self.loss):
            targets: Tensor | None = None
            how: Loss = "softmax"
        else:
            (x, targets), how = self._inputs(batch), self.loss

        def side(model: Any) -> Operand:
            if not callable(self.loss):
                return Forward(model, x)
            with untouched(model):
                return self.loss(model, batch)

        picked = select(
            online=side(self.online) if use_online else None,
            reference=side(self.reference) if use_reference else None,
            targets=targets, k=self.keep, loss=how, temperature=temperature, seed=seed, step=step,
        )  # fmt: skip
        self.examples_scored += rows
        return picked

    def _rows(self, batch: Any) -> tuple[int, torch.device]:
        """Rows and device of what is scored, or of the first array when nothing is."""
        if self.inputs is not None and self._active() and not callable(self.loss):
            leaf = self.inputs(batch)[1]
        else:
            leaf = _first_array(batch)
        return leaf.shape[0], leaf.device if isinstance(leaf, Tensor) else torch.device("cpu")

    def _inputs(self, batch: Any) -> tuple[Any, Tensor]:
        return self.inputs(batch) if self.inputs else (batch[0], batch[1])

    def _train(self, model: Any, optimizer: Any, batch: Any, smoothing: float = 0.0) -> None:
        with torch.enable_grad():
            if callable(self.loss):
                loss = self.loss(model, batch).mean()
            else:
                x, y = self._inputs(batch)
                loss = _mean_loss(model(x), y, self.loss, smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()

    def _split_ids(self, batch: Any) -> tuple[Any, Any]:
        if self.id_key is None:
            return batch, None
        if not isinstance(batch, Mapping) or self.id_key not in batch:
            raise ValueError(
                f"batch must be a dict with id_key {self.id_key!r}, got {type(batch).__name__}"
            )
        batch = copy.copy(batch)
        return batch, batch.pop(self.id_key)


def _mean_loss(logits: Tensor, targets: Tensor, loss: str, smoothing: float) -> Tensor:  # []
    """The training loss that goes with a score: the mean over rows, or over tokens that count."""
    classes = logits.shape[-1]
    logits = logits.float().reshape(-1, classes)
    if targets.is_floating_point():
        y = targets.reshape(logits.shape).float()
    elif loss == "softmax":
        return F.cross_entropy(logits, targets.reshape(-1).long(), label_smoothing=smoothing)
    else:
        counts = targets.reshape(-1) != -100
        logits, y = logits[counts], targets.reshape(-1)[counts]
        y = F.one_hot(y.long(), classes).float()
    if loss == "softmax":
        return F.cross_entropy(logits, y, label_smoothing=smoothing)
    y = (1 - smoothing) * y + smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, y, reduction="sum") / logits.shape[0]


def _first_array(batch: Any) -> Any:
    leaves = tree_leaves(batch, is_leaf=lambda x: isinstance(x, Mapping) and type(x) is not dict)
    for leaf in leaves:
        if isinstance(leaf, Mapping):
            leaf = _first_array(dict(leaf))
        if isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim:
            return leaf
    raise TypeError(f"batch must hold a tensor with rows, got {type(batch).__name__}")


def _int64(value: int, device: torch.device) -> Tensor:  # [1] int64
    return torch.full((1,), value - (1 << 64) if value >= 1 << 63 else value, device=device)
