// Backward: the forward's passes in reverse, chunk by chunk from the last.
#pragma once

#include <algorithm>

#include "elementwise.h"
#include "forward.h"
#include "head.h"

namespace {

// Through layer l's reading and its part in the chunk's end: g_x, and gh[l] and gd[l] so far.
template <class T, class E>
void Head<T, E>::read_back(int l, const Weight<E>& M, const T* g_M, const T* g_S, Matrix& g_y, T* g_x,
                           const Write<T, E>& w, const Gates<T>& g, int set) {
  int64_t in = n[l], out = n[l + 1];
  pack_tokens(g_y, out, true, true);
  match(w.d[l], g_y, out, square.data);
  for (int64_t j = 0; j < C; j++)
    for (int64_t i = j / BLOCK * BLOCK + j * C; i < (j + 1) * C; i++) {
      T P = square.data[i], r = R[l][i], gate = g.GT[i];
      dGT[set][i] -= P * r;
      score.data[i] = r * gate;
      square.data[i] = P * gate;
    }
  pack_tokens(score, C, false, true), pack_tokens(square, C, true, true);
  const E* later = turn_tokens(score.packed.along, C, right_scratch);
  sum_after(mixed(g_y, out, later, gd[l]));
  later = turn_tokens(square.packed.along, C, right_scratch);
  sum_after(mixed(x[l], in, later, gh[l]));

  T *at_beta = lanes, *at_phi = lanes + C, *at_M = lanes + 2 * C, *at_S = lanes + 3 * C;
  std::fill(lanes, lanes + 4 * C, T(0));
  multiply(back(M, l, g_y, g_x).by(g.beta).summing(x[l].data, at_beta));
  if (g_S) multiply(back(S[l], l, g_y, g_x).by(g.phi).plus(g_x).summing(x[l].data, at_phi));
  sum_before(mixed(w.h[l], in, square.packed.across, g_x).plus(g_x).then_by(l ? sy[l - 1] : nullptr));

  const Matrix &h = w.h[l], &d = w.d[l];
  pack_weight(g_M, l, low_M, true, true);
  multiply(back(low_M, l, d, gh[l]).minus().by(g.end_M).plus(gh[l]).summing(h.data, at_M));
  multiply(through(low_M, l, h, gd[l]).minus().by(g.end_M).plus(gd[l]));
  if (g_S) {
    pack_weight(g_S, l, low_S, true, true);
    multiply(back(low_S, l, d, gh[l]).minus().by(g.end_S).plus(gh[l]).summing(h.data, at_S));
    multiply(through(low_S, l, h, gd[l]).minus().by(g.end_S).plus(gd[l]));
  }
  int64_t tail = live - 1;
  for (int64_t i = 0; i < C; i++) {
    d_beta[set][i] += at_beta[i], d_phi[set][i] += at_phi[i];
    d_end_S[set][i] -= at_S[i];
    dGT[set][i * C + tail] -= at_M[i];
  }
}

// g_M and g_S, from after the chunk to before it, but for what the gradient point adds.
template <class T, class E>
void Head<T, E>::state_back(int l, const T* M, const T* S, T* g_M, T* g_S, const Matrix& g_y,
                            const Gates<T>& g, int set) {
  int64_t in = n[l], out = n[l + 1], size = in * out;
  d_beta[set][live - 1] += dot(M, g_M, size);
  if (S) {
    d_phi[set][live - 1] += dot(S, g_M, size);
    d_end_mu[set] += dot(S, g_S, size);
    multiply(update(x[l], in, g_y, out, g.phi, g_S).plus(g_S, g.end_mu).plus(g_M, g.end_phi));
  }
  multiply(update(x[l], in, g_y, out, g.beta, g_M, S).plus(g_M, g.end_beta));
}

// From gd[L - 1]: gz[L - 1] (false: none), error <- gradient in v, and k's in g_two if normed.
template <class T, class E>
bool Head<T, E>::error_back(const Write<T, E>& w, int64_t head) {
  int64_t V = n[L];
  T *g = gd[L - 1], *into = gz[L - 1].data;
  if (!a.normed) {
    for (int64_t i = 0; i < V * C; i++) into[i] = g[i], error[i] = -g[i];
    return !a.dot;
  }
  const T *weight = (const T*)a.weight + column * V, *bias = (const T*)a.bias + column * V;
  T *g_weight = (T*)a.g_weight + head * V, *g_bias = (T*)a.g_bias + head * V;
  T *scale = lanes, *g_scale = lanes + C, *bare = g_three, *g_unit = g_one.data, *g_error = g_two;
  standardise(w.z, unit, scale);
  for (int64_t f = 0; f < V; f++)
    for (int64_t i = f * C; i < (f + 1) * C; i++) {
      error[i] = a.dot ? -v[i] : k.data[i] + unit[i] * weight[f] + bias[f] - v[i];
      bare[i] = error[i] * weight[f];
    }
  T *mean = lanes + 2 * C, *along = lanes + 3 * C, *g_mean = turned, *g_along = turned + C;
  std::fill(mean, mean + 2 * C, T(0));
  std::fill(turned, turned + 2 * C, T(0));
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
template <class T, class E>
void Head<T, E>::write_back(T* const* g_A, const Write<T, E>& w, int64_t head) {
  for (int l = 0; l + 1 < L; l++) {
    int64_t in = n[l + 1], out = n[l + 2];
    for (int64_t i = 0; i < in * C; i++) {
      gz[l].data[i] = gd[l][i] * w.bend[l][i];
      g_one.data[i] = gd[l][i] * w.s[l][i];
    }
    pack_tokens(g_one, in, true, true);
    multiply(through(w.A[l + 1], l + 1, g_one, gd[l + 1]).plus(gd[l + 1]));
    multiply(update(g_one, in, w.d[l + 1], out, nullptr, g_A[l + 1]).plus(g_A[l + 1]));
  }
  bool through = error_back(w, head);
  for (int l = L - 1; l >= 0; l--) {
    if (through) {
      pack_tokens(gz[l], n[l + 1], true, true);
      multiply(update(w.h[l], n[l], gz[l], n[l + 1], nullptr, g_A[l]).plus(g_A[l]));
      multiply(back(w.A[l], l, gz[l], gh[l]).plus(gh[l]));
    }
    through = true;
    if (l)
      for (int64_t i = 0; i < n[l] * C; i++) gz[l - 1].data[i] += gh[l][i] * w.s[l - 1][i];
  }
  if (a.normed && !a.dot)
    for (int64_t i = 0; i < n[0] * C; i++) gh[0][i] += g_two[i];
}

template <class T, class E>
void Head<T, E>::gates_back(Span s, int set, const Gates<T>& g) {
  int64_t w = s.width;
  turn(dGT[set], C, C, C, turned, C);
  std::fill(Dr, Dr + C, 0.0);
  std::copy_n(d_end_S[set], C, Ds);
  double D_beta = 0, D_phi = 0, D_mu = d_end_mu[set];
  for (int64_t i = w - 1; i >= 0; i--) {
    double later_a = i + 1 < w ? g.a[i + 1] : 0, later_mu = i + 1 < w ? g.mu[i + 1] : 1;
    double add = exists(s.begin + i), g_a = 0, g_mu = 0;
    const double *G = g.G + (i - 1) * C, *N = g.N + (i - 1) * C;
    const T* row_dG = turned + i * C;
    for (int64_t j = 0; j <= i; j++) {
      Dr[j] = row_dG[j] + later_a * Dr[j];
      Ds[j] = later_mu * Ds[j] + add * Dr[j];
    }
    D_beta = d_beta[set][i] + later_a * D_beta;
    D_phi = d_phi[set][i] + later_a * D_phi;
    D_mu = later_mu * D_mu + add * D_phi;
    if (i) {
      g_a = dot(Dr, G, i) + D_phi * g.phi_d[i - 1];
      g_mu = a.momentum ? dot(Ds, N, i) : 0;
    }
    g_a += D_beta * (i ? g.beta_d[i - 1] : 1);
    g_mu += D_mu * (i ? g.mu_prod[i - 1] : 1);
    int64_t at = ((row * a.T + s.begin + i) * a.H + column) * sets + set;
    if (a.g_lr) ((T*)a.g_lr)[at] = T(add * (a.momentum ? Ds[i] : Dr[i]));
    if (a.g_log_decay) ((T*)a.g_log_decay)[at] = T(add * g_a * g.a[i]);
    if (a.g_log_momentum) ((T*)a.g_log_momentum)[at] = T(add * g_mu * g.mu[i]);
  }
}

template <class T, class E>
void Head<T, E>::backward(int64_t head) {
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
      T* into[MAX_LAYERS];
      for (int l = 0; l < L; l++) into[l] = opened ? g_A[l] : g_M[l];
      chunk_back(span_of(a, begin + i), i, opened, g_M, g_S, into, head);
      if (a.g_anchor[0] && begin + i == std::max<int64_t>(last, 0))
        for (int l = 0; l < L; l++) {
          const T* more = of_head(a.g_anchor, l, head);
          for (int64_t m = 0; m < n[l] * n[l + 1]; m++) into[l][m] += more[m];
        }
    }
  }
}

// A group's chunks once more, from the state that was kept: at[i] is the state before chunk i.
template <class T, class E>
void Head<T, E>::again(int64_t begin, int64_t here, int64_t head) {
  at[0] = (const T*)a.kept + (begin / a.group * a.B * a.H + head) * state;
  for (int64_t i = 0; i < here; i++) {
    Span s = span_of(a, begin + i);
    fetch({a.k}, n[0], s), fetch({a.v}, n[L], s);
    for (int l = 0; l < L; l++) {
      const T* first = a.A0[0] && begin + i == 0 ? of_head(a.A0, l, head) : at[i] + start[l];
      pack_weight(first, l, writes[i].A[l], true, true);
    }
    live = s.width;
    for (int set = 0; set < sets; set++) form_gates(s, set, gates[i][set]);
    load(a.k, n[0], s, k.data), load(a.v, n[L], s, v);
    pack_tokens(k, n[0], true, true);
    write_pass(writes[i]);
    if (i + 1 == here) break;
    for (int l = 0; l < L; l++) {
      T *W1 = states[i + 1] + start[l], *S1 = a.momentum ? W1 + P : nullptr;
      const T *W = at[i] + start[l], *S = a.momentum ? W + P : nullptr;
      end_layer(l, W, S, W1, S1, writes[i], gate(i, l));
    }
    at[i + 1] = states[i + 1];
  }
}

template <class T, class E>
void Head<T, E>::chunk_back(Span s, int64_t i, bool opened, T* const* g_M, T* const* g_S,
                            T* const* into, int64_t head) {
  int64_t V = n[L];
  live = s.width;
  fetch({a.q, a.k}, n[0], s), fetch({a.v, a.g_out}, V, s);
  for (int set = 0; set < sets; set++) {
    std::fill(dGT[set], dGT[set] + C * C, T(0));
    std::fill(d_beta[set], d_beta[set] + C, 0.0);
    std::fill(d_phi[set], d_phi[set] + C, 0.0);
    std::fill(d_end_S[set], d_end_S[set] + C, 0.0);
    d_end_mu[set] = 0;
  }
  const Write<T, E>& w = writes[i];
  Weight<E> M[MAX_LAYERS];
  for (int l = 0; l < L; l++) {
    const T* W_l = at[i] + start[l];
    if (opened) pack_weight(W_l, l, W[l], true, true);
    M[l] = opened ? W[l] : w.A[l];
    if (a.momentum) pack_weight(W_l + P, l, S[l], true, true);
  }
  load(a.q, n[0], s, x[0].data), load(a.k, n[0], s, k.data), load(a.v, V, s, v);
  pack_tokens(x[0], n[0], true, true), pack_tokens(k, n[0], true, true);
  for (int l = 0; l < L; l++) {
    T* y = l + 1 < L ? x[l + 1].data : answer;
    if (l + 1 < L || a.normed)
      read_layer(l, M[l], y, w, gate(i, l));
    else
      match(w.h[l], x[l], n[l], R[l]);
    if (l + 1 == L) break;
    activate<T>(a.gelu, n[l + 1] * C, y, y, sy[l], nullptr);
    pack_tokens(x[l + 1], n[l + 1], true, true);
  }
  Matrix *g_y = &g_above, *g_x = &g_below;
  load(a.g_out, V, s, g_y->data);
  if (a.normed) norm_back(g_y->data, head);
  for (int l = L - 1; l >= 0; l--) {
    const T *W_l = at[i] + start[l], *S_l = a.momentum ? W_l + P : nullptr;
    int set = sets > 1 ? l : 0;
    read_back(l, M[l], g_M[l], g_S[l], *g_y, g_x->data, w, gate(i, l), set);
    state_back(l, W_l, S_l, g_M[l], g_S[l], *g_y, gate(i, l), set);
    std::swap(g_x, g_y);
  }
  if (a.normed)
    for (int64_t m = 0; m < V * C; m++) g_y->data[m] += g_residual[m];
  store(g_y->data, n[0], s, a.g_q);
  write_back(into, w, head);
  store(gh[0], n[0], s, a.g_k);
  store(error, V, s, a.g_v);
  for (int set = 0; set < sets; set++) gates_back(s, set, gates[i][set]);
}

// Through the answer's residual and LayerNorm: g_y becomes the gradient in the MLP's output.
template <class T, class E>
void Head<T, E>::norm_back(T* g_y, int64_t head) {
  int64_t V = n[L];
  const T* weight = (const T*)a.weight + column * V;
  T *g_weight = (T*)a.g_weight + head * V, *g_bias = (T*)a.g_bias + head * V;
  standardise(answer, unit, lanes);
  std::copy_n(g_y, V * C, g_residual);
  for (int64_t f = 0; f < V; f++) {
    g_weight[f] += dot(g_y + f * C, unit + f * C, C);
    for (int64_t i = f * C; i < (f + 1) * C; i++) g_bias[f] += g_y[i], g_y[i] *= weight[f];
  }
  standardise_back(g_y, unit, lanes, g_y);
}

}  // namespace
