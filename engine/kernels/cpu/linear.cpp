#include "linear.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>

#include "tiles.h"

#if defined(KVRAY_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kvray {
namespace {

// Rows x vectors of one strip: two sums each, for even and for odd places, fit the registers.
#if defined(KVRAY_AVX512)
constexpr int kRows = 6, kVectors = 2;
#elif defined(__aarch64__)
constexpr int kRows = 3, kVectors = 4;
#else
constexpr int kRows = 3, kVectors = 2;
#endif
constexpr int kFewRows = 3;  // up to here a strip is twice as wide: reading the weights is what takes the time

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileFew = 16;  // up to so many rows are one tile, against two column blocks
constexpr int64_t kTileWords = 256;

constexpr int kAhead = 3;  // panels
constexpr int64_t kChunk = 64;  // panels per pass over a task's rows: 128 KiB of weights, for the L2 cache
constexpr int64_t kTaskRows = 256;

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

// Subnormal operands and results are zeros while one of these lives.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1u << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushSubnormals() {}
#endif
};

// The sums of a task, of this thread, kept between calls.
float* task_sums() {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  constexpr size_t kBytes = sizeof(float) * 2 * kTaskRows * kBlockColumns;
  static thread_local std::unique_ptr<float, Free> sums(static_cast<float*>(std::aligned_alloc(4096, kBytes)));
  if (!sums) throw std::bad_alloc();
  return sums.get();
}

// The places within a panel of a word's two halves, for paths other than tiles: words [8][even, odd places].
constexpr int upper_place(int word) { return 4 * (word / 2) + word % 2; }
constexpr int lower_place(int word) { return upper_place(word) + 2; }

uint32_t word_of(bf16 upper, bf16 lower) { return static_cast<uint32_t>(upper.bits) << 16 | lower.bits; }

// Calls f(column within the block, place of the lower half within the panel, of the upper, index in the panel's words).
template <typename F>
inline void for_words(LinearPath path, const F& f) {
  for (int word = 0; word < 16; word++)
    for (int column = 0; column < kBlockColumns; column++)
      if (path == LinearPath::kTiles)
        f(column, 2 * word, 2 * word + 1, (column / 16) * kTileWords + word * 16 + column % 16);
      else
        f(column, lower_place(word), upper_place(word), word * kBlockColumns + column);
}

// ------------------------------------------------------------------------------------------------------------- strips

#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
struct Dot {
  using RowWord = uint32_t;
  using Weights = vf;
  static Weights load(const uint32_t* words) { return kvray::load(reinterpret_cast<const float*>(words)); }
  static vf add(vf sum, const Weights& weights, const RowWord* row) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(static_cast<int>(*row)));
  }
  static void pack(const bf16* panel, RowWord* to) {
    alignas(64) static constexpr auto kPlaces = [] {
      std::array<uint16_t, 32> places{};
      for (int word = 0; word < 16; word++)
        places[2 * word] = lower_place(word), places[2 * word + 1] = upper_place(word);
      return places;
    }();
    const __m512i places = _mm512_load_si512(kPlaces.data());
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, _mm512_loadu_si512(panel)));
  }
};
#endif

struct Fma {
  struct RowWord {
    float upper, lower;
  };
  struct Weights {
    vf upper, lower;
  };
  static Weights load(const uint32_t* words) {
    vu both;
    std::memcpy(&both, words, sizeof both);
    return {(vf)(both & 0xffff0000u), (vf)(both << 16)};
  }
  static vf add(vf sum, const Weights& weights, const RowWord* row) {
    return fma(weights.lower, splat(row->lower), fma(weights.upper, splat(row->upper), sum));
  }
  static void pack(const bf16* panel, RowWord* to) {
    for (int word = 0; word < 16; word++)
      to[word] = {to_float(panel[upper_place(word)]), to_float(panel[lower_place(word)])};
  }
};

// `steps` panels of R rows by V vectors of columns, added to `from` (null: zeros). Rows are [R][panels][16] words, sums
// [column blocks][rows][32 columns]; b and the sums begin at the strip's first column. The first strip to read weights
// fetches them ahead: a third and more of the time with few rows (EPYC, 2026-11).
template <typename Step, int R, int V, bool Fetches>
void strip(const typename Step::RowWord* a, int64_t a_row, const uint32_t* b, int64_t b_block, int64_t steps,
           const float* from, float* to, int64_t sums_block) {
  constexpr auto block = [](int v) { return v * W / static_cast<int>(kBlockColumns); };
  constexpr auto column = [](int v) { return v * W % static_cast<int>(kBlockColumns); };
  vf total[R][V] = {};
  if (from)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) total[r][v] = load(from + block(v) * sums_block + r * kBlockColumns + column(v));
  for (int64_t k = 0; k < steps; k++, a += 16, b += kPanelWords) {
    vf sums[2][R][V] = {};
    for (int pair = 0; pair < 8; pair++)
      for (int parity = 0; parity < 2; parity++) {
        const int word = 2 * pair + parity;
        typename Step::Weights weights[V];
        for (int v = 0; v < V; v++) {
          const uint32_t* at = b + block(v) * b_block + word * kBlockColumns + column(v);
          if (Fetches) __builtin_prefetch(at + kAhead * kPanelWords);
          weights[v] = Step::load(at);
        }
        for (int r = 0; r < R; r++)
          for (int v = 0; v < V; v++)
            sums[parity][r][v] = Step::add(sums[parity][r][v], weights[v], a + r * a_row + word);
      }
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) total[r][v] += sums[0][r][v] + sums[1][r][v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(to + block(v) * sums_block + r * kBlockColumns + column(v), total[r][v]);
}

// Words from one packed row to the next: a power of two of them would crowd all rows into a few sets of the cache.
int64_t row_words(int64_t panels) { return (panels + 1) * 16; }

int64_t word_bytes(LinearPath path) {
  return path == LinearPath::kFma ? sizeof(Fma::RowWord) : sizeof(uint32_t);
}

// Rows and columns that a strip or a square of tiles multiplies, and where its sums are.
struct Piece {
  const Linear& linear;
  int64_t unit, block, num_blocks;  // row unit; one or two column blocks
  int64_t k, steps;  // panels
  const float* from;  // null: zeros
  float* to;
  int64_t sums_block;

  bool is_first;  // of those that read these weights

  int64_t num_rows() const {
    return std::min(linear.unit_rows, linear.num_rows - unit * linear.unit_rows);
  }
  int64_t b_block() const { return linear.beside(); }
  const uint32_t* weights() const { return linear.weights + (block * linear.panels + k) * kPanelWords; }
};

template <typename Step, int R, int V, bool Fetches>
void strips(const Piece& piece) {
  const int64_t a_row = row_words(piece.linear.panels), columns = piece.num_blocks * kBlockColumns;
  const auto* a = reinterpret_cast<const typename Step::RowWord*>(piece.linear.packed_rows +
                                                                   piece.unit * piece.linear.unit_bytes) +
                  piece.k * 16;
  for (int64_t c = 0; c < columns; c += V * W) {
    const int64_t block = c / kBlockColumns, column = c % kBlockColumns, at = block * piece.sums_block + column;
    strip<Step, R, V, Fetches>(a, a_row, piece.weights() + block * piece.b_block() + column, piece.b_block(), piece.steps,
                      piece.from ? piece.from + at : nullptr, piece.to + at, piece.sums_block);
  }
}

template <typename Step, int R>
void strips_by_width(const Piece& piece) {
  if constexpr (R <= kFewRows)
    if (piece.num_blocks * kBlockColumns >= 2 * kVectors * W) return strips<Step, R, 2 * kVectors, true>(piece);
  piece.is_first ? strips<Step, R, kVectors, true>(piece) : strips<Step, R, kVectors, false>(piece);
}

template <typename Step>
struct Strips {
  static void multiply(const Piece& piece) {
    static_assert(kRows == 3 || kRows == 6);
    switch (piece.num_rows()) {
      case 1: return strips_by_width<Step, 1>(piece);
      case 2: return strips_by_width<Step, 2>(piece);
      case 3: return strips_by_width<Step, 3>(piece);
      case 4: return strips_by_width<Step, std::min(4, kRows)>(piece);
      case 5: return strips_by_width<Step, std::min(5, kRows)>(piece);
      default: return strips_by_width<Step, kRows>(piece);
    }
  }
  static void begin(const Linear&) {}
  static void end() {}
};

// -------------------------------------------------------------------------------------------------------------- tiles

#if defined(KVRAY_TILES)
constexpr int kSumsStride = kBlockColumns * sizeof(float), kWeightsStride = 64;

// 32 rows by one column block. Rows are `stride` bytes apart, panels `step`.
KVRAY_TARGET_TILES void square(const char* a, int64_t step, int64_t stride, const uint32_t* b, int64_t steps,
                               const float* from, float* to) {
  constexpr int kLower = kTileSide * kBlockColumns;
  asm volatile("" : : : "memory");  // GCC 12's tile loads do not say that they read memory
  if (from) {
    _tile_loadd(0, from, kSumsStride);
    _tile_loadd(1, from + kTileSide, kSumsStride);
    _tile_loadd(2, from + kLower, kSumsStride);
    _tile_loadd(3, from + kLower + kTileSide, kSumsStride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; k++, a += step, b += kPanelWords) {
    _tile_loadd(6, b, kWeightsStride);
    _tile_loadd(4, a, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileWords, kWeightsStride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * stride, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, to, kSumsStride);
  _tile_stored(1, to + kTileSide, kSumsStride);
  _tile_stored(2, to + kLower, kSumsStride);
  _tile_stored(3, to + kLower + kTileSide, kSumsStride);
  asm volatile("" : : : "memory");
}

// At most 16 rows by one or two column blocks, from zero: reading the weights is what takes the time.
template <bool IsWide>
KVRAY_TARGET_TILES void flat(const char* a, int64_t step, int64_t stride, const uint32_t* b, int64_t b_block,
                             int64_t steps, float* to, int64_t sums_block) {
  asm volatile("" : : : "memory");
  const uint32_t* b1 = b + b_block;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; k++, a += step, b += kPanelWords, b1 += kPanelWords) {
    _tile_loadd(4, a, stride);
    _tile_loadd(6, b, kWeightsStride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileWords, kWeightsStride);
    _tile_dpbf16ps(1, 4, 7);
    if (IsWide) {
      _tile_loadd(6, b1, kWeightsStride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, b1 + kTileWords, kWeightsStride);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, to, kSumsStride);
  _tile_stored(1, to + kTileSide, kSumsStride);
  if (IsWide) {
    _tile_stored(2, to + sums_block, kSumsStride);
    _tile_stored(3, to + sums_block + kTileSide, kSumsStride);
  }
  asm volatile("" : : : "memory");
}

struct Tiles {
  static void multiply(const Piece& piece) {
    const Linear& linear = piece.linear;
    const bool is_in_place = linear.is_read_in_place(piece.unit);
    const int64_t step = is_in_place ? 64 : kTileRows * 64, stride = is_in_place ? linear.x_row * 2 : 64;
    const char* a = is_in_place ? reinterpret_cast<const char*>(linear.x + piece.unit * kTileRows * linear.x_row)
                                : linear.packed_rows + piece.unit * linear.unit_bytes;
    a += piece.k * step;
    if (linear.num_rows > kTileFew)
      for (int64_t i = 0; i < piece.num_blocks; i++)
        square(a, step, stride, piece.weights() + i * piece.b_block(), piece.steps,
               piece.from ? piece.from + i * piece.sums_block : nullptr, piece.to + i * piece.sums_block);
    else if (piece.num_blocks == 2)
      flat<true>(a, step, stride, piece.weights(), piece.b_block(), piece.steps, piece.to, piece.sums_block);
    else
      flat<false>(a, step, stride, piece.weights(), 0, piece.steps, piece.to, 0);
  }
  static void begin(const Linear& linear) { configure_tiles(static_cast<int>(std::min<int64_t>(linear.num_rows, 16))); }
  static void end() { release_tiles(); }
};
#endif

// -------------------------------------------------------------------------------------------------------------- tasks

bool has_few_rows(const Linear& linear) {
  return linear.num_rows <= (linear.path == LinearPath::kTiles ? kTileFew : kFewRows);
}

constexpr int kParts = static_cast<int>(kBlockColumns) / W;

// A row's 32 sums, plus bias from `first` on, as they are rounded.
inline void add_bias(const float* sums, const bf16* bias, int width, vf (&result)[kParts]) {
  for (int i = 0; i < kParts; i++) {
    result[i] = load(sums + i * W);
    if (bias && i * W < width) result[i] += load_upto(bias + i * W, width - i * W);
    const vi is_nan = result[i] != result[i];
    result[i] = (vf)((is_nan & 0x7fc00000) | (~is_nan & (vi)result[i]));
  }
}

// Sums [num_rows][32] of one column block to y from `row` on; where it is gated, with those of the block beside it.
void finish(const Linear& linear, const float* sums, const float* beside, int64_t row, int64_t num_rows,
            int64_t block) {
  const int64_t first = block * kBlockColumns;
  const int width = static_cast<int>(std::min(kBlockColumns, linear.width - first));
  const bf16* bias = linear.bias ? linear.bias + first : nullptr;
  for (int64_t r = 0; r < num_rows; r++, sums += kBlockColumns, beside += kBlockColumns) {
    bf16* to = linear.y + (row + r) * linear.width + first;
    vf result[kParts];
    add_bias(sums, bias, width, result);
    if (linear.gate) {
      vf up[kParts];
      add_bias(beside, bias ? bias + linear.width : nullptr, width, up);
      for (int i = 0; i < kParts; i++)
        result[i] = gated<bf16>(rounded<bf16>(result[i]), rounded<bf16>(up[i]), *linear.gate);
    }
#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
    if (width == kBlockColumns) {
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)result[1], (__m512)result[0]));
      continue;
    }
#endif
    for (int i = 0; i < kParts && i * W < width; i++) store_upto(to + i * W, result[i], width - i * W);
  }
}

// Asks for the memory that `finish` is about to write: by then it is there.
void fetch_results(const Linear& linear, int64_t row, int64_t block) {
  const int64_t end = std::min(row + linear.unit_rows, linear.num_rows);
  for (; row < end; row++) __builtin_prefetch(linear.y + row * linear.width + block * kBlockColumns, 1);
}

template <typename Kernel>
void run_task(const Linear& linear, const LinearTasks& tasks, int64_t task) {
  const int64_t m0 = task / tasks.wide * tasks.units, m1 = std::min(m0 + tasks.units, linear.num_units);
  const int64_t block = task % tasks.wide * tasks.blocks;
  const int64_t num_blocks = linear.gate ? 2 : std::min(tasks.blocks, linear.column_blocks - block);
  const int64_t panels = linear.panels, unit_rows = linear.unit_rows;
  const int64_t chunk = m1 - m0 > 1 ? kChunk : panels, sums_block = (m1 - m0) * unit_rows * kBlockColumns;
  float* all_sums = task_sums();
  Kernel::begin(linear);
  for (int64_t k = 0; k < panels; k += chunk) {
    const int64_t steps = std::min(chunk, panels - k);
    for (int64_t m = m0; m < m1; m++) {
      float* sums = all_sums + (m - m0) * unit_rows * kBlockColumns;
      if (k + steps == panels) fetch_results(linear, m * unit_rows, block);
      const Piece piece{linear, m, block, num_blocks, k, steps, k ? sums : nullptr, sums, sums_block, m == m0};
      Kernel::multiply(piece);
      if (k + steps < panels) continue;
      for (int64_t i = 0; i < (linear.gate ? 1 : num_blocks); i++)
        finish(linear, sums + i * sums_block, sums + sums_block, m * unit_rows, piece.num_rows(), block + i);
    }
  }
  Kernel::end();
}

template <typename Step>
void pack_words(const Linear& linear, int64_t unit, int64_t num_rows) {
  using Word = typename Step::RowWord;
  Word* to = reinterpret_cast<Word*>(linear.packed_rows + unit * linear.unit_bytes);
  const int64_t panels = linear.panels;
  for (int64_t r = 0; r < num_rows; r++, to += row_words(linear.panels) - panels * 16) {
    const bf16* row = linear.x + (unit * linear.unit_rows + r) * linear.x_row;
    for (int64_t k = 0; k < panels; k++, to += 16, row += kPanelDepth) {
      const int64_t left = linear.depth - k * kPanelDepth;
      if (left >= kPanelDepth) {
        Step::pack(row, to);
        continue;
      }
      bf16 part[kPanelDepth] = {};
      std::memcpy(part, row, sizeof(bf16) * left);
      Step::pack(part, to);
    }
  }
}

}  // namespace

bool may_use_tiles() {
#if defined(KVRAY_TILES)
  static const bool may = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID 7, EDX
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for the whole process
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }();
  return may;
#else
  return false;
#endif
}

void pack_weights(LinearPath path, const bf16* weights, int64_t width, int64_t depth, int64_t column_block,
                  uint32_t* words) {
  const int64_t panels = ceil_div(depth, kPanelDepth);
  uint32_t* to = words + column_block * panels * kPanelWords;
  const bf16* from = weights + column_block * kBlockColumns * depth;
  const int64_t columns = std::min(kBlockColumns, width - column_block * kBlockColumns);
  for (int64_t k = 0; k < panels; k++, to += kPanelWords) {
    bf16 part[kBlockColumns][kPanelDepth] = {};
    for (int64_t c = 0; c < columns; c++)
      std::memcpy(part[c], from + c * depth + k * kPanelDepth,
                  sizeof(bf16) * std::min(kPanelDepth, depth - k * kPanelDepth));
    for_words(path, [&](int c, int lower, int upper, int64_t at) { to[at] = word_of(part[c][upper], part[c][lower]); });
  }
}

void unpack_weights(LinearPath path, const uint32_t* words, int64_t width, int64_t depth, int64_t column_block,
                    bf16* weights) {
  const int64_t panels = ceil_div(depth, kPanelDepth), first = column_block * kBlockColumns;
  const uint32_t* from = words + column_block * panels * kPanelWords;
  for (int64_t k = 0; k < panels; k++, from += kPanelWords)
    for_words(path, [&](int c, int lower, int upper, int64_t at) {
      const int64_t row = first + c, begin = k * kPanelDepth;
      if (row >= width) return;
      if (begin + lower < depth) weights[row * depth + begin + lower].bits = static_cast<uint16_t>(from[at]);
      if (begin + upper < depth) weights[row * depth + begin + upper].bits = static_cast<uint16_t>(from[at] >> 16);
    });
}

void Linear::lay_out() {
  panels = ceil_div(depth, kPanelDepth);
  column_blocks = ceil_div(width, kBlockColumns);
  if (path == LinearPath::kTiles) {
    unit_rows = kTileRows;
    unit_bytes = kTileRows * panels * kPanelDepth * sizeof(bf16);
  } else {
    unit_rows = ceil_div(num_rows, ceil_div(num_rows, kRows));  // two strips of 4 rather than 6 and 2
    unit_bytes = unit_rows * row_words(panels) * word_bytes(path);
  }
  num_units = ceil_div(num_rows, unit_rows);
}

bool Linear::is_read_in_place(int64_t unit) const {
  if (path != LinearPath::kTiles || depth % kPanelDepth) return false;
  return num_rows <= kTileFew || (unit + 1) * kTileRows <= num_rows;
}

int64_t rows_per_pass(LinearPath path, int64_t depth) {
  constexpr int64_t kBytes = 32 << 20, kAligned = 4 * kTileRows * kRows;
  const int64_t row_bytes = row_words(ceil_div(depth, kPanelDepth)) * word_bytes(path);
  return std::max<int64_t>(1, kBytes / row_bytes / kAligned) * kAligned;
}

void pack_row_unit(const Linear& linear, int64_t unit) {
  const int64_t unit_rows = linear.unit_rows, num_rows = std::min(unit_rows, linear.num_rows - unit * unit_rows);
  if (linear.is_read_in_place(unit)) return;
#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
  if (linear.path == LinearPath::kDot) return pack_words<Dot>(linear, unit, num_rows);
#endif
  if (linear.path != LinearPath::kTiles) return pack_words<Fma>(linear, unit, num_rows);
  // [panels][32 rows][32 places], zeros behind the last row and place
  char* to = linear.packed_rows + unit * linear.unit_bytes;
  std::memset(to, 0, linear.unit_bytes);
  for (int64_t r = 0; r < num_rows; r++) {
    const bf16* row = linear.x + (unit * unit_rows + r) * linear.x_row;
    for (int64_t at = 0; at < linear.depth; at += kPanelDepth)
      std::memcpy(to + (at / kPanelDepth * kTileRows + r) * 64, row + at,
                  sizeof(bf16) * std::min(kPanelDepth, linear.depth - at));
  }
}

LinearTasks cut_linear(const Linear& linear) {
  const int64_t all_units = linear.num_units, high = ceil_div(all_units, kTaskRows / linear.unit_rows);
  const int64_t blocks = has_few_rows(linear) && !linear.gate ? 2 : 1, wide = ceil_div(linear.column_blocks, blocks);
  return {ceil_div(all_units, high), blocks, wide, high * wide};
}

void linear_task(const Linear& linear, const LinearTasks& tasks, int64_t task) {
  const FlushSubnormals flush;
#if defined(KVRAY_TILES)
  if (linear.path == LinearPath::kTiles) return run_task<Tiles>(linear, tasks, task);
#endif
#if defined(KVRAY_AVX512) && defined(__AVX512BF16__)
  if (linear.path == LinearPath::kDot) return run_task<Strips<Dot>>(linear, tasks, task);
#endif
  run_task<Strips<Fma>>(linear, tasks, task);
}

void linear_by_definition(const bf16* x, const bf16* weights, const bf16* bias, int64_t num_rows, int64_t width,
                          int64_t depth, bf16* y) {
  const FlushSubnormals flush;
  for (int64_t r = 0; r < num_rows; r++)
    for (int64_t n = 0; n < width; n++) {
      volatile float total = 0;  // volatile: nothing is computed before subnormals are flushed, or otherwise than written
      for (int64_t k = 0; k < depth; k += kPanelDepth) {
        float sums[2] = {0, 0};
        for (int64_t i = k; i < std::min(depth, k + kPanelDepth); i++)
          sums[i % 2] = std::fma(to_float(x[r * depth + i]), to_float(weights[n * depth + i]), sums[i % 2]);
        total = total + (sums[0] + sums[1]);
      }
      if (bias) total = total + to_float(bias[n]);
      vf last = splat(total);
      vh narrowed = narrow(last);
      y[r * width + n].bits = total != total ? 0x7fc0 : narrowed[0];
    }
}

}  // namespace kvray
