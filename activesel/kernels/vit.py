# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005 - Triton unpacks no tuples
# mypy: disable-error-code=assignment
"""The phases of a vision transformer, each over rows in memory: token r % T of image r // T.

The twin of `spec_scorer.features`. Operands of products are rounded to fp16 (or the linear layers'
to e4m3); sums, norms, softmax, GELU and the residual stream are fp32. Whoever calls two phases in
one program puts a block barrier between them.

A block takes 24 T D^2 + 4 T^2 D FLOPs an image; its weights, 24 D^2 bytes, come from the L2 cache
once per tile of rows.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
# Normal distribution function 1/2 + c P(c^2), |c| <= EDGE: GELU within 6e-5 of the exact one in 13
# operations, of which its rounding to fp16 leaves nothing; erf takes more than the products do.
EDGE = tl.constexpr(4.5)
P0, P1, P2 = tl.constexpr(0.3987085819), tl.constexpr(-0.06597726792), tl.constexpr(9.580654092e-3)
P3, P4, P5 = (
    tl.constexpr(-1.036253525e-3),
    tl.constexpr(8.120974235e-5),
    tl.constexpr(-4.4316871e-6),
)
P6, P7, P8 = tl.constexpr(1.580258413e-7), tl.constexpr(-3.283915806e-9), tl.constexpr(3.000011e-11)


@triton.jit
def _anchor(number):
    """Zero, which the compiler cannot know: offsets that start from it stay in their phase.

    It would otherwise compute those of all phases at the top of the program, and spill them.
    """
    zero = 0
    if not INTERPRETED:
        zero = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0;", "=r,r", [number], dtype=tl.int32, is_pure=True, pack=1
        )
        zero = tl.multiple_of(zero, 4096)
    return zero


@triton.jit
def gelu(x):
    c = tl.minimum(tl.maximum(x, -EDGE), EDGE)
    t = c * c
    p = tl.fma(t, P8, P7)
    p = tl.fma(t, p, P6)
    p = tl.fma(t, p, P5)
    p = tl.fma(t, p, P4)
    p = tl.fma(t, p, P3)
    p = tl.fma(t, p, P2)
    p = tl.fma(t, p, P1)
    p = tl.fma(t, p, P0)
    return x * tl.fma(c, p, 0.5)


@triton.jit
def _operand(x, like_ptr):
    """Rounded to the dtype that `like_ptr` points to, e4m3 with saturation."""
    if INTERPRETED and like_ptr.dtype.element_ty == tl.float8e4nv:  # where rounding loses a carry
        c = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
        t = c * 1048577.0  # 2^20 + 1, to leave 4 bits
        x = tl.where(tl.abs(c) < 0.015625, (c + 24576.0) - 24576.0, t - (t - c))
    return x.to(like_ptr.dtype.element_ty)


@triton.jit
def norm(xs, weight_ptr, bias_ptr, like_ptr, col, eps, D: tl.constexpr, BD: tl.constexpr):
    """Layer norm of rows given as tiles of columns, in the dtype that `like_ptr` points to."""
    total = xs[0]
    for i in tl.static_range(1, len(xs)):
        total += xs[i]
    mean = tl.sum(total, 1) * (1.0 / D)
    square = tl.zeros_like(total)
    for i in tl.static_range(len(xs)):
        c = xs[i] - mean[:, None]
        if (i + 1) * BD > D:
            c = tl.where((i * BD + col < D)[None, :], c, 0.0)
        square = tl.fma(c, c, square)
    scale = tl.rsqrt(tl.sum(square, 1) * (1.0 / D) + eps)
    shift = -mean * scale
    out = ()
    for i in tl.static_range(len(xs)):
        w = tl.load(weight_ptr + i * BD + col)[None, :]
        b = tl.load(bias_ptr + i * BD + col)[None, :]
        x = tl.fma(xs[i], scale[:, None], shift[:, None])  # not c, which would stay in registers
        x = tl.fma(x, w, b)  # w and b are zero beyond D
        out = out + (_operand(x, like_ptr),)
    return out


@triton.jit
def _tile(ptr, row, col, STRIDE: tl.constexpr):
    return tl.load(ptr + row[:, None] * STRIDE + col[None, :])


@triton.jit
def embed(
    images_ptr,  # of the group's first image
    image_stride,
    images,  # in this group; rows of others repeat the last
    x_ptr,  # [BM, S * DP] float32, out
    patch_ptr,  # [S, DP, KP] fp16
    rows_ptr,  # [S, T, DP] float32: position and bias
    units_ptr,  # [S] float32: of the weights
    kept_ptr,  # [T] int32, or None: all patches
    tile,  # its first row
    T: tl.constexpr, S: tl.constexpr, DP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    P: tl.constexpr,  # patch side
    GRID: tl.constexpr,  # patches a side
    CLASS: tl.constexpr,  # token 0 is no patch
    LAST: tl.constexpr,  # channels last, in memory and in the weights' columns
    CHANNELS: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, ROW_STRIDE: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Pixels to tokens of all sides: each pixel is read once for both sides' weights.

    u = (value - 128) / 64 for bytes, (255 value - 128) / 64 for floats; bytes are exact in fp16.
    """
    zero = _anchor(tile)
    row = tile + zero + tl.arange(0, BM)
    token = row % T
    image = tl.minimum(row // T, images - 1).to(tl.int64)
    patch = tl.maximum(token - CLASS, 0)
    if kept_ptr is not None:
        patch = tl.load(kept_ptr + patch)
    place = images_ptr + image * image_stride
    place += (patch // GRID) * (P * ROW_STRIDE) + (patch % GRID) * (P * COLUMN_STRIDE)
    for n in range(0, S * DP, BE):
        at = n + zero + tl.arange(0, BE)
        z = tl.zeros((BM, BE), tl.float32)
        for start in range(0, KP, BK):
            k = start + zero + tl.arange(0, BK)
            if LAST:
                near = (k // (P * CHANNELS)) * ROW_STRIDE + k % (P * CHANNELS)
            else:
                near = (k // (P * P)) * CHANNEL_STRIDE + (k // P % P) * ROW_STRIDE
                near += (k % P) * COLUMN_STRIDE
            if K == KP:
                u = tl.load(place[:, None] + near[None, :])
            else:
                u = tl.load(place[:, None] + near[None, :], mask=(k < K)[None, :], other=0)
            if u.dtype == tl.uint8:
                u = (u.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)  # 1024 + value, as
                u = (u - 1152.0) * 0.015625  # a conversion takes as long as an exponential
            else:
                u = tl.fma(u.to(tl.float32), 3.984375, -2.0).to(tl.float16)
            z = tl.dot(u, _tile(patch_ptr, at, k, KP).T, z)
        if CLASS:
            z = tl.where((token > 0)[:, None], z, 0.0)
        side = at // DP
        z = z * tl.load(units_ptr + side)[None, :]
        z += tl.load(rows_ptr + (side * T * DP + at % DP)[None, :] + (token * DP)[:, None])
        tl.store(x_ptr + (row - tile)[:, None] * (S * DP) + at[None, :], z)


@triton.jit
def residual(
    xs,  # tiles [BM, BD] float32
    qkv_ptr,  # [BM, 1] pointers to attention's results, AP of them
    weights_ptr,  # of the layer
    vectors_ptr,
    scales_ptr,  # [4] float32 with e4m3 operands, else None
    zero,
    eps,
    D: tl.constexpr, DP: tl.constexpr, AP: tl.constexpr, HP: tl.constexpr, BD: tl.constexpr,
    BA: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """x + out(attention), then x + down(gelu(up(norm(x))))."""
    out_ptr, up_ptr = weights_ptr + 3 * AP * DP, weights_ptr + 4 * AP * DP
    down_ptr = up_ptr + HP * DP
    bias_ptr = vectors_ptr + 2 * DP + 3 * AP
    col = zero + tl.arange(0, BD)
    xs = _scaled(xs, scales_ptr, 1, True)
    for a in range(0, AP, BA):
        at = a + zero + tl.arange(0, BA)
        o = _operand(tl.load(qkv_ptr + at[None, :]), weights_ptr)
        new = ()
        for i in tl.static_range(len(xs)):
            new = new + (tl.dot(o, _tile(out_ptr, i * BD + col, at, AP).T, xs[i]),)
        xs = new
    xs = _biased(_scaled(xs, scales_ptr, 1, False), bias_ptr, col, BD)
    hs = norm(xs, bias_ptr + DP, bias_ptr + 2 * DP, weights_ptr, col, eps, D, BD)
    xs = _scaled(xs, scales_ptr, 3, True)
    for h in range(0, HP, BH):
        at = h + zero + tl.arange(0, BH)
        z = tl.zeros((xs[0].shape[0], BH), tl.float32)
        for i in tl.static_range(len(xs)):
            z = tl.dot(hs[i], _tile(up_ptr, at, i * BD + col, DP).T, z)
        if scales_ptr is not None:
            z = z * tl.load(scales_ptr + 2)
        z = _operand(gelu(z + tl.load(bias_ptr + 3 * DP + at)[None, :]), weights_ptr)
        new = ()
        for i in tl.static_range(len(xs)):
            new = new + (tl.dot(z, _tile(down_ptr, i * BD + col, at, HP).T, xs[i]),)
        xs = new
    return _biased(_scaled(xs, scales_ptr, 3, False), bias_ptr + 3 * DP + HP, col, BD)


@triton.jit
def _scaled(xs, scales_ptr, WHICH: tl.constexpr, BEFORE: tl.constexpr):
    """With e4m3 weights, sums go on in their scale, a power of two: exact, there and back."""
    out = ()
    for i in tl.static_range(len(xs)):
        x = xs[i]
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + WHICH)
            if BEFORE:
                scale = 1.0 / scale
            x = x * scale
        out = out + (x,)
    return out


@triton.jit
def _biased(xs, bias_ptr, col, BD: tl.constexpr):
    out = ()
    for i in tl.static_range(len(xs)):
        b = tl.load(bias_ptr + i * BD + col)
        out = out + (xs[i] + b[None, :],)
    return out


@triton.jit
def qkv(
    xs,
    qkv_ptr,  # [BM, 1] pointers, out
    weights_ptr,
    vectors_ptr,
    scales_ptr,
    zero,
    eps,
    D: tl.constexpr, DP: tl.constexpr, AP: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """Queries, keys and values of all heads."""
    col = zero + tl.arange(0, BD)
    hs = norm(xs, vectors_ptr, vectors_ptr + DP, weights_ptr, col, eps, D, BD)
    for a in range(0, 3 * AP, BA):
        at = a + zero + tl.arange(0, BA)
        z = tl.zeros((xs[0].shape[0], BA), tl.float32)
        for i in tl.static_range(len(xs)):
            z = tl.dot(hs[i], _tile(weights_ptr, at, i * BD + col, DP).T, z)
        if scales_ptr is not None:
            z = z * tl.load(scales_ptr)
        z += tl.load(vectors_ptr + 2 * DP + at)[None, :]
        # Finite, or 0 times it would reach the images that share a tile; NaN stays in the residual.
        z = tl.where(z == z, tl.minimum(tl.maximum(z, -65504.0), 65504.0), 0.0)
        tl.store(qkv_ptr + at[None, :], z.to(tl.float16))


@triton.jit
def layer(
    x_ptr,  # [BM, XS] float32: columns of this side
    qkv_ptr,  # [BM, 3 * AP] fp16
    weights_ptr,  # [L, NW]
    vectors_ptr,  # [L, NV] float32
    scales_ptr,  # [L, 4]
    number,  # of the layer about to attend: 0 has nothing before it, L nothing after it
    eps,
    L: tl.constexpr, NW: tl.constexpr, NV: tl.constexpr, XS: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, AP: tl.constexpr, HP: tl.constexpr, BD: tl.constexpr, BA: tl.constexpr,
    BH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Everything between two attentions, of a tile of rows: the residual stays in registers."""
    zero = _anchor(number)
    row = zero + tl.arange(0, BM)
    place = x_ptr + row[:, None] * XS + (zero + tl.arange(0, BD))[None, :]
    beside = qkv_ptr + row[:, None] * (3 * AP)
    xs = ()
    for i in tl.static_range(DP // BD):
        xs = xs + (tl.load(place + i * BD),)
    if number > 0:
        scales = scales_ptr
        if scales_ptr is not None:
            scales = scales_ptr + (number - 1) * 4
        xs = residual(
            xs, beside, weights_ptr + (number - 1) * NW, vectors_ptr + (number - 1) * NV, scales,
            zero, eps, D, DP, AP, HP, BD, BA, BH,
        )  # fmt: skip
        for i in tl.static_range(DP // BD):
            tl.store(place + i * BD, xs[i])
    if number < L:
        scales = scales_ptr
        if scales_ptr is not None:
            scales = scales_ptr + number * 4
        qkv(
            xs, beside, weights_ptr + number * NW, vectors_ptr + number * NV, scales,
            zero, eps, D, DP, AP, BD, BA,
        )  # fmt: skip


@triton.jit
def attention(
    qkv_ptr,  # [R, 3 * AP] fp16: a head's queries become its results
    unit,  # images x heads x tiles of queries
    rows,  # of all images
    scale,  # of products, for powers of two
    T: tl.constexpr, AP: tl.constexpr, HEADS: tl.constexpr, HD: tl.constexpr, BQ: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Softmax attention of one head, some queries, in the images they belong to.

    Images of few tokens share a tile, as many as fit, and a mask tells them apart.
    """
    SPAN: tl.constexpr = T * (BQ // T) if T <= BQ else T  # rows of the images in this unit
    TILES: tl.constexpr = (SPAN + BQ - 1) // BQ
    first = unit // (HEADS * TILES) * SPAN
    head = unit // TILES % HEADS
    base = qkv_ptr + first.to(tl.int64) * (3 * AP) + head * HD
    last = tl.minimum(SPAN, rows - first)
    zero = _anchor(unit)
    query = unit % TILES * BQ + zero + tl.arange(0, BQ)
    col = (zero + tl.arange(0, HD))[None, :]
    own = base + query[:, None] * (3 * AP) + col
    live = (query < last)[:, None]
    q = tl.load(own, mask=live, other=0.0)
    high = tl.full((BQ,), -float("inf"), tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    z = tl.zeros((BQ, HD), tl.float32)
    for start in range(0, SPAN, BT):
        key = start + zero + tl.arange(0, BT)
        there = key < last
        place = base + AP + key[:, None] * (3 * AP) + col
        k = tl.load(place, mask=there[:, None], other=0.0)
        v = tl.load(place + AP, mask=there[:, None], other=0.0)
        s = tl.dot(q, k.T)
        if SPAN > T:  # no row is masked as a whole: each has at least itself
            s = tl.where(query[:, None] // T == key[None, :] // T, s, -float("inf"))
        elif SPAN % BT != 0:
            s = tl.where(there[None, :], s, -float("inf"))
        new = tl.max(s, 1)
        if SPAN > BT:
            new = tl.maximum(high, new)
            shrink = tl.exp2((high - new) * scale)
            total = total * shrink
            z = z * shrink[:, None]
        p = tl.exp2(tl.fma(s, scale, -(new * scale)[:, None]))
        total += tl.sum(p, 1)
        z = tl.dot(p.to(tl.float16), v, z)
        high = new
    z = z / total[:, None]
    tl.store(own, z.to(tl.float16), mask=live)


@triton.jit(noinline=True)
def pool(
    x_ptr,  # of the image's first token, columns of this side
    feature_ptr,  # [DP] float32, out
    norm_ptr,  # [2, DP] float32
    eps,
    T: tl.constexpr, XS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CLASS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """The class token, or the mean of all tokens, normalised."""
    col = tl.arange(0, BD)
    xs = ()
    for i in tl.static_range(DP // BD):
        place = x_ptr + i * BD + col[None, :]
        if CLASS:
            mean = tl.load(place)
        else:
            mean = tl.zeros((1, BD), tl.float32)
            for start in range(0, T, 16):
                token = start + tl.arange(0, 16)[:, None]
                x = tl.load(place + token * XS, mask=token < T, other=0.0)
                mean += tl.sum(x, 0)[None, :]
            mean = mean * (1.0 / T)
        xs = xs + (mean,)
    xs = norm(xs, norm_ptr, norm_ptr + DP, feature_ptr, col, eps, D, BD)
    for i in tl.static_range(DP // BD):
        tl.store(feature_ptr + i * BD + col[None, :], xs[i])


# Called, not inlined: each phase gets the registers it needs, without spills. But wgmma (sm_90) is
# then serialized, and Triton cannot hand tensor memory (sm_100) to a callee.
embed_call, layer_call, attention_call = (
    triton.jit(f.fn, noinline=True) for f in (embed, layer, attention)
)
