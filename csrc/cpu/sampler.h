// One token a row by Gumbel-max, with exact truncation and without a sort: the very tokens of kernels/sampler.py.
//
// The token with the highest score wins, logit / T + noise. Noise of n or more takes a uniform number of e^-n or less.
// So groups of 64 tokens that cannot win are passed over, and of the others the random words are compared with one
// bound, made of the group's highest logit and the best score so far. Noise is computed for the few that pass. The
// bounds leave room for their own errors; what passes is decided in the reference's arithmetic.
//
// Truncation keeps the tokens whose logit is above a bound. min-p and top-k give theirs at once, by bisection. top-p
// raises it draw by draw: a token with too much mass above it is not in the nucleus; the next draw is from above it.
#pragma once

#include <memory>

#include "kernels.h"
#include "philox.h"

namespace S1_ISA {

// float32 numbers in the order of integers, and back. (-0 comes before 0: nothing lies between them.)
inline int32_t order_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float float_of(int32_t order) {
    const int32_t bits = order ^ ((order >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// The largest float in [low, high) at which side(float) is negative, or any at which it is 0. It never falls; at `low`
// it counts as negative, at `high` as positive.
template <class Side>
inline float bisect(float low, float high, Side&& side) {
    int64_t from = order_of(low), to = order_of(high);
    while (to - from > 1) {
        const int64_t middle = (from + to) >> 1;
        const int64_t at = side(float_of(static_cast<int32_t>(middle)));
        if (at == 0) return float_of(static_cast<int32_t>(middle));
        (at < 0 ? from : to) = middle;
    }
    return float_of(static_cast<int32_t>(from));
}

// Counts, lane by lane, of `size` floats above a bound; whole vectors of them.
inline Ints count_above(const float* x, int64_t size, float bound) {
    Ints counts{};
    for (int64_t i = 0; i < size; i += kLanes) counts -= load<Floats>(x + i) > bound;
    return counts;
}

inline int64_t sum(Ints counts) {
    int64_t total = 0;
    for (int i = 0; i < kLanes; ++i) total += counts[i];
    return total;
}

// Index of the first maximum; 0 if all are -inf.
inline int64_t first_maximum(const float* x, int64_t size) {
    constexpr int64_t kBlock = 8 * kLanes;
    float best = -INFINITY;
    int64_t i = 0, first = 0;
    for (; i + kBlock <= size; i += kBlock) {
        Floats tops[4];
        for (int v = 0; v < 4; ++v) tops[v] = load<Floats>(x + i + v * kLanes);
        for (int v = 0; v < 4; ++v) tops[v] = max(tops[v], load<Floats>(x + i + (v + 4) * kLanes));
        const float top = largest(max(max(tops[0], tops[1]), max(tops[2], tops[3])));
        if (top > best) best = top, first = i;
    }
    for (; i < size; ++i) {
        if (x[i] > best) best = x[i], first = i;
    }
    for (; first < size; ++first) {
        if (x[first] == best) return first;
    }
    return 0;
}

// Draws from rows of one vocabulary, one after the other. A logit's mass is its probability over that of the highest.
class RowSampler {
   public:
    explicit RowSampler(int64_t vocab)
        : vocab_(vocab), full_groups_(vocab / kGroup), groups_(full_groups_ + 1),
          padded_groups_((groups_ + kLanes - 1) / kLanes * kLanes), maxima_(new float[padded_groups_]),
          masses_(new float[padded_groups_]), live_(new int64_t[groups_]) {
        for (int64_t g = groups_; g < padded_groups_; ++g) maxima_[g] = -INFINITY;
    }

    // At a temperature above 0; 0 of top_k and min_p and 1 of top_p are off.
    int64_t sample(const float* logits, float temperature, int64_t top_k, float top_p, float min_p,
                   const Philox& noise) {
        read(logits, temperature);
        if (!__builtin_isfinite(scaled_top_)) return first_maximum(logits, vocab_);
        float kept = -INFINITY;
        if (top_k > 0 && top_k < vocab_) kept = top_k_bound(top_k);
        if (min_p > 0) {
            const float bound = min_p_bound(min_p);
            if (bound > kept) kept = bound;
        }
        double total = 0;
        for (float bound = kept;;) {
            const int64_t token = draw(bound, noise);
            const float logit = logits[token];
            // (Of logits that are NaN the token may be any.)
            if (!(top_p < 1) || !(logit > bound && logit < top_)) return token;
            double all = 0, above = 0;
            add_masses(total == 0 ? kept : logit, logit, all, above);
            if (total == 0) total = all;
            const double limit = total * top_p;
            bool dropped = above >= limit;
            if (!(std::fabs(above - limit) > mass_error() * (above + limit)))
                dropped = exact_mass_above(logit) >= exact_mass_above(kept) * top_p;
            if (!dropped) return token;
            bound = logit;
        }
    }

   private:
    void read(const float* logits, float temperature) {
        logits_ = logits;
        // Over the least temperature two different logits are further apart than noise can bridge.
        temperature_ = temperature > 0x1p-60f ? temperature : 0x1p-60f;
        for (int64_t i = 0, token = full_groups_ * kGroup; i < kGroup; ++i, ++token)
            tail_[i] = token < vocab_ ? logits[token] : -INFINITY;
        for (int64_t g = 0; g < groups_; ++g) {
            const float* x = group(g);
            Floats tops = load<Floats>(x);
            for (int v = 1; v < kGroupVectors; ++v) tops = max(tops, load<Floats>(x + v * kLanes));
            maxima_[g] = largest(tops);
        }
        top_group_ = first_maximum(maxima_.get(), groups_);
        top_ = maxima_[top_group_];
        scaled_top_ = top_ / temperature_;
        for (int64_t g = 0; g < groups_; g += kLanes)
            store(&masses_[g], exp(load<Floats>(&maxima_[g]) / temperature_ - scaled_top_));
    }

    const float* group(int64_t index) const { return index < full_groups_ ? logits_ + index * kGroup : tail_; }

    // Above it are the tokens with fewer than k strictly above them.
    float top_k_bound(int64_t k) {
        const auto beyond = [&](float bound) { return k - sum(count_above(maxima_.get(), padded_groups_, bound)); };
        // The k groups with the highest maxima hold k tokens at least.
        const float low = k <= groups_ ? bisect(-INFINITY, top_, beyond) : -INFINITY;
        int64_t live = 0;
        for (int64_t g = 0; g < groups_; ++g) {
            live_[live] = g;
            live += maxima_[g] > low;
        }
        return bisect(low, top_, [&](float bound) {
            Ints counts{};
            for (int64_t i = 0; i < live; ++i) counts += count_above(group(live_[i]), kGroup, bound);
            return k - sum(counts);
        });
    }

    // Above it are the tokens of at least min_p of the highest one's mass.
    float min_p_bound(float min_p) const {
        return bisect(-INFINITY, top_, [&](float logit) { return exact_mass(logit) < min_p ? -1 : 1; });
    }

    // As the reference rounds it.
    double exact_mass(float logit) const { return ::exp(double{logit / temperature_} - double{scaled_top_}); }

    // Added up in another order than the reference does, which leaves 1e-13 undecided: a share of a sum of exponentials
    // is never equal to another such sum, so nothing but chance falls in between.
    double exact_mass_above(float bound) const {
        double total = 0;
        for (int64_t i = 0; i < vocab_; ++i) {
            if (logits_[i] > bound) total += exact_mass(logits_[i]);
        }
        return total;
    }

    // The same in float32, for two bounds at once, of which the second is not the lower one.
    void add_masses(float bound, float higher, double& above, double& above_higher) const {
        const float inverse = 1 / temperature_, negligible = 0x1p-24f / static_cast<float>(vocab_);
        Doubles totals{}, higher_totals{};
        for (int64_t g = 0; g < groups_; ++g) {
            if (!(maxima_[g] > bound && masses_[g] > negligible)) continue;
            const float* x = group(g);
            Floats sums{}, higher_sums{};
#pragma GCC unroll 4
            for (int v = 0; v < kGroupVectors; ++v) {
                const Floats logits = load<Floats>(x + v * kLanes);
                const Words masses = (Words)exp(logits * inverse - scaled_top_);
                sums += (Floats)(masses & (Words)(logits > bound));
                higher_sums += (Floats)(masses & (Words)(logits > higher));
            }
            totals += in_pairs(sums);
            higher_totals += in_pairs(higher_sums);
        }
        for (int i = 0; i < kLanes / 2; ++i) above += totals[i], above_higher += higher_totals[i];
    }

    typedef double Doubles __attribute__((vector_size(4 * kLanes)));

    // Sums of lanes and those half a vector behind them.
    static Doubles in_pairs(Floats values) {
        typedef float Half __attribute__((vector_size(2 * kLanes)));
        Half halves[2];
        std::memcpy(halves, &values, sizeof(values));
        return __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
    }

    // The sums of `add_masses` are off by a factor of e^(this) at most. Logits / T, of up to |scaled_top_| + 30 where
    // they count, are rounded once by the reference and twice here, the exponent once; exp and the sums add under 1e-6.
    double mass_error() const { return 2e-5 + 0x1p-21 * std::fabs(double{scaled_top_}); }

    // The token above the bound with the highest score.
    int64_t draw(float bound, const Philox& noise) const {
        // No noise is below -2.9, so this much is reached, by the token with the highest logit if by no other.
        Draw draw{bound, noise, reach(scaled_top_ - 3)};
        // That token's group first: the others are then measured by a high score.
        for (int64_t g = -1; g < groups_; ++g) {
            if (g != top_group_) visit(g < 0 ? top_group_ : g, draw);
        }
        return draw.token;
    }

    struct Draw {
        const float bound;
        const Philox& noise;
        // A token of mass m with a uniform number above m * reach cannot win.
        float reach;
        float best = -INFINITY;
        int64_t token = 0;
    };

    // For a score as high, noise must be at least score - logit / T, so u at most e^(logit / T - score). Room for
    // errors: the score is rounded; all else, in float32, is below 2e-5 for a mass that can win. From e^60 on scores
    // are so coarse that only masses of 1 and e^-32, one unit in the last place below, can.
    float reach(float score) const {
        const double exponent = double{scaled_top_} - score + 0x1p-23 * std::fabs(double{score}) + 2e-5;
        return ::expf(static_cast<float>(exponent < 60 ? exponent : 60));
    }

    void visit(int64_t index, Draw& draw) const {
        const float most = masses_[index] * draw.reach;
        // (The smallest uniform number is 2^-33.)
        if (!(most >= 0x1p-33f && maxima_[index] > draw.bound)) return;
        Words words[kGroupVectors];
        draw.noise.words(index, words);
        const float words_below = most * (0x1p32f + 0x1p12f);
        const Words limit = Words{} + (words_below < 0x1p32f ? static_cast<uint32_t>(words_below) : ~0u);
        Words least = words[0];
        for (int v = 1; v < kGroupVectors; ++v) least = words[v] < least ? words[v] : least;
        if (!bits_of(least <= limit)) return;
        for (int v = 0; v < kGroupVectors; ++v) {
            if (bits_of(words[v] <= limit))
                compare(index * kGroup + v * kLanes, group(index) + v * kLanes, uniform(words[v]), draw);
        }
    }

    // The tokens of one vector, of which `first` is the first.
    void compare(int64_t first, const float* x, Floats u, Draw& draw) const {
        const Floats logits = load<Floats>(x), scaled = logits / temperature_;
        const Floats masses = (Floats)((Words)exp(scaled - scaled_top_) & (Words)(logits > draw.bound));
        for (uint32_t left = bits_of(u <= masses * draw.reach); left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            if (u[lane] > masses[lane] * draw.reach) continue;  // which may have fallen
            const float score = scaled[lane] + gumbel(u[lane]);
            if (score < draw.best || (score == draw.best && first + lane > draw.token)) continue;
            draw.best = score, draw.token = first + lane;
            draw.reach = reach(score);
        }
    }

    const int64_t vocab_, full_groups_, groups_, padded_groups_;
    const std::unique_ptr<float[]> maxima_, masses_;  // of groups: the highest logit, its mass
    const std::unique_ptr<int64_t[]> live_;
    float tail_[kGroup];  // the last group if it is not full, then -inf

    // The present row.
    const float* logits_;
    float temperature_, top_, scaled_top_;
    int64_t top_group_;
};

inline void sample(const s1engine::cpu::Sample& a) {
    constexpr int64_t kAloneTokens = 4096;  // waking other threads costs more than they save
#pragma omp parallel if (a.rows > 1 && a.rows * a.vocab > kAloneTokens)
    {
        RowSampler sampler(a.vocab);
#pragma omp for schedule(dynamic, kAloneTokens / (a.vocab + 1) + 1)
        for (int64_t row = 0; row < a.rows; ++row) {
            const float* logits = a.logits + row * a.vocab;
            a.out[row] = a.temperature[row] > 0
                             ? sampler.sample(logits, a.temperature[row], a.top_k[row], a.top_p[row], a.min_p[row],
                                              Philox(a.seeds[row], a.positions[row]))
                             : first_maximum(logits, a.vocab);
        }
    }
}

}  // namespace S1_ISA
