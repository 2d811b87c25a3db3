# SPDX-License-Identifier: Apache-2.0
"""Icon-text pairs: cut by family, tier and concept; captions and tokens."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel.loop import icon_packages, icons
from activesel.loop.icon_packages import CLEAN, LOGO, NOISY, Icon
from activesel.loop.icon_render import Rendered

FAMILIES = ["lucide", "noto-v1", "ph", "fluent-emoji", "plain", "keyline-icons", "cib"]


def collection(count, seed=0, distinct=True):
    """Random pictures; every seventh icon is of one family, tiers and concepts as they fall."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 32, 32), generator=generator, dtype=torch.uint8)
    if not distinct:
        images = images[torch.randint(count // 2, (count,), generator=generator)]
    tiers = torch.randint(3, (count,), generator=generator).tolist()
    letters = "abcdefghijklmnop"
    made = []
    for row, tier in enumerate(tiers):
        concept = f"{letters[row % 16]} {letters[row // 16 % 16]}{letters[row // 256 % 16]}"
        family = FAMILIES[row % len(FAMILIES)]
        tags = ["one", "two", "three", "four"] if tier == CLEAN else []
        label = f"{concept}: dark skin tone" if row % 5 == 0 else concept
        made.append(Icon(family, f"n{row}", tier, "noto" in family, label, tags, concept, ""))
    return Rendered(images, made)


MIX = (0.2, 0.5, 0.3)


def pictures(pairs):
    return {image.numpy().tobytes() for image in pairs.images}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_no_picture_family_or_concept_is_on_two_sides(seed, distinct):
    rendered = collection(600, seed % 7, distinct)
    split = icons.split(rendered, seed, MIX, 0.0)
    parts = (split.pool, split.clean, split.test)
    seen = [pictures(part) for part in parts]
    assert [len(s) for s in seen] == [len(part) for part in parts], "a picture twice"
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    assert len({i for part in parts for i in part.ids.tolist()}) == sum(map(len, parts))
    assert {icons.family(name) for name in split.test.sets} == {"lucide", "noto"}
    assert not {icons.family(n) for part in parts[:2] for n in part.sets} & {"lucide", "noto"}
    assert (split.clean.tier == CLEAN).all() and (split.test.tier == CLEAN).all()
    assert len(set(split.test.captions)) == len(split.test)
    assert not any("skin" in text or "two" in text for text in split.test.captions)
    by_id = {icons._id(icon): icon for icon in rendered.icons}
    concepts = [
        {(by_id[i].set, by_id[i].concept) for i in part.ids[part.tier == CLEAN].tolist()}
        for part in parts[:2]
    ]
    assert not concepts[0] & concepts[1]


def test_the_pool_has_the_mix_and_as_many_rows_as_the_tiers_allow():
    rendered = collection(1500)
    split = icons.split(rendered, 0, MIX, 0.0)
    n = len(split.pool)
    assert split.pool.tiers == {
        "clean": round(0.2 * n),
        "noisy": round(0.5 * n),
        "logo": round(0.3 * n),
    }
    noisy = sum(
        i.tier == NOISY and icons.family(i.set) not in icons.TEST_FAMILIES for i in rendered.icons
    )
    assert noisy - 1 <= split.pool.tiers["noisy"] <= noisy
    assert icons.split(rendered, 0, (0.0, 0.0, 1.0), 0.0).pool.tiers["noisy"] == 0
    clean = [len(icons.split(rendered, seed, MIX, 0.0).clean) for seed in range(10)]
    tier = sum(
        i.tier == CLEAN and icons.family(i.set) not in icons.TEST_FAMILIES for i in rendered.icons
    )
    assert sum(clean) / 10 / tier == pytest.approx(icons.REFERENCE, abs=0.05)


def test_the_seed_moves_pool_and_clean_set_but_not_the_test_rows():
    rendered = collection(600)
    first, again, other = (icons.split(rendered, seed, MIX, 0.0) for seed in (0, 0, 1))
    assert first.pool.fingerprint == again.pool.fingerprint != other.pool.fingerprint
    assert first.clean.fingerprint != other.clean.fingerprint
    assert torch.equal(first.test.ids, other.test.ids)
    assert first.test.captions == other.test.captions


def test_of_identical_pictures_the_cleanest_stays_and_blank_ones_go():
    rendered = collection(70)
    entries = [
        icon._replace(set="plain", label=f"w{chr(97 + row % 26)}")
        for row, icon in enumerate(rendered.icons)
    ]
    for row, tier in ((0, LOGO), (1, CLEAN), (2, NOISY), (3, NOISY), (4, NOISY), (5, CLEAN)):
        entries[row] = entries[row]._replace(tier=tier)
    entries[5] = entries[5]._replace(set="noto", label="five")
    rendered.images[:3] = rendered.images[0]
    rendered.images[3] = 250
    rendered.images[3, 0, 0, 0] = 255
    rendered.images[4] = rendered.images[5]
    kept, tested = icons._distinct(Rendered(rendered.images, entries))
    assert kept.tolist() == [1, *range(5, 70)], "test rows before clean, clean before noisy"
    assert kept[tested].tolist() == [5]


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_noise_shuffles_captions_within_the_noisy_tier(noise):
    rendered = collection(600)
    plain, noisy = (icons.split(rendered, 0, MIX, share) for share in (0.0, noise))
    assert torch.equal(plain.pool.ids, noisy.pool.ids)
    rows = torch.arange(len(plain.pool))
    moved = torch.tensor([plain.pool.captions[i] != noisy.pool.captions[i] for i in rows.tolist()])
    tier = plain.pool.tier
    assert not moved[tier != NOISY].any()
    expected = round(noise * int((tier == NOISY).sum()))
    assert expected - 2 <= moved.sum() <= expected  # a caption may come twice
    assert sorted(plain.pool.captions) == sorted(noisy.pool.captions)
    assert plain.clean.captions == noisy.clean.captions


TEXT = st.lists(st.sampled_from(["Red", "bell-2", "Piñata", "x", "a/b", "8"]), max_size=14).map(
    " ".join
)


@settings(deadline=None)
@given(st.lists(TEXT, max_size=8))
def test_tokens_number_the_words_that_come_twice(captions):
    words = icons.vocabulary(captions)
    spelled = [
        [
            w
            for t in text.split()
            for w in {"Red": "red", "bell-2": "bell", "Piñata": "pinata", "x": "x"}.get(
                t, "a b" if t == "a/b" else ""
            ).split()
        ]
        for text in captions
    ]
    counts = [sum(w in text for text in spelled) for w in words]
    assert all(c >= 2 for c in counts) and counts == sorted(counts, reverse=True)
    assert {w for text in spelled for w in text if sum(w in t for t in spelled) > 1} == set(words)
    tokens = icons.tokenize(captions, words)
    assert tokens.shape == (len(captions), icons.LENGTH) and tokens.dtype == torch.int64
    for row, text in zip(tokens.tolist(), spelled, strict=True):
        cut = text[: icons.LENGTH]
        assert row == [words.index(w) + 2 if w in words else 1 for w in cut] + [0] * (10 - len(cut))


def test_a_caption_is_the_label_and_three_tags_that_add_words():
    tags = ["ring", "Alarm", "alarm bell", "door-bell", "notify", "push"]
    made = [
        icons.caption(Icon("s", f"n{i}", CLEAN, False, "Bell", tags, "", "")) for i in range(40)
    ]
    for text in made:
        assert (
            text.startswith("Bell ") and sum(tag in text for tag in ("ring", "notify", "push")) <= 3
        )
        words = icons._words(text)
        assert 4 <= len(words) <= 7 and words.count("alarm") <= 1
    assert len(set(made)) > 10, "rows differ in their tags"
    assert made[0] == icons.caption(Icon("s", "n0", CLEAN, False, "Bell", tags, "", ""))


def test_rows_and_fingerprint():
    pool = icons.split(collection(600), 0, MIX, 0.0).pool
    some = pool.rows([3, 1])
    assert some.captions == [pool.captions[3], pool.captions[1]] and len(some) == 2
    assert some.sets == [pool.sets[3], pool.sets[1]] and torch.equal(some.ids, pool.ids[[3, 1]])
    emoji = pool.rows(pool.emoji | (pool.tier == LOGO))
    assert len(emoji) == int((pool.emoji | (pool.tier == LOGO)).sum())
    assert pool.rows(torch.arange(len(pool))).fingerprint == pool.fingerprint
    assert some.fingerprint != pool.rows([1, 3]).fingerprint
    for name in ("ids", "images", "tokens"):
        changed = pool.rows(range(len(pool)))
        getattr(changed, name).view(-1)[-1] ^= 1
        assert changed.fingerprint != pool.fingerprint


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mix": (0.5, 0.5)}, "mix must be three shares"),
        ({"mix": (0.5, 0.6, -0.1)}, "mix must be three shares"),
        ({"mix": (0.5, 0.6, 0.1)}, "mix must be three shares"),
        ({"mix": (float("nan"), 0.5, 0.5)}, "mix must be three shares"),
        ({"subset": "half"}, "subset must be one of full, demo, tiny"),
        ({"noise": 1.5}, "noise must be in"),
    ],
)
def test_bad_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        icons.icons(**wrong)


@pytest.mark.slow
def test_the_real_thing():
    pytest.importorskip("resvg_py")
    folder = icon_packages.locate()
    here = any((folder / f"{name}.safetensors").is_file() for name in ("tiny", "full"))
    if not (here or shutil.which("npm")):
        pytest.skip("no rendered icons here and no npm to fetch them with")
    split = icons.icons(subset="tiny")
    assert len(split.test) == 1780 and set(split.test.sets) == {"lucide"}
    assert split.pool.tiers == {"clean": 553, "noisy": 1383, "logo": 830}
    assert len(split.clean) == 641 and split.clean.emoji.all()
    assert "bell" in split.test.captions
    ink = (split.test.images.float() < 128).float().mean((1, 2, 3))
    assert 0.05 < float(ink.mean()) < 0.4, "line icons are mostly white"
