// Recordings, their replays, and the two lanes of an overlap.
#include <utility>

#include "context.h"

namespace moe {

void NativeContext::begin_capture(const Napi::CallbackInfo& info) {
  assert_not_recording(info.Env(), "capture");
  if (backend_->has_graphs()) {
    Status status = backend_->begin_capture();
    if (!status.ok()) throw make_error(info.Env(), status, "capture");
  }
  recording_ = std::make_shared<Recording>();
  recording_->number = ++recordings_;
}

Napi::Value NativeContext::end_capture(const Napi::CallbackInfo& info) {
  assert_open(info.Env(), "capture");
  assert_joined(info.Env(), "capture");
  if (recording_ == nullptr) {
    throw make_error(info.Env(), Status::Error(Code::kCapture, "no capture is being recorded"), "capture");
  }
  const std::shared_ptr<Recording> recording = std::exchange(recording_, nullptr);
  if (backend_->has_graphs()) {
    Status status = backend_->end_capture(&recording->graph);
    if (!status.ok()) throw make_error(info.Env(), status, "capture");
  }
  return Napi::Number::New(info.Env(), captures_.add(recording));
}

void NativeContext::abort_capture(const Napi::CallbackInfo&) {
  join_lanes();
  if (recording_ != nullptr && backend_->has_graphs()) backend_->abort_capture();
  recording_ = nullptr;
}

void NativeContext::take_lane(const Napi::CallbackInfo& info) {
  const char* op = "overlap";
  assert_open(info.Env(), op);
  const double lane = info.Length() > 0 && info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : -1;
  // 0 opens the lanes, 1 and 2 want them open.
  if (!(lane == 0 || lane == 1 || lane == 2) || (lane == 0) == lanes_) {
    throw make_error(info.Env(), Status::Error(Code::kInvalidArg, "expected a lane in its order"), op);
  }
  Status status = backend_->take_lane(static_cast<Backend::Lane>(lane));
  lanes_ = lane == 1 || (lane == 0 && status.ok());
  if (!status.ok()) throw make_error(info.Env(), status, op);
}

// For what ends everything anyway.
void NativeContext::join_lanes() {
  if (std::exchange(lanes_, false) && backend_ != nullptr) Status ignored = backend_->take_lane(Backend::Lane::kJoin);
}

void NativeContext::assert_joined(Napi::Env env, const char* op) {
  if (lanes_) throw make_error(env, Status::Error(Code::kCapture, "not while two lanes are open"), op);
}

void NativeContext::replay(const Napi::CallbackInfo& info) {
  assert_not_recording(info.Env(), "replay");
  const std::shared_ptr<Recording>* found =
      info.Length() > 0 && info[0].IsNumber() ? captures_.find(info[0].As<Napi::Number>().DoubleValue()) : nullptr;
  if (found == nullptr) {
    throw make_error(info.Env(), Status::Error(Code::kDisposed, "expected a live capture"), "replay");
  }
  if ((*found)->graph != nullptr) {
    Status status = backend_->replay(*(*found)->graph);
    if (!status.ok()) throw make_error(info.Env(), status, "replay");
    for (const auto& made : std::exchange((*found)->made, {})) {
      if (const auto buffer = made.lock(); buffer != nullptr) buffer->fault = nullptr;
    }
    return;
  }
  backend_->submit([backend = backend_.get(), recording = *found, faults = faults_] {
    for (const auto& task : recording->tasks) execute(*backend, *task, *faults);
  });
}

void NativeContext::release_capture(const Napi::CallbackInfo& info) {
  if (open_ && info.Length() > 0 && info[0].IsNumber()) captures_.remove(info[0].As<Napi::Number>().DoubleValue());
}

}  // namespace moe
