// What kernels on AMX's tiles share. They are compiled wherever the compiler knows tiles, and run where may_use_tiles().
#pragma once

#include <cstdint>

#include "vec.h"

#if defined(__x86_64__) && defined(__linux__) && defined(__has_include)
#if __has_include(<amxbf16intrin.h>)
#define KVRAY_TILES 1
#define KVRAY_TARGET_TILES __attribute__((target("amx-tile,amx-bf16")))
#endif
#endif

namespace kvray {

// Whether the CPU has tiles and the system lets this process use them; asks the system the first time.
bool may_use_tiles();

#if defined(KVRAY_TILES)
constexpr int kTileSide = 16;  // rows of a tile; columns, in words

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3 are sums and 4-5 their rows, of so many rows; 6-7 what they are multiplied by.
KVRAY_TARGET_TILES inline void configure_tiles(int rows) {
  TileConfig config;
  for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = static_cast<uint8_t>(i < 6 ? rows : kTileSide);
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 believes that eight bytes of it are read
  _tile_loadconfig(&config);
}

KVRAY_TARGET_TILES inline void release_tiles() { _tile_release(); }
#endif

}  // namespace kvray
