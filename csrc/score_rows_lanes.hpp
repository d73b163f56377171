// The row passes over vectors of OR1_LANES floats, in namespace or1::OR1_ISA. Included once per instruction set, with
// that set enabled. This file must include no standard header: compiled here, it would give the linker an AVX-512 copy
// of an inline function that other files share.

namespace or1 {
namespace OR1_ISA {

typedef float Vec __attribute__((vector_size(4 * OR1_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * OR1_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * OR1_LANES), aligned(4), may_alias));
typedef uint32_t WordVec __attribute__((vector_size(4 * OR1_LANES)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * OR1_LANES)));
typedef uint16_t PairVec __attribute__((vector_size(4 * OR1_LANES)));
typedef uint16_t LooseHalfVec __attribute__((vector_size(2 * OR1_LANES), aligned(2), may_alias));
typedef uint16_t LooseHalf __attribute__((may_alias));

constexpr int64_t kBlock = 1024;
// Elements that a pass asks for before it reads them. The processor alone looks too short a way ahead: pass 2 over
// logits in memory took 2.5 times as long. Addresses behind the last row are never read.
constexpr int64_t kAhead = 2048;
// exp underflows far above this floor. The floor keeps 0 * d at 0 where d would be -inf.
constexpr float kFloor = -1.0e4f;

static inline Vec splat(float x) { return x - Vec{}; }
static inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }

// Store x as bf16, rounded to nearest even; nan stays nan. Denormals are kept, unlike with AVX512_BF16's instruction.
static inline void store_bf16(LooseHalf* out, Vec x) {
  WordVec bits = (WordVec)x;
  WordVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  rounded = x == x ? rounded : (WordVec)splat(__builtin_nanf(""));
#if defined(__clang__)
  *reinterpret_cast<LooseHalfVec*>(out) = __builtin_convertvector(rounded >> 16, HalfVec);
#else
  // GCC 12 converts element by element; the odd halves of a shuffled vector are the same.
  PairVec odd;
  for (int i = 0; i < 2 * OR1_LANES; ++i) odd[i] = uint16_t(2 * i + 1);
  const PairVec packed = __builtin_shuffle((PairVec)rounded, odd);
  __builtin_memcpy(out, &packed, 2 * OR1_LANES);
#endif
}

// exp for x <= 88, within 1.1 ulp down to -87.3 and 0 below; nan stays nan.
static inline Vec exp_lanes(Vec x) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  Vec shifted = x * 1.44269504088896341f + magic;
  Vec n = shifted - magic;
  Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IntVec bits = ((IntVec)shifted - (IntVec)magic + 127) << 23;
  return x < -87.3f ? Vec{} : p * (Vec)bits;
}

static inline Vec tanh_lanes(Vec u) {
  Vec a = u < 0.0f ? -u : u;
  Vec t = exp_lanes(-2.0f * (a < 40.0f ? a : splat(40.0f)));
  Vec far = (1.0f - t) / (1.0f + t);
  Vec s = u * u;
  Vec p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s + -5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s + -3.33332819422e-1f;
  Vec near = u + u * s * p;
  Vec out = a < 0.625f ? near : (u < 0.0f ? -far : far);
  return u == u ? out : u;
}

static inline Vec transformed(Vec raw, RowTransform t) {
  Vec z = raw * t.scale;
  return t.softcap == 0 ? z : tanh_lanes(z / t.softcap) * t.softcap;
}

static inline float transformed(float raw, RowTransform t) { return transformed(splat(raw), t)[0]; }

static inline double total(Vec x) {
  double sum = 0;
  for (int i = 0; i < OR1_LANES; ++i) sum += x[i];
  return sum;
}

// Pad the last, partial vector of a row with `fill`, so that every element uses the same arithmetic.
static inline Vec load_tail(const float* p, int64_t count, float fill) {
  Vec x = splat(fill);
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}

static float peak_raw(const float* row, int64_t vocab) {
  Vec best = splat(-INFINITY);
  int64_t v = 0;
  for (; v + OR1_LANES <= vocab; v += OR1_LANES) {
    __builtin_prefetch(row + v + kAhead);
    Vec x = load(row + v);
    best = x > best ? x : best;
  }
  Vec x = load_tail(row + v, vocab - v, -INFINITY);
  best = x > best ? x : best;
  float out = best[0];
  for (int i = 1; i < OR1_LANES; ++i) out = best[i] > out ? best[i] : out;
  return out;
}

struct Sums {
  double rest = 0, moment = 0;
};

// Add exp d and d exp d of p[0, count), except at index `skip` (the target; -1: none). Whole: a block of kBlock
// elements without the target, which needs no comparison of indices and has the same sum.
template <bool Whole>
static void add_block(const float* p, int32_t count, int32_t skip, float peak, float inv_tau, RowTransform t,
                      Sums* sums) {
  Vec rest = {}, moment = {};
  IntVec index;
  for (int i = 0; i < OR1_LANES; ++i) index[i] = i;
  for (int32_t v = 0; v < (Whole ? int32_t(kBlock) : count); v += OR1_LANES, index += OR1_LANES) {
    Vec raw = Whole || v + OR1_LANES <= count ? load(p + v) : load_tail(p + v, count - v, 0.0f);
    Vec d = (transformed(raw, t) - peak) * inv_tau;
    d = d < kFloor ? splat(kFloor) : d;
    Vec e = exp_lanes(d);
    if (!Whole) e = (index == skip) | (index >= count) ? Vec{} : e;
    rest += e;
    moment += e * d;
  }
  sums->rest += total(rest);
  sums->moment += total(moment);
}

void sums_of_row(const RowBlock& b, RowTransform t, int64_t row_index, float* out) {
  const float* row = b.logits + row_index * b.stride;
  const int64_t y = b.targets[row_index];
  const float inv_tau = b.inv_tau[row_index];
  const float peak = transformed(peak_raw(row, b.vocab), t);
  const float target = y >= 0 ? transformed(row[y], t) : -INFINITY;
  Sums sums;
  for (int64_t v = 0; v < b.vocab; v += kBlock) {
    const int32_t count = int32_t(b.vocab - v < kBlock ? b.vocab - v : kBlock);
    const int32_t skip = y >= v && y < v + count ? int32_t(y - v) : -1;
    const auto add = count == kBlock && skip < 0 ? add_block<true> : add_block<false>;
    add(row + v, count, skip, peak, inv_tau, t, &sums);
  }
  const double d = (double(target) - peak) * inv_tau;
  if (d > kFloor) sums.moment += d * __builtin_exp(d);
  out[row_index] = peak;
  out[b.rows + row_index] = target;
  out[2 * b.rows + row_index] = float(sums.rest);
  out[3 * b.rows + row_index] = float(sums.moment);
}

static inline void put(float* out, Vec x) { *reinterpret_cast<LooseVec*>(out) = x; }
static inline void put(LooseHalf* out, Vec x) { store_bf16(out, x); }

// Constants of a row in pass 2.
struct GradRow {
  float inv_tau, peak, logp, entropy, log_norm, g, k, out_scale;
};

// Write dL/draw of p[0, count) to out, which may be p itself.
template <typename Out>
static void grads_of_block(const float* p, Out* out, int32_t count, GradRow r, RowTransform t) {
  for (int32_t v = 0; v < count; v += OR1_LANES) {
    const int32_t left = count - v;
    __builtin_prefetch(p + v + kAhead, 1);
    Vec z = transformed(left >= OR1_LANES ? load(p + v) : load_tail(p + v, left, 0.0f), t);
    Vec log_p = (z - r.peak) * r.inv_tau - r.log_norm;
    log_p = log_p < kFloor ? splat(kFloor) : log_p;
    Vec dz = exp_lanes(log_p) * (r.g + r.k * (log_p + r.entropy)) * r.out_scale;
    if (t.softcap != 0) dz *= 1.0f - (z / t.softcap) * (z / t.softcap);
    if (left >= OR1_LANES) {
      put(out + v, dz);
    } else {
      Out tail[OR1_LANES];
      put(tail, dz);
      for (int32_t i = 0; i < left; ++i) out[v + i] = tail[i];
    }
  }
}

// Return dL/draw of the target.
static float grad_of_target(float raw, GradRow r, RowTransform t) {
  const double logp = r.logp, bonus = double(r.k) * __builtin_exp(logp) * (logp + r.entropy);
  double own = (double(r.g) * __builtin_expm1(logp) + bonus) * r.out_scale;
  if (t.softcap != 0) {
    const double u = double(transformed(raw, t)) / t.softcap;
    own *= 1 - u * u;
  }
  return float(own);
}

static GradRow grad_row(const RowBlock& b, RowTransform t, int64_t i, const float* stats, const float* slopes) {
  const float inv_tau = b.inv_tau[i];
  return {inv_tau,   stats[2 * b.rows + i], stats[i],           stats[b.rows + i], stats[3 * b.rows + i],
          slopes[i], slopes[b.rows + i],    -inv_tau * t.scale};
}

void grads_of_row(const RowBlock& b, RowTransform t, int64_t row_index, const float* stats, const float* slopes) {
  float* row = b.logits + row_index * b.stride;
  const int64_t y = b.targets[row_index];
  const GradRow r = grad_row(b, t, row_index, stats, slopes);
  const float own = y >= 0 ? grad_of_target(row[y], r, t) : 0;
  for (int64_t v = 0; v < b.vocab; v += kBlock) {
    grads_of_block(row + v, row + v, int32_t(b.vocab - v < kBlock ? b.vocab - v : kBlock), r, t);
  }
  if (y >= 0) row[y] = own;
}

// bf16 lies in the first half of the row's own memory: element v at byte 2 v, behind which every logit is still unread.
// A block is written elsewhere first: stores whose addresses resemble those of later loads would delay these loads.
void bf16_grads_of_row(const RowBlock& b, RowTransform t, int64_t row_index, const float* stats, const float* slopes) {
  float* row = b.logits + row_index * b.stride;
  LooseHalf* out = reinterpret_cast<LooseHalf*>(row);
  const int64_t y = b.targets[row_index];
  const GradRow r = grad_row(b, t, row_index, stats, slopes);
  const float own = y >= 0 ? grad_of_target(row[y], r, t) : 0;
  LooseHalf block[kBlock], own_bf16[OR1_LANES];
  for (int64_t v = 0; v < b.vocab; v += kBlock) {
    const int64_t count = b.vocab - v < kBlock ? b.vocab - v : kBlock;
    grads_of_block(row + v, block, int32_t(count), r, t);
    __builtin_memcpy(out + v, block, count * sizeof(LooseHalf));
  }
  store_bf16(own_bf16, splat(own));
  if (y >= 0) out[y] = own_bf16[0];
}

}  // namespace OR1_ISA
}  // namespace or1
