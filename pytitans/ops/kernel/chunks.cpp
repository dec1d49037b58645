// A run of chunks, head by head, in cache: the algebra and the names of chunk_plain.py.
//
// Everything that belongs to tokens is feature-major, [features][tokens of the chunk, padded to 16],
// so that every product with a weight W [in][out] reads W as it lies; only the right sides of the
// weights' updates are turned round (`turned`). Padded tokens have write weights of 0.
// Gates are multiplied up row by row in double: G_i = decay_i G_{i-1} + N_i,
// N_i = momentum_i N_{i-1} + lr_i e_i, and their gradients run the same recursion backwards.

#include <atomic>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "backward.h"
#include "forward.h"

namespace {

struct FlushToZero {  // on this thread, for as long as it lives: decayed weights become denormal
#if defined(__SSE2__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#endif
};

template <class T, class E>
bool all_heads(const Args& a, bool backward, int threads) {
  Head<T, E> layout(a, nullptr, backward);
  size_t bytes = layout.bytes() + 1024;  // a tile may read past a row's end
  int64_t tokens = a.B * a.T * a.H * (std::is_same_v<E, Pair> ? 2 : sizeof(T));
  for (void* fresh : {a.g_q, a.g_k}) large_pages(fresh, tokens * a.width[0]);
  for (void* fresh : {a.out, a.g_v}) large_pages(fresh, tokens * a.width[a.L]);
  if (!backward) large_pages(a.kept, layout.kept_bytes());
  std::atomic<int64_t> next{0};
  std::atomic<bool> done{true};
#pragma omp parallel num_threads(threads)
  {
    thread_local Arena arena;
    FlushToZero flush;
    if (char* memory = arena.reserve(bytes)) {
      Head<T, E> head(a, memory, backward);
      for (int64_t i; (i = next++) < a.B * a.H;) backward ? head.backward(i) : head.forward(i);
    } else {
      done = false;
    }
  }
  return done;
}

}  // namespace

// Whether products of bfloat16 are compiled in.
extern "C" int pytitans_bfloat16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Returns 0, or 1 when there is no memory left.
extern "C" int pytitans_chunks(const Args* a, int kind, int backward, int threads) {
  switch (kind) {
#if defined(__AVX512BF16__)
    case BFLOAT16: return !all_heads<float, Pair>(*a, backward, threads);
#endif
    case FLOAT64: return !all_heads<double, double>(*a, backward, threads);
    default: return !all_heads<float, float>(*a, backward, threads);
  }
}
