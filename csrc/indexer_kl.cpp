// The indexers' loss over what they selected, with its gradients (training spec 1.3, 1.4), fp32.
//
// Of each row: index scores I of the selected keys, the teachers' attention to them averaged over layers and heads, p;
// sum p (log p - log softmax(I)), and from softmax(I) - p the gradients of queries and weights. What a row gives the keys
// is kept for a stripe of rows and added as in sparse_attention_backward.cpp: each thread has keys of its own, a key's
// gradient is one sum over rows in order.
#include "selected.h"

namespace {
struct Problem {
  const float *q, *weights, *keys;  // [T, J, I], [T, J], [N, I]
  const int32_t* selection;         // [T, K], positions within the row's sequence
  int heads, dim;                   // J, I
  const int64_t *queries, *teacher_keys;  // of each teacher the address of [T, H, A] and [N, A]
  int teachers, main_heads, main_dim, k;  // H, A
  int64_t length, each;                   // rows of a sequence, its keys
  float scale;
  double* sums;  // [T]
  float *d_q, *d_weights, *d_keys;
};

struct Scratch {  // of one thread
  int padded;     // keys of a row, in whole groups
  Aligned<float> values, columns, dots, scores, p, logits;
  Scratch(const Problem& t)
      : padded((t.k + GROUP - 1) / GROUP * GROUP), values((size_t)padded * std::max(t.dim, t.main_dim)), columns((size_t)padded * std::max(t.dim, t.main_dim)),
        dots((size_t)t.heads * padded), scores((size_t)padded), p((size_t)padded), logits((size_t)t.main_heads * padded) {}
};

// Makes x[0, n) its softmax; returns the log of the sum of exponentials. Behind it, up to a whole group, zeros.
float softmax(float* x, int n, int padded) {
  float most = -INFINITY;
  for (int j = 0; j < n; j++) most = std::max(most, x[j]);
  for (int j = n; j < padded; j++) x[j] = -INFINITY;
  vf sum = {};
  for (int j = 0; j < padded; j += LANES) {
    const vf v = load(x + j);
    vf e = vexp(v - splat(most));
    e = v == splat(-INFINITY) ? vf{} : e;
    store(x + j, e);
    sum += e;
  }
  float total = 0;
  for (int l = 0; l < LANES; l++) total += sum[l];
  for (int j = 0; j < padded; j += LANES) store(x + j, load(x + j) * splat(1.f / total));
  return most + std::log(total);
}

// One row; `kept` [key][J] gets what each key's product with each head is worth.
void row(const Problem& t, int64_t r, const int32_t* rows, int n, Scratch& s, float* kept) {
  const int padded = (n + GROUP - 1) / GROUP * GROUP, J = t.heads;
  std::fill(s.p.data, s.p.data + padded, 0.f);
  for (int teacher = 0; teacher < t.teachers; teacher++) {
    const float *queries = (const float*)t.queries[teacher] + r * t.main_heads * t.main_dim, *keys = (const float*)t.teacher_keys[teacher];
    gather(keys, t.main_dim, rows, n, t.main_dim, s.values.data, t.main_dim);
    turn(s.values.data, n, t.main_dim, s.columns.data);
    for (int g = 0; g * GROUP < n; g++)
      products(s.columns.data + (size_t)g * t.main_dim * GROUP, queries, t.main_heads, t.main_dim, t.main_dim, s.logits.data + g * GROUP, s.padded);
    for (int h = 0; h < t.main_heads; h++) {
      float* logit = s.logits.data + (size_t)h * s.padded;
      for (int j = 0; j < n; j++) logit[j] *= t.scale;
      softmax(logit, n, padded);
      add(s.p.data, logit, 1.f / (float)(t.main_heads * t.teachers), padded);
    }
  }
  const float *q = t.q + r * J * t.dim, *w = t.weights + r * J;
  gather(t.keys, t.dim, rows, n, t.dim, s.values.data, t.dim);
  turn(s.values.data, n, t.dim, s.columns.data);
  for (int g = 0; g * GROUP < n; g++) products(s.columns.data + (size_t)g * t.dim * GROUP, q, J, t.dim, t.dim, s.dots.data + g * GROUP, s.padded);
  std::fill(s.scores.data, s.scores.data + padded, 0.f);
  for (int h = 0; h < J; h++) {
    float* dot = s.dots.data + (size_t)h * s.padded;
    for (int j = 0; j < padded; j += LANES) store(dot + j, vmax(load(dot + j), vf{}));
    add(s.scores.data, dot, w[h], padded);
  }
  double sum = 0;
  for (int j = 0; j < n; j++)
    if (s.p.data[j] > 0) sum += (double)s.p.data[j] * (std::log(std::max(s.p.data[j], 1e-30f)) - s.scores.data[j]);
  const float log_total = softmax(s.scores.data, n, padded);
  double mass = 0;
  for (int j = 0; j < n; j++) mass += s.p.data[j];
  t.sums[r] = sum + mass * log_total;
  float* d = s.scores.data;  // softmax(I) - p
  for (int j = 0; j < padded; j += LANES) store(d + j, load(d + j) - load(s.p.data + j));
  float* d_q = t.d_q + r * J * t.dim;
  memset(d_q, 0, (size_t)J * t.dim * 4);
  for (int h = 0; h < J; h++) {
    const float* dot = s.dots.data + (size_t)h * s.padded;
    vf total = {};
    for (int j = 0; j < padded; j += LANES) total += load(dot + j) * load(d + j);
    float of_weight = 0;
    for (int l = 0; l < LANES; l++) of_weight += total[l];
    t.d_weights[r * J + h] = of_weight;
    for (int j = 0; j < n; j++) {
      const float one = dot[j] > 0 ? d[j] * w[h] : 0.f;
      kept[(size_t)j * J + h] = one;
      if (one != 0) add(d_q + (size_t)h * t.dim, s.values.data + (size_t)j * t.dim, one, t.dim);
    }
  }
}
}  // namespace

EXPORT void nanoglm_indexer_kl(const float* q, const float* weights, const float* keys, int64_t count, const int32_t* selection, int heads, int dim,
                               const int64_t* queries, const int64_t* teacher_keys, int teachers, int main_heads, int main_dim, int k, int64_t length,
                               int64_t each, float scale, double* sums, float* d_q, float* d_weights, float* d_keys, int threads) {
  Problem t{q, weights, keys, selection, heads, dim, queries, teacher_keys, teachers, main_heads, main_dim, k, length, each, scale, sums, d_q, d_weights, d_keys};
  const size_t of_row = (size_t)k * heads;
  Aligned<float> kept(STRIPE * of_row);
  Aligned<int32_t> rows((size_t)STRIPE * k);
  std::vector<int> valid(STRIPE);
#pragma omp parallel num_threads(threads)
  {
    Scratch s(t);
    int me, all;
    team(me, all);
    for (int64_t first = 0; first < count; first += STRIPE) {
      const int some = (int)std::min<int64_t>(STRIPE, count - first);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < some; i++) {
        const int64_t r = first + i, begin = r / length * each;
        int32_t* mine = rows.data + (size_t)i * k;
        int n = 0;
        for (; n < k && selection[r * k + n] >= 0; n++) mine[n] = (int32_t)(begin + selection[r * k + n]);
        valid[(size_t)i] = n;
        row(t, r, mine, n, s, kept.data + i * of_row);
      }
      for (int i = 0; i < some; i++) {
        const int32_t* mine = rows.data + (size_t)i * k;
        for (int j = 0; j < valid[(size_t)i]; j++)
          if (mine[j] / GROUP % all == me)
            for (int h = 0; h < heads; h++)
              if (float one = kept.data[i * of_row + (size_t)j * heads + h]; one != 0) add(d_keys + (int64_t)mine[j] * dim, q + ((first + i) * heads + h) * dim, one, dim);
      }
#pragma omp barrier
    }
  }
}
