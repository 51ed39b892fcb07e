// match on the CPU: the IoU of one box with 64 priors at a time, never stored as a matrix.
//
// Priors lie in chunks of 64 as a structure of arrays: the inner loops have a fixed length and
// become vector instructions. A chunk that a box does not touch is skipped, its IoUs being 0.
// Of each (box, chunk) only the best IoU is remembered; it leads the greedy step back to the one
// chunk to look at again. A thread takes whole images.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "iou.h"

namespace {

using torch::stable::Tensor;
constexpr int CHUNK = 64;
constexpr float MIN_BIPARTITE_IOU = 1e-6f;  // as in reference.py

struct Chunk {
  float x1[CHUNK] = {}, y1[CHUNK] = {}, x2[CHUNK] = {}, y2[CHUNK] = {}, area[CHUNK] = {};
  Box hull = {INFINITY, INFINITY, -INFINITY, -INFINITY};  // around all its priors

  void set(int j, Box b) {
    x1[j] = b.x1, y1[j] = b.y1, x2[j] = b.x2, y2[j] = b.y2, area[j] = ::area(b);
    hull = {std::min(hull.x1, b.x1), std::min(hull.y1, b.y1), std::max(hull.x2, b.x2),
            std::max(hull.y2, b.y2)};
  }
  bool touches(Box b) const {
    return b.x1 < hull.x2 && b.x2 > hull.x1 && b.y1 < hull.y2 && b.y2 > hull.y1;
  }
  float iou_with(int j, Box b, float area_b) const {
    return iou(b, area_b, {x1[j], y1[j], x2[j], y2[j]}, area[j]);
  }
};

// A prior that is not finite, and the padding of the last chunk, stay the empty box (0, 0, 0, 0),
// whose IoU with anything is 0.
std::vector<Chunk> chunks_of(const Box* priors, int64_t p) {
  std::vector<Chunk> chunks((p + CHUNK - 1) / CHUNK);
  for (int64_t i = 0; i < p; ++i)
    if (is_finite(priors[i])) chunks[i / CHUNK].set(i % CHUNK, priors[i]);
  return chunks;
}

// One image: boxes (G) -> matched (P) with row `start` for its first box.
void match_image(const std::vector<Chunk>& chunks, int64_t p, const Box* boxes, int64_t g,
                 int64_t start, float threshold, int64_t* matched) {
  if (p == 0) return;
  const int64_t num_chunks = chunks.size();
  std::vector<float> best_in(g * num_chunks, 0.0f);  // (G, chunks): the best IoU of each pair
  for (int64_t c = 0; c < num_chunks; ++c) {
    float best[CHUNK] = {};
    int32_t who[CHUNK] = {};
    for (int64_t i = 0; i < g; ++i) {
      const Box b = boxes[i];
      if (!chunks[c].touches(b) || !is_finite(b)) continue;
      const float area_b = area(b);
      int32_t top = 0;  // IoUs are not negative: their bits order as integers, which vectorises
      for (int j = 0; j < CHUNK; ++j) {
        const float value = chunks[c].iou_with(j, b, area_b);
        top = std::max(top, std::bit_cast<int32_t>(value));
        const int32_t better = -(value > best[j]);  // all bits set; the lowest box on ties
        who[j] = ((int32_t)i & better) | (who[j] & ~better);  // a select would become a branch
        best[j] = value > best[j] ? value : best[j];
      }
      best_in[i * num_chunks + c] = std::bit_cast<float>(top);
    }
    const int64_t lanes = std::min<int64_t>(CHUNK, p - c * CHUNK);
    for (int64_t j = 0; j < lanes; ++j)
      matched[c * CHUNK + j] = g > 0 && best[j] >= threshold ? start + who[j] : -1;
  }

  // Greedy bipartite, best pair first.
  struct Pair {
    float iou;
    int64_t prior;
  };
  std::vector<bool> taken(p, false);
  auto best_free_prior = [&](int64_t i) -> Pair {  // the lowest prior on ties
    float* row = &best_in[i * num_chunks];
    while (true) {
      const int64_t c = std::max_element(row, row + num_chunks) - row;
      const float promised = row[c];
      if (promised <= MIN_BIPARTITE_IOU) return {0.0f, -1};
      float found = 0.0f;
      int64_t prior = -1;
      for (int j = 0; j < CHUNK; ++j) {
        const float value = chunks[c].iou_with(j, boxes[i], area(boxes[i]));
        if (value > found && !taken[c * CHUNK + j]) found = value, prior = c * CHUNK + j;
      }
      if (found == promised) return {found, prior};
      row[c] = found;  // what was promised has been taken: another chunk may be better now
    }
  };
  std::vector<Pair> best(g);
  for (int64_t i = 0; i < g; ++i) best[i] = best_free_prior(i);
  while (true) {
    int64_t next = -1;  // the lowest box on ties
    for (int64_t i = 0; i < g; ++i)
      if (best[i].prior >= 0 && (next < 0 || best[i].iou > best[next].iou)) next = i;
    if (next < 0) break;
    const int64_t prior = best[next].prior;
    matched[prior] = start + next;
    taken[prior] = true;
    best[next].prior = -1;
    for (int64_t i = 0; i < g; ++i)
      if (best[i].prior == prior) best[i] = best_free_prior(i);
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
