// The index that kvrouter/index.py describes: who holds which block, and who keeps it. Called through ctypes.
//
//     shard = hash(name) % 1,024      an open-addressing table with linear probing each, that grows and shrinks alone,
//     slot: name, holders, keeper     24 bytes, so that nothing ever moves more than a thousandth of all names
//     holders                         number of a set of columns; equal sets are one, counted by the slots that have it
//
// A column that was dropped is dead: it does not count any more, but stands in sets until the sweep, one shard after the
// other, has passed all slots. Then it may be given out again. A slot is settled, rid of dead columns, before its
// holders change.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "holder_sets.h"

namespace {

constexpr uint32_t kNumShards = 1024;
constexpr uint32_t kLeastSlots = 8;
constexpr uint32_t kNobody = 0xffffffff;
constexpr uint64_t kAhead = 8;  // names whose slots are fetched while others are looked at
constexpr uint64_t kSweptPerFold = 256;  // names, besides twice as many as came in, so that sweeping keeps up

enum Kind : uint8_t { kBelow, kDevice, kHost };  // where a column's blocks lie; what lies below is not at hand

struct Slot {
  uint64_t head, tail;  // the name
  uint32_t set;  // number of its holders'; 0: the slot is empty
  uint32_t keeper;  // column, of a block that several have at hand; else kNobody
};

struct Shard {
  Slot* slots = nullptr;
  uint32_t capacity = 0, used = 0;
};

struct Told {  // one worker, one block: its copy there is spare from now on, or not any more
  uint8_t name[16];
  uint32_t column;
  uint32_t is_spare;
};

struct Column {
  uint64_t num_held = 0, num_spare = 0;
  double num_blocks = 1;
  uint32_t num_unswept = 0;  // shards that the sweep has to pass before a dead column is free
  Kind kind = kBelow;
  bool is_used = false, is_dead = false;
};

class Index {
 public:
  explicit Index(uint64_t seed) : seed_(seed), shards_(kNumShards) {}

  ~Index() {
    for (Shard& shard : shards_) std::free(shard.slots);
  }

  // ------------------------------------------------------------------------------------------------------- columns

  int64_t add_column(Kind kind, double num_blocks) {
    uint32_t column = 0;
    while (column < columns_.size() && columns_[column].is_used) ++column;
    if (column > UINT16_MAX) return -1;
    if (column == columns_.size()) columns_.emplace_back();
    columns_[column] = Column{};
    columns_[column].kind = kind;
    columns_[column].num_blocks = num_blocks;
    columns_[column].is_used = true;
    return column;
  }

  void drop_column(uint32_t column) {
    columns_[column].is_dead = true;
    columns_[column].num_held = columns_[column].num_spare = 0;
    columns_[column].num_unswept = kNumShards;
    dead_.push_back(column);
    ++num_dropped_;
  }

  // --------------------------------------------------------------------------------------------------------- changes

  void fold(uint32_t column, const uint8_t* stored, uint64_t num_stored, const uint8_t* removed, uint64_t num_removed,
            bool is_use) {
    told.clear();
    for (uint64_t i = 0; i < num_stored; ++i) {
      if (i + kAhead < num_stored) prefetch(stored + 16 * (i + kAhead));
      store(column, stored + 16 * i, is_use);
    }
    for (uint64_t i = 0; i < num_removed; ++i) {
      if (i + kAhead < num_removed) prefetch(removed + 16 * (i + kAhead));
      remove(column, removed + 16 * i);
    }
    sets_.forget_last();
    if (!dead_.empty()) {
      uint64_t num_names = 2 * (num_stored + num_removed) + kSweptPerFold;
      sweep_shards(1 + num_names * kNumShards / (num_names_ + 1));
    }
  }

  void sweep(uint64_t num_shards) {
    told.clear();
    sweep_shards(num_shards);
  }

  bool is_swept() const { return dead_.empty(); }

  // --------------------------------------------------------------------------------------------------------- queries

  uint64_t num_names() const { return num_names_; }
  uint64_t num_shared() const { return num_shared_; }
  const Column& column(uint32_t column) const { return columns_[column]; }

  uint64_t holders(const uint8_t* name, uint16_t* columns) const {  // as many columns as there are fit in
    uint64_t count = 0;
    const HolderSet* set = sets_[find(name)];
    for (uint32_t i = 0; set != nullptr && i < set->size; ++i)
      if (!columns_[set->columns[i]].is_dead) columns[count++] = set->columns[i];
    return count;
  }

  // Galloping: where a block has the same holders as another far behind it, so has, nearly always, what lies between.
  uint64_t runs(const uint8_t* names, uint64_t num_names, uint64_t max_runs, int64_t* ends, uint32_t* sets) const {
    uint64_t count = 0, begin = 0;
    uint32_t set = num_names > 0 ? find(names) : 0;
    while (count < max_runs && begin < num_names && !is_nobody(set)) {
      uint64_t same = begin, step = 1;  // block `same` has the same holders
      while (same + step < num_names && is_same(find(names + 16 * (same + step)), set)) {
        same += step;
        step *= 2;
      }
      uint64_t other = same + step < num_names ? same + step : num_names;
      while (other - same > 1) {
        uint64_t middle = (same + other) / 2;
        (is_same(find(names + 16 * middle), set) ? same : other) = middle;
      }
      ends[count] = other;
      sets[count++] = set;
      begin = other;
      if (begin < num_names) set = find(names + 16 * begin);
    }
    return count;
  }

  void fill(const uint32_t* sets, uint64_t num_runs, uint64_t num_columns, uint8_t* is_held) const {
    for (uint64_t run = 0; run < num_runs; ++run) {
      const HolderSet* set = sets_[sets[run]];
      for (uint32_t i = 0; i < set->size; ++i)
        if (!columns_[set->columns[i]].is_dead) is_held[run * num_columns + set->columns[i]] = 1;
    }
  }

  // Returns what does not agree, counted anew; nullptr: all does.
  const char* disagreement() const {
    std::vector<uint64_t> held(columns_.size()), spare(columns_.size()), slots(sets_.num_numbers());
    uint64_t num_names = 0, num_shared = 0;
    for (const Shard& shard : shards_)
      for (uint32_t at = 0; at < shard.capacity; ++at) {
        const Slot& slot = shard.slots[at];
        if (slot.set == 0) continue;
        ++num_names;
        ++slots[slot.set];
        if (find(reinterpret_cast<const uint8_t*>(&slot.head)) != slot.set) return "a name is not where it is sought";
        const HolderSet* set = sets_[slot.set];
        bool has_dead = false;
        uint32_t at_hand = 0, hosts = 0, is_keeper_there = 0;
        for (uint32_t i = 0; i < set->size; ++i) {
          const Column& column = columns_[set->columns[i]];
          if (i > 0 && set->columns[i - 1] >= set->columns[i]) return "a set's columns are not in order";
          has_dead |= column.is_dead;
          if (column.is_dead) continue;
          ++held[set->columns[i]];
          at_hand += column.kind != kBelow;
          hosts += column.kind == kHost;
          is_keeper_there += set->columns[i] == slot.keeper;
          spare[set->columns[i]] += slot.keeper != kNobody && column.kind == kDevice && set->columns[i] != slot.keeper;
        }
        num_shared += slot.keeper != kNobody;
        if (has_dead) continue;
        if ((at_hand > 1) != (slot.keeper != kNobody)) return "keepers: a shared block has none, or another has one";
        if (slot.keeper == kNobody) continue;
        if (!is_keeper_there) return "keepers: who is said to keep a block does not hold it";
        if (hosts > 0 && columns_[slot.keeper].kind != kHost) return "keepers: a node cache holds a block and another keeps it";
      }
    if (num_names != num_names_ || num_shared != num_shared_) return "names are counted wrongly";
    for (uint32_t column = 0; column < columns_.size(); ++column) {
      if (columns_[column].is_used && !columns_[column].is_dead && columns_[column].num_held != held[column])
        return "what a worker holds is counted wrongly";
      if (columns_[column].is_used && !columns_[column].is_dead && columns_[column].num_spare != spare[column])
        return "keepers: spare copies are counted wrongly";
    }
    for (uint32_t set = 1; set < sets_.num_numbers(); ++set)
      if (sets_[set] != nullptr ? sets_[set]->num_slots != slots[set] : slots[set] != 0)
        return "the slots of a set are counted wrongly";
    return nullptr;
  }

  std::vector<Told> told;  // by the last fold or sweep

 private:
  // ------------------------------------------------------------------------------------------------------------ slots

  uint64_t hash(uint64_t head) const { return mixed(head ^ seed_); }

  static uint32_t home(uint64_t hash, uint32_t capacity) { return (hash >> 32) & (capacity - 1); }

  Shard& shard(uint64_t hash) { return shards_[hash % kNumShards]; }

  void prefetch(const uint8_t* name) const {
    uint64_t head;
    std::memcpy(&head, name, 8);
    uint64_t hashed = hash(head);
    const Shard& shard = shards_[hashed % kNumShards];
    if (shard.capacity > 0) __builtin_prefetch(&shard.slots[home(hashed, shard.capacity)], 1);
  }

  uint32_t find(const uint8_t* name) const {
    uint64_t words[2];
    std::memcpy(words, name, 16);
    uint64_t hashed = hash(words[0]);
    const Shard& shard = shards_[hashed % kNumShards];
    if (shard.capacity == 0) return 0;
    for (uint32_t at = home(hashed, shard.capacity);; at = (at + 1) & (shard.capacity - 1)) {
      const Slot& slot = shard.slots[at];
      if (slot.set == 0) return 0;
      if (slot.head == words[0] && slot.tail == words[1]) return slot.set;
    }
  }

  // Returns the name's slot, or an empty one where it belongs; there is room for one more.
  static Slot& slot_of(Shard& shard, uint64_t hashed, const uint64_t* words) {
    uint32_t at = home(hashed, shard.capacity);
    while (shard.slots[at].set != 0 && (shard.slots[at].head != words[0] || shard.slots[at].tail != words[1]))
      at = (at + 1) & (shard.capacity - 1);
    return shard.slots[at];
  }

  void resize(Shard& shard, uint32_t capacity) {
    Slot* before = shard.slots;
    uint32_t num_before = shard.capacity;
    shard.slots = static_cast<Slot*>(std::calloc(capacity, sizeof(Slot)));
    shard.capacity = capacity;
    for (uint32_t at = 0; at < num_before; ++at)
      if (before[at].set != 0) slot_of(shard, hash(before[at].head), &before[at].head) = before[at];
    std::free(before);
  }

  // Empties a slot, and lets those move up that lie behind it because it was taken.
  void erase(Shard& shard, uint32_t at) {
    uint32_t mask = shard.capacity - 1;
    for (uint32_t next = (at + 1) & mask; shard.slots[next].set != 0; next = (next + 1) & mask) {
      uint32_t wanted = home(hash(shard.slots[next].head), shard.capacity);
      if (((next - wanted) & mask) >= ((next - at) & mask)) {
        shard.slots[at] = shard.slots[next];
        at = next;
      }
    }
    shard.slots[at] = Slot{};
    --shard.used;
    --num_names_;
  }

  void shrink(Shard& shard) {
    if (shard.capacity > kLeastSlots && shard.used * 8 < shard.capacity) resize(shard, shard.capacity / 2);
  }

  bool is_nobody(uint32_t number) const {
    if (number == 0 || dead_.empty()) return number == 0;
    const HolderSet* set = sets_[number];
    for (uint32_t i = 0; i < set->size; ++i)
      if (!columns_[set->columns[i]].is_dead) return false;
    return true;
  }

  bool is_same(uint32_t a, uint32_t b) const {  // those that are there
    if (a == b || dead_.empty() || a == 0 || b == 0) return a == b;
    const HolderSet &left = *sets_[a], &right = *sets_[b];
    uint32_t i = 0, j = 0;
    while (true) {
      while (i < left.size && columns_[left.columns[i]].is_dead) ++i;
      while (j < right.size && columns_[right.columns[j]].is_dead) ++j;
      if (i == left.size || j == right.size) return i == left.size && j == right.size;
      if (left.columns[i++] != right.columns[j++]) return false;
    }
  }

  // ---------------------------------------------------------------------------------------------------- one block more

  void store(uint32_t column, const uint8_t* name, bool is_use) {
    uint64_t words[2];
    std::memcpy(words, name, 16);
    uint64_t hashed = hash(words[0]);
    Shard& into = shard(hashed);
    if (into.used * 5 >= into.capacity * 4) resize(into, into.capacity == 0 ? kLeastSlots : 2 * into.capacity);
    Slot& slot = slot_of(into, hashed, words);
    if (slot.set == 0) {
      slot = Slot{words[0], words[1], 0, kNobody};
      ++into.used;
      ++num_names_;
    } else {
      settle(slot);
    }
    bool was_there = sets_.contains(slot.set, column);
    if (!was_there) {
      slot.set = sets_.change(slot.set, column);
      ++columns_[column].num_held;
    }
    if (columns_[column].kind != kBelow) appoint(slot, column, was_there, is_use);
  }

  void remove(uint32_t column, const uint8_t* name) {
    uint64_t words[2];
    std::memcpy(words, name, 16);
    uint64_t hashed = hash(words[0]);
    Shard& from = shard(hashed);
    if (from.capacity == 0) return;
    Slot& slot = slot_of(from, hashed, words);
    if (!sets_.contains(slot.set, column)) return;
    settle(slot);
    slot.set = sets_.change(slot.set, column);
    --columns_[column].num_held;
    lose(slot, column);
    if (slot.set == 0) {
      erase(from, &slot - from.slots);
      shrink(from);
    }
  }

  void settle(Slot& slot) {
    const HolderSet& set = *sets_[slot.set];
    if (set.settled == num_dropped_) return;
    bool has_dead = false;
    for (uint32_t i = 0; i < set.size && !has_dead; ++i) has_dead = columns_[set.columns[i]].is_dead;
    if (!has_dead) {
      set.settled = num_dropped_;
      return;
    }
    for (uint32_t column : dead_)
      if (sets_.contains(slot.set, column)) {
        slot.set = sets_.change(slot.set, column);
        lose(slot, column);
      }
  }

  void sweep_shards(uint64_t num_shards) {
    for (; num_shards > 0 && !dead_.empty(); --num_shards) {
      Shard& shard = shards_[cursor_];
      cursor_ = (cursor_ + 1) % kNumShards;
      for (uint32_t at = 0; at < shard.capacity; ++at)
        while (shard.slots[at].set != 0) {  // where one is erased another may have moved up
          settle(shard.slots[at]);
          if (shard.slots[at].set != 0) break;
          erase(shard, at);
        }
      shrink(shard);
      sets_.forget_last();
      size_t left = 0;
      for (uint32_t column : dead_) {
        if (--columns_[column].num_unswept > 0) dead_[left++] = column;
        else columns_[column].is_used = false;
      }
      dead_.resize(left);
    }
  }

  // ----------------------------------------------------------------------------------------------------- who keeps it

  bool is_at_hand(uint32_t column) const { return !columns_[column].is_dead && columns_[column].kind != kBelow; }

  void tell(const Slot& slot, uint32_t column, bool is_spare) {
    if (columns_[column].kind != kDevice) return;
    columns_[column].num_spare += is_spare ? 1 : -1;
    Told one;
    std::memcpy(one.name, &slot.head, 16);
    one.column = column;
    one.is_spare = is_spare;
    told.push_back(one);
  }

  void keep(Slot& slot, uint32_t column) {
    num_shared_ += (column != kNobody) - (slot.keeper != kNobody);
    slot.keeper = column;
  }

  // A node cache before all others, else whoever keeps least for its size.
  uint32_t least(const Slot& slot) const {
    const HolderSet& set = *sets_[slot.set];
    uint32_t best = kNobody;
    double best_share = 0;
    for (uint32_t i = 0; i < set.size; ++i) {
      uint32_t at = set.columns[i];
      const Column& column = columns_[at];
      if (!is_at_hand(at)) continue;
      if (column.kind == kHost) return at;
      double share = (static_cast<double>(column.num_held) - static_cast<double>(column.num_spare)) / column.num_blocks;
      if (best == kNobody || share < best_share) best = at, best_share = share;
    }
    return best;
  }

  // `column` stored the block, and uses it, perhaps.
  void appoint(Slot& slot, uint32_t column, bool was_there, bool is_use) {
    uint32_t before = slot.keeper;
    bool is_host = columns_[column].kind == kHost;
    if (before == kNobody) {
      const HolderSet& set = *sets_[slot.set];
      uint32_t other = kNobody;
      for (uint32_t i = 0; i < set.size && other == kNobody; ++i)
        if (set.columns[i] != column && is_at_hand(set.columns[i])) other = set.columns[i];
      if (other == kNobody) return;
      bool other_is_host = columns_[other].kind == kHost;
      keep(slot, is_use && !is_host && !other_is_host ? column : least(slot));
      tell(slot, slot.keeper == column ? other : column, true);
      return;
    }
    if (before != column && columns_[before].kind != kHost && (is_host || is_use)) {
      keep(slot, column);
      if (was_there) tell(slot, column, false);
      tell(slot, before, true);
    } else if (!was_there) {
      tell(slot, column, true);
    }
  }

  // `column` has the block no more, or is dead: nobody asks what it keeps.
  void lose(Slot& slot, uint32_t column) {
    if (columns_[column].kind == kBelow || slot.keeper == kNobody) return;
    bool was_keeper = slot.keeper == column;
    if (!was_keeper && columns_[column].kind == kDevice && !columns_[column].is_dead) --columns_[column].num_spare;
    const HolderSet* set = sets_[slot.set];
    uint32_t count = 0, last = kNobody;
    for (uint32_t i = 0; set != nullptr && i < set->size; ++i)
      if (is_at_hand(set->columns[i])) ++count, last = set->columns[i];
    if (count < 2) {
      if (count == 1 && slot.keeper != last) tell(slot, last, false);
      keep(slot, kNobody);
    } else if (was_keeper) {
      keep(slot, least(slot));
      tell(slot, slot.keeper, false);
    }
  }

  const uint64_t seed_;
  std::vector<Shard> shards_;
  HolderSets sets_;
  std::vector<Column> columns_;
  std::vector<uint32_t> dead_;
  uint32_t num_dropped_ = 1;  // columns, ever; wraps around
  uint32_t cursor_ = 0;  // the shard that is swept next
  uint64_t num_names_ = 0, num_shared_ = 0;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT Index* kvray_index_new(uint64_t seed) { return new Index(seed); }
EXPORT void kvray_index_delete(Index* index) { delete index; }
EXPORT int64_t kvray_index_add(Index* index, uint32_t kind, double num_blocks) {
  return index->add_column(static_cast<Kind>(kind), num_blocks);
}
EXPORT void kvray_index_drop(Index* index, uint32_t column) { index->drop_column(column); }
EXPORT uint64_t kvray_index_fold(Index* index, uint32_t column, const uint8_t* stored, uint64_t num_stored,
                                 const uint8_t* removed, uint64_t num_removed, uint32_t is_use) {
  index->fold(column, stored, num_stored, removed, num_removed, is_use != 0);
  return index->told.size();
}
EXPORT uint64_t kvray_index_sweep(Index* index, uint64_t num_shards) {
  index->sweep(num_shards);
  return index->told.size();
}
EXPORT uint32_t kvray_index_is_swept(const Index* index) { return index->is_swept(); }
EXPORT const Told* kvray_index_told(const Index* index) { return index->told.data(); }
EXPORT uint64_t kvray_index_runs(const Index* index, const uint8_t* names, uint64_t num_names, uint64_t max_runs,
                                 int64_t* ends, uint32_t* sets) {
  return index->runs(names, num_names, max_runs, ends, sets);
}
EXPORT void kvray_index_fill(const Index* index, const uint32_t* sets, uint64_t num_runs, uint64_t num_columns,
                             uint8_t* is_held) {
  index->fill(sets, num_runs, num_columns, is_held);
}
EXPORT uint64_t kvray_index_holders(const Index* index, const uint8_t* name, uint16_t* columns) {
  return index->holders(name, columns);
}
EXPORT uint64_t kvray_index_num_names(const Index* index) { return index->num_names(); }
EXPORT uint64_t kvray_index_num_shared(const Index* index) { return index->num_shared(); }
EXPORT uint64_t kvray_index_num_held(const Index* index, uint32_t column) { return index->column(column).num_held; }
EXPORT uint64_t kvray_index_num_spare(const Index* index, uint32_t column) { return index->column(column).num_spare; }
EXPORT const char* kvray_index_disagreement(const Index* index) { return index->disagreement(); }
