// Gradients of absorbed latent attention over the selected rows (architecture spec 2.5), fp32.
//
// Rows go in stripes. Of each row of a stripe the weights and the gradients of the scores are computed anew and kept,
// with what they give the queries; then each thread takes the keys of its own and adds what the stripe's rows give
// them, row by row. So a key's gradient is one sum over rows in order, whoever computes it: bits do not depend on how
// many threads there are.
#include "selected.h"

namespace {
constexpr int CHUNK = 64;  // keys that are gathered together

struct Problem : Selected {
  const float *grad, *q_latent, *q_rope, *latent, *rope;  // [T, H, C], [T, H, C], [T, H, R], [N, C], [N, R]
  int64_t latent_step, rope_step;
  int heads, c, r;
  float scale;
  float *d_q_latent, *d_q_rope, *d_latent, *d_rope;  // like the inputs; those of keys begin as zeros
};

struct Scratch {  // of one thread
  Aligned<float> values, keys, scores, d_weights, q, g;
  Scratch(const Problem& p)
      : values((size_t)CHUNK * (p.c + p.r)), keys((size_t)CHUNK * (p.c + p.r)), scores((size_t)p.heads * (p.k + CHUNK)),
        d_weights((size_t)p.heads * (p.k + CHUNK)), q((size_t)p.heads * (p.c + p.r)), g((size_t)p.heads * p.c) {}
};

void keys_of(const Problem& p, const int32_t* rows, int n, float* values) {
  gather(p.latent, p.latent_step, rows, n, p.c, values, p.c + p.r);
  gather(p.rope, p.rope_step, rows, n, p.r, values + p.c, p.c + p.r);
}

// One row: gradients of its queries, and into `kept` [key][2][heads] the weights and the gradients of scores.
void row(const Problem& p, int64_t t, const int32_t* rows, int valid, Scratch& s, float* kept) {
  const int wide = p.c + p.r, H = p.heads;
  const int64_t step = p.k + CHUNK;
  for (int h = 0; h < H; h++) {
    memcpy(s.q.data + (size_t)h * wide, p.q_latent + (t * H + h) * p.c, (size_t)p.c * 4);
    memcpy(s.q.data + (size_t)h * wide + p.c, p.q_rope + (t * H + h) * p.r, (size_t)p.r * 4);
  }
  const float* g = p.grad + t * H * p.c;
  float* d_q = p.d_q_latent + t * H * p.c;
  float* d_q_rope = p.d_q_rope + t * H * p.r;
  for (int begin = 0; begin < valid; begin += CHUNK) {
    const int n = std::min(CHUNK, valid - begin);
    keys_of(p, rows + begin, n, s.values.data);
    turn(s.values.data, n, wide, s.keys.data);
    for (int group = 0; group * GROUP < n; group++) {
      const float* keys = s.keys.data + (size_t)group * wide * GROUP;
      products(keys, s.q.data, H, wide, wide, s.scores.data + begin + group * GROUP, step);
      products(keys, g, H, p.c, p.c, s.d_weights.data + begin + group * GROUP, step);
    }
  }
  for (int h = 0; h < H; h++) {
    float *score = s.scores.data + h * step, *d = s.d_weights.data + h * step;
    float most = -INFINITY;
    for (int j = 0; j < valid; j++) most = std::max(most, score[j] *= p.scale);
    const int padded = (valid + LANES - 1) / LANES * LANES;
    for (int j = valid; j < padded; j++) score[j] = -INFINITY, d[j] = 0;
    vf sum = {}, product = {};
    for (int j = 0; j < padded; j += LANES) {
      vf x = load(score + j), e = vexp(x - splat(most));
      e = x == splat(-INFINITY) ? vf{} : e;
      store(score + j, e);
      sum += e;
      product += e * load(d + j);
    }
    float total = 0, mean = 0;
    for (int l = 0; l < LANES; l++) total += sum[l], mean += product[l];
    const float inverse = 1.f / total;
    mean *= inverse;
    for (int j = 0; j < padded; j += LANES) {
      const vf w = load(score + j) * splat(inverse);
      store(score + j, w);
      store(d + j, w * (load(d + j) - splat(mean)) * splat(p.scale));
    }
  }
  for (int j = 0; j < valid; j++)
    for (int h = 0; h < H; h++) kept[(2 * j) * H + h] = s.scores.data[h * step + j], kept[(2 * j + 1) * H + h] = s.d_weights.data[h * step + j];
  memset(d_q, 0, (size_t)H * p.c * 4);
  memset(d_q_rope, 0, (size_t)H * p.r * 4);
  for (int begin = 0; begin < valid; begin += CHUNK) {
    const int n = std::min(CHUNK, valid - begin);
    keys_of(p, rows + begin, n, s.values.data);
    for (int h = 0; h < H; h++) {
      const float* d = s.d_weights.data + h * step + begin;
      int i = 0;
      for (; i + LANES <= p.c; i += LANES) {
        vf sum = load(d_q + (size_t)h * p.c + i);
        for (int j = 0; j < n; j++) sum += load(s.values.data + (size_t)j * wide + i) * splat(d[j]);
        store(d_q + (size_t)h * p.c + i, sum);
      }
      for (int j = 0; j < n; j++) {
        const float* value = s.values.data + (size_t)j * wide;
        for (int l = i; l < p.c; l++) d_q[(size_t)h * p.c + l] += value[l] * d[j];
        add(d_q_rope + (size_t)h * p.r, value + p.c, d[j], p.r);
      }
    }
  }
}

// What row t gives one key: of its latent sum_h ds q_latent + w grad, of its rope sum_h ds q_rope.
inline void give(const Problem& p, int64_t t, int64_t key, const float* w, const float* ds) {
  const int H = p.heads;
  const float *q = p.q_latent + t * H * p.c, *g = p.grad + t * H * p.c, *q_rope = p.q_rope + t * H * p.r;
  float *to = p.d_latent + key * p.c, *to_rope = p.d_rope + key * p.r;
  int i = 0;
  for (; i + 2 * LANES <= p.c; i += 2 * LANES) {
    vf a = load(to + i), b = load(to + i + LANES);
    for (int h = 0; h < H; h++) {
      const vf x = splat(ds[h]), y = splat(w[h]);
      a += load(q + h * p.c + i) * x;
      b += load(q + h * p.c + i + LANES) * x;
      a += load(g + h * p.c + i) * y;
      b += load(g + h * p.c + i + LANES) * y;
    }
    store(to + i, a), store(to + i + LANES, b);
  }
  for (; i < p.c; i++)
    for (int h = 0; h < H; h++) to[i] += q[h * p.c + i] * ds[h] + g[h * p.c + i] * w[h];
  for (int h = 0; h < H; h++) add(to_rope, q_rope + (int64_t)h * p.r, ds[h], p.r);
}
}  // namespace

EXPORT void nanoglm_sparse_attention_backward(const float* grad, const float* q_latent, const float* q_rope, const float* latent, int64_t latent_step, const float* rope,
                                              int64_t rope_step, const int32_t* selection, const int64_t* requests, const int32_t* table, int64_t columns,
                                              int64_t page_size, int64_t count, int heads, int c, int r, int k, float scale, float* d_q_latent, float* d_q_rope,
                                              float* d_latent, float* d_rope, int threads) {
  Problem p{{selection, requests, table, columns, page_size, count, k, {}}, grad, q_latent, q_rope, latent, rope, latent_step, rope_step, heads, c, r, scale,
            d_q_latent, d_q_rope, d_latent, d_rope};
  p.run = runs(p);
  const size_t each = (size_t)k * 2 * heads;
  Aligned<float> kept(STRIPE * each);
  Aligned<int32_t> rows((size_t)STRIPE * k);
  std::vector<int> valid(STRIPE);
#pragma omp parallel num_threads(threads)
  {
    Scratch s(p);
    int me, all;
    team(me, all);
    for (int64_t first = 0; first < count; first += STRIPE) {
      const int some = (int)std::min<int64_t>(STRIPE, count - first);
#pragma omp for schedule(dynamic, 1)
      for (int i = 0; i < some; i++) {
        valid[(size_t)i] = storage_rows(p, first + i, k, rows.data + (size_t)i * k);
        row(p, first + i, rows.data + (size_t)i * k, valid[(size_t)i], s, kept.data + i * each);
      }
      for (int i = 0; i < some; i++) {
        const int32_t* mine = rows.data + (size_t)i * k;
        const float* w = kept.data + i * each;
        for (int j = 0; j < valid[(size_t)i]; j++)
          if (mine[j] / GROUP % all == me) give(p, first + i, mine[j], w + (size_t)(2 * j) * heads, w + (size_t)(2 * j + 1) * heads);
      }
#pragma omp barrier
    }
  }
}
