// The operations of augment_bytes.py, with the same integers, so that both make the same bytes.
// Loops are plain, and 16 bits wide where numbers allow: the compiler turns them into vector instructions.

#ifndef __clang__
// torch switches this off, since its own code is vector instructions already. It must precede all that is inlined.
#pragma GCC optimize("O3", "tree-loop-vectorize")
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using i16 = std::int16_t;
using i64 = std::int64_t;

static const i64 BLOCK = 4096;  // pixels, of which the sums of a blur stay in the nearest cache

static inline u16 gray_of(u16 r, u16 g, u16 b) { return u16(r * 77 + g * 150 + b * 29 + 128) >> 8; }

static inline u8 darker(u16 x, u16 scale, u16 other) { return u16(x * scale + other) >> 8; }

static inline u8 brighter(u16 x, u16 scale, u16 other) {
    const u16 product = x * scale;
    return std::min<u16>(u16(std::max(product, other) - other + 64) >> 7, 255);
}

static void split_channels(const u8* crop, u8* x, i64 channels, i64 size, bool flip) {
    const i64 area = size * size;
    for (i64 row = 0; row < size; row++, crop += size * channels, x += size) {
        if (channels == 3) {  // a stride that the compiler knows
            u8 *__restrict r = x, *__restrict g = x + area, *__restrict b = x + 2 * area;
            for (i64 i = 0; i < size; i++) r[i] = crop[3 * i], g[i] = crop[3 * i + 1], b[i] = crop[3 * i + 2];
        } else
            for (i64 c = 0; c < channels; c++)
                for (i64 i = 0; i < size; i++) x[c * area + i] = crop[i * channels + c];
        if (flip)
            for (i64 c = 0; c < channels; c++) std::reverse(x + c * area, x + c * area + size);
    }
}

static void blend_with_level(u8* x, i64 count, u16 scale, u16 one, u16 level) {
    if (one == 256) {
        const u16 other = level * (256 - scale) + 128;
        for (i64 i = 0; i < count; i++) x[i] = darker(x[i], scale, other);
    } else {
        const u16 other = level * (scale - 128);
        for (i64 i = 0; i < count; i++) x[i] = brighter(x[i], scale, other);
    }
}

static i64 sum(const u8* x, i64 count) {
    std::uint32_t total = 0;
    for (i64 i = 0; i < count; i++) total += x[i];
    return total;
}

static void contrast(u8* x, i64 channels, i64 area, u16 scale, u16 one) {
    if (channels == 3) {
        const i64 gray = 77 * sum(x, area) + 150 * sum(x + area, area) + 29 * sum(x + 2 * area, area);
        blend_with_level(x, 3 * area, scale, one, (gray + 128 * area) / (256 * area));
        return;
    }
    for (i64 c = 0; c < channels; c++)
        blend_with_level(x + c * area, area, scale, one, (2 * sum(x + c * area, area) + area) / (2 * area));
}

static void saturation(u8* __restrict r, u8* __restrict g, u8* __restrict b, i64 area, u16 scale, u16 one) {
    if (one == 256)
        for (i64 i = 0; i < area; i++) {
            const u16 other = gray_of(r[i], g[i], b[i]) * (256 - scale) + 128;
            r[i] = darker(r[i], scale, other), g[i] = darker(g[i], scale, other), b[i] = darker(b[i], scale, other);
        }
    else
        for (i64 i = 0; i < area; i++) {
            const u16 other = gray_of(r[i], g[i], b[i]) * (scale - 128);
            r[i] = brighter(r[i], scale, other), g[i] = brighter(g[i], scale, other);
            b[i] = brighter(b[i], scale, other);
        }
}

static inline i16 excess_of(i16 difference, i16 most) {
    return difference - std::min<i16>(std::max<i16>(difference, -most), most);
}

static void turn_hue(u8* __restrict x, u8* __restrict y, u8* __restrict z, i64 area, u16 scale, i16 sign) {
    for (i64 i = 0; i < area; i++) {
        const i16 r = x[i], g = y[i], b = z[i];
        const i16 high = std::max(std::max(r, g), b), low = std::min(std::min(r, g), b), chroma = high - low;
        const i16 most = chroma - i16(u16(u16(chroma) * scale + 128) >> 8);
        x[i] = std::min(std::max<i16>(r - sign * excess_of(g - b, most), low), high);
        y[i] = std::min(std::max<i16>(g - sign * excess_of(b - r, most), low), high);
        z[i] = std::min(std::max<i16>(b - sign * excess_of(r - g, most), low), high);
    }
}

// Blur the ends of all lines. `along` and `across` are the steps in memory to the next pixel of a line and to the next
// line. Weights are fractions of 32768 in floats, whose sums are exact.
static void blur_ends(const u8* x, u8* out, i64 size, i64 along, i64 across, const float* ends, i64 rows, i64 taps) {
    float first[BLOCK], last[BLOCK];
    for (i64 row = 0; row < rows; row++) {
        std::fill(first, first + size, 16384.0f), std::fill(last, last + size, 16384.0f);
        for (i64 tap = 0; tap < taps; tap++) {
            const float weight = ends[row * taps + tap];
            const u8 *begin = x + tap * along, *end = x + (size - 1 - tap) * along;
            for (i64 i = 0; i < size; i++) first[i] += weight * begin[i * across], last[i] += weight * end[i * across];
        }
        u8 *begin = out + row * along, *end = out + (size - 1 - row) * along;
        for (i64 i = 0; i < size; i++) {
            begin[i * across] = u8(first[i] / 32768.0f);
            end[i * across] = u8(last[i] / 32768.0f);
        }
    }
}

static void blur_along(const u8* x, u8* out, i64 size, i64 step, const i64* weights, i64 reach) {
    u16 total[BLOCK];
    const i64 stop = (size * size) - reach * step;
    for (i64 start = reach * step; start < stop; start += BLOCK) {
        const i64 count = std::min(BLOCK, stop - start);
        const u8* middle = x + start;
        const u16 own = weights[0];
        for (i64 i = 0; i < count; i++) total[i] = middle[i] * own + 128;
        for (i64 distance = 1; distance <= reach; distance++) {
            const u8 *before = middle - distance * step, *after = middle + distance * step;
            const u16 weight = weights[distance];
            for (i64 i = 0; i < count; i++) total[i] += u16(u16(before[i] + after[i]) * weight);
        }
        for (i64 i = 0; i < count; i++) out[start + i] = total[i] >> 8;
    }
}

// Replace a crop [size, size, channels] by its view [channels, size, size]. `work` has room for one more.
// `numbers`: flip, gray, solarize, number of jitter steps, three numbers for each, number of weights, the weights, and
// the rows and columns of `ends`.
extern "C" void augment_bytes(u8* x, u8* work, i64 channels, i64 size, const i64* numbers, const float* ends) {
    const i64 area = size * size;
    const bool flip = numbers[0], gray = numbers[1], solarize = numbers[2];
    std::memcpy(work, x, channels * area);
    split_channels(work, x, channels, size, flip);
    const i64 steps = numbers[3];
    const i64* step = numbers + 4;
    for (i64 i = 0; i < steps; i++, step += 3) {
        u8 *r = x, *g = x + area, *b = x + 2 * area;
        if (step[0] == 0) blend_with_level(x, channels * area, step[1], step[2], 0);
        if (step[0] == 1) contrast(x, channels, area, step[1], step[2]);
        if (step[0] == 2) saturation(r, g, b, area, step[1], step[2]);
        if (step[0] == 3) turn_hue(r, g, b, area, step[1], step[2]);
        if (step[0] == 4) std::rotate(x, x + step[1] * area, x + 3 * area);
    }
    const i64 filled = channels;
    if (gray) {
        for (i64 i = 0; i < area; i++) x[i] = gray_of(x[i], x[area + i], x[2 * area + i]);
        channels = 1;
    }
    const i64 weights = step[0], rows = step[1 + weights], taps = step[2 + weights];
    if (rows)
        for (i64 c = 0; c < channels; c++) {
            u8 *plane = x + c * area, *other = work + c * area;
            if (weights) blur_along(plane, other, size, 1, step + 1, weights - 1);
            blur_ends(plane, other, size, 1, size, ends, rows, taps);
            if (weights) blur_along(other, plane, size, size, step + 1, weights - 1);
            blur_ends(other, plane, size, size, 1, ends, rows, taps);
        }
    if (solarize)
        for (i64 i = 0; i < channels * area; i++) x[i] = x[i] < 128 ? x[i] : 255 - x[i];
    for (i64 c = channels; c < filled; c++) std::memcpy(x + c * area, x, area);
}

// Fill `out` with (x - mean) / std, plane by plane. The planes of an image's channels follow each other.
extern "C" void normalize_bytes(
    const u8* x, float* out, const float* mean, const float* std, i64 planes, i64 channels, i64 area) {
    for (i64 plane = 0; plane < planes; plane++, x += area, out += area) {
        const float middle = mean[plane % channels], spread = std[plane % channels];
        for (i64 i = 0; i < area; i++) out[i] = (float(x[i]) - middle) / spread;
    }
}
