// Decode attention over a paged pool: one query row per sequence, split every kSplit keys.
//
// All heads of a group share each key and value that is read. Within a split, keys are taken 128 at a time: scores, an
// online softmax, then the weighted values. The order of every sum depends on the row's own length only.
#include <algorithm>
#include <vector>

#include "attention.h"

namespace kvray {
namespace {

constexpr int kKeys = 128;   // keys per round of the online softmax
constexpr int kHeads = 4;    // heads of a group handled at once: their sums fit the registers
constexpr int kColumns = 4;  // vectors of the value row handled at once
constexpr int kAhead = 24;   // keys fetched ahead; blocks are far apart, so the hardware cannot guess (ENGINE: +30 %)


template <typename T>
inline void prefetch_row(const T* p, int dim) {
  for (int at = 0; at < dim * static_cast<int>(sizeof(T)); at += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + at);
}

// s[h][j] = scaling * q[h] . key[j]; n keys, pointers padded to a multiple of 4.
template <typename T, int H>
void score_keys(const T* q, int q_stride, const T* const* keys, const T* const* values, int n, int k_dim, int v_dim,
                float scaling, float (*s)[kKeys]) {
  using Wd = Word<T>;
  constexpr int kStep = W * Wd::kElements;
  for (int j = 0; j < n; j += 4) {
    for (int i = 0; i < 4; i++) {
      prefetch_row(values[std::min(j + i, n - 1)], v_dim);
      prefetch_row(keys[std::min(j + i + kAhead, n - 1)], k_dim);
    }
    vf x[H][4] = {};
    const auto add = [&](int d, auto load) {
      vf k[4];
      for (int i = 0; i < 4; i++) k[i] = load(keys[j + i] + d);
      for (int h = 0; h < H; h++) {
        vf w = Wd::load_words(q + h * q_stride + d);
        for (int i = 0; i < 4; i++) x[h][i] = Wd::dot(k[i], w, x[h][i]);
      }
    };
    int d = 0;
    for (; d + kStep <= k_dim; d += kStep) add(d, [](const T* at) { return Wd::load_words(at); });
    if (d < k_dim) add(d, [&](const T* at) { return Wd::load_words_upto(at, k_dim - d); });
    for (int h = 0; h < H; h++) sum_four(x[h], scaling, &s[h][j]);
  }
}

// Scores to weights against the new maximum. Returns what the sums so far must be multiplied by.
inline float weigh(float* s, int n, float softcap, float& maximum_so_far, float& weight) {
  int padded = (n + W - 1) / W * W;
  if (softcap > 0)
    for (int j = 0; j < padded; j += W) store(s + j, tanhv(load(s + j) / softcap) * softcap);
  for (int j = n; j < padded; j++) s[j] = -INFINITY;
  vf top = load(s);
  for (int j = W; j < padded; j += W) top = maximum(top, load(s + j));
  float now = std::max(maximum_so_far, largest(top) * kLog2E);
  vf total = {};
  for (int j = 0; j < padded; j += W) {
    vf p = exp2v<7>(load(s + j) * kLog2E - now);
    store(s + j, p);
    total += p;
  }
  float factor = std::exp2(maximum_so_far - now);
  maximum_so_far = now;
  weight = weight * factor + sum(total);
  return factor;
}

// sums[h] = sums[h] * factor[h] + s[h] . values, C vectors from column d on, or less than one where it is not whole.
template <typename T, int H, int C, bool IsWhole = true>
void add_values(const float (*s)[kKeys], const T* const* values, int n, int d, int v_dim, const float* factor,
                float* sums) {
  static_assert(IsWhole || C == 1);
  const auto get = [&](const auto* p) { return IsWhole ? load(p) : load_part(p, v_dim - d); };
  vf o[H][C];
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) o[h][c] = get(sums + h * v_dim + d + c * W) * factor[h];
  for (int j = 0; j < n; j++) {
    vf v[C];
    for (int c = 0; c < C; c++) v[c] = get(values[j] + d + c * W);
    for (int h = 0; h < H; h++) {
      vf p = splat(s[h][j]);
      for (int c = 0; c < C; c++) o[h][c] = fma(p, v[c], o[h][c]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int c = 0; c < C; c++) store_upto(sums + h * v_dim + d + c * W, o[h][c], v_dim - d - c * W);
}

template <typename T, int H>
void attend(const DecodeAttention<T>& a, int row, int kv_head, int head, int begin, int end, float* sums,
            float* maxima, float* weights) {
  const int k_dim = a.kv.k_dim, v_dim = a.kv.v_dim;
  const int padded_dim = (k_dim + 2 * W - 1) / (2 * W) * (2 * W);
  alignas(64) T q[H * kMaxDim];
  alignas(64) float s[H][kKeys];
  const T* keys[kKeys];
  const T* values[kKeys];
  std::memset(q, 0, sizeof(T) * H * padded_dim);
  for (int h = 0; h < H; h++) {
    std::memcpy(q + h * padded_dim, a.q + row * a.q_row + (head + h) * a.q_head, k_dim * sizeof(T));
    maxima[h] = -INFINITY;
    weights[h] = 0;
  }
  std::memset(sums, 0, sizeof(float) * H * v_dim);
  const int32_t* table = a.tables + a.slots[row] * a.table_row;
  for (int at = begin; at < end; at += kKeys) {
    const int n = std::min(kKeys, end - at);
    a.kv.key_rows(table, at, n, kv_head, keys);
    a.kv.value_rows(table, at, n, kv_head, values);
    for (int j = n; j % 4; j++) keys[j] = keys[n - 1];
    score_keys<T, H>(q, padded_dim, keys, values, n, k_dim, v_dim, a.scores.scaling, s);
    float factor[H];
    for (int h = 0; h < H; h++) factor[h] = weigh(s[h], n, a.scores.softcap, maxima[h], weights[h]);
    int d = 0;
    for (; d + kColumns * W <= v_dim; d += kColumns * W) add_values<T, H, kColumns>(s, values, n, d, v_dim, factor, sums);
    for (; d + 2 * W <= v_dim; d += 2 * W) add_values<T, H, 2>(s, values, n, d, v_dim, factor, sums);
    for (; d + W <= v_dim; d += W) add_values<T, H, 1>(s, values, n, d, v_dim, factor, sums);
    if (d < v_dim) add_values<T, H, 1, false>(s, values, n, d, v_dim, factor, sums);
  }
}

}  // namespace

template <typename T>
void decode_split(const DecodeAttention<T>& a, int row, int kv_head, int split, float* sums, float* maxima,
                  float* weights) {
  const int len = a.lens[row];
  const int begin = a.scores.first_key(len - 1) + split * kSplit;
  const int end = std::min(len, begin + kSplit);
  const int group = a.group();
  for (int g = 0; g < group;) {
    const int head = kv_head * group + g;
    float* o = sums + g * a.kv.v_dim;
    const int left = std::min(kHeads, group - g);
    if (left == 4)
      attend<T, 4>(a, row, kv_head, head, begin, end, o, maxima + g, weights + g);
    else if (left == 3)
      attend<T, 3>(a, row, kv_head, head, begin, end, o, maxima + g, weights + g);
    else if (left == 2)
      attend<T, 2>(a, row, kv_head, head, begin, end, o, maxima + g, weights + g);
    else
      attend<T, 1>(a, row, kv_head, head, begin, end, o, maxima + g, weights + g);
    g += left;
  }
}

template <typename T>
void decode_merge(const DecodeAttention<T>& a, int row, int kv_head, int num_splits, float* sums, const float* maxima,
                  const float* weights) {
  const int group = a.group(), v_dim = a.kv.v_dim;
  for (int g = 0; g < group; g++) {
    const int head = kv_head * group + g;
    float top = a.scores.sinks ? a.scores.sinks[head] * kLog2E : -INFINITY;
    for (int i = 0; i < num_splits; i++) top = std::max(top, maxima[i * group + g]);
    float total = a.scores.sinks ? std::exp2(a.scores.sinks[head] * kLog2E - top) : 0.f;
    float* first = sums + g * v_dim;
    for (int i = 0; i < num_splits; i++) {
      const float factor = std::exp2(maxima[i * group + g] - top);
      const float* o = sums + (static_cast<int64_t>(i) * group + g) * v_dim;
      total += factor * weights[i * group + g];
      for (int d = 0; d < v_dim; d++) first[d] = i ? first[d] + factor * o[d] : factor * o[d];
    }
    T* out = a.out + row * a.out_row + head * a.out_head;
    const vf divisor = splat(total);
    for (int d = 0; d < v_dim; d += W) store_upto(out + d, load_upto(first + d, v_dim - d) / divisor, v_dim - d);
  }
}

template void decode_split<float>(const DecodeAttention<float>&, int, int, int, float*, float*, float*);
template void decode_split<bf16>(const DecodeAttention<bf16>&, int, int, int, float*, float*, float*);
template void decode_merge<float>(const DecodeAttention<float>&, int, int, int, float*, const float*, const float*);
template void decode_merge<bf16>(const DecodeAttention<bf16>&, int, int, int, float*, const float*, const float*);

}  // namespace kvray
