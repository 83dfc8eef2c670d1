// In torch's place for tests/native.
#pragma once
#include <sstream>
#include <stdexcept>

template <class... Args>
[[noreturn]] inline void throw_check(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

#define STD_TORCH_CHECK(condition, ...)         \
  do {                                          \
    if (!(condition)) throw_check(__VA_ARGS__); \
  } while (0)
