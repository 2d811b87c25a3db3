# SPDX-License-Identifier: Apache-2.0
"""Icon-text pairs: read, rendered, kept, cut; and what is said when something is missing."""

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from activesel.loop import icon_packages, icon_render, icons
from activesel.loop.icon_packages import CLEAN, LOGO, NOISY, Icon
from activesel.loop.icon_render import Rendered

EMOJI = [
    {
        "label": "waving hand",
        "hexcode": "1F44B",
        "tags": ["hello"],
        "skins": [{"label": "waving hand: dark skin tone", "hexcode": "1F44B-1F3FF"}],
    },
    {"label": "piñata", "hexcode": "2764-FE0F", "tags": ["party"]},
]
LISTED = {  # set: licence, category
    "lucide": ("ISC", "UI 24px"),
    "tabler": ("MIT", "UI 24px"),
    "ph": ("MIT", "UI 24px"),
    "mdi": ("Apache-2.0", "Material"),
    "noto": ("Apache-2.0", "Emoji"),
    "fluent-emoji": ("MIT", None),
    "plain": ("MIT", "UI 24px"),
    "cib": ("CC0-1.0", "Logos"),
    "fa": ("OFL-1.1", "Archive"),
    "twemoji": ("CC-BY-4.0", "Emoji"),
}
NAMES = {
    "lucide": ["bell", "x"],
    "tabler": ["bell", "bell-filled", "brand-x", "untagged"],
    "ph": ["bell", "bell-thin", "x-logo"],
    "mdi": ["bell", "github"],
    "noto": ["waving-hand", "heart"],
    "fluent-emoji": ["waving-hand-dark", "unheard-of"],
    "plain": ["bell-20-filled", "shh"],
    "cib": ["acme"],
    "fa": ["bell"],
    "twemoji": ["bell"],
}
TEXTS = {
    "emojibase-data": {"en/data.json": EMOJI},
    "lucide-static": {"tags.json": {"bell": ["alarm", "ring"], "x": [], "gone": ["no"]}},
    "@tabler/icons": {
        "icons.json": {
            "bell": {"tags": ["alarm", 5], "category": "System"},
            "brand-x": {"tags": ["social"], "category": "Brand"},
        }
    },
    "@mdi/svg": {
        "meta.json": [
            {"name": "bell", "aliases": ["ringer"], "tags": ["Home Automation"]},
            {"name": "github", "aliases": [], "tags": ["Brand / Logo"]},
        ]
    },
    "@phosphor-icons/core": {
        "dist/icons.d.ts": """readonly [{
    readonly name: "bell"; readonly categories: readonly [IconCategory.SYSTEM];
    readonly tags: readonly ["*new*", "alarm"];
}, {
    readonly name: "x-logo"; readonly categories: readonly [IconCategory.BRAND];
    readonly tags: readonly ["twitter"];
}]"""
    },
}


def pack(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            text = (content if isinstance(content, str) else json.dumps(content)).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def drawing(number):
    """A picture of its own for every number below 2 ** 16: a grid of 4 x 4 cells."""
    cells = [bit for bit in range(16) if number >> bit & 1]
    return "".join(f'<path d="M{c % 4 * 6} {c // 4 * 6}h6v6h-6z"/>' for c in cells)


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Folder with six small packages, which become the expected ones; no cache, no npm."""
    numbers = iter(range(1, 1000))
    files = {}
    for prefix, names in NAMES.items():
        drawn = {name: {"body": drawing(next(numbers))} for name in names}
        files[f"json/{prefix}.json"] = {"prefix": prefix, "width": 24, "height": 24, "icons": drawn}
    files["json/plain.json"]["icons"]["shh"]["hidden"] = True
    files["json/noto.json"]["chars"] = {"1f44b": "waving-hand", "2764": "heart", "99": "none"}
    files["collections.json"] = {
        prefix: {"license": {"spdx": licence}, "category": category}
        for prefix, (licence, category) in LISTED.items()
    }
    folder, expected = tmp_path / "packages", {}
    folder.mkdir()
    for name, content in {"@iconify/json": files, **TEXTS}.items():
        path = folder / icon_packages.archive(name)
        pack(path, content)
        version = icon_packages.PACKAGES[name][0]
        expected[name] = (version, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(icon_packages, "PACKAGES", expected)
    monkeypatch.delenv("ACTIVESEL_ICONS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


@pytest.fixture
def cache(packages, tmp_path):
    """The cache folder, holding the packages."""
    shutil.copytree(packages, tmp_path / "cache" / "activesel" / "icons")
    return tmp_path / "cache" / "activesel" / "icons"


def test_tiers_labels_and_tags_come_from_the_curated_lists(packages):
    read = {(icon.set, icon.name): icon for icon in icon_packages.read(packages)}
    assert {prefix for prefix, _ in read} == set(LISTED) - {"fa", "twemoji"}
    assert ("plain", "shh") not in read, "hidden"
    told = {key: (icon.tier, icon.label, icon.tags, icon.concept) for key, icon in read.items()}
    assert told == {
        ("lucide", "bell"): (CLEAN, "bell", ["alarm", "ring"], "bell"),
        ("lucide", "x"): (CLEAN, "x", [], "x"),
        ("tabler", "bell"): (CLEAN, "bell", ["alarm", "5"], "bell"),
        ("tabler", "bell-filled"): (CLEAN, "bell filled", ["alarm", "5"], "bell"),
        ("tabler", "brand-x"): (LOGO, "brand x", [], "brand-x"),
        ("tabler", "untagged"): (NOISY, "untagged", [], "untagged"),
        ("ph", "bell"): (CLEAN, "bell", ["alarm"], "bell"),
        ("ph", "bell-thin"): (CLEAN, "bell thin", ["alarm"], "bell"),
        ("ph", "x-logo"): (LOGO, "x logo", [], "x-logo"),
        ("mdi", "bell"): (CLEAN, "bell", ["ringer", "Home Automation"], "bell"),
        ("mdi", "github"): (LOGO, "github", [], "github"),
        ("noto", "waving-hand"): (CLEAN, "waving hand", ["hello"], "waving hand"),
        ("noto", "heart"): (CLEAN, "piñata", ["party"], "piñata"),
        ("fluent-emoji", "waving-hand-dark"): (
            *(CLEAN, "waving hand: dark skin tone", ["hello"]),
            "waving hand",
        ),
        ("fluent-emoji", "unheard-of"): (NOISY, "unheard of", [], "unheard-of"),
        ("plain", "bell-20-filled"): (NOISY, "bell 20 filled", [], "bell-20-filled"),
        ("cib", "acme"): (LOGO, "acme", [], "acme"),
    }
    assert {icon.set for icon in read.values() if icon.emoji} == {"noto", "fluent-emoji"}
    some = icon_packages.read(packages, ["tabler", "noto"])
    assert some == [icon for key, icon in read.items() if key[0] in ("tabler", "noto")]
    with pytest.raises(ValueError, match="icon set is named fa, nowhere"):
        icon_packages.read(packages, ["noto", "nowhere", "fa"])


def test_pictures_are_centred_and_black_on_white():
    pytest.importorskip("resvg_py")
    wide = {"body": '<rect width="40" height="20" fill="currentColor"/>', "width": 40, "height": 20}
    shifted = {"body": '<rect x="-8" y="-8" width="8" height="16"/>', "left": -8, "top": -8}
    box = {"icons": {}, "width": 16}
    svgs = [icon_packages._icon("s", "n", body, box, {}, None).svg for body in (wide, shifted)]
    seen = []
    first, second = icon_render.render(svgs, lambda done, total: seen.append((done, total)))
    assert (
        (first[0, 8:24] == 0).all() and (first[0, :8] == 255).all() and (first[0, 24:] == 255).all()
    )
    assert (second[0, :, :16] == 0).all() and (second[0, :, 16:] == 255).all()
    assert seen == [(2, 2)]
    assert icon_render.render([]).shape == (0, 1, 32, 32)
    with pytest.raises(ValueError):
        icon_render.render(["no svg"])


@pytest.mark.slow
def test_processes_draw_the_same_in_the_same_order(monkeypatch):
    pytest.importorskip("resvg_py")
    svgs = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32" viewBox="0 0 24 24">'
        f"{drawing(number)}</svg>"
        for number in range(1, 60)
    ]
    expected = icon_render.render(svgs)
    monkeypatch.setattr(icon_render, "CHUNK", 7)
    monkeypatch.setattr(icon_render, "_cpus", lambda: 2)
    seen = []
    images = icon_render.render(svgs, lambda done, total: seen.append(done))
    assert (images == expected).all() and len({image.tobytes() for image in images}) == 59
    assert seen == [7, 14, 21, 28, 35, 42, 49, 56, 59]


def test_the_cache_is_made_once_and_serves_subsets(cache):
    pytest.importorskip("resvg_py")
    some = icon_render.load("some", ("tabler", "noto"))
    whole = icon_render.load("full", None)
    for name in icon_packages.PACKAGES:
        (cache / icon_packages.archive(name)).unlink()
    again = icon_render.load("full", None)
    assert torch.equal(again.images, whole.images) and again.icons == whole.icons
    assert len(whole.icons) == 17 and len({image.numpy().tobytes() for image in whole.images}) == 17
    (cache / "some.safetensors").unlink()
    cut = icon_render.load("some", ("tabler", "noto"))
    assert torch.equal(cut.images, some.images) and cut.icons == some.icons
    assert sorted(os.listdir(cache)) == ["full.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "pixel", "foreign", "versions"])
def test_a_damaged_or_foreign_cache_is_refused(cache, monkeypatch, damage):
    pytest.importorskip("resvg_py")
    icon_render.load("full", None)
    path = cache / "full.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "pixel":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        path.write_bytes(b"PK\3\4")
    else:
        sums = {name: ("0.0.1", found) for name, (_, found) in icon_packages.PACKAGES.items()}
        monkeypatch.setattr(icon_packages, "PACKAGES", sums)
    with pytest.raises(ValueError, match=r"full\.safetensors.*delete it"):
        icon_render.load("full", None)


def test_a_failure_leaves_no_part_of_a_cache(cache, monkeypatch):
    pytest.importorskip("resvg_py")
    before = sorted(os.listdir(cache))

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(icon_render.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        icon_render.load("full", None)
    assert sorted(os.listdir(cache)) == before


def npm(packages, tmp_path, body):
    """Put an npm on the path that has the packages."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{body}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


def test_packages_are_fetched_with_npm(packages, tmp_path):
    npm(packages, tmp_path, f'echo "$@" > {tmp_path}/asked; cp {packages}/*.tgz .')
    folder = icon_packages.locate()
    icon_packages.fetch(folder)
    assert sorted(os.listdir(folder)) == sorted(os.listdir(packages))
    assert "@iconify/json@2.2.535" in (tmp_path / "asked").read_text()


def test_a_wrong_package_is_refused(packages, tmp_path):
    npm(packages, tmp_path, f"cp {packages}/*.tgz . && echo x >> lucide-static-1.62.0.tgz")
    folder = icon_packages.locate()
    with pytest.raises(ValueError, match=r"lucide-static.*must have SHA-256"):
        icon_packages.fetch(folder)
    assert "lucide-static-1.62.0.tgz" not in os.listdir(folder)
    assert not [name for name in os.listdir(folder) if not name.endswith(".tgz")]


def test_nowhere_to_fetch_from_says_what_helps(packages, tmp_path, monkeypatch):
    folder = icon_packages.locate()
    with pytest.raises(
        FileNotFoundError, match=r"install npm.*npm pack @iconify.*ACTIVESEL_ICONS.*no npm"
    ):
        icon_packages.fetch(folder)
    assert not folder.exists()
    npm(packages, tmp_path, "echo E404 >&2; exit 1")
    with pytest.raises(FileNotFoundError, match="E404"):
        icon_packages.fetch(folder)
    assert os.listdir(folder) == []
    monkeypatch.setenv("ACTIVESEL_ICONS", str(packages))
    icon_packages.fetch(icon_packages.locate())


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
    rendered = collection(3000)
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
    clean = [len(icons.split(rendered, seed, MIX, 0.0).clean) for seed in range(20)]
    tier = sum(
        i.tier == CLEAN and icons.family(i.set) not in icons.TEST_FAMILIES for i in rendered.icons
    )
    assert sum(clean) / 20 / tier == pytest.approx(icons.REFERENCE, abs=0.03)


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
