// ops.mined_cross_entropy for CUDA: two launches a batch, and one for the gradient
// (reference.mined_cross_entropy is the meaning).
//
//   logits (N,P,C) --row_kernel--> cross_entropy (N,P)   a warp a row: C sums of a few lanes
//                                  keys (N,P)            hardness of a negative, 0 of a positive
//                 --mine_kernel--> cross_entropy (N,P)   a block an image: the border by radix
//                                                        selection, zeros below it
// A key is the bits of the cross-entropy + 1: it is >= 0, where bits rise with the number.
#include "select.h"

namespace {

constexpr int kThreads = threads(1024, 64);    // of the mine kernel
constexpr int kRowThreads = threads(256, 64);  // of the others: 8 rows a block

struct Softmax {  // of one row: exp(logit - top) / sum
  float top, sum;
};

// Every lane gets the same. A NaN or an infinite logit makes the sum NaN.
__device__ Softmax softmax_of_row(const float* row, int num_classes) {
  Softmax s = {-INFINITY, 0};
  for (int c = threadIdx.x % 32; c < num_classes; c += 32) s.top = row[c] > s.top ? row[c] : s.top;
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, s.top, step);
    s.top = other > s.top ? other : s.top;
  }
  for (int c = threadIdx.x % 32; c < num_classes; c += 32) s.sum += expf(row[c] - s.top);
  for (int step = 16; step > 0; step /= 2) s.sum += __shfl_xor_sync(kFullWarp, s.sum, step);
  return s;
}

// grid (ceil(N P / rows of a block)), warp = one row
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(const float* logits, const int64_t* labels, int64_t num_rows, int num_classes,
               float* cross_entropy, unsigned* keys) {
  const int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
  if (i >= num_rows) return;
  const float* row = logits + i * num_classes;
  const Softmax s = softmax_of_row(row, num_classes);
  if (threadIdx.x % 32 != 0) return;
  const int64_t label = labels[i];  // no check before the launch: a wrong one gives NaN
  const float own = 0 <= label && label < num_classes ? row[label] : NAN;
  const float value = logf(s.sum) - (own - s.top);
  cross_entropy[i] = value;
  keys[i] = label > 0 ? 0 : __float_as_uint(is_finite(value) ? value : INFINITY) + 1;
}

// grid (N), block = one image; thread t looks after priors t, t + kThreads, ...
__global__ void __launch_bounds__(kThreads)
    mine_kernel(const unsigned* keys, int num_priors, int64_t negatives_per_positive,
                float* cross_entropy) {
  __shared__ int positives;
  const int t = threadIdx.x;
  keys += int64_t(blockIdx.x) * num_priors;
  cross_entropy += int64_t(blockIdx.x) * num_priors;
  if (t == 0) positives = 0;
  __syncthreads();
  int mine = 0;
  for (int p = t; p < num_priors; p += kThreads) mine += keys[p] == 0;
  atomicAdd(&positives, mine);
  __syncthreads();
  const int64_t most = num_priors, wanted = min(negatives_per_positive, most) * positives;
  const Key border = wanted == 0 ? ~Key(0) : select(keys, num_priors, int(min(wanted, most)));
  for (int p = t; p < num_priors; p += kThreads) {
    const Key key = with_index(keys, p);
    if (key != 0 && key < border && is_finite(cross_entropy[p])) cross_entropy[p] = 0;
  }
}

// grid (ceil(N P / rows of a block)), warp = one row: softmax - one-hot, or zeros if it was left out
__global__ void __launch_bounds__(kRowThreads)
    gradient_kernel(const float* gradient, const float* logits, const int64_t* labels,
                    const float* cross_entropy, int64_t num_rows, int num_classes, float* out) {
  const int64_t i = (int64_t(blockIdx.x) * kRowThreads + threadIdx.x) / 32;
  if (i >= num_rows) return;
  const float* row = logits + i * num_classes;
  const bool counts = cross_entropy[i] != 0;  // of the whole warp
  const Softmax s = counts ? softmax_of_row(row, num_classes) : Softmax{};
  for (int c = threadIdx.x % 32; c < num_classes; c += 32)
    out[i * num_classes + c] =
        counts ? gradient[i] * (expf(row[c] - s.top) / s.sum - (c == labels[i])) : 0;
}

int64_t row_blocks(int64_t num_rows, int64_t num_classes) {
  const int64_t blocks = divide_up(num_rows, kRowThreads / 32);
  STD_TORCH_CHECK(max(blocks, num_classes) < INT32_MAX - 32, "mined_cross_entropy: ", num_rows,
                  " priors in the batch and ", num_classes, " classes are too many");
  return blocks;
}

Tensor mined_cross_entropy(const Tensor& logits, const Tensor& labels,
                           int64_t negatives_per_positive) {
  const OnDeviceOf device(logits);
  const Tensor x = torch::stable::contiguous(logits), y = torch::stable::contiguous(labels);
  const int64_t n = x.size(0), p = x.size(1), c = x.size(2);
  STD_TORCH_CHECK(y.numel() == n * p && p < INT32_MAX - kThreads,
                  "mined_cross_entropy: logits (N,P,C) and labels (N,P) of one N and P");
  Tensor result = torch::stable::new_empty(x, {n, p});
  if (n * p == 0) return result;
  Tensor keys = torch::stable::new_empty(x, {n, p}, ScalarType::Int);
  float* out = result.mutable_data_ptr<float>();
  unsigned* key = reinterpret_cast<unsigned*>(keys.mutable_data_ptr<int>());
  LAUNCH(row_kernel, row_blocks(n * p, c), kRowThreads, 0, device.stream)(
      x.const_data_ptr<float>(), y.const_data_ptr<int64_t>(), n * p, int(c), out, key);
  CHECK_LAUNCH();
  LAUNCH(mine_kernel, n, kThreads, 0, device.stream)(key, int(p), negatives_per_positive, out);
  CHECK_LAUNCH();
  return result;
}

Tensor backward(const Tensor& gradient, const Tensor& logits, const Tensor& labels,
                const Tensor& cross_entropy) {
  const OnDeviceOf device(logits);
  const Tensor g = torch::stable::contiguous(gradient), x = torch::stable::contiguous(logits);
  const Tensor y = torch::stable::contiguous(labels), ce = torch::stable::contiguous(cross_entropy);
  const int64_t rows = y.numel(), c = x.size(2);
  STD_TORCH_CHECK(g.numel() == rows && ce.numel() == rows && x.numel() == rows * c,
                  "mined_cross_entropy_backward: inputs differ in N or P");
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1), c});
  if (rows == 0) return result;
  LAUNCH(gradient_kernel, row_blocks(rows, c), kRowThreads, 0, device.stream)(
      g.const_data_ptr<float>(), x.const_data_ptr<float>(), y.const_data_ptr<int64_t>(),
      ce.const_data_ptr<float>(), rows, int(c), result.mutable_data_ptr<float>());
  CHECK_LAUNCH();
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) {
  m.impl("mined_cross_entropy", TORCH_BOX(&mined_cross_entropy));
  m.impl("mined_cross_entropy_backward", TORCH_BOX(&backward));
}
