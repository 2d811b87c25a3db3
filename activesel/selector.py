# SPDX-License-Identifier: Apache-2.0
"""`Selector`: selection with a memory, for training loops."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from activesel.batches import first_array, split_ids
from activesel.joint import joint_select
from activesel.losses import classification_loss, contrastive_loss
from activesel.operands import Forward, untouched
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

    Scorers with ``forward_pairs(images, texts) -> Pairs`` compare images with texts: their rows
    are chosen one by one by -scale z_i . t_i (ActiveCLIP, ActiveSigLIP), or together by the
    contrastive loss itself, ``chunks`` at a time (JEST).

    Args:
        online: scorer trained along (None for ``easy`` and ``uniform``); for ``rho_loss``, or
            without an ``optimizer``, possibly the learner itself.
        reference: scorer already trained, or trained beside (``train_reference``), or what it said
            of every row before, a `ReferenceCache`. Not needed for ``hard``, ``uniform``.
        keep: rows to keep of each super-batch. The batch it is given must have at least that many.
        method: score that decides. ``hard`` = l_online; ``easy`` = -l_reference; ``learnability``
            and ``rho_loss`` = l_online - l_reference, the latter always the k highest (temperature
            0); ``uniform`` runs no scorer.
        loss: "softmax" (default for classes), "sigmoid" (default for pairs), or a callable
            ``(model, batch) -> [B]`` losses that replaces ``inputs`` too. ``update`` trains the
            online scorer on it, and so it tells ActiveCLIP from ActiveSigLIP.
        chunks: of joint selection, pairs only; None chooses rows one by one, see `joint_select`.
        inputs: ``inputs(batch) -> (x, targets)`` or ``(images, texts)``; by default the batch's
            first two elements.
        optimizer: the online scorer's, used by ``update``.
        label_smoothing: of the targets ``update`` trains the online scorer on, in [0, 1]; scores
            and the reference are never smoothed. It keeps the online scorer less confident than
            the reference, so that wrong labels, which surprise both, score low.
        reference_optimizer: the reference's, used by ``update`` with ``train_reference``.
        train_reference: train the reference beside, on the whole super-batch (ClassAct-Online). The
            super-batch is kept until ``update``.
        temperature: >= 0, see `select`; may be reassigned at any time.
        seed: 64 bits; with the step, the whole state of the noise.
        id_key: entry of a dict batch (or position in a tuple) that is removed before the learner
            sees the rows; the ids of the rows kept are in ``kept_ids``. A `ReferenceCache` is asked
            by these ids.
        start, end: calls before ``start`` and from ``end`` on keep rows uniformly, without scoring.
        warmup: calls from ``start`` over which 1/T rises linearly to its value.

    Attributes:
        last: `Selection` of the last call, None before it or when nothing had to be chosen.

    Source: Evans et al. 2023 (arXiv:2312.05328), Evans et al. 2024 (arXiv:2406.17711), Mindermann
    et al. 2022 (arXiv:2206.07137).

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
        loss: Loss | Callable[[Any, Any], Tensor] | None = None,
        chunks: int | None = None,
        inputs: Callable[[Any], tuple[Any, Any]] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        label_smoothing: float = 0.0,
        reference_optimizer: torch.optim.Optimizer | None = None,
        train_reference: bool = False,
        temperature: float | Tensor = 1.0,
        seed: int = 0,
        id_key: str | int | None = None,
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
        used = [m for m, needed in zip((online, reference), NEEDS[method], strict=True) if needed]
        self._pairs = any(map(_compares, used)) and not callable(loss)
        if self._pairs and not all(map(_compares, used)):
            raise ValueError("online and reference must both have forward_pairs, got one that has")
        if chunks is not None and (callable(loss) or (used and not self._pairs)):
            raise ValueError(f"chunks must be None unless scorers have forward_pairs, got {chunks}")
        if chunks is not None and not 1 <= chunks <= keep:
            raise ValueError(f"chunks must be in [1, keep={keep}], got {chunks}")
        if _cached(reference) and id_key is None:
            raise ValueError("id_key must be given for a reference cache, got None")
        if _cached(online) or (_cached(reference) and train_reference):
            raise ValueError("a cache cannot be trained: it can be no model that learns")
        if loss is None:
            loss = "sigmoid" if self._pairs else "softmax"
        said = reference.loss if _cached(reference) else None  # None too for embeddings
        if said is not None and not callable(loss) and said != loss:
            raise ValueError(f"loss must be the reference cache's, {said!r}, got {loss!r}")
        if not callable(loss) and loss not in ("softmax", "sigmoid"):
            raise ValueError(f'loss must be "softmax", "sigmoid" or callable, got {loss!r}')
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        if (callable(loss) or self._pairs) and label_smoothing:
            raise ValueError(f"label_smoothing is for classes only, got {label_smoothing}")
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
        self.chunks = chunks
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
        batch, ids = split_ids(batch, self.id_key)
        rows, device = self._rows(batch)
        if rows < self.keep:
            raise ValueError(f"batch must have at least keep={self.keep} rows, got {rows}")
        if self._clock is None or self._clock[0].device != device:
            self._clock = _int64(self.seed, device), _int64(self.step, device)
        self._super_batch = batch if self.train_reference else None
        self.last = self._choose(batch, ids, rows) if rows > self.keep else None
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
            if self.last.batch_score is not None:
                out["batch_score"] = self.last.batch_score
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

    def _choose(self, batch: Any, ids: Any, rows: int) -> Selection:
        assert self._clock is not None
        seed, step = self._clock
        if not self._active():
            zeros = torch.zeros(rows, device=seed.device)
            return sample(zeros, self.keep, float("inf"), seed, step)
        ramp = (self.step - self.start + 1) / self.warmup if self.warmup else 1.0
        temperature = self.temperature / min(ramp, 1.0)
        x, targets = (None, None) if callable(self.loss) else self._inputs(batch)
        online, reference = (
            self._side(model, batch, x, targets, ids) if needed else None
            for model, needed in zip((self.online, self.reference), NEEDS[self.method], strict=True)
        )
        how: Any = "softmax" if callable(self.loss) else self.loss
        if self.chunks is not None:
            picked = joint_select(
                online=online, reference=reference, k=self.keep, chunks=self.chunks, loss=how,
                temperature=temperature, seed=seed, step=step,
            )  # fmt: skip
        else:
            given = [side for side in (online, reference) if side is not None]
            reduced = all(isinstance(side, Tensor) and side.ndim == 1 for side in given)
            picked = select(
                online=online, reference=reference, k=self.keep,
                targets=None if self._pairs or reduced else targets,
                loss="dot" if self._pairs else how, temperature=temperature, seed=seed, step=step,
            )  # fmt: skip
        self.examples_scored += rows
        return picked

    def _side(self, model: Any, batch: Any, x: Any, targets: Any, ids: Any) -> Any:
        """What one model has to say of a batch, as an operand of `select` or `joint_select`."""
        if _cached(model):
            again = model.miss == "compute" and not callable(self.loss)
            return model.lookup(ids, model.scoring(x, targets) if again else None)
        if callable(self.loss):
            with untouched(model):
                return self.loss(model, batch)
        if not self._pairs:
            return Forward(model, x)
        with untouched(model):
            return model.forward_pairs(x, targets)

    def _rows(self, batch: Any) -> tuple[int, torch.device]:
        """Rows and device of what is scored, or of the first array when nothing is."""
        if self.inputs is not None and self._active() and not callable(self.loss):
            leaf = first_array(self.inputs(batch)[1])
        else:
            leaf = first_array(batch)
        return leaf.shape[0], leaf.device if isinstance(leaf, Tensor) else torch.device("cpu")

    def _inputs(self, batch: Any) -> tuple[Any, Tensor]:
        return self.inputs(batch) if self.inputs else (batch[0], batch[1])

    def _train(self, model: Any, optimizer: Any, batch: Any, smoothing: float = 0.0) -> None:
        with torch.enable_grad():
            if callable(self.loss):
                loss = self.loss(model, batch).mean()
            else:
                x, y = self._inputs(batch)
                if self._pairs:
                    loss = contrastive_loss(model.forward_pairs(x, y), self.loss)
                else:
                    loss = classification_loss(model(x), y, self.loss, smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()


def _compares(model: Any) -> bool:
    """Whether a scorer, or a cache of what one said, is about pairs."""
    return callable(getattr(model, "forward_pairs", None)) or (
        _cached(model) and model.kind == "embeddings"
    )


def _cached(model: Any) -> bool:
    return callable(getattr(model, "lookup", None))


def _int64(value: int, device: torch.device) -> Tensor:  # [1] int64
    return torch.full((1,), value - (1 << 64) if value >= 1 << 63 else value, device=device)
