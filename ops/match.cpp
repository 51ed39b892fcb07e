// match on the CPU: the IoU of one box with 64 priors at a time, never stored as a matrix.
//
// Priors lie in chunks of 64 as a structure of arrays: the inner loops have a fixed length and
// become vector instructions. A chunk also knows the hull of its priors and their smallest and
// largest area, which bound its IoU with any box. Where the bound is below the threshold, no
// prior of the chunk can be positive, and the chunk is passed over: nine in ten are.
// The greedy step wants the best prior of each box even so: it looks into chunks in the order of
// their bounds, and stops as soon as what it found is at least the next bound.
// A thread takes whole images.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

#include "iou.h"

namespace {

using torch::stable::Tensor;
constexpr int CHUNK = 64;
constexpr float MIN_BIPARTITE_IOU = 1e-6f;  // as in reference.py

// Only these can have an IoU above 0: sides of positive length, and an area that is a number.
bool is_proper(Box b) { return b.x1 < b.x2 && b.y1 < b.y2 && is_finite(area(b)); }

struct Chunk {
  float x1[CHUNK] = {}, y1[CHUNK] = {}, x2[CHUNK] = {}, y2[CHUNK] = {}, area[CHUNK] = {};
  Box hull = {INFINITY, INFINITY, -INFINITY, -INFINITY};  // around all its priors
  float smallest = INFINITY, largest = 0;

  void set(int j, Box b) {
    x1[j] = b.x1, y1[j] = b.y1, x2[j] = b.x2, y2[j] = b.y2, area[j] = ::area(b);
    hull = {std::min(hull.x1, b.x1), std::min(hull.y1, b.y1), std::max(hull.x2, b.x2),
            std::max(hull.y2, b.y2)};
    smallest = std::min(smallest, area[j]), largest = std::max(largest, area[j]);
  }

  // No prior of the chunk has a higher IoU with b. The intersection is at most I = b in the hull;
  // of all priors that could hold it, one of just that area would have the least union.
  float bound(Box b, float area_b) const {
    const float w = std::min(hull.x2, b.x2) - std::max(hull.x1, b.x1);
    const float h = std::min(hull.y2, b.y2) - std::max(hull.y1, b.y1);
    if (!(w > 0.0f && h > 0.0f)) return 0.0f;
    const float inter = std::min(w * h, area_b);
    const float prior = std::min(std::max(inter, smallest), largest);
    const float most = std::min(inter, prior);
    return 1.0001f * most / (area_b + (prior - most));  // 1.0001: more than rounding can add
  }

  void iou_with(Box b, float area_b, float* value) const {
    for (int j = 0; j < CHUNK; ++j)
      value[j] = iou(b, area_b, {x1[j], y1[j], x2[j], y2[j]}, area[j]);
  }
};

// All others, and the padding of the last chunk, stay the empty box (0, 0, 0, 0): an IoU of 0.
std::vector<Chunk> chunks_of(const Box* priors, int64_t p) {
  std::vector<Chunk> chunks((p + CHUNK - 1) / CHUNK);
  for (int64_t i = 0; i < p; ++i)
    if (is_proper(priors[i])) chunks[i / CHUNK].set(i % CHUNK, priors[i]);
  return chunks;
}

// One image: boxes (G) -> matched (P) with row `start` for its first box.
void match_image(const std::vector<Chunk>& chunks, int64_t p, const Box* boxes, int64_t g,
                 int64_t start, float threshold, int64_t* matched) {
  if (p == 0) return;
  const int64_t num_chunks = chunks.size();
  std::vector<float> promised(g * num_chunks, 0.0f);  // (G, chunks): the best IoU there, or more
  float value[CHUNK], best[CHUNK];
  int32_t who[CHUNK];
  // What a prior gets whose best IoU is 0: background, unless the threshold says the first box.
  std::fill(matched, matched + p, g > 0 && threshold <= 0.0f ? start : -1);
  for (int64_t c = 0; c < num_chunks; ++c) {
    bool seen = false;
    for (int64_t i = 0; i < g; ++i) {
      if (!is_proper(boxes[i])) continue;
      const float area_i = area(boxes[i]);
      float& most = promised[i * num_chunks + c];
      most = chunks[c].bound(boxes[i], area_i);
      if (most < threshold) continue;
      if (!std::exchange(seen, true)) {
        std::fill(best, best + CHUNK, 0.0f);
        std::fill(who, who + CHUNK, 0);
      }
      chunks[c].iou_with(boxes[i], area_i, value);
      int32_t top = 0;  // IoUs are not negative: their bits order as integers, which vectorises
      for (int j = 0; j < CHUNK; ++j) {
        top = std::max(top, std::bit_cast<int32_t>(value[j]));
        const int32_t better = -(value[j] > best[j]);  // all bits set; the lowest box on ties
        who[j] = ((int32_t)i & better) | (who[j] & ~better);  // a select would become a branch
        best[j] = value[j] > best[j] ? value[j] : best[j];
      }
      most = std::bit_cast<float>(top);
    }
    for (int64_t j = 0; seen && j < std::min<int64_t>(CHUNK, p - c * CHUNK); ++j)
      if (best[j] >= threshold) matched[c * CHUNK + j] = start + who[j];
  }

  // Greedy bipartite, best pair first.
  struct Pair {
    float iou;
    int64_t prior;
  };
  std::vector<bool> taken(p, false);
  auto best_free_prior = [&](int64_t i) -> Pair {  // the lowest prior on ties
    float* row = &promised[i * num_chunks];
    while (true) {
      const int64_t c = std::max_element(row, row + num_chunks) - row;
      if (row[c] <= MIN_BIPARTITE_IOU) return {0.0f, -1};
      chunks[c].iou_with(boxes[i], area(boxes[i]), value);
      float found = 0.0f;
      int64_t prior = -1;
      for (int j = 0; j < CHUNK; ++j)
        if (value[j] > found && !taken[c * CHUNK + j]) found = value[j], prior = c * CHUNK + j;
      if (found == row[c]) return {found, prior};
      row[c] = found;  // less than promised: another chunk may be better
    }
  };
  std::vector<Pair> choice(g);
  for (int64_t i = 0; i < g; ++i) choice[i] = best_free_prior(i);
  while (true) {
    int64_t next = -1;  // the lowest box on ties
    for (int64_t i = 0; i < g; ++i)
      if (choice[i].prior >= 0 && (next < 0 || choice[i].iou > choice[next].iou)) next = i;
    if (next < 0) break;
    const int64_t prior = choice[next].prior;
    matched[prior] = start + next;
    taken[prior] = true;
    choice[next].prior = -1;
    for (int64_t i = 0; i < g; ++i)
      if (choice[i].prior == prior) choice[i] = best_free_prior(i);
  }
}

Tensor match_cpu(const Tensor& priors_xyxy, const Tensor& boxes_xyxy, const Tensor& offsets,
                 double iou_threshold) {
  const Tensor priors = torch::stable::contiguous(priors_xyxy);
  const Tensor boxes = torch::stable::contiguous(boxes_xyxy);
  const Tensor rows = torch::stable::contiguous(offsets);
  const int64_t p = priors.size(0), t = boxes.size(0), n = rows.size(0) - 1;
  const int64_t* start = rows.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(0 <= start[i] && start[i] <= start[i + 1] && start[i + 1] <= t,
                    "match: offsets must rise from 0 to T=", t, "; offsets[", i, "] is ", start[i],
                    ", the next ", start[i + 1]);
  Tensor matched = torch::stable::empty({n, p}, torch::headeronly::ScalarType::Long);
  const Box* box = reinterpret_cast<const Box*>(boxes.const_data_ptr<float>());
  int64_t* out = matched.mutable_data_ptr<int64_t>();
  const auto chunks = chunks_of(reinterpret_cast<const Box*>(priors.const_data_ptr<float>()), p);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      match_image(chunks, p, box + start[i], start[i + 1] - start[i], start[i],
                  (float)iou_threshold, out + i * p);
  });
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) { m.impl("match", TORCH_BOX(&match_cpu)); }
