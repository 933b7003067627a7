// y = x W^T, head by head where there are several (architecture spec 2.4).
#include "gemm.h"

namespace {
struct Strides { int64_t row, head; };  // in values

template <class X, class Y>
void run(const X* x, Strides xs, const X* w, Strides ws, bool along, int64_t count, int heads, int inputs, int outputs, Y* y, int threads) {
  std::vector<Inputs<X>> in;
  for (int h = 0; h < heads; h++) in.emplace_back(x + h * xs.head, count, xs.row, inputs);
  const int64_t chunks = (count + CHUNK_ROWS - 1) / CHUNK_ROWS, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t grain = std::max<int64_t>(1, heads * panels * chunks / (8 * threads));  // neighbours share a panel of weights
#pragma omp parallel num_threads(threads)
  {
    auto& products = Products<X>::mine();
#pragma omp for schedule(dynamic, grain)
    for (int64_t i = 0; i < heads * panels * chunks; i++) {
      const int64_t h = i / chunks / panels, o = i / chunks % panels * PANEL, t = i % chunks * CHUNK_ROWS;
      const int rows = (int)std::min<int64_t>(CHUNK_ROWS, count - t), some = (int)std::min<int64_t>(PANEL, outputs - o);
      products.run(in[(size_t)h].rows.data() + t, rows, Matrix<X>{w + h * ws.head, ws.row, along}.from(o, 0), some, inputs);
      for (int r = 0; r < rows; r++) put_all(y + ((t + r) * heads + h) * outputs + o, products.sums.data + r * PANEL, some);
    }
  }
}
}  // namespace

// x [count, heads, inputs], w [heads, outputs, inputs] (along: [heads, inputs, outputs]) with these strides,
// y [count, heads, outputs], bf16 too or, if `wide`, fp32.
EXPORT void nanoglm_linear(int bf16, const void* x, int64_t x_row, int64_t x_head, const void* w, int64_t w_row, int64_t w_head, int along, int64_t count, int heads,
                          int inputs, int outputs, void* y, int wide, int threads) {
  if (!bf16) return run((const float*)x, {x_row, x_head}, (const float*)w, {w_row, w_head}, along, count, heads, inputs, outputs, (float*)y, threads);
  if (wide) return run((const uint16_t*)x, {x_row, x_head}, (const uint16_t*)w, {w_row, w_head}, along, count, heads, inputs, outputs, (float*)y, threads);
  return run((const uint16_t*)x, {x_row, x_head}, (const uint16_t*)w, {w_row, w_head}, along, count, heads, inputs, outputs, (uint16_t*)y, threads);
}
