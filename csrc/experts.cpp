// Routed SwiGLU experts, grouped by expert (architecture spec 2.8, 2.9), for one token as for thousands.
//
// An output's bits depend on its token and its weights alone (see gemm.h), so decoding and prefill agree. A
// row's k results are added in the order of its choices. A plain MLP is one expert that every token visits.
#include "gemm.h"

namespace {
template <class X> struct Weights {  // of experts that stand `step` and `down_step` values apart
  const X *gate, *up, *down;
  int64_t step, down_step;
};

template <class X> struct Swiglu : Put<X> {  // of sums of `up`: silu(gate) * up, rounded where torch rounds
  Put<float> gates;
  void operator()(int t, int v, vf up) const {
    const vf a = rounded<X>(load(gates.row(t) + v * LANES));
    Put<X>::operator()(t, v, rounded<X>(a / (splat(1.f) + vexp(-a))) * rounded<X>(up));
  }
};

template <class X> struct Scatter {  // row t to row order[t]
  X* at;
  const int64_t* order;
  int64_t step;
  int count;
  void ahead(int t) const { Put<X>::fetch(at + order[t] * step, count); }
  void operator()(int t, int v, vf sum) const { put_some(at + order[t] * step + v * LANES, sum, count - v * LANES); }
};

template <class X>
void run(const X* x, const int64_t* ids, const float* weights, const Weights<X>& w, int64_t tokens, int k, int experts, int dim, int width, X* out,
         int threads) {
  const int64_t slots = tokens * k;
  const int even_width = (width + Dot<X>::PER - 1) / Dot<X>::PER * Dot<X>::PER;
  const Inputs<X> in(x, tokens, dim, dim);
  std::vector<int64_t> first((size_t)experts + 1), order((size_t)slots);
  for (int64_t s = 0; s < slots; s++) first[(size_t)(ids ? ids[s] : 0) + 1]++;
  for (int e = 0; e < experts; e++) first[(size_t)e + 1] += first[(size_t)e];
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t s = 0; s < slots; s++) order[(size_t)next[(size_t)(ids ? ids[s] : 0)]++] = s;
  static thread_local Aligned<X> hidden_rows, slot_results;
  X* const hidden = hidden_rows.at_least((size_t)(slots * even_width));             // in the order of experts
  X* const result = weights ? slot_results.at_least((size_t)(slots * dim)) : out;  // by slot
  std::vector<const X*> rows((size_t)slots), active((size_t)slots);
  for (int64_t i = 0; i < slots; i++) rows[(size_t)i] = in.rows[(size_t)(order[(size_t)i] / k)], active[(size_t)i] = hidden + i * even_width;
  struct Item { int expert, output; int64_t begin; int rows; };  // neighbours share a panel of weights
  auto shares = [&](int outputs) {
    std::vector<Item> items;
    for (int e = 0; e < experts; e++)
      for (int o = 0; o < outputs; o += PANEL)
        for (int64_t b = first[(size_t)e]; b < first[(size_t)e + 1]; b += CHUNK_ROWS)
          items.push_back({e, o, b, (int)std::min<int64_t>(CHUNK_ROWS, first[(size_t)e + 1] - b)});
    return items;
  };
  const std::vector<Item> in_shares = shares(width), out_shares = shares(dim);
  const int grain = std::max(1, (int)in_shares.size() / (8 * threads)), out_grain = std::max(1, (int)out_shares.size() / (8 * threads));
#pragma omp parallel num_threads(threads)
  {
    auto &gate = Products<X>::mine(0), &up = Products<X>::mine(1);
    static thread_local Aligned<float> gates_of_rows((size_t)CHUNK_ROWS * PANEL);
#pragma omp for schedule(dynamic, grain)
    for (size_t i = 0; i < in_shares.size(); i++) {
      const Item& it = in_shares[i];
      const int some = std::min(PANEL, width - it.output);
      const int64_t at = it.expert * w.step + (int64_t)it.output * dim;
      X* const to = hidden + it.begin * even_width + it.output;
      const Put<float> gates{gates_of_rows.data, PANEL, PANEL};
      gate.run(rows.data() + it.begin, it.rows, {w.gate + at, dim, false}, some, dim, gates);
      up.run(rows.data() + it.begin, it.rows, {w.up + at, dim, false}, some, dim, Swiglu<X>{{to, even_width, some}, gates});
      if (it.output + some == width && even_width > width)
        for (int r = 0; r < it.rows; r++) to[r * even_width + some] = X{};
    }
#pragma omp for schedule(dynamic, out_grain)
    for (size_t i = 0; i < out_shares.size(); i++) {
      const Item& it = out_shares[i];
      const int some = std::min(PANEL, dim - it.output);
      gate.run(active.data() + it.begin, it.rows, {w.down + it.expert * w.down_step + (int64_t)it.output * width, width, false}, some, width,
               Scatter<X>{result + it.output, order.data() + it.begin, dim, some});
    }
    if (weights)
#pragma omp for schedule(static)
      for (int64_t t = 0; t < tokens; t++)
        for (int d = 0; d < dim; d += LANES) {
          const int some = std::min(LANES, dim - d);
          vf sum{};
          for (int j = 0; j < k; j++) {
            const X* from = result + (t * k + j) * dim + d;
            vf x{};
            if (some == LANES) x = load(from);
            else
              for (int l = 0; l < some; l++) x[l] = get(from + l);
            sum += splat(weights[t * k + j]) * x;
          }
          put_some(out + t * dim + d, sum, some);
        }
  }
}
}  // namespace

// x [tokens, dim]; ids and weights [tokens, k], or NULL for one expert and k = 1; gate and up [width, dim] of expert
// e at e * step values, down [dim, width] at e * down_step.
EXPORT void nanoglm_experts(int bf16, const void* x, const int64_t* ids, const float* weights, const void* gate, const void* up, const void* down, int64_t step,
                           int64_t down_step, int64_t tokens, int k, int experts, int dim, int width, void* out, int threads) {
  if (!bf16)
    return run((const float*)x, ids, weights, {(const float*)gate, (const float*)up, (const float*)down, step, down_step}, tokens, k, experts, dim, width, (float*)out, threads);
  typedef const uint16_t* P;
  return run((P)x, ids, weights, {(P)gate, (P)up, (P)down, step, down_step}, tokens, k, experts, dim, width, (uint16_t*)out, threads);
}
