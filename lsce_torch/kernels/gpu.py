"""The kernels of the loss for GPUs, in Triton. `launch.py` starts them; this file is loaded by it alone.

A program computes some rows. Short ones it reads once and keeps. Longer ones it reads block by block, and each lane of
a block has sums of its own, relative to the largest logit that it has seen. With e = exp(-|z - m|), and s the sum of
exp(z - m) over the lane's logits without one that is m,

    s <- (s + 1) e   if z > m, which m becomes,   else s + e

takes one exponential for each logit, and keeps small losses accurate: the 1 of the largest is never added. At the end
the lanes are added up relative to the largest logit of all, of which exactly one is left out. For the entropy a lane
adds up exp(z - m) (m - z) likewise: if m grows by d, each of these gaps grows by d, and

    t <- (t + d (s + 1)) e   if z > m,   else t + e (m - z)

Lanes begin at -1e30 and not at -inf, whose difference to itself is NaN. A row without a logit above that is computed
again, from its largest logit.

Vectors of 128 bits are loaded where rows begin at multiples of 16 logits. Otherwise the blocks of a row do, and only
its first and last block are masked.

The arithmetic is that of float32, of float64 for float64 logits. log1p and tanh are made of operations that IEEE 754
defines and of exp: Triton has no tanh that its interpreter knows, and the log of a GPU is off by 1e-7 near 1.
"""

import triton
import triton.language as tl

from lsce_spec import GAP_UNIT

FLOAT32, FLOAT64 = tl.float32, tl.float64
_LOW = tl.constexpr(-1e30)
_INF = tl.constexpr(float("inf"))
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_LOG_2 = tl.constexpr(0.6931471805599453)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
# Below this a product with a target counts as 0; some devices flush smaller numbers to 0.
_TINY = tl.constexpr(1.1754943508222875e-38)
# A gap at least this large has a probability of 0, in float64 as well.
_LARGEST_GAP = tl.constexpr(1000.0)
# The unit of sums of gaps, and what a term is multiplied by.
_UNIT = tl.constexpr(GAP_UNIT)
_IN_UNITS = tl.constexpr(1 / GAP_UNIT)


# --- Numbers ----------------------------------------------------------------------------------------------------------


@triton.jit
def _of_rows(given, row, there, DTYPE: tl.constexpr):
    """A number for each row, from memory, or the one for all."""
    given = tl.core.to_tensor(given)  # a number is still Python's in the interpreter
    if given.dtype.is_ptr():
        value = tl.load(given + row, mask=there, other=0).to(DTYPE)
    else:
        value = tl.full(row.shape, 0, DTYPE) + given
    return value


@triton.jit
def _of_all(given, DTYPE: tl.constexpr):
    """A number for all rows, given or in memory."""
    given = tl.core.to_tensor(given)
    if given.dtype.is_ptr():
        value = tl.load(given).to(DTYPE)
    else:
        value = given
    return value


@triton.jit
def _quotient(x, y):
    """x / y, rounded once; Triton's own is off by more in float32."""
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.div_rn(x, y)
    return result


@triton.jit
def _exp_minus(size, PTX: tl.constexpr):
    """exp(-size) for size >= 0. In PTX results below the smallest normal number are 0, which saves 3 instructions."""
    if PTX and size.dtype == tl.float32:
        power = size * _MINUS_LOG2_E
        result = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = tl.exp(-size)
    return result


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, from 1 + x = 2^k (1 + f) and log(1 + f) = 2 artanh(f / (2 + f))."""
    if x.dtype == tl.float64:
        whole = 1.0 + x
        rounded = whole - 1.0
        result = tl.where(rounded == 0, x, tl.log(whole) * (x / tl.where(rounded == 0, 1.0, rounded)))
    else:
        bits = (1.0 + x).to(tl.int32, bitcast=True)
        is_small = x < 0.5
        # Of f between -1/4 and 1/2: half a power of two is added to the bits.
        exponent = tl.where(is_small, 0, ((bits + 0x400000) >> 23) - 127)
        fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        f = tl.where(is_small, x, fraction - 1.0)
        s = f / (2.0 + f)
        z = s * s
        series = z * (2.0 / 3 + z * (2.0 / 5 + z * (2.0 / 7 + z * (2.0 / 9 + z * (2.0 / 11)))))
        # f - f s is 2 s.
        result = exponent.to(tl.float32) * _LOG_2 + (f - s * (f - series))
        result = tl.where(x < _INF, result, x)
    return result


@triton.jit
def _tanh(x):
    """tanh: near 0 by a polynomial of Cephes (tanhf.c, Moshier 1992), in float64 by its continued fraction."""
    size = tl.abs(x)
    z = size * size
    if x.dtype == tl.float64:
        near = size / (1 + z / (3 + z / (5 + z / (7 + z / (9 + z / (11 + z / (13 + z / 15)))))))
    else:
        series = -5.37397155531e-2 + z * (2.06390887954e-2 + z * -5.70498872745e-3)
        near = size + size * z * (-3.33332819422e-1 + z * (1.33314422036e-1 + z * series))
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    result = tl.where(size < 0.625, near, far)
    return tl.where(x < 0, -result, result)


@triton.jit
def _share(divisor, DTYPE: tl.constexpr):
    """1 / divisor, and 0 for 0: by a rough quotient and a step of Newton's method, which takes fewer registers."""
    one = tl.full([], 1, DTYPE)
    value = one * _of_all(divisor, DTYPE)
    rough = one / tl.where(value == 0, one, value)
    share = tl.fma(rough, tl.fma(-value, rough, one), rough)
    share = tl.where(tl.abs(share) < _INF, share, rough)
    return tl.where(value == 0, 0.0, share)


@triton.jit
def _capped(raw, softcap):
    if softcap is None:
        result = raw
    else:
        result = softcap * _tanh(_quotient(raw, softcap + tl.zeros_like(raw)))
    return result


@triton.jit
def _product(target, gap, unit: tl.constexpr = 1.0):
    """target * gap * unit, where 0 * inf counts as 0."""
    return tl.where((tl.abs(target) < _TINY) & (gap == _INF), 0.0, target * unit * gap)


# --- Rows and blocks of classes ---------------------------------------------------------------------------------------


@triton.jit
def _rows_of(num_rows, num_classes, inner, row_stride, NUM_ROWS: tl.constexpr, program):
    """Which rows a program computes, which of them are there, and where each begins."""
    lane = tl.arange(0, NUM_ROWS)
    if inner is None:
        row = program * NUM_ROWS + lane
        there = row < num_rows
        start = row * row_stride
    else:  # that many rows lie side by side, as the pixels of an image
        programs = tl.cdiv(inner, NUM_ROWS)
        group = program // programs
        within = (program % programs) * NUM_ROWS + lane
        there = within < inner
        row = group * inner + within
        start = group * inner * num_classes + within
    return row, there, start


@triton.jit
def _labels_of(row, there, labels, counted, bad, class_mask, mask_stride, ignore_index, num_classes):
    """The label of each row, or -1; whether the row counts; and whether it counts, but its label is not a class."""
    counts = there
    is_bad = row < 0
    label = tl.full(row.shape, -1, tl.int32)
    if labels is not None:
        given = tl.load(labels + row, mask=there, other=0).to(tl.int64)
        if ignore_index is not None:
            counts = counts & (given != ignore_index)
        is_bad = (given < 0) | (given >= num_classes)
        label = tl.where(is_bad, 0, given).to(tl.int32)
        if class_mask is not None:
            is_bad = is_bad | (tl.load(class_mask + row * mask_stride + label, mask=there, other=1) == 0)
    if counted is not None:
        counts = counts & (tl.load(counted + row, mask=there, other=0) != 0)
    if bad is not None:
        is_bad = is_bad | (tl.load(bad + row, mask=there, other=0) != 0)
    return label, counts, is_bad & counts


@triton.jit
def _first_block(program, row_stride, start, ALIGN: tl.constexpr):
    """Where the first block of a row begins, and by how many classes that is before the row."""
    if ALIGN > 1:
        begin = program * row_stride
        aligned = begin // ALIGN * ALIGN
        base, head = start * 0 + aligned, (begin - aligned).to(tl.int32)
    else:
        base, head = start, 0
    return base, head


@triton.jit
def _whole_blocks(head, num_classes, BLOCK: tl.constexpr):
    """The begin of the first block that lies within the row, the end of the last, and the end of the row."""
    begin = tl.where(head > 0, BLOCK, 0)
    span = num_classes + head
    return begin, tl.maximum(span // BLOCK * BLOCK, begin), span


@triton.jit
def _places(start, col, inner):
    if inner is None:
        at = start[:, None] + col
    else:
        at = start[:, None] + col.to(tl.int64) * inner
    return at


@triton.jit
def _block(classes, row, reads, base, head, at, DTYPE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The classes of a block, their logits, which of them take part, and their factors of `off`.

    WHOLE says that the block lies within a row that counts.
    """
    logits, class_mask, mask_stride, factor, factor_stride, num_classes, inner = classes
    lane = tl.arange(0, BLOCK)[None, :]
    col = at - head + lane
    if WHOLE:
        valid = tl.full([row.shape[0], BLOCK], True, tl.int1)
    else:
        valid = (col >= 0) & (col < num_classes) & reads[:, None]
    raw = tl.load(logits + _places(base, at + lane, inner), mask=valid, other=0).to(DTYPE)
    if class_mask is not None:
        part = tl.load(class_mask + (row * mask_stride)[:, None] + col, mask=valid, other=0)
        valid = valid & (part != 0)
    if factor is None:
        weight = tl.full([row.shape[0], BLOCK], 1, DTYPE)
        if not WHOLE or class_mask is not None:
            weight = tl.where(valid, weight, 0.0)
    else:
        weight = tl.load(factor + (row * factor_stride)[:, None] + col, mask=valid, other=0).to(DTYPE)
    return col, raw, valid, weight


# --- Sums -------------------------------------------------------------------------------------------------------------


@triton.jit
def _lean_step(lanes, raw, count, GAPS: tl.constexpr, PTX: tl.constexpr):
    """Add a block of logits to the lanes, with the label's gap. `count` is how many blocks were before, in units."""
    peaks, rests, gaps = lanes
    z = tl.maximum(raw, _LOW, propagate_nan=_ALL)
    e = _exp_minus(tl.abs(z - peaks), PTX)
    rests = tl.where(z > peaks, rests * e + e, rests + e)
    above = tl.maximum(peaks, z)
    if GAPS:
        gaps = gaps + count * (above - peaks) + (above - raw) * _IN_UNITS
    return above, rests, gaps


@triton.jit
def _step(
    lanes, tops, block, label, softcap,
    APART: tl.constexpr, GAPS: tl.constexpr, TOP: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """Add a block of logits to the lanes. With APART the label's gap is left out."""
    peaks, rests, gaps, masses, means = lanes
    largest, numbers, top_masses, firsts = tops
    col, raw, valid, weight = block
    x = tl.where(valid, _capped(raw, softcap), -_INF)
    z = tl.maximum(x, _LOW, propagate_nan=_ALL)
    e = tl.where(valid, tl.exp(-tl.abs(z - peaks)), 0.0)
    if STATISTICS:
        moved = e * tl.abs(z - peaks)
        means = tl.where(z > peaks, means * e + moved * (rests + 1), means + moved)
    rests = tl.where(z > peaks, rests * e + e, rests + e)
    above = tl.maximum(peaks, z)
    if GAPS:
        if APART:
            of_gap = tl.where(col == label[:, None], 0.0, weight) * _IN_UNITS
        else:
            of_gap = weight * _IN_UNITS
        gaps = gaps + masses * (above - peaks) + tl.where(of_gap == 0, 0.0, of_gap * (above - x))
        masses = masses + of_gap
    if TOP:
        raw = tl.where(valid, raw, -_INF)
        is_above = raw > largest
        equal = tl.where(valid & (raw == largest), 1.0, 0.0)
        firsts = tl.where(is_above, col, firsts)
        numbers = tl.where(is_above, 1.0, numbers + equal)
        top_masses = tl.where(is_above, weight, top_masses + equal * weight)
        largest = tl.maximum(largest, raw)
    return (above, rests, gaps, masses, means), (largest, numbers, top_masses, firsts)


@triton.jit
def _sums_of_block(block, label, softcap, APART: tl.constexpr):
    """The sums of rows that are one block each."""
    col, raw, valid, weight = block
    raw = tl.where(valid, raw, -_INF)
    x = tl.where(valid, _capped(raw, softcap), -_INF)
    largest = tl.max(raw, 1)
    is_largest = valid & (raw == largest[:, None])
    peak = tl.max(x, 1)
    gap = peak[:, None] - x
    is_peak = valid & (x == peak[:, None])
    terms = tl.where(valid & (is_peak == 0), tl.exp(-gap), 0.0)
    rest = tl.sum(terms, 1) + (tl.sum(tl.where(is_peak, 1.0, 0.0), 1) - 1)
    mean_gap = tl.sum(tl.where(terms == 0, 0.0, terms * gap), 1) / (1 + rest)
    is_label = col == label[:, None]
    # A compiler may compute a softcap twice, and not the same: at the largest logit the gap is 0.
    label_gap = tl.sum(tl.where(is_label & valid & (is_largest == 0), gap, 0.0), 1)
    weight = weight * _IN_UNITS
    if APART:
        weight = tl.where(is_label, 0.0, weight)
    gaps = tl.sum(tl.where(weight == 0, 0.0, weight * gap), 1)
    number = tl.sum(tl.where(is_largest, 1.0, 0.0), 1)
    top_mass = tl.sum(tl.where(is_largest, block[3], 0.0), 1) / number
    first = tl.min(tl.where(is_largest, col, 2147483647), 1)
    return peak, rest, label_gap, gaps, mean_gap, (largest, number, top_mass, first)


@triton.jit
def _sums_of_stream(
    classes, row, reads, start, base, head, label, softcap,
    NUM_ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
    APART: tl.constexpr, GAPS: tl.constexpr, TOP: tl.constexpr, STATISTICS: tl.constexpr, LEAN: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The sums of rows of any length, which are read once, block by block."""
    lane = tl.arange(0, BLOCK)[None, :]
    zeros = tl.zeros([NUM_ROWS, BLOCK], DTYPE)
    tops = (zeros - _INF, zeros, zeros, tl.zeros([NUM_ROWS, BLOCK], tl.int32))
    begin, end, span = _whole_blocks(head, classes[5], BLOCK)
    if LEAN:
        lean = (zeros + _LOW, zeros, zeros)
        count = 0.0
        for at in tl.range(begin, end, BLOCK):
            raw = _block(classes, row, reads, base, head, at, DTYPE, True, BLOCK)[1]
            lean = _lean_step(lean, raw, count, GAPS, PTX)
            count += _IN_UNITS
        lanes = (lean[0], lean[1], lean[2], zeros + count, zeros)
    else:
        lanes = (zeros + _LOW, zeros, zeros, zeros, zeros)
        for at in tl.range(begin, end, BLOCK):
            block = _block(classes, row, reads, base, head, at, DTYPE, NUM_ROWS == 1, BLOCK)
            lanes, tops = _step(lanes, tops, block, label, softcap, APART, GAPS, TOP, STATISTICS)
    # The first block if it begins before the row, and the last if it ends after it.
    for edge in tl.static_range(2):
        if tl.where(edge == 0, begin, span - end) > 0:
            at = tl.where(edge == 0, 0, end)
            block = _block(classes, row, reads, base, head, at, DTYPE, False, BLOCK)
            lanes, tops = _step(lanes, tops, block, label, softcap, APART, GAPS, TOP, STATISTICS)

    peaks, rests, gaps, masses, means = lanes
    largest, numbers, top_masses, firsts = tops
    peak = tl.max(peaks, 1)
    scale = tl.exp(peaks - peak[:, None])
    rest = tl.sum(rests * scale + tl.where(lane == tl.argmax(peaks, 1)[:, None], 0.0, scale), 1)
    gap = tl.sum(gaps + masses * (peak[:, None] - peaks), 1)
    mean_gap = tl.sum(scale * (means + (peak[:, None] - peaks) * (rests + 1)), 1) / (1 + rest)
    top = tl.max(largest, 1)
    is_top = largest == top[:, None]
    number = tl.sum(tl.where(is_top, numbers, 0.0), 1)
    top_mass = tl.sum(tl.where(is_top, top_masses, 0.0), 1) / number
    first = tl.min(tl.where(is_top & (numbers > 0), firsts, 2147483647), 1)
    return peak, rest, gap, mean_gap, (top, number, top_mass, first)


@triton.jit
def _sums_of_low_rows(
    classes, row, reads, start, label, softcap,
    NUM_ROWS: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """The largest logit, the rest and the gaps of rows whose logits are all -inf or below what the lanes begin with."""
    peak = tl.full([NUM_ROWS], 0, DTYPE) - _INF
    rest = tl.full([NUM_ROWS], -1, DTYPE)
    gaps = tl.zeros([NUM_ROWS], DTYPE)
    for at in range(0, classes[5], BLOCK):
        col, raw, valid, weight = _block(classes, row, reads, start, 0, at, DTYPE, False, BLOCK)
        peak = tl.maximum(peak, tl.max(tl.where(valid, _capped(raw, softcap), -_INF), 1))
    for at in range(0, classes[5], BLOCK):
        col, raw, valid, weight = _block(classes, row, reads, start, 0, at, DTYPE, False, BLOCK)
        gap = peak[:, None] - _capped(raw, softcap)
        rest += tl.sum(tl.where(valid, tl.exp(-gap), 0.0), 1)
        weight = weight * _IN_UNITS
        if APART:
            weight = tl.where(col == label[:, None], 0.0, weight)
        gaps += tl.sum(tl.where(weight == 0, 0.0, weight * gap), 1)
    return peak, rest, gaps


# --- Losses and gradients ---------------------------------------------------------------------------------------------


@triton.jit
def _targets_of(row, there, label, on, off, other_mass, at_max, factor, all_mass, DTYPE: tl.constexpr):
    """The numbers of the target of each row, 0 for what the loss does not have."""
    nothing = tl.zeros(row.shape, DTYPE)
    of_label, of_others, mass, of_largest = _of_rows(on, row, there, DTYPE), nothing, nothing, nothing
    if off is not None:
        of_others = _of_rows(off, row, there, DTYPE)
        if all_mass is None:
            mass = _of_rows(other_mass, row, there, DTYPE)
    if all_mass is not None:
        weight = tl.load(factor + label, mask=there, other=0)
        of_label = of_label * weight.to(DTYPE)
        # In float64: the label's may be most of the sum.
        mass = (tl.load(all_mass) - weight.to(tl.float64)).to(DTYPE)
    if at_max is not None:
        of_largest = _of_rows(at_max, row, there, DTYPE)
    return of_label, of_others, mass, of_largest


@triton.jit
def _slopes_of(upstream, is_bad, sums, targets, z_loss):
    """The mass of the target, the slope of p, those of `off` and `at_max`, and the gradient at the label."""
    peak, log_sum, label_gap, number, top_mass = sums
    on, off, other_mass, at_max = targets
    mass = on + off * other_mass + at_max * top_mass
    p_slope = upstream * mass
    if z_loss is not None:
        p_slope += upstream * (2 * z_loss * (peak + log_sum))
    p_slope = tl.where(is_bad, float("nan"), p_slope)
    # Not exp of the sum, which rounds away digits of `log_sum` beside a large gap.
    at_label = p_slope * (tl.exp(-label_gap) * tl.exp(-log_sum)) - upstream * on
    return mass, (p_slope * tl.exp(-log_sum), upstream * off, upstream * at_max / number, at_label)


@triton.jit
def _with_statistics(slopes, of_nll, of_lse, of_entropy, row, there, sums, sums_step, log_sum, label_gap):
    """The slopes with those of the statistics, but for that of the gaps."""
    p_slope, off_slope, max_slope, at_label = slopes
    of_p, of_gap, of_label = log_sum * 0, log_sum * 0, log_sum * 0
    if of_nll is not None:
        of_label += tl.load(of_nll + row, mask=there, other=0).to(log_sum.dtype)
        of_p += of_label
    if of_lse is not None:
        of_p += tl.load(of_lse + row, mask=there, other=0).to(log_sum.dtype)
    if of_entropy is not None:
        of_gap += tl.load(of_entropy + row, mask=there, other=0).to(log_sum.dtype)
        of_p -= of_gap * tl.load(sums + 5 * sums_step + row, mask=there, other=0)
    p_label = tl.exp(-label_gap) * tl.exp(-log_sum)
    at_label += (of_p + of_gap * tl.minimum(label_gap, _LARGEST_GAP)) * p_label - of_label
    return p_slope + of_p * tl.exp(-log_sum), off_slope, max_slope, at_label


@triton.jit
def _write_gradient(
    gradient, classes, row, there, counts, base, head, at, block, label, peak, largest, slopes, gap_slope, softcap,
    AT_MAX: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block: p_slope p - off_slope w, at_label at the label, - max_slope w at the largest.

    Unless `gap_slope` is None, gap_slope (m - z) p is added.
    """
    col, raw, valid, weight = block
    p_slope, off_slope, max_slope, at_label = slopes
    x = _capped(raw, softcap)
    if gap_slope is None:
        slope = p_slope[:, None] * tl.exp(x - peak[:, None]) - off_slope[:, None] * weight
    else:
        of_p = p_slope[:, None] + gap_slope[:, None] * tl.minimum(peak[:, None] - x, _LARGEST_GAP)
        slope = of_p * tl.exp(x - peak[:, None]) - off_slope[:, None] * weight
    slope = tl.where(col == label[:, None], at_label[:, None], slope)
    if AT_MAX:
        slope = tl.where(raw == largest[:, None], slope - max_slope[:, None] * weight, slope)
    if softcap is not None:
        tanh = _quotient(x, softcap + tl.zeros_like(x))
        slope = slope * (1 - tanh * tanh)
    slope = tl.where(valid & counts[:, None], slope, 0.0).to(gradient.dtype.element_ty)
    places = gradient + _places(base, at + tl.arange(0, BLOCK)[None, :], classes[6])
    if WHOLE:
        tl.store(places, slope)
    else:
        tl.store(places, slope, mask=there[:, None] & (col >= 0) & (col < classes[5]))


@triton.jit(do_not_specialize=["num_rows", "sums_step", "ignore_index"])
def forward(
    logits, labels, counted, bad, class_mask, factor, on, off, other_mass, at_max, z_loss, softcap,
    all_mass, losses, sums, first, gradient, divisor,
    num_rows, num_classes, inner, row_stride, sums_step, mask_stride, factor_stride, ignore_index,
    DTYPE: tl.constexpr, NUM_ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, APART: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Losses and sums of rows, and the gradient of the sum of the losses by `divisor`.

    Args:
        logits, labels, counted, bad, class_mask, factor, on, off, other_mass, at_max, z_loss, softcap: see `Operands`;
            None for what the loss does not have, as `off` and `other_mass` where `off` is 0.
        all_mass: sum of `factor`, in memory and in float64, if `on` and `other_mass` are to be made of the label's
            factor; otherwise None.
        losses: to write.
        sums: to write, the fields of `Sums` one after the other: with APART all of them that the loss has, otherwise
            the first three.
        first: index of the first largest logit, to write, or None.
        gradient: to write, may be the logits; or None.
        divisor: what the sum of the losses is divided by; None for 1. If it is in memory and 0, no row counts.
        num_rows: number of rows.
        num_classes: number of classes.
        inner: how many rows lie side by side, or None.
        row_stride: step from a row to the next.
        mask_stride: the same of the class mask, 0 if all rows have the same.
        factor_stride: the same of the factors.
        sums_step: step from one of the sums to the next.
        ignore_index: label of rows that do not count, or None.
        DTYPE: of the computation.
        NUM_ROWS: rows of a program.
        BLOCK: classes of a block.
        ALIGN: the number of logits that a block's begin is a multiple of. 0 if a block has all classes of its rows.
        APART: whether the sum of the gaps leaves the label's out.
        PTX: whether the kernel is compiled for NVIDIA's GPUs.
    """
    AT_MAX: tl.constexpr = at_max is not None
    program = tl.program_id(0).to(tl.int64)
    sums_step = program * 0 + sums_step  # in 64 bits
    row, there, start = _rows_of(num_rows, num_classes, inner, row_stride, NUM_ROWS, program)
    label, counts, is_bad = _labels_of(
        row, there, labels, counted, bad, class_mask, mask_stride, ignore_index, num_classes
    )
    nothing = tl.zeros([NUM_ROWS], DTYPE)
    upstream = nothing + 1
    if divisor is not None:
        upstream = upstream * _share(divisor, DTYPE)
        counts = counts & (upstream != 0)
        is_bad = is_bad & counts
    classes = (logits, class_mask, mask_stride, factor, factor_stride, num_classes, inner)
    if softcap is not None:
        softcap = _of_all(softcap, DTYPE)
    base, head = _first_block(program, row_stride, start, ALIGN)
    if ALIGN == 0:
        block = _block(classes, row, counts, start, 0, 0, DTYPE, False, BLOCK)
        peak, rest, label_gap, gaps, mean_gap, tops = _sums_of_block(block, label, softcap, APART)
    else:
        GAPS: tl.constexpr = off is not None or APART
        TOP: tl.constexpr = first is not None or softcap is not None or AT_MAX
        PLAIN: tl.constexpr = class_mask is None and factor is None and softcap is None
        peak, rest, gaps, mean_gap, tops = _sums_of_stream(
            classes, row, counts, start, base, head, label, softcap,
            NUM_ROWS, BLOCK, DTYPE, APART, GAPS, TOP, first is not None,
            PLAIN and NUM_ROWS == 1 and not (APART or TOP), PTX,
        )  # fmt: skip
        if tl.min(tl.where(counts, peak, 0.0), 0) <= _LOW:
            low_peak, low_rest, low_gaps = _sums_of_low_rows(
                classes, row, counts, start, label, softcap, NUM_ROWS, BLOCK, DTYPE, APART
            )
            is_low = peak <= _LOW
            peak = tl.where(is_low, low_peak, peak)
            rest = tl.where(is_low, low_rest, rest)
            gaps = tl.where(is_low, low_gaps, gaps)
            # Logits so low are equal, or so far apart that all but the largest have a probability of 0.
            mean_gap = tl.where(is_low, 0.0, mean_gap)
        label_gap = tl.zeros([NUM_ROWS], DTYPE)
        if labels is not None:
            place = start + label if inner is None else start + label.to(tl.int64) * inner
            at_label = tl.load(logits + place, mask=counts, other=0).to(DTYPE)
            label_gap = peak - _capped(at_label, softcap)
            if softcap is not None:
                # A compiler may compute a softcap twice, and not the same: at the largest logit the gap is 0.
                label_gap = tl.where(at_label == tops[0], 0.0, label_gap)
    largest, number, top_mass, index = tops
    log_sum = tl.where(tl.abs(peak) == _INF, float("nan"), _log1p(rest))

    targets = _targets_of(row, there, label, on, off, other_mass, at_max, factor, all_mass, DTYPE)
    if not AT_MAX:
        number, top_mass = nothing + 1, nothing
    if z_loss is not None:
        z_loss = _of_all(z_loss, DTYPE)
    mass, slopes = _slopes_of(upstream, is_bad, (peak, log_sum, label_gap, number, top_mass), targets, z_loss)
    loss = mass * log_sum + _product(targets[1], gaps, _UNIT)
    if APART or off is None:
        loss += _product(targets[0], label_gap)
    else:
        loss += _product(targets[0] - targets[1], label_gap)
    if z_loss is not None:
        loss += z_loss * (peak + log_sum) * (peak + log_sum)
    loss = tl.where(is_bad, float("nan"), loss)
    tl.store(losses + row, tl.where(counts, loss, 0.0), mask=there)
    # A row that does not count may hold a NaN, which must not reach any result, not even multiplied by 0.
    tl.store(sums + row, tl.where(counts, peak, 0.0), mask=there)
    tl.store(sums + sums_step + row, tl.where(counts, log_sum, 0.0), mask=there)
    tl.store(sums + 2 * sums_step + row, tl.where(counts, label_gap, 0.0), mask=there)
    if APART:
        tl.store(sums + 3 * sums_step + row, tl.where(counts, gaps, 0.0), mask=there)
        tl.store(sums + 4 * sums_step + row, tl.where(counts, largest, 0.0), mask=there)
    if AT_MAX or first is not None:
        tl.store(sums + 5 * sums_step + row, tl.where(counts, mean_gap, 0.0), mask=there)
    if AT_MAX:
        tl.store(sums + 6 * sums_step + row, tl.where(counts, number, 0.0), mask=there)
        tl.store(sums + 7 * sums_step + row, tl.where(counts, top_mass, 0.0), mask=there)
    if first is not None:
        tl.store(first + row, tl.where(counts & (index < num_classes), index, 0).to(tl.int64), mask=there)
    if gradient is not None:
        if ALIGN == 0:
            _write_gradient(
                gradient, classes, row, there, counts, start, 0, 0, block, label, peak, largest, slopes, None,
                softcap, AT_MAX, False, BLOCK,
            )  # fmt: skip
        else:
            # The gradient may be over the logits, of which every thread has to have read the label's.
            tl.debug_barrier()
            begin, end, span = _whole_blocks(head, num_classes, BLOCK)
            for at in tl.range(begin, end, BLOCK):
                block = _block(classes, row, counts, base, head, at, DTYPE, NUM_ROWS == 1, BLOCK)
                _write_gradient(
                    gradient, classes, row, there, counts, base, head, at, block, label, peak, largest, slopes, None,
                    softcap, AT_MAX, NUM_ROWS == 1, BLOCK,
                )  # fmt: skip
            for edge in tl.static_range(2):
                if tl.where(edge == 0, begin, span - end) > 0:
                    at = tl.where(edge == 0, 0, end)
                    block = _block(classes, row, counts, base, head, at, DTYPE, False, BLOCK)
                    _write_gradient(
                        gradient, classes, row, there, counts, base, head, at, block, label, peak, largest, slopes,
                        None, softcap, AT_MAX, False, BLOCK,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "sums_step", "ignore_index", "num_blocks", "programs_of_row"])
def backward(
    logits, labels, counted, bad, class_mask, factor, on, off, other_mass, at_max, z_loss, softcap,
    all_mass, sums, upstream, of_nll, of_lse, of_entropy, divisor, gradient,
    num_rows, num_classes, inner, row_stride, sums_step, mask_stride, factor_stride, ignore_index, num_blocks,
    programs_of_row,
    DTYPE: tl.constexpr, NUM_ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    BY_ROW: tl.constexpr, IS_WRITTEN: tl.constexpr,
):  # fmt: skip
    """The gradient from the sums: a block of classes of some rows in a program.

    Args:
        upstream: gradient with respect to the losses; with BY_ROW one for each row, otherwise one for all; None for 0.
        of_nll, of_lse, of_entropy: gradients with respect to these statistics, one for each row; None for 0.
        num_blocks: blocks of a row.
        programs_of_row: how many programs share the blocks of a row.
        BY_ROW: see `upstream`.
        IS_WRITTEN: whether `gradient` holds that for an upstream of 1 already.
        logits, labels, counted, bad, class_mask, factor, on, off, other_mass, at_max, z_loss, softcap: see `forward`.
        all_mass, sums, divisor, gradient, num_rows, num_classes, inner, row_stride, sums_step, mask_stride,
            factor_stride: see `forward`.
        ignore_index, DTYPE, NUM_ROWS, BLOCK, ALIGN: see `forward`.
    """
    AT_MAX: tl.constexpr = at_max is not None
    if IS_WRITTEN:
        if tl.load(upstream) == 1:
            return
    program = tl.program_id(0).to(tl.int64) // programs_of_row
    sums_step = program * 0 + sums_step  # in 64 bits
    row, there, start = _rows_of(num_rows, num_classes, inner, row_stride, NUM_ROWS, program)
    label, counts, is_bad = _labels_of(
        row, there, labels, counted, bad, class_mask, mask_stride, ignore_index, num_classes
    )
    nothing = tl.zeros([NUM_ROWS], DTYPE)
    share = nothing + 1
    if divisor is not None:
        share = share * _share(divisor, DTYPE)
        counts = counts & (share != 0)
        is_bad = is_bad & counts
    classes = (logits, class_mask, mask_stride, factor, factor_stride, num_classes, inner)
    targets = _targets_of(row, there, label, on, off, other_mass, at_max, factor, all_mass, DTYPE)
    number, top_mass, largest = nothing + 1, nothing, nothing
    if AT_MAX:
        largest = tl.load(sums + 4 * sums_step + row, mask=there, other=0)
        number = tl.load(sums + 6 * sums_step + row, mask=there, other=1)
        top_mass = tl.load(sums + 7 * sums_step + row, mask=there, other=0)
    peak = tl.load(sums + row, mask=there, other=0)
    log_sum = tl.load(sums + sums_step + row, mask=there, other=0)
    label_gap = tl.load(sums + 2 * sums_step + row, mask=there, other=0)
    if upstream is None:
        factor_of_row = nothing
        if of_nll is None:
            is_bad = is_bad & (row < 0)
    elif BY_ROW:
        factor_of_row = tl.load(upstream + row, mask=there, other=0).to(DTYPE)
    else:
        factor_of_row = nothing + tl.load(upstream).to(DTYPE)
    factor_of_row = factor_of_row * share
    if z_loss is not None:
        z_loss = _of_all(z_loss, DTYPE)
    if softcap is not None:
        softcap = _of_all(softcap, DTYPE)
    _, slopes = _slopes_of(factor_of_row, is_bad, (peak, log_sum, label_gap, number, top_mass), targets, z_loss)
    gap_slope = None
    if of_nll is not None or of_lse is not None or of_entropy is not None:
        slopes = _with_statistics(slopes, of_nll, of_lse, of_entropy, row, there, sums, sums_step, log_sum, label_gap)
    if of_entropy is not None:
        gap_slope = tl.load(of_entropy + row, mask=there, other=0).to(DTYPE) * tl.exp(-log_sum)
    base, head = _first_block(program, row_stride, start, ALIGN)
    for number_of_block in tl.range(tl.program_id(0) % programs_of_row, num_blocks, programs_of_row):
        at = number_of_block * BLOCK
        is_whole = (at >= head) & (at + BLOCK <= num_classes + head) & (tl.max(counts.to(tl.int32), 0) > 0)
        if is_whole and NUM_ROWS == 1 and ALIGN > 0:
            block = _block(classes, row, counts, base, head, at, DTYPE, True, BLOCK)
            _write_gradient(
                gradient, classes, row, there, counts, base, head, at, block, label, peak, largest, slopes, gap_slope,
                softcap, AT_MAX, True, BLOCK,
            )  # fmt: skip
        else:
            block = _block(classes, row, counts, base, head, at, DTYPE, False, BLOCK)
            _write_gradient(
                gradient, classes, row, there, counts, base, head, at, block, label, peak, largest, slopes, gap_slope,
                softcap, AT_MAX, False, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "sums_step", "ignore_index"])
def statistics(
    labels, counted, on, off, other_mass, factor, all_mass, z_loss, sums, first, divisor, numbers, flags,
    num_rows, num_classes, sums_step, ignore_index,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of rows from their sums, a row in a lane.

    Args:
        first: index of the first largest logit, to overwrite by the prediction.
        numbers: to write, the fields of `LossStats` that are floating-point numbers one after the other.
        flags: to write, the boolean fields of `LossStats` one after the other.
        num_rows: number of rows, and the step from one field to the next.
        BLOCK: rows of a program.
        labels, counted, on, off, other_mass, factor, all_mass, z_loss, sums, divisor, num_classes, sums_step,
            ignore_index, DTYPE: see `forward`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = row < num_rows
    step = tl.program_id(0).to(tl.int64) * 0 + num_rows
    label, counts, is_bad = _labels_of(row, there, labels, counted, None, None, 0, ignore_index, num_classes)
    if divisor is not None:
        counts = counts & (tl.zeros([BLOCK], DTYPE) + _share(divisor, DTYPE) != 0)
    peak = tl.load(sums + row, mask=there, other=0)
    log_sum = tl.load(sums + sums_step + row, mask=there, other=0)
    label_gap = tl.load(sums + 2 * sums_step + row, mask=there, other=0)
    gaps = tl.load(sums + 3 * sums_step + row, mask=there, other=0)
    target, of_others, mass, _ = _targets_of(row, there, label, on, off, other_mass, None, factor, all_mass, DTYPE)
    smoothed = (target + of_others * mass) * log_sum + _product(target, label_gap) + _product(of_others, gaps, _UNIT)
    lse = peak + log_sum
    z = lse * lse
    z = z * 0.0 if z_loss is None else z * _of_all(z_loss, DTYPE)
    nll = tl.where(is_bad, float("nan"), log_sum + label_gap)
    smoothed = tl.where(is_bad, float("nan"), smoothed)
    tl.store(numbers + row, tl.where(counts, nll, 0.0), mask=there)
    tl.store(numbers + step + row, tl.where(counts, smoothed, 0.0), mask=there)
    tl.store(numbers + 2 * step + row, tl.where(counts, z, 0.0), mask=there)
    tl.store(numbers + 3 * step + row, tl.where(counts, lse, 0.0), mask=there)
    tl.store(numbers + 4 * step + row, tl.where(counts, tl.exp(-log_sum), 0.0), mask=there)
    entropy = log_sum + tl.load(sums + 5 * sums_step + row, mask=there, other=0)
    tl.store(numbers + 5 * step + row, tl.where(counts, entropy, 0.0), mask=there)
    # Neither a bad label nor a row of NaN is correct.
    largest = tl.load(first + row, mask=there, other=0)
    correct = counts & (largest == label) & (tl.abs(nll) >= 0)
    tl.store(first + row, tl.where(counts & (tl.abs(lse) >= 0), largest, -1), mask=there)
    tl.store(flags + row, correct, mask=there)
    tl.store(flags + step + row, counts, mask=there)


# --- Sums over the rows -----------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_rows"])
def total(losses, divisor, result, num_rows, BLOCK: tl.constexpr):
    """The sum of the losses, by the divisor unless it is None; 0 if that is 0."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], losses.dtype.element_ty)
    for at in range(0, num_rows, BLOCK):
        sums += tl.load(losses + at + lane, mask=at + lane < num_rows, other=0)
    whole = tl.sum(sums, 0)
    if divisor is not None:
        value = tl.zeros_like(whole) + _of_all(divisor, losses.dtype.element_ty)
        whole = tl.where(value == 0, 0.0, _quotient(whole, tl.where(value == 0, 1.0, value)))
    tl.store(result, whole)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def denominator(labels, counted, weights, result, num_rows, num_classes, ignore_index, BLOCK: tl.constexpr):
    """The number of rows that count, or the sum of the weights of their labels. A bad label weighs 1."""
    DTYPE: tl.constexpr = result.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], DTYPE)
    for at in range(0, num_rows, BLOCK):
        counts = at + lane < num_rows
        given = tl.load(labels + at + lane, mask=counts, other=0).to(tl.int64)
        if ignore_index is not None:
            counts = counts & (given != ignore_index)
        if counted is not None:
            counts = counts & (tl.load(counted + at + lane, mask=counts, other=0) != 0)
        weight = tl.full([BLOCK], 1, DTYPE)
        if weights is not None:
            is_class = (given >= 0) & (given < num_classes)
            weight = tl.load(weights + given, mask=counts & is_class, other=1).to(DTYPE)
        sums += tl.where(counts, weight, 0.0)
    tl.store(result, tl.sum(sums, 0))
