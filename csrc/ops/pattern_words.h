// The header of a pattern tensor; dass_kernels/formats.py has the same list.
#pragma once
#include <cstdint>

namespace dass {

// Header words. Sections are given by their offset in int32 words from the start of the tensor.
enum PatternWord : int {
  kMagic = 0,
  kBlock = 1,    // R: outputs that share a pattern (1: unstructured or N:M)
  kOutputs = 2,  // O
  kColumns = 3,  // I / groups * kh * kw
  kTaps = 4,     // kh * kw
  kGroups = 5,
  kEntries = 6,      // stored column indices (one per block)
  kElements = 7,     // kept weights
  kIndptrAt = 8,     // [ceil(O / R) + 1]
  kIndicesAt = 9,    // [entries], channel * taps + tap
  kTIndptrAt = 10,   // [groups * I / groups + 1]
  kTIndicesAt = 11,  // [elements], output in its group * taps + mirrored tap
  kPermAt = 12,      // [elements], position in values of each transposed element
  kBitsAt = 13,      // bit mask of a matrix, 16 columns a half-word, or 0
  kLength = 14,
  kFlatAt = 15,  // [entries * R], place of each value in the dense weight
  kHeaderWords = 16,
};
constexpr int32_t kPatternMagic = 0x0da55001;

}  // namespace dass
