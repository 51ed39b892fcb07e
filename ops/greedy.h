// What the CPU kernels of nms and postprocess share: a radix sort and the greedy suppression.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "iou.h"

// A float as an unsigned integer that falls where the float rises: sorting these keys upwards
// sorts floats downwards. -0 becomes +0 (x + 0), for the two are equal.
inline uint32_t descending_key(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? bits : ~(bits | 1u << 31);
}

// Sorts items (key << 32 | index) by key, upwards. Stable, so equal keys stay in order of index.
// Least significant digit first; a digit that all keys share costs no pass.
inline void radix_sort(std::vector<uint64_t>& items, std::vector<uint64_t>& scratch) {
  const size_t n = items.size();
  scratch.resize(n);
  uint32_t count[4][256] = {};
  for (uint64_t item : items)
    for (int digit = 0; digit < 4; ++digit) ++count[digit][item >> (32 + 8 * digit) & 255];
  for (int digit = 0; digit < 4 && n > 0; ++digit) {
    const int shift = 32 + 8 * digit;
    if (count[digit][items[0] >> shift & 255] == n) continue;
    uint32_t start = 0;
    for (uint32_t& c : count[digit]) start += std::exchange(c, start);
    for (uint64_t item : items) scratch[count[digit][item >> shift & 255]++] = item;
    items.swap(scratch);
  }
}

// The boxes kept so far as a structure of arrays, in chunks of one length, so that the compiler
// turns the loop over a chunk into a few dozen vector instructions without a loop. 16, not 64:
// of clustered boxes few are kept, and the empty places of a chunk cost as much as the others.
class Kept {
 public:
  void clear() { size_ = 0; }

  void push(Box b, float area_b) {
    if (size_ % CHUNK == 0 && size_ / CHUNK == (int64_t)chunks_.size()) chunks_.emplace_back();
    Chunk& c = chunks_[size_ / CHUNK];
    const int j = size_++ % CHUNK;
    if (j == 0) c = Chunk{};  // empty boxes, which overlap nothing
    c.x1[j] = b.x1, c.y1[j] = b.y1, c.x2[j] = b.x2, c.y2[j] = b.y2, c.area[j] = area_b;
  }

  // Is there a kept box whose IoU with b exceeds the threshold? Stops at the first such chunk.
  bool overlaps(Box b, float area_b, float threshold) const {
    for (int64_t i = 0; i * CHUNK < size_; ++i) {
      const Chunk& c = chunks_[i];
      if (may_overlap(c, b, area_b, threshold) && exceeds(c, b, area_b, threshold)) return true;
    }
    return false;
  }

 private:
  static constexpr int CHUNK = 16;
  struct Chunk {
    float x1[CHUNK], y1[CHUNK], x2[CHUNK], y2[CHUNK], area[CHUNK];
  };

  // Without a division. inter / total > t implies inter > t * total, and rounding keeps order, so
  // no overlap is missed; the few that pass wrongly are put right by exceeds().
  static bool may_overlap(const Chunk& c, Box b, float area_b, float t) {
    int any = 0;
    for (int j = 0; j < CHUNK; ++j) {
      const float w = (c.x2[j] < b.x2 ? c.x2[j] : b.x2) - (c.x1[j] > b.x1 ? c.x1[j] : b.x1);
      const float h = (c.y2[j] < b.y2 ? c.y2[j] : b.y2) - (c.y1[j] > b.y1 ? c.y1[j] : b.y1);
      const float inter = (w > 0.0f ? w : 0.0f) * (h > 0.0f ? h : 0.0f);
      any |= inter >= t * (c.area[j] + area_b - inter);
    }
    return any;
  }

  static bool exceeds(const Chunk& c, Box b, float area_b, float t) {
    int any = 0;
    for (int j = 0; j < CHUNK; ++j)
      any |= iou({c.x1[j], c.y1[j], c.x2[j], c.y2[j]}, c.area[j], b, area_b) > t;
    return any;
  }

  std::vector<Chunk> chunks_;
  int64_t size_ = 0;
};
