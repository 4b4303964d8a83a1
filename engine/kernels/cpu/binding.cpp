// Python's door to the kernels: checks shapes and types, hands out the work to torch's threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "linear.h"
#include "tiles.h"

namespace {

using at::Tensor;
using kvray::bf16;

// work(i) for i in [0, count), each on whichever thread is free: items may differ much in cost.
template <typename F>
void for_each(int64_t count, const F& work) {
  const int64_t num_threads = std::min<int64_t>(count, at::get_num_threads());
  if (num_threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < count; i++) work(i);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < count; i = next++) work(i);
  });
}

// Calls f with a null pointer of the element type.
template <typename F>
void by_dtype(const Tensor& tensor, const F& f) {
  if (tensor.scalar_type() == at::kFloat)
    f(static_cast<float*>(nullptr));
  else if (tensor.scalar_type() == at::kBFloat16)
    f(static_cast<bf16*>(nullptr));
  else
    TORCH_CHECK(false, "dtype is ", tensor.scalar_type(), ", want float32 or bfloat16");
}

template <typename T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

void check_rows(const Tensor& tensor, const Tensor& like, int64_t dims, const char* name) {
  TORCH_CHECK(tensor.dim() == dims, name, " has ", tensor.dim(), " dimensions, want ", dims);
  TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " is ", tensor.scalar_type(), ", want ",
              like.scalar_type());
  TORCH_CHECK(tensor.stride(-1) == 1 || tensor.size(-1) == 1, name, ": last dimension is not contiguous");
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
                     const std::optional<Tensor>& sinks) {
  check_rows(query, query, 3, "query");
  check_rows(k_view, query, 4, "k_view");
  check_rows(v_view, query, 4, "v_view");
  TORCH_CHECK(query.size(2) == k_view.size(3), "query has head size ", query.size(2), ", keys ", k_view.size(3));
  TORCH_CHECK(k_view.size(1) == v_view.size(1) && k_view.size(2) == v_view.size(2), "k_view and v_view differ");
  TORCH_CHECK(query.size(1) % k_view.size(1) == 0, query.size(1), " heads over ", k_view.size(1), " KV heads");
  TORCH_CHECK(k_view.size(3) <= kvray::kMaxDim, "head size ", k_view.size(3), ", want at most ", kvray::kMaxDim);
  if (sinks)
    TORCH_CHECK(sinks->scalar_type() == at::kFloat && sinks->is_contiguous() && sinks->numel() == query.size(1),
                "sinks: want contiguous float32 [num_heads]");
}

kvray::Scores scores(double scaling, int64_t window, double softcap, const std::optional<Tensor>& sinks,
                     int64_t chunk) {
  return {static_cast<float>(scaling), static_cast<float>(softcap), static_cast<int>(window), static_cast<int>(chunk),
          sinks ? sinks->const_data_ptr<float>() : nullptr};
}

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

void write_kv(const Tensor& key, const Tensor& value, const Tensor& k_view, const Tensor& v_view,
              const Tensor& block_ids, const Tensor& offsets) {
  check_rows(key, k_view, 3, "key");
  check_rows(value, v_view, 3, "value");
  TORCH_CHECK(block_ids.scalar_type() == at::kLong && offsets.scalar_type() == at::kLong &&
                  block_ids.is_contiguous() && offsets.is_contiguous() && block_ids.numel() == key.size(0) &&
                  offsets.numel() == key.size(0),
              "block_ids and offsets: want contiguous int64 [", key.size(0), "]");
  const auto *blocks = block_ids.const_data_ptr<int64_t>(), *rows = offsets.const_data_ptr<int64_t>();
  by_dtype(key, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    at::parallel_for(0, key.size(0), 64, [&](int64_t begin, int64_t end) {
      scatter<T>(key, k_view, blocks, rows, begin, end);
      scatter<T>(value, v_view, blocks, rows, begin, end);
    });
  });
}

Tensor decode_attention(const Tensor& query, const Tensor& k_view, const Tensor& v_view, const Tensor& block_tables,
                        const Tensor& slots, const Tensor& kv_lens, double scaling, int64_t window, double softcap,
                        const std::optional<Tensor>& sinks, int64_t chunk) {
  check_attention(query, k_view, v_view, sinks);
  const int64_t num_rows = query.size(0), num_heads = query.size(1);
  TORCH_CHECK(block_tables.scalar_type() == at::kInt && block_tables.dim() == 2 && block_tables.stride(1) == 1,
              "block_tables: want int32 [num_slots, max_blocks]");
  TORCH_CHECK(slots.scalar_type() == at::kLong && slots.is_contiguous() && slots.numel() == num_rows,
              "slots: want contiguous int64 [", num_rows, "]");
  for (int64_t row = 0; row < num_rows; row++) {
    const int64_t slot = slots.const_data_ptr<int64_t>()[row];
    TORCH_CHECK(slot >= 0 && slot < block_tables.size(0), "slot ", slot, ", want one of ", block_tables.size(0));
  }
  TORCH_CHECK(kv_lens.scalar_type() == at::kInt && kv_lens.is_contiguous() && kv_lens.numel() == num_rows,
              "kv_lens: want contiguous int32 [", num_rows, "]");
  Tensor out = at::empty({num_rows, num_heads, v_view.size(3)}, query.options());
  by_dtype(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    kvray::DecodeAttention<T> a{paged_kv<T>(k_view, v_view),
                                scores(scaling, window, softcap, sinks, chunk),
                                pointer<const T>(query),
                                query.stride(0),
                                query.stride(1),
                                pointer<T>(out),
                                out.stride(0),
                                out.stride(1),
                                block_tables.const_data_ptr<int32_t>(),
                                block_tables.stride(0),
                                slots.const_data_ptr<int64_t>(),
                                kv_lens.const_data_ptr<int32_t>(),
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
    at::parallel_for(0, num_rows * num_kv_heads, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t first = starts[i];
        kvray::decode_merge<T>(a, static_cast<int>(i / num_kv_heads), static_cast<int>(i % num_kv_heads),
                               static_cast<int>(starts[i + 1] - first), &sums[first * group * a.kv.v_dim],
                               &maxima[first * group], &weights[first * group]);
      }
    });
  });
  return out;
}

Tensor prefill_attention(const Tensor& query, const Tensor& k_view, const Tensor& v_view, const Tensor& block_table,
                         int64_t kv_len, double scaling, int64_t window, double softcap,
                         const std::optional<Tensor>& sinks, int64_t chunk, bool is_on_tiles) {
  check_attention(query, k_view, v_view, sinks);
  TORCH_CHECK(!is_on_tiles || kvray::may_use_tiles(), "prefill attention on tiles, which this process may not use");
  const int64_t num_tokens = query.size(0), num_heads = query.size(1);
  TORCH_CHECK(block_table.scalar_type() == at::kInt && block_table.is_contiguous() &&
                  block_table.numel() * k_view.size(2) >= kv_len,
              "block_table: want contiguous int32 covering ", kv_len, " tokens");
  TORCH_CHECK(num_tokens <= kv_len, num_tokens, " rows, but only ", kv_len, " tokens");
  Tensor out = at::empty({num_tokens, num_heads, v_view.size(3)}, query.options());
  by_dtype(query, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    kvray::PrefillAttention<T> a{paged_kv<T>(k_view, v_view), scores(scaling, window, softcap, sinks, chunk),
                                 pointer<const T>(query),     query.stride(0),
                                 query.stride(1),             pointer<T>(out),
                                 out.stride(0),               out.stride(1),
                                 static_cast<int>(num_heads), is_on_tiles};
    const kvray::Chunk part{0, static_cast<int>(num_tokens), static_cast<int>(kv_len),
                            block_table.const_data_ptr<int32_t>()};
    const int tile = kvray::query_tile(a.group()), num_kv_heads = a.kv.num_kv_heads;
    const int num_tiles = (part.q_len + tile - 1) / tile;
    for_each(static_cast<int64_t>(num_tiles) * num_kv_heads, [&](int64_t i) {
      const int first = (num_tiles - 1 - static_cast<int>(i / num_kv_heads)) * tile;  // the longest rows first
      kvray::prefill_tile<T>(a, part, static_cast<int>(i % num_kv_heads), first, std::min(tile, part.q_len - first));
    });
  });
  return out;
}

// Rows that are worth a thread's while.
int64_t grain(int64_t row_size) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(row_size, 1)); }

// With a residual, x becomes x + residual first.
Tensor norm_rows(const Tensor* residual, const Tensor& x, const Tensor& weight, const kvray::NormStyle& style) {
  const int64_t n = x.size(-1), num_rows = x.numel() / std::max<int64_t>(n, 1);
  TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && weight.numel() == n &&
                  weight.scalar_type() == x.scalar_type(),
              "rms_norm: want contiguous rows and a weight [", n, "] of the same type");
  if (residual)
    TORCH_CHECK(residual->is_contiguous() && residual->sizes() == x.sizes() &&
                    residual->scalar_type() == x.scalar_type(),
                "add_rms_norm: want two contiguous tensors of one shape and type");
  Tensor out = at::empty(x.sizes(), x.options());
  by_dtype(x, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *rows = pointer<T>(x), *to = pointer<T>(out);
    const T *factor = pointer<const T>(weight), *from = residual ? pointer<const T>(*residual) : nullptr;
    at::parallel_for(0, num_rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        if (from) kvray::add_row<T>(from + i * n, static_cast<int>(n), rows + i * n);
        kvray::rms_norm_row<T>(rows + i * n, factor, static_cast<int>(n), style, to + i * n);
      }
    });
  });
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, bool adds_one, bool rounds_first) {
  return norm_rows(nullptr, x, weight, {static_cast<float>(eps), adds_one, rounds_first});
}

Tensor add_rms_norm(const Tensor& residual, const Tensor& delta, const Tensor& weight, double eps, bool adds_one,
                    bool rounds_first) {
  return norm_rows(&residual, delta, weight, {static_cast<float>(eps), adds_one, rounds_first});
}

kvray::Activation activation(bool is_gelu) {
  return is_gelu ? kvray::Activation::kGeluTanh : kvray::Activation::kSilu;
}

void gate(const Tensor& gate, const Tensor& up, bool is_gelu) {
  TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.sizes() == up.sizes() &&
                  gate.scalar_type() == up.scalar_type(),
              "gate: want two contiguous tensors of one shape and type");
  const int64_t n = gate.size(-1), num_rows = gate.numel() / std::max<int64_t>(n, 1);
  by_dtype(gate, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = pointer<T>(gate);
    const T* from = pointer<const T>(up);
    at::parallel_for(0, num_rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kvray::gate_row<T>(to + i * n, from + i * n, static_cast<int>(n), activation(is_gelu));
    });
  });
}

void penalize(const Tensor& logits, const Tensor& counts, double repetition, double frequency, double presence,
              const Tensor& out) {
  TORCH_CHECK(logits.is_contiguous() && counts.is_contiguous() && out.is_contiguous() &&
                  logits.scalar_type() == at::kFloat && out.scalar_type() == at::kFloat &&
                  counts.scalar_type() == at::kInt && logits.numel() == counts.numel() &&
                  out.numel() == counts.numel(),
              "penalize: want contiguous float32 rows and int32 counts of one size");
  const kvray::Penalties penalties{static_cast<float>(repetition), static_cast<float>(frequency),
                                   static_cast<float>(presence)};
  kvray::penalize_row(pointer<const float>(logits), pointer<const int32_t>(counts), counts.numel(), penalties,
                      pointer<float>(out));
}

void rotate(const Tensor& rows, const Tensor& cosine, const Tensor& sine) {
  check_rows(rows, rows, 3, "rows");
  const int64_t num_tokens = rows.size(0), rotary = cosine.size(-1);
  TORCH_CHECK(cosine.is_contiguous() && sine.is_contiguous() && cosine.sizes() == sine.sizes() &&
                  cosine.numel() == num_tokens * rotary && cosine.scalar_type() == rows.scalar_type() &&
                  sine.scalar_type() == rows.scalar_type() && rotary % 2 == 0 && rotary <= rows.size(2),
              "rotate: want contiguous cosine and sine [", num_tokens, ", even, at most ", rows.size(2),
              "] of the rows' type");
  by_dtype(rows, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = pointer<T>(rows);
    const T *c = pointer<const T>(cosine), *s = pointer<const T>(sine);
    at::parallel_for(0, num_tokens, grain(rows.size(1) * rotary), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        kvray::rotate_row<T>(to + t * rows.stride(0), rows.stride(1), static_cast<int>(rows.size(1)), c + t * rotary,
                             s + t * rotary, static_cast<int>(rotary));
    });
  });
}

kvray::LinearPath linear_path(const std::string& name) {
  if (name == "tiles" && kvray::may_use_tiles()) return kvray::LinearPath::kTiles;
  if (name == "dot" && kvray::kHasBf16Dot) return kvray::LinearPath::kDot;
  TORCH_CHECK(name == "fma", "linear path is ", name, ", want one of linear_paths()");
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

// weights [num_groups, width, depth] to words [num_groups, blocks, panels, kPanelWords].
Tensor pack_weights(const Tensor& weights, const std::string& path_name) {
  const kvray::LinearPath path = linear_path(path_name);
  TORCH_CHECK(weights.scalar_type() == at::kBFloat16 && weights.dim() == 3 && weights.is_contiguous(),
              "weights: want contiguous bfloat16 [num_groups, out_features, in_features]");
  const int64_t groups = weights.size(0), width = weights.size(1), depth = weights.size(2);
  const int64_t blocks = ceil_div(width, kvray::kBlockColumns), panels = ceil_div(depth, kvray::kPanelDepth);
  Tensor words = at::empty({groups, blocks, panels, kvray::kPanelWords}, weights.options().dtype(at::kInt));
  const auto* from = pointer<const bf16>(weights);
  auto* to = static_cast<uint32_t*>(words.data_ptr());
  for_each(groups * blocks, [&](int64_t i) {
    const int64_t group = i / blocks;
    kvray::pack_weights(path, from + group * width * depth, width, depth, i % blocks,
                        to + group * blocks * panels * kvray::kPanelWords);
  });
  return words;
}

Tensor unpack_weights(const Tensor& words, int64_t width, int64_t depth, const std::string& path_name) {
  const kvray::LinearPath path = linear_path(path_name);
  const int64_t groups = words.size(0), blocks = words.size(1), panels = words.size(2);
  Tensor weights = at::empty({groups, width, depth}, words.options().dtype(at::kBFloat16));
  const auto* from = static_cast<const uint32_t*>(words.const_data_ptr());
  auto* to = pointer<bf16>(weights);
  for_each(groups * blocks, [&](int64_t i) {
    const int64_t group = i / blocks;
    kvray::unpack_weights(path, from + group * blocks * panels * kvray::kPanelWords, width, depth, i % blocks,
                          to + group * width * depth);
  });
  return weights;
}

// Memory of the calling thread, aligned to a page, kept between calls.
char* scratch(size_t bytes) {
  constexpr size_t kPage = 4096;
  static thread_local std::vector<char> memory;
  if (memory.size() < bytes + kPage) memory.resize(bytes + kPage);
  return memory.data() + (kPage - reinterpret_cast<uintptr_t>(memory.data()) % kPage);
}

// y = x w' + bias, group g for the next counts[g] rows of x; y [num_rows, width]. Gated: two layers make one result.
Tensor linear(const Tensor& x, const Tensor& words, const std::optional<Tensor>& bias, int64_t width,
              const std::vector<int64_t>& counts, const std::string& path_name, std::optional<bool> is_gelu) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
              "x: want bfloat16 [num_rows, in_features]");
  const int64_t num_rows = x.size(0), depth = x.size(1), groups = static_cast<int64_t>(counts.size());
  const int64_t layers = is_gelu ? 2 : 1, panels = ceil_div(depth, kvray::kPanelDepth),
                blocks = layers * ceil_div(width, kvray::kBlockColumns);
  TORCH_CHECK(words.scalar_type() == at::kInt && words.is_contiguous() && words.dim() == 4 &&
                  words.size(0) == groups && words.size(1) == blocks && words.size(2) == panels &&
                  words.size(3) == kvray::kPanelWords,
              "weights packed as ", words.sizes(), ", want [", groups, ", ", blocks, ", ", panels, ", ",
              kvray::kPanelWords, "]");
  TORCH_CHECK(std::accumulate(counts.begin(), counts.end(), int64_t{0}) == num_rows &&
                  std::all_of(counts.begin(), counts.end(), [](int64_t count) { return count >= 0; }),
              "counts: want ", num_rows, " in all");
  if (bias)
    TORCH_CHECK(bias->scalar_type() == at::kBFloat16 && bias->is_contiguous() &&
                    bias->numel() == groups * layers * width,
                "bias: want contiguous bfloat16 [", groups, ", ", layers * width, "]");
  Tensor y = at::empty({num_rows, width}, x.options());
  kvray::Linear job{};
  job.path = linear_path(path_name);
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
    at::parallel_for(0, units, 4, [&](int64_t begin, int64_t end) {
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
    job.weights = static_cast<const uint32_t*>(words.const_data_ptr()) + group * blocks * panels * kvray::kPanelWords;
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
  return y;
}

Tensor linear_by_definition(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && x.dim() == 2 && x.is_contiguous() &&
                  weight.scalar_type() == at::kBFloat16 && weight.dim() == 2 && weight.is_contiguous() &&
                  weight.size(1) == x.size(1),
              "want contiguous bfloat16 x [num_rows, in_features] and weight [out_features, in_features]");
  Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  kvray::linear_by_definition(pointer<const bf16>(x), pointer<const bf16>(weight),
                              bias ? pointer<const bf16>(*bias) : nullptr, x.size(0), weight.size(0), x.size(1),
                              pointer<bf16>(y));
  return y;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::arg, pybind11::call_guard, pybind11::gil_scoped_release;
  m.def("write_kv", &write_kv, call_guard<gil_scoped_release>());
  m.def("decode_attention", &decode_attention, call_guard<gil_scoped_release>());
  m.def("prefill_attention", &prefill_attention, call_guard<gil_scoped_release>());
  m.def("rms_norm", &rms_norm, call_guard<gil_scoped_release>());
  m.def("add_rms_norm", &add_rms_norm, call_guard<gil_scoped_release>());
  m.def("gate", &gate, call_guard<gil_scoped_release>());
  m.def("penalize", &penalize, call_guard<gil_scoped_release>());
  m.def("rotate", &rotate, call_guard<gil_scoped_release>());
  m.def("linear_paths", &linear_paths);
  m.def("pack_weights", &pack_weights, call_guard<gil_scoped_release>());
  m.def("unpack_weights", &unpack_weights, call_guard<gil_scoped_release>());
  m.def("linear", &linear, arg("x"), arg("words"), arg("bias"), arg("width"), arg("counts"), arg("path"),
        arg("is_gelu") = std::nullopt, call_guard<gil_scoped_release>());
  m.def("linear_by_definition", &linear_by_definition, call_guard<gil_scoped_release>());
  m.attr("vector_floats") = kvray::W;
  m.attr("has_bf16_dot") = kvray::kHasBf16Dot;
}
