// Python's door to the kernels: checks shapes and types, hands out the work to torch's threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "attention.h"
#include "elementwise.h"

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
                         const std::optional<Tensor>& sinks, int64_t chunk) {
  check_attention(query, k_view, v_view, sinks);
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
                                 static_cast<int>(num_heads)};
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

void gate(const Tensor& gate, const Tensor& up, bool is_gelu) {
  TORCH_CHECK(gate.is_contiguous() && up.is_contiguous() && gate.sizes() == up.sizes() &&
                  gate.scalar_type() == up.scalar_type(),
              "gate: want two contiguous tensors of one shape and type");
  const int64_t n = gate.size(-1), num_rows = gate.numel() / std::max<int64_t>(n, 1);
  const auto activation = is_gelu ? kvray::Activation::kGeluTanh : kvray::Activation::kSilu;
  by_dtype(gate, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = pointer<T>(gate);
    const T* from = pointer<const T>(up);
    at::parallel_for(0, num_rows, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        kvray::gate_row<T>(to + i * n, from + i * n, static_cast<int>(n), activation);
    });
  });
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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using pybind11::call_guard, pybind11::gil_scoped_release;
  m.def("write_kv", &write_kv, call_guard<gil_scoped_release>());
  m.def("decode_attention", &decode_attention, call_guard<gil_scoped_release>());
  m.def("prefill_attention", &prefill_attention, call_guard<gil_scoped_release>());
  m.def("rms_norm", &rms_norm, call_guard<gil_scoped_release>());
  m.def("add_rms_norm", &add_rms_norm, call_guard<gil_scoped_release>());
  m.def("gate", &gate, call_guard<gil_scoped_release>());
  m.def("rotate", &rotate, call_guard<gil_scoped_release>());
  m.attr("vector_floats") = kvray::W;
  m.attr("has_bf16_dot") = kvray::kHasBf16Dot;
}
