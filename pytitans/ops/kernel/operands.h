// What products take for operands: matrices as they lie, or rounded to pairs of bfloat16.
#pragma once

#include <algorithm>
#include <cstdint>

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

// Two rows of 32 columns at most; `two`: whether there is a second, or it is 0.
inline __attribute__((always_inline)) void pack_block(const float* x, int64_t ld, bool two, int64_t cols,
                                                      const float* factor, Pair* across, Pair* along,
                                                      int64_t half) {
  const __m512i zip = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7,
                                       22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  auto some = [](int64_t n) { return __mmask16(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); };
  const __mmask16 m0 = some(cols), m1 = some(cols - 16), m2 = some((cols + 1) / 2);
  __m512 a0 = _mm512_maskz_loadu_ps(m0, x), a1 = _mm512_maskz_loadu_ps(m1, x + 16);
  __m512 b0 = _mm512_maskz_loadu_ps(two ? m0 : 0, x + ld), b1 = _mm512_maskz_loadu_ps(two ? m1 : 0, x + ld + 16);
  if (factor) {
    __m512 f0 = _mm512_maskz_loadu_ps(m0, factor), f1 = _mm512_maskz_loadu_ps(m1, factor + 16);
    a0 *= f0, b0 *= f0, a1 *= f1, b1 *= f1;
  }
  if (across) {
    _mm512_mask_storeu_epi32(across, m0, _mm512_permutexvar_epi16(zip, round_pair(a0, b0)));
    _mm512_mask_storeu_epi32(across + 16, m1, _mm512_permutexvar_epi16(zip, round_pair(a1, b1)));
  }
  if (along) {
    _mm512_mask_storeu_epi32(along, m2, round_pair(a0, a1));
    _mm512_mask_storeu_epi32(along + half, two ? m2 : 0, round_pair(b0, b1));
  }
}

inline void pack(const float* x, int64_t rows, int64_t cols, const float* factor, Packed<Pair> to) {
  const int64_t half = terms<Pair>(cols);
  for (int64_t r = 0; r < rows; r += 2, x += 2 * cols) {
    bool two = r + 1 < rows;
    Pair* across = to.across ? to.across + r / 2 * cols : nullptr;
    Pair* along = to.along ? to.along + r * half : nullptr;
    for (int64_t c = 0; c < cols; c += 32) {
      const float* f = factor ? factor + c : nullptr;
      Pair *at_across = across ? across + c : nullptr, *at_along = along ? along + c / 2 : nullptr;
      if (two && cols - c >= 32)
        pack_block(x + c, cols, true, 32, f, at_across, at_along, half);
      else if (two && cols - c == 16)
        pack_block(x + c, cols, true, 16, f, at_across, at_along, half);
      else
        pack_block(x + c, cols, two, cols - c, f, at_across, at_along, half);
    }
  }
}
#endif

}  // namespace
