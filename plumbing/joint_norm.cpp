// BatchNorm, and the ReLU behind it, of one part of a batch whose parts are computed by several
// threads at once: sums over its own part, a meeting with the other threads, one pass over its part.
//
//   forward   mean, var of all parts;  y = max(0, weight * n + bias),  n = (x - mean) / std
//   backward  g = dy where y > 0;      dx = weight / std * (g - (sum(g) + n * sum(g * n)) / count)
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Values = std::vector<double>;
enum { DONE = 0, ABORTED = 1, APART = 2 };

// Where threads exchange values. Who waits, sleeps.
struct Meeting {
  std::mutex mutex;
  std::condition_variable changed;
  const int parts;
  int arrived = 0;
  int64_t round = 0;
  bool aborted = false;
  std::vector<int64_t> rounds;  // of each part
  // Two tables in turns: who is through one meeting may be at the next, but not beyond, while
  // others still read.
  std::vector<Values> tables[2];
  std::vector<int64_t> places[2];

  explicit Meeting(int n) : parts(n), rounds(n) {
    for (int i : {0, 1}) tables[i].resize(n), places[i].resize(n);
  }

  void start() {  // while no thread is in it
    arrived = 0, aborted = false;
    std::fill(rounds.begin(), rounds.end(), 0);
  }

  void abort() {
    const std::lock_guard lock(mutex);
    aborted = true;
    changed.notify_all();
  }

  // `values` becomes the sum over the parts, in their order; all must have come to one `place`.
  // `combine(sum, values of a part)` adds.
  template <class Combine>
  int meet(int part, int64_t place, Values& values, Combine combine) {
    auto& table = tables[rounds[part] % 2];
    auto& where = places[rounds[part]++ % 2];
    table[part] = values;
    where[part] = place;
    {
      std::unique_lock lock(mutex);
      const int64_t mine = round;
      if (++arrived == parts) {
        arrived = 0, ++round;
        changed.notify_all();
      }
      changed.wait(lock, [&] { return aborted || round != mine; });
      if (round == mine) return ABORTED;
    }
    for (int64_t p : where)
      if (p != place) return APART;
    values = table[0];
    for (int i = 1; i < parts; ++i) combine(values, table[i]);
    return DONE;
  }
};

#pragma GCC diagnostic ignored "-Wpsabi"  // no vector leaves this file
#ifdef __AVX512F__
constexpr int LANES = 16;  // channels that are computed at once: a register of floats
#else
constexpr int LANES = 8;  // twice as many would go through memory
#endif

template <class W>
struct VecOf {
  typedef W type __attribute__((vector_size(LANES * sizeof(W))));
};
template <>
struct VecOf<BFloat16> : VecOf<float> {};
template <class W>
using Vec = typename VecOf<W>::type;

// `n` values of memory, or all LANES; the others are 0.
template <class W>
inline Vec<W> load(const W* from, int n = LANES) {
  Vec<W> v = {};
  std::memcpy(&v, from, n * sizeof(W));
  return v;
}

template <class W>
inline void store(W* to, Vec<W> v, int n = LANES) {
  std::memcpy(to, &v, n * sizeof(W));
}

inline Vec<float> load(const BFloat16* from, int n = LANES) {  // the upper half of a float
  const auto wide = __builtin_convertvector(load((const uint16_t*)from, n), Vec<uint32_t>) << 16;
  return (Vec<float>)wide;
}

inline void store(BFloat16* to, Vec<float> v, int n = LANES) {  // to nearest, ties to even
  const auto bits = (Vec<uint32_t>)v;
  const auto rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto half = v == v ? rounded : rounded * 0 + 0x7fc0;  // NaN stays NaN
  store((uint16_t*)to, __builtin_convertvector(half, Vec<uint16_t>), n);
}

// What one BatchNorm has to do; T of the images, W of the parameters.
template <class T, class W>
struct Norm {
  using V = Vec<W>;
  const T* x;
  int64_t rows, channels;
  const W *weight, *bias;
  W *mean, *scale;  // of the whole batch: out of forward, into backward; scale = 1 / std
  bool relu;

  // work(n, c, first, last) for pieces of 64 rows and n = LANES channels (or what is left of them)
  // from c on: what a thread reads twice is still in its cache.
  template <class Work>
  void pieces(Work work) const {
    for (int64_t first = 0; first < rows; first += 64) {
      const int64_t last = std::min(rows, first + 64);
      int64_t c = 0;
      for (; c + LANES <= channels; c += LANES)
        work(std::integral_constant<int, LANES>(), c, first, last);
      if (c < channels) work((int)(channels - c), c, first, last);
    }
  }

  static void add(Values& to, int64_t c, V values, int n) {
    for (int i = 0; i < n; ++i) to[c + i] += values[i];
  }

  int forward(Meeting& meeting, int part, int64_t place, T* y, W* running_mean, W* running_var,
              double momentum, double eps) const {
    Values sum(channels), squares(channels), values{(double)rows};  // of x - its first row
    pieces([&](auto n, int64_t c, int64_t first, int64_t last) {
      const V from = load(x + c, n);
      V s = {}, q = {};
      for (int64_t r = first; r < last; ++r) {
        const V d = load(x + r * channels + c, n) - from;
        s += d, q += d * d;
      }
      add(sum, c, s, n), add(squares, c, q, n);
    });
    for (int64_t c = 0; c < channels; ++c) {
      values.push_back((W)x[c] + sum[c] / rows);                // mean
      values.push_back(squares[c] - sum[c] * (sum[c] / rows));  // sum of squares around it
    }
    const int code = meeting.meet(part, place, values, [&](Values& all, const Values& more) {
      const double total = all[0] + more[0];
      for (int64_t c = 0; c < channels; ++c) {
        const double apart = more[1 + 2 * c] - all[1 + 2 * c];
        all[1 + 2 * c] += apart * (more[0] / total);
        all[2 + 2 * c] += more[2 + 2 * c] + apart * apart * (all[0] * more[0] / total);
      }
      all[0] = total;
    });
    if (code != DONE) return code;
    for (int64_t c = 0; c < channels; ++c) {
      const double total = values[0], m = values[1 + 2 * c], around = values[2 + 2 * c];
      mean[c] = m, scale[c] = 1 / std::sqrt(around / total + eps);
      if (part == 0) {  // the buffers are those of all parts
        running_mean[c] += momentum * (m - running_mean[c]);
        running_var[c] += momentum * (around / std::max(1.0, total - 1) - running_var[c]);
      }
    }
    pieces([&](auto n, int64_t c, int64_t first, int64_t last) {
      const V slope = load(weight + c, n) * load(scale + c, n);
      const V shift = load(bias + c, n) - load(mean + c, n) * slope;
      for (int64_t r = first; r < last; ++r) {
        const V value = load(x + r * channels + c, n) * slope + shift;
        store(y + r * channels + c, relu ? (value < 0 ? V{} : value) : value, n);
      }
    });
    return DONE;
  }

  int backward(Meeting& meeting, int part, int64_t place, const T* dy, T* dx, W* to_weight,
               W* to_bias) const {
    Values sum(channels), products(channels), values{(double)rows};  // of g, of g * (x - mean)
    pieces([&](auto n, int64_t c, int64_t first, int64_t last) {
      const V middle = load(mean + c, n), slope = load(weight + c, n) * load(scale + c, n);
      const V shift = load(bias + c, n) - middle * slope;
      V s = {}, q = {};
      for (int64_t r = first; r < last; ++r) {
        const V value = load(x + r * channels + c, n), up = load(dy + r * channels + c, n);
        const V g = relu ? (value * slope + shift <= 0 ? V{} : up) : up;
        s += g, q += g * (value - middle);
      }
      add(sum, c, s, n), add(products, c, q, n);
    });
    std::vector<W> times(channels), plus(channels);  // of x, and beside it
    for (int64_t c = 0; c < channels; ++c) {
      to_bias[c] = sum[c], to_weight[c] = products[c] * scale[c];
      values.push_back(sum[c]);
      values.push_back(products[c] * scale[c]);
    }
    const int code = meeting.meet(part, place, values, [](Values& all, const Values& more) {
      for (size_t i = 0; i < all.size(); ++i) all[i] += more[i];
    });
    if (code != DONE) return code;
    for (int64_t c = 0; c < channels; ++c) {
      const double factor = -(double)weight[c] * scale[c] / values[0];
      times[c] = factor * values[2 + 2 * c] * scale[c];
      plus[c] = factor * values[1 + 2 * c] - mean[c] * times[c];
    }
    pieces([&](auto n, int64_t c, int64_t first, int64_t last) {
      const V slope = load(weight + c, n) * load(scale + c, n);
      const V shift = load(bias + c, n) - load(mean + c, n) * slope;
      const V by = load(times.data() + c, n), beside = load(plus.data() + c, n);
      for (int64_t r = first; r < last; ++r) {
        const V value = load(x + r * channels + c, n), up = load(dy + r * channels + c, n);
        const V g = relu ? (value * slope + shift <= 0 ? V{} : up) : up;
        store(dx + r * channels + c, g * slope + (value * by + beside), n);
      }
    });
    return DONE;
  }
};

// Call with the Norm of these tensors. x is channels_last.
template <class Call>
void with_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
               const Tensor& scale, bool relu, Call call) {
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  const auto run = [&]<class T, class W>(T*, W*) {
    const Norm<T, W> norm{(const T*)x.const_data_ptr(), rows, channels,
                          weight.const_data_ptr<W>(),   bias.const_data_ptr<W>(),
                          mean.mutable_data_ptr<W>(),   scale.mutable_data_ptr<W>(), relu};
    const int code = call(norm);
    STD_TORCH_CHECK(code != ABORTED, "another part of the batch failed");
    STD_TORCH_CHECK(code != APART, "another part of the batch is at another layer");
  };
  if (x.scalar_type() == ScalarType::BFloat16) run((BFloat16*)nullptr, (float*)nullptr);
  else if (x.scalar_type() == ScalarType::Double) run((double*)nullptr, (double*)nullptr);
  else run((float*)nullptr, (float*)nullptr);
}

// -> y, and for `backward` mean and scale
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, Tensor running_mean,
                                           Tensor running_var, int64_t meeting, int64_t part,
                                           int64_t place, bool relu, double momentum, double eps) {
  const Tensor y = torch::stable::empty_like(x);
  const Tensor mean = torch::stable::empty_like(weight), scale = torch::stable::empty_like(weight);
  with_norm(x, weight, bias, mean, scale, relu, [&]<class T, class W>(const Norm<T, W>& norm) {
    return norm.forward(*(Meeting*)meeting, part, 2 * place, (T*)y.mutable_data_ptr(),
                        running_mean.mutable_data_ptr<W>(), running_var.mutable_data_ptr<W>(),
                        momentum, eps);
  });
  return {y, mean, scale};
}

// -> the gradients of x, weight and bias
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& x,
                                            const Tensor& weight, const Tensor& bias,
                                            const Tensor& mean, const Tensor& scale,
                                            int64_t meeting, int64_t part, int64_t place,
                                            bool relu) {
  const Tensor dx = torch::stable::empty_like(x), to_weight = torch::stable::empty_like(weight);
  const Tensor to_bias = torch::stable::empty_like(weight);
  with_norm(x, weight, bias, mean, scale, relu, [&]<class T, class W>(const Norm<T, W>& norm) {
    return norm.backward(*(Meeting*)meeting, part, 2 * place + 1, (const T*)dy.const_data_ptr(),
                         (T*)dx.mutable_data_ptr(), to_weight.mutable_data_ptr<W>(),
                         to_bias.mutable_data_ptr<W>());
  });
  return {dx, to_weight, to_bias};
}

int64_t meeting(int64_t parts) { return (int64_t) new Meeting(parts); }
void meeting_start(int64_t meeting) { ((Meeting*)meeting)->start(); }
void meeting_abort(int64_t meeting) { ((Meeting*)meeting)->abort(); }
void meeting_end(int64_t meeting) { delete (Meeting*)meeting; }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(scratchdet, m) {
  m.def("joint_norm(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, "
        "int meeting, int part, int place, bool relu, float momentum, float eps) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("joint_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
        "Tensor scale, int meeting, int part, int place, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("meeting(int parts) -> int");
  m.def("meeting_start(int meeting) -> ()");
  m.def("meeting_abort(int meeting) -> ()");
  m.def("meeting_end(int meeting) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) {
  m.impl("joint_norm", TORCH_BOX(&forward));
  m.impl("joint_norm_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CompositeExplicitAutograd, m) {
  m.impl("meeting", TORCH_BOX(&meeting));
  m.impl("meeting_start", TORCH_BOX(&meeting_start));
  m.impl("meeting_abort", TORCH_BOX(&meeting_abort));
  m.impl("meeting_end", TORCH_BOX(&meeting_end));
}
