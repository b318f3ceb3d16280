// The ops by number: how a record becomes a task, and what describe() says.
#pragma once
#include <vector>

#include "fields.h"
#include "unpack.h"

namespace moe {

struct OpEntry {
  const char* name;
  bool (*available)();
  // Checks the record and completes the task: its buffers and what to run.
  Status (*unpack)(const HandleTable<Buffer>& table, const double* record, size_t length, Task& task);
  std::vector<std::string> (*describe)();
};

template <class Params>
Status unpack_op(const HandleTable<Buffer>& table, const double* record, size_t length, Task& task) {
  Params params{};
  Unpacker unpacker(table, record, length, task);
  fields(unpacker, params);
  MOE_RETURN_IF_ERROR(unpacker.finish());
  task.run = [params](Backend& backend) { return registered_kernel<Params>(backend, params); };
  return Status::Ok();
}

template <class Params>
std::vector<std::string> describe_op() {
  Params params{};
  Describer describer;
  fields(describer, params);
  return std::move(describer.lines);
}

inline const std::vector<OpEntry>& op_table() {
#define MOE_ENTRY(op, Params) \
  {#op, [] { return registered_kernel<Params> != nullptr; }, &unpack_op<Params>, &describe_op<Params>},
  static const std::vector<OpEntry> table = {MOE_OPS(MOE_ENTRY)};
#undef MOE_ENTRY
  return table;
}

}  // namespace moe
