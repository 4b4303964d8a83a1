// What the attention kernels are handed: views of tensors as pointers and strides, in elements, 64 bits wide.
#pragma once

#include <cstdint>

#include "vec.h"

namespace kvray {

// A layer's part of the paged pool. Key j of a sequence lies in block table[j / block_size], row j % block_size.
template <typename T>
struct PagedKv {
  const T* k;
  const T* v;
  int64_t k_block, k_row, k_head;
  int64_t v_block, v_row, v_head;
  int block_size, num_kv_heads, k_dim, v_dim;

  // Pointers to the rows of keys [begin, begin + n) of a head; a block is looked up once for all its rows.
  void key_rows(const int32_t* table, int begin, int n, int head, const T** rows) const {
    walk(k + head * k_head, k_block, k_row, table, begin, n, rows);
  }
  void value_rows(const int32_t* table, int begin, int n, int head, const T** rows) const {
    walk(v + head * v_head, v_block, v_row, table, begin, n, rows);
  }

 private:
  void walk(const T* base, int64_t block, int64_t row, const int32_t* table, int begin, int n, const T** rows) const {
    int index = begin / block_size, offset = begin % block_size;
    for (int j = 0; j < n; index++, offset = 0) {
      const T* at = base + table[index] * block + offset * row;
      for (; offset < block_size && j < n; offset++, j++, at += row) rows[j] = at;
    }
  }
};

// Which keys a position sees, and how scores are treated. 0 means "none" for window, chunk and softcap.
struct Scores {
  float scaling;
  float softcap;
  int window;
  int chunk;
  const float* sinks;  // [num_heads] or null: a score that takes weight and gives nothing

  int first_key(int position) const {
    int first = window > 0 && position >= window ? position - window + 1 : 0;
    if (chunk > 0) {
      int start = position / chunk * chunk;
      first = start > first ? start : first;
    }
    return first;
  }
};

// ----------------------------------------------------------------------------------------------------------- decoding

constexpr int kMaxDim = 1024;  // largest head size: bounds the stack that a row takes
constexpr int kSplit = 512;  // keys per split: fixed, so that a row's sum depends on its own length only

template <typename T>
struct DecodeAttention {
  PagedKv<T> kv;
  Scores scores;
  const T* q;  // [num_rows, num_heads, k_dim]
  int64_t q_row, q_head;
  T* out;  // [num_rows, num_heads, v_dim]
  int64_t out_row, out_head;
  const int32_t* tables;  // [num_slots, table_row]
  int64_t table_row;
  const int64_t* slots;  // [num_rows] the table that each row reads
  const int32_t* lens;  // [num_rows] keys each row sees, its own included
  int num_heads;

  int group() const { return num_heads / kv.num_kv_heads; }
  int num_splits(int row) const {
    int first = scores.first_key(lens[row] - 1);
    return (lens[row] - first + kSplit - 1) / kSplit;
  }
};

// One split of one row and KV head: unnormalised sums [group, v_dim], base-2 maxima [group], weights [group].
template <typename T>
void decode_split(const DecodeAttention<T>& a, int row, int kv_head, int split, float* sums, float* maxima,
                  float* weights);

// Puts the splits of a row and KV head together, in their order, and writes the output.
template <typename T>
void decode_merge(const DecodeAttention<T>& a, int row, int kv_head, int num_splits, float* sums, const float* maxima,
                  const float* weights);

// ------------------------------------------------------------------------------------------------------------ prefill

struct Chunk {
  int q_start;  // first of its rows in q and out
  int q_len;
  int kv_len;  // keys of its last row; row i sees keys up to kv_len - q_len + i
  const int32_t* table;
};

template <typename T>
struct PrefillAttention {
  PagedKv<T> kv;
  Scores scores;
  const T* q;  // [num_tokens, num_heads, k_dim]
  int64_t q_row, q_head;
  T* out;  // [num_tokens, num_heads, v_dim]
  int64_t out_row, out_head;
  int num_heads;
  bool is_on_tiles;  // bfloat16 products by AMX, where may_use_tiles(): other bits than without

  int group() const { return num_heads / kv.num_kv_heads; }
};

// Tokens of one query tile for a group of this many heads.
int query_tile(int group);

// Queries [first, first + count) of a chunk, all heads of one KV head.
template <typename T>
void prefill_tile(const PrefillAttention<T>& a, const Chunk& chunk, int kv_head, int first, int count);

}  // namespace kvray
