// AMX's tiles in plain C++, as Intel's manual defines tdpbf16ps: included before a source, it takes the place of the
// intrinsics, so that kernels on tiles are computed on CPUs that have none. Subnormals are the caller's business.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  int rows, bytes;
  uint32_t words[16][16];
};
inline thread_local Tile tiles[8];

inline void configure(const void* config) {
  const auto* from = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; i++) tiles[i] = {from[48 + i], from[16 + 2 * i] | from[17 + 2 * i] << 8, {}};
}
inline void zero(int t) { std::memset(tiles[t].words, 0, sizeof tiles[t].words); }
inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int r = 0; r < tiles[t].rows; r++)
    std::memcpy(tiles[t].words[r], static_cast<const char*>(from) + r * stride, tiles[t].bytes);
}
inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < tiles[t].rows; r++)
    std::memcpy(static_cast<char*>(to) + r * stride, tiles[t].words[r], tiles[t].bytes);
}
inline float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline void multiply(int sum, int a, int b) {
  for (int m = 0; m < tiles[sum].rows; m++)
    for (int n = 0; n < tiles[sum].bytes / 4; n++) {
      float even = 0, odd = 0;
      for (int k = 0; k < tiles[a].bytes / 4; k++) {
        const uint32_t x = tiles[a].words[m][k], y = tiles[b].words[k][n];
        even = std::fma(number(x << 16), number(y << 16), even);
        odd = std::fma(number(x & 0xffff0000u), number(y & 0xffff0000u), odd);
      }
      const float total = number(tiles[sum].words[m][n]) + (even + odd);
      std::memcpy(&tiles[sum].words[m][n], &total, 4);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() static_cast<void>(0)
#define _tile_zero(t) emulated::zero(t)
#define _tile_loadd(t, from, stride) emulated::load(t, from, stride)
#define _tile_stored(t, to, stride) emulated::store(t, to, stride)
#define _tile_dpbf16ps(sum, a, b) emulated::multiply(sum, a, b)
