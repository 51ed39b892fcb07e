// CPU rung 2 of NMS: the same two loops over sorted copies of the coordinates, one array each (a
// structure of arrays). Neighbours in memory are neighbours in the loop, there is no branch in it,
// and so the compiler compares 8 or 16 pairs with one instruction.
//
// What is slow: every later box is compared, even if it was struck out long ago, and each pair
// costs a division. nms.cpp turns the loop round: each box asks the kept ones, and stops at a yes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "greedy.h"

namespace {

using torch::stable::Tensor;

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const Tensor b = torch::stable::contiguous(boxes), s = torch::stable::contiguous(scores);
  const Tensor g = torch::stable::contiguous(groups);
  const Box* box = reinterpret_cast<const Box*>(b.const_data_ptr<float>());
  const float *score = s.const_data_ptr<float>(), t = (float)threshold;
  const int64_t* group = g.const_data_ptr<int64_t>();
  std::vector<uint64_t> order, scratch;  // key << 32 | index
  for (int64_t i = 0; i < boxes.size(0); ++i)
    if (is_finite(box[i]) && is_finite(score[i]))
      order.push_back((uint64_t)descending_key(score[i]) << 32 | i);
  radix_sort(order, scratch);

  const int64_t k = order.size();
  std::vector<float> x1(k), y1(k), x2(k), y2(k), areas(k);
  std::vector<int64_t> team(k), gone(k, 0);
  for (int64_t i = 0; i < k; ++i) {
    const uint32_t j = order[i];
    x1[i] = box[j].x1, y1[i] = box[j].y1, x2[i] = box[j].x2, y2[i] = box[j].y2;
    areas[i] = area(box[j]), team[i] = group[j];
  }
  Tensor keep = torch::stable::empty({boxes.size(0)}, torch::headeronly::ScalarType::Bool);
  std::fill_n(keep.mutable_data_ptr<bool>(), boxes.size(0), false);
  for (int64_t i = 0; i < k; ++i) {
    if (gone[i]) continue;
    keep.mutable_data_ptr<bool>()[(uint32_t)order[i]] = true;
    const Box mine = box[(uint32_t)order[i]];
    for (int64_t j = i + 1; j < k; ++j)
      gone[j] |= (iou(mine, areas[i], {x1[j], y1[j], x2[j], y2[j]}, areas[j]) > t) &
                 (team[j] == team[i]);
  }
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, CPU, m) { m.impl("nms_2_arrays", TORCH_BOX(&nms)); }
