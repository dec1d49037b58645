// Matrix products and transposes in registers, for float and double.
#pragma once

#include <algorithm>
#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

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

constexpr int64_t PAD = 16;

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

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
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) acc[r][n] = V{};
  const T* a = p.A + i * p.rows_by;
  const T* b = p.B + j;
  for (int64_t k = 0; k < K; k++, a += p.cols_by, b += p.ldb) {
    V row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) row[n] = *(const U*)(b + n * lanes);
#pragma GCC unroll 24
    for (int r = 0; r < MR; r++) {
      T x = a[r * p.rows_by];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) acc[r][n] += x * row[n];
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
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
  constexpr bool many = BYTES != 32;  // 32 registers, else 16
  int64_t j = 0;
  while (j < N) {
    int64_t left = N - j, i = 0;
    if (many && left > 2 * lanes) {
      i = rows<T, 6, 4>(p, i, M, j, K, left);
      i = rows<T, 2, 4>(p, i, M, j, K, left);
      i = rows<T, 1, 4>(p, i, M, j, K, left);
      j += 4 * lanes;
    } else if (left > lanes) {
      i = rows<T, many ? 8 : 6, 2>(p, i, M, j, K, left);
      i = rows<T, 4, 2>(p, i, M, j, K, left);
      i = rows<T, 1, 2>(p, i, M, j, K, left);
      j += 2 * lanes;
    } else {
      i = rows<T, many ? 16 : 12, 1>(p, i, M, j, K, left);
      i = rows<T, 8, 1>(p, i, M, j, K, left);
      i = rows<T, 1, 1>(p, i, M, j, K, left);
      j += lanes;
    }
  }
}


// dst[c][r] = src[r][c] * factor[c]: turned in blocks that stay in the first cache.
template <class T>
void turn(const T* src, int64_t lds, int64_t rows, int64_t cols, T* dst, int64_t ldd,
          const T* factor = nullptr) {
  constexpr int64_t block = 16;
  int64_t r = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    for (; r + block <= rows; r += block) {
      int64_t c = 0;
      for (; c + block <= cols; c += block) {
        __m512 a[16], b[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(src + (r + i) * lds + c);
        if (factor) {
          __m512 f = _mm512_loadu_ps(factor + c);
#pragma GCC unroll 16
          for (int i = 0; i < 16; i++) a[i] = _mm512_mul_ps(a[i], f);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 2) {
          b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
          b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 16
          for (int h = 0; h < 2; h++) {
            __m512d x = _mm512_castps_pd(b[i + h]), y = _mm512_castps_pd(b[i + 2 + h]);
            a[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
            a[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
          }
#pragma GCC unroll 16
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
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + (c + i) * ldd + r, b[i]);
      }
      for (; c < cols; c++)
        for (int64_t i = r; i < r + block; i++)
          dst[c * ldd + i] = src[i * lds + c] * (factor ? factor[c] : 1);
    }
#endif
  for (; r < rows; r += block)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t i = r; i < std::min(rows, r + block); i++)
        dst[c * ldd + i] = src[i * lds + c] * (factor ? factor[c] : 1);
}

}  // namespace
