// One in-place RMSProp step over a group of leaves, as an XLA FFI handler for CPUs.
//
// Operands: scalars (float32), counts (uint32), then for each leaf its gradient, parameter, moment
// (nu or var), mean where centered, and trace where there is momentum. Results: the same but for
// the gradient, each in the buffer of its operand. Statistics are float32 or bfloat16; everything
// else is float32.
//
// Every product that XLA contracts with the following sum is contracted here by name, and nothing
// else is, so that results equal those of the plain transformation.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONED
#endif

// What a thread takes at once, and what it moves through its first cache.
constexpr int64_t kBlock = 65536;
constexpr int64_t kTile = 1024;
// Fewer elements than this for each thread are not worth waking one.
constexpr int64_t kWorthAThread = 65536;

constexpr float kSmallestNormal = std::numeric_limits<float>::min();
constexpr float kLargestBfloat16 = 0x1.fep127f;

enum Momentum : int32_t { kNone = 0, kHeavyBall = 1, kNesterov = 2 };

struct Scalars {
  float rate;            // minus the learning rate
  float decay;
  float complement;      // 1 - decay
  float eps_in_root;
  float eps_outside;
  float momentum;
  float weight;          // the sum of the averaging weights before this step
  float share_before;    // of the squared deviation in the variance: from the mean before the step,
  float share_after;     // and from that after it
  float unit_before;
  float unit_reciprocal; // of the unit after this step
};
constexpr int64_t kScalars = sizeof(Scalars) / sizeof(float);

// `lowbias32` of C. Wellons, as in rmsprop_jax/storage/_rounding.py.
inline uint32_t Hashed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

template <typename To, typename From>
inline To BitCast(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

CLONED void Decode(const uint16_t* __restrict stored, float unit, int64_t n, float* __restrict x) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = BitCast<float>(static_cast<uint32_t>(stored[i]) << 16) * unit;
  }
}

CLONED void Encode(const float* __restrict x, float unit_reciprocal, uint32_t salt, uint32_t first,
                   int64_t n, uint16_t* __restrict stored) {
  constexpr uint32_t kLow = 0x04800000u;   // 2^-118
  constexpr uint32_t kHigh = 0x7F7F0000u;  // the largest bfloat16
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t whole = BitCast<uint32_t>(x[i] * unit_reciprocal);
    const uint32_t sign = whole & 0x80000000u;
    const uint32_t magnitude = whole ^ sign;
    const uint32_t noise = Hashed((first + static_cast<uint32_t>(i)) ^ salt) >> 16;
    uint32_t rounded = magnitude < kLow ? kLow : magnitude;
    rounded = (rounded > kHigh ? kHigh : rounded) + noise;
    const bool plain = magnitude != 0 && magnitude < 0x7F800000u;
    stored[i] = static_cast<uint16_t>(((plain ? rounded : magnitude) | sign) >> 16);
  }
}

// kRounded tells how the moment is stored.
template <bool kCentered, bool kCorrected, bool kRounded, Momentum kMomentum>
CLONED void Advance(const Scalars& scalars, int64_t n, const float* __restrict grad,
                    float* __restrict param, float* __restrict moment, float* __restrict mean,
                    float* __restrict trace) {
  const Scalars s = scalars;
  const float largest = kRounded ? kLargestBfloat16 * s.unit_before
                                : std::numeric_limits<float>::infinity();
  // As XLA does where it computes the weight for each leaf.
  const float weight = __builtin_fmaf(s.decay, s.weight, s.complement);
  const float share = kRounded ? s.share_before : s.share_after;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i];
    float average;
    if constexpr (kCentered) {
      const float old_mu = mean[i];
      const float mu = __builtin_fmaf(g - old_mu, s.complement, old_mu);
      const float deviation = g - (kRounded ? old_mu : mu);
      const bool saturated = moment[i] >= largest;
      const float var =
          __builtin_fmaf(s.decay, moment[i], (deviation * share) * deviation);
      mean[i] = mu;
      moment[i] = var;
      average = var + (saturated ? mu * mu : 0.0f);
    } else {
      // Of the two products it contracts the one that is not scaled before.
      const float square = g * g;
      const float nu =
          kRounded ? __builtin_fmaf(s.complement, square, s.decay * moment[i])
                  : __builtin_fmaf(s.decay, moment[i], s.complement * square);
      moment[i] = nu;
      average = kCorrected ? nu / weight : nu;
    }
    const float radicand = average + s.eps_in_root;
    const bool flat = radicand < kSmallestNormal;
    const float root = (flat ? 0.0f : __builtin_sqrtf(flat ? 1.0f : radicand)) + s.eps_outside;
    const bool vanishes = root < kSmallestNormal;
    const float quotient = g / (vanishes ? 1.0f : root);
    const float direction = vanishes ? 0.0f : quotient;
    if constexpr (kMomentum == kNone) {
      param[i] = __builtin_fmaf(direction, s.rate, param[i]);
    } else {
      const float step = direction * s.rate;
      const float velocity = __builtin_fmaf(trace[i], s.momentum, step);
      trace[i] = velocity;
      param[i] = param[i] + (kMomentum == kNesterov
                                 ? __builtin_fmaf(velocity, s.momentum, step)
                                 : velocity);
    }
  }
}

using Step = void (*)(const Scalars&, int64_t, const float*, float*, float*, float*, float*);

template <bool kCentered, bool kCorrected, bool kRounded>
Step ChooseMomentum(int32_t momentum) {
  switch (momentum) {
    case kNone: return Advance<kCentered, kCorrected, kRounded, kNone>;
    case kHeavyBall: return Advance<kCentered, kCorrected, kRounded, kHeavyBall>;
    default: return Advance<kCentered, kCorrected, kRounded, kNesterov>;
  }
}

template <bool kRounded>
Step Choose(bool centered, bool corrected, int32_t momentum) {
  return centered    ? ChooseMomentum<true, false, kRounded>(momentum)
         : corrected ? ChooseMomentum<false, true, kRounded>(momentum)
                     : ChooseMomentum<false, false, kRounded>(momentum);
}

// One stored statistic of one leaf.
struct Stored {
  void* data = nullptr;
  bool rounded = false;
  uint32_t salt = 0;
  float unit_before = 1.0f;
  float unit_reciprocal = 1.0f;

  // Where the numbers of a tile are: in place, or decoded into a buffer.
  float* Open(int64_t first, int64_t n, float* buffer) const {
    if (data == nullptr) return nullptr;
    if (!rounded) return static_cast<float*>(data) + first;
    Decode(static_cast<const uint16_t*>(data) + first, unit_before, n, buffer);
    return buffer;
  }

  void Close(int64_t first, int64_t n, const float* buffer) const {
    if (!rounded) return;
    Encode(buffer, unit_reciprocal, salt, static_cast<uint32_t>(first), n,
           static_cast<uint16_t*>(data) + first);
  }
};

struct Leaf {
  const float* grad;
  float* param;
  Stored moment, mean, trace;
  Step step;
  int64_t size;
};

struct Block {
  size_t leaf;
  int64_t first;
};

// The work of one call. Threads take blocks until none is left; the caller takes part, so that it
// never waits for a thread that has not begun.
struct Work {
  Scalars scalars;
  std::vector<Leaf> leaves;
  std::vector<Block> blocks;
  std::atomic<size_t> next{0};
  std::atomic<size_t> finished{0};
  std::mutex mutex;
  std::condition_variable all_finished;

  void Run(const Block& block) const {
    const Leaf& leaf = leaves[block.leaf];
    const int64_t end = std::min(block.first + kBlock, leaf.size);
    const bool rounded = leaf.moment.rounded || leaf.mean.rounded || leaf.trace.rounded;
    const int64_t tile = rounded ? kTile : kBlock;
    alignas(64) float moments[kTile], means[kTile], traces[kTile];
    for (int64_t first = block.first; first < end; first += tile) {
      const int64_t n = std::min(tile, end - first);
      float* moment = leaf.moment.Open(first, n, moments);
      float* mean = leaf.mean.Open(first, n, means);
      float* trace = leaf.trace.Open(first, n, traces);
      leaf.step(scalars, n, leaf.grad + first, leaf.param + first, moment, mean, trace);
      leaf.moment.Close(first, n, moment);
      leaf.mean.Close(first, n, mean);
      leaf.trace.Close(first, n, trace);
    }
  }

  void TakeBlocks() {
    size_t taken = 0;
    for (size_t i; (i = next.fetch_add(1)) < blocks.size(); ++taken) Run(blocks[i]);
    if (taken > 0 && finished.fetch_add(taken) + taken == blocks.size()) {
      std::lock_guard<std::mutex> lock(mutex);
      all_finished.notify_all();
    }
  }
};

ffi::Error Apply(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                 bool centered, bool corrected, int32_t momentum,
                 ffi::Span<const int64_t> keys) {
  const size_t kept = 1 + centered + (momentum != kNone);
  const size_t operands = 2 + kept, outputs = 1 + kept;
  const auto scalars = args.get<ffi::Buffer<ffi::F32>>(0);
  const auto counts = args.get<ffi::Buffer<ffi::U32>>(1);
  if (!scalars || !counts || scalars->element_count() != kScalars ||
      counts->element_count() != 2 || (centered && corrected) || results.size() % outputs != 0 ||
      args.size() != 2 + results.size() / outputs * operands ||
      keys.size() != results.size() / outputs * kept) {
    return ffi::Error::InvalidArgument("rmsprop_jax_fused: unexpected operands.");
  }
  auto work = std::make_shared<Work>();
  std::memcpy(&work->scalars, scalars->typed_data(), sizeof(Scalars));
  const Scalars& s = work->scalars;

  int64_t total = 0;
  for (size_t leaf = 0; leaf < results.size() / outputs; ++leaf) {
    const auto grad = args.get<ffi::Buffer<ffi::F32>>(2 + leaf * operands);
    auto param = results.get<ffi::Buffer<ffi::F32>>(leaf * outputs);
    if (!grad || !param) {
      return ffi::Error::InvalidArgument("rmsprop_jax_fused: expected float32 gradients.");
    }
    Leaf one{grad->typed_data(), (*param)->typed_data(), {}, {}, {}, nullptr,
             static_cast<int64_t>(grad->element_count())};
    for (size_t k = 0; k < outputs; ++k) {
      const auto before = args.get<ffi::AnyBuffer>(2 + leaf * operands + 1 + k);
      auto after = results.get<ffi::AnyBuffer>(leaf * outputs + k);
      if (!before || !after || before->untyped_data() != (*after)->untyped_data()) {
        return ffi::Error::Internal("rmsprop_jax_fused: a result is not in its operand's place.");
      }
      if (k == 0) continue;
      const bool is_moment = k == 1, is_mean = centered && k == 2;
      Stored& stored = is_moment ? one.moment : is_mean ? one.mean : one.trace;
      stored.data = (*after)->untyped_data();
      stored.rounded = (*after)->element_type() == ffi::BF16;
      if (!stored.rounded) continue;
      const uint32_t key = static_cast<uint32_t>(keys[leaf * kept + k - 1]);
      const uint32_t count = counts->typed_data()[is_moment || is_mean ? 0 : 1];
      stored.salt = Hashed(count * 0x9E3779B9u + key);
      // Means and velocities are signed sums, which are no multiples of the unit.
      if (is_moment) {
        stored.unit_before = s.unit_before;
        stored.unit_reciprocal = s.unit_reciprocal;
      }
    }
    one.step = (one.moment.rounded ? Choose<true> : Choose<false>)(centered, corrected, momentum);
    for (int64_t first = 0; first < one.size; first += kBlock) {
      work->blocks.push_back({leaf, first});
    }
    work->leaves.push_back(one);
    total += one.size;
  }

  const int64_t helpers = std::min({pool.num_threads() - 1, total / kWorthAThread - 1,
                                    static_cast<int64_t>(work->blocks.size()) - 1});
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->TakeBlocks(); });
  work->TakeBlocks();
  if (helpers > 0) {
    std::unique_lock<std::mutex> lock(work->mutex);
    work->all_finished.wait(lock, [&] { return work->finished.load() == work->blocks.size(); });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(RmspropJaxFusedApply, Apply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<bool>("centered")
                                  .Attr<bool>("corrected")
                                  .Attr<int32_t>("momentum")
                                  .Attr<ffi::Span<const int64_t>>("keys"));

// An older JAX than the headers cannot register the handler, and would lose its CPU backend by that.
extern "C" int RmspropJaxFusedApiMinor() { return XLA_FFI_API_MINOR; }

// Without fused multiply-add the plain path rounds differently, and software is slow.
extern "C" int RmspropJaxFusedSupported() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}
