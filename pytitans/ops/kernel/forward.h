// Forward: gates, write pass, reading, and the state at the chunk's end.
#pragma once

#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "head.h"

namespace {

template <class T, class E>
void Head<T, E>::form_gates(Span s, int set, Gates<T>& g) {
  int64_t w = s.width;
  auto at = [&](const void* gate, int64_t t) {
    return double(((const T*)gate)[((row * a.T + s.begin + t) * a.H + column) * sets + set]);
  };
  double beta = 1, phi = 0, mu = 1;
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
    for (int64_t j = 0; j <= i; j++) turned[i * C + j] = T(G[j]);
    std::fill(turned + i * C + i + 1, turned + (i + 1) * C, T(0));
  }
  std::fill(turned + w * C, turned + C * C, T(0));
  turn(turned, C, C, C, g.GT, C);
  for (int64_t j = 0; j < C; j++) {
    g.beta[j] = j < w ? T(g.beta_d[j]) : T(0);
    g.phi[j] = j < w ? T(g.phi_d[j]) : T(0);
    g.end_M[j] = j < w ? T(g.G[(w - 1) * C + j]) : T(0);
    g.end_S[j] = j < w && a.momentum ? T(g.N[(w - 1) * C + j]) : T(0);
  }
  g.end_beta = T(beta), g.end_phi = T(phi), g.end_mu = T(mu);
}

template <class T, class E>
void Head<T, E>::standardise(const T* z, T* unit, T* scale) const {
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
template <class T, class E>
void Head<T, E>::standardise_back(const T* g, const T* unit, const T* scale, T* into) const {
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

template <class T, class E>
void Head<T, E>::output_error(const T* z, T* d) {
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
      error[i] = a.dot ? -v[i] : k.data[i] + unit[i] * weight[f] + bias[f] - v[i];
      d[i] = error[i] * weight[f];
    }
  standardise_back(d, unit, scale, d);
}

// From k, v and w.A as they are; h[0] is k.
template <class T, class E>
void Head<T, E>::write_pass(Write<T, E>& w) {
  w.h[0] = k;
  for (int l = 0; l < L; l++) {
    T* z = l + 1 < L ? w.h[l + 1].data : w.z;
    multiply(through(w.A[l], l, w.h[l], z));
    if (l + 1 == L) break;
    activate(a.gelu, n[l + 1] * C, z, z, w.s[l], w.bend[l]);
    pack_tokens(w.h[l + 1], n[l + 1], true, true);
  }
  output_error(w.z, w.d[L - 1].data);
  for (int l = L - 1;; l--) {
    pack_tokens(w.d[l], n[l + 1], l || keep, true);
    if (l == 0) break;
    auto p = back(w.A[l], l, w.d[l], w.d[l - 1].data).then_by(w.s[l - 1]);
    multiply(w.bend[l - 1] ? p.scaling(w.bend[l - 1]) : p);
  }
}

// y from x[l]; leaves R transposed in R[l].
template <class T, class E>
void Head<T, E>::read_layer(int l, const Weight<E>& M, T* y, const Write<T, E>& w, const Gates<T>& g) {
  match(w.h[l], x[l], n[l], R[l]);
  for (int64_t j = 0; j < C; j++)
    for (int64_t i = j / BLOCK * BLOCK; i < C; i++) score.data[j * C + i] = R[l][j * C + i] * g.GT[j * C + i];
  pack_tokens(score, C, true, false);
  multiply(through(M, l, x[l], y).by(g.beta));
  if (a.momentum) multiply(through(S[l], l, x[l], y).by(g.phi).plus(y));
  sum_before(mixed(w.d[l], n[l + 1], score.packed.across, y).plus(y));
}

template <class T, class E>
void Head<T, E>::end_layer(int l, const T* M, const T* S, T* M1, T* S1, const Write<T, E>& w,
                           const Gates<T>& g) {
  int64_t in = n[l], out = n[l + 1];
  auto p = update(w.h[l], in, w.d[l], out, g.end_M, M1).minus().plus(M, g.end_beta);
  multiply(S ? p.plus(S, g.end_phi) : p);
  if (S) multiply(update(w.h[l], in, w.d[l], out, g.end_S, S1, true).minus().plus(S, g.end_mu));
}

template <class T, class E>
void Head<T, E>::forward(int64_t head) {
  row = head / a.H, column = head % a.H;
  const T *M[MAX_LAYERS], *S_l[MAX_LAYERS];
  for (int l = 0; l < L; l++) {
    M[l] = of_head(a.M0, l, head);
    S_l[l] = a.momentum ? of_head(a.S0, l, head) : nullptr;
  }
  int64_t count = chunk_count(a), last = last_chunk(), X = a.B * a.H;
  Write<T, E>& w = writes[0];
  for (int64_t c = 0; c < count; c++) {
    Span s = span_of(a, c);
    fetch({a.q, a.k}, n[0], s), fetch({a.v}, n[L], s);
    if (a.kept && c % a.group == 0) {
      T* kept = (T*)a.kept + (c / a.group * X + head) * state;
      for (int l = 0; l < L; l++) {
        std::copy_n(M[l], n[l] * n[l + 1], kept + start[l]);
        if (S_l[l]) std::copy_n(S_l[l], n[l] * n[l + 1], kept + P + start[l]);
      }
    }
    bool opened = c == 0 && a.A0[0];
    for (int l = 0; l < L; l++) {
      const T* first = opened ? of_head(a.A0, l, head) : M[l];
      if (a.anchor[0] && (c == std::max<int64_t>(last, 0)))
        std::copy_n(first, n[l] * n[l + 1], of_head(a.anchor, l, head));
      pack_weight(first, l, w.A[l], true, l > 0);
      if (opened) pack_weight(M[l], l, W[l], true, false);
      if (S_l[l]) pack_weight(S_l[l], l, S[l], true, false);
    }
    live = s.width;
    for (int set = 0; set < sets; set++) form_gates(s, set, gates[0][set]);
    load(a.q, n[0], s, x[0].data), load(a.k, n[0], s, k.data), load(a.v, n[L], s, v);
    pack_tokens(x[0], n[0], true, false), pack_tokens(k, n[0], true, true);
    write_pass(w);
    for (int l = 0; l < L; l++) {
      T* y = l + 1 < L ? x[l + 1].data : answer;
      read_layer(l, opened ? W[l] : w.A[l], y, w, gate(0, l));
      if (l + 1 == L) break;
      activate<T>(a.gelu, n[l + 1] * C, y, y, nullptr, nullptr);
      pack_tokens(x[l + 1], n[l + 1], true, false);
    }
    if (a.normed) {
      const T *weight = (const T*)a.weight + column * n[L], *bias = (const T*)a.bias + column * n[L];
      standardise(answer, unit, lanes);
      for (int64_t f = 0; f < n[L]; f++)
        for (int64_t i = f * C; i < (f + 1) * C; i++)
          answer[i] = x[0].data[i] + unit[i] * weight[f] + bias[f];
    }
    store(answer, n[L], s, a.out);
    for (int l = 0; l < L; l++) {
      T *M1 = of_head(a.M1, l, head), *S1 = S_l[l] ? of_head(a.S1, l, head) : nullptr;
      end_layer(l, M[l], S_l[l], M1, S1, w, gate(0, l));
      M[l] = M1, S_l[l] = S1;
    }
  }
}

}  // namespace
