// Forward: gates, write pass, reading, and the state at the chunk's end.
#pragma once

#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "head.h"

namespace {

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
  for (int64_t i = 0; i < C; i++) scale[i] = 1 / std::sqrt(scale[i] / V + T(a.norm_eps));
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
  turn(from, C, features, C, into, padded(features), factor);
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
  const T *M[MAX_LAYERS], *S[MAX_LAYERS], *first[MAX_LAYERS];
  for (int l = 0; l < L; l++) {
    M[l] = of_head(a.M0, l, head);
    S[l] = a.momentum ? of_head(a.S0, l, head) : nullptr;
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
      first[l] = c == 0 && a.A0[0] ? of_head(a.A0, l, head) : M[l];
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
    for (int l = 0; l < L; l++) {
      T *M1 = of_head(a.M1, l, head), *S1 = S[l] ? of_head(a.S1, l, head) : nullptr;
      end_layer(l, M[l], S[l], M1, S1, writes[0], gate(0, l));
      M[l] = M1, S[l] = S1;
    }
  }
}

}  // namespace
