// The streaming expert MLP for few tokens, as expert_mlp_stream_sm90a.cu calls it.
#pragma once
#include "expert_mlp.h"

namespace moe::mlp {

bool few_takes(const StreamCall& call);
cudaError_t launch_few(const StreamCall& call);

}  // namespace moe::mlp
