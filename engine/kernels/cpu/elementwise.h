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

// x as it reads back after being stored as T.
template <typename T>
inline vf rounded(vf x) {
  if constexpr (sizeof(T) == 2) return widen(narrow(x));
  return x;
}

// x / (1 + e^-y)
inline vf swish(vf x, vf y) {
  vf exponent = y * -kLog2E;
  vf bounded = exponent > 127.f ? splat(127.f) : exponent;
  return x / (1.f + exp2v<7>(bounded));
}

// round(activation(x)) * up. GELU's tanh form, x / 2 * (1 + tanh(y)), is x / (1 + e^-2y), which keeps its digits where
// tanh is near -1.
template <typename T>
inline vf gated(vf x, vf up, Activation activation) {
  const bool is_silu = activation == Activation::kSilu;
  return rounded<T>(swish(x, is_silu ? x : 1.5957691216057308f * (x + 0.044715f * (x * x * x)))) * up;
}

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
