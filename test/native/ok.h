// OK(call): how a program that stands alone takes a Status that is an error: it says which call, where, and ends.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "../../csrc/common/status.h"

#define OK(expr)                                                                      \
  do {                                                                                \
    const ::moe::Status status_ = (expr);                                             \
    if (!status_.ok()) {                                                              \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #expr, status_.text.c_str()); \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)
