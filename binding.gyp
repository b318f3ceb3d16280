{
  # The CPU addon only: node-gyp-build takes the first .node it finds in build/Release. CUDA and Ascend come from
  # CMakeLists.txt and live in folders of their own, out/<backend>.
  "targets": [
    {
      "target_name": "moe_cpu",
      "sources": [
        "<!@(node scripts/sources.mjs csrc/binding csrc/common csrc/cpu)"
      ],
      "include_dirs": [ "<!(node -p \"require('node-addon-api').include_dir\")" ],
      "defines": [
        "NAPI_VERSION=9",
        "NODE_ADDON_API_CPP_EXCEPTIONS",
        "NODE_ADDON_API_CPP_EXCEPTIONS_ALL",
        "NODE_ADDON_API_DISABLE_DEPRECATED",
        "NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS",
        "MOE_KERNELS_VERSION=\"<!(node -p \"require('./package.json').version\")\""
      ],
      "cflags!": [ "-fno-exceptions" ],
      "cflags_cc!": [ "-fno-exceptions", "-fno-rtti", "-std=gnu++17", "-std=gnu++20", "-O2" ],
      "cflags_cc": [
        "-std=c++20", "-fexceptions", "-O3", "-Wall", "-Wextra", "-Wno-cast-function-type",
        "-fvisibility=hidden", "-fno-gnu-unique"
      ],
      "conditions": [
        [ "OS=='linux'", { "libraries": [ "-pthread" ], "ldflags": [ "-Wl,--exclude-libs,ALL" ] } ],
        [ "OS=='mac'", {
          "cflags_cc!": [ "-fno-gnu-unique" ],
          "xcode_settings": {
            "GCC_ENABLE_CPP_EXCEPTIONS": "YES",
            "CLANG_CXX_LANGUAGE_STANDARD": "c++20",
            "GCC_SYMBOLS_PRIVATE_EXTERN": "YES",
            "MACOSX_DEPLOYMENT_TARGET": "12.0",
            "GCC_OPTIMIZATION_LEVEL": "3"
          }
        } ],
        [ "OS=='win'", {
          "defines!": [ "_HAS_EXCEPTIONS=0" ],
          "defines": [ "_HAS_EXCEPTIONS=1" ],
          "msvs_settings": { "VCCLCompilerTool": { "ExceptionHandling": 1, "AdditionalOptions": [ "/std:c++20" ] } }
        } ],
        [ "OS=='win' and target_arch=='x64'", {
          "sources/": [ [ "exclude", "_avx(2|512)\\.cc$" ] ],
          "dependencies": [ "moe_cpu_avx2", "moe_cpu_avx512" ]
        } ]
      ]
    }
  ],
  "conditions": [
    # MSVC switches instruction sets for whole files alone; other compilers find the switch in csrc/cpu/compiler.h.
    # Libraries, for what both they and the addon's own files have is then taken from those, which run everywhere.
    [ "OS=='win' and target_arch=='x64'", {
      "targets": [
        {
          "target_name": "moe_cpu_avx2",
          "type": "static_library",
          "sources": [ "<!@(node scripts/sources.mjs csrc/cpu:_avx2.cc)" ],
          "msvs_settings": { "VCCLCompilerTool": { "AdditionalOptions": [ "/std:c++20", "/arch:AVX2" ] } }
        },
        {
          "target_name": "moe_cpu_avx512",
          "type": "static_library",
          "sources": [ "<!@(node scripts/sources.mjs csrc/cpu:_avx512.cc)" ],
          "msvs_settings": { "VCCLCompilerTool": { "AdditionalOptions": [ "/std:c++20", "/arch:AVX512" ] } }
        }
      ]
    } ]
  ]
}
