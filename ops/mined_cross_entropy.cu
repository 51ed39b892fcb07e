// ops.mined_cross_entropy for CUDA: two launches a batch, and one for the gradient
// (reference.mined_cross_entropy is the meaning).
//
//   logits (N,P,C) --row_kernel--> cross_entropy (N,P)   a thread a row, of a tile in shared memory
//                                  keys (N,P)            hardness of a negative, 0 of a positive
//                 --mine_kernel--> cross_entropy (N,P)   a block an image: the border by radix
//                                                        selection, zeros below it
// A key is the bits of the cross-entropy + 1: it is >= 0, where bits rise with the number.
// Logits of two bytes are read as they are, and so is their gradient written.
#include "rows.h"
#include "select.h"

namespace {

constexpr int kThreads = threads(1024, 64);  // of the mine kernel
constexpr int kRows = threads(128, 64);      // rows of a block of the row kernel, at most
constexpr int kZeros = threads(256, 64);     // of the gradient kernel

// grid (ceil(N P / rows)), thread = one row
template <typename T>
__global__ void __launch_bounds__(kRows)
    row_kernel(const T* logits, const int64_t* labels, int64_t num_rows, int num_classes,
               int rows, float* cross_entropy, unsigned* keys) {
  DYNAMIC_SHARED(float, tile);
  const int64_t first = int64_t(blockIdx.x) * rows, i = first + threadIdx.x;
  const int here = int(min(int64_t(rows), num_rows - first));
  load_rows<kRows>(logits + first * num_classes, here * num_classes, num_classes, tile);
  if (threadIdx.x >= here) return;
  const float* row = tile + threadIdx.x * (num_classes | 1);
  float top = -INFINITY, sum = 0;
  for (int c = 0; c < num_classes; ++c) top = fmaxf(top, row[c]);
  for (int c = 0; c < num_classes; ++c) sum += expf(row[c] - top);  // NaN where a logit is, or inf
  const int64_t label = labels[i];  // no check before the launch: a wrong one gives NaN
  const float own = 0 <= label && label < num_classes ? row[label] : NAN;
  const float value = logf(sum) - (own - top);
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
  int negatives = 0;
  visit_keys<kThreads>(keys, num_priors, [&](Key) { ++negatives; });
  const int visited = t < num_priors ? (num_priors - t - 1) / kThreads + 1 : 0;
  atomicAdd(&positives, visited - negatives);
  __syncthreads();
  const int64_t most = num_priors, wanted = min(negatives_per_positive, most) * positives;
  const Key border = wanted == 0 ? ~Key(0) : select<kThreads>(keys, num_priors, int(min(wanted, most)));
  visit_keys<kThreads>(keys, num_priors, [&](Key key) {
    const unsigned p = index_of(key);
    if (key < border && is_finite(cross_entropy[p])) cross_entropy[p] = 0;
  });
}

struct Softmax {  // of one row: exp(logit - top) / sum
  float top, sum;
};

// Every lane gets the same. A NaN or an infinite logit makes the sum NaN.
template <typename T>
__device__ Softmax softmax_of_row(const T* row, int num_classes) {
  Softmax s = {-INFINITY, 0};
  for (int c = threadIdx.x % 32; c < num_classes; c += 32) {
    const float logit = as_float(row[c]);
    s.top = logit > s.top ? logit : s.top;
  }
  for (int step = 16; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, s.top, step);
    s.top = other > s.top ? other : s.top;
  }
  for (int c = threadIdx.x % 32; c < num_classes; c += 32) s.sum += expf(as_float(row[c]) - s.top);
  for (int step = 16; step > 0; step /= 2) s.sum += __shfl_xor_sync(kFullWarp, s.sum, step);
  return s;
}

// grid (ceil(N P / kZeros)), warp = 32 rows: one row in a hundred counts. So the warp writes zeros
// over all 32, and then softmax - one-hot into those that count, one after the other.
template <typename T>
__global__ void __launch_bounds__(kZeros)
    gradient_kernel(const float* gradient, const T* logits, const int64_t* labels,
                    const float* cross_entropy, int64_t num_rows, int num_classes, T* out) {
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * kZeros + threadIdx.x / 32 * 32;
  if (first >= num_rows) return;
  const int rows = int(min(int64_t(32), num_rows - first));
  T* zeros = out + first * num_classes;
#pragma unroll 8
  for (int k = lane; k < rows * num_classes; k += 32) zeros[k] = T(0.0f);
  __syncwarp();  // before another lane writes there
  const bool counts = lane < rows && cross_entropy[first + lane] != 0;  // NaN is not 0
  for (unsigned left = __ballot_sync(kFullWarp, counts); left != 0; left &= left - 1) {
    const int64_t i = first + __ffs(left) - 1;
    const T* row = logits + i * num_classes;
    const Softmax s = softmax_of_row(row, num_classes);
    for (int c = lane; c < num_classes; c += 32) {
      const float share = expf(as_float(row[c]) - s.top) / s.sum;
      out[i * num_classes + c] = T(gradient[i] * (share - (c == labels[i])));
    }
  }
}

int64_t row_blocks(int64_t num_rows, int64_t num_classes, int in_a_block) {
  const int64_t blocks = divide_up(num_rows, in_a_block);
  STD_TORCH_CHECK(max(blocks, 64 * num_classes) < INT32_MAX, "mined_cross_entropy: ", num_rows,
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
  Tensor result = torch::stable::new_empty(x, {n, p}, ScalarType::Float);
  if (n * p == 0) return result;
  Tensor keys = torch::stable::new_empty(x, {n, p}, ScalarType::Int);
  float* out = result.mutable_data_ptr<float>();
  unsigned* key = reinterpret_cast<unsigned*>(keys.mutable_data_ptr<int>());
  const int64_t rows = rows_of_a_block(kRows, c, "mined_cross_entropy");
  with_type(x, "mined_cross_entropy", [&]<typename T>(const T* logit) {
    LAUNCH(row_kernel<T>, row_blocks(n * p, c, rows), kRows, rows * (c | 1) * sizeof(float),
           device.stream)(logit, y.const_data_ptr<int64_t>(), n * p, int(c), int(rows), out, key);
  });
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
  with_type(x, "mined_cross_entropy", [&]<typename T>(const T* logit) {
    LAUNCH(gradient_kernel<T>, row_blocks(rows, c, kZeros), kZeros, 0, device.stream)(
        g.const_data_ptr<float>(), logit, y.const_data_ptr<int64_t>(), ce.const_data_ptr<float>(),
        rows, int(c), static_cast<T*>(result.mutable_data_ptr()));
  });
  CHECK_LAUNCH();
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) {
  m.impl("mined_cross_entropy", TORCH_BOX(&mined_cross_entropy));
  m.impl("mined_cross_entropy_backward", TORCH_BOX(&backward));
}
