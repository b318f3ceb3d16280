// The addon's exports: what it is (describe), what the machine offers (probe), and contexts. The same source makes
// every backend's .node.
#include <napi.h>

#include "context.h"
#include "op_table.h"

#ifndef MOE_KERNELS_VERSION
#define MOE_KERNELS_VERSION "unknown"
#endif

namespace moe {
namespace {

Napi::Value describe(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  Napi::Object result = Napi::Object::New(env);
  result.Set("backend", backend_name());
  result.Set("version", MOE_KERNELS_VERSION);
  Napi::Array dtypes = Napi::Array::New(env);
  for (int i = 0; i < kDTypeCount; i++) {
    Napi::Object row = Napi::Object::New(env);
    row.Set("name", kDTypes[i].name);
    row.Set("bytes", static_cast<double>(kDTypes[i].bytes));
    dtypes.Set(static_cast<uint32_t>(i), row);
  }
  result.Set("dtypes", dtypes);
  Napi::Array errors = Napi::Array::New(env);
  for (const char* name : kCodeNames) errors.Set(errors.Length(), Napi::String::New(env, name));
  result.Set("errors", errors);
  Napi::Array ops = Napi::Array::New(env);
  for (const OpEntry& entry : op_table()) {
    Napi::Object row = Napi::Object::New(env);
    row.Set("name", entry.name);
    row.Set("available", entry.available());
    Napi::Array lines = Napi::Array::New(env);
    for (const std::string& line : entry.describe()) lines.Set(lines.Length(), Napi::String::New(env, line));
    row.Set("fields", lines);
    ops.Set(ops.Length(), row);
  }
  result.Set("ops", ops);
  return result;
}

Napi::Value probe(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const Probe probe = probe_backend();
  Napi::Object result = Napi::Object::New(env);
  result.Set("state", probe.state);
  result.Set("detail", probe.detail);
  Napi::Array devices = Napi::Array::New(env);
  for (const std::string& device : probe.devices) devices.Set(devices.Length(), Napi::String::New(env, device));
  result.Set("devices", devices);
  Napi::Object facts = Napi::Object::New(env);
  for (const auto& [name, value] : probe.facts) facts.Set(name, value);
  result.Set("facts", facts);
  return result;
}

void set_error_class(const Napi::CallbackInfo& info) {
  if (info.Length() == 0 || !info[0].IsFunction()) {
    throw Napi::TypeError::New(info.Env(), "expected a class");
  }
  info.Env().GetInstanceData<AddonData>()->error_class = Napi::Persistent(info[0].As<Napi::Function>());
}

// What V8 has been told of beside its heap, by everybody in this thread. For tests: nothing else shows it.
Napi::Value external_memory(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(),
                           static_cast<double>(Napi::MemoryManagement::AdjustExternalMemory(info.Env(), 0)));
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData;
  env.SetInstanceData(data);
  data->array_buffer = Napi::Persistent(env.Global().Get("ArrayBuffer").As<Napi::Function>());
  exports.Set("describe", Napi::Function::New<describe>(env, "describe"));
  exports.Set("probe", Napi::Function::New<probe>(env, "probe"));
  exports.Set("setErrorClass", Napi::Function::New<set_error_class>(env, "setErrorClass"));
  exports.Set("externalMemory", Napi::Function::New<external_memory>(env, "externalMemory"));
  exports.Set("Context", NativeContext::define(env));
  return exports;
}

}  // namespace
}  // namespace moe

static Napi::Object InitModule(Napi::Env env, Napi::Object exports) { return moe::init(env, exports); }
NODE_API_MODULE(moe_kernels, InitModule)
