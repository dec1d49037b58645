// Matrix products and transposes in registers: float, double, or float from pairs of bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
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

enum class Pair : uint32_t {};  // two bfloat16 numbers that follow each other in a sum

template <>
struct Vec<Pair> : Vec<uint32_t> {};

template <class E>
constexpr int64_t terms(int64_t n) {  // items of E that hold n terms of a sum
  return std::is_same_v<E, Pair> ? (n + 1) / 2 : n;
}

constexpr int64_t PAD = 16;

inline int64_t padded(int64_t n) { return (n + PAD - 1) / PAD * PAD; }

// ---- out = times * (c_in * in + c_more * more + sign * lane * (A @ B)) ------------------------

template <class T, class E>
struct Product {
  const E* A;
  int64_t rows_by, cols_by;  // strides of A's [M][K]
  const E* B;                // [K][N], rows padded to PAD
  int64_t ldb;
  T* out;
  int64_t ldo, M, N, K;  // K in items of E
  T sign = 1, c_in = 1, c_more = 1;
  const T *lane = nullptr, *in = nullptr, *more = nullptr, *times = nullptr, *with = nullptr;
  T *sums = nullptr, *scaled = nullptr;

  Product minus() const { return sign_of(-1); }
  Product by(const T* factor) const {  // one for each column
    Product p = *this;
    p.lane = factor;
    return p;
  }
  Product plus(const T* x, T c = 1) const {  // with out's leading dimension; may be out itself
    Product p = *this;
    p.in ? (p.more = x, p.c_more = c) : (p.in = x, p.c_in = c);
    return p;
  }
  Product then_by(const T* factor) const {  // one for each entry, last of all
    Product p = *this;
    p.times = factor;
    return p;
  }
  Product summing(const T* x, T* into) const {  // into[column] += (A @ B) * x
    Product p = *this;
    p.with = x, p.sums = into;
    return p;
  }
  Product scaling(T* x) const {  // x *= A @ B
    Product p = *this;
    p.scaled = x;
    return p;
  }

 private:
  Product sign_of(T s) const {
    Product p = *this;
    p.sign = s;
    return p;
  }
};

template <class T>
inline __attribute__((always_inline)) void add_to(typename Vec<T>::type& sum, T x,
                                                  const typename Vec<T>::type& row) {
  sum += x * row;
}
#if defined(__AVX512BF16__)
inline __attribute__((always_inline)) void add_to(Vec<float>::type& sum, Pair x,
                                                  const Vec<Pair>::type& row) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)row);
}
#endif

// f(row, vector) for every vector of a tile, unrolled.
template <int MR, int NV, class F>
inline __attribute__((always_inline)) void each(F f) {
#pragma GCC unroll 24
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) f(r, n);
}

// Rows [i, i + MR) and the columns from j on, at most NV vectors of them; sums over [k, end).
// A's rows or columns follow each other without a gap (BY_ROW: rows), which spares registers.
template <class T, class E, int MR, int NV, bool BY_ROW>
inline __attribute__((always_inline)) void tile(const Product<T, E>& p, int64_t i, int64_t j, int64_t k,
                                                int64_t end, int64_t columns) {
  using V = typename Vec<T>::type;
  using U = typename Vec<T>::loose;
  constexpr int lanes = Vec<T>::lanes;
  V acc[MR][NV];
  each<MR, NV>([&](int r, int n) { acc[r][n] = V{}; });
  const int64_t by_row = BY_ROW ? 1 : p.rows_by, by_col = BY_ROW ? p.cols_by : 1;
  const E* a[(MR + 3) / 4];  // of every fourth row
  for (int r = 0; r < MR; r += 4) a[r / 4] = p.A + (i + r) * by_row + k * by_col;
  const E* b = p.B + k * p.ldb + j;
  for (; k < end; k++, b += p.ldb) {
    typename Vec<E>::type row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) row[n] = *(const typename Vec<E>::loose*)(b + n * lanes);
#pragma GCC unroll 24
    for (int r = 0; r < MR; r++) {
      E x = a[r / 4][r % 4 * by_row];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) add_to(acc[r][n], x, row[n]);
    }
#pragma GCC unroll 6
    for (int r = 0; r < MR; r += 4) a[r / 4] += by_col;
  }
  int64_t ld = p.ldo, at = i * ld + j;
  auto load = [&](const T* x, int r, int n) { return *(const U*)(x + at + r * ld + n * lanes); };
  if (NV == 1 && columns < lanes) {  // a weight's last columns: tokens are padded
    for (int r = 0; r < MR; r++)
      for (int64_t m = 0; m < columns; m++) {
        int64_t here = at + r * ld + m;
        T x = acc[r][0][m] * p.sign;
        if (p.in) x += p.c_in * p.in[here];
        if (p.more) x += p.c_more * p.more[here];
        p.out[here] = x;
      }
    return;
  }
  if (p.with) {
    V total[NV];
    for (int n = 0; n < NV; n++) total[n] = *(U*)(p.sums + j + n * lanes);
    each<MR, NV>([&](int r, int n) { total[n] += acc[r][n] * load(p.with, r, n); });
    for (int n = 0; n < NV; n++) *(U*)(p.sums + j + n * lanes) = total[n];
  }
  if (p.scaled)
    each<MR, NV>([&](int r, int n) { *(U*)(p.scaled + at + r * ld + n * lanes) *= acc[r][n]; });
  if (p.lane) {
    V lane[NV];
    for (int n = 0; n < NV; n++) lane[n] = p.sign * *(const U*)(p.lane + j + n * lanes);
    each<MR, NV>([&](int r, int n) { acc[r][n] *= lane[n]; });
  } else if (p.sign < 0) {
    each<MR, NV>([&](int r, int n) { acc[r][n] = -acc[r][n]; });
  }
  if (p.in) each<MR, NV>([&](int r, int n) { acc[r][n] += p.c_in * load(p.in, r, n); });
  if (p.more) each<MR, NV>([&](int r, int n) { acc[r][n] += p.c_more * load(p.more, r, n); });
  if (p.times) each<MR, NV>([&](int r, int n) { acc[r][n] *= load(p.times, r, n); });
  each<MR, NV>([&](int r, int n) { *(U*)(p.out + at + r * ld + n * lanes) = acc[r][n]; });
}

template <class T, class E, int MR, int NV>
__attribute__((noinline)) int64_t rows(const Product<T, E>& p, int64_t i, int64_t M, int64_t j, int64_t k,
                                       int64_t end, int64_t columns) {
  if (p.rows_by == 1)
    for (; i + MR <= M; i += MR) tile<T, E, MR, NV, true>(p, i, j, k, end, columns);
  else
    for (; i + MR <= M; i += MR) tile<T, E, MR, NV, false>(p, i, j, k, end, columns);
  return i;
}

// Those of the rows before M that tiles of MR and then FEWER rows leave are taken one at a time.
template <class T, class E, int MR, int FEWER, int NV>
void columns_of(const Product<T, E>& p, int64_t M, int64_t j, int64_t k, int64_t end, int64_t columns) {
  int64_t left = M % MR, whole = left && left < 4 ? M - MR - left : M;  // few rows wait for their sums
  int64_t i = rows<T, E, MR, NV>(p, 0, whole, j, k, end, columns);
  i = rows<T, E, FEWER, NV>(p, i, M, j, k, end, columns);
  rows<T, E, 1, NV>(p, i, M, j, k, end, columns);
}

// The rows before M and columns [j, N) of a product, with the terms [k, end) of its sums.
template <class T, class E>
void multiply(const Product<T, E>& p, int64_t M, int64_t j, int64_t N, int64_t k, int64_t end) {
  constexpr int lanes = Vec<T>::lanes;
  constexpr bool many = BYTES != 32;  // 32 registers, else 16
  while (j < N) {
    int64_t left = N - j, vectors = std::max<int64_t>(left / lanes, 1);
    if (many && vectors >= 4) {
      columns_of<T, E, 6, 4, 4>(p, M, j, k, end, left);
      j += 4 * lanes;
    } else if (many && vectors == 3) {
      columns_of<T, E, 8, 4, 3>(p, M, j, k, end, left);
      j += 3 * lanes;
    } else if (vectors >= 2) {
      columns_of<T, E, many ? 12 : 6, 4, 2>(p, M, j, k, end, left);
      j += 2 * lanes;
    } else {
      columns_of<T, E, many ? 16 : 12, 8, 1>(p, M, j, k, end, left);
      j += lanes;
    }
  }
}

template <class T, class E>
void multiply(const Product<T, E>& p) {
  multiply(p, p.M, 0, p.N, 0, p.K);
}

// ---- transposes ---------------------------------------------------------------------------------

// A text's bfloat16, as its bits, and the kernel's float.
template <class To, class From>
To number(From x) {
  if constexpr (std::is_same_v<From, uint16_t>) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  } else if constexpr (std::is_same_v<To, uint16_t>) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    return x;
  }
}

#if defined(__AVX512F__)
template <class From>
inline __m512 numbers(const From* x, __mmask16 some) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(From) == 2)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x)), 16));
#endif
  return _mm512_maskz_loadu_ps(some, x);
}
template <class To>
inline void put_numbers(To* to, __m512 x) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(To) == 2) return _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(x));
#endif
  _mm512_storeu_ps(to, x);
}
#endif

// dst[c][r] = src[r][c] * factor[c]: turned in blocks that stay in the first cache.
template <class From, class To>
void turn(const From* src, int64_t lds, int64_t rows, int64_t cols, To* dst, int64_t ldd,
          const To* factor = nullptr) {
  constexpr int64_t block = 16;
  int64_t r = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(From) <= 4 && sizeof(To) <= 4)
    for (; r + block <= rows; r += block) {
      int64_t c = 0;
      for (; c < cols; c += block) {
        __m512 a[16], b[16];
        int here = std::min(block, cols - c);
        __mmask16 some = (1 << here) - 1;
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) a[i] = numbers(src + (r + i) * lds + c, some);
        if (factor) {
          __m512 f = _mm512_maskz_loadu_ps(some, factor + c);
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
        for (int i = 0; i < 16 && i < here; i++) put_numbers(dst + (c + i) * ldd + r, b[i]);
      }
    }
#endif
  for (; r < rows; r += block)
    for (int64_t c = 0; c < cols; c++)
      for (int64_t i = r; i < std::min(rows, r + block); i++) {
        To x = number<To>(src[i * lds + c]);
        if constexpr (std::is_floating_point_v<To>)
          if (factor) x *= factor[c];
        dst[c * ldd + i] = x;
      }
}

}  // namespace
