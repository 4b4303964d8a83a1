// Operators over rows that read and write memory once where a model's own modules do it in several passes.
// Every row is computed by itself. Roundings are those of the modules they stand for, step by step.
#pragma once

#include <cstdint>

#include "vec.h"

namespace kvray {

struct NormStyle {
  float eps;
  bool adds_one;     // the factor is 1 + weight (Gemma)
  bool rounds_first;  // to the row's type before the weight (Llama); otherwise the product is float (Gemma, OLMo 2)
};

// out = x / sqrt(mean(x^2) + eps) * weight, one row of n.
template <typename T>
void rms_norm_row(const T* x, const T* weight, int n, const NormStyle& style, T* out);

// to += from, one row of n.
template <typename T>
void add_row(const T* from, int n, T* to);

enum class Activation { kSilu, kGeluTanh };

// gate = round(activation(gate)) * up, one row of n.
template <typename T>
void gate_row(T* gate, const T* up, int n, Activation activation);

struct Penalties {
  float repetition, frequency, presence;
};

// out = logits with the penalties of tokens that came: counts are -1 of those that did not, else how often in the output.
void penalize_row(const float* logits, const int32_t* counts, int64_t n, const Penalties& penalties, float* out);

// Rotates the first `rotary` of each head's elements in place, element i with i + rotary / 2.
template <typename T>
void rotate_row(T* row, int64_t head_stride, int num_heads, const T* cosine, const T* sine, int rotary);

}  // namespace kvray
