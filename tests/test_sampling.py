# SPDX-License-Identifier: Apache-2.0
"""Draws against exact Plackett-Luce values; wrong samplers and weights that must be caught."""

import math

import pytest
import torch

import activesel
from activesel import spec
from activesel.testing import (
    assert_plackett_luce,
    draw_probabilities,
    inclusion_probabilities,
)

SCORES = torch.tensor([0.3, -1.2, 2.0, 0.0, 0.9, -0.4])
DRAWS = {"torch": 1500, "native": 6000}  # the specification is slow
INF, NAN = math.inf, math.nan


# ---------------------------------------------------------------------------------- exact values


def test_exact_values_agree_with_each_other():
    p = draw_probabilities(SCORES, 3, temperature=0.7)
    assert math.isclose(sum(p.values()), 1.0)
    inclusion = torch.zeros(6, dtype=torch.float64)
    for draw, probability in p.items():
        inclusion[list(draw)] += probability
    assert torch.allclose(inclusion, inclusion_probabilities(SCORES, 3, temperature=0.7))


def test_exact_values_of_equal_scores():
    assert torch.allclose(
        inclusion_probabilities(torch.zeros(5), 2), torch.full((5,), 0.4, dtype=torch.float64)
    )
    assert set(draw_probabilities(torch.zeros(4), 2).values()) == {1 / 12}


# ----------------------------------------------------------------------------- the true samplers


@pytest.mark.parametrize(("k", "temperature"), [(1, 1.0), (3, 1.0), (3, 0.5), (5, 2.0), (6, 1.0)])
def test_sample_is_plackett_luce(host_backend, k, temperature):
    def sampler(scores, k, draw):
        return activesel.sample(scores, k, temperature, seed=7, step=draw, backend=host_backend)

    assert_plackett_luce(sampler, SCORES, k, temperature=temperature, draws=DRAWS[host_backend])


def test_seeds_and_offsets_are_as_good_as_steps(host_backend):
    def by_seed(scores, k, draw):
        return activesel.sample(scores, k, seed=draw, backend=host_backend)

    def by_offset(scores, k, draw):
        return activesel.sample(scores, k, seed=0, offset=draw * 6, backend=host_backend)

    assert_plackett_luce(by_seed, SCORES, 3, draws=DRAWS[host_backend])
    assert_plackett_luce(by_offset, SCORES, 3, draws=DRAWS[host_backend])


def test_infinite_temperature_is_uniform(host_backend):
    def sampler(scores, k, draw):
        return activesel.sample(SCORES, k, INF, seed=0, step=draw, backend=host_backend)

    assert_plackett_luce(sampler, torch.zeros(6), 3, draws=DRAWS[host_backend])


def test_many_draws_at_once(host_module):
    """The noise alone, as [N, 6]: enough draws to see errors of a few tenths of a percent."""
    n = 1 << 18
    g = host_module.noise(n * 6, torch.tensor([3]), torch.tensor([1])).view(n, 6)
    kept = (SCORES + g).topk(3, dim=1).indices
    counts = torch.bincount(kept.flatten(), minlength=6)
    p = inclusion_probabilities(SCORES, 3)
    assert ((counts - n * p) / (n * p * (1 - p)).sqrt()).abs().max() < 4.5
    code = (kept * torch.tensor([36, 6, 1])).sum(1)
    seen = torch.bincount(code, minlength=216)
    expected = torch.zeros(216, dtype=torch.float64)
    for (a, b, c), q in draw_probabilities(SCORES, 3).items():
        expected[36 * a + 6 * b + c] = n * q
    possible = expected > 0
    assert seen[~possible].sum() == 0
    chi2 = ((seen - expected) ** 2 / expected)[possible].sum()
    assert abs(chi2 - 119) < 5 * math.sqrt(2 * 119)


# --------------------------------------------------------------------------------- wrong samplers


def generator(draw):
    return torch.Generator().manual_seed(draw)


def with_replacement(scores, k, draw):
    return torch.multinomial(scores.softmax(0), k, replacement=True, generator=generator(draw))


def forgets_the_scores(scores, k, draw):
    return torch.randperm(len(scores), generator=generator(draw))[:k]


def wrong_temperature(scores, k, draw):
    return activesel.sample(scores, k, temperature=1.2, seed=0, step=draw)


def normal_noise(scores, k, draw):  # right shape of race, wrong noise of the same variance
    noise = torch.randn(len(scores), generator=generator(draw)) * math.pi / math.sqrt(6)
    return (scores + noise).topk(k).indices


def right_sets_wrong_order(scores, k, draw):
    return activesel.sample(scores, k, seed=0, step=draw).indices


def first_right_then_uniform(scores, k, draw):
    first = activesel.sample(scores, 1, seed=0, step=draw).indices.item()
    rest = torch.randperm(len(scores), generator=generator(draw)).tolist()
    return [first, *[i for i in rest if i != first][: k - 1]]


WRONG = [
    with_replacement, forgets_the_scores, wrong_temperature, normal_noise,
    right_sets_wrong_order, first_right_then_uniform,
]  # fmt: skip


@pytest.mark.parametrize("sampler", WRONG)
def test_wrong_samplers_are_caught(sampler):
    with pytest.raises(AssertionError):
        assert_plackett_luce(sampler, SCORES, 3)


def test_multinomial_without_replacement_is_accepted():
    def sampler(scores, k, draw):
        return torch.multinomial(scores.softmax(0), k, generator=generator(draw))

    assert_plackett_luce(sampler, SCORES, 3)


def test_unordered_samplers_are_tested_as_sets():
    assert_plackett_luce(right_sets_wrong_order, SCORES, 3, ordered=False)
    with pytest.raises(AssertionError):
        assert_plackett_luce(first_right_then_uniform, SCORES, 3, ordered=False)


# ------------------------------------------------------------------------------- the upper tail


def assert_exact_tail(gumbel):
    """Of all 2^32 words, 2^32 (1 - exp(-exp(-x))) exceed x; g falls with the word, so bisect."""
    for x in [-3.0, -1.0, 0.0, 5.0, 10.0, 14.0, 16.0, 16.7, 17.0, 18.0, 20.0, 22.0, 22.8]:
        low, high = 0, 1 << 32  # words below `low` exceed x, words from `high` on do not
        while low < high:
            middle = (low + high) // 2
            if gumbel(torch.tensor([middle])) > x:
                low = middle + 1
            else:
                high = middle
        expected = -math.expm1(-math.exp(-x)) * 2.0**32
        # A word either way, and the logarithm's own few ulps.
        assert abs(low - expected) <= 1 + 4e-6 * expected, f"{low} words above {x}: {expected}"


def gumbel_of_24_bits(r):
    u = ((r >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log1p(-u))


def gumbel_of_rounded_uniforms(r):  # 32 bits, but u itself is rounded to fp32 near 1
    u = (MAX - r).float() * 2.0**-32
    return -torch.log(-torch.log(u.clamp(1e-10, 1 - 2.0**-24)))


MAX = 0xFFFFFFFF


def test_upper_tail_is_exact():
    assert_exact_tail(spec.gumbel)


@pytest.mark.parametrize("gumbel", [gumbel_of_24_bits, gumbel_of_rounded_uniforms])
def test_truncated_tails_are_caught(gumbel):
    with pytest.raises(AssertionError, match="words above"):
        assert_exact_tail(gumbel)


def test_largest_of_many_follows_the_tail(host_module):
    """max of 2^18 Gumbels minus log(2^18) is Gumbel again; 24-bit uniforms end at 16.6."""
    from scipy import stats

    n, step = 1 << 18, torch.arange(100)
    largest = [
        host_module.noise(n, torch.tensor([1]), step[i : i + 1]).max().item() for i in range(100)
    ]
    shifted = [g - math.log(n) for g in largest]
    assert stats.kstest(shifted, "gumbel_r").pvalue > 1e-3
    assert max(largest) > 16.7


# --------------------------------------------------------------------------------------- weights


def z_of_weighted_mean(weights, temperature=1.0, draws=3000):
    """How many standard errors the mean of sum(w * loss) is from the super-batch mean."""
    scores = torch.linspace(-2, 2, 24)
    loss = scores.exp() + 1  # correlated with the score, as losses are
    estimates = []
    for i in range(draws):
        picked = activesel.sample(scores, 8, temperature, seed=11, step=i)
        estimates.append((weights(picked) * loss[picked.indices]).sum().item())
    estimates = torch.tensor(estimates, dtype=torch.float64)
    return (estimates.mean() - loss.double().mean()) / (estimates.std() / math.sqrt(draws))


@pytest.mark.parametrize("temperature", [0.7, 1.0, INF])
def test_weights_are_unbiased(temperature):
    assert abs(z_of_weighted_mean(lambda picked: picked.weights(), temperature)) < 3.5


def with_replacement_weights(picked):  # 1 / (N p), averaged over k
    p = picked.scores.softmax(0)[picked.indices]
    return 1 / (len(picked.scores) * p * len(p))


def self_normalised_weights(picked):
    w = 1 / picked.scores.softmax(0)[picked.indices]
    return w / w.sum()


def plain_mean(picked):
    return torch.full((len(picked.indices),), 1 / len(picked.indices))


@pytest.mark.parametrize("weights", [with_replacement_weights, self_normalised_weights, plain_mean])
def test_wrong_weights_are_caught(weights):
    assert abs(z_of_weighted_mean(weights)) > 6


def test_inclusion_is_the_chance_to_beat_the_threshold():
    picked = activesel.sample(SCORES, 3, 0.5, seed=0)
    above = picked.threshold.double() - SCORES.double()[picked.indices] / 0.5
    assert torch.allclose(picked.log_inclusion().exp().double(), -(-(-above).exp()).expm1())
    assert torch.allclose(picked.weights() * 6 * picked.log_inclusion().exp(), torch.ones(3))


@pytest.mark.parametrize("temperature", [1.0, INF])
def test_weights_at_k_equal_to_b_are_those_of_a_mean(temperature):
    scores = torch.tensor([1.0, -5.0, INF, -INF])
    picked = activesel.sample(scores, 4, temperature, seed=0)
    assert picked.weights().tolist() == [0.25] * 4


def test_weights_of_infinite_scores_are_numbers():
    """A row that is certainly kept (+inf) counts once; none of the kept rows may poison the sum."""
    picked = activesel.sample(torch.tensor([INF, 0.0, 1.0, 2.0]), 2, seed=0)
    assert picked.weights()[0] == 0.25 and picked.weights().isfinite().all()


def test_weights_of_rows_that_filled_up_are_zero():
    picked = activesel.sample(torch.tensor([NAN, 0.0, NAN]), 2, seed=0)
    assert picked.indices.tolist() == [0, 1]
    assert torch.equal(picked.weights(), torch.tensor([0.0, 1 / 3]))


@pytest.mark.parametrize("temperature", [0.0, torch.tensor([0.0])])
def test_weights_need_a_temperature(temperature):
    picked = activesel.sample(SCORES, 2, temperature, seed=0)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        picked.weights()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        picked.log_inclusion()


def test_weights_of_joint_selection_are_refused():
    from dataclasses import replace

    picked = replace(activesel.sample(SCORES, 2, seed=0), batch_score=torch.tensor(0.0))
    with pytest.raises(ValueError, match="joint"):
        picked.weights()


# -------------------------------------------------------------------------------- noise by place


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 37])
def test_shards_draw_the_keys_of_the_whole(backend, cut):
    scores = torch.randn(100)
    base = 2**33 + 1
    whole = activesel.sample(scores, 0, seed=5, step=9, offset=base, backend=backend).keys
    left = activesel.sample(scores[:cut], 0, seed=5, step=9, offset=base, backend=backend).keys
    right = activesel.sample(
        scores[cut:], 0, seed=5, step=9, offset=base + cut, backend=backend
    ).keys
    assert torch.equal(whole, torch.cat([left, right]))


def test_seed_none_obeys_torch_and_never_repeats():
    first, second = (activesel.sample(SCORES, 0).keys for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(activesel.sample(SCORES, 0).keys, first)


def test_noise_differs_by_step_seed_and_high_seed_bits(backend):
    keys = [
        tuple(activesel.sample(SCORES, 0, seed=s, step=t, backend=backend).keys.tolist())
        for s, t in [(0, 0), (0, 1), (1, 0), (1 << 32, 0), (1 << 63, 0), (-1, 0), (0, 2**32 - 1)]
    ]
    assert len(set(keys)) == len(keys)


def test_ints_and_tensors_mean_the_same(backend):
    for seed in (0, 5, -3, (1 << 64) - 3, 1 << 63):
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        a = activesel.sample(SCORES, 2, 0.3, seed=seed, step=7, backend=backend)
        b = activesel.sample(
            SCORES, 2, torch.tensor([0.3]), seed=torch.tensor([signed]),
            step=torch.tensor(7), backend=backend,
        )  # fmt: skip
        assert torch.equal(a.keys, b.keys) and torch.equal(a.indices, b.indices)
    assert torch.equal(
        activesel.sample(SCORES, 0, seed=-3).keys, activesel.sample(SCORES, 0, seed=2**64 - 3).keys
    )
