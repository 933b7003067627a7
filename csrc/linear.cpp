// y = x W^T, head by head where there are several (architecture spec 2.4).
#include "gemm.h"
#include <type_traits>

namespace {
struct Strides { int64_t row, head; };  // in values

// Where weights are fp32 and rows are not, rows become it, a chunk at a time.
template <class X, class W, class Y>
void run(const X* x, Strides xs, const W* w, Strides ws, bool along, int64_t count, int heads, int inputs, int outputs, Y* y, int threads) {
  constexpr bool same = std::is_same<X, W>::value;
  std::vector<Inputs<X>> in;
  for (int h = 0; h < heads; h++) in.emplace_back(x + h * xs.head, count, xs.row, inputs);
  const int64_t chunks = (count + CHUNK_ROWS - 1) / CHUNK_ROWS, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t grain = std::max<int64_t>(1, heads * panels * chunks / (8 * threads));  // neighbours share a panel of weights
#pragma omp parallel num_threads(threads)
  {
    auto& products = Products<W>::mine();
    static thread_local Aligned<float> wide;
    if (!same) wide.at_least((size_t)CHUNK_ROWS * inputs);
    const float* wide_rows[CHUNK_ROWS];
#pragma omp for schedule(dynamic, grain)
    for (int64_t i = 0; i < heads * panels * chunks; i++) {
      const int64_t h = i / chunks / panels, o = i / chunks % panels * PANEL, t = i % chunks * CHUNK_ROWS;
      const int rows = (int)std::min<int64_t>(CHUNK_ROWS, count - t), some = (int)std::min<int64_t>(PANEL, outputs - o);
      const Put<Y> put{y + (t * heads + h) * outputs + o, (int64_t)heads * outputs, some};
      const Matrix<W> weights = Matrix<W>{w + h * ws.head, ws.row, along}.from(o, 0);
      const X* const* from = in[(size_t)h].rows.data() + t;
      if constexpr (same) {
        products.run(from, rows, weights, some, inputs, put);
      } else {
        for (int r = 0; r < rows; r++) {
          float* to = wide.data + (int64_t)r * inputs;
          wide_rows[r] = to;
          for (int d = 0; d < inputs; d++) to[d] = get(from[r] + d);
        }
        products.run(wide_rows, rows, weights, some, inputs, put);
      }
    }
  }
}
}  // namespace

// x [count, heads, inputs], w [heads, outputs, inputs] (along: [heads, inputs, outputs]) with these strides,
// y [count, heads, outputs]. kind: of x and w, 0 fp32, 1 bf16, 2 bf16 and fp32. y is of x's kind or, if `wide`, fp32.
EXPORT void nanoglm_linear(int kind, const void* x, int64_t x_row, int64_t x_head, const void* w, int64_t w_row, int64_t w_head, int along, int64_t count, int heads,
                          int inputs, int outputs, void* y, int wide, int threads) {
  const auto call = [&](auto* rows, auto* weights, auto* out) {
    run(rows, {x_row, x_head}, weights, {w_row, w_head}, along, count, heads, inputs, outputs, out, threads);
  };
  if (kind == 0) call((const float*)x, (const float*)w, (float*)y);
  else if (kind == 2) call((const uint16_t*)x, (const float*)w, (float*)y);
  else if (wide) call((const uint16_t*)x, (const uint16_t*)w, (float*)y);
  else call((const uint16_t*)x, (const uint16_t*)w, (uint16_t*)y);
}
