// BatchNorm, and the ReLU behind it, of one part of a batch whose parts are computed by several
// threads at once: sums over the own part, a meeting with the other threads, one pass over the own
// part. Forward and backward are C++, so that no thread waits for Python's lock.
//
//   forward   mean, var of all parts;  y = max(0, weight * n + bias),  n = (x - mean) / std
//   backward  g = dy where y > 0;      dx = weight / std * (g - (sum(g) + n * sum(g * n)) / count)
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <vector>

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace {

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
      if (aborted) return ABORTED;
    }
    for (int64_t p : where)
      if (p != place) return APART;
    values = table[0];
    for (int i = 1; i < parts; ++i) combine(values, table[i]);
    return DONE;
  }
};

// What one BatchNorm has to do; T of the images, W of the parameters.
template <class T, class W>
struct Norm {
  const T* x;
  int64_t rows, channels;
  const W *weight, *bias;
  W *mean, *scale;  // of the whole batch: out of forward, into backward; scale = 1 / std
  bool relu;

  // Sums of terms(row, channel, &a, &b) over the rows: floats of 64 rows, then doubles.
  template <int C, class Terms>
  void sums(Values& a, Values& b, Terms terms) const {
    const int64_t n = C ? C : channels;
    std::vector<W> part(2 * n);
    W *s = part.data(), *q = s + n;
    for (int64_t start = 0; start < rows; start += 64) {
      std::fill(part.begin(), part.end(), W(0));
      const int64_t end = std::min(rows, start + 64);
      if constexpr (C > 0) {  // in registers
        W u[C] = {}, v[C] = {};
        for (int64_t r = start; r < end; ++r)
          for (int c = 0; c < C; ++c) terms(r * C + c, c, u[c], v[c]);
        for (int c = 0; c < C; ++c) s[c] = u[c], q[c] = v[c];
      } else {
        for (int64_t r = start; r < end; ++r)
          for (int64_t c = 0; c < n; ++c) terms(r * n + c, c, s[c], q[c]);
      }
      for (int64_t c = 0; c < n; ++c) a[c] += s[c], b[c] += q[c];
    }
  }

  template <int C>
  int forward(Meeting& meeting, int part, int64_t place, T* y, W* running_mean, W* running_var,
              double momentum, double eps) const {
    const int64_t n = C ? C : channels;
    Values s(n), q(n), values{(double)rows};
    std::vector<W> shift(n);
    for (int64_t c = 0; c < n; ++c) shift[c] = x[c];
    const W* from = shift.data();
    const T* in = x;
    sums<C>(s, q, [=](int64_t i, int64_t c, W& a, W& b) {
      const W d = (W)in[i] - from[c];
      a += d, b += d * d;
    });
    for (int64_t c = 0; c < n; ++c) {
      values.push_back(shift[c] + s[c] / rows);        // mean
      values.push_back(q[c] - s[c] * (s[c] / rows));   // sum of squares around it
    }
    const int code = meeting.meet(part, place, values, [n](Values& all, const Values& more) {
      const double total = all[0] + more[0];
      for (int64_t c = 0; c < n; ++c) {
        const double apart = more[1 + 2 * c] - all[1 + 2 * c];
        all[1 + 2 * c] += apart * (more[0] / total);
        all[2 + 2 * c] += more[2 + 2 * c] + apart * apart * (all[0] * more[0] / total);
      }
      all[0] = total;
    });
    if (code != DONE) return code;
    const double total = values[0];
    std::vector<W> slope(n), at(n);
    for (int64_t c = 0; c < n; ++c) {
      const double m = values[1 + 2 * c], squares = values[2 + 2 * c];
      mean[c] = m, scale[c] = 1 / std::sqrt(squares / total + eps);
      slope[c] = weight[c] * scale[c], at[c] = bias[c] - mean[c] * slope[c];
      if (part == 0) {  // the buffers are those of all parts
        running_mean[c] += momentum * (m - running_mean[c]);
        running_var[c] += momentum * (squares / std::max(1.0, total - 1) - running_var[c]);
      }
    }
    const W *k = slope.data(), *b = at.data(), low = relu ? W(0) : W(-INFINITY);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const W value = (W)in[r * n + c] * k[c] + b[c];
        y[r * n + c] = value < low ? low : value;  // a NaN stays one
      }
    return DONE;
  }

  template <int C>
  int backward(Meeting& meeting, int part, int64_t place, const T* dy, T* dx, W* to_weight,
               W* to_bias) const {
    const int64_t n = C ? C : channels;
    std::vector<W> slope(n), at(n), own(n), times(n), plus(n);
    for (int64_t c = 0; c < n; ++c)
      slope[c] = weight[c] * scale[c], at[c] = bias[c] - mean[c] * slope[c];
    const W *k = slope.data(), *b = at.data(), *m = mean, low = relu ? W(0) : W(-INFINITY);
    const T* in = x;
    Values s(n), q(n);
    sums<C>(s, q, [=](int64_t i, int64_t c, W& a, W& e) {
      const W value = in[i], g = value * k[c] + b[c] <= low ? W(0) : (W)dy[i];
      a += g, e += g * (value - m[c]);
    });
    Values values{(double)rows};
    for (int64_t c = 0; c < n; ++c) {
      to_bias[c] = s[c], to_weight[c] = q[c] * scale[c];
      values.push_back(s[c]);
      values.push_back(q[c] * scale[c]);
    }
    const int code = meeting.meet(part, place, values, [](Values& all, const Values& more) {
      for (size_t i = 0; i < all.size(); ++i) all[i] += more[i];
    });
    if (code != DONE) return code;
    for (int64_t c = 0; c < n; ++c) {
      const double factor = -slope[c] / values[0];
      times[c] = factor * values[2 * c + 2] * scale[c];
      plus[c] = factor * values[2 * c + 1] - mean[c] * times[c];
    }
    const W *t = times.data(), *p = plus.data();
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < n; ++c) {
        const int64_t i = r * n + c;
        const W value = in[i], g = value * k[c] + b[c] <= low ? W(0) : (W)dy[i];
        dx[i] = g * k[c] + (value * t[c] + p[c]);
      }
    return DONE;
  }
};

using at::Tensor;
using torch::autograd::AutogradContext;

at::Tensor in_rows(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// Call with the Norm of these tensors, and its type.
template <class Call>
void with_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
               const Tensor& scale, bool relu, Call call) {
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  const auto run = [&]<class T, class W>(T*, W*) {
    const Norm<T, W> norm{x.const_data_ptr<T>(), rows, channels, weight.const_data_ptr<W>(),
                          bias.const_data_ptr<W>(), mean.mutable_data_ptr<W>(),
                          scale.mutable_data_ptr<W>(), relu};
    int code = DONE;
    if (channels == 16) code = call.template operator()<16, T, W>(norm);
    else if (channels == 32) code = call.template operator()<32, T, W>(norm);
    else code = call.template operator()<0, T, W>(norm);
    TORCH_CHECK(code != ABORTED, "another part of the batch failed");
    TORCH_CHECK(code != APART, "another part of the batch is at another layer");
  };
  if (x.scalar_type() == at::kBFloat16) run((at::BFloat16*)nullptr, (float*)nullptr);
  else if (x.scalar_type() == at::kDouble) run((double*)nullptr, (double*)nullptr);
  else run((float*)nullptr, (float*)nullptr);
}

struct JointNorm : torch::autograd::Function<JointNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& images, const Tensor& weight,
                        const Tensor& bias, const Tensor& running_mean, const Tensor& running_var,
                        int64_t meeting, int64_t part, int64_t place, bool relu, double momentum,
                        double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor x = in_rows(images), y = at::empty_like(x);
    const Tensor mean = at::empty_like(weight), scale = at::empty_like(weight);
    with_norm(x, weight, bias, mean, scale, relu, [&]<int C, class T, class W>(const auto& norm) {
      return norm.template forward<C>(*(Meeting*)meeting, part, 2 * place, y.mutable_data_ptr<T>(),
                                      running_mean.mutable_data_ptr<W>(),
                                      running_var.mutable_data_ptr<W>(), momentum, eps);
    });
    ctx->save_for_backward({x, weight, bias, mean, scale});
    for (auto& [name, value] : {std::pair{"meeting", meeting}, {"part", part}, {"place", place}})
      ctx->saved_data[name] = value;
    ctx->saved_data["relu"] = relu;
    return y;
  }

  static torch::autograd::variable_list backward(AutogradContext* ctx,
                                                 torch::autograd::variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], dy = in_rows(gradients[0]);
    const Tensor dx = at::empty_like(x);
    const Tensor to_weight = at::empty_like(weight), to_bias = at::empty_like(weight);
    const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
    Meeting& meeting = *(Meeting*)number("meeting");
    with_norm(x, weight, saved[2], saved[3], saved[4], ctx->saved_data["relu"].toBool(),
              [&]<int C, class T, class W>(const auto& norm) {
                return norm.template backward<C>(
                    meeting, number("part"), 2 * number("place") + 1, dy.const_data_ptr<T>(),
                    dx.mutable_data_ptr<T>(), to_weight.mutable_data_ptr<W>(),
                    to_bias.mutable_data_ptr<W>());
              });
    return {dx, to_weight, to_bias, {}, {}, {}, {}, {}, {}, {}, {}};
  }
};

Tensor joint_norm(const Tensor& x, const Tensor& weight, const Tensor& bias,
                  const Tensor& running_mean, const Tensor& running_var, int64_t meeting,
                  int64_t part, int64_t place, bool relu, double momentum, double eps) {
  return JointNorm::apply(x, weight, bias, running_mean, running_var, meeting, part, place, relu,
                          momentum, eps);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(scratchdet, m) {
  m.def("joint_norm(Tensor x, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, "
        "int meeting, int part, int place, bool relu, float momentum, float eps) -> Tensor");
  m.impl("joint_norm", c10::DispatchKey::AutogradCPU, joint_norm);
  m.def("meeting(int parts) -> int", [](int64_t n) { return (int64_t) new Meeting(n); });
  m.def("meeting_start(int meeting) -> ()", [](int64_t meeting) { ((Meeting*)meeting)->start(); });
  m.def("meeting_abort(int meeting) -> ()", [](int64_t meeting) { ((Meeting*)meeting)->abort(); });
  m.def("meeting_end(int meeting) -> ()", [](int64_t meeting) { delete (Meeting*)meeting; });
}
