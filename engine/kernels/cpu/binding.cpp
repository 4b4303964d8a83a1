// Python's door to the kernels: checks shapes and types, hands out the work to the threads of torch's OpenMP.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "tiles.h"

namespace {

using kvray::Arguments;
using kvray::bf16;
using kvray::check;
using kvray::Dtype;
using kvray::refuse;
using kvray::Tensor;
using kvray::WithoutGil;

// work(first, last) for parts of [begin, end) of at least `grain` items, on the whole team or, where that is not worth it,
// on this thread.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& work) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  if (count <= grain || count == 1 || omp_in_parallel() || omp_get_max_threads() == 1) {
    work(begin, end);
    return;
  }
#pragma omp parallel
  {
    const int64_t num_threads = std::min<int64_t>(omp_get_num_threads(), (count + grain - 1) / grain);
    const int64_t part = (count + num_threads - 1) / num_threads, first = begin + omp_get_thread_num() * part;
    if (first < end) work(first, std::min(end, first + part));
  }
}

// work(i) for i in [0, count), each on whichever thread is free: items may differ much in cost.
template <typename F>
void for_each(int64_t count, const F& work) {
  const int64_t num_threads = std::min<int64_t>(count, omp_get_max_threads());
  if (num_threads <= 1 || omp_in_parallel()) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// Calls f with a null pointer of the element type.
template <typename F>
void by_dtype(const Tensor& tensor, const F& f) {
  if (tensor.dtype() == Dtype::kFloat)
    f(static_cast<float*>(nullptr));
  else if (tensor.dtype() == Dtype::kBfloat16)
    f(static_cast<bf16*>(nullptr));
  else
    refuse("dtype is ", dtype_name(tensor), ", want float32 or bfloat16");
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return tensor.pointer<T>();
}

void check_rows(const Tensor& tensor, const Tensor& like, int64_t dims, const char* name) {
  check(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, want ", dims);
  check(tensor.dtype() == like.dtype(), name, " is ", dtype_name(tensor), ", want ", dtype_name(like));
  check(tensor.stride(-1) == 1 || tensor.size(-1) == 1, name, ": last dimension is not contiguous");
}

// Views are [num_blocks, num_kv_heads, block_size, dim].
template <typename T>
kvray::PagedKv<T> paged_kv(const Tensor& k_view, const Tensor& v_view) {
  return {pointer<const T>(k_view), pointer<const T>(v_view),
          k_view.stride(0), k_view.stride(2), k_view.stride(1),
          v_view.stride(0), v_view.stride(2), v_view.stride(1),
          static_cast<int>(k_view.size(2)), static_cast<int>(k_view.size(1)),
          static_cast<int>(k_view.size(3)), static_cast<int>(v_view.size(3))};
}

void check_attention(const Tensor& query, const Tensor& k_view, const Tensor& v_view,
                     const std::optional<Tensor>& sinks, const Tensor& out) {
  check_rows(query, query, 3, "query");
  check_rows(out, query, 3, "out");
  check(out.size(0) == query.size(0) && out.size(1) == query.size(1) && out.size(2) == v_view.size(3), "out is ",
        shown(out), ", want [", query.size(0), ", ", query.size(1), ", ", v_view.size(3), "]");
  check_rows(k_view, query, 4, "k_view");
  check_rows(v_view, query, 4, "v_view");
  check(query.size(2) == k_view.size(3), "query has head size ", query.size(2), ", keys ", k_view.size(3));
  check(k_view.size(1) == v_view.size(1) && k_view.size(2) == v_view.size(2), "k_view and v_view differ");
  check(query.size(1) % k_view.size(1) == 0, query.size(1), " heads over ", k_view.size(1), " KV heads");
  check(k_view.size(3) <= kvray::kMaxDim, "head size ", k_view.size(3), ", want at most ", kvray::kMaxDim);
  if (sinks)
    check(sinks->dtype() == Dtype::kFloat && sinks->is_contiguous() && sinks->numel() == query.size(1),
                "sinks: want contiguous float32 [num_heads]");
}

// scaling, window, softcap, sinks, chunk
struct ScoreArguments {
  explicit ScoreArguments(Arguments& arguments)
      : scaling(arguments.number()),
        window(arguments.integer()),
        softcap(arguments.number()),
        sinks(arguments.tensor_or_none()),
        chunk(arguments.integer()) {}

  kvray::Scores scores() const {
    return {static_cast<float>(scaling), static_cast<float>(softcap), static_cast<int>(window),
            static_cast<int>(chunk), sinks ? pointer<const float>(*sinks) : nullptr};
  }

  double scaling;
  int64_t window;
  double softcap;
  std::optional<Tensor> sinks;
  int64_t chunk;
};

template <typename T>
void scatter(const Tensor& rows, const Tensor& view, const int64_t* blocks, const int64_t* offsets, int64_t begin,
             int64_t end) {
  const int64_t num_heads = rows.size(1), bytes = rows.size(2) * sizeof(T);
  const T* from = pointer<const T>(rows);
  T* to = pointer<T>(view);
  for (int64_t t = begin; t < end; t++)
    for (int64_t h = 0; h < num_heads; h++)
      std::memcpy(to + blocks[t] * view.stride(0) + h * view.stride(1) + offsets[t] * view.stride(2),
                  from + t * rows.stride(0) + h * rows.stride(1), bytes);
}

// key, value, k_view, v_view, block_ids, offsets
void write_kv(Arguments& arguments) {
  const Tensor key = arguments.tensor(), value = arguments.tensor(), k_view = arguments.tensor(),
               v_view = arguments.tensor(), block_ids = arguments.tensor(), offsets = arguments.tensor();
  arguments.end();
  check_rows(key, k_view, 3, "key");
  check_rows(value, v_view, 3, "value");
  check(block_ids.dtype() == Dtype::kInt64 && offsets.dtype() == Dtype::kInt64 &&
                  block_ids.is_contiguous() && offsets.is_contiguous() && block_ids.numel() == key.size(0) &&
                  offsets.numel() == key.size(0),
              "block_ids and offsets: want contiguous int64 [", key.size(0), "]");
  const auto *blocks = pointer<const int64_t>(block_ids), *rows = pointer<const int64_t>(offsets);
  const WithoutGil released;
  by_dtype(key, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    parallel_for(0, key.size(0), 64, [&](int64_t begin, int64_t end) {
      scatter<T>(key, k_view, blocks, rows, begin, end);
      scatter<T>(value, v_view, blocks, rows, begin, end);
    });
  });
}

// query, k_view, v_view, block_tables, slots, kv_lens, scaling, window, softcap, sinks, chunk, out
void decode_attention(Arguments& arguments) {
  const Tensor query = arguments.tensor(), k_view = arguments.tensor(), v_view = arguments.tensor(),
               block_tables = arguments.tensor(), slots = arguments.tensor(), kv_lens = arguments.tensor();
  const ScoreArguments how(arguments);
  const Tensor out = arguments.tensor();
  arguments.end();
  check_attention(query, k_view, v_view, how.sinks, out);
  const int64_t num_rows = query.size(0), num_heads = query.size(1);
  check(block_tables.dtype() == Dtype::kInt32 && block_tables.dim() == 2 && block_tables.stride(1) == 1,
              "block_tables: want int32 [num_slots, max_blocks]");
  check(slots.dtype() == Dtype::kInt64 && slots.is_contiguous() && slots.numel() == num_rows,
              "slots: want contiguous int64 [", num_rows, "]");
  for (int64_t row = 0; row < num_rows; row++) {
    const int64_t slot = pointer<const int64_t>(slots)[row];
    check(slot >= 0 && slot < block_tables.size(0), "slot ", slot, ", want one of ", block_tables.size(0));
  }
  check(kv_lens.dtype() == Dtype::kInt32 && kv_lens.is_contiguous() && kv_lens.numel() == num_rows,
              "kv_lens: want contiguous int32 [", num_rows, "]");
  const WithoutGil released;
  by_dtype(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    kvray::DecodeAttention<T> a{paged_kv<T>(k_view, v_view),
                                how.scores(),
                                pointer<const T>(query),
                                query.stride(0),
                                query.stride(1),
                                pointer<T>(out),
                                out.stride(0),
                                out.stride(1),
                                pointer<const int32_t>(block_tables),
                                block_tables.stride(0),
                                pointer<const int64_t>(slots),
                                pointer<const int32_t>(kv_lens),
                                static_cast<int>(num_heads)};
    struct Item {
      int row, kv_head, split;
    };
    const int num_kv_heads = a.kv.num_kv_heads, group = a.group();
    std::vector<Item> items;
    std::vector<int64_t> starts;  // first item of each (row, KV head), and one past the last
    for (int row = 0; row < num_rows; row++) {
      const int num_splits = a.num_splits(row);
      for (int h = 0; h < num_kv_heads; h++) {
        starts.push_back(static_cast<int64_t>(items.size()));
        for (int split = 0; split < num_splits; split++) items.push_back({row, h, split});
      }
    }
    starts.push_back(static_cast<int64_t>(items.size()));
    std::vector<float> sums(items.size() * group * a.kv.v_dim), maxima(items.size() * group),
        weights(items.size() * group);
    for_each(static_cast<int64_t>(items.size()), [&](int64_t i) {
      const Item& item = items[i];
      kvray::decode_split<T>(a, item.row, item.kv_head, item.split, &sums[i * group * a.kv.v_dim], &maxima[i * group],
                             &weights[i * group]);
    });
    parallel_for(0, num_rows * num_kv_heads, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = starts[i];
        kvray::decode_merge<T>(a, static_cast<int>(i / num_kv_heads), static_cast<int>(i % num_kv_heads),
                               static_cast<int>(starts[i + 1] - first), &sums[first * group * a.kv.v_dim],
                               &maxima[first * group], &weights[first * group]);
      }
    });
  });
}

// query, k_view, v_view, block_table, kv_len, scaling, window, softcap, sinks, chunk, is_on_tiles, out
void prefill_attention(Arguments& arguments) {
  const Tensor query = arguments.tensor(), k_view = arguments.tensor(), v_view = arguments.tensor(),
               block_table = arguments.tensor();
  const int64_t kv_len = arguments.integer();
  const ScoreArguments how(arguments);
  const bool is_on_tiles = arguments.flag();
  const Tensor out = arguments.tensor();
  arguments.end();
  check_attention(query, k_view, v_view, how.sinks, out);
  check(!is_on_tiles || kvray::may_use_tiles(), "prefill attention on tiles, which this process may not use");
  const int64_t num_tokens = query.size(0), num_heads = query.size(1);
  check(block_table.dtype() == Dtype::kInt32 && block_table.is_contiguous() &&
                  block_table.numel() * k_view.size(2) >= kv_len,
              "block_table: want contiguous int32 covering ", kv_len, " tokens");
  check(num_tokens <= kv_len, num_tokens, " rows, but only ", kv_len, " tokens");
  const WithoutGil released;
  by_dtype(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    kvray::PrefillAttention<T> a{paged_kv<T>(k_view, v_view), how.scores(),
                                 pointer<const T>(query),     query.stride(0),
                                 query.stride(1),             pointer<T>(out),
                                 out.stride(0),               out.stride(1),
                                 static_cast<int>(num_heads), is_on_tiles};
    const kvray::Chunk part{0, static_cast<int>(num_tokens), static_cast<int>(kv_len),
                            pointer<const int32_t>(block_table)};
    const int tile = kvray::query_tile(a.group()), num_kv_heads = a.kv.num_kv_heads;
    const int num_tiles = (part.q_len + tile - 1) / tile;
    for_each(static_cast<int64_t>(num_tiles) * num_kv_heads, [&](int64_t i) {
      const int first = (num_tiles - 1 - static_cast<int>(i / num_kv_heads)) * tile;  // the longest rows first
      kvray::prefill_tile<T>(a, part, static_cast<int>(i % num_kv_heads), first, std::min(tile, part.q_len - first));
    });
  });
}

// Rows that are worth a thread's while.
int64_t grain(int64_t row_size) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(row_size, 1)); }

// With a residual, x becomes x + residual first.
void norm_rows(const Tensor* residual, const Tensor& x, Arguments& arguments) {
  const Tensor weight = arguments.tensor();
  const float eps = static_cast<float>(arguments.number());
  const bool adds_one = arguments.flag(), rounds_first = arguments.flag();
  const Tensor out = arguments.tensor();
  arguments.end();
  const kvray::NormStyle style{eps, adds_one, rounds_first};
  const int64_t n = x.size(-1), num_rows = x.numel() / std::max<int64_t>(n, 1);
  check(x.is_contiguous() && weight.is_contiguous() && weight.numel() == n && weight.dtype() == x.dtype(),
        "rms_norm: want contiguous rows and a weight [", n, "] of the same type");
  check(out.is_contiguous() && out.numel() == x.numel() && out.dtype() == x.dtype(), "rms_norm: want out as x");
  if (residual)
    check(residual->is_contiguous() && residual->has_shape_of(x) && residual->dtype() == x.dtype(),
          "add_rms_norm: want two contiguous tensors of one shape and type");
  const WithoutGil released;
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *rows = pointer<T>(x), *to = pointer<T>(out);
    const T *factor = pointer<const T>(weight), *from = residual ? pointer<const T>(*residual) : nullptr;
    parallel_for(0, num_rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        if (from) kvray::add_row<T>(from + i * n, static_cast<int>(n), rows + i * n);
        kvray::rms_norm_row<T>(rows + i * n, factor, static_cast<int>(n), style, to + i * n);
      }
    });
  });
}

// x, weight, eps, adds_one, rounds_first, out
void rms_norm(Arguments& arguments) {
  const Tensor x = arguments.tensor();
  norm_rows(nullptr, x, arguments);
}

// residual, delta, weight, eps, adds_one, rounds_first, out
void add_rms_norm(Arguments& arguments) {
  const Tensor residual = arguments.tensor(), delta = arguments.tensor();
  norm_rows(&residual, delta, arguments);
}

kvray::Activation activation(bool is_gelu) {
  return is_gelu ? kvray::Activation::kGeluTanh : kvray::Activation::kSilu;
}

// gate, up, is_gelu
void gate(Arguments& arguments) {
  const Tensor gate = arguments.tensor(), up = arguments.tensor();
  const bool is_gelu = arguments.flag();
  arguments.end();
  check(gate.is_contiguous() && up.is_contiguous() && gate.has_shape_of(up) && gate.dtype() == up.dtype(),
              "gate: want two contiguous tensors of one shape and type");
  const int64_t n = gate.size(-1), num_rows = gate.numel() / std::max<int64_t>(n, 1);
  const WithoutGil released;
  by_dtype(gate, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = pointer<T>(gate);
    const T* from = pointer<const T>(up);
    parallel_for(0, num_rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kvray::gate_row<T>(to + i * n, from + i * n, static_cast<int>(n), activation(is_gelu));
    });
  });
}

// logits, counts, repetition, frequency, presence, out
void penalize(Arguments& arguments) {
  const Tensor logits = arguments.tensor(), counts = arguments.tensor();
  const double repetition = arguments.number(), frequency = arguments.number(), presence = arguments.number();
  const Tensor out = arguments.tensor();
  arguments.end();
  check(logits.is_contiguous() && counts.is_contiguous() && out.is_contiguous() &&
                  logits.dtype() == Dtype::kFloat && out.dtype() == Dtype::kFloat &&
                  counts.dtype() == Dtype::kInt32 && logits.numel() == counts.numel() &&
                  out.numel() == counts.numel(),
              "penalize: want contiguous float32 rows and int32 counts of one size");
  const kvray::Penalties penalties{static_cast<float>(repetition), static_cast<float>(frequency),
                                   static_cast<float>(presence)};
  const WithoutGil released;
  kvray::penalize_row(pointer<const float>(logits), pointer<const int32_t>(counts), counts.numel(), penalties,
                      pointer<float>(out));
}

// rows, cosine, sine
void rotate(Arguments& arguments) {
  const Tensor rows = arguments.tensor(), cosine = arguments.tensor(), sine = arguments.tensor();
  arguments.end();
  check_rows(rows, rows, 3, "rows");
  const int64_t num_tokens = rows.size(0), rotary = cosine.size(-1);
  check(cosine.is_contiguous() && sine.is_contiguous() && cosine.has_shape_of(sine) &&
                  cosine.numel() == num_tokens * rotary && cosine.dtype() == rows.dtype() &&
                  sine.dtype() == rows.dtype() && rotary % 2 == 0 && rotary <= rows.size(2),
              "rotate: want contiguous cosine and sine [", num_tokens, ", even, at most ", rows.size(2),
              "] of the rows' type");
  const WithoutGil released;
  by_dtype(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = pointer<T>(rows);
    const T *c = pointer<const T>(cosine), *s = pointer<const T>(sine);
    parallel_for(0, num_tokens, grain(rows.size(1) * rotary), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        kvray::rotate_row<T>(to + t * rows.stride(0), rows.stride(1), static_cast<int>(rows.size(1)), c + t * rotary,
                             s + t * rotary, static_cast<int>(rotary));
    });
  });
}

kvray::LinearPath linear_path(const std::string& name) {
  if (name == "tiles" && kvray::may_use_tiles()) return kvray::LinearPath::kTiles;
  if (name == "dot" && kvray::kHasBf16Dot) return kvray::LinearPath::kDot;
  check(name == "fma", "linear path is ", name, ", want one of linear_paths()");
  return kvray::LinearPath::kFma;
}

// Those that this machine can take, the fastest first.
std::vector<std::string> linear_paths() {
  std::vector<std::string> names;
  if (kvray::may_use_tiles()) names.emplace_back("tiles");
  if (kvray::kHasBf16Dot) names.emplace_back("dot");
  names.emplace_back("fma");
  return names;
}

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

int64_t num_blocks(int64_t width) { return ceil_div(width, kvray::kBlockColumns); }
int64_t num_panels(int64_t depth) { return ceil_div(depth, kvray::kPanelDepth); }

void check_words(const Tensor& words, int64_t groups, int64_t blocks, int64_t panels) {
  check(words.dtype() == Dtype::kInt32 && words.is_contiguous() && words.dim() == 4 && words.size(0) == groups &&
            words.size(1) == blocks && words.size(2) == panels && words.size(3) == kvray::kPanelWords,
        "weights packed as ", shown(words), ", want int32 [", groups, ", ", blocks, ", ", panels, ", ",
        kvray::kPanelWords, "]");
}

struct Packing {
  int64_t groups, width, depth, blocks, words_of_group;
};

// weights [num_groups, width, depth], as they are and as words [num_groups, blocks, panels, kPanelWords].
Packing packing_of(const Tensor& weights, const Tensor& words) {
  check(weights.dtype() == Dtype::kBfloat16 && weights.dim() == 3 && weights.is_contiguous(),
        "weights: want contiguous bfloat16 [num_groups, out_features, in_features]");
  const int64_t groups = weights.size(0), width = weights.size(1), depth = weights.size(2);
  const int64_t blocks = num_blocks(width), panels = num_panels(depth);
  check_words(words, groups, blocks, panels);
  return {groups, width, depth, blocks, blocks * panels * kvray::kPanelWords};
}

// weights [num_groups, width, depth], path, out: words [num_groups, blocks, panels, kPanelWords]
void pack_weights(Arguments& arguments) {
  const Tensor weights = arguments.tensor();
  const kvray::LinearPath path = linear_path(arguments.text());
  const Tensor words = arguments.tensor();
  arguments.end();
  const Packing shape = packing_of(weights, words);
  const auto* from = pointer<const bf16>(weights);
  auto* to = pointer<uint32_t>(words);
  const WithoutGil released;
  for_each(shape.groups * shape.blocks, [&](int64_t i) {
    const int64_t group = i / shape.blocks;
    kvray::pack_weights(path, from + group * shape.width * shape.depth, shape.width, shape.depth, i % shape.blocks,
                        to + group * shape.words_of_group);
  });
}

// words, path, out: weights [num_groups, width, depth]
void unpack_weights(Arguments& arguments) {
  const Tensor words = arguments.tensor();
  const kvray::LinearPath path = linear_path(arguments.text());
  const Tensor weights = arguments.tensor();
  arguments.end();
  const Packing shape = packing_of(weights, words);
  const auto* from = pointer<const uint32_t>(words);
  auto* to = pointer<bf16>(weights);
  const WithoutGil released;
  for_each(shape.groups * shape.blocks, [&](int64_t i) {
    const int64_t group = i / shape.blocks;
    kvray::unpack_weights(path, from + group * shape.words_of_group, shape.width, shape.depth, i % shape.blocks,
                          to + group * shape.width * shape.depth);
  });
}

// Memory of the calling thread, aligned to a page, kept between calls.
char* scratch(size_t bytes) {
  constexpr size_t kPage = 4096;
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes + kPage) memory.resize(bytes + kPage);
  return memory.data() + (kPage - reinterpret_cast<uintptr_t>(memory.data()) % kPage);
}

// x, words, bias, counts, path, is_gelu, y. y = x w' + bias, group g for the next counts[g] rows of x;
// y [num_rows, width]. Gated: two layers make one result.
void linear(Arguments& arguments) {
  const Tensor x = arguments.tensor(), words = arguments.tensor();
  const std::optional<Tensor> bias = arguments.tensor_or_none();
  const std::vector<int64_t> counts = arguments.integers();
  const kvray::LinearPath path = linear_path(arguments.text());
  const std::optional<bool> is_gelu = arguments.flag_or_none();
  const Tensor y = arguments.tensor();
  arguments.end();
  check(x.dtype() == Dtype::kBfloat16 && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
        "x: want bfloat16 [num_rows, in_features]");
  check(y.dtype() == Dtype::kBfloat16 && y.dim() == 2 && y.is_contiguous() && y.size(0) == x.size(0),
        "y: want contiguous bfloat16 [", x.size(0), ", out_features]");
  const int64_t num_rows = x.size(0), depth = x.size(1), width = y.size(1),
                groups = static_cast<int64_t>(counts.size());
  const int64_t layers = is_gelu ? 2 : 1, panels = num_panels(depth), blocks = layers * num_blocks(width);
  check_words(words, groups, blocks, panels);
  check(std::accumulate(counts.begin(), counts.end(), int64_t{0}) == num_rows &&
            std::all_of(counts.begin(), counts.end(), [](int64_t count) { return count >= 0; }),
        "counts: want ", num_rows, " in all");
  if (bias)
    check(bias->dtype() == Dtype::kBfloat16 && bias->is_contiguous() && bias->numel() == groups * layers * width,
          "bias: want contiguous bfloat16 [", groups, ", ", layers * width, "]");
  const WithoutGil released;
  kvray::Linear job{};
  job.path = path;
  job.x_row = x.stride(0);
  job.width = width;
  job.depth = depth;
  if (is_gelu) job.gate = activation(*is_gelu);

  struct Part {
    kvray::Linear job;
    kvray::LinearTasks tasks;
    int64_t first_unit, first_task;
  };
  std::vector<Part> parts;
  int64_t units = 0, tasks = 0, bytes = 0;
  // Which part an item of all parts together belongs to.
  const auto part_of = [&](int64_t item, int64_t Part::*first) -> const Part& {
    return *(std::upper_bound(parts.begin(), parts.end(), item,
                              [&](int64_t i, const Part& part) { return i < part.*first; }) -
             1);
  };
  const auto multiply = [&] {
    char* memory = scratch(bytes);
    for (Part& part : parts) {
      part.job.packed_rows = memory;
      memory += part.job.num_units * part.job.unit_bytes;
    }
    parallel_for(0, units, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const Part& part = part_of(i, &Part::first_unit);
        kvray::pack_row_unit(part.job, i - part.first_unit);
      }
    });
    for_each(tasks, [&](int64_t i) {
      const Part& part = part_of(i, &Part::first_task);
      kvray::linear_task(part.job, part.tasks, i - part.first_task);
    });
    parts.clear();
    units = tasks = bytes = 0;
  };
  constexpr int64_t kMaxBytes = 32 << 20;  // of packed rows at a time
  const int64_t pass = kvray::rows_per_pass(job.path, depth);
  int64_t row = 0;
  for (int64_t group = 0; group < groups; group++) {
    job.weights = pointer<const uint32_t>(words) + group * blocks * panels * kvray::kPanelWords;
    job.bias = bias ? pointer<const bf16>(*bias) + group * layers * width : nullptr;
    for (const int64_t end = row + counts[group]; row < end; row += job.num_rows) {
      job.x = pointer<const bf16>(x) + row * x.stride(0);
      job.y = pointer<bf16>(y) + row * width;
      job.num_rows = std::min(pass, end - row);
      job.lay_out();
      parts.push_back({job, kvray::cut_linear(job), units, tasks});
      units += job.num_units;
      tasks += parts.back().tasks.count;
      bytes += job.num_units * job.unit_bytes;
      if (bytes >= kMaxBytes) multiply();
    }
  }
  if (!parts.empty()) multiply();
}

// x, weight, bias, y
void linear_by_definition(Arguments& arguments) {
  const Tensor x = arguments.tensor(), weight = arguments.tensor();
  const std::optional<Tensor> bias = arguments.tensor_or_none();
  const Tensor y = arguments.tensor();
  arguments.end();
  check(x.dtype() == Dtype::kBfloat16 && x.dim() == 2 && x.is_contiguous() && weight.dtype() == Dtype::kBfloat16 &&
            weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == x.size(1) &&
            y.dtype() == Dtype::kBfloat16 && y.dim() == 2 && y.is_contiguous() && y.size(0) == x.size(0) &&
            y.size(1) == weight.size(0),
        "want contiguous bfloat16 x [num_rows, in_features], weight [out_features, in_features] and y");
  kvray::linear_by_definition(pointer<const bf16>(x), pointer<const bf16>(weight),
                              bias ? pointer<const bf16>(*bias) : nullptr, x.size(0), weight.size(0), x.size(1),
                              pointer<bf16>(y));
}

template <void (*F)(Arguments&)>
PyMethodDef method(const char* name) {
  // Python calls it by the flag's signature, whatever the field's type is
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&kvray::called<F>)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<&write_kv>("write_kv"),
    method<&decode_attention>("decode_attention"),
    method<&prefill_attention>("prefill_attention"),
    method<&rms_norm>("rms_norm"),
    method<&add_rms_norm>("add_rms_norm"),
    method<&gate>("gate"),
    method<&penalize>("penalize"),
    method<&rotate>("rotate"),
    method<&pack_weights>("pack_weights"),
    method<&unpack_weights>("unpack_weights"),
    method<&linear>("linear"),
    method<&linear_by_definition>("linear_by_definition"),
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition{PyModuleDef_HEAD_INIT, "kvray_kernels", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_kvray_kernels() {
  try {
    kvray::torch_tensors.find();
  } catch (const kvray::PythonError&) {
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  std::string paths;
  for (const std::string& name : linear_paths()) paths += (paths.empty() ? "" : " ") + name;
  const bool is_whole = !PyModule_AddIntConstant(module, "vector_floats", kvray::W) &&
                        !PyModule_AddIntConstant(module, "panel_words", kvray::kPanelWords) &&
                        !PyModule_AddIntConstant(module, "panel_depth", kvray::kPanelDepth) &&
                        !PyModule_AddIntConstant(module, "block_columns", kvray::kBlockColumns) &&
                        !PyModule_AddObjectRef(module, "has_bf16_dot", kvray::kHasBf16Dot ? Py_True : Py_False) &&
                        !PyModule_AddStringConstant(module, "linear_paths", paths.c_str());
  if (!is_whole) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
