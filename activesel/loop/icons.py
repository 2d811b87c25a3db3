# SPDX-License-Identifier: Apache-2.0
"""Icon-text pairs in three tiers of quality: a mixed pool, a small clean set, held-out families."""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from activesel.loop import icon_render
from activesel.loop.icon_packages import CLEAN, LOGO, NOISY, Icon

LENGTH = 10  # words per caption
TAGS = 3  # curated tags in a clean caption, at most
WORDS = 8_000  # vocabulary, at most
REFERENCE = 0.4  # share of the clean tier's concepts that the clean set gets
CONTRAST = 16  # between the darkest and the lightest pixel; below, a picture is blank
TIERS = {"clean": CLEAN, "noisy": NOISY, "logo": LOGO}

# Sets that share drawings are one family: those whose prefixes begin with the same word, and with
# these words. Who shares with the test families was seen from pictures that correlate above 0.97.
FAMILIES = {
    "lucide": ("feather", "keyline", "meteor", "vadivam"),
    "noto": ("unjs",),
    "material": ("ic", "mdi", "zmdi"),
    "bx": ("boxicons", "bxs", "bxl"),
    "uil": ("uim", "uis", "uit"),
    "ion": ("famicons",),
    "heroicons": ("sidekickicons",),
}
_FAMILY = {member: family for family, members in FAMILIES.items() for member in members}
TEST_FAMILIES = {"lucide", "noto"}  # one of line icons, one of emoji

SUBSETS = {
    "full": None,
    "demo": (
        *("noto", "fluent-emoji-flat", "fluent-emoji-high-contrast", "lucide", "tabler", "mdi"),
        *("ri", "carbon", "mingcute", "tdesign", "bi", "iconoir"),
        *("simple-icons", "logos", "token", "cib"),
    ),
    "tiny": ("lucide", "fluent-emoji-high-contrast", "iconoir", "cib"),
}


@dataclass(frozen=True)
class IconPairs:
    """Pictures of icons, their captions, and how good these are."""

    images: Tensor  # [N, 1, 32, 32] uint8, black on white
    tokens: Tensor  # [N, LENGTH] int64, 0 = padding, 1 = unknown word
    tier: Tensor  # [N] uint8: CLEAN, NOISY, LOGO
    captions: list[str]
    ids: Tensor  # [N] int64: 64-bit BLAKE2b of "set/name"
    sets: list[str]  # icon set of every row
    emoji: Tensor  # [N] bool

    def __len__(self) -> int:
        return len(self.captions)

    def rows(self, index: Tensor | Sequence[int]) -> IconPairs:
        """The rows of this index, an int64 or bool tensor or a list of row numbers."""
        index = torch.as_tensor(index)
        index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.long()
        order = index.tolist()
        return IconPairs(
            images=self.images[index],
            tokens=self.tokens[index],
            tier=self.tier[index],
            captions=[self.captions[row] for row in order],
            ids=self.ids[index],
            sets=[self.sets[row] for row in order],
            emoji=self.emoji[index],
        )

    @property
    def tiers(self) -> dict[str, int]:
        """Rows per tier."""
        return {name: int((self.tier == tier).sum()) for name, tier in TIERS.items()}

    @property
    def fingerprint(self) -> str:
        """Hex digest over ids, pixels and tokens."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.ids, self.images, self.tokens):
            digest.update(part.contiguous().numpy())  # type: ignore[arg-type]
        return digest.hexdigest()


@dataclass(frozen=True)
class IconSplit:
    """What one trains on, what the reference is trained on, what both are tested on."""

    pool: IconPairs  # the tiers, mixed
    clean: IconPairs  # clean tier; no concept of an icon-set family is on both sides
    test: IconPairs  # clean tier, one row per caption, of families in neither of the others
    words: list[str]  # vocabulary: token i + 2 is words[i]


def icons(
    seed: int = 0,
    mix: tuple[float, float, float] = (0.2, 0.5, 0.3),
    subset: str = "full",
    noise: float = 0.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> IconSplit:
    """Real image-text pairs: icons at 32 x 32 in grey, captions from curated tags or file names.

    Clean captions are a label and up to three curated tags, noisy ones the name of the file, and
    so are those of logos, whose names cannot be seen in the picture. Test captions are the label
    alone: with tags they would reward having trained on that style of caption rather than on what
    pictures show. Blank pictures are left out, and of identical ones all but the cleanest.
    Packages and pictures stay in $ACTIVESEL_ICONS or, without it, in the user's cache.

    Args:
        seed: which concepts the clean set gets, which rows the pool; which captions are wrong. The
            test rows never change.
        mix: shares of the clean, noisy and logo tiers in the pool, which has as many rows as the
            tiers allow; they sum to 1.
        subset: "full" (all permissively licensed sets), "demo" (16 sets) or "tiny" (4).
        noise: share in [0, 1] of the pool's noisy rows whose captions are shuffled among them.
        on_progress: called with the number of icons rendered and their total, where the cache
            lacks them.

    Raises:
        FileNotFoundError: the packages are missing and cannot be fetched; says what to do.
        RuntimeError: resvg-py or Pillow is not installed.
        ValueError: an argument out of range; a damaged package or cache.

    Source: Iconify (npm @iconify/json) and the tag files of Unicode CLDR (emojibase-data), Tabler,
        Lucide, Material Design Icons and Phosphor; every icon set under its own licence.

    >>> split = icons(subset="tiny")  # doctest: +SKIP
    >>> split.test.captions[:2]  # doctest: +SKIP
    ['a arrow down', 'a arrow up']
    """
    if not (len(mix) == 3 and min(mix) >= 0 and abs(sum(mix) - 1) <= 1e-6):
        raise ValueError(f"mix must be three shares that sum to 1, got {mix}")
    if subset not in SUBSETS:
        raise ValueError(f"subset must be one of {', '.join(SUBSETS)}, got {subset!r}")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be in [0, 1], got {noise}")
    return split(icon_render.load(subset, SUBSETS[subset], on_progress), seed, mix, noise)


def split(
    rendered: icon_render.Rendered,
    seed: int,
    mix: tuple[float, float, float],
    noise: float,
) -> IconSplit:
    """Cut rendered icons into pool, clean set and test rows, see `icons`."""
    kept, tested = _distinct(rendered)
    entries = [rendered.icons[row] for row in kept]
    tier = np.array([icon.tier for icon in entries], np.int64)
    share = np.array([_uniform(f"{seed}/{family(i.set)}/{i.concept}") for i in entries])
    reference = ~tested & (tier == CLEAN) & (share < REFERENCE)
    generator = np.random.default_rng(seed)
    rest = ~tested & ~reference
    tiers = [generator.permutation(np.flatnonzero(rest & (tier == t))) for t in TIERS.values()]
    total = min(int(len(rows) / part) for rows, part in zip(tiers, mix, strict=True) if part)
    counts = [round(total * part) for part in mix]
    pool = np.concatenate([rows[:count] for rows, count in zip(tiers, counts, strict=True)])

    captions = [caption(icon) for icon in entries]
    for row in np.flatnonzero(tested):
        captions[row] = entries[row].label
    wrong = tiers[NOISY][: counts[NOISY]]
    wrong = wrong[: round(noise * len(wrong))]  # in random order, so that a step is a shuffle
    for row, text in zip(wrong, [captions[row] for row in np.roll(wrong, 1)], strict=True):
        captions[row] = text
    words = vocabulary(captions[row] for row in (*pool, *np.flatnonzero(reference)))

    def pick(rows: np.ndarray[Any, np.dtype[np.int64]]) -> IconPairs:
        texts, chosen = [captions[row] for row in rows], [entries[row] for row in rows]
        return IconPairs(
            images=rendered.images[torch.from_numpy(kept[rows])],
            tokens=tokenize(texts, words),
            tier=torch.tensor([icon.tier for icon in chosen], dtype=torch.uint8),
            captions=texts,
            ids=torch.tensor([_id(icon) for icon in chosen], dtype=torch.int64),
            sets=[icon.set for icon in chosen],
            emoji=torch.tensor([icon.emoji for icon in chosen], dtype=torch.bool),
        )

    return IconSplit(
        pool=pick(np.sort(pool)),
        clean=pick(np.flatnonzero(reference)),
        test=pick(np.flatnonzero(tested)),
        words=words,
    )


def _distinct(
    rendered: icon_render.Rendered,
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Rows kept, no picture among them blank or there twice, and which of them are test rows."""
    pixels = rendered.images.flatten(1).numpy()
    blank = pixels.max(1).astype(np.int64) - pixels.min(1) < CONTRAST
    ranked: list[tuple[int, int]] = []
    for row, icon in enumerate(rendered.icons):
        if family(icon.set) not in TEST_FAMILIES:
            ranked.append((1 + icon.tier, row))
        elif icon.tier == CLEAN and "skin tone" not in icon.label and _words(icon.label):
            ranked.append((0, row))  # one skin tone is enough: in grey they hardly differ
    pictures: set[bytes] = set()
    labels: set[tuple[str, ...]] = set()
    kept: dict[int, bool] = {}
    for rank, row in sorted(ranked):
        picture = hashlib.blake2b(pixels[row], digest_size=16).digest()
        label = tuple(_words(rendered.icons[row].label))
        if blank[row] or picture in pictures or (rank == 0 and label in labels):
            continue
        pictures.add(picture)
        if rank == 0:
            labels.add(label)
        kept[row] = rank == 0
    rows = sorted(kept)
    return np.array(rows, np.int64), np.array([kept[row] for row in rows], np.bool_)


def family(prefix: str) -> str:
    """Family of an icon set: no family is on both sides of the test cut.

    >>> family("noto-v1"), family("feather"), family("carbon")
    ('noto', 'lucide', 'carbon')
    """
    first = prefix.split("-")[0]
    return _FAMILY.get(first, first)


def caption(icon: Icon) -> str:
    """Label and up to three of the curated tags that add a word, the same for ever for an icon.

    >>> caption(Icon("lucide", "x", CLEAN, False, "x", ["close", "X"], "x", ""))
    'x close'
    """
    if not icon.tags:
        return icon.label
    said, text = set(_words(icon.label)), icon.label
    left = TAGS
    for tag in random.Random(_id(icon)).sample(icon.tags, len(icon.tags)):
        new = _words(tag)
        if left and new and not said.issuperset(new):
            said.update(new)
            text, left = f"{text} {tag}", left - 1
    return text


def vocabulary(captions: Iterable[str]) -> list[str]:
    """Words that stand in at least two captions, most frequent first, at most 8,000.

    >>> vocabulary(["a red bell", "bell, red", "red"])
    ['red', 'bell']
    """
    count = Counter(word for caption in captions for word in set(_words(caption)))
    frequent = [word for word in count if count[word] > 1]
    return sorted(frequent, key=lambda word: (-count[word], word))[:WORDS]


def tokenize(
    captions: Sequence[str],
    words: Sequence[str],
) -> Tensor:  # [N, LENGTH] int64
    """Numbers of each caption's first words: 0 = padding, 1 = unknown, i + 2 = words[i].

    >>> tokenize(["Red bell"], ["red"])[0, :3].tolist()
    [2, 1, 0]
    """
    number = {word: i + 2 for i, word in enumerate(words)}
    tokens = np.zeros((len(captions), LENGTH), np.int64)
    for row, text in enumerate(captions):
        found = [number.get(word, 1) for word in _words(text)[:LENGTH]]
        tokens[row, : len(found)] = found
    return torch.from_numpy(tokens)


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.findall("[a-z]+", plain.lower())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _id(icon: Icon) -> int:
    return int.from_bytes(_hash(f"{icon.set}/{icon.name}"), "little", signed=True)


def _uniform(text: str) -> float:
    return int.from_bytes(_hash(text), "little") / 2**64
