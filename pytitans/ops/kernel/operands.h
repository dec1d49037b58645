// What products take for operands: matrices as they lie, or rounded to pairs of bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"

namespace {

// Either for the whole matrix [rows][cols]; null: not wanted.
template <class E>
struct Packed {
  E* across;  // [terms(rows)][cols]: sums over rows
  E* along;   // [rows][terms(cols)]: sums over columns
};

#if defined(__AVX512BF16__)
inline __m512i round_pair(__m512 first, __m512 second) {  // 16 of each, one after the other
  return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

inline void pack(const float* x, int64_t rows, int64_t cols, const float* factor, Packed<Pair> to) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                       22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const int64_t half = terms<Pair>(cols);
  auto some = [](int64_t n) { return n >= 16 ? __mmask16(-1) : __mmask16((1 << std::max<int64_t>(n, 0)) - 1); };
  for (int64_t r = 0; r < rows; r += 2) {
    bool both = r + 1 < rows;
    const float* row = x + r * cols;
    Pair* across = to.across ? to.across + r / 2 * cols : nullptr;
    Pair* along = to.along ? to.along + r * half : nullptr;
    for (int64_t c = 0; c < cols; c += 32) {
      __mmask16 m0 = some(cols - c), m1 = some(cols - c - 16), m2 = some(half - c / 2);
      __m512 a0 = _mm512_maskz_loadu_ps(m0, row + c), a1 = _mm512_maskz_loadu_ps(m1, row + c + 16);
      __m512 b0 = _mm512_setzero_ps(), b1 = b0;
      if (both) {
        b0 = _mm512_maskz_loadu_ps(m0, row + cols + c);
        b1 = _mm512_maskz_loadu_ps(m1, row + cols + c + 16);
      }
      if (factor) {
        __m512 f0 = _mm512_maskz_loadu_ps(m0, factor + c), f1 = _mm512_maskz_loadu_ps(m1, factor + c + 16);
        a0 = a0 * f0, b0 = b0 * f0, a1 = a1 * f1, b1 = b1 * f1;
      }
      if (across) {
        _mm512_mask_storeu_epi32(across + c, m0, _mm512_permutexvar_epi16(zip, round_pair(a0, b0)));
        _mm512_mask_storeu_epi32(across + c + 16, m1, _mm512_permutexvar_epi16(zip, round_pair(a1, b1)));
      }
      if (along) {
        _mm512_mask_storeu_epi32(along + c / 2, m2, round_pair(a0, a1));
        if (both) _mm512_mask_storeu_epi32(along + half + c / 2, m2, round_pair(b0, b1));
      }
    }
  }
}
#endif

// Between a text's own numbers and the kernel's.
template <class T>
inline void widen(const T* from, int64_t n, T* into) {
  std::copy_n(from, n, into);
}
template <class T>
inline void narrow(const T* from, int64_t n, T* into) {
  std::copy_n(from, n, into);
}
inline void widen(const uint16_t* from, int64_t n, float* into) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = (uint32_t)from[i] << 16;
    std::memcpy(into + i, &bits, 4);
  }
}
inline void narrow(const float* from, int64_t n, uint16_t* into) {  // to the nearest, ties to even
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    into[i] = from[i] != from[i] ? 0x7fc0 : rounded;
  }
}

}  // namespace
