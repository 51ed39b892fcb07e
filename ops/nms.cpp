// nms on the CPU: sort, then test each box against the kept boxes, a chunk of them at a time.
//
// The boxes are visited by (group, score descending, index ascending), so that the kept boxes of
// one group lie together. One thread: each decision needs the one before it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "greedy.h"

namespace {

using torch::stable::Tensor;

// (K,4), (K,), (K,) -> keep (K,)
void nms(const Box* boxes, const float* scores, const int64_t* groups, int64_t k, float threshold,
         bool* keep) {
  std::fill_n(keep, k, false);  // memset may not have the null pointer of an empty tensor
  std::vector<uint64_t> order, scratch;  // key << 32 | index
  order.reserve(k);
  for (int64_t i = 0; i < k; ++i)
    if (is_finite(boxes[i]) && is_finite(scores[i]))
      order.push_back((uint64_t)descending_key(scores[i]) << 32 | i);
  radix_sort(order, scratch);
  bool one_group = true;
  for (int64_t i = 1; i < k; ++i) one_group &= groups[i] == groups[0];
  for (int shift : {0, 32}) {  // the sort is stable: by score, then by both halves of the group
    if (one_group) break;
    for (uint64_t& item : order) {
      const uint32_t i = item;
      item = (uint64_t)groups[i] >> shift << 32 | i;
    }
    radix_sort(order, scratch);
  }

  Kept kept;
  int64_t group = 0;
  for (uint64_t item : order) {
    const uint32_t i = item;
    if (groups[i] != group) kept.clear();
    group = groups[i];
    const float area_i = area(boxes[i]);
    if (kept.overlaps(boxes[i], area_i, threshold)) continue;
    kept.push(boxes[i], area_i);
    keep[i] = true;
  }
}

Tensor nms_cpu(const Tensor& boxes_xyxy, const Tensor& scores, const Tensor& groups,
               double iou_threshold) {
  const int64_t k = boxes_xyxy.size(0);
  STD_TORCH_CHECK(boxes_xyxy.dim() == 2 && boxes_xyxy.size(1) == 4 && scores.numel() == k &&
                      groups.numel() == k && k < (1LL << 32),
                  "nms: boxes (K,4), scores (K,) and groups (K,) of one K below 2^32");
  const Tensor b = torch::stable::contiguous(boxes_xyxy), s = torch::stable::contiguous(scores);
  const Tensor g = torch::stable::contiguous(groups);
  Tensor keep = torch::stable::empty({k}, torch::headeronly::ScalarType::Bool);
  nms(reinterpret_cast<const Box*>(b.const_data_ptr<float>()), s.const_data_ptr<float>(),
      g.const_data_ptr<int64_t>(), k, (float)iou_threshold, keep.mutable_data_ptr<bool>());
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) { m.impl("nms", TORCH_BOX(&nms_cpu)); }
