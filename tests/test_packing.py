# SPDX-License-Identifier: Apache-2.0
"""Packed weights: every number where the kernel looks for it, zeros around, and always today's."""

import math

import pytest
import torch
from test_spec_scorer import FAMILIES, build, pictures
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from activesel import spec_scorer
from activesel.models import load, save
from activesel.packing import BAD_WEIGHT, FP8, Packed, Shape

SMALL = (48, 2, 2, 12, 3, 2, "class")  # padded: 48 to 64, heads of 24 to 32, 18 pixels to 32


def pair(*family):
    return [build(*family, seed=seed) for seed in (1, 2)]


def parts(models):
    return [model.parts() for model in models]


def padded(x, *shape):
    """`x` in the corner of zeros."""
    out = torch.zeros(shape, dtype=x.dtype)
    out[tuple(slice(n) for n in x.shape)] = x
    return out


def expected(model, shape, channels_last=False):
    """The buffers of one side by the letter of `Packed`, number by number where it matters."""
    s, c = shape, model.config
    heads, hd = c.heads, c.width // c.heads

    def by_head(x):  # [D, n] -> [AP, n]
        out = torch.zeros(s.AP, *x.shape[1:])
        for head in range(heads):
            out[head * s.HD : head * s.HD + hd] = x[head * hd : (head + 1) * hd]
        return out

    mean, std = model.mean.view(-1, 1, 1), model.std.view(-1, 1, 1)
    patch = model.patch.weight.view(c.width, c.channels, c.patch, c.patch).double()
    bias = (patch * (128 / 255 - mean) / std).flatten(1).sum(1) + model.patch.bias
    patch = patch * (std.flatten()[0] / std)
    patch = patch.permute(0, 2, 3, 1) if channels_last else patch
    rows = model.position[0].double().clone()
    rows[c.pool == "class" :] += bias
    if c.pool == "class":
        rows[0] += model.token[0, 0]
    weights, vectors = [], []
    for b in model.blocks:
        qkv = [padded(by_head(w), s.AP, s.DP) for w in b.qkv.weight.chunk(3)]
        out = padded(by_head(b.out.weight.T).T, s.DP, s.AP)
        up, down = padded(b.up.weight, s.HP, s.DP), padded(b.down.weight, s.DP, s.HP)
        weights.append(torch.cat([m.flatten() for m in (*qkv, out, up, down)]))
        pieces = [padded(v, s.DP) for v in (b.norm1.weight, b.norm1.bias)]
        pieces += [by_head(v) for v in b.qkv.bias.chunk(3)] + [padded(b.out.bias, s.DP)]
        pieces += [padded(v, s.DP) for v in (b.norm2.weight, b.norm2.bias)]
        vectors.append(torch.cat([*pieces, padded(b.up.bias, s.HP), padded(b.down.bias, s.DP)]))
    return {
        "patch": padded(patch.flatten(1), s.DP, s.KP).half(),
        "weights": torch.stack(weights).half(),
        "rows": padded(rows, s.tokens, s.DP).float(),
        "vectors": torch.stack(vectors),
        "norm": padded(torch.stack([model.norm.weight, model.norm.bias]), 2, s.DP),
        "head": padded(model.head.weight, c.classes, s.DP).half(),
        "head_bias": model.head.bias,
        "units": 64 / 255 / std.flatten()[0],
    }


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, SMALL], ids=str)
@torch.no_grad()
def test_every_number_is_where_the_kernel_looks_for_it(family, channels_last):
    models = pair(*family)
    packed = Packed.of(parts(models), channels_last=channels_last)
    packed.check()
    for side, model in enumerate(models):
        for name, value in expected(model, packed.shape, channels_last).items():
            found = getattr(packed, name)[side]
            assert found.is_contiguous(), name
            assert found.data_ptr() % 16 == 0 or name in ("head_bias", "units"), name
            if name in ("patch", "rows", "units"):  # computed: a last bit may differ
                torch.testing.assert_close(found, value)
                assert torch.equal(found == 0, value == 0), name
            else:
                assert torch.equal(found, value), name


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, SMALL], ids=str)
@torch.no_grad()
def test_unpacked_is_the_rounded_model(family, fp8):
    """The same features as with rounded matrices, whatever patches, bias and token became."""
    models = pair(*family)
    images = pictures(models[0])
    packed = Packed.of(parts(models), fp8=fp8)
    for side, model in enumerate(models):
        model.double()
        ratio = model.std.flatten()[0] / model.std.flatten()
        ratio = ratio.repeat_interleave(model.config.patch**2)
        columns = model.patch.weight
        found = packed.parts(side, torch.float64)
        left = columns - columns.mul(ratio).float().half().double() / ratio
        shift = (128 / 255 - model.mean.flatten()) / model.std.flatten()
        left = left @ shift.repeat_interleave(model.config.patch**2)  # the offset is not rounded
        model.patch.bias += left
        columns.copy_(columns.mul(ratio).float().half().double() / ratio)
        for layer, block in enumerate(model.blocks):
            for i, name in enumerate(("qkv", "out", "up", "down")):
                weight, scale = getattr(block, name).weight, packed.scales[side, layer, i].item()
                assert math.frexp(scale)[0] == 0.5 if fp8 else scale == 1
                if fp8:
                    assert 224 < weight.abs().max() / scale <= 448
                as_held = (weight / scale).to(FP8) if fp8 else weight.half()
                weight.copy_(as_held.double() * scale)
                assert torch.equal(getattr(found.blocks[layer], name).weight, weight)
        model.head.weight.copy_(model.head.weight.half())
        assert torch.equal(found.head.weight, model.head.weight)
        features = spec_scorer.features(found, images)
        torch.testing.assert_close(features, model.forward_features(images), rtol=0, atol=2e-5)


def test_views_keep_their_patches():
    models = [m.at(4, drop=0.4, seed=3) for m in pair(32, 1, 2, 16, 8, 3, "mean")]
    packed = Packed.of(parts(models))
    assert packed.shape.kept and packed.shape.patch_size == 4
    assert torch.equal(packed.kept, models[0]._view.kept.int())
    assert packed.kept.dtype == torch.int32
    images = pictures(models[0])
    found = spec_scorer.features(packed.parts(1), images)
    torch.testing.assert_close(found, models[1].forward_features(images), rtol=0, atol=5e-3)
    other = models[0].at(4, drop=0.4, seed=4)
    with pytest.raises(ValueError, match="same patches"):
        packed.refresh(parts([models[0], other]))


def change_in_place(model):
    with torch.no_grad():
        model.blocks[1].qkv.weight.mul_(1.5)
        model.blocks[0].up.bias.add_(1)


def change_data(model):
    model.blocks[1].down.weight.data[3] = 7.0
    model.patch.weight.data.mul_(-1)


def replace_data(model):
    model.head.weight.data = torch.randn_like(model.head.weight)
    model.blocks[0].norm2.weight.data = torch.randn_like(model.norm.weight)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("change", [change_in_place, change_data, replace_data])
def test_refresh_follows_every_way_of_changing_weights(change, fp8):
    models = pair(*SMALL)
    packed = Packed.of(parts(models), fp8=fp8)
    before = {name: t.clone() for name, t in packed._state().items()}
    addresses = {name: t.data_ptr() for name, t in packed._state().items()}
    change(models[1])
    packed.refresh(parts(models))
    after, fresh = packed._state(), Packed.of(parts(models), fp8=fp8)._state()
    for name, t in after.items():
        assert torch.equal(t.float(), fresh[name].float()), name
        assert t.data_ptr() == addresses[name]
    assert not all(torch.equal(t.float(), before[name].float()) for name, t in after.items())


def test_refresh_in_inference_mode_and_outside():
    models = pair(*SMALL)
    with torch.inference_mode():
        packed = Packed.of(parts(models))
    change_in_place(models[0])
    packed.refresh(parts(models))
    assert torch.equal(packed.weights, Packed.of(parts(models)).weights)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if not op.is_view:
            self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("fp8", "most"), [(False, 24), (True, 48)])
def test_a_refresh_is_few_launches_whatever_the_depth_and_never_waits(fp8, most):
    counts = []
    for depth in (1, 12):
        sides = parts([m.at(4, drop=0.5) for m in pair(64, depth, 2, 16, 4, 3, "class")])
        packed = Packed.of(sides, fp8=fp8)
        with Dispatched() as dispatched:
            packed.refresh(sides)
        counts.append(len(dispatched.ops))
        waits = ("_local_scalar_dense", "nonzero", "equal", "item")
        assert not [op for op in dispatched.ops if any(f".{name}." in op for name in waits)]
    assert counts[0] == counts[1] <= most


NAMES = [
    *("patch.weight", "patch.bias", "position", "token", "std", "norm.bias", "head.weight"),
    *("head.bias", "blocks.1.qkv.weight", "blocks.0.qkv.bias", "blocks.1.norm1.weight"),
    *("blocks.0.out.weight", "blocks.1.up.weight", "blocks.0.down.weight", "blocks.1.down.bias"),
]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_flagged_and_named(name, value, fp8):
    models = pair(*SMALL)
    packed = Packed.of(parts(models), fp8=fp8)
    assert packed.bad.item() == 0
    tensor = models[1].state_dict()[name]
    kept = tensor.clone()
    tensor.view(-1)[-1] = value
    packed.refresh(parts(models))
    assert packed.bad.item() == BAD_WEIGHT
    with pytest.raises(ValueError, match=f"^reference {name} must be finite"):
        packed.check()
    tensor.copy_(kept)
    packed.refresh(parts(models))
    assert packed.bad.item() == 0


def test_a_weight_beyond_fp16_is_flagged_and_one_below_is_not():
    model = build(*SMALL)
    packed = Packed.of([model.parts()])
    model.blocks[1].up.weight.data[0, 0] = -65000.0
    model.blocks[1].up.bias.data[0] = 1e38
    packed.refresh([model.parts()])
    packed.check()
    model.blocks[1].up.weight.data[0, 0] = -66000.0
    packed.refresh([model.parts()])
    with pytest.raises(ValueError, match=r"^online blocks\.1\.up\.weight must .* got -inf"):
        packed.check()


def test_a_pair_of_two_shapes_is_refused_with_both():
    models = [build(48, depth, 2, 12, 3, 2, "mean") for depth in (1, 2)]
    shapes = [Shape.of(model.parts()) for model in models]
    with pytest.raises(ValueError) as refused:
        Packed.of(parts(models))
    assert all(str(shape) in str(refused.value) for shape in shapes)
    with pytest.raises(ValueError, match="sides must be 1 or 2, got 3"):
        Packed.of(parts([models[0]] * 3))
    with pytest.raises(ValueError, match="sides must be 1, got 2"):
        Packed.of(parts(models[:1])).refresh(parts(models))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_pack_to_the_same_buffers(dtype):
    model = build(*SMALL).to(dtype)
    model.mean, model.std = model.mean.float(), model.std.float()
    packed = Packed.of([model.parts()])
    same = Packed.of([model.float().parts()])
    for name, t in packed._state().items():
        torch.testing.assert_close(t, same._state()[name], msg=name)


def test_layers_without_bias_have_zeros():
    model = build(*SMALL)
    packed = Packed.of([model.parts()])
    bare = nn.Linear(48, 3 * 48, bias=False)
    model.blocks[0].qkv = bare
    packed.refresh([model.parts()])
    with torch.no_grad():
        model.blocks[0].qkv = nn.Linear(48, 3 * 48)
        model.blocks[0].qkv.weight.copy_(bare.weight)
        model.blocks[0].qkv.bias.zero_()
    for name, t in Packed.of([model.parts()])._state().items():
        assert torch.equal(t, packed._state()[name]), name


@pytest.mark.parametrize("options", [{}, {"fp8": True}, {"channels_last": True}])
def test_a_file_holds_all_of_it(tmp_path, options):
    models = [m.at(3, drop=0.3) for m in pair(*SMALL)]
    packed = Packed.of(parts(models), **options)
    packed.save(tmp_path / "packed.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["packed.safetensors"]
    found = Packed.load(tmp_path / "packed.safetensors")
    assert (found.shape, found.fp8, found.channels_last) == (
        packed.shape,
        packed.fp8,
        packed.channels_last,
    )
    for name, t in packed._state().items():
        assert torch.equal(found._state()[name].float(), t.float()), name
    images = pictures(models[0])
    for side in range(2):
        again = spec_scorer.features(found.parts(side), images)
        assert torch.equal(again, spec_scorer.features(packed.parts(side), images))
    change_in_place(models[0])
    found.refresh(parts(models))  # it can be packed again
    packed.refresh(parts(models))
    assert torch.equal(found.weights.float(), packed.weights.float())


def test_foreign_and_damaged_files_are_refused(tmp_path):
    path, model = tmp_path / "x.safetensors", build(*SMALL)
    with pytest.raises(FileNotFoundError, match="no model file at"):
        Packed.load(path)
    save(model, path)
    with pytest.raises(ValueError, match="for a packed scorer, got: format 1, model 'vit'"):
        Packed.load(path)
    packed = Packed.of([model.parts()])
    packed.save(path)
    with pytest.raises(ValueError, match="for a vit, got: format 1, model 'packed scorer'"):
        load(path)
    packed.shape = packed.shape._replace(depth=3)
    packed.save(path)
    with pytest.raises(ValueError, match="must hold the buffers of Shape"):
        Packed.load(path)
    packed.shape = packed.shape._replace(heads=0)
    packed.save(path)
    with pytest.raises(ValueError, match="must hold an 'activesel' header"):
        Packed.load(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        Packed.load(path)
