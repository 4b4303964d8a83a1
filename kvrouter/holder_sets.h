// Sets of holders, each once: a number stands for one, and slots of the index (index.cpp) that have it are counted.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <unordered_map>
#include <vector>

inline uint64_t mixed(uint64_t x) {  // the finalizer of SplitMix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

struct HolderSet {
  uint64_t hash;  // of the columns, in whatever order they came
  uint32_t num_slots, size;
  mutable uint32_t settled;  // how many columns had been dropped when none was found here
  uint16_t columns[1];  // in order
};

class HolderSets {
 public:
  HolderSets() : sets_(1, nullptr) {}
  HolderSets(const HolderSets&) = delete;

  ~HolderSets() {
    for (HolderSet* set : sets_) std::free(set);
  }

  // nullptr: nobody, number 0.
  const HolderSet* operator[](uint32_t number) const { return sets_[number]; }

  uint32_t num_numbers() const { return sets_.size(); }

  bool contains(uint32_t number, uint32_t column) const {
    const HolderSet* set = sets_[number];
    uint32_t low = 0, high = set == nullptr ? 0 : set->size;
    while (low < high) {
      uint32_t middle = (low + high) / 2;
      if (set->columns[middle] < column) low = middle + 1;
      else high = middle;
    }
    return set != nullptr && low < set->size && set->columns[low] == column;
  }

  // A slot has, instead of set `number`, that with this column besides, or without it, if it is there.
  uint32_t change(uint32_t number, uint32_t column) {
    uint32_t to = changed(number, column);
    if (to != 0) ++sets_[to]->num_slots;
    leave(number);
    return to;
  }

  // Sets that nothing but the last change's memory holds are freed.
  void forget_last() {
    leave(last_from_);
    leave(last_to_);
    last_from_ = last_to_ = 0;
    last_column_ = kNone;
  }

 private:
  static constexpr uint32_t kNone = 0xffffffff;
  static constexpr uint32_t kNumPools = 256;  // none is ever grown for long

  uint32_t changed(uint32_t number, uint32_t column) {
    if (number == last_from_ && column == last_column_) return last_to_;
    const HolderSet* set = sets_[number];
    uint64_t hash = (set == nullptr ? 0 : set->hash) ^ mixed(column + 1);
    uint32_t size = set == nullptr ? 0 : set->size;
    bool is_less = contains(number, column);
    uint32_t to = 0;
    if (size + 1 - 2 * is_less > 0) {
      auto& pool = interned_[hash % kNumPools];
      auto known = pool.find(hash);
      if (known != pool.end()) {  // two sets with one hash of 64 bits: no more likely than a lost name
        to = known->second;
      } else {
        to = made(hash, set, size, column, is_less);
        pool.emplace(hash, to);
      }
    }
    // The next name of an event mostly has the same holders; both sets stay meanwhile.
    if (number != 0) ++sets_[number]->num_slots;
    if (to != 0) ++sets_[to]->num_slots;
    forget_last();
    last_from_ = number, last_column_ = column, last_to_ = to;
    return to;
  }

  uint32_t made(uint64_t hash, const HolderSet* set, uint32_t size, uint32_t column, bool is_less) {
    HolderSet* made = static_cast<HolderSet*>(std::malloc(sizeof(HolderSet) + sizeof(uint16_t) * size));
    made->hash = hash;
    made->num_slots = made->size = made->settled = 0;
    for (uint32_t i = 0; i < size; ++i) {
      if (!is_less && made->size == i && set->columns[i] > column) made->columns[made->size++] = column;
      if (set->columns[i] != column) made->columns[made->size++] = set->columns[i];
    }
    if (!is_less && made->size == size) made->columns[made->size++] = column;
    if (free_.empty()) {
      free_.push_back(sets_.size());
      sets_.push_back(nullptr);
    }
    uint32_t number = free_.back();
    free_.pop_back();
    sets_[number] = made;
    return number;
  }

  void leave(uint32_t number) {  // of a slot: it has another set
    HolderSet* set = sets_[number];
    if (set == nullptr || --set->num_slots > 0) return;
    interned_[set->hash % kNumPools].erase(set->hash);
    std::free(set);
    sets_[number] = nullptr;
    free_.push_back(number);
  }

  std::vector<HolderSet*> sets_;  // by number
  std::vector<uint32_t> free_;
  std::unordered_map<uint64_t, uint32_t> interned_[kNumPools];  // hash -> number
  uint32_t last_from_ = 0, last_column_ = kNone, last_to_ = 0;  // what `changed` answered last
};
