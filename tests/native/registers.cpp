#include "registers.h"

#include "cpu/vec.h"

namespace checks {
namespace DASS_ISA_NAME {

template <class T>
using Vec = dass::DASS_ISA_NAME::Vec<T>;

template <class T>
void keep(const T* a, uint32_t mask, T* out) {
  Vec<T>::load(a).keep(mask).store(out);
}
void even(const float* a, const float* b, float* out) {
  Vec<float>::even(Vec<float>::load(a), Vec<float>::load(b)).store(out);
}
void odd(const float* a, const float* b, float* out) {
  Vec<float>::odd(Vec<float>::load(a), Vec<float>::load(b)).store(out);
}
void shift_in(const float* a, float next, float* out) { Vec<float>::shift_in(Vec<float>::load(a), next).store(out); }
void larger_of(const float* a, const float* b, float* out) {
  dass::DASS_ISA_NAME::larger(Vec<float>::load(a), Vec<float>::load(b)).store(out);
}

}  // namespace DASS_ISA_NAME

const Registers DASS_ISA_REGISTERS = {
    {DASS_ISA_NAME::Vec<float>::lanes, &DASS_ISA_NAME::keep<float>},
    {DASS_ISA_NAME::Vec<double>::lanes, &DASS_ISA_NAME::keep<double>},
    &DASS_ISA_NAME::even,
    &DASS_ISA_NAME::odd,
    &DASS_ISA_NAME::shift_in,
    &DASS_ISA_NAME::larger_of,
};

}  // namespace checks
