// Prefill attention over a paged pool: tiles of queries against tiles of keys, online softmax between them.
//
// Key tiles begin at fixed positions (multiples of kKeys from the sequence's start), and within a tile every sum runs in
// the order of the keys. What a row's mask hides adds exact zeros. So a row's result depends on its position and on the
// keys and values before it, not on the chunk it was computed in nor on where the chunk's tiles begin.
//
// Keys are transposed into words [k_dim][keys] and values interleaved into [keys][v_dim] once per tile; both products are
// then the same register-blocked outer product. A word is a float, or two bfloat16 where the machine has their dot product;
// of these AMX's tiles multiply 32 rows at a time, two tiles of rows for each of keys or values that is loaded.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "tiles.h"

namespace kvray {
namespace {

constexpr int kKeys = 128;  // keys per tile
#if defined(KVRAY_AVX512) || defined(__aarch64__)
constexpr int kRows = 6;    // rows x vectors of the outer product: 24 sums of 32 registers
constexpr int kPanel = 4;
#else
constexpr int kRows = 6;  // 12 sums of 16 registers
constexpr int kPanel = 2;
#endif
constexpr int kTileRows = 192;  // query rows (tokens x heads of the group) that share one packing of keys and values

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// c[kRows][N * W] = c * factor + a . b, where a is [kRows, depth] words (a_row words apart), b is [depth, N * W] words.
template <typename T, int N>
inline void outer_product(const float* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row,
                          const float* factor) {
  vf x[kRows][N];
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < N; n++) x[r][n] = factor ? load(c + r * c_row + n * W) * factor[r] : vf{};
  for (int k = 0; k < depth; k++) {
    vf y[N];
    for (int n = 0; n < N; n++) y[n] = load(b + static_cast<int64_t>(k) * b_row + n * W);
    for (int r = 0; r < kRows; r++) {
      vf w = broadcast(a + r * a_row + k);
      for (int n = 0; n < N; n++) x[r][n] = Word<T>::dot(y[n], w, x[r][n]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int n = 0; n < N; n++) store(c + r * c_row + n * W, x[r][n]);
}

template <typename T>
void multiply(const float* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row, int num_vectors,
              const float* factor) {
  int n = 0;
  for (; n + kPanel <= num_vectors; n += kPanel)
    outer_product<T, kPanel>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, factor);
  switch (num_vectors - n) {
    case 3:
      outer_product<T, 3>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, factor);
      break;
    case 2:
      outer_product<T, 2>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, factor);
      break;
    case 1:
      outer_product<T, 1>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, factor);
      break;
    default:
      break;
  }
}

// How products are made: rows and words of depth at a time, zeros behind the last.
template <typename T>
struct Registers {
  static constexpr int kRowsAtOnce = kRows, kDepth = 1;
  static void begin() {}
  static void end() {}
  static void multiply(const float* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row,
                       int num_vectors, const float* factor) {
    kvray::multiply<T>(a, a_row, b, b_row, depth, c, c_row, num_vectors, factor);
  }
};

#if defined(KVRAY_TILES) && defined(KVRAY_AVX512)
struct Tiles {
  static constexpr int kRowsAtOnce = 2 * kTileSide, kDepth = kTileSide;
  static void begin() { configure_tiles(kTileSide); }
  static void end() { release_tiles(); }

  static void multiply(const float* a, int a_row, const float* b, int b_row, int depth, float* c, int c_row,
                       int num_vectors, const float* factor) {
    if (factor)
      for (int r = 0; r < kRowsAtOnce; r++)
        for (int n = 0; n < num_vectors * W; n += W) store(c + r * c_row + n, load(c + r * c_row + n) * factor[r]);
    int n = 0;
    for (; n + 2 <= num_vectors; n += 2) columns<true>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, !factor);
    if (n < num_vectors) columns<false>(a, a_row, b + n * W, b_row, depth, c + n * W, c_row, !factor);
  }

 private:
  // 32 rows by 32 or 16 columns.
  template <bool IsWide>
  KVRAY_TARGET_TILES static void columns(const float* a, int a_row, const float* b, int b_row, int depth, float* c,
                                         int c_row, bool is_new) {
    const int64_t a_stride = a_row * 4, b_stride = b_row * 4, c_stride = c_row * 4;
    float* below = c + static_cast<int64_t>(kTileSide) * c_row;
    asm volatile("" : : : "memory");  // GCC 12's tile loads do not say that they read memory
    if (is_new) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, c_stride);
      _tile_loadd(2, below, c_stride);
      if (IsWide) {
        _tile_loadd(1, c + kTileSide, c_stride);
        _tile_loadd(3, below + kTileSide, c_stride);
      }
    }
    for (int k = 0; k < depth; k += kTileSide, a += kTileSide, b += static_cast<int64_t>(kTileSide) * b_row) {
      _tile_loadd(6, b, b_stride);
      _tile_loadd(4, a, a_stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, a + static_cast<int64_t>(kTileSide) * a_row, a_stride);
      _tile_dpbf16ps(2, 5, 6);
      if (IsWide) {
        _tile_loadd(7, b + kTileSide, b_stride);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(2, below, c_stride);
    if (IsWide) {
      _tile_stored(1, c + kTileSide, c_stride);
      _tile_stored(3, below + kTileSide, c_stride);
    }
    asm volatile("" : : : "memory");
  }
};
#endif

// Memory of one thread, kept between calls.
struct Scratch {
  std::vector<float> memory;
  float *q, *o, *keys, *values;
  std::vector<float> maxima, weights;  // [rows], [rows, W]: weights are summed by lane and added up at the end

  void reserve(size_t q_size, size_t o_size, size_t k_size, size_t v_size, size_t rows) {
    const size_t needed = q_size + o_size + k_size + v_size + 16;
    if (memory.size() < needed) memory.resize(needed);
    float* at = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4;
    q = at;
    o = q + q_size;
    keys = o + o_size;
    values = keys + k_size;
    if (maxima.size() < rows) maxima.resize(rows), weights.resize(rows * W);
  }
};

// Keys [begin, begin + n) of a head as words [depth][kKeys]; columns up to the next multiple of W are zero.
template <typename T>
void pack_keys(const PagedKv<T>& kv, const int32_t* table, int begin, int n, int head, int depth, float* words) {
  constexpr int kStep = W * Word<T>::kElements;
  const T* all_rows[kKeys];
  kv.key_rows(table, begin, n, head, all_rows);
  for (int j = n; j < round_up(n, W); j++) all_rows[j] = nullptr;
  for (int j = 0; j < n; j += W) {
    const T** rows = all_rows + j;
    for (int d = 0, at = 0; d < kv.k_dim; d += kStep, at += W) {
      vf block[W];
      for (int i = 0; i < W; i++)
        block[i] = rows[i] ? Word<T>::load_words_upto(rows[i] + d, kv.k_dim - d) : vf{};
      transpose(block);
      const int count = std::min(W, depth - at);
      for (int i = 0; i < count; i++) store(words + static_cast<int64_t>(at + i) * kKeys + j, block[i]);
    }
  }
}

// Values [begin, begin + n) of a head as words [keys][width]; a last odd key is paired with zeros.
template <typename T>
void pack_values(const PagedKv<T>& kv, const int32_t* table, int begin, int n, int head, int width, float* words) {
  const T* rows[kKeys];
  kv.value_rows(table, begin, n, head, rows);
  if constexpr (Word<T>::kElements == 1) {
    for (int j = 0; j < n; j++) {
      const T* row = rows[j];
      for (int d = 0; d < kv.v_dim; d += W) store(words + j * width + d, load_upto(row + d, kv.v_dim - d));
    }
  } else {
    for (int j = 0; j < n; j += 2) {
      const T* even = rows[j];
      const T* odd = j + 1 < n ? rows[j + 1] : nullptr;
      for (int d = 0; d < kv.v_dim; d += W) {
        // A bfloat16 widened to float has its bits on top: the even key goes below, the odd one stays above.
        vu low = (vu)load_upto(even + d, kv.v_dim - d) >> 16;
        vu high = odd ? (vu)load_upto(odd + d, kv.v_dim - d) : vu{};
        store(words + (j / 2) * width + d, (vf)(low | high));
      }
    }
  }
}

// Of one row with scores [n], which stay: those that are to be weighed, and the largest of them.
inline float prepare(float* s, int n, int begin, int first, int last, const Scores& scores) {
  if (scores.softcap > 0) {
    const float cap = scores.softcap;
    for (int j = 0; j < n; j += W) store(s + j, tanhv(load(s + j) * (scores.scaling / cap)) * (cap / scores.scaling));
  }
  if (first > begin || last < begin + n - 1)
    for (int j = 0; j < n; j += W) {
      vi at = iota() + (begin + j);
      vf x = load(s + j);
      x = at > last ? splat(-INFINITY) : x;
      x = at < first ? splat(-INFINITY) : x;
      store(s + j, x);
    }
  vf top = load(s);
  for (int j = W; j < n; j += W) top = maximum(top, load(s + j));
  return largest(top);
}

// Scores [n] of one row to weights: words for the second product, written over the row where a word is a float.
// Returns their sums by lane.
template <typename T>
inline vf weigh(float* s, uint16_t* halves, int n, float scale, float shift) {
  vf total = {};
  for (int j = 0; j < n; j += W) {
    // Rounding to bfloat16 leaves nothing of what the fifth term would add.
    constexpr int kTerms = Word<T>::kElements == 2 ? 4 : 7;
    vf p = exp2v<kTerms>(fma(load(s + j), splat(scale), splat(-shift)));
    total += p;
    if constexpr (Word<T>::kElements == 2)
      store(reinterpret_cast<bf16*>(halves + j), p);
    else
      store(s + j, p);
  }
  return total;
}

template <typename T, typename Product>
void attend(const PrefillAttention<T>& a, const Chunk& chunk, int kv_head, int first_query, int count) {
  using Wd = Word<T>;
  constexpr int kRows = Product::kRowsAtOnce;
  static thread_local Scratch scratch;
  const int group = a.group(), k_dim = a.kv.k_dim, v_dim = a.kv.v_dim;
  const int depth = round_up((k_dim + Wd::kElements - 1) / Wd::kElements, Product::kDepth);
  const int width = round_up(v_dim, W);
  const int num_rows = count * group, padded_rows = round_up(num_rows, kRows);
  scratch.reserve(static_cast<size_t>(padded_rows) * depth, static_cast<size_t>(padded_rows) * width,
                  static_cast<size_t>(depth) * kKeys, static_cast<size_t>(kKeys) * width, padded_rows);
  float *q = scratch.q, *o = scratch.o, *keys = scratch.keys, *values = scratch.values;
  float *maxima = scratch.maxima.data(), *weights = scratch.weights.data();
  std::memset(q, 0, sizeof(float) * padded_rows * depth);
  std::memset(o, 0, sizeof(float) * padded_rows * width);
  const int first_position = chunk.kv_len - chunk.q_len + first_query;
  const float scale = a.scores.scaling * kLog2E;
  Product::begin();

  for (int r = 0; r < padded_rows; r++) {
    const int head = kv_head * group + r % group;
    vf weight = {};
    maxima[r] = -INFINITY;
    if (a.scores.sinks && r < num_rows) {
      maxima[r] = a.scores.sinks[head] * kLog2E;
      weight[0] = 1.f;
    }
    store(weights + r * W, weight);
    if (r >= num_rows) continue;
    const T* row = a.q + (chunk.q_start + first_query + r / group) * a.q_row + head * a.q_head;
    if constexpr (Wd::kElements == 2)
      std::memcpy(q + r * depth, row, k_dim * sizeof(T));
    else
      for (int d = 0; d < k_dim; d++) q[r * depth + d] = to_float(row[d]);
  }

  const auto words_of = [](int num_keys) { return (num_keys + Wd::kElements - 1) / Wd::kElements; };
  const int end = first_position + count;  // one past the last key seen
  for (int begin = a.scores.first_key(first_position) / kKeys * kKeys; begin < end; begin += kKeys) {
    const int n = std::min(kKeys, end - begin);
    pack_keys(a.kv, chunk.table, begin, n, kv_head, depth, keys);
    pack_values(a.kv, chunk.table, begin, n, kv_head, width, values);
    const int packed = words_of(n), padded = round_up(packed, Product::kDepth);
    if (packed < padded) std::memset(values + packed * width, 0, sizeof(float) * (padded - packed) * width);
    for (int r = 0; r < padded_rows; r += kRows) {
      const int last_row = std::min(r + kRows, num_rows) - 1;
      const int last = first_position + last_row / group;
      const int first = a.scores.first_key(first_position + r / group);
      if (last < begin || first >= begin + n) continue;
      const int seen = std::min(n, last + 1 - begin);
      const int columns = round_up(seen, W);
      alignas(64) float s[kRows * kKeys];
      alignas(64) uint16_t halves[kRows * kKeys];
      alignas(64) float tops[round_up(kRows, W)] = {}, factor[round_up(kRows, W)], shifts[round_up(kRows, W)];
      Product::multiply(q + r * depth, depth, keys, kKeys, depth, s, kKeys, columns / W, nullptr);
      for (int i = 0; i < kRows; i++) {
        const int position = first_position + std::min(r + i, num_rows - 1) / group;
        tops[i] = prepare(s + i * kKeys, columns, begin, a.scores.first_key(position),
                          std::min(position, begin + n - 1), a.scores);
      }
      for (int i = 0; i < kRows; i += W) {
        const int count = std::min(W, kRows - i);
        const vf before = load_upto(maxima + r + i, count), now = maximum(before, load(tops + i) * scale);
        const vf shift = now == -INFINITY ? vf{} : now;  // a row that has seen no key yet
        store_upto(maxima + r + i, now, count);
        store(shifts + i, shift);
        store(factor + i, exp2v<7>(before - shift));
      }
      const int depth_seen = round_up(words_of(seen), Product::kDepth);
      for (int i = 0; i < kRows; i++) {
        float* weight = weights + (r + i) * W;
        const vf total = weigh<T>(s + i * kKeys, halves + i * kKeys, columns, scale, shifts[i]);
        store(weight, fma(load(weight), splat(factor[i]), total));
        for (int j = columns; j < depth_seen * Wd::kElements; j++) halves[i * kKeys + j] = 0;
      }
      const float* p = Wd::kElements == 2 ? reinterpret_cast<const float*>(halves) : s;
      Product::multiply(p, kKeys / Wd::kElements, values, width, depth_seen, o + r * width, width, width / W, factor);
    }
  }

  Product::end();
  for (int r = 0; r < num_rows; r++) {
    const int head = kv_head * group + r % group;
    T* out = a.out + (chunk.q_start + first_query + r / group) * a.out_row + head * a.out_head;
    const vf divisor = splat(sum(load(weights + r * W)));
    for (int d = 0; d < v_dim; d += W) store_upto(out + d, load(o + r * width + d) / divisor, v_dim - d);
  }
}

}  // namespace

int query_tile(int group) { return std::max(1, kTileRows / group); }

template <typename T>
void prefill_tile(const PrefillAttention<T>& a, const Chunk& chunk, int kv_head, int first_query, int count) {
#if defined(KVRAY_TILES) && defined(KVRAY_AVX512)
  if constexpr (Word<T>::kElements == 2)
    if (a.is_on_tiles) return attend<T, Tiles>(a, chunk, kv_head, first_query, count);
#endif
  attend<T, Registers<T>>(a, chunk, kv_head, first_query, count);
}

template void prefill_tile<float>(const PrefillAttention<float>&, const Chunk&, int, int, int);
template void prefill_tile<bf16>(const PrefillAttention<bf16>&, const Chunk&, int, int, int);

}  // namespace kvray
