# SPDX-License-Identifier: Apache-2.0
"""Icons: fetched, read, rendered, kept; and what is said when something is missing or damaged."""

import hashlib
import io
import json
import os
import shutil
import stat
import tarfile

import pytest
import torch

from activesel.loop import icon_packages, icon_render
from activesel.loop.icon_packages import CLEAN, LOGO, NOISY

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


@pytest.mark.parametrize("damage", ["truncated", "pixel", "foreign", "versions", "sets"])
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
    elif damage == "sets":
        with pytest.raises(ValueError, match=r"full\.safetensors.*delete it"):
            icon_render.load("full", ("noto",))
        return
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
