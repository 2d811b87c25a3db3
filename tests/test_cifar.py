# SPDX-License-Identifier: Apache-2.0
"""CIFAR's binary files: read back exactly, and refused by name when they cannot be right."""

import numpy as np
import pytest
import torch

from activesel.loop.cifar import LAYOUTS, cifar


def records(layout, rows, seed):
    """Bytes of `rows` images, and what they hold."""
    generator = np.random.default_rng(seed)
    labels = [generator.integers(0, n, rows) for n in layout.labels]
    labels[-1][: min(rows, layout.classes)] = np.arange(min(rows, layout.classes))
    pixels = generator.integers(0, 256, (rows, 3, 32, 32)).astype(np.uint8)
    columns = [column.astype(np.uint8)[:, None] for column in labels]
    content = np.concatenate([*columns, pixels.reshape(rows, -1)], axis=1)
    return content.tobytes(), pixels, labels[-1]


def write_folder(folder, name, rows):
    """A data set in its exact format; returns training and test images and labels."""
    layout = LAYOUTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for seed, file in enumerate((*layout.train, layout.test)):
        content, *held = records(layout, rows, seed)
        (folder / file).write_bytes(content)
        parts.append(held)
    images, labels = zip(*parts[:-1], strict=True)
    return np.concatenate(images), np.concatenate(labels), *parts[-1]


@pytest.mark.parametrize("name, classes, count", [("cifar-10", 10, 5), ("cifar-100", 100, 1)])
@pytest.mark.parametrize("below", [False, True])
def test_what_was_written_is_read(name, classes, count, below, tmp_path):
    folder = tmp_path / LAYOUTS[name].folder if below else tmp_path
    expected = write_folder(folder, name, rows=7)
    found = cifar(tmp_path)
    assert found.classes == classes and found.images.shape == (7 * count, 3, 32, 32)
    assert found.images.dtype == torch.uint8 and found.labels.dtype == torch.int64
    got = (found.images, found.labels, found.test_images, found.test_labels)
    for mine, theirs in zip(got, expected, strict=True):
        assert np.array_equal(mine.numpy(), theirs)


def test_red_comes_first_row_by_row(tmp_path):
    write_folder(tmp_path, "cifar-10", rows=1)
    pixel = np.arange(3072, dtype=np.int64) % 256
    (tmp_path / "test_batch.bin").write_bytes(bytes([9, *pixel.tolist()]))
    image = cifar(tmp_path).test_images[0]
    assert image[0, 0, :3].tolist() == [0, 1, 2] and image[0, 1, 0] == 32
    assert image[1].flatten()[0] == 1024 % 256 and cifar(tmp_path).test_labels.tolist() == [9]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "multiple of 3,073 bytes .*, got 0"),
        (bytes(3073 * 2 - 1), "multiple of 3,073 bytes .*, got 6,145"),
        (
            bytes(3073) + bytes([10]) + bytes(3072),
            r"labels in 0..9 at byte 0 .* got 10 in record 1",
        ),
    ],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    write_folder(tmp_path, "cifar-10", rows=2)
    (tmp_path / "data_batch_3.bin").write_bytes(content)
    with pytest.raises(ValueError, match=f"data_batch_3.bin must have .*{message}"):
        cifar(tmp_path)


def test_coarse_labels_are_checked_too(tmp_path):
    write_folder(tmp_path, "cifar-100", rows=2)
    (tmp_path / "train.bin").write_bytes(bytes([20, 99]) + bytes(3072))
    with pytest.raises(ValueError, match=r"train.bin must have labels in 0..19 .* got 20"):
        cifar(tmp_path)
    (tmp_path / "train.bin").write_bytes(bytes([19, 100]) + bytes(3072))
    with pytest.raises(ValueError, match=r"train.bin must have labels in 0..99 at byte 1 .* 100"):
        cifar(tmp_path)


def test_missing_and_ambiguous_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data_batch_1.bin.*binary version.*got neither"):
        cifar(tmp_path)
    write_folder(tmp_path, "cifar-10", rows=1)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(ValueError, match=r"all files of cifar-10, missing: data_batch_4.bin"):
        cifar(tmp_path)
    write_folder(tmp_path, "cifar-100", rows=1)
    with pytest.raises(ValueError, match="files of one data set"):
        cifar(tmp_path)
