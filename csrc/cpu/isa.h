// Which kernel tables this processor can run, and which one is in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace dass {

// Best first; "scalar" is always there.
std::vector<std::string> available_isas();

// The table in use: DASS_ISA from the environment, else the best available.
const KernelTable& active_table();

// Throws std::invalid_argument for a name that is unknown or not available here.
void set_isa(const std::string& name);

const KernelTable& table_named(const std::string& name);

}  // namespace dass
