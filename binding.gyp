{
  # Not in the npm package: npm compiles whatever carries a binding.gyp, on every `npm ci`.
  "includes": [ "csrc/moe_cpu.gypi" ]
}
