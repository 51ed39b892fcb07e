// postprocess on the CPU: loc and logits of a batch -> detections. A thread takes whole images.
//
// One image goes through three sieves, each exact, so that little is left for what is dear:
//   1. a prior is looked at only if some logit comes near its background logit: the softmax
//      cannot exceed the threshold otherwise (most priors of a trained network stop here);
//   2. softmax of 16 such priors at a time, one per vector lane; (class, prior) pairs above the
//      threshold join the list of their class;
//   3. class by class, a pair is sorted, decoded and suppressed only if its score still beats the
//      `max_detections`-th best detection of the classes before it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "exp.h"
#include "greedy.h"

namespace {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;
constexpr int LANES = 16;    // priors of one softmax block
constexpr int STEPS = 4096;  // of the score, in the histogram that finds the best top_k

struct Detection {
  float score;
  int32_t label;
  Box box;
};

struct Limits {
  float score_threshold;
  int64_t top_k;
  float iou_threshold;
  int64_t max_detections;
};

using Items = std::vector<uint64_t>;  // descending_key(score) << 32 | prior
float score_of(uint64_t item) { return std::bit_cast<float>(~(uint32_t)(item >> 32) & 0x7fffffff); }

// Sieve 1. The priors with p_c > threshold possible for a class c > 0, by p_c < exp(l_c - l_0).
void plausible_priors(const float* logits, int64_t p, int64_t c, float threshold,
                      std::vector<int32_t>& out) {
  constexpr int W = 8;
  const float margin = std::log(threshold) - 1e-3f;  // -1e-3: far more than rounding can do
  const int64_t blocks = (c + W - 1) / W;
  std::vector<int32_t> is_object(blocks * W, 0);  // lanes past C hold the next prior's logits
  std::fill(is_object.begin() + 1, is_object.begin() + c, -1);
  out.resize(p);
  int64_t count = 0;
  for (int64_t i = 0; i < p; ++i) {
    const float* row = logits + i * c;
    int32_t any[W] = {};
    const bool is_last = (p - i) * c < blocks * W;  // its blocks would reach past the end
    for (int64_t b = 0; b < blocks && !is_last; ++b)
      for (int j = 0; j < W; ++j)
        any[j] |= -(row[b * W + j] - row[0] > margin) & is_object[b * W + j];
    int32_t found = is_last;
    for (int j = 0; j < W; ++j) found |= any[j];
    out[count] = i;
    count += found != 0;
  }
  out.resize(count);
}

// Sieve 2. Softmax of the plausible priors; pairs above the threshold -> items[class - 1].
void candidates(const float* logits, int64_t c, float threshold, const std::vector<int32_t>& priors,
                std::vector<Items>& items) {
  std::vector<float> x(c * LANES);
  std::vector<size_t> count(c, 0);
  for (size_t start = 0; start < priors.size(); start += LANES) {
    const int lanes = std::min<size_t>(LANES, priors.size() - start);
    float top[LANES], sum[LANES] = {};
    load_block(logits, c, lanes, [&](int j) { return (int64_t)priors[start + j]; }, x.data(), top);
    for (int64_t k = 0; k < c; ++k)
      for (int j = 0; j < LANES; ++j) {
        x[k * LANES + j] = exp_of_negative(x[k * LANES + j] - top[j]);
        sum[j] += x[k * LANES + j];
      }
    for (int64_t k = 1; k < c; ++k) {
      Items& list = items[k - 1];
      if (list.size() < count[k] + LANES) list.resize(2 * count[k] + LANES);
      for (int j = 0; j < LANES; ++j) x[k * LANES + j] /= sum[j];
      for (int j = 0; j < lanes; ++j) {  // write always, advance where it counts: no branch
        const float score = x[k * LANES + j];
        list[count[k]] = (uint64_t)descending_key(score) << 32 | priors[start + j];
        count[k] += score > threshold;
      }
    }
  }
  for (int64_t k = 1; k < c; ++k) items[k - 1].resize(count[k]);
}

// The best top_k items, sorted. A histogram of the scores tells which can be among them.
void select(Items& items, Items& scratch, int64_t top_k) {
  const auto step = [](uint64_t item) { return (int)(score_of(item) * (STEPS - 1)); };
  if ((int64_t)items.size() > top_k) {
    std::vector<int32_t> histogram(STEPS, 0);
    for (uint64_t item : items) ++histogram[step(item)];
    int lowest = STEPS;
    for (int64_t above = 0; above < top_k;) above += histogram[--lowest];
    std::erase_if(items, [&](uint64_t item) { return step(item) < lowest; });
  }
  radix_sort(items, scratch);
  if ((int64_t)items.size() > top_k) items.resize(top_k);
}

// One image: (P,4), (P,C), (P,4) cxcywh -> its best detections, best first.
std::vector<Detection> detect(const float* loc, const float* logits, const float* priors, int64_t p,
                              int64_t c, const Limits& limits, std::vector<Items>& items) {
  std::vector<int32_t> rows;
  plausible_priors(logits, p, c, limits.score_threshold, rows);
  candidates(logits, c, limits.score_threshold, rows, items);

  std::vector<Detection> best, found, merged;
  Items scratch;
  Kept kept;
  for (int32_t label = 1; label < c; ++label) {
    Items& list = items[label - 1];
    if ((int64_t)best.size() == limits.max_detections) {  // on ties the lower class wins
      const float to_beat = best.back().score;
      std::erase_if(list, [&](uint64_t item) { return score_of(item) <= to_beat; });
    }
    select(list, scratch, limits.top_k);
    kept.clear();
    found.clear();
    for (uint64_t item : list) {
      const uint32_t prior = item;
      const Box b = decode(loc + prior * 4, priors + prior * 4);
      const float area_b = area(b);
      if (!is_finite(b) || kept.overlaps(b, area_b, limits.iou_threshold)) continue;
      kept.push(b, area_b);
      found.push_back({score_of(item), label, b});
      if ((int64_t)found.size() == limits.max_detections) break;
    }
    merged.resize(best.size() + found.size());  // stable: of equal scores, the lower class first
    std::merge(best.begin(), best.end(), found.begin(), found.end(), merged.begin(),
               [](const Detection& a, const Detection& b) { return a.score > b.score; });
    merged.resize(std::min<size_t>(merged.size(), limits.max_detections));
    best.swap(merged);
  }
  return best;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> postprocess_cpu(
    const Tensor& loc, const Tensor& logits, const Tensor& priors_cxcywh, double score_threshold,
    int64_t top_k, double iou_threshold, int64_t max_detections) {
  const auto as_float = [](const Tensor& x) {
    return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
  };
  const Tensor l = as_float(loc), g = as_float(logits), q = as_float(priors_cxcywh);
  const int64_t n = g.size(0), p = g.size(1), c = g.size(2), d = max_detections;
  STD_TORCH_CHECK(l.numel() == n * p * 4 && q.numel() == p * 4 && c > 0 && p < (1LL << 31) &&
                      d >= 0 && top_k >= 0,
                  "postprocess: loc (N,P,4), logits (N,P,C) and priors (P,4) of one N and P");
  Tensor boxes = torch::stable::empty({n, d, 4}, ScalarType::Float);
  Tensor scores = torch::stable::empty({n, d}, ScalarType::Float);
  Tensor labels = torch::stable::empty({n, d}, ScalarType::Long);
  Tensor count = torch::stable::empty({n}, ScalarType::Long);
  const float *loc_data = l.const_data_ptr<float>(), *logit_data = g.const_data_ptr<float>();
  const float* prior_data = q.const_data_ptr<float>();
  Box* box = reinterpret_cast<Box*>(boxes.mutable_data_ptr<float>());
  float* score = scores.mutable_data_ptr<float>();
  int64_t *label = labels.mutable_data_ptr<int64_t>(), *counts = count.mutable_data_ptr<int64_t>();
  const Limits limits{(float)score_threshold, top_k, (float)iou_threshold, d};
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    std::vector<Items> items(c - 1);
    for (int64_t i = begin; i < end; ++i) {
      const auto found =
          detect(loc_data + i * p * 4, logit_data + i * p * c, prior_data, p, c, limits, items);
      counts[i] = found.size();
      for (int64_t k = 0; k < d; ++k) {
        const Detection x = k < counts[i] ? found[k] : Detection{};
        box[i * d + k] = x.box, score[i * d + k] = x.score, label[i * d + k] = x.label;
      }
    }
  });
  return {boxes, scores, labels, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess_cpu));
}
