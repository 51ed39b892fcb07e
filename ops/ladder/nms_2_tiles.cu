// Rung 2 of NMS: tiles and bit masks. 64 x 64 pairs share 64 boxes in shared memory, each thread
// has one of 64 others, and 64 answers are one word: an eighth of rung 1's bytes, half of them never touched.
//
// What is still slow: the host waits, copies the mask and walks down it.
#include "tile.h"

namespace {

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const OnDeviceOf device(scores);
  const int64_t k = scores.size(0), words = divide_up(k, 64);
  const Tensor keep = on_host(torch::stable::new_empty(scores, {k}, ScalarType::Bool));
  if (k == 0) return torch::stable::to(keep, scores.device());
  const Candidates c = sort_boxes(boxes, scores, groups, device.stream);
  Tensor tiles = torch::stable::new_empty(groups, {k, words});
  launch_tiles(c.sorted.box, c.sorted.group, k, threshold, tiles, device.stream);
  const Tensor mask = on_host(tiles);
  const Tensor places = on_host(c.index), unusable = on_host(c.gone);

  std::vector<Key> gone(words, 0);
  for (int64_t i = 0; i < k; ++i) {
    const int64_t* row = mask.const_data_ptr<int64_t>() + i * words;
    const bool kept = !unusable.const_data_ptr<bool>()[i] && !(gone[i / 64] >> i % 64 & 1);
    keep.mutable_data_ptr<bool>()[places.const_data_ptr<int>()[i]] = kept;
    for (int64_t w = i / 64; w < words && kept; ++w) gone[w] |= Key(row[w]);
  }
  return torch::stable::to(keep, scores.device());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("nms_2_tiles", TORCH_BOX(&nms)); }
