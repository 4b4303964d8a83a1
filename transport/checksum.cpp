// The checksum that transport/checksum.py defines, alone and in one pass with a copy. Called through ctypes, which
// releases the interpreter's lock.
//
// In a copy each byte is read from the source once, into a register; the register is written to the target and hashed.
// So the checksum is that of the bytes that were written, whatever happens to the source meanwhile.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read as they lie in memory");

namespace {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr int kVectorBytes = 64;
constexpr char kName[] = "avx512";
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr char kName[] = "avx2";
#else
constexpr int kVectorBytes = 16;
#if defined(__SSE2__)
constexpr char kName[] = "sse2";
#elif defined(__ARM_NEON)
constexpr char kName[] = "neon";
#else
constexpr char kName[] = "scalar";
#endif
#endif

typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t WordsAnywhere __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

constexpr int64_t kLineBytes = 64;
constexpr int64_t kLeafBytes = 4096;
constexpr int64_t kLeafLines = kLeafBytes / kLineBytes;
constexpr int kLanes = 8;
constexpr int kVectors = kLineBytes / kVectorBytes;  // of a line
// A batch larger than this leaves the core's own cache before anyone reads it: it is written past the caches, which
// spares reading the lines that are written over.
constexpr int64_t kStreamedBytes = 1 << 20;

template <typename T>
constexpr T mix(T x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

constexpr uint64_t key(uint64_t n) { return mix<uint64_t>((n + 1) * 0x9e3779b97f4a7c15u); }

struct Keys {
  alignas(64) uint64_t words[kLeafBytes / 8] = {};
  constexpr Keys() {
    for (uint64_t n = 0; n < kLeafBytes / 8; ++n) words[n] = key(n);
  }
};
constexpr Keys kKeys;

// Multiplies the lower halves of words.
inline Words multiply_halves(Words a, Words b) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Words)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (Words)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Writes past the caches; `target` is aligned to the vector.
inline void stream(uint8_t* target, Words words) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  _mm512_stream_si512((__m512i*)target, (__m512i)words);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)target, (__m256i)words);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)target, (__m128i)words);
#else
  *(WordsAnywhere*)target = words;
#endif
}

inline void end_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

enum class Store { kNone, kCached, kStreamed };

// The sums of one block: of the leaf in progress, and of the leaves before.
struct Sums {
  Words products[kVectors] = {};  // a * b of each word
  Words halves[kVectors] = {};    // a + b; only the lower halves count
  Words totals[kVectors] = {};    // of whole leaves
  uint64_t num_leaves = 0;

  // Adds lines `first` and following of a leaf; where it is a copy, writes them. Meanwhile as many lines of `ahead`, the
  // leaf that is read next, are fetched: processors do not look beyond a page by themselves. One loop with one load:
  // they tell what will be read next by the instruction that reads.
  template <Store store>
  void add(const uint8_t* source, uint8_t* target, int64_t first, int64_t num_lines, const uint8_t* ahead) {
    Words product[kVectors], half[kVectors];
    for (int i = 0; i < kVectors; ++i) product[i] = products[i], half[i] = halves[i];
    const uint8_t* keys = (const uint8_t*)kKeys.words + first * kLineBytes;
    for (int64_t offset = 0; offset < num_lines * kLineBytes; offset += kLineBytes) {
      if (store == Store::kStreamed) __builtin_prefetch(ahead + offset);
      for (int i = 0; i < kVectors; ++i) {
        int64_t at = offset + i * kVectorBytes;
        Words words = *(const volatile WordsAnywhere*)(source + at);  // volatile: read once
        if (store == Store::kCached) *(WordsAnywhere*)(target + at) = words;
        if (store == Store::kStreamed) stream(target + at, words);
        words ^= *(const Words*)(keys + at);
        Words upper = words >> 32;
        product[i] += multiply_halves(words, upper);
        half[i] += words;
        half[i] += upper;
      }
    }
    for (int i = 0; i < kVectors; ++i) products[i] = product[i], halves[i] = half[i];
  }

  void end_leaf() {
    uint64_t leaf_key = key(kLeafBytes / 8 + num_leaves++);
    for (int i = 0; i < kVectors; ++i) {
      // The sum of (2^32 + a) * (2^32 + b), modulo 2^64.
      totals[i] += mix<Words>((products[i] + (halves[i] << 32)) ^ leaf_key);
      products[i] = halves[i] = Words{};
    }
  }

  uint64_t checksum(uint64_t num_bytes) const {
    uint64_t lanes[kLanes];
    std::memcpy(lanes, totals, sizeof lanes);
    uint64_t value = key(num_bytes);
    for (uint64_t lane : lanes) value = mix<uint64_t>(value ^ lane);
    return value;
  }
};

// What another thread sees and says during a copy.
struct Watch {
  volatile int64_t num_bytes;  // copied so far
  volatile int64_t is_stopped;
};

// Adds a block to `sums`; where it is a copy, writes it. False: it was told to stop. `next` is read after it.
template <Store store>
bool add_block(Sums& sums, const uint8_t* source, uint8_t* target, int64_t num_bytes, const uint8_t* next,
               Watch* watch) {
  int64_t done = 0;
  for (; done + kLeafBytes <= num_bytes; done += kLeafBytes) {
    if (watch != nullptr && watch->is_stopped) return false;
    const uint8_t* ahead = done + kLeafBytes < num_bytes ? source + done + kLeafBytes : next;
    sums.add<store>(source + done, target + done, 0, kLeafLines, ahead);
    sums.end_leaf();
    if (watch != nullptr) watch->num_bytes = watch->num_bytes + kLeafBytes;
  }
  int64_t rest = num_bytes - done;
  if (rest > 0) {
    int64_t num_lines = rest / kLineBytes;
    sums.add<store>(source + done, target + done, 0, num_lines, next);
    done += num_lines * kLineBytes;
    if (done < num_bytes) {
      alignas(64) uint8_t line[kLineBytes] = {};
      std::memcpy(line, source + done, num_bytes - done);
      asm volatile("" ::: "memory");  // what is in `line` by now is what counts
      if (store != Store::kNone) std::memcpy(target + done, line, num_bytes - done);
      sums.add<Store::kNone>(line, nullptr, num_lines, 1, next);
    }
    sums.end_leaf();
    if (watch != nullptr) watch->num_bytes = watch->num_bytes + rest;
  }
  return true;
}

}  // namespace

extern "C" {

struct Copy {
  int64_t source_offset, target_offset, num_bytes;
};

const char* kvray_checksum_name() { return kName; }

uint64_t kvray_checksum(const uint8_t* data, int64_t num_bytes) {
  Sums sums;
  add_block<Store::kNone>(sums, data, nullptr, num_bytes, data, nullptr);
  return sums.checksum(num_bytes);
}

// Copies one after the other, and puts the checksum of each into `checksums`. Returns the number of whole copies; or
// -1 - i: copy i is not within both, or its target overlaps its source, and nothing was written.
int64_t kvray_copy_checked(const uint8_t* source, int64_t source_bytes, uint8_t* target, int64_t target_bytes,
                           const Copy* copies, int64_t num_copies, uint64_t* checksums, Watch* watch) {
  int64_t num_bytes = 0;
  for (int64_t i = 0; i < num_copies; ++i) {
    const auto& [begin, into, length] = copies[i];
    bool is_inside = length >= 0 && begin >= 0 && into >= 0 && length <= source_bytes && length <= target_bytes &&
                     begin <= source_bytes - length && into <= target_bytes - length;
    if (!is_inside) return -1 - i;
    int64_t distance = (int64_t)((uintptr_t)(target + into) - (uintptr_t)(source + begin));
    if (length > 0 && -length < distance && distance < length) return -1 - i;
    num_bytes += length;
  }
  bool is_streamed = num_bytes > kStreamedBytes;
  int64_t done = 0;
  for (; done < num_copies; ++done) {
    const auto& [begin, into, length] = copies[done];
    const uint8_t* next = source + (done + 1 < num_copies ? copies[done + 1].source_offset : begin);
    Sums sums;
    bool is_whole = is_streamed && (uintptr_t)(target + into) % kVectorBytes == 0
                        ? add_block<Store::kStreamed>(sums, source + begin, target + into, length, next, watch)
                        : add_block<Store::kCached>(sums, source + begin, target + into, length, next, watch);
    if (!is_whole) break;
    checksums[done] = sums.checksum(length);
  }
  if (is_streamed) end_streams();
  return done;
}
}
