// A random sparse weight, dense and as the pattern that dass_kernels/formats.py lays out.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "checks.h"
#include "ops/pattern.h"

namespace checks {

using torch::stable::Tensor;

template <class T>
T* at(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

template <class T>
Tensor empty(std::vector<int64_t> sizes) {
  return Tensor::make(std::move(sizes), static_cast<T*>(nullptr));
}

template <class T>
Tensor random_tensor(std::vector<int64_t> sizes, Random& random) {
  Tensor t = empty<T>(std::move(sizes));
  for (int64_t i = 0; i < t.numel(); ++i) at<T>(t)[i] = random.number<T>();
  return t;
}

// A matrix [outputs, columns], of which a column is channel * taps + tap, in blocks of outputs.
struct Layout {
  int64_t outputs, columns, taps, groups, block;
};

template <class T>
struct Packed {
  Layout layout;
  std::vector<T> dense;         // zeros where nothing is kept
  std::vector<int64_t> places;  // of each element of the dense matrix in values, or -1
  Tensor values, pattern;
};

// The sections of a pattern behind their header.
class Words {
 public:
  Words() : words_(dass::kHeaderWords) { words_[dass::kMagic] = dass::kPatternMagic; }
  void set(int word, int64_t value) { words_[word] = static_cast<int32_t>(value); }
  void section(int word, const std::vector<int64_t>& values) {
    set(word, static_cast<int64_t>(words_.size()));
    words_.insert(words_.end(), values.begin(), values.end());
  }
  Tensor tensor() {
    set(dass::kLength, static_cast<int64_t>(words_.size()));
    Tensor t = empty<int32_t>({static_cast<int64_t>(words_.size())});
    std::copy(words_.begin(), words_.end(), at<int32_t>(t));
    return t;
  }

 private:
  std::vector<int32_t> words_;
};

struct Element {
  int64_t channel, index, place;  // input channel over all groups; output and mirrored tap; in values
};

inline std::vector<int64_t> bit_words(const std::vector<int64_t>& places, int64_t outputs, int64_t columns) {
  const int64_t halves = (columns + 15) / 16;
  std::vector<int64_t> words((outputs * halves + 1) / 2);
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t half = o * halves + c / 16;
      if (places[o * columns + c] >= 0) words[half / 2] |= int64_t{1} << (half % 2 * 16 + c % 16);
    }
  return words;
}

// Keeps about `percent` of the blocks.
template <class T>
Packed<T> random_packed(const Layout& m, int64_t percent, Random& random) {
  Packed<T> p{m, std::vector<T>(m.outputs * m.columns), std::vector<int64_t>(m.outputs * m.columns, -1), {}, {}};
  std::vector<int64_t> indptr{0}, indices;
  std::vector<Element> elements;
  const int64_t og = m.outputs / m.groups;
  for (int64_t b = 0; b * m.block < m.outputs; ++b) {
    for (int64_t c = 0; c < m.columns; ++c) {
      if (random.below(100) >= percent) continue;
      for (int64_t r = 0; r < m.block && b * m.block + r < m.outputs; ++r) {
        const int64_t o = b * m.block + r, place = static_cast<int64_t>(indices.size()) * m.block + r;
        p.dense[o * m.columns + c] = random.number<T>();
        p.places[o * m.columns + c] = place;
        elements.push_back(
            {o / og * (m.columns / m.taps) + c / m.taps, o % og * m.taps + m.taps - 1 - c % m.taps, place});
      }
      indices.push_back(c);
    }
    indptr.push_back(static_cast<int64_t>(indices.size()));
  }
  std::sort(elements.begin(), elements.end(), [](const Element& a, const Element& b) {
    return a.channel != b.channel ? a.channel < b.channel : a.index < b.index;
  });
  std::vector<int64_t> t_indptr(m.columns / m.taps * m.groups + 1), t_indices, perm;
  for (const Element& e : elements) {
    ++t_indptr[e.channel + 1];
    t_indices.push_back(e.index);
    perm.push_back(e.place);
  }
  for (size_t i = 1; i < t_indptr.size(); ++i) t_indptr[i] += t_indptr[i - 1];

  Words words;
  words.set(dass::kBlock, m.block);
  words.set(dass::kOutputs, m.outputs);
  words.set(dass::kColumns, m.columns);
  words.set(dass::kTaps, m.taps);
  words.set(dass::kGroups, m.groups);
  words.set(dass::kEntries, static_cast<int64_t>(indices.size()));
  words.set(dass::kElements, static_cast<int64_t>(elements.size()));
  words.section(dass::kIndptrAt, indptr);
  words.section(dass::kIndicesAt, indices);
  words.section(dass::kTIndptrAt, t_indptr);
  words.section(dass::kTIndicesAt, t_indices);
  words.section(dass::kPermAt, perm);
  if (m.taps == 1 && m.groups == 1 && m.block == 1)
    words.section(dass::kBitsAt, bit_words(p.places, m.outputs, m.columns));
  p.pattern = words.tensor();
  p.values = random_tensor<T>({static_cast<int64_t>(indices.size()) * m.block}, random);
  for (size_t i = 0; i < p.dense.size(); ++i)
    if (p.places[i] >= 0) at<T>(p.values)[p.places[i]] = p.dense[i];
  return p;
}

}  // namespace checks
