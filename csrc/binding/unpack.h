// Turns a record of numbers into an op's struct. Every number is checked here and every length is that of the live
// buffer, never one that JavaScript supplied: whatever a record holds, a kernel gets memory that is there.
#pragma once
#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "task.h"

namespace moe {

class Unpacker {
 public:
  Unpacker(const HandleTable<Buffer>& table, const double* record, size_t length, Task& task)
      : table_(table), next_(record), end_(record + length), task_(task) {}

  Status finish() {
    if (status_.ok() && next_ != end_) fail(Code::kInternal, "", "record longer than the op's fields");
    return std::move(status_);
  }

  using Shape = std::initializer_list<int64_t>;

  void dim(const char* name, int64_t& out) { out = whole(name, 0, int64_t{1} << 53); }

  void in(const char* name, Tensor& out, DTypes dtypes, Shape shape) { tensor(name, out, dtypes, shape, kRead); }
  void optional(const char* name, Tensor& out, DTypes dtypes, Shape shape) {
    tensor(name, out, dtypes, shape, kRead | kOptional);
  }
  // i64 in and out that the op only adds to, in whatever order.
  void optional_counters(const char* name, Tensor& out, Shape shape) {
    tensor(name, out, one(DType::kI64), shape, kRead | kWrite | kCount | kOptional);
  }
  void optional_like(const char* name, Tensor& out, const char*, const Tensor& like, Shape shape) {
    tensor(name, out, one(like.dtype), shape, kRead | kOptional);
  }
  void out(const char* name, Tensor& out, DTypes dtypes, Shape shape) { tensor(name, out, dtypes, shape, kWrite); }
  void optional_out(const char* name, Tensor& out, DTypes dtypes, Shape shape) {
    tensor(name, out, dtypes, shape, kWrite | kOptional);
  }
  void out_like(const char* name, Tensor& out, const char*, const Tensor& like, Shape shape) {
    tensor(name, out, one(like.dtype), shape, kWrite);
  }
  void optional_out_like(const char* name, Tensor& out, const char*, const Tensor& like, Shape shape) {
    tensor(name, out, one(like.dtype), shape, kWrite | kOptional);
  }
  void experts(const char* name, Experts& out, int64_t S, int64_t H, int64_t I) { packed(name, out, S, H, I, kRead); }
  void inout_experts(const char* name, Experts& out, int64_t S, int64_t H, int64_t I) {
    packed(name, out, S, H, I, kRead | kWrite);
  }
  void count(const char* name, Count& out, int64_t limit) {
    Tensor device;
    tensor(name, device, one(DType::kI32), {1}, kRead | kOptional);
    out.device = device.as<const int32_t>();
    out.host = whole(name, 0, limit);
  }

  template <class T>
  void integer(const char* name, T& out, int64_t low, int64_t high) {
    out = static_cast<T>(whole(name, low, high));
  }
  void flag(const char* name, bool& out) { out = whole(name, 0, 1) != 0; }
  void real(const char* name, float& out) {
    const double value = number();
    if (!std::isfinite(value)) fail(Code::kInvalidArg, name, "expected a finite number");
    out = static_cast<float>(value);
  }
  template <class Enum>
  void choice(const char* name, Enum& out, std::initializer_list<const char*> names) {
    out = static_cast<Enum>(whole(name, 0, static_cast<int64_t>(names.size()) - 1));
  }

  // For shapes that depend on an option, which comes later in the record.
  void same(const char* name, const Tensor& tensor, Shape shape) {
    const int64_t expected = product(shape);
    if (status_.ok() && tensor.elements != expected) wrong_size(name, expected, tensor.elements);
  }
  void require(bool condition, const char* name, const char* expected) {
    if (!condition) fail(Code::kInvalidArg, name, std::string("expected ") + name + ": " + expected);
  }
  // Saturates instead of overflowing: no buffer is as large, so a comparison with one fails.
  int64_t product(Shape shape) const {
    int64_t result = 1;
    for (const int64_t dim : shape) {
      if (dim != 0 && result > kHuge / dim) return kHuge;
      result *= dim;
    }
    return result;
  }

 private:
  enum : int { kRead = 1, kWrite = 2, kOptional = 4, kCount = 8 };
  static constexpr int64_t kHuge = int64_t{1} << 62;

  double number() {
    if (next_ == end_) {
      fail(Code::kInternal, "", "record shorter than the op's fields");
      return 0;
    }
    return *next_++;
  }

  int64_t whole(const char* name, int64_t low, int64_t high) {
    const double value = number();
    if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high)) || value != std::floor(value)) {
      fail(
          Code::kInvalidArg, name,
          std::string("expected ") + name + ": an integer from " + std::to_string(low) + " to " + std::to_string(high));
      return low;
    }
    return static_cast<int64_t>(value);
  }

  const std::shared_ptr<Buffer>* buffer(const char* name, int use) {
    const double handle = number();
    if (!status_.ok() || (handle == 0 && (use & kOptional) != 0)) return nullptr;
    const std::shared_ptr<Buffer>* found = table_.find(handle);
    if (found == nullptr) {
      fail(Code::kDisposed, name, std::string("expected ") + name + " to be live but its handle is not");
      return nullptr;
    }
    const bool written = std::find(task_.writes.begin(), task_.writes.end(), *found) != task_.writes.end();
    const bool read = std::find(task_.reads.begin(), task_.reads.end(), *found) != task_.reads.end();
    if (written || (read && (use & kWrite) != 0)) {
      fail(Code::kInvalidArg, name, std::string("expected ") + name + " not to overlap another argument of the call");
      return nullptr;
    }
    if ((use & kRead) != 0) task_.reads.push_back(*found);
    if ((use & kWrite) != 0) task_.writes.push_back(*found);
    if ((use & kCount) != 0) task_.counters.push_back(found->get());
    return found;
  }

  void tensor(const char* name, Tensor& out, DTypes dtypes, Shape shape, int use) {
    out = {};
    const std::shared_ptr<Buffer>* found = buffer(name, use);
    if (found == nullptr) return;
    const Buffer& b = **found;
    if (b.experts.has_value() || !has(dtypes, b.dtype)) {
      fail(Code::kInvalidArg, name,
           std::string("expected ") + name + ": a tensor of another dtype than " +
               (b.experts.has_value() ? "packed experts" : name_of(b.dtype)));
      return;
    }
    if (shape.size() != 0 && product(shape) != b.elements) return wrong_size(name, product(shape), b.elements);
    out = {b.data, b.dtype, b.elements};
  }

  void packed(const char* name, Experts& out, int64_t S, int64_t H, int64_t I, int use) {
    const std::shared_ptr<Buffer>* found = buffer(name, use);
    if (found == nullptr) return;
    const Buffer& b = **found;
    const bool fits = b.experts.has_value() && b.experts->S == S && b.experts->H == H && b.experts->I == I;
    if (!fits)
      return fail(Code::kInvalidArg, name, std::string("expected ") + name + ": experts of the record's dimensions");
    out = {*b.experts, b.data};
  }

  void wrong_size(const char* name, int64_t expected, int64_t received) {
    fail(Code::kInvalidArg, name,
         std::string("expected ") + name + ": " + std::to_string(expected) + " elements but received " +
             std::to_string(received));
  }

  void fail(Code code, const char* arg, std::string text) {
    if (status_.ok()) status_ = Status::Error(code, std::move(text), arg);
  }

  const HandleTable<Buffer>& table_;
  const double* next_;
  const double* end_;
  Task& task_;
  Status status_;
};

// Writes down the same fields, one line each, in the words of lib/op.ts.
class Describer {
 public:
  std::vector<std::string> lines;
  using Shape = std::initializer_list<int64_t>;

  void dim(const char* name, int64_t& out) { out = 0, add("dim ", name); }
  void in(const char* name, Tensor&, DTypes dtypes, Shape) { add("in ", name, dtypes); }
  void optional(const char* name, Tensor&, DTypes dtypes, Shape) { add("in? ", name, dtypes); }
  void optional_counters(const char* name, Tensor&, Shape) { add("inout? ", name, one(DType::kI64)); }
  void optional_like(const char* name, Tensor&, const char* like, const Tensor&, Shape) { add("in? ", name, like); }
  void out(const char* name, Tensor&, DTypes dtypes, Shape) { add("out ", name, dtypes); }
  void optional_out(const char* name, Tensor&, DTypes dtypes, Shape) { add("out? ", name, dtypes); }
  void out_like(const char* name, Tensor&, const char* like, const Tensor&, Shape) { add("out ", name, like); }
  void optional_out_like(const char* name, Tensor&, const char* like, const Tensor&, Shape) {
    add("out? ", name, like);
  }
  void experts(const char* name, Experts&, int64_t, int64_t, int64_t) { add("experts ", name); }
  void inout_experts(const char* name, Experts&, int64_t, int64_t, int64_t) { add("inout experts ", name); }
  void count(const char* name, Count&, int64_t) { add("count ", name); }
  template <class T>
  void integer(const char* name, T& out, int64_t low, int64_t) {
    out = static_cast<T>(low), lines.push_back(std::string(name) + ": integer");
  }
  void flag(const char* name, bool& out) { out = false, lines.push_back(std::string(name) + ": flag"); }
  void real(const char* name, float& out) { out = 0, lines.push_back(std::string(name) + ": real"); }
  template <class Enum>
  void choice(const char* name, Enum& out, std::initializer_list<const char*> names) {
    out = Enum{};
    std::string line = std::string(name) + ": enum ";
    const char* separator = "";
    for (const char* each : names) {
      line.append(separator).append(each);
      separator = "|";
    }
    lines.push_back(std::move(line));
  }
  void same(const char*, const Tensor&, Shape) {}
  void require(bool, const char*, const char*) {}
  int64_t product(Shape) const { return 0; }

 private:
  void add(const char* kind, const char* name) { lines.push_back(std::string(kind) + name); }
  void add(const char* kind, const char* name, const char* like) {
    lines.push_back(std::string(kind) + name + " =" + like);
  }
  void add(const char* kind, const char* name, DTypes dtypes) {
    std::string line = std::string(kind) + name + " ";
    const char* separator = "";
    for (int code = 0; code < kDTypeCount; code++) {
      if (!has(dtypes, static_cast<DType>(code))) continue;
      line.append(separator).append(kDTypes[code].name);
      separator = "|";
    }
    lines.push_back(std::move(line));
  }
};

}  // namespace moe
