// CPU rung 1 of NMS: the definition as two loops. Each kept box walks over all later ones and
// strikes out what it overlaps.
//
// What is slow: one pair at a time, each behind an index, a branch and a division.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "iou.h"

namespace {

using torch::stable::Tensor;

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const Tensor b = torch::stable::contiguous(boxes), s = torch::stable::contiguous(scores);
  const Tensor g = torch::stable::contiguous(groups);
  const Box* box = reinterpret_cast<const Box*>(b.const_data_ptr<float>());
  const float* score = s.const_data_ptr<float>();
  const int64_t *group = g.const_data_ptr<int64_t>(), k = boxes.size(0);
  Tensor keep = torch::stable::empty({k}, torch::headeronly::ScalarType::Bool);
  bool* kept = keep.mutable_data_ptr<bool>();

  for (int64_t i = 0; i < k; ++i) kept[i] = is_finite(box[i]) && is_finite(score[i]);
  std::vector<int64_t> order(k);
  std::iota(order.begin(), order.end(), 0);
  order.resize(std::remove_if(order.begin(), order.end(), [&](int64_t i) { return !kept[i]; }) -
               order.begin());
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return score[i] > score[j]; });
  for (auto i = order.begin(); i != order.end(); ++i)
    for (auto j = i + 1; kept[*i] && j != order.end(); ++j)
      if (kept[*j] && group[*i] == group[*j] &&
          iou(box[*i], area(box[*i]), box[*j], area(box[*j])) > (float)threshold)
        kept[*j] = false;
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, CPU, m) { m.impl("nms_1_loop", TORCH_BOX(&nms)); }
