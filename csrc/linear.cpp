// y = x W^T for rows that stand `step` values apart, and the same head by head (architecture spec 2.4).
#include "gemm.h"

namespace {
// An odd number of bf16 inputs is read in pairs: such rows are copied, a zero behind them.
template <class X> struct Inputs {
  std::vector<const X*> rows;
  std::vector<X> copy;
  Inputs(const X* x, int64_t count, int64_t step, int inputs) : rows((size_t)count) {
    const int even = (inputs + Dot<X>::PER - 1) / Dot<X>::PER * Dot<X>::PER;
    if (even != inputs) {
      copy.assign((size_t)(count * even), X{});
      for (int64_t t = 0; t < count; t++) std::copy(x + t * step, x + t * step + inputs, copy.begin() + t * even);
      x = copy.data(), step = even;
    }
    for (int64_t t = 0; t < count; t++) rows[(size_t)t] = x + t * step;
  }
};

template <class X> void run(const X* x, int64_t step, const X* w, int64_t count, int inputs, int outputs, X* y, int threads) {
  const Inputs<X> in(x, count, step, inputs);
  const int64_t chunks = (count + CHUNK_ROWS - 1) / CHUNK_ROWS, panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel num_threads(threads)
  {
    Products<X> products;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels * chunks; i++) {
      int64_t o = i / chunks * PANEL, t = i % chunks * CHUNK_ROWS;
      int rows = (int)std::min<int64_t>(CHUNK_ROWS, count - t), some = (int)std::min<int64_t>(PANEL, outputs - o);
      products.run(in.rows.data() + t, rows, w + o * inputs, inputs, some, inputs);
      for (int r = 0; r < rows; r++) put_all(y + (t + r) * outputs + o, products.sums.data + r * PANEL, some);
    }
  }
}
}  // namespace

// x [count, inputs] with rows `step` apart, w [outputs, inputs], y [count, outputs]. Returns 0, or 1 if this
// library has no bf16 products.
EXPORT int nanoglm_linear(int bf16, const void* x, int64_t step, const void* w, int64_t count, int inputs, int outputs, void* y, int threads) {
  if (!bf16) return run((const float*)x, step, (const float*)w, count, inputs, outputs, (float*)y, threads), 0;
#ifdef __AVX512BF16__
  return run((const uint16_t*)x, step, (const uint16_t*)w, count, inputs, outputs, (uint16_t*)y, threads), 0;
#else
  return 1;
#endif
}
