// ops.postprocess for CUDA: three launches a batch, whatever is in it (reference.postprocess is the
// meaning). Nothing depends on the data but how long a block works: a CUDA graph records it.
//
//   logits (N,P,C) --score_kernel--> keys (N,C-1,P)    softmax; 0 where the score is too low
//                  --class_kernel--> kept (N,C-1,cap)  a block a class of an image: the best top_k,
//                                                      decoded, then NMS, all in shared memory
//                  --merge_kernel--> (N,D,..)          a block an image: the best D of all classes
//
// A key is the score's bits + 1: scores are >= 0, where bits rise with the number, and 0 is left to
// say "no candidate". Only the boxes that were selected are ever decoded.
#include "rows.h"
#include "select.h"

namespace {

constexpr int kThreads = threads(256, 64);  // of the class and the merge kernel
constexpr int kRows = threads(128, 64);     // priors of a block of the score kernel, at most
constexpr int kInShared = 1024;             // candidates a block can hold in shared memory

// grid (N, ceil(P / rows)), thread = one prior. The block's logits pass through shared memory, so
// that reading is coalesced along classes and writing along priors.
template <typename T>
__global__ void __launch_bounds__(kRows)
    score_kernel(const T* logits, int num_priors, int num_classes, int rows, float threshold,
                 unsigned* keys) {
  DYNAMIC_SHARED(float, tile);
  const int t = threadIdx.x, first = blockIdx.y * rows, here = min(rows, num_priors - first);
  const int64_t first_row = int64_t(blockIdx.x) * num_priors + first;
  load_rows<kRows>(logits + first_row * num_classes, here * num_classes, num_classes, tile);
  if (t >= here) return;
  float* row = tile + t * (num_classes | 1);
  float best = -INFINITY, sum = 0;
  for (int c = 0; c < num_classes; ++c) best = fmaxf(best, row[c]);  // passes over a NaN
  for (int c = 0; c < num_classes; ++c) sum += row[c] = expf(row[c] - best);
  keys += int64_t(blockIdx.x) * (num_classes - 1) * num_priors + first + t;
  for (int c = 1; c < num_classes; ++c, keys += num_priors) {  // class 0 is background
    // The sum is at least 1, so the score is at most row[c]: where that does not pass, no division
    // is needed. NaN, of a NaN or an infinite logit, passes nowhere.
    const float score = row[c] > threshold ? row[c] / sum : 0;
    *keys = score > threshold ? __float_as_uint(score) + 1 : 0;
  }
}

__device__ float score_of(Key key) { return __uint_as_float(unsigned(key >> 32) - 1); }

// The best `wanted` of the keys, in order, into best[]; `unsorted` is room for as many. Returns how
// many there are. A key's place is the number of keys before it, as in sort.h.
__device__ int select_sorted(const unsigned* keys, int count, int wanted, Key* unsorted,
                             Key* best) {
  __shared__ int found;
  const int t = threadIdx.x;
  if (t == 0) found = 0;
  const Key least = select<kThreads>(keys, count, wanted);
  visit_keys<kThreads>(keys, count, [&](Key key) {
    if (key >= least) unsorted[atomicAdd(&found, 1)] = key;
  });
  __syncthreads();
  const int size = found;
  for (int i = t; i < size; i += kThreads) {
    const Key mine = unsorted[i];
    int even = 0, odd = 0;  // two counters: an addition need not wait for the one before
    for (int j = 0; j + 1 < size; j += 2) even += unsorted[j] > mine, odd += unsorted[j + 1] > mine;
    if (size % 2 == 1) even += unsorted[size - 1] > mine;
    best[even + odd] = mine;
  }
  __syncthreads();
  return size;
}

// NMS by one block, 64 boxes at a time: those that a kept box overlaps are gone; who suppresses
// whom among the 64 is a 64 x 64 bit mask; thread 0 walks down its survivors. Writes the places of
// the boxes kept, at most `most`, and returns how many. keys[i] == 0: box i is not to be used.
__device__ int suppress(const Box* boxes, const Key* keys, int count, float threshold, int most,
                        int* kept) {
  __shared__ Key gone, rows[64];
  __shared__ int num_kept;
  const int t = threadIdx.x, c = t % 64;
  int total = 0;
  for (int first = 0; first < count && total < most; first += 64) {
    const int chunk = min(64, count - first);
    __syncthreads();
    if (t < 64) rows[t] = 0;
    if (t == 0) gone = 0, num_kept = total;
    __syncthreads();
    if (c < chunk) {
      const Box mine = boxes[first + c];
      bool is_gone = keys[first + c] == 0;
      for (int k = t / 64; k < total && !is_gone; k += kThreads / 64)
        is_gone = exceeds(boxes[kept[k]], mine, threshold);
      if (is_gone) atomicOr(&gone, Key(1) << c);
      Key row = 0;
      for (int j = c + 1 + t / 64; j < chunk; j += kThreads / 64) {
        if (exceeds(mine, boxes[first + j], threshold)) row |= Key(1) << j;
      }
      if (row != 0) atomicOr(&rows[c], row);
    }
    __syncthreads();
    if (t == 0) {
      Key left = ~gone & (~Key(0) >> (64 - chunk));
      while (left != 0 && num_kept < most) {
        const int best = __ffsll(left) - 1;
        kept[num_kept++] = first + best;
        left &= ~rows[best] & (~Key(1) << best);
      }
    }
    __syncthreads();
    total = num_kept;
  }
  return total;
}

// What a block of the class kernel keeps in shared memory: 36 bytes a candidate.
struct Lists {
  Box* box;
  Key *best, *unsorted;
  int* kept;
  static constexpr int kBytes = sizeof(Box) + 2 * sizeof(Key) + sizeof(int);
  __device__ static Lists at(void* memory, int64_t size) {
    Key* best = static_cast<Key*>(memory);
    Box* box = reinterpret_cast<Box*>(best + 2 * size);
    return {box, best, best + size, reinterpret_cast<int*>(box + size)};
  }
};

struct Problem {
  const void* loc;  // (N,P,4)
  ScalarType loc_type;
  const float* priors;  // (P,4) cxcywh
  int num_priors, num_classes;
  float iou_threshold;
  int top_k, cap, max_detections;  // cap: boxes of one class that can matter to the merge
};

__device__ Box decoded(const Problem& problem, int image, int prior) {
  const int64_t row = int64_t(image) * problem.num_priors + prior;
  float loc[4];
  for (int k = 0; k < 4; ++k) loc[k] = load(problem.loc, row * 4 + k, problem.loc_type);
  return decode(loc, problem.priors + int64_t(prior) * 4);
}

// grid (N * (C - 1)), block = one class of one image. Its lists lie in shared memory, or for a
// top_k beyond kInShared in `memory`: slower, but there is no limit.
template <bool in_shared>
__global__ void __launch_bounds__(kThreads, 5)  // 640 blocks of a batch of 32: 4.8 on each of 132
    class_kernel(Problem problem, const unsigned* keys, char* memory, unsigned* kept_keys,
                 int* kept_priors) {
  DYNAMIC_SHARED(char, shared);
  const int t = threadIdx.x, image = blockIdx.x / (problem.num_classes - 1);
  const int64_t bytes = (int64_t(problem.top_k) * Lists::kBytes + 15) / 16 * 16;
  const Lists lists = Lists::at(in_shared ? shared : memory + blockIdx.x * bytes, problem.top_k);
  const int count = select_sorted(keys + int64_t(blockIdx.x) * problem.num_priors,
                                  problem.num_priors, problem.top_k, lists.unsorted, lists.best);
  for (int i = t; i < count; i += kThreads) {
    const Box box = decoded(problem, image, index_of(lists.best[i]));
    lists.box[i] = finite_or_empty(box);
    if (!is_finite(box)) lists.best[i] = 0;
  }
  const int total =
      suppress(lists.box, lists.best, count, problem.iou_threshold, problem.cap, lists.kept);
  for (int i = t; i < problem.cap; i += kThreads) {
    const int64_t slot = int64_t(blockIdx.x) * problem.cap + i;
    const Key key = i < total ? lists.best[lists.kept[i]] : 0;
    kept_keys[slot] = key >> 32;
    kept_priors[slot] = index_of(key);
  }
}

// grid (N), block = one image. Slot (class, place) of kept_keys is also the order of equal scores.
// `room` is the number of detections that there can be at most.
template <bool in_shared>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(Problem problem, const unsigned* kept_keys, const int* kept_priors, int room,
                 char* memory, Box* boxes, float* scores, int64_t* labels, int64_t* counts) {
  DYNAMIC_SHARED(char, shared);
  const int slots = (problem.num_classes - 1) * problem.cap;
  const int64_t image = blockIdx.x, first = image * slots;
  Key* best = reinterpret_cast<Key*>(in_shared ? shared : memory + image * room * 2 * sizeof(Key));
  const int count = select_sorted(kept_keys + first, slots, room, best + room, best);
  for (int i = threadIdx.x; i < problem.max_detections; i += kThreads) {
    const int64_t row = image * problem.max_detections + i;
    const bool is_one = i < count;
    const int slot = is_one ? index_of(best[i]) : 0;
    boxes[row] = is_one ? decoded(problem, image, kept_priors[first + slot]) : Box{0, 0, 0, 0};
    scores[row] = is_one ? score_of(best[i]) : 0;
    labels[row] = is_one ? slot / problem.cap + 1 : 0;
  }
  if (threadIdx.x == 0) counts[image] = count;
}

ScalarType floating(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half ||
                      type == ScalarType::BFloat16 || type == ScalarType::Double,
                  "postprocess: loc and logits must be float32, float16, bfloat16 or float64");
  return type;
}

using Detections = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Detections postprocess(const Tensor& loc, const Tensor& logits, const Tensor& priors_cxcywh,
                       double score_threshold, int64_t top_k, double iou_threshold,
                       int64_t max_detections) {
  const OnDeviceOf device(logits);
  const Tensor l = torch::stable::contiguous(loc), z = torch::stable::contiguous(logits);
  const Tensor priors = torch::stable::contiguous(priors_cxcywh);
  const int64_t n = z.size(0), p = z.size(1), c = z.size(2), d = max_detections;
  STD_TORCH_CHECK(l.numel() == n * p * 4 && priors.numel() == p * 4 && top_k > 0 && d > 0,
                  "postprocess: loc, logits and priors differ in N or P, or a limit is below 1");
  Tensor boxes = torch::stable::new_empty(z, {n, d, 4}, ScalarType::Float);
  Tensor scores = torch::stable::new_empty(z, {n, d}, ScalarType::Float);
  Tensor labels = torch::stable::new_empty(z, {n, d}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(z, {n}, ScalarType::Long);
  if (n == 0) return {boxes, scores, labels, count};
  top_k = min(top_k, max(p, int64_t(1)));
  const int64_t cap = min(top_k, d), slots = (c - 1) * cap, room = min(d, slots);
  STD_TORCH_CHECK(max(max(p, d), max(slots, n * (c - 1))) < INT32_MAX - kThreads,
                  "postprocess: more than 2^31 priors, detections or classes");
  const Problem problem = {l.const_data_ptr(), floating(l), priors.const_data_ptr<float>(),
                           int(p), int(c), float(iou_threshold), int(top_k), int(cap), int(d)};

  Tensor keys = torch::stable::new_empty(z, {n, c - 1, p}, ScalarType::Int);
  Tensor kept_keys = torch::stable::new_empty(z, {n, c - 1, cap}, ScalarType::Int);
  Tensor kept_priors = torch::stable::new_empty(z, {n, c - 1, cap}, ScalarType::Int);
  unsigned* key = reinterpret_cast<unsigned*>(keys.mutable_data_ptr<int>());
  unsigned* kept_key = reinterpret_cast<unsigned*>(kept_keys.mutable_data_ptr<int>());
  int* kept_prior = kept_priors.mutable_data_ptr<int>();
  if (p > 0 && c > 1) {
    const int64_t rows = rows_of_a_block(kRows, c, "postprocess"), blocks = divide_up(p, rows);
    STD_TORCH_CHECK(blocks < 65536, "postprocess: too many priors: ", p);  // the grid's y
    with_type(z, "postprocess", [&]<typename T>(const T* logit) {
      LAUNCH(score_kernel<T>, dim3(n, blocks), kRows, rows * (c | 1) * sizeof(float),
             device.stream)(logit, int(p), int(c), int(rows), float(score_threshold), key);
    });
    CHECK_LAUNCH();
  }
  // A block's lists lie in its shared memory, or where they are too long in a work space.
  const auto work_space = [&](int64_t blocks, int64_t bytes) {
    return torch::stable::new_empty(z, {blocks * bytes}, ScalarType::Byte);
  };
  if (c > 1) {
    const int64_t bytes = divide_up(top_k * Lists::kBytes, 16) * 16;
    const bool in_shared = top_k <= kInShared;
    Tensor memory = work_space(in_shared ? 0 : n * (c - 1), bytes);
    const auto kernel = in_shared ? class_kernel<true> : class_kernel<false>;
    LAUNCH(kernel, n * (c - 1), kThreads, in_shared ? bytes : 0, device.stream)(
        problem, key, static_cast<char*>(memory.mutable_data_ptr()), kept_key, kept_prior);
    CHECK_LAUNCH();
  }
  const bool in_shared = room <= kInShared;
  const int64_t bytes = 2 * room * sizeof(Key);
  Tensor memory = work_space(in_shared ? 0 : n, bytes);
  const auto kernel = in_shared ? merge_kernel<true> : merge_kernel<false>;
  LAUNCH(kernel, n, kThreads, in_shared ? bytes : 0, device.stream)(
      problem, kept_key, kept_prior, int(room), static_cast<char*>(memory.mutable_data_ptr()),
      reinterpret_cast<Box*>(boxes.mutable_data_ptr<float>()), scores.mutable_data_ptr<float>(),
      labels.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  return {boxes, scores, labels, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) {
  m.impl("postprocess", TORCH_BOX(&postprocess));
}
