# SPDX-License-Identifier: Apache-2.0
"""Joint selection: what it computes, on every backend, and what it refuses."""

import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from embeddings import embed, single, tensors, two
from torch.utils.flop_counter import FlopCounterMode

from activesel import Pairs, joint_select, sample, select, spec, spec_joint

LOSSES = ["sigmoid", "softmax"]
KINDS = ["learnability", "hard", "easy"]


def truth(online, reference, k, chunks, loss, temperature=1.0, seed=0, step=0, normalize=False):
    """`spec_joint.dense` in float64: indices, scores, batch score."""
    return spec_joint.dense(
        tensors(online), tensors(reference), k, chunks, normalize, torch.tensor([seed]),
        torch.tensor([step]), torch.tensor([temperature]), 0, loss,
    )  # fmt: skip


def matrix(online, reference):
    return spec_joint.difference(spec_joint.pair_losses, tensors(online), tensors(reference))


# -------------------------------------------------------------------------------------- definition


@pytest.mark.parametrize("loss", LOSSES)
def test_the_definition_says_what_the_formula_says(loss):
    """One number at a time, as on paper: scores of the second of two chunks, and the batch's."""
    online, reference = two("learnability", rows=9, width=7)
    indices, scores, batch = truth(online, reference, 4, 2, loss, temperature=0.0)

    def x(model, i, j):
        bias = model.bias if loss == "sigmoid" else 0.0
        return model.scale * float(model.image[i] @ model.text[j]) + bias

    def one(model, chosen, i):
        if loss == "sigmoid":
            own = math.log1p(math.exp(-x(model, i, i)))
            others = (x(model, a, b) for j in chosen if j != i for a, b in ((i, j), (j, i)))
            return own + sum(math.log1p(math.exp(y)) for y in others)
        out = -x(model, i, i)
        if chosen:
            row = math.log(sum(math.exp(x(model, i, j)) for j in chosen))
            column = math.log(sum(math.exp(x(model, j, i)) for j in chosen))
            out += (row + column) / 2
        return out

    def score(chosen, i):
        return one(online, chosen, i) - one(reference, chosen, i)

    first = sorted(range(9), key=lambda i: -score([], i))[:2]
    rest = sorted(set(range(9)) - set(first), key=lambda i: -score(first, i))
    assert indices.tolist() == sorted(first + rest[:2])
    for i in range(9):
        assert scores[i].item() == pytest.approx(score([] if i in first else first, i))
    chosen = indices.tolist()
    if loss == "sigmoid":
        expected = sum(
            math.log1p(math.exp((-1 if i == j else 1) * x(m, i, j))) * sign
            for m, sign in ((online, 1), (reference, -1))
            for i in chosen
            for j in chosen
        )
    else:
        expected = sum(score(chosen, i) for i in chosen)  # a row is its own text's rival, too
    assert batch.item() == pytest.approx(expected)


def test_gains_add_up_to_the_batch_score():
    """Sigmoid: scores at the picks plus the pairs inside each chunk are the batch's learnability;
    one pick at a time there are no such pairs."""
    online, reference = two("learnability")
    s = matrix(online, reference)
    indices, scores, batch = truth(online, reference, 40, 40, "sigmoid")
    assert scores[indices].sum().item() == pytest.approx(batch.item(), rel=1e-12)
    indices, scores, batch = truth(online, reference, 40, 1, "sigmoid")
    inside = s[indices][:, indices].sum() - s.diag()[indices].sum()
    assert inside.abs() > 1e-3
    assert (scores[indices].sum() + inside).item() == pytest.approx(batch.item(), rel=1e-12)
    indices, scores, batch = truth(online, reference, 40, 5, "sigmoid")
    chunks = chunk_rows(online, reference, 40, 5)
    inside = sum(s[c][:, c].sum() - s.diag()[c].sum() for c in chunks)
    assert (scores[indices].sum() + inside).item() == pytest.approx(batch.item(), rel=1e-12)


def chunk_rows(online, reference, k, chunks):
    """Rows of each chunk, from the picks of ever more of them."""
    sizes = spec_joint.sizes(k, chunks)
    before, out = set(), []
    for c in range(1, chunks + 1):
        now = set(truth(online, reference, sum(sizes[:c]), c, "sigmoid")[0].tolist())
        out.append(torch.tensor(sorted(now - before)))
        before = now
    return out


def test_chunk_sizes_differ_by_at_most_one():
    assert spec_joint.sizes(10, 4) == [3, 3, 2, 2]
    assert spec_joint.sizes(16, 16) == [1] * 16 and spec_joint.sizes(5, 1) == [5]


# ---------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0, math.inf])
def test_streamed_is_dense(backend, loss, kind, temperature):
    online, reference = two(kind)
    for k, chunks in ((33, 1), (33, 4), (30, 30)) if backend != "triton" else ((33, 4),):
        indices, scores, batch = truth(online, reference, k, chunks, loss, temperature)
        picked = joint_select(
            online=single(online), reference=single(reference), k=k, chunks=chunks, loss=loss,
            temperature=temperature, seed=0, backend=backend,
        )  # fmt: skip
        assert torch.equal(picked.indices, indices)
        torch.testing.assert_close(picked.scores.double(), scores, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(picked.batch_score.double(), batch, rtol=1e-5, atol=1e-3)
        assert picked.flags == 0 and picked.indices.dtype == torch.int64


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_is_sample_bit_for_bit(backend, loss, kind):
    online, reference = map(single, two(kind))
    how = dict(temperature=0.7, seed=5, step=9, offset=3, backend=backend)
    picked = joint_select(online=online, reference=reference, k=20, chunks=1, loss=loss, **how)
    plain = sample(picked.scores, 20, **how)
    for name in ("indices", "keys", "threshold", "flags"):
        assert torch.equal(getattr(picked, name), getattr(plain, name)), name
    if backend == "torch":
        row_loss = {"sigmoid": "sigmoid", "softmax": "dot"}[loss]
        alone = select(online=online, reference=reference, k=20, loss=row_loss, **how)
        if loss == "softmax":  # whose scores leave the bias out, as they must
            plain = alone
        assert torch.equal(alone.indices, plain.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_embeddings_are_taken_as_they_are(backend, dtype):
    online, reference = embed(90, 32, dtype=dtype), embed(90, 32, 30.0, -8.0, dtype=dtype)
    exact = [Pairs(p.image.double(), p.text.double(), p.scale, p.bias) for p in (online, reference)]
    _, scores, batch = truth(*exact, 20, 4, "sigmoid", temperature=0.0)
    picked = joint_select(
        online=online, reference=reference, k=20, chunks=4, temperature=0.0, backend=backend
    )
    torch.testing.assert_close(picked.scores.double(), scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(picked.batch_score.double(), batch, rtol=1e-4, atol=1e-3)


def test_normalized_scores_are_means_of_their_terms(backend):
    online, reference = two("learnability")
    indices, scores, batch = truth(online, reference, 30, 3, "sigmoid", normalize=True)
    picked = joint_select(
        online=single(online), reference=single(reference), k=30, chunks=3, seed=0, normalize=True,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(picked.indices, indices)
    torch.testing.assert_close(picked.scores.double(), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(picked.batch_score.double(), batch, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_an_untrained_learner_at_scale_100(backend, loss):
    """Where raw scores overflow exp, keys in the log domain do not notice."""
    online = embed(200, 8, 100.0, 0.0)
    reference = Pairs(online.image, online.image, 100.0, 0.0)
    indices, scores, _ = truth(online, reference, 50, 10, loss, temperature=0.1)
    picked = joint_select(
        online=single(online), reference=single(reference), k=50, chunks=10, loss=loss, seed=0,
        temperature=0.1, backend=backend,
    )  # fmt: skip
    assert scores.abs().max() > 88  # exp(89) is infinite in float32
    assert picked.keys.isfinite().all() and picked.flags == 0
    assert torch.equal(picked.indices, indices)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_models_select_uniformly(host_backend, loss):
    model = single(embed(24, 8, 50.0))
    counts = torch.zeros(24)
    for seed in range(300):
        picked = joint_select(
            online=model, reference=model, k=6, chunks=3, loss=loss, seed=seed, backend=host_backend
        )
        assert picked.scores.abs().max() < 1e-3
        counts[picked.indices] += 1
    # Draws without replacement vary less than multinomial ones: a fair sampler is well below.
    assert scipy.stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_joint_is_not_independent_on_planted_clusters(backend):
    """Clusters of look-alikes: the online model confuses them, the reference does not. Rows of one
    cluster are worth more together, which independent scores cannot see."""
    clusters, each, width = 12, 10, 64
    centre = F.normalize(torch.randn(clusters, width), dim=1).repeat_interleave(each, 0)
    alone = F.normalize(torch.randn(clusters * each, width), dim=1)
    online = Pairs(centre, centre, 10.0, -5.0)
    reference = Pairs(alone, alone, 10.0, -5.0)
    picks = {
        chunks: joint_select(
            online=online, reference=reference, k=20, chunks=chunks, seed=3, backend=backend
        )
        for chunks in (1, 20)
    }
    assert not torch.equal(picks[1].indices, picks[20].indices)
    assert picks[20].batch_score > 3 * picks[1].batch_score
    touched = {c: (p.indices // each).unique().numel() for c, p in picks.items()}
    assert touched[20] < touched[1]


def test_a_matrix_of_losses_is_not_an_outer_difference():
    """Ports build S_ij = l_i - r_j from per-row losses; then nothing is joint."""
    s = matrix(*two("learnability", rows=20))
    assert torch.linalg.matrix_rank(s) > 2


# ---------------------------------------------------------------------------------------- bad rows


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_are_not_finite_are_left_out(backend, loss):
    online, reference = map(single, two("learnability", rows=60))
    clean = torch.ones(60, dtype=torch.bool)
    clean[[3, 17, 41]] = False
    online.image[3, 2] = torch.nan
    online.text[17] = torch.inf
    reference.text[41, 0] = -torch.inf
    how = dict(k=20, chunks=4, loss=loss, seed=0, temperature=0.0, backend=backend)
    picked = joint_select(online=online, reference=reference, **how)
    assert torch.equal(picked.scores.isnan(), ~clean)
    assert picked.flags == spec.NONFINITE_SCORE and clean[picked.indices].all()
    keep = [Pairs(p.image[clean], p.text[clean], p.scale, p.bias) for p in (online, reference)]
    without = joint_select(online=keep[0], reference=keep[1], **how)
    assert torch.equal(picked.indices, clean.nonzero().squeeze(1)[without.indices])
    torch.testing.assert_close(picked.batch_score, without.batch_score)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("chunks", [1, 5])
def test_too_few_rows_fill_up_lowest_first(backend, loss, chunks):
    online = single(embed(30, 8))
    online.image[5:25] = torch.nan
    picked = joint_select(online=online, k=15, chunks=chunks, loss=loss, seed=0, backend=backend)
    assert picked.flags == spec.NONFINITE_SCORE | spec.TOO_FEW_ROWS
    assert picked.indices.tolist() == [*range(10), *range(25, 30)]
    assert picked.batch_score.isfinite() and picked.threshold == -torch.inf


def test_all_rows_can_be_kept(backend):
    online, reference = two("learnability", rows=21)
    picked = joint_select(
        online=single(online), reference=single(reference), k=21, chunks=4, backend=backend
    )
    assert picked.indices.tolist() == list(range(21)) and picked.threshold == -torch.inf
    whole = matrix(online, reference).sum()
    torch.testing.assert_close(picked.batch_score.double(), whole, rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------------------------ house rules


def test_noise_depends_on_seed_step_and_offset(backend):
    online = single(embed(64, 8))

    def rows(**how):
        base = dict(seed=1, step=2, offset=0)
        picked = joint_select(online=online, k=16, chunks=4, backend=backend, **{**base, **how})
        return picked.indices.tolist()

    assert rows() == rows() == rows(seed=torch.tensor([1]), step=torch.tensor([2]))
    assert len({tuple(rows(**how)) for how in ({}, {"seed": 2}, {"step": 3}, {"offset": 64})}) == 4


def test_nothing_is_recorded_rounded_or_changed():
    online = single(embed(64, 16))
    kept = online.image.clone()
    image = online.image.requires_grad_()
    how = dict(k=16, chunks=4, seed=0)
    plain = joint_select(online=online, **how)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = joint_select(online=Pairs(image, *online[1:]), **how)
    assert torch.equal(plain.scores, auto.scores) and torch.equal(plain.indices, auto.indices)
    assert not auto.scores.requires_grad and torch.equal(image.detach(), kept)


def test_scale_and_bias_may_be_tensors():
    online = single(embed(32, 8))
    as_tensors = Pairs(*online[:2], torch.tensor(10.0, requires_grad=True), torch.tensor([-10.0]))
    a, b = (joint_select(online=p, k=8, chunks=2, seed=0) for p in (online, as_tensors))
    assert torch.equal(a.scores, b.scores)


def test_inclusion_probabilities_are_refused():
    picked = joint_select(online=single(embed(8, 4)), k=2, chunks=1)
    for method in (picked.weights, picked.log_inclusion):
        with pytest.raises(ValueError, match="joint selection"):
            method()


@pytest.mark.parametrize("loss", LOSSES)
def test_operator_keeps_torchs_rules(loss):
    on, ref = (tensors(single(embed(20, 8))) for _ in range(2))
    one = torch.tensor([1])
    arguments = (on, ref, 6, 2, False, one, one, torch.ones(1), 0, loss, "auto")
    torch.library.opcheck(torch.ops.activesel.joint_select, arguments)


def test_compiles_to_one_graph():
    online, reference = map(single, two("learnability", rows=40))

    def step(image, seed):
        picked = joint_select(
            online=Pairs(image, *online[1:]), reference=reference, k=8, chunks=2, seed=seed
        )
        return picked.indices, picked.batch_score

    seed = torch.tensor([3])
    expected = step(online.image, seed)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for got, want in zip(compiled(online.image, seed), expected, strict=True):
        assert torch.equal(got, want)


def test_flops_are_counted():
    online, reference = map(single, two("learnability", rows=50, width=16))
    with FlopCounterMode(display=False) as counter:
        joint_select(online=online, reference=reference, k=11, chunks=4)
    added = 50 * (3 + 3 + 3) + 11 * 2  # rows times chunk, the last chunk against the chosen alone
    assert counter.get_total_flops() == 4 * added * (16 + 11)
