// Activations with their derivatives, and sums, in loops that vectorise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "product.h"

namespace {

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

// y may be z. `slope` and `curve`, the first two derivatives, are wanted in that order.
template <class T>
void activate(bool gelu, int64_t n, const T* z, T* y, T* slope, T* curve) {
  if (gelu) {
    for (int64_t i = 0; i < n; i++) {
      T x = z[i], cdf = T(0.5) * (1 + error_function(T(x * T(SQRT_HALF))));
      T density = slope ? T(INV_SQRT_2PI) * exponential(T(T(-0.5) * x * x)) : T(0);
      y[i] = x * cdf;
      if (slope) slope[i] = cdf + x * density;
      if (curve) curve[i] = density * (2 - x * x);
    }
  } else if (curve) {
    for (int64_t i = 0; i < n; i++) {
      T x = z[i], s = 1 / (1 + exponential(T(-x)));
      y[i] = x * s;
      slope[i] = s * (1 + x * (1 - s));
      curve[i] = s * (1 - s) * (2 + x * (1 - 2 * s));
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

template <class T>
double dot(const T* a, const T* b, int64_t n) {
  using V = typename Vec<T>::type;
  using U = typename Vec<T>::loose;
  constexpr int lanes = Vec<T>::lanes;
  V sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) sums[m] += *(const U*)(a + i + m * lanes) * *(const U*)(b + i + m * lanes);
  V whole = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int m = 0; m < lanes; m++) total += whole[m];
  for (; i < n; i++) total += a[i] * b[i];
  return total;
}

}  // namespace
