// A call's arguments, and the buffers one thread works in on one head at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "operands.h"
#include "product.h"

constexpr int MAX_LAYERS = 8, MAX_GROUP = 16;

enum Kind { FLOAT32, FLOAT64, BFLOAT16 };  // the last: states in float32, text and products

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

constexpr size_t LARGE_PAGE = size_t(1) << 21;

// Whole large pages in [start, start + bytes), where the system has such: fewer to find and to clear.
inline void large_pages(void* start, size_t bytes) {
#if defined(__linux__)
  uintptr_t begin = ((uintptr_t)start + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  uintptr_t end = ((uintptr_t)start + bytes) / LARGE_PAGE * LARGE_PAGE;
  if (start && begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

class Arena {  // grows to what the largest call needed, and is kept for the next
 public:
  ~Arena() { std::free(base); }
  char* reserve(size_t bytes) {
    if (bytes > size) {
      std::free(base);
      size_t unit = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
      size = (bytes + unit - 1) / unit * unit;
      base = (char*)std::aligned_alloc(unit, size);
      if (!base) size = 0;
      large_pages(base, size);
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

// A matrix that belongs to tokens, [features][C]; `packed` as products take it.
template <class T, class E>
struct Tokens {
  T* data;
  Packed<E> packed;
};

// A weight [in][out] as products take it: summed over what it takes in, or over what it gives.
template <class E>
struct Weight {
  const E *by_in, *by_out;
};

template <class T, class E>
struct Write {  // one chunk's write pass
  Tokens<T, E> h[MAX_LAYERS], d[MAX_LAYERS];
  T *s[MAX_LAYERS], *bend[MAX_LAYERS];  // act'(z), and (backward only) t * act''(z)
  T* z;                                 // the last layer's
  Weight<E> A[MAX_LAYERS];
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

// T: of states, gates, sums and all elementwise work. E: T, or Pair where products take bfloat16,
// and then the text is bfloat16 too.
template <class T, class E>
class Head {
  static constexpr bool low = std::is_same_v<E, Pair>;
  using Text = std::conditional_t<low, uint16_t, T>;
  using Matrix = Tokens<T, E>;
  using Mul = Product<T, E>;

 public:
  Head(const Args& a, char* memory, bool backward) : a(a), layout{memory}, keep(backward) {
    L = a.L;
    for (int l = 0; l <= L; l++) n[l] = a.width[l], wide = std::max(wide, n[l]);
    for (int l = 0; l < L; l++) start[l] = P, P += n[l] * n[l + 1];
    state = P * (a.momentum ? 2 : 1);
    C = padded(std::min(a.chunk, a.T));
    allocate(k, n[0]);
    v = take(n[L] * C);
    for (int l = 0; l < L; l++) {
      allocate(x[l], n[l]);
      R[l] = take(C * C);
      weight(W[l], l), weight(S[l], l);
    }
    answer = take(n[L] * C);
    allocate(score, C), allocate(square, C);
    left_scratch = take_items(wide, C), right_scratch = take_items(C, padded(std::max(wide, C)));
    narrow_scratch = take(wide * C), turned = take(C * C);
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
      gh[l] = take(n[l] * C), gd[l] = take(n[l + 1] * C);
      allocate(gz[l], n[l + 1]);
      sy[l] = take(n[l + 1] * C);
      dGT[l] = take(C * C);
    }
    weight(low_M, -1), weight(low_S, -1);
    allocate(g_one, wide), allocate(g_above, wide), allocate(g_below, wide);
    g_two = take(wide * C), g_three = take(wide * C);
    g_residual = take(n[L] * C);
    for (int l = 0; l < sets; l++) {
      d_beta[l] = layout.take<double>(C), d_phi[l] = layout.take<double>(C);
      d_end_S[l] = layout.take<double>(C);
    }
    Dr = layout.take<double>(C), Ds = layout.take<double>(C);
  }
  size_t bytes() const { return layout.used; }
  size_t kept_bytes() const {
    return (chunk_count(a) + a.group - 1) / a.group * a.B * a.H * state * sizeof(T);
  }

  void forward(int64_t head);
  void backward(int64_t head);

 private:
  const Args& a;
  Layout layout;
  bool keep;  // for a backward
  int L, sets, chunks;
  int64_t n[MAX_LAYERS + 1], start[MAX_LAYERS], P = 0, state, C, wide = 0;
  int64_t row, column;  // of the head: b and h
  int64_t live;         // tokens of the chunk at hand: sums over tokens stop there
  Matrix k, x[MAX_LAYERS], score, square, gz[MAX_LAYERS], g_one, g_above, g_below;
  T *v, *R[MAX_LAYERS], *answer, *narrow_scratch, *turned, *lanes, *unit, *error;
  T *g_two, *g_three, *g_residual;
  E *left_scratch, *right_scratch;
  Weight<E> W[MAX_LAYERS], S[MAX_LAYERS], low_M, low_S;
  const T* at[MAX_GROUP];
  Write<T, E> writes[MAX_GROUP];
  Gates<T> gates[MAX_GROUP][MAX_LAYERS];
  T* states[MAX_GROUP];
  T *gh[MAX_LAYERS], *gd[MAX_LAYERS], *sy[MAX_LAYERS], *dGT[MAX_LAYERS];
  double *d_beta[MAX_LAYERS], *d_phi[MAX_LAYERS], *d_end_S[MAX_LAYERS];
  double d_end_mu[MAX_LAYERS], *Dr, *Ds;

  T* take(int64_t count) { return layout.take<T>(count); }
  E* take_items(int64_t rows, int64_t cols) { return layout.take<E>(rows * cols); }

  void allocate(Matrix& m, int64_t features) {
    m.data = take(features * C);
    if (low) m.packed = {take_items(terms<E>(features), C), take_items(features, terms<E>(C))};
  }

  void weight(Weight<E>& w, int l) {  // room for layer l, or for any
    if (!low) return;
    int64_t first = 0, second = 0;
    for (int i = 0; i < L; i++)
      if (l < 0 || i == l) {
        first = std::max(first, terms<E>(n[i]) * n[i + 1]);
        second = std::max(second, n[i] * terms<E>(n[i + 1]));
      }
    w.by_in = take_items(first, 1), w.by_out = take_items(second, 1);
  }

  void allocate(Write<T, E>& w) {
    w.h[0] = {};
    for (int l = 0; l < L; l++) {
      if (l) allocate(w.h[l], n[l]);
      allocate(w.d[l], n[l + 1]);
      w.s[l] = take(n[l + 1] * C);
      w.bend[l] = keep ? take(n[l + 1] * C) : nullptr;
      weight(w.A[l], l);
    }
    w.z = take(n[L] * C);
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
    turn(of_span((void*)from, features, s), a.H * features, s.width, features, into, C);
    for (int64_t f = 0; s.width < C && f < features; f++)
      std::fill(into + f * C + s.width, into + (f + 1) * C, T(0));
  }
  void store(const T* from, int64_t features, Span s, void* into) const {
    turn(from, C, features, s.width, of_span(into, features, s), a.H * features);
  }
  Text* of_span(void* text, int64_t features, Span s) const {
    return (Text*)text + ((row * a.T + s.begin) * a.H + column) * features;
  }
  // Asks for a chunk's tokens ahead of `load` or `store`: they lie apart, and memory is slow to find.
  void fetch(std::initializer_list<const void*> texts, int64_t features, Span s) const {
    for (const void* text : texts) {
      const char* tokens = (const char*)of_span((void*)text, features, s);
      int64_t bytes = features * sizeof(Text);
      for (int64_t t = 0; t < s.width; t++)
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(tokens + t * a.H * bytes + b);
    }
  }

  // ---- operands

  void pack_weight(const T* w, int l, Weight<E>& into, bool by_in, bool by_out) const {
    if constexpr (low)
      pack(w, n[l], n[l + 1], nullptr, {by_in ? (E*)into.by_in : nullptr, by_out ? (E*)into.by_out : nullptr});
    else
      into = {w, w};
  }
  void pack_tokens(Matrix& m, int64_t features, bool across, bool along) const {
    if constexpr (low)
      pack(m.data, features, C, nullptr, {across ? m.packed.across : nullptr, along ? m.packed.along : nullptr});
    else
      m.packed = {m.data, m.data};
  }
  // Turned round, for sums over tokens at the right side.
  const E* turn_tokens(const E* along, int64_t features, E* into) const {
    turn(along, terms<E>(C), features, terms<E>(C), into, padded(features));
    return into;
  }
  // With a factor for each token, for sums over tokens at the left side.
  const E* scaled(const Matrix& m, int64_t features, const T* factor, E* into) const {
    if (!factor) return m.packed.along;
    if constexpr (low) {
      pack(m.data, features, C, factor, {nullptr, into});
    } else {
      for (int64_t f = 0; f < features; f++)
        for (int64_t i = 0; i < C; i++) into[f * C + i] = m.data[f * C + i] * factor[i];
    }
    return into;
  }

  // ---- products of layer l's weight, [in][out], and of tokens with tokens

  Mul through(const Weight<E>& w, int l, const Matrix& m, T* into) const {  // W^T x
    return {w.by_in, 1, n[l + 1], m.packed.across, C, into, C, n[l + 1], C, terms<E>(n[l])};
  }
  Mul back(const Weight<E>& w, int l, const Matrix& m, T* into) const {  // W g
    return {w.by_out, terms<E>(n[l + 1]), 1, m.packed.across, C, into, C, n[l], C, terms<E>(n[l + 1])};
  }
  // Tokens with tokens: only pairs [j][i] with j <= i count, in blocks of columns.
  static constexpr int64_t BLOCK = 32;
  void match(const Matrix& m, const Matrix& other, int64_t features, T* into) const {  // [j][i]
    Mul p{m.packed.across, 1, C, other.packed.across, C, into, C, C, C, terms<E>(features)};
    for (int64_t i = 0; i < C; i += BLOCK) {
      int64_t end = std::min(C, i + BLOCK);
      multiply(p, end, i, end, 0, p.K);
    }
  }
  // into -= m pairs: sums over j of pairs [j][i], or (turned round) over i of [i][j].
  Mul mixed(const Matrix& m, int64_t features, const E* pairs, T* into) const {
    return Mul{m.packed.along, terms<E>(C), 1, pairs, C, into, C, features, C, terms<E>(live)}.minus();
  }
  void sum_before(const Mul& p) const {
    for (int64_t i = 0; i < C; i += BLOCK) {
      int64_t end = std::min(C, i + BLOCK);
      multiply(p, p.M, i, end, 0, std::min(p.K, terms<E>(end)));
    }
  }
  void sum_after(const Mul& p) const {
    for (int64_t j = 0; j < C; j += BLOCK)
      multiply(p, p.M, j, std::min(C, j + BLOCK), terms<E>(j), p.K);
  }
  // The sum over tokens of factor * m other^T: [in][out]. The factor goes to the narrower side.
  // `same`: other is what it was at the last call, and so is the side that is narrower.
  Mul update(const Matrix& m, int64_t in, const Matrix& other, int64_t out, const T* factor, T* into,
             bool same = false) const {
    bool at_left = in <= out;
    if (!at_left || !same) {
      const T* f = at_left ? nullptr : factor;
      if constexpr (low)
        turn_tokens(scaled(other, out, f, left_scratch), out, right_scratch);
      else
        turn(other.data, C, out, C, right_scratch, padded(out), f);
    }
    const E* left = scaled(m, in, at_left ? factor : nullptr, left_scratch);
    return {left, terms<E>(C), 1, right_scratch, padded(out), into, out, in, out, terms<E>(live)};
  }

  void form_gates(Span s, int set, Gates<T>& g);
  void write_pass(Write<T, E>& w);
  void standardise(const T* z, T* unit, T* scale) const;
  void standardise_back(const T* g, const T* unit, const T* scale, T* into) const;
  void output_error(const T* z, T* d);
  void read_layer(int l, const Weight<E>& M, T* y, const Write<T, E>& w, const Gates<T>& g);
  void end_layer(int l, const T* W, const T* S, T* W1, T* S1, const Write<T, E>& w, const Gates<T>& g);
  void read_back(int l, const Weight<E>& M, const T* g_M, const T* g_S, Matrix& g_y, T* g_x,
                 const Write<T, E>& w, const Gates<T>& g, int set);
  void state_back(int l, const T* M, const T* S, T* g_M, T* g_S, const Matrix& g_y, const Gates<T>& g,
                  int set);
  void write_back(T* const* g_A, const Write<T, E>& w, int64_t head);
  bool error_back(const Write<T, E>& w, int64_t head);
  void norm_back(T* g_y, int64_t head);
  void again(int64_t begin, int64_t here, int64_t head);
  void chunk_back(Span s, int64_t i, bool opened, T* const* g_M, T* const* g_S, T* const* into,
                  int64_t head);
  void gates_back(Span s, int set, const Gates<T>& g);
};

}  // namespace
