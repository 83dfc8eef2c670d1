#pragma once
#include <pybind11/pybind11.h>

namespace dass {

// Adds the class Program to the module.
void bind_program(pybind11::module_& m);

}  // namespace dass
