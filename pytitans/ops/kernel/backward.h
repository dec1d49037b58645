// Backward: the forward's passes in reverse, chunk by chunk from the last.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "forward.h"
#include "head.h"

namespace {

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
  T *scale = lanes, *g_scale = lanes + C, *bare = g_above, *g_unit = g_one, *g_error = g_two;
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
  T *g_y = g_above, *g_x = g_below;
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

}  // namespace
