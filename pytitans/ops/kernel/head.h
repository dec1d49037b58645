// A call's arguments, and the buffers one thread works in on one head at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "product.h"

constexpr int MAX_LAYERS = 8, MAX_GROUP = 16;

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
  double norm_eps;
};

namespace {

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
    rounded = take(padded(wide) * C);
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
    g_one = take(wide * C), g_two = take(wide * C);
    g_above = take(wide * C), g_below = take(wide * C);
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
  T *score, *square, *square2, *rounded, *lanes, *unit, *error;
  T *g_one, *g_two, *g_above, *g_below, *g_residual;
  const T* at[MAX_GROUP];
  int64_t live;  // tokens of the chunk at hand: sums over tokens stop there
  Write<T> writes[MAX_GROUP];
  Gates<T> gates[MAX_GROUP][MAX_LAYERS];
  T* states[MAX_GROUP];
  T *gh[MAX_LAYERS], *gd[MAX_LAYERS], *gz[MAX_LAYERS], *sy[MAX_LAYERS];
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

}  // namespace
