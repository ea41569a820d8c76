// What formats/sums.py, scale_search.py and affine_search.py do in torch, in one loop each: for every group of weights
// x with importance w, [size, groups] float32, groups side by side in vectors. Code q of a weight is the level nearest
// to (x - offset) * inverse. And `diffuse`, the inner loop of error feedback, rows side by side.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
typedef float Lanes __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Lanes __attribute__((vector_size(32)));
#else
typedef float Lanes __attribute__((vector_size(16)));
#endif

template <class V> static V load(const float *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V> static void store(float *to, V v) { std::memcpy(to, &v, sizeof v); }

// V is Lanes or float. NaN becomes `low`, so that no place is outside of a table.
template <class V> static V clamp(V v, V low, V high) {
    v = v > low ? v : low;
    return v < high ? v : high;
}

template <class V> struct BitsOf;
template <> struct BitsOf<float> { typedef int type; };
template <> struct BitsOf<Lanes> { typedef int type __attribute__((vector_size(sizeof(Lanes)))); };

// The nearest number of sixteen bits, halves to even, none beyond the largest.
template <class V> static V half(V v) {
    v = clamp(v, V{} - 65504.0f, V{} + 65504.0f);
    typename BitsOf<V>::type bits;
    std::memcpy(&bits, &v, sizeof v);
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF;
    V normal;
    std::memcpy(&normal, &bits, sizeof v);
    const V tiny = v < V{} ? (v - 0.5f) + 0.5f : (v + 0.5f) - 0.5f; // a multiple of 2^-24
    return (v < V{} ? -v : v) < 6.103515625e-5f ? tiny : normal;
}

// The nearest integer, halves to even, of numbers below 2^22.
template <class V> static V round(V v) { return (v + 12582912.0f) - 12582912.0f; }

// v where it is finite, else `other`.
template <class V> static V finite_or(V v, V other) { return v - v == V{} ? v : other; }

// The level nearest to v; its code goes into `codes`, as many as V has lanes, unless that is null.
struct Integers {
    float low, high;

    template <class V> V beside(V level, long steps) const {
        return clamp(level + static_cast<float>(steps), V{} + low, V{} + high);
    }

    template <class V> V nearest(V v, signed char *codes = nullptr) const {
        const V level = round(clamp(v, V{} + low, V{} + high));
        constexpr int lanes = sizeof(V) / sizeof(float);
        float levels[lanes];
        if (codes) store(levels, level);
        for (int lane = 0; codes && lane < lanes; lane++)
            codes[lane] = static_cast<signed char>(static_cast<int>(levels[lane]));
        return level;
    }
};

struct Codebook {
    const float *levels; // by cell of the line, see `cells` of formats/block.py
    float low, high, per_unit;
    const signed char *codes = nullptr; // by cell as well

    template <class V> V cell(V v) const {
        v = clamp(v * per_unit, V{} + low, V{} + high);
        const V below = round(v);
        return (below < v ? below + 1.0f : below) - low;
    }

    template <class V> V nearest(V v, signed char *written = nullptr) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        float cells[lanes], found[lanes];
        store(cells, cell(v));
        for (int lane = 0; lane < lanes; lane++) {
            const int at = static_cast<int>(cells[lane]);
            found[lane] = levels[at];
            if (written) written[lane] = codes[at];
        }
        return load<V>(found);
    }

    template <class V> V beside(V level, long steps) const {
        constexpr int lanes = sizeof(V) / sizeof(float);
        float places[lanes], found[lanes];
        store(places, cell(level));
        for (int lane = 0; lane < lanes; lane++) {
            long at = static_cast<long>(places[lane]);
            const float own = levels[at];
            while (levels[at] == own && steps && 0 <= at + steps && at + steps <= high - low) at += steps;
            found[lane] = levels[at];
        }
        return load<V>(found);
    }
};

// A codebook of so few cells that a vector of them is looked up in registers.
struct Small : Codebook {
    static constexpr long most = 3 * sizeof(Lanes) / sizeof(float);
    Lanes tables[3];

    explicit Small(const Codebook &book) : Codebook(book) {
        float padded[most] = {};
        std::memcpy(padded, levels, static_cast<long>(high - low + 1.0f) * sizeof(float));
        std::memcpy(tables, padded, sizeof padded);
    }

    template <class V> V nearest(V v, signed char *written = nullptr) const { return Codebook::nearest(v, written); }

#if defined(__AVX512F__)
    Lanes nearest(Lanes v) const {
        const __m512i at = _mm512_cvtps_epi32((__m512)cell(v));
        const __m512 early = _mm512_permutex2var_ps((__m512)tables[0], at, (__m512)tables[1]);
        const __m512 late = _mm512_permutexvar_ps(at, (__m512)tables[2]);
        return (Lanes)_mm512_mask_blend_ps(_mm512_cmpge_epi32_mask(at, _mm512_set1_epi32(32)), early, late);
    }
#endif
};

struct Weights {
    const float *x, *importance;
    long size, stride;

    template <class V> V value(long i) const { return load<V>(x + i * stride); }
    template <class V> V weight(long i) const { return load<V>(importance + i * stride); }
};

template <class V> struct Moments {
    V wq{}, wqx{}, wqq{};
};

// Of weights less `origin`, and codes less `code`.
template <class V, class L>
static Moments<V> moments(const Weights &of, const L &levels, V inverse, V offset, V code = V{}, V origin = V{}) {
    Moments<V> sums;
    for (long i = 0; i < of.size; i++) {
        const V x = of.value<V>(i) - origin, q = levels.nearest((x - offset) * inverse) - code;
        const V wq = of.weight<V>(i) * q;
        sums.wq += wq;
        sums.wqx += wq * x;
        sums.wqq += wq * q;
    }
    return sums;
}

template <class V, class L> static V squared_error(const Weights &of, const L &levels, V inverse, V offset, V scale) {
    V total{};
    for (long i = 0; i < of.size; i++) {
        const V x = of.value<V>(i), off = levels.nearest((x - offset) * inverse) * scale + offset - x;
        total += of.weight<V>(i) * (off * off);
    }
    return total;
}

// scale_search.search_scale
template <class V, class L>
static V search_one(const Weights &of, const L &levels, const float *reach, long reaches, const float *beside, long steps,
                    V &top) {
    V low = of.value<V>(0), high = low;
    V heaviest = low, weighs = of.weight<V>(0) * low * low;
    for (long i = 1; i < of.size; i++) {
        const V x = of.value<V>(i), here = of.weight<V>(i) * x * x;
        low = x < low ? x : low;
        high = x > high ? x : high;
        heaviest = here > weighs ? x : heaviest;
        weighs = here > weighs ? here : weighs;
    }
    top = -low > high ? low : high;
    V per_weight = finite_or(1.0f / top, V{});
    V chosen = top / reach[0], gain{}, anchor = V{} + reach[0];
    auto try_on = [&](V at) {
        const Moments<V> sums = moments(of, levels, per_weight * at, V{});
        const V scale = sums.wqx / sums.wqq, lowered = sums.wqx * scale;
        const auto better = lowered > gain;
        chosen = better ? scale : chosen;
        anchor = better ? at : anchor;
        gain = better ? lowered : gain;
    };
    for (long k = 0; k < reaches; k++) try_on(V{} + reach[k]);
    for (long k = 0; k < steps; k++) {
        const V best = anchor;
        try_on(best - beside[k]);
        try_on(best + beside[k]);
    }
    const V level = levels.nearest(heaviest * finite_or(1.0f / chosen, V{}));
    per_weight = finite_or(1.0f / heaviest, V{});
    for (long steps = -1; steps <= 1; steps++) try_on(levels.beside(level, steps));
    return chosen;
}

struct Half {
    template <class V> V operator()(V v) const { return half(v); }
};

// Halves of NVFP4's UE4M3, of |v|: three bits of mantissa down to 2^-7, multiples of 2^-10 below; halves go down.
struct HalfUE4M3 {
    template <class V> V operator()(V v) const {
        v = clamp(v < V{} ? -v : v, V{}, V{} + 224.0f);
        typename BitsOf<V>::type bits;
        std::memcpy(&bits, &v, sizeof v);
        bits = (bits + 0x7FFFF) & ~0xFFFFF;
        V normal;
        std::memcpy(&normal, &bits, sizeof v);
        const V steps = v * 1024.0f, nearest = round(steps);
        const V tiny = (nearest - steps == V{} + 0.5f ? nearest - 1.0f : nearest) * 0.0009765625f;
        return v < 0.0078125f ? tiny : normal;
    }
};

// scale_search.best_scale: of the plain rule, what was found, and least squares on the codes it gives, as `stored`.
template <class V, class L, class S>
static V best_stored(const Weights &of, const L &levels, const float *reach, long reaches, const float *beside, long steps,
                     S stored) {
    V top;
    const V found = search_one(of, levels, reach, reaches, beside, steps, top);
    const Moments<V> sums = moments(of, levels, finite_or(1.0f / found, V{}), V{});
    const V candidates[] = {top / reach[0], found, sums.wqq > V{} ? sums.wqx / sums.wqq : found};
    V best{}, least{};
    for (int k = 0; k < 3; k++) {
        const V scale = stored(candidates[k]), error = squared_error(of, levels, finite_or(1.0f / scale, V{}), V{}, scale);
        const auto better = error < least;
        best = k == 0 ? scale : better ? scale : best;
        least = k == 0 ? error : better ? error : least;
    }
    return best;
}

// affine_search.search_affine; tries: pairs of codes wider, and codes cut off below.
template <class V>
static void search_two(const Weights &of, float high, bool below_zero, const float *tries, long count, V &scale,
                          V &offset) {
    V low = of.value<V>(0), top = low, origin = low, most = of.weight<V>(0), w{}, wx{};
    for (long i = 1; i < of.size; i++) {
        const V x = of.value<V>(i), weight = of.weight<V>(i);
        low = x < low ? x : low;
        top = x > top ? x : top;
        origin = weight > most ? x : origin;
        most = weight > most ? weight : most;
    }
    for (long i = 0; i < of.size; i++) {
        w += of.weight<V>(i);
        wx += of.weight<V>(i) * (of.value<V>(i) - origin);
    }
    const Integers levels{0.0f, high};
    if (below_zero) low = low < V{} ? low : V{}, top = top > V{} ? top : V{};
    const V span = top - low;
    V gain = V{} - std::numeric_limits<float>::infinity();
    scale = span / high, offset = low;
    auto try_on = [&](V step, V shift) {
        const V inverse = finite_or(1.0f / step, V{}), code = levels.nearest((origin - shift) * inverse);
        const Moments<V> sums = moments(of, levels, inverse, shift - origin, code, origin);
        step = (sums.wqx * w - sums.wq * wx) / (sums.wqq * w - sums.wq * sums.wq);
        shift = (wx - step * sums.wq) / w - step * code + origin;
        if (below_zero) {
            const V along = sums.wqx + origin * sums.wq + code * (wx + origin * w);
            const V power = sums.wqq + 2.0f * code * sums.wq + code * code * w;
            step = shift > V{} ? along / power : step;
            shift = shift > V{} ? V{} : shift;
        }
        const V off = shift - origin + step * code, explained = step * sums.wqx + off * wx;
        const V reached = 2.0f * explained - (step * step * sums.wqq + 2.0f * step * off * sums.wq + off * off * w);
        const auto better = (reached > gain) & (step > V{}) & (shift - shift == V{});
        scale = better ? step : scale;
        offset = better ? shift : offset;
        gain = better ? reached : gain;
    };
    for (long k = 0; k < count; k++) {
        const V step = span / (high + tries[2 * k]);
        try_on(step, low + tries[2 * k + 1] * step);
    }
    for (int k = 0; k < 2; k++) try_on(scale, offset);
}

// `each`(V{}, first) for groups first, first + 1, … as many as V has lanes.
template <class F> static void over_groups(long groups, F each) {
    const long lanes = sizeof(Lanes) / sizeof(float);
    long first = 0;
    for (; first + lanes <= groups; first += lanes) each(Lanes{}, first);
    for (; first < groups; first++) each(0.0f, first);
}

// The same with these groups side by side in the nearest cache: `each`(V{}, first, weights).
template <class F> static void over_tiles(const Weights &all, long groups, F each) {
    std::vector<float> x(all.size * sizeof(Lanes) / sizeof(float)), importance(x.size());
    over_groups(groups, [&](auto zero, long first) {
        using V = decltype(zero);
        const long lanes = sizeof(V) / sizeof(float);
        const Weights from{all.x + first, all.importance + first, all.size, all.stride};
        for (long i = 0; i < all.size; i++) {
            store(&x[i * lanes], from.value<V>(i));
            store(&importance[i * lanes], from.weight<V>(i));
        }
        each(zero, first, Weights{x.data(), importance.data(), all.size, lanes});
    });
}

// The same of groups that lie one after another; group n has the importance of n modulo `shared`.
template <class F> static void over_rows(long size, long groups, const float *x, long shared, const float *importance, F each) {
    std::vector<float> tile(size * sizeof(Lanes) / sizeof(float)), weights(tile.size());
    over_groups(groups, [&](auto zero, long first) {
        using V = decltype(zero);
        constexpr long lanes = sizeof(V) / sizeof(float);
        for (long lane = 0; lane < lanes; lane++) {
            const float *from = x + (first + lane) * size, *weight = importance + (first + lane) % shared * size;
            for (long i = 0; i < size; i++) tile[i * lanes + lane] = from[i], weights[i * lanes + lane] = weight[i];
        }
        each(zero, first, Weights{tile.data(), weights.data(), size, lanes});
    });
}

template <class F> static void with_levels(const float *table, float low, float high, float per_unit, F use) {
    const Codebook book{table, low, high, per_unit};
    if (!table)
        use(Integers{low, high});
    else if (high - low < Small::most)
        use(Small(book));
    else
        use(book);
}

// `table`: null for integers low … high; else a codebook's levels by cell, for cells low … high, `per_unit` to a unit.
// Where `scales` are given, `sums` are errors [groups], else moments [3, groups].
extern "C" void group_sums(long size, long groups, const float *x, const float *importance, const float *table,
                           float low, float high, float per_unit, const float *inverse, const float *offset,
                           const float *code, const float *scales, float *sums) {
    with_levels(table, low, high, per_unit, [&](auto levels) {
        over_groups(groups, [&](auto zero, long first) {
            using V = decltype(zero);
            const Weights of{x + first, importance + first, size, groups};
            const V factor = load<V>(inverse + first), shift = load<V>(offset + first);
            if (scales) {
                store(sums + first, squared_error(of, levels, factor, shift, load<V>(scales + first)));
                return;
            }
            const Moments<V> found = moments(of, levels, factor, shift, code ? load<V>(code + first) : V{});
            store(sums + first, found.wq);
            store(sums + groups + first, found.wqx);
            store(sums + 2 * groups + first, found.wqq);
        });
    });
}

extern "C" void search_scale(long size, long groups, const float *x, const float *importance, const float *table,
                             float low, float high, float per_unit, const float *reach, long reaches,
                             const float *beside, long steps, float *scales) {
    with_levels(table, low, high, per_unit, [&](auto levels) {
        over_tiles(Weights{x, importance, size, groups}, groups, [&](auto zero, long first, const Weights &of) {
            auto top = zero;
            store(scales + first, search_one(of, levels, reach, reaches, beside, steps, top));
        });
    });
}

extern "C" void search_affine(long size, long groups, const float *x, const float *importance, float high,
                              bool below_zero, const float *tries, long count, float *scales, float *offsets) {
    over_tiles(Weights{x, importance, size, groups}, groups, [&](auto zero, long first, const Weights &of) {
        auto scale = zero, offset = zero;
        search_two(of, high, below_zero, tries, count, scale, offset);
        store(scales + first, scale);
        store(offsets + first, offset);
    });
}

// x [groups, size], importance [shared, size]; scales are fp16, or halves of UE4M3.
extern "C" void best_stored_scale(long size, long groups, const float *x, long shared, const float *importance,
                                  const float *table, float low, float high, float per_unit, const float *reach,
                                  long reaches, const float *beside, long steps, bool ue4m3, float *scales) {
    with_levels(table, low, high, per_unit, [&](auto levels) {
        over_rows(size, groups, x, shared, importance, [&](auto zero, long first, const Weights &of) {
            auto best = [&](auto stored) {
                return best_stored<decltype(zero)>(of, levels, reach, reaches, beside, steps, stored);
            };
            store(scales + first, ue4m3 ? best(HalfUE4M3{}) : best(Half{}));
        });
    });
}

// Grid.nearest for integers: x [groups, size], codes alike; offset may be null.
extern "C" void nearest_integers(long size, long groups, const float *x, const float *inverse, const float *offset,
                                 float low, float high, signed char *codes) {
    for (long group = 0; group < groups; group++) {
        const float factor = inverse[group], shift = offset ? offset[group] : 0.0f;
        for (long i = group * size; i < (group + 1) * size; i++)
            codes[i] = static_cast<signed char>(static_cast<int>(round(clamp((x[i] - shift) * factor, low, high))));
    }
}

// microscaling.MX: of groups [groups, size] the power of two e − 127, in three about 2^(⌊log2 max|x|⌋ − emax), for which
// `unit` · 2^(e − 128) · level is nearest.
extern "C" void best_exponent(long size, long groups, const float *x, long shared, const float *importance,
                              const float *table, float low, float high, float per_unit, long largest, float unit,
                              unsigned char *exponents) {
    with_levels(table, low, high, per_unit, [&](auto levels) {
        over_rows(size, groups, x, shared, importance, [&](auto zero, long first, const Weights &of) {
            using V = decltype(zero);
            constexpr long lanes = sizeof(V) / sizeof(float);
            V top{};
            for (long i = 0; i < of.size; i++) {
                const V v = of.value<V>(i), magnitude = v < V{} ? -v : v;
                top = magnitude > top ? magnitude : top;
            }
            float peaks[lanes], scales[lanes], least[lanes], errors[lanes];
            store(peaks, top);
            int plain[lanes];
            for (long lane = 0; lane < lanes; lane++) {
                std::frexp(peaks[lane], &plain[lane]);
                plain[lane] += 126 - static_cast<int>(largest);
            }
            for (int step : {0, 1, -1}) {
                int tried[lanes];
                for (long lane = 0; lane < lanes; lane++) {
                    tried[lane] = plain[lane] + step < 0 ? 0 : plain[lane] + step > 254 ? 254 : plain[lane] + step;
                    scales[lane] = std::ldexp(unit, tried[lane] - 128);
                }
                const V scale = load<V>(scales);
                store(errors, squared_error(of, levels, finite_or(1.0f / scale, V{}), V{}, scale));
                for (long lane = 0; lane < lanes; lane++)
                    if (step == 0 || errors[lane] < least[lane]) {
                        least[lane] = errors[lane];
                        exponents[first + lane] = static_cast<unsigned char>(tried[lane]);
                    }
            }
        });
    });
}

// scale_search.best_ternary_scale of groups [groups, size]. Weights are sorted into bins by size; where the largest of
// them end best, by bins, is where two steps of least squares begin.
extern "C" void best_ternary_scale(long size, long groups, const float *x, long shared, const float *importance,
                                   float *scales) {
    constexpr int bins = 256;
    std::vector<float> magnitudes(size);
    for (long group = 0; group < groups; group++) {
        const float *v = x + group * size, *w = importance + group % shared * size;
        float top = 0.0f, along[bins] = {}, power[bins] = {};
        for (long i = 0; i < size; i++) {
            magnitudes[i] = std::fabs(v[i]);
            top = magnitudes[i] > top ? magnitudes[i] : top;
        }
        const float per_bin = finite_or((bins - 1) / top, 0.0f);
        for (long i = 0; i < size; i++) {
            const int bin = static_cast<int>(clamp(magnitudes[i] * per_bin, 0.0f, bins - 1.0f));
            along[bin] += w[i] * magnitudes[i], power[bin] += w[i];
        }
        float best = 0.0f, scale = 0.0f, sum = 0.0f, weight = 0.0f;
        for (int bin = bins - 1; bin >= 0; bin--) {
            sum += along[bin], weight += power[bin];
            const float gain = sum * sum / weight;
            if (gain > best) best = gain, scale = sum / weight;
        }
        for (int step = 0; step < 2; step++) {
            constexpr long lanes = sizeof(Lanes) / sizeof(float);
            Lanes sums{}, weights{};
            long i = 0;
            for (; i + lanes <= size; i += lanes) {
                const Lanes magnitude = load<Lanes>(&magnitudes[i]);
                const Lanes taken = magnitude > scale / 2 ? load<Lanes>(w + i) : Lanes{};
                sums += taken * magnitude, weights += taken;
            }
            sum = weight = 0.0f;
            for (long lane = 0; lane < lanes; lane++) sum += sums[lane], weight += weights[lane];
            for (; i < size; i++)
                if (magnitudes[i] > scale / 2) sum += w[i] * magnitudes[i], weight += w[i];
            scale = weight > 0.0f ? sum / weight : scale;
        }
        scales[group] = scale;
    }
}

// magr.clipped of rounding/magr.py: t of rows [groups, size], for what each has `paid`. Newton's steps from below on a
// convex function whose slope is how many weights are larger.
extern "C" void peaks(long size, long groups, const float *rows, const float *paid, float *found) {
    constexpr long lanes = sizeof(Lanes) / sizeof(float);
    for (long group = 0; group < groups; group++) {
        const float *row = rows + group * size;
        float peak = 0.0f;
        for (;;) {
            Lanes sums{}, counts{};
            long i = 0;
            for (; i + lanes <= size; i += lanes) {
                Lanes v = load<Lanes>(row + i);
                v = v < Lanes{} ? -v : v;
                sums += v > peak ? v : Lanes{};
                counts += v > peak ? Lanes{} + 1.0f : Lanes{};
            }
            float sum = 0.0f, count = 0.0f;
            for (long lane = 0; lane < lanes; lane++) sum += sums[lane], count += counts[lane];
            for (; i < size; i++) {
                const float v = row[i] < 0.0f ? -row[i] : row[i];
                if (v > peak) sum += v, count += 1.0f;
            }
            const float next = (sum - paid[group]) / count;
            if (!(next > peak)) break; // and where no weight is larger: not a number
            peak = next;
        }
        found[group] = peak;
    }
}

// ColumnGrid.diffuse of rounding/sweep.py: rounds the first `columns` of `reach` columns `work` [reach, rows] one after
// another and takes `feedback`[t, s] times what that did wrong from all later ones, s > t.
//
// places [columns]:          whose codes [.., rows] and whose group of `size` columns, with scales [groups, rows]
// anchors [columns, rows]:   what is right instead of `work`; or null
// first [rows]:              what the first column's codes are chosen by; or null
extern "C" void diffuse(long columns, long reach, long rows, float *work, const float *anchors, const float *feedback,
                        long stride, const float *first, const std::int64_t *places, long begin, long size, const float *scales,
                        const float *inverses, const float *offsets, const float *table, const signed char *by_cell,
                        float low, float high, float per_unit, signed char *codes, float *errors) {
    std::vector<float> tile(reach * sizeof(Lanes) / sizeof(float));
    auto run = [&](auto levels) {
        over_groups(rows, [&](auto zero, long row) {
            using V = decltype(zero);
            constexpr long lanes = sizeof(V) / sizeof(float);
            for (long t = 0; t < reach; t++) store(&tile[t * lanes], load<V>(work + t * rows + row));
            for (long t = 0; t < columns; t++) {
                const long at = (places[t] - begin) / size * rows + row;
                const V v = load<V>(&tile[t * lanes]), chosen = first && t == 0 ? load<V>(first + row) : v;
                const V shift = offsets ? load<V>(offsets + at) : V{};
                const V level = levels.nearest((chosen - shift) * load<V>(inverses + at), codes + places[t] * rows + row);
                const V stored = level * load<V>(scales + at) + shift;
                const V error = (anchors ? load<V>(anchors + t * rows + row) : v) - stored;
                store(errors + t * rows + row, error);
                const float *row_of_feedback = feedback + t * stride;
                for (long s = t + 1; s < reach; s++)
                    store(&tile[s * lanes], load<V>(&tile[s * lanes]) - row_of_feedback[s] * error);
            }
            for (long t = columns; t < reach; t++) store(work + t * rows + row, load<V>(&tile[t * lanes]));
        });
    };
    if (table)
        run(Codebook{table, low, high, per_unit, by_cell});
    else
        run(Integers{low, high});
}
