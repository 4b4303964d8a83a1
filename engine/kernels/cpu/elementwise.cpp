#include "elementwise.h"

namespace kvray {
template <typename T>
void rms_norm_row(const T* x, const T* weight, int n, const NormStyle& style, T* out) {
  vf squares[4] = {};  // four sums, so that one addition need not wait for the one before
  for (int i = 0, lane = 0; i < n; i += W, lane = (lane + 1) % 4) {
    vf part = load_upto(x + i, n - i);
    squares[lane] = fma(part, part, squares[lane]);
  }
  const float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
  const float scale = 1.f / std::sqrt(mean + style.eps);
  for (int i = 0; i < n; i += W) {
    vf y = load_upto(x + i, n - i) * scale;
    vf w = load_upto(weight + i, n - i);
    if (style.adds_one) w = w + 1.f;
    if (style.rounds_first) y = rounded<T>(y);
    store_upto(out + i, y * w, n - i);
  }
}

template <typename T>
void add_row(const T* from, int n, T* to) {
  for (int i = 0; i < n; i += W) store_upto(to + i, load_upto(from + i, n - i) + load_upto(to + i, n - i), n - i);
}

template <typename T>
void gate_row(T* gate, const T* up, int n, Activation activation) {
  for (int i = 0; i < n; i += W) {
    store_upto(gate + i, gated<T>(load_upto(gate + i, n - i), load_upto(up + i, n - i), activation), n - i);
  }
}

// One step after the other, each rounded: a compiler makes vectors of it, as no branch guards an operation.
void penalize_row(const float* logits, const int32_t* counts, int64_t n, const Penalties& penalties, float* out) {
  const auto [repetition, frequency, presence] = penalties;
  for (int64_t i = 0; i < n; i++) {
    const float x = logits[i], divided = x / repetition, multiplied = x * repetition;
    const int32_t count = counts[i], in_output = count > 0 ? count : 0;
    const float repeated = x > 0.f ? divided : multiplied;
    const float y = (count >= 0 ? repeated : x) - frequency * static_cast<float>(in_output);
    out[i] = y - (count > 0 ? presence : 0.f);
  }
}

template <typename T>
void rotate_row(T* row, int64_t head_stride, int num_heads, const T* cosine, const T* sine, int rotary) {
  const int half = rotary / 2;
  for (int i = 0; i < half; i += W) {
    const int n = half - i;
    const vf cos_low = load_upto(cosine + i, n), cos_high = load_upto(cosine + half + i, n);
    const vf sin_low = load_upto(sine + i, n), sin_high = load_upto(sine + half + i, n);
    for (int h = 0; h < num_heads; h++) {
      T* low = row + h * head_stride + i;
      T* high = low + half;
      const vf x = load_upto(low, n), y = load_upto(high, n);
      store_upto(low, rounded<T>(x * cos_low) + rounded<T>(-y * sin_low), n);
      store_upto(high, rounded<T>(y * cos_high) + rounded<T>(x * sin_high), n);
    }
  }
}

template void rms_norm_row<float>(const float*, const float*, int, const NormStyle&, float*);
template void rms_norm_row<bf16>(const bf16*, const bf16*, int, const NormStyle&, bf16*);
template void add_row<float>(const float*, int, float*);
template void add_row<bf16>(const bf16*, int, bf16*);
template void gate_row<float>(float*, const float*, int, Activation);
template void gate_row<bf16>(bf16*, const bf16*, int, Activation);
template void rotate_row<float>(float*, int64_t, int, const float*, const float*, int);
template void rotate_row<bf16>(bf16*, int64_t, int, const bf16*, const bf16*, int);

}  // namespace kvray
