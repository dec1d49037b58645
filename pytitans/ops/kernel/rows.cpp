// What stands between the matrix products of a layer, each in one pass over its tokens:
// RMSNorm, SiLU gates, the short convolution with its SiLU and unit norms, the memory's gates.
//
// Rows are float32 or bfloat16 (`narrow`), arithmetic is float32. Sums over tokens are taken in an
// order that depends on the number of threads alone.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include <omp.h>

#include "elementwise.h"

namespace {

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline void put(float& to, float x) { to = x; }
inline void put(bf16& to, float x) {  // to the nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = x == x ? (uint16_t)rounded : (uint16_t)0x7fc0;
}

template <class T>
inline void load(const T* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = wide(x[i]);
}
template <class T>
inline void store(const float* x, int64_t n, T* y) {
  for (int64_t i = 0; i < n; i++) put(y[i], x[i]);
}

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

constexpr int64_t SMALL = 1 << 14;  // elements: below, waking a thread costs more than it saves

// y = x / rms(x) * weight, for n rows of D.
template <class T>
void rms_norm(int64_t n, int64_t D, float eps, const T* x, const float* weight, T* y, float* scale,
              int threads) {
#pragma omp parallel num_threads(threads) if (n * D > SMALL)
  {
    std::vector<float> row(D);
    float* r = row.data();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
      load(x + i * D, D, r);
      float s = 1 / std::sqrt(float(dot(r, r, D) / D) + eps);
      scale[i] = s;
      for (int64_t d = 0; d < D; d++) r[d] *= s * weight[d];
      store(r, D, y + i * D);
    }
  }
}

template <class T>
void rms_norm_back(int64_t n, int64_t D, const T* x, const float* weight, const float* scale,
                   const T* g_y, T* g_x, float* g_weight, int threads) {
  bool many = n * D > SMALL;
  std::vector<float> sums((many ? threads : 1) * D, 0.0f);
#pragma omp parallel num_threads(threads) if (many)
  {
    std::vector<float> rows(2 * D);
    float *r = rows.data(), *g = r + D, *sum = sums.data() + omp_get_thread_num() * D;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < n; i++) {
      float s = scale[i];
      load(x + i * D, D, r), load(g_y + i * D, D, g);
      for (int64_t d = 0; d < D; d++) {
        r[d] *= s;
        sum[d] += g[d] * r[d];
        g[d] *= weight[d];
      }
      float along = float(dot(g, r, D) / D);
      for (int64_t d = 0; d < D; d++) g[d] = s * (g[d] - r[d] * along);
      store(g, D, g_x + i * D);
    }
  }
  std::fill(g_weight, g_weight + D, 0.0f);
  for (size_t at = 0; at < sums.size(); at++) g_weight[at % D] += sums[at];
}

// y = silu(a) * b: n rows of D, `a` and `b` each with a row's stride of their own.
template <class T>
void silu_mul(int64_t n, int64_t D, const T* a, int64_t lda, const T* b, int64_t ldb, T* y,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * D > SMALL)
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) {
      float x = wide(a[i * lda + d]);
      put(y[i * D + d], x * sigmoid(x) * wide(b[i * ldb + d]));
    }
}

template <class T>
void silu_mul_back(int64_t n, int64_t D, const T* a, int64_t lda, const T* b, int64_t ldb,
                   const T* g, T* g_a, int64_t ldga, T* g_b, int64_t ldgb, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (n * D > SMALL)
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) {
      float x = wide(a[i * lda + d]), s = sigmoid(x), at = wide(g[i * D + d]);
      put(g_a[i * ldga + d], at * wide(b[i * ldb + d]) * s * (1 + x * (1 - s)));
      put(g_b[i * ldgb + d], at * x * s);
    }
}

// The short convolution over tokens, SiLU, and for the first `units` features norm 1 by groups of K.
struct Conv {
  int64_t B, T, D, reach, K, units, part;  // part: features of one of the results
};

constexpr float LEAST = 1e-6f;  // a smaller norm counts as this

// One thread's work: neighbouring features of a row, whole groups, at all of its tokens. They lie
// side by side in memory, so a token's are done together; each sum over tokens is one thread's.
struct Share {
  int64_t b, first, n;
};

inline std::vector<Share> shares(const Conv& c, int threads) {
  // As few parts of a row as give all threads as much.
  int64_t groups = c.D / c.K, parts = std::min(groups, threads / std::gcd<int64_t>(threads, c.B));
  std::vector<Share> found;
  for (int64_t b = 0; b < c.B; b++)
    for (int64_t i = 0; i < parts; i++) {
      int64_t begin = groups * i / parts, end = groups * (i + 1) / parts;
      found.push_back({b, begin * c.K, (end - begin) * c.K});
    }
  return found;
}

template <class T>
struct Rows {
  const Conv& c;
  const Share& at;
  const T *x, *tail;
  const float* weight;

  const T* token(int64_t t) const {
    return (t < 0 ? tail + (at.b * c.reach + c.reach + t) * c.D : x + (at.b * c.T + t) * c.D) +
           at.first;
  }
  const float* tap(int64_t lag) const { return weight + lag * c.D + at.first; }
  void convolve(int64_t t, float* y) const {
    std::fill(y, y + at.n, 0.0f);
    for (int64_t lag = 0; lag <= c.reach; lag++) {
      const T* from = token(t - c.reach + lag);
      const float* w = tap(lag);
      for (int64_t d = 0; d < at.n; d++) y[d] += wide(from[d]) * w[d];
    }
  }
  // Of the group that begins at feature d of the share: where token t's result is.
  template <class U>
  U* result(U* const* y, int64_t t, int64_t d) const {
    return y[(at.first + d) / c.part] + (at.b * c.T + t) * c.part + (at.first + d) % c.part;
  }
  int64_t normed() const { return std::clamp<int64_t>(c.units - at.first, 0, at.n); }
};

template <class T>
void conv(const Conv& c, const T* x, const T* tail, const float* weight, T* const* y, int threads) {
  std::vector<Share> jobs = shares(c, threads);
#pragma omp parallel num_threads(threads) if (c.B * c.T * c.D > SMALL)
  {
    std::vector<float> row(c.D);
    float* r = row.data();
#pragma omp for schedule(static)
    for (size_t job = 0; job < jobs.size(); job++) {
      Rows<T> g{c, jobs[job], x, tail, weight};
      for (int64_t t = 0; t < c.T; t++) {
        g.convolve(t, r);
        for (int64_t d = 0; d < g.at.n; d++) r[d] *= sigmoid(r[d]);
        for (int64_t first = 0; first < g.normed(); first += c.K) {
          float *h = r + first, s = 1 / std::max(std::sqrt(float(dot(h, h, c.K))), LEAST);
          for (int64_t d = 0; d < c.K; d++) h[d] *= s;
        }
        for (int64_t d = 0; d < g.at.n; d += c.K) store(r + d, c.K, g.result(y, t, d));
      }
    }
  }
}

template <class T>
void conv_back(const Conv& c, const T* x, const T* tail, const float* weight, const T* const* g_y,
               T* g_x, T* g_tail, float* g_weight, int threads) {
  int64_t taps = c.reach + 1;
  std::vector<float> by_row(c.B * taps * c.D, 0.0f);
  std::vector<Share> jobs = shares(c, threads);
#pragma omp parallel num_threads(threads) if (c.B * c.T * c.D > SMALL)
  {
    std::vector<float> rows((4 + taps) * c.D);
    float *z = rows.data(), *h = z + c.D, *up = h + c.D, *sum = up + c.D, *ring = sum + c.D;
#pragma omp for schedule(static)
    for (size_t job = 0; job < jobs.size(); job++) {
      Rows<T> g{c, jobs[job], x, tail, weight};
      int64_t n = g.at.n;
      float* g_w = by_row.data() + g.at.b * taps * c.D + g.at.first;
      std::fill(ring, ring + taps * c.D, 0.0f);
      for (int64_t t = c.T - 1; t >= -c.reach; t--) {
        float* now = ring + (t + c.reach) % taps * c.D;  // gradient in token t's sum, before SiLU
        if (t < 0) {
          std::fill(now, now + n, 0.0f);
        } else {
          g.convolve(t, z);
          for (int64_t d = 0; d < n; d += c.K) load(g.result(g_y, t, d), c.K, up + d);
          for (int64_t d = 0; d < n; d++) {
            float s = sigmoid(z[d]);
            h[d] = z[d] * s;
            z[d] = s * (1 + z[d] * (1 - s));
          }
          for (int64_t first = 0; first < g.normed(); first += c.K) {
            float *from = h + first, *to = up + first;
            float size = std::sqrt(float(dot(from, from, c.K))), s = 1 / std::max(size, LEAST);
            float along = size > LEAST ? float(dot(to, from, c.K)) * s * s : 0;
            for (int64_t d = 0; d < c.K; d++) to[d] = s * (to[d] - from[d] * along);
          }
          for (int64_t d = 0; d < n; d++) now[d] = up[d] * z[d];
          for (int64_t lag = 0; lag < taps; lag++) {
            const T* met = g.token(t - c.reach + lag);
            for (int64_t d = 0; d < n; d++) g_w[lag * c.D + d] += now[d] * wide(met[d]);
          }
        }
        std::fill(sum, sum + n, 0.0f);
        for (int64_t lag = 0; lag < taps; lag++) {  // token t was met by the sums of t .. t + reach
          int64_t later = t + c.reach - lag;
          if (later >= c.T) continue;
          const float *w = g.tap(lag), *of = ring + (later + c.reach) % taps * c.D;
          for (int64_t d = 0; d < n; d++) sum[d] += w[d] * of[d];
        }
        int64_t row = t < 0 ? g.at.b * c.reach + c.reach + t : g.at.b * c.T + t;
        store(sum, n, (t < 0 ? g_tail : g_x) + row * c.D + g.at.first);
      }
    }
  }
  std::fill(g_weight, g_weight + taps * c.D, 0.0f);
  for (int64_t b = 0; b < c.B; b++)
    for (int64_t i = 0; i < taps * c.D; i++) g_weight[i] += by_row[b * taps * c.D + i];
}

// The memory's gates: logits [n, kinds, D] to a step size, a log momentum and a log decay, each
// [n, D]. Kinds in this order, the last two optional. Floors as in closing_gate.
struct Closing {
  float floor, s, s4, value;  // value = max((1 + floor) * sigmoid^4 - floor, 0)
  Closing(float x, float floor) : floor(floor), s(sigmoid(x)) {
    s4 = s * s * s * s;
    value = std::max((1 + floor) * s4 - floor, 0.0f);
  }
  float back(float g) const {  // below 0 only what would open it
    return value > 0 || g < 0 ? g * (1 + floor) * 4 * s4 * (1 - s) : 0;
  }
};

void gates(int64_t n, int64_t D, bool momentum, bool decay, float largest, float step_floor,
           float forget_floor, const float* logits, float* lr, float* log_momentum, float* log_decay) {
  int64_t kinds = 1 + momentum + decay;
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) {
      const float* x = logits + i * kinds * D + d;
      int64_t at = i * D + d;
      lr[at] = largest * Closing(x[0], step_floor).value;
      if (momentum) {
        float m = x[D], small = std::log1p(exponential(-std::fabs(m)));
        lr[at] *= sigmoid(-m);
        log_momentum[at] = std::min(m, 0.0f) - small;
      }
      if (decay) {
        Closing forget(x[(1 + momentum) * D], forget_floor);
        log_decay[at] = std::log1p(-(1 - forget_floor) * forget.value);
      }
    }
}

void gates_back(int64_t n, int64_t D, bool momentum, bool decay, float largest, float step_floor,
                float forget_floor, const float* logits, const float* g_lr, const float* g_log_momentum,
                const float* g_log_decay, float* g_logits) {
  int64_t kinds = 1 + momentum + decay;
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < D; d++) {
      const float* x = logits + i * kinds * D + d;
      float* g = g_logits + i * kinds * D + d;
      int64_t at = i * D + d;
      Closing step(x[0], step_floor);
      float up = g_lr ? g_lr[at] * largest : 0;
      if (momentum) {
        float off = sigmoid(-x[D]);
        g[0] = step.back(up * off);
        g[D] = (g_log_momentum ? g_log_momentum[at] * off : 0) - up * step.value * off * (1 - off);
      } else {
        g[0] = step.back(up);
      }
      if (decay) {
        Closing forget(x[(1 + momentum) * D], forget_floor);
        float slope = -(1 - forget_floor) / (1 - (1 - forget_floor) * forget.value);
        g[(1 + momentum) * D] = g_log_decay ? forget.back(g_log_decay[at] * slope) : 0;
      }
    }
}

}  // namespace

#define BOTH(call)         \
  if (narrow) {            \
    using T = bf16;        \
    call;                  \
  } else {                 \
    using T = float;       \
    call;                  \
  }

extern "C" {

void pytitans_rms_norm(int narrow, int threads, int64_t n, int64_t D, double eps, const void* x,
                       const float* weight, void* y, float* scale) {
  BOTH(rms_norm<T>(n, D, eps, (const T*)x, weight, (T*)y, scale, threads))
}
void pytitans_rms_norm_back(int narrow, int threads, int64_t n, int64_t D, const void* x,
                            const float* weight, const float* scale, const void* g_y, void* g_x,
                            float* g_weight) {
  BOTH(rms_norm_back<T>(n, D, (const T*)x, weight, scale, (const T*)g_y, (T*)g_x, g_weight, threads))
}
void pytitans_silu_mul(int narrow, int threads, int64_t n, int64_t D, const void* a, int64_t lda,
                       const void* b, int64_t ldb, void* y) {
  BOTH(silu_mul<T>(n, D, (const T*)a, lda, (const T*)b, ldb, (T*)y, threads))
}
void pytitans_silu_mul_back(int narrow, int threads, int64_t n, int64_t D, const void* a,
                            int64_t lda, const void* b, int64_t ldb, const void* g, void* g_a,
                            int64_t ldga, void* g_b, int64_t ldgb) {
  BOTH(silu_mul_back<T>(n, D, (const T*)a, lda, (const T*)b, ldb, (const T*)g, (T*)g_a, ldga,
                        (T*)g_b, ldgb, threads))
}
void pytitans_conv(int narrow, int threads, int64_t B, int64_t T_, int64_t D, int64_t reach,
                   int64_t K, int64_t units, int64_t part, const void* x, const void* tail,
                   const float* weight, void* const* y) {
  Conv c{B, T_, D, reach, K, units, part};
  BOTH(conv<T>(c, (const T*)x, (const T*)tail, weight, (T* const*)y, threads))
}
void pytitans_conv_back(int narrow, int threads, int64_t B, int64_t T_, int64_t D, int64_t reach,
                        int64_t K, int64_t units, int64_t part, const void* x, const void* tail,
                        const float* weight, const void* const* g_y, void* g_x, void* g_tail,
                        float* g_weight) {
  Conv c{B, T_, D, reach, K, units, part};
  BOTH(conv_back<T>(c, (const T*)x, (const T*)tail, weight, (const T* const*)g_y, (T*)g_x,
                    (T*)g_tail, g_weight, threads))
}
void pytitans_gates(int64_t n, int64_t D, int momentum, int decay, double largest,
                    double step_floor, double forget_floor, const float* logits, float* lr, float* log_momentum, float* log_decay) {
  gates(n, D, momentum, decay, largest, step_floor, forget_floor, logits, lr, log_momentum,
        log_decay);
}
void pytitans_gates_back(int64_t n, int64_t D, int momentum, int decay, double largest,
                         double step_floor, double forget_floor, const float* logits,
                         const float* g_lr,
                         const float* g_log_momentum, const float* g_log_decay, float* g_logits) {
  gates_back(n, D, momentum, decay, largest, step_floor, forget_floor, logits, g_lr,
             g_log_momentum, g_log_decay, g_logits);
}

}
