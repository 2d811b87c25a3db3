# SPDX-License-Identifier: Apache-2.0
"""Icons and what people wrote about them: six npm packages, fetched once, read as they come."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

CLEAN, NOISY, LOGO = 0, 1, 2  # tiers

# name: version, SHA-256 of the archive. The packages themselves are MIT, ISC or Apache-2.0.
PACKAGES = {
    "@iconify/json": (
        "2.2.535",
        "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91",
    ),
    "emojibase-data": (
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "@tabler/icons": (
        "3.51.0",
        "b30108713d3fa60aee862c2a133225da8e0f309be0708fe2925763ff810c766c",
    ),
    "lucide-static": (
        "1.62.0",
        "386f9080c440d6f5049cefe3456ae8357f7a0c7f76e59670cd1cb83bc7050a44",
    ),
    "@mdi/svg": (
        "7.4.47",
        "de92e5dc9ce46c392ab5c53aa7190b19f82b40cb48872a083f788c7e13e91fef",
    ),
    "@phosphor-icons/core": (
        "2.1.1",
        "313332be6190b724da24107addd781799b48bf76b13963f24501112ffe1baadd",
    ),
}
# What may be used and passed on without conditions on the user's own work. Out are CC-BY (twemoji
# and Font Awesome, whose tag package is CC-BY too), CC-BY-SA (openmoji), non-commercial, GPL, MPL.
LICENCES = {"MIT", "Apache-2.0", "CC0-1.0", "ISC", "OFL-1.1", "BSD-3-Clause", "Unlicense"}
FONT_AWESOME = {"fa"}  # version 4 says OFL, but the drawings are those of the CC-BY versions
LOGO_CATEGORIES = {
    "Logos",
    "Programming",
}  # brands and products: the picture does not show the name
BY_CODE_POINT = ("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast")
BY_LABEL = ("fluent-emoji", "noto-v1")
WEIGHTS = ("", "-bold", "-fill", "-light", "-thin", "-duotone")  # of Phosphor


class Icon(NamedTuple):
    """One icon: where it comes from, how to draw it, what is written about it."""

    set: str
    name: str
    tier: int
    emoji: bool
    label: str  # the curated label, or the name
    tags: list[str]  # curated synonyms; [] outside the clean tier
    concept: str  # what variants in style, weight and skin tone have in common
    svg: str


class Text(NamedTuple):
    """What a curated list says about an icon."""

    label: str
    tags: list[str]
    concept: str
    brand: bool


def locate() -> Path:
    """Folder of packages and rendered pictures: $ACTIVESEL_ICONS, else in the user's cache."""
    given = os.environ.get("ACTIVESEL_ICONS")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(root) / "activesel" / "icons"


def archive(package: str) -> str:
    """File name that npm gives the package.

    >>> archive("@mdi/svg")
    'mdi-svg-7.4.47.tgz'
    """
    return f"{package.removeprefix('@').replace('/', '-')}-{PACKAGES[package][0]}.tgz"


def fetch(folder: Path) -> None:
    """Fetch the packages that `folder` lacks; each appears complete and checked, or not at all.

    Raises:
        FileNotFoundError: a package is missing and npm cannot fetch it; says what to do.
        ValueError: an archive has another SHA-256 than expected.
    """
    missing = [name for name in PACKAGES if not (folder / archive(name)).is_file()]
    if missing:
        wanted = [f"{name}@{PACKAGES[name][0]}" for name in missing]
        try:
            if not shutil.which("npm"):
                raise FileNotFoundError("no npm on this machine")
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                command = ["npm", "pack", "--loglevel=error", *wanted]
                subprocess.run(
                    command, cwd=temporary, check=True, capture_output=True, text=True, timeout=600
                )
                for name in missing:
                    _check(Path(temporary) / archive(name), name)
                    os.replace(Path(temporary) / archive(name), folder / archive(name))
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", "") or "").strip()[-300:]
            raise FileNotFoundError(
                f"the icon packages are not in {folder} and could not be fetched. Any one of these "
                f"helps: (1) install npm (Debian: apt-get install npm); (2) run `npm pack "
                f"{' '.join(wanted)}` elsewhere and copy the .tgz files into {folder}; (3) set "
                f"ACTIVESEL_ICONS to a folder with these files. Tried: {error} {said}"
            ) from error
    for name in PACKAGES:
        _check(folder / archive(name), name)


def _check(path: Path, package: str) -> None:
    expected = PACKAGES[package][1]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} must have SHA-256 {expected}, got {found}; delete it")


def read(folder: Path, sets: Collection[str] | None = None) -> list[Icon]:
    """Icons of the permissively licensed sets, or of those among `sets`, in a fixed order.

    Args:
        folder: holds the packages, see `fetch`.
        sets: prefixes of icon sets; None = all.

    Raises:
        ValueError: a set that is not there or not permissively licensed.
    """

    def wanted(path: str) -> bool:
        found = re.fullmatch(r"json/(.+)\.json", path)
        listed = found and (sets is None or found[1] in sets)
        return path == "collections.json" or bool(listed)

    files = _members(folder, "@iconify/json", wanted)
    collections = {
        prefix: entry
        for prefix, entry in files.pop("collections.json").items()
        if entry["license"].get("spdx") in LICENCES and prefix not in FONT_AWESOME
    }
    unknown = sorted(set(sets or ()) - set(collections))
    if unknown:
        raise ValueError(f"no permissively licensed icon set is named {', '.join(unknown)}")
    data = {v["prefix"]: v for v in files.values() if v["prefix"] in collections}
    texts = _curated(folder, data)
    return [
        _icon(prefix, name, entry, data[prefix], collections[prefix], texts.get((prefix, name)))
        for prefix in sorted(data)
        for name, entry in sorted(data[prefix]["icons"].items())
        if not entry.get("hidden")
    ]


def _icon(
    prefix: str,
    name: str,
    entry: dict[str, Any],
    defaults: dict[str, Any],
    collection: dict[str, Any],
    text: Text | None,
) -> Icon:
    def size(key: str, default: int) -> Any:
        return entry.get(key, defaults.get(key, default))

    box = (size("left", 0), size("top", 0), size("width", 16), size("height", 16))
    # Equal width and height here, whatever the box: the renderer then centres the drawing.
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'color="#000" width="32" height="32" viewBox="{" ".join(map(str, box))}">'
        f"{entry['body']}</svg>"
    )
    emoji = collection.get("category") == "Emoji" or "emoji" in prefix
    if text and not text.brand:
        return Icon(prefix, name, CLEAN, emoji, text.label, text.tags, text.concept, svg)
    logo = text is not None or collection.get("category") in LOGO_CATEGORIES
    return Icon(prefix, name, LOGO if logo else NOISY, emoji, spaced(name), [], name, svg)


def spaced(name: str) -> str:
    """A file name as words."""
    return name.replace("-", " ")


def _members(folder: Path, package: str, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The wanted files of a package, parsed if JSON, by their path in it."""
    found: dict[str, Any] = {}
    with tarfile.open(folder / archive(package)) as tar:
        for member in tar:
            name = member.name.removeprefix("package/")
            file = tar.extractfile(member) if wanted(name) else None
            if file:
                content = file.read().decode()
                found[name] = json.loads(content) if name.endswith(".json") else content
    return found


def _member(folder: Path, package: str, path: str) -> Any:
    return _members(folder, package, path.__eq__)[path]


def _curated(folder: Path, data: dict[str, Any]) -> dict[tuple[str, str], Text]:
    """Curated labels and tags by (set, name), for the sets in `data` that have them."""
    texts = _emoji(folder, data)

    def add(
        prefix: str, name: str, tags: list[str], brand: bool, variants: Collection[str]
    ) -> None:
        for variant in variants:
            full = name + variant
            if full in data[prefix]["icons"]:
                texts[prefix, full] = Text(spaced(full), tags, name, brand)

    if "lucide" in data:
        for name, tags in _member(folder, "lucide-static", "tags.json").items():
            add("lucide", name, tags, False, ("",))
    if "tabler" in data:
        for name, entry in _member(folder, "@tabler/icons", "icons.json").items():
            tags = [str(tag) for tag in entry["tags"]]
            add("tabler", name, tags, entry["category"] == "Brand", ("", "-filled"))
    if "mdi" in data:
        for entry in _member(folder, "@mdi/svg", "meta.json"):
            brand = "Brand / Logo" in entry["tags"]
            add("mdi", entry["name"], entry["aliases"] + entry["tags"], brand, ("",))
    if "ph" in data:
        source = _member(folder, "@phosphor-icons/core", "dist/icons.d.ts")
        pattern = (
            r'name: "([^"]+)";.*?categories: readonly \[([^\]]*)\].*?tags: readonly \[([^\]]*)\]'
        )
        for name, categories, listed in re.findall(pattern, source, re.DOTALL):
            tags = [tag for tag in re.findall(r'"([^"]+)"', listed) if "*" not in tag]
            add("ph", name, tags, "BRAND" in categories, WEIGHTS)
    return texts


def _emoji(folder: Path, data: dict[str, Any]) -> dict[tuple[str, str], Text]:
    """Unicode's labels and tags: by code point where the set lists these, else by equal label."""
    present = [prefix for prefix in (*BY_CODE_POINT, *BY_LABEL) if prefix in data]
    if not present:
        return {}
    by_code, by_label = {}, {}
    for entry in _member(folder, "emojibase-data", "en/data.json"):
        for variant in (entry, *entry.get("skins", ())):
            label = variant["label"]
            text = Text(label, entry.get("tags", []), label.split(":")[0], False)
            by_code[_code(variant["hexcode"])] = text
            by_label[re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")] = text
    texts = {}
    for prefix in present:
        if prefix in BY_CODE_POINT:
            pairs = ((name, by_code.get(_code(c))) for c, name in data[prefix]["chars"].items())
        else:
            names = data[prefix]["icons"]
            pairs = ((n, by_label.get(n) or by_label.get(f"{n}-skin-tone")) for n in names)
        texts.update({(prefix, name): text for name, text in pairs if text})
    return texts


def _code(hexcode: str) -> str:
    """Code points without the variation selector, which lists include or leave out."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")
