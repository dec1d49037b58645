// A run of chunks, head by head, in cache: the algebra and the names of chunk_plain.py.
//
// Everything that belongs to tokens is feature-major, [features][tokens of the chunk, padded to 16],
// so that every product with a weight W [in][out] reads W as it lies; only the right sides of the
// weights' updates are turned round ("_tm": token-major). Padded tokens have write weights of 0.
// Gates are multiplied up row by row in double: G_i = decay_i G_{i-1} + N_i,
// N_i = momentum_i N_{i-1} + lr_i e_i, and their gradients run the same recursion backwards.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

constexpr int MAX_LAYERS = 8, MAX_GROUP = 16;
constexpr double NORM_EPS = 1e-5;
constexpr int64_t PAD = 16;

extern "C" struct Args {
  int64_t B, T, H, L, chunk, offset, dot, gelu, group, normed, momentum, gate_layers;
  int64_t width[MAX_LAYERS + 1];
  const void *q, *k, *v, *lr, *log_momentum, *log_decay, *weight, *bias;  // gates [B, T, H, layers]
  const uint8_t* mask;
  const int64_t* last;
  const void *M0[MAX_LAYERS], *S0[MAX_LAYERS], *A0[MAX_LAYERS];
  void *out, *M1[MAX_LAYERS], *S1[MAX_LAYERS], *anchor[MAX_LAYERS], *kept;
  const void *g_out, *g_M1[MAX_LAYERS], *g_S1[MAX_LAYERS], *g_anchor[MAX_LAYERS];
  void *g_q, *g_k, *g_v, *g_lr, *g_log_momentum, *g_log_decay, *g_weight, *g_bias;
  void *g_M0[MAX_LAYERS], *g_S0[MAX_LAYERS], *g_A0[MAX_LAYERS];
};

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

template <class T>
struct Vec {
  typedef T type __attribute__((vector_size(BYTES)));
  typedef T loose __attribute__((vector_size(BYTES), aligned(alignof(T)), may_alias));
  static constexpr int lanes = BYTES / sizeof(T);
};

int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// ---- out = c_in * in + c_more * more + sign * lane * (A @ B) --------------------------------

template <class T>
struct Product {
  const T* A;
  int64_t rows_by, cols_by;  // strides of A's [M][K]
  const T* B;                // [K][N], rows padded to PAD
  int64_t ldb;
  T* out;
  int64_t ldo;
  T sign = 1;
  const T* lane = nullptr;  // a factor for each column
  const T* in = nullptr;    // with out's leading dimension, and may be out itself
  T c_in = 1;
  const T* more = nullptr;
  T c_more = 0;
};

template <class T, int MR, int NV>
inline __attribute__((always_inline)) void tile(const Product<T>& p, int64_t i, int64_t j, int64_t K,
                                                int64_t columns) {
  using V = typename Vec<T>::type;
  using U = typename Vec<T>::loose;
  constexpr int lanes = Vec<T>::lanes;
  V acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NV; n++) acc[r][n] = V{};
  const T* a = p.A + i * p.rows_by;
  const T* b = p.B + j;
  for (int64_t k = 0; k < K; k++, a += p.cols_by, b += p.ldb) {
    V row[NV];
    for (int n = 0; n < NV; n++) row[n] = *(const U*)(b + n * lanes);
#pragma GCC unroll 24
    for (int r = 0; r < MR; r++) {
      T x = a[r * p.rows_by];
      for (int n = 0; n < NV; n++) acc[r][n] += x * row[n];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
    for (int n = 0; n < NV; n++) {
      int64_t at = (i + r) * p.ldo + j + n * lanes;
      int64_t left = std::min<int64_t>(lanes, columns - n * lanes);
      if (left <= 0) break;
      V x = acc[r][n] * p.sign;
      if (p.lane) x *= *(const U*)(p.lane + j + n * lanes);
      if (left == lanes) {
        if (p.in) x += p.c_in * *(const U*)(p.in + at);
        if (p.more) x += p.c_more * *(const U*)(p.more + at);
        *(U*)(p.out + at) = x;
      } else {
        for (int64_t m = 0; m < left; m++) {
          T y = x[m];
          if (p.in) y += p.c_in * p.in[at + m];
          if (p.more) y += p.c_more * p.more[at + m];
          p.out[at + m] = y;
        }
      }
    }
}

template <class T, int MR, int NV>
__attribute__((noinline)) int64_t rows(const Product<T>& p, int64_t i, int64_t M, int64_t j, int64_t K,
                                       int64_t columns) {
  for (; i + MR <= M; i += MR) tile<T, MR, NV>(p, i, j, K, columns);
  return i;
}

template <class T>
void multiply(const Product<T>& p, int64_t M, int64_t N, int64_t K) {
  constexpr int lanes = Vec<T>::lanes;
  constexpr bool many = BYTES != 32;  // registers for 24 sums, else for 12
  int64_t j = 0;
  while (j < N) {
    int64_t left = N - j, i = 0;
    if (many && left > 2 * lanes) {
      i = rows<T, 6, 4>(p, i, M, j, K, left);
      i = rows<T, 2, 4>(p, i, M, j, K, left);
      i = rows<T, 1, 4>(p, i, M, j, K, left);
      j += 4 * lanes;
    } else if (left > lanes) {
      i = rows<T, many ? 12 : 6, 2>(p, i, M, j, K, left);
      i = rows<T, 4, 2>(p, i, M, j, K, left);
      i = rows<T, 1, 2>(p, i, M, j, K, left);
      j += 2 * lanes;
    } else {
      i = rows<T, many ? 24 : 12, 1>(p, i, M, j, K, left);
      i = rows<T, 8, 1>(p, i, M, j, K, left);
      i = rows<T, 1, 1>(p, i, M, j, K, left);
      j += lanes;
    }
  }
}

// ---- elementwise ---------------------------------------------------------------------------

inline double exponential(double x) { return std::exp(x); }
inline double error_function(double x) { return std::erf(x); }

inline float exponential(float x) {  // within 2 units in the last place; vectorises
  x = std::min(std::max(x, -87.3f), 88.3f);
  float n = __builtin_rintf(x * 1.44269504f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  int32_t bits = ((int32_t)n + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return y * scale;
}

inline float error_function(float x) {  // Abramowitz and Stegun 7.1.26: within 1.5e-7
  float a = std::fabs(x), t = 1.0f / (1.0f + 0.3275911f * a);
  float y = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t +
             0.254829592f) * t;
  return std::copysign(1.0f - y * exponential(-a * a), x);
}

constexpr double SQRT_HALF = 0.70710678118654752, INV_SQRT_2PI = 0.39894228040143268;

template <class T>
void activate(bool gelu, int64_t n, const T* z, T* y, T* slope) {
  if (gelu) {
    for (int64_t i = 0; i < n; i++) {
      T x = z[i], cdf = T(0.5) * (1 + error_function(T(x * T(SQRT_HALF))));
      y[i] = x * cdf;
      if (slope) slope[i] = cdf + x * T(INV_SQRT_2PI) * exponential(T(T(-0.5) * x * x));
    }
  } else if (slope) {
    for (int64_t i = 0; i < n; i++) {
      T x = z[i], s = 1 / (1 + exponential(T(-x)));
      y[i] = x * s;
      slope[i] = s * (1 + x * (1 - s));
    }
  } else {
    for (int64_t i = 0; i < n; i++) y[i] = z[i] / (1 + exponential(T(-z[i])));
  }
}

// dst[c][r] = src[r][c]: turned in blocks that stay in the first cache.
template <class T>
void turn(const T* src, int64_t lds, int64_t rows, int64_t cols, T* dst, int64_t ldd) {
  constexpr int64_t block = 16;
  int64_t r = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; r + block <= rows; r += block) {
      int64_t c = 0;
      for (; c + block <= cols; c += block) {
        __m512 a[16], b[16];
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(src + (r + i) * lds + c);
        for (int i = 0; i < 16; i += 2) {
          b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
          b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
        }
        for (int i = 0; i < 16; i += 4)
          for (int h = 0; h < 2; h++) {
            __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + 2 + h]);
            a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
          }
        for (int i = 0; i < 4; i++) {
          __m512 p = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x88);
          __m512 q = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xdd);
          __m512 s = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x88);
          __m512 t = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xdd);
          b[i] = _mm512_shuffle_f32x4(p, s, 0x88);
          b[4 + i] = _mm512_shuffle_f32x4(q, t, 0x88);
          b[8 + i] = _mm512_shuffle_f32x4(p, s, 0xdd);
          b[12 + i] = _mm512_shuffle_f32x4(q, t, 0xdd);
        }
        for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + (c + i) * ldd + r, b[i]);
      }
      for (; c < cols; c++)
        for (int64_t i = r; i < r + block; i++) dst[c * ldd + i] = src[i * lds + c];
    }
#endif
  for (; r < rows; r += block)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t i = r; i < std::min(rows, r + block); i++) dst[c * ldd + i] = src[i * lds + c];
}

// ---- the workings of one thread --------------------------------------------------------------

class Arena {  // grows to what the largest call needed, and is kept for the next
 public:
  ~Arena() { std::free(base); }
  char* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(base);
      size = (bytes + 63) / 64 * 64;
      base = (char*)std::aligned_alloc(64, size);
      if (!base) size = 0;
    }
    return base;
  }

 private:
  char* base = nullptr;
  size_t size = 0;
};

// Hands out addresses, or with no memory behind it only counts: one layout for both.
struct Layout {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* found = (T*)(base + used);
    used += (n * sizeof(T) + 63) / 64 * 64;
    return found;
  }
};

template <class T>
struct Gates {  // of one layer (or of all) in one chunk
  T *GT, *beta, *phi;               // [j][i]; [i]
  T *end_M, *end_S;                 // [j]: the last rows of G and N
  T end_beta, end_phi, end_mu;
  double *G, *N, *lr, *a, *mu, *beta_d, *phi_d, *mu_prod;  // kept for the backward
};

template <class T>
struct Write {  // one chunk's write pass
  T *h[MAX_LAYERS], *z[MAX_LAYERS], *s[MAX_LAYERS], *t[MAX_LAYERS], *d[MAX_LAYERS];
};

struct Span {
  int64_t begin, width;
};

inline int64_t chunk_count(const Args& a) {
  int64_t head = std::min(a.T, (a.chunk - a.offset) % a.chunk);
  return (head > 0) + (a.T - head + a.chunk - 1) / a.chunk;
}

inline Span span_of(const Args& a, int64_t c) {
  int64_t head = std::min(a.T, (a.chunk - a.offset) % a.chunk);
  if (head && c == 0) return {0, head};
  int64_t begin = head + (c - (head > 0)) * a.chunk;
  return {begin, std::min(a.chunk, a.T - begin)};
}

template <class T>
class Head {
 public:
  Head(const Args& a, char* memory, bool backward) : a(a), layout{memory} {
    L = a.L;
    for (int l = 0; l <= L; l++) n[l] = a.width[l], wide = std::max(wide, n[l]);
    for (int l = 0; l < L; l++) start[l] = P, P += n[l] * n[l + 1];
    state = P * (a.momentum ? 2 : 1);
    C = padded(std::min(a.chunk, a.T));
    q = take(n[0] * C), k = take(n[0] * C), v = take(n[L] * C);
    for (int l = 0; l < L; l++) {
      x[l] = l ? take(n[l] * C) : q;
      y[l] = take(n[l + 1] * C);
      R[l] = take(C * C);
    }
    score = take(C * C), square = take(C * C), square2 = take(C * C);
    rounded = take(padded(wide) * C), rounded2 = take(padded(wide) * C);
    scaled = take(wide * C);
    lanes = take(4 * C);
    unit = take(n[L] * C), error = take(n[L] * C);
    sets = a.gate_layers;
    chunks = backward ? a.group : 1;
    for (int c = 0; c < chunks; c++) {
      allocate(writes[c]);
      for (int l = 0; l < sets; l++) allocate(gates[c][l]);
    }
    if (!backward) return;
    for (int c = 0; c < chunks; c++) states[c] = take(state);
    for (int l = 0; l < L; l++) {
      gh[l] = take(n[l] * C), gd[l] = take(n[l + 1] * C), gz[l] = take(n[l + 1] * C);
      sy[l] = take(n[l + 1] * C);
    }
    g_one = take(wide * C), g_two = take(wide * C), scaled2 = take(wide * C);
    g_residual = take(n[L] * C);
    for (int l = 0; l < sets; l++) {
      dG[l] = layout.take<double>(C * C);
      d_beta[l] = layout.take<double>(C), d_phi[l] = layout.take<double>(C);
      d_end_S[l] = layout.take<double>(C);
    }
    Dr = layout.take<double>(C), Ds = layout.take<double>(C);
  }
  size_t bytes() const { return layout.used; }

  void forward(int64_t head);
  void backward(int64_t head);

 private:
  const Args& a;
  Layout layout;
  int L, sets, chunks;
  int64_t n[MAX_LAYERS + 1], start[MAX_LAYERS], P = 0, state, C, wide = 0;
  int64_t row, column;  // of the head: b and h
  T *q, *k, *v, *x[MAX_LAYERS], *y[MAX_LAYERS], *R[MAX_LAYERS];
  T *score, *square, *square2, *rounded, *rounded2, *scaled, *scaled2, *lanes, *unit, *error;
  T* g_residual;
  const T* at[MAX_GROUP];
  int64_t live;  // tokens of the chunk at hand: sums over tokens stop there
  Write<T> writes[MAX_GROUP];
  Gates<T> gates[MAX_GROUP][MAX_LAYERS];
  T* states[MAX_GROUP];
  T *gh[MAX_LAYERS], *gd[MAX_LAYERS], *gz[MAX_LAYERS], *sy[MAX_LAYERS], *g_one, *g_two;
  double *dG[MAX_LAYERS], *d_beta[MAX_LAYERS], *d_phi[MAX_LAYERS], *d_end_S[MAX_LAYERS];
  double d_end_mu[MAX_LAYERS], *Dr, *Ds;

  T* take(int64_t count) { return layout.take<T>(count); }

  void allocate(Write<T>& w) {
    for (int l = 0; l < L; l++) {
      w.h[l] = l ? take(n[l] * C) : nullptr;
      w.z[l] = take(n[l + 1] * C);
      w.d[l] = take(n[l + 1] * C);
      w.s[l] = take(n[l + 1] * C);
      w.t[l] = take(n[l + 1] * C);
    }
  }

  void allocate(Gates<T>& g) {
    g.GT = take(C * C), g.beta = take(C), g.phi = take(C), g.end_M = take(C), g.end_S = take(C);
    g.G = layout.take<double>(C * C), g.N = layout.take<double>(C * C);
    g.lr = layout.take<double>(C), g.a = layout.take<double>(C), g.mu = layout.take<double>(C);
    g.beta_d = layout.take<double>(C), g.phi_d = layout.take<double>(C);
    g.mu_prod = layout.take<double>(C);
  }

  const Gates<T>& gate(int c, int l) const { return gates[c][sets > 1 ? l : 0]; }

  T* of_head(void* const* weights, int l, int64_t head) const {
    return (T*)weights[l] + head * n[l] * n[l + 1];
  }
  const T* of_head(const void* const* weights, int l, int64_t head) const {
    return (const T*)weights[l] + head * n[l] * n[l + 1];
  }

  bool exists(int64_t t) const { return !a.mask || a.mask[row * a.T + t]; }
  int64_t last_chunk() const { return a.last ? a.last[row] : chunk_count(a) - 1; }

  // [tokens][features] of [B, T, H, features] <-> feature-major.
  void load(const void* from, int64_t features, Span s, T* into) const {
    const T* src = (const T*)from + ((row * a.T + s.begin) * a.H + column) * features;
    turn(src, a.H * features, s.width, features, into, C);
    for (int64_t f = 0; s.width < C && f < features; f++)
      std::fill(into + f * C + s.width, into + (f + 1) * C, T(0));
  }
  void store(const T* from, int64_t features, Span s, void* into) const {
    T* dst = (T*)into + ((row * a.T + s.begin) * a.H + column) * features;
    turn(from, C, features, s.width, dst, a.H * features);
  }

  void form_gates(Span s, int set, Gates<T>& g) const;
  void write_pass(const T* const* A, Write<T>& w);
  void standardise(const T* z, T* unit, T* scale) const;
  void standardise_back(const T* g, const T* unit, const T* scale, T* into) const;
  void output_error(const T* z, T* d);
  void read_layer(int l, const T* W, const T* S, const Write<T>& w, const Gates<T>& g);
  void end_layer(int l, const T* W, const T* S, T* W1, T* S1, const Write<T>& w, const Gates<T>& g);
  const T* turned(const T* from, int64_t features, const T* factor, T* into) const;
  void read_back(int l, const T* W, const T* S, T* g_M, T* g_S, const T* g_y, T* g_x,
                 const Write<T>& w, const Gates<T>& g, int set);
  void write_back(const T* const* A, T* const* g_A, const Write<T>& w, int64_t head);
  bool error_back(const Write<T>& w, int64_t head);
  void norm_back(T* g_y, int64_t head);
  void again(int64_t begin, int64_t here, int64_t head);
  void chunk_back(Span s, int64_t i, const T* const* first, T* const* g_M, T* const* g_S,
                  T* const* into, int64_t head);
  void gates_back(Span s, int set, const Gates<T>& g) const;
};

template <class T>
void Head<T>::form_gates(Span s, int set, Gates<T>& g) const {
  int64_t w = s.width;
  auto at = [&](const void* gate, int64_t t) {
    return double(((const T*)gate)[((row * a.T + s.begin + t) * a.H + column) * sets + set]);
  };
  double beta = 1, phi = 0, mu = 1;
  std::fill(g.G, g.G + C * C, 0.0);
  std::fill(g.N, g.N + C * C, 0.0);
  for (int64_t i = 0; i < w; i++) {
    bool real = exists(s.begin + i);
    g.lr[i] = real && a.lr ? at(a.lr, i) : 0;
    g.a[i] = real && a.log_decay ? std::exp(at(a.log_decay, i)) : 1;
    g.mu[i] = real && a.momentum ? std::exp(at(a.log_momentum, i)) : 1;
    double *G = g.G + i * C, *N = g.N + i * C, keep = g.mu[i], decay = g.a[i], add = real;
    if (a.momentum) {
      for (int64_t j = 0; i && j < i; j++) {
        N[j] = keep * N[j - C];
        G[j] = decay * G[j - C] + add * N[j];
      }
      N[i] = g.lr[i], G[i] = add * g.lr[i];
      mu *= keep;
      phi = decay * phi + add * mu;
    } else {
      for (int64_t j = 0; i && j < i; j++) G[j] = decay * G[j - C];
      G[i] = g.lr[i];
    }
    beta *= decay;
    g.beta_d[i] = beta, g.phi_d[i] = phi, g.mu_prod[i] = mu;
  }
  for (int64_t j = 0; j < C; j++) {
    g.beta[j] = j < w ? T(g.beta_d[j]) : T(0);
    g.phi[j] = j < w ? T(g.phi_d[j]) : T(0);
    g.end_M[j] = j < w ? T(g.G[(w - 1) * C + j]) : T(0);
    g.end_S[j] = j < w ? T(g.N[(w - 1) * C + j]) : T(0);
  }
  for (int64_t jb = 0; jb < C; jb += 16)  // the transpose, in tiles
    for (int64_t i = 0; i < C; i++)
      for (int64_t j = jb; j < jb + 16; j++) g.GT[j * C + i] = T(g.G[i * C + j]);
  g.end_beta = T(beta), g.end_phi = T(phi), g.end_mu = T(mu);
}

template <class T>
void Head<T>::standardise(const T* z, T* unit, T* scale) const {
  int64_t V = n[L];
  T* mean = lanes + 3 * C;
  std::fill(mean, mean + C, T(0));
  std::fill(scale, scale + C, T(0));
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++) mean[i] += z[f * C + i];
  for (int64_t i = 0; i < C; i++) mean[i] /= V;
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++) {
      T x = z[f * C + i] - mean[i];
      unit[f * C + i] = x, scale[i] += x * x;
    }
  for (int64_t i = 0; i < C; i++) scale[i] = 1 / std::sqrt(scale[i] / V + T(NORM_EPS));
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++) unit[f * C + i] *= scale[i];
}

// into = scale * (g - mean(g) - unit * mean(g * unit)); into may be g.
template <class T>
void Head<T>::standardise_back(const T* g, const T* unit, const T* scale, T* into) const {
  int64_t V = n[L];
  T *mean = lanes + 2 * C, *along = lanes + 3 * C;
  std::fill(mean, mean + 2 * C, T(0));
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++) {
      mean[i] += g[f * C + i];
      along[i] += g[f * C + i] * unit[f * C + i];
    }
  for (int64_t i = 0; i < 2 * C; i++) mean[i] /= V;
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++)
      into[f * C + i] = scale[i] * (g[f * C + i] - mean[i] - unit[f * C + i] * along[i]);
}

template <class T>
void Head<T>::output_error(const T* z, T* d) {
  int64_t V = n[L];
  if (!a.normed) {
    for (int64_t i = 0; i < V * C; i++) d[i] = a.dot ? -v[i] : z[i] - v[i];
    return;
  }
  const T *weight = (const T*)a.weight + column * V, *bias = (const T*)a.bias + column * V;
  T* scale = lanes;
  standardise(z, unit, scale);
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = f * C; i < (f + 1) * C; i++) {
      error[i] = a.dot ? -v[i] : k[i] + unit[i] * weight[f] + bias[f] - v[i];
      d[i] = error[i] * weight[f];
    }
  standardise_back(d, unit, scale, d);
}

// From k and v as loaded; h[0] is k.
template <class T>
void Head<T>::write_pass(const T* const* A, Write<T>& w) {
  w.h[0] = k;
  for (int l = 0; l < L; l++) {
    multiply<T>({A[l], 1, n[l + 1], w.h[l], C, w.z[l], C}, n[l + 1], C, n[l]);
    if (l + 1 < L) activate(a.gelu, n[l + 1] * C, w.z[l], w.h[l + 1], w.s[l]);
  }
  output_error(w.z[L - 1], w.d[L - 1]);
  for (int l = L - 2; l >= 0; l--) {
    int64_t in = n[l + 1], out = n[l + 2];
    multiply<T>({A[l + 1], out, 1, w.d[l + 1], C, w.t[l], C}, in, C, out);
    for (int64_t i = 0; i < in * C; i++) w.d[l][i] = w.t[l][i] * w.s[l][i];
  }
}

// y[l] from x[l]; leaves R transposed in R[l].
template <class T>
void Head<T>::read_layer(int l, const T* W, const T* S, const Write<T>& w, const Gates<T>& g) {
  int64_t in = n[l], out = n[l + 1];
  multiply<T>({w.h[l], 1, C, x[l], C, R[l], C}, C, C, in);
  for (int64_t i = 0; i < C * C; i++) score[i] = R[l][i] * g.GT[i];
  multiply<T>({W, 1, out, x[l], C, y[l], C, 1, g.beta}, out, C, in);
  if (S) multiply<T>({S, 1, out, x[l], C, y[l], C, 1, g.phi, y[l]}, out, C, in);
  multiply<T>({w.d[l], C, 1, score, C, y[l], C, -1, nullptr, y[l]}, out, C, live);
}

// Token-major, each token's row multiplied by its factor.
template <class T>
const T* Head<T>::turned(const T* from, int64_t features, const T* factor, T* into) const {
  const T* source = from;
  if (factor) {
    for (int64_t f = 0; f < features; f++)
      for (int64_t i = 0; i < C; i++) scaled[f * C + i] = from[f * C + i] * factor[i];
    source = scaled;
  }
  turn(source, C, features, C, into, padded(features));
  return into;
}

template <class T>
void Head<T>::end_layer(int l, const T* W, const T* S, T* W1, T* S1, const Write<T>& w,
                        const Gates<T>& g) {
  int64_t in = n[l], out = n[l + 1], ld = padded(out);
  const T* write = turned(w.d[l], out, g.end_M, rounded);
  multiply<T>({w.h[l], C, 1, write, ld, W1, out, -1, nullptr, W, g.end_beta, S, g.end_phi}, in, out, live);
  if (!S) return;
  write = turned(w.d[l], out, g.end_S, rounded);
  multiply<T>({w.h[l], C, 1, write, ld, S1, out, -1, nullptr, S, g.end_mu}, in, out, live);
}

template <class T>
void Head<T>::forward(int64_t head) {
  row = head / a.H, column = head % a.H;
  T *M[MAX_LAYERS], *S[MAX_LAYERS];
  const T *first[MAX_LAYERS], *opened[MAX_LAYERS];
  for (int l = 0; l < L; l++) {
    int64_t size = n[l] * n[l + 1];
    M[l] = of_head(a.M1, l, head);
    S[l] = a.momentum ? of_head(a.S1, l, head) : nullptr;
    std::copy_n(of_head(a.M0, l, head), size, M[l]);
    if (S[l]) std::copy_n(of_head(a.S0, l, head), size, S[l]);
    opened[l] = a.A0[0] ? of_head(a.A0, l, head) : M[l];
  }
  int64_t count = chunk_count(a), last = last_chunk(), X = a.B * a.H;
  for (int64_t c = 0; c < count; c++) {
    Span s = span_of(a, c);
    if (a.kept && c % a.group == 0) {
      T* kept = (T*)a.kept + (c / a.group * X + head) * state;
      for (int l = 0; l < L; l++) {
        std::copy_n(M[l], n[l] * n[l + 1], kept + start[l]);
        if (S[l]) std::copy_n(S[l], n[l] * n[l + 1], kept + P + start[l]);
      }
    }
    for (int l = 0; l < L; l++) {
      first[l] = c ? M[l] : opened[l];
      if (a.anchor[0] && (c == std::max<int64_t>(last, 0)))
        std::copy_n(first[l], n[l] * n[l + 1], of_head(a.anchor, l, head));
    }
    live = s.width;
    for (int set = 0; set < sets; set++) form_gates(s, set, gates[0][set]);
    load(a.q, n[0], s, q), load(a.k, n[0], s, k), load(a.v, n[L], s, v);
    write_pass(first, writes[0]);
    for (int l = 0; l < L; l++) {
      if (l) activate<T>(a.gelu, n[l] * C, y[l - 1], x[l], nullptr);
      read_layer(l, M[l], S[l], writes[0], gate(0, l));
    }
    T* answer = y[L - 1];
    if (a.normed) {
      const T *weight = (const T*)a.weight + column * n[L], *bias = (const T*)a.bias + column * n[L];
      standardise(answer, unit, lanes);
      for (int64_t f = 0; f < n[L]; f++)
        for (int64_t i = f * C; i < (f + 1) * C; i++)
          answer[i] = q[i] + unit[i] * weight[f] + bias[f];
    }
    store(answer, n[L], s, a.out);
    for (int l = 0; l < L; l++) end_layer(l, M[l], S[l], M[l], S[l], writes[0], gate(0, l));
  }
}

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  constexpr int lanes = 16;
  T sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int m = 0; m < lanes; m++) sums[m] += a[i + m] * b[i + m];
  double total = 0;
  for (int m = 0; m < lanes; m++) total += sums[m];
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

template <class T>
void curvature(bool gelu, int64_t n, const T* z, T* curve) {
  for (int64_t i = 0; i < n; i++) {
    T x = z[i];
    if (gelu) {
      curve[i] = T(INV_SQRT_2PI) * exponential(T(T(-0.5) * x * x)) * (2 - x * x);
    } else {
      T s = 1 / (1 + exponential(T(-x)));
      curve[i] = s * (1 - s) * (2 + x * (1 - 2 * s));
    }
  }
}

// Through layer l's reading and the chunk's end. g_M and g_S go from after the chunk to before it.
template <class T>
void Head<T>::read_back(int l, const T* W, const T* S, T* g_M, T* g_S, const T* g_y, T* g_x,
                        const Write<T>& w, const Gates<T>& g, int set) {
  int64_t in = n[l], out = n[l + 1], ld = padded(out);
  multiply<T>({w.d[l], 1, C, g_y, C, square, C}, C, C, out);
  for (int64_t ib = 0; ib < C; ib += 16)
    for (int64_t j = 0; j < C; j++)
      for (int64_t i = ib; i < ib + 16; i++) dG[set][i * C + j] -= square[j * C + i] * R[l][j * C + i];
  for (int64_t i = 0; i < C * C; i++) score[i] = R[l][i] * g.GT[i], square[i] *= g.GT[i];
  turn(score, C, C, C, square2, C);
  multiply<T>({g_y, C, 1, square2, C, gd[l], C, -1}, out, C, live);
  turn(square, C, C, C, square2, C);
  multiply<T>({x[l], C, 1, square2, C, gh[l], C, -1}, in, C, live);

  T *at_beta = lanes, *at_phi = lanes + C, *at_M = lanes + 2 * C, *at_S = lanes + 3 * C;
  std::fill(lanes, lanes + 4 * C, T(0));
  multiply<T>({W, out, 1, g_y, C, g_x, C}, in, C, out);
  for (int64_t f = 0; f < in; f++)
    for (int64_t i = 0; i < C; i++) {
      at_beta[i] += g_x[f * C + i] * x[l][f * C + i];
      g_x[f * C + i] *= g.beta[i];
    }
  if (S) {
    multiply<T>({S, out, 1, g_y, C, g_one, C}, in, C, out);
    for (int64_t f = 0; f < in; f++)
      for (int64_t i = 0; i < C; i++) {
        at_phi[i] += g_one[f * C + i] * x[l][f * C + i];
        g_x[f * C + i] += g_one[f * C + i] * g.phi[i];
      }
  }
  multiply<T>({w.h[l], C, 1, square, C, g_x, C, -1, nullptr, g_x}, in, C, live);

  multiply<T>({g_M, out, 1, w.d[l], C, g_one, C}, in, C, out);
  for (int64_t f = 0; f < in; f++)
    for (int64_t i = 0; i < C; i++) {
      at_M[i] += g_one[f * C + i] * w.h[l][f * C + i];
      gh[l][f * C + i] -= g_one[f * C + i] * g.end_M[i];
    }
  multiply<T>({g_M, 1, out, w.h[l], C, gd[l], C, -1, g.end_M, gd[l]}, out, C, in);
  if (S) {
    multiply<T>({g_S, out, 1, w.d[l], C, g_one, C}, in, C, out);
    for (int64_t f = 0; f < in; f++)
      for (int64_t i = 0; i < C; i++) {
        at_S[i] += g_one[f * C + i] * w.h[l][f * C + i];
        gh[l][f * C + i] -= g_one[f * C + i] * g.end_S[i];
      }
    multiply<T>({g_S, 1, out, w.h[l], C, gd[l], C, -1, g.end_S, gd[l]}, out, C, in);
  }
  for (int64_t i = 0; i < C; i++) {
    d_beta[set][i] += at_beta[i], d_phi[set][i] += at_phi[i];
    d_end_S[set][i] -= at_S[i];
  }
  int64_t size = in * out, tail = live - 1;
  for (int64_t j = 0; j < C; j++) dG[set][tail * C + j] -= at_M[j];
  d_beta[set][tail] += dot(W, g_M, size);
  if (S) {
    d_phi[set][tail] += dot(S, g_M, size);
    d_end_mu[set] += dot(S, g_S, size);
    const T* read = turned(g_y, out, g.phi, rounded);
    multiply<T>({x[l], C, 1, read, ld, g_S, out, 1, nullptr, g_S, g.end_mu, g_M, g.end_phi}, in, out, live);
  }
  const T* read = turned(g_y, out, g.beta, rounded);
  multiply<T>({x[l], C, 1, read, ld, g_M, out, 1, nullptr, g_M, g.end_beta}, in, out, live);
}

// From gd[L - 1]: gz[L - 1] (false: none), error <- gradient in v, and k's in g_two if normed.
template <class T>
bool Head<T>::error_back(const Write<T>& w, int64_t head) {
  int64_t V = n[L];
  T *g = gd[L - 1], *into = gz[L - 1];
  if (!a.normed) {
    for (int64_t i = 0; i < V * C; i++) into[i] = g[i], error[i] = -g[i];
    return !a.dot;
  }
  const T *weight = (const T*)a.weight + column * V, *bias = (const T*)a.bias + column * V;
  T *g_weight = (T*)a.g_weight + head * V, *g_bias = (T*)a.g_bias + head * V;
  T *scale = lanes, *g_scale = lanes + C, *bare = scaled, *g_unit = g_one, *g_error = g_two;
  standardise(w.z[L - 1], unit, scale);
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = f * C; i < (f + 1) * C; i++) {
      error[i] = a.dot ? -v[i] : k[i] + unit[i] * weight[f] + bias[f] - v[i];
      bare[i] = error[i] * weight[f];
    }
  T *mean = lanes + 2 * C, *along = lanes + 3 * C, *g_mean = square, *g_along = square + C;
  std::fill(mean, mean + 2 * C, T(0));
  std::fill(square, square + 2 * C, T(0));
  std::fill(g_scale, g_scale + C, T(0));
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++) {
      int64_t at = f * C + i;
      mean[i] += bare[at] / V, along[i] += bare[at] * unit[at] / V;
      g_mean[i] += g[at] * scale[i] / V, g_along[i] += g[at] * scale[i] * unit[at] / V;
    }
  for (int64_t f = 0; f < V; f++) {
    double sum_weight = 0, sum_bias = 0;
    for (int64_t i = 0; i < C; i++) {
      int64_t at = f * C + i;
      T whole = bare[at], g_bare = g[at] * scale[i];
      g_scale[i] += g[at] * (whole - mean[i] - unit[at] * along[i]) / V;
      T g_whole = g_bare - g_mean[i] - unit[at] * g_along[i];
      g_unit[at] = -g_bare * along[i] - whole * g_along[i];
      g_error[at] = g_whole * weight[f];
      T part = g_whole * error[at];
      if (!a.dot) {
        g_unit[at] += g_error[at] * weight[f];
        part += g_error[at] * unit[at];
        sum_bias += g_error[at];
      }
      sum_weight += part;
      error[at] = -g_error[at];
    }
    g_weight[f] += sum_weight, g_bias[f] += sum_bias;
  }
  standardise_back(g_unit, unit, scale, into);
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = 0; i < C; i++)
      into[f * C + i] -= g_scale[i] * scale[i] * scale[i] * unit[f * C + i];
  return true;
}

// Through the inner gradients, into g_A and gh[0]: second derivatives of the memory's loss.
template <class T>
void Head<T>::write_back(const T* const* A, T* const* g_A, const Write<T>& w, int64_t head) {
  for (int l = 0; l + 1 < L; l++) {
    int64_t in = n[l + 1], out = n[l + 2], size = in * C;
    curvature(a.gelu, size, w.z[l], g_one);
    for (int64_t i = 0; i < size; i++) {
      gz[l][i] = gd[l][i] * w.t[l][i] * g_one[i];
      g_one[i] = gd[l][i] * w.s[l][i];
    }
    multiply<T>({A[l + 1], 1, out, g_one, C, gd[l + 1], C, 1, nullptr, gd[l + 1]}, out, C, in);
    const T* write = turned(w.d[l + 1], out, nullptr, rounded);
    multiply<T>({g_one, C, 1, write, padded(out), g_A[l + 1], out, 1, nullptr, g_A[l + 1]}, in, out, live);
  }
  bool through = error_back(w, head);
  for (int l = L - 1; l >= 0; l--) {
    int64_t in = n[l], out = n[l + 1];
    if (through) {
      const T* g_out = turned(gz[l], out, nullptr, rounded);
      multiply<T>({w.h[l], C, 1, g_out, padded(out), g_A[l], out, 1, nullptr, g_A[l]}, in, out, live);
      multiply<T>({A[l], out, 1, gz[l], C, gh[l], C, 1, nullptr, gh[l]}, in, C, out);
    }
    through = true;
    if (l)
      for (int64_t i = 0; i < in * C; i++) gz[l - 1][i] += gh[l][i] * w.s[l - 1][i];
  }
  if (a.normed && !a.dot)
    for (int64_t i = 0; i < n[0] * C; i++) gh[0][i] += g_two[i];
}

template <class T>
void Head<T>::gates_back(Span s, int set, const Gates<T>& g) const {
  int64_t w = s.width;
  std::fill(Dr, Dr + C, 0.0);
  std::fill(Ds, Ds + C, 0.0);
  double D_beta = 0, D_phi = 0, D_mu = 0;
  for (int64_t i = w - 1; i >= 0; i--) {
    double later_a = i + 1 < w ? g.a[i + 1] : 0, later_mu = i + 1 < w ? g.mu[i + 1] : 0;
    double add = exists(s.begin + i), g_a = 0, g_mu = 0;
    const double *row_dG = dG[set] + i * C, *G = g.G + (i - 1) * C, *N = g.N + (i - 1) * C;
    for (int64_t j = 0; j <= i; j++) {
      Dr[j] = row_dG[j] + later_a * Dr[j];
      Ds[j] = (i + 1 < w ? later_mu * Ds[j] : d_end_S[set][j]) + add * Dr[j];
    }
    D_beta = d_beta[set][i] + later_a * D_beta;
    D_phi = d_phi[set][i] + later_a * D_phi;
    D_mu = (i + 1 < w ? later_mu * D_mu : d_end_mu[set]) + add * D_phi;
    if (i) {
      g_a = dot(Dr, G, i) + D_phi * g.phi_d[i - 1];
      g_mu = dot(Ds, N, i);
    }
    g_a += D_beta * (i ? g.beta_d[i - 1] : 1);
    g_mu += D_mu * (i ? g.mu_prod[i - 1] : 1);
    int64_t at = ((row * a.T + s.begin + i) * a.H + column) * sets + set;
    if (a.g_lr) ((T*)a.g_lr)[at] = T(add * (a.momentum ? Ds[i] : Dr[i]));
    if (a.g_log_decay) ((T*)a.g_log_decay)[at] = T(add * g_a * g.a[i]);
    if (a.g_log_momentum) ((T*)a.g_log_momentum)[at] = T(add * g_mu * g.mu[i]);
  }
}

template <class T>
void Head<T>::backward(int64_t head) {
  row = head / a.H, column = head % a.H;
  int64_t count = chunk_count(a), last = last_chunk(), V = n[L];
  T *g_M[MAX_LAYERS], *g_S[MAX_LAYERS], *g_A[MAX_LAYERS];
  for (int l = 0; l < L; l++) {
    int64_t size = n[l] * n[l + 1];
    g_M[l] = of_head(a.g_M0, l, head), g_S[l] = a.momentum ? of_head(a.g_S0, l, head) : nullptr;
    std::copy_n(of_head(a.g_M1, l, head), size, g_M[l]);
    if (g_S[l]) std::copy_n(of_head(a.g_S1, l, head), size, g_S[l]);
    g_A[l] = a.A0[0] ? of_head(a.g_A0, l, head) : nullptr;
    if (g_A[l]) std::fill(g_A[l], g_A[l] + size, T(0));
  }
  if (a.normed) {
    std::fill((T*)a.g_weight + head * V, (T*)a.g_weight + (head + 1) * V, T(0));
    std::fill((T*)a.g_bias + head * V, (T*)a.g_bias + (head + 1) * V, T(0));
  }
  for (int64_t begin = (count - 1) / a.group * a.group; begin >= 0; begin -= a.group) {
    int64_t here = std::min(a.group, count - begin);
    again(begin, here, head);
    for (int64_t i = here - 1; i >= 0; i--) {
      bool opened = a.A0[0] && begin + i == 0;
      const T* first[MAX_LAYERS];
      T* into[MAX_LAYERS];
      for (int l = 0; l < L; l++) {
        first[l] = opened ? of_head(a.A0, l, head) : at[i] + start[l];
        into[l] = opened ? g_A[l] : g_M[l];
      }
      chunk_back(span_of(a, begin + i), i, first, g_M, g_S, into, head);
      if (a.g_anchor[0] && begin + i == std::max<int64_t>(last, 0))
        for (int l = 0; l < L; l++) {
          const T* more = of_head(a.g_anchor, l, head);
          for (int64_t m = 0; m < n[l] * n[l + 1]; m++) into[l][m] += more[m];
        }
    }
  }
}

// A group's chunks once more, from the state that was kept: at[i] is the state before chunk i.
template <class T>
void Head<T>::again(int64_t begin, int64_t here, int64_t head) {
  at[0] = (const T*)a.kept + (begin / a.group * a.B * a.H + head) * state;
  for (int64_t i = 0; i < here; i++) {
    Span s = span_of(a, begin + i);
    const T* first[MAX_LAYERS];
    for (int l = 0; l < L; l++)
      first[l] = a.A0[0] && begin + i == 0 ? of_head(a.A0, l, head) : at[i] + start[l];
    live = s.width;
    for (int set = 0; set < sets; set++) form_gates(s, set, gates[i][set]);
    load(a.k, n[0], s, k), load(a.v, n[L], s, v);
    write_pass(first, writes[i]);
    if (i + 1 == here) break;
    for (int l = 0; l < L; l++) {
      T *W1 = states[i + 1] + start[l], *S1 = a.momentum ? W1 + P : nullptr;
      const T *W = at[i] + start[l], *S = a.momentum ? W + P : nullptr;
      end_layer(l, W, S, W1, S1, writes[i], gate(i, l));
    }
    at[i + 1] = states[i + 1];
  }
}

template <class T>
void Head<T>::chunk_back(Span s, int64_t i, const T* const* first, T* const* g_M, T* const* g_S,
                         T* const* into, int64_t head) {
  int64_t V = n[L];
  live = s.width;
  load(a.q, n[0], s, q), load(a.k, n[0], s, k), load(a.v, V, s, v);
  for (int set = 0; set < sets; set++) {
    std::fill(dG[set], dG[set] + C * C, 0.0);
    std::fill(d_beta[set], d_beta[set] + C, 0.0);
    std::fill(d_phi[set], d_phi[set] + C, 0.0);
    std::fill(d_end_S[set], d_end_S[set] + C, 0.0);
    d_end_mu[set] = 0;
  }
  const Write<T>& w = writes[i];
  for (int l = 0; l < L; l++) {
    const T *W = at[i] + start[l], *S = a.momentum ? W + P : nullptr;
    if (l) activate(a.gelu, n[l] * C, y[l - 1], x[l], sy[l - 1]);
    if (l + 1 < L || a.normed)
      read_layer(l, W, S, w, gate(i, l));
    else
      multiply<T>({w.h[l], 1, C, x[l], C, R[l], C}, C, C, n[l]);
  }
  T *g_y = rounded2, *g_x = scaled2;
  load(a.g_out, V, s, g_y);
  if (a.normed) norm_back(g_y, head);
  for (int l = L - 1; l >= 0; l--) {
    const T *W = at[i] + start[l], *S = a.momentum ? W + P : nullptr;
    read_back(l, W, S, g_M[l], g_S[l], g_y, g_x, w, gate(i, l), sets > 1 ? l : 0);
    if (l)
      for (int64_t m = 0; m < n[l] * C; m++) g_x[m] *= sy[l - 1][m];
    std::swap(g_x, g_y);
  }
  if (a.normed)
    for (int64_t m = 0; m < V * C; m++) g_y[m] += g_residual[m];
  store(g_y, n[0], s, a.g_q);
  write_back(first, into, w, head);
  store(gh[0], n[0], s, a.g_k);
  store(error, V, s, a.g_v);
  for (int set = 0; set < sets; set++) gates_back(s, set, gates[i][set]);
}

// Through the answer's residual and LayerNorm: g_y becomes the gradient in the MLP's output.
template <class T>
void Head<T>::norm_back(T* g_y, int64_t head) {
  int64_t V = n[L];
  const T* weight = (const T*)a.weight + column * V;
  T *g_weight = (T*)a.g_weight + head * V, *g_bias = (T*)a.g_bias + head * V;
  standardise(y[L - 1], unit, lanes);
  std::copy_n(g_y, V * C, g_residual);
  for (int64_t f = 0; f < V; f++) {
    g_weight[f] += dot(g_y + f * C, unit + f * C, C);
    for (int64_t i = f * C; i < (f + 1) * C; i++) g_bias[f] += g_y[i], g_y[i] *= weight[f];
  }
  standardise_back(g_y, unit, lanes, g_y);
}

struct FlushToZero {  // on this thread, for as long as it lives: decayed weights become denormal
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

template <class T>
bool all_heads(const Args& a, bool backward, int threads) {
  size_t bytes = Head<T>(a, nullptr, backward).bytes() + 1024;  // a tile may read past a row's end
  std::atomic<int64_t> next{0};
  std::atomic<bool> done{true};
#pragma omp parallel num_threads(threads)
  {
    thread_local Arena arena;
    FlushToZero flush;
    if (char* memory = arena.reserve(bytes)) {
      Head<T> head(a, memory, backward);
      for (int64_t i; (i = next++) < a.B * a.H;) backward ? head.backward(i) : head.forward(i);
    } else {
      done = false;
    }
  }
  return done;
}

}  // namespace

// Returns 0, or 1 when there is no memory left.
extern "C" int pytitans_chunks(const Args* a, int wide, int backward, int threads) {
  return !(wide ? all_heads<double>(*a, backward, threads) : all_heads<float>(*a, backward, threads));
}
