// Programs as Python makes them: a list of dicts, one for each step, whose arrays are numpy's.
#include "bind.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "emit.h"
#include "program.h"

namespace py = pybind11;

namespace dass {
namespace {

template <class T>
T get(const py::dict& d, const char* key) {
  if (!d.contains(key)) throw py::key_error(std::string("step without '") + key + "'");
  return d[key].cast<T>();
}
int64_t integer(const py::dict& d, const char* key) { return get<int64_t>(d, key); }

Place place(const py::dict& d, const char* key) {
  const auto p = get<py::dict>(d, key);
  return {integer(p, "space"), integer(p, "offset"),  integer(p, "channels"),
          integer(p, "rows"),  integer(p, "columns"), integer(p, "channel"),
          integer(p, "pitch"), integer(p, "pad"),     integer(p, "pixel")};
}

// What most steps lack may be left out.
template <class T>
T get_or(const py::dict& d, const char* key, T otherwise) {
  return d.contains(key) ? d[key].cast<T>() : otherwise;
}

template <class T>
std::vector<T> array(const py::dict& d, const char* key) {
  const auto a = get<py::array_t<T, py::array::c_style | py::array::forcecast>>(d, key);
  return {a.data(), a.data() + a.size()};
}

Activation activation(const py::dict& d) { return static_cast<Activation>(integer(d, "activation")); }

RowsSpec rows(const py::dict& d) {
  RowsSpec s;
  s.x = place(d, "x");
  s.y = place(d, "y");
  s.has_residual = d.contains("residual");
  if (s.has_residual) s.residual = place(d, "residual");
  s.indptr = array<int32_t>(d, "indptr");
  s.offsets = array<int32_t>(d, "offsets");
  s.values = array<float>(d, "values");
  s.bias = array<float>(d, "bias");
  s.activation = activation(d);
  s.relu_in = get_or(d, "relu_in", false);
  s.kernel = {get<bool>(d, "emitted"), integer(d, "height"),          integer(d, "vectors"),
              integer(d, "chunk"),     get_or<int64_t>(d, "deep", 1), get_or<int64_t>(d, "depth", 0)};
  return s;
}

DepthwiseSpec depthwise(const py::dict& d) {
  return {place(d, "x"),
          place(d, "y"),
          integer(d, "kernel"),
          integer(d, "stride_h"),
          integer(d, "stride_w"),
          integer(d, "top"),
          integer(d, "left"),
          integer(d, "dilation_h"),
          integer(d, "dilation_w"),
          array<float>(d, "weights"),
          array<float>(d, "bias"),
          activation(d),
          get<bool>(d, "emitted"),
          get_or(d, "relu_in", false)};
}

StepPtr fused(const py::dict& d) {
  FusedSpec s{};
  s.has_expand = d.contains("expand");
  s.has_project = d.contains("project");
  if (s.has_expand) s.expand = rows(get<py::dict>(d, "expand"));
  s.depthwise = depthwise(get<py::dict>(d, "depthwise"));
  if (s.has_project) s.project = rows(get<py::dict>(d, "project"));
  s.strip = integer(d, "strip");
  return make_fused(std::move(s));
}

StepPtr pool(const py::dict& d) {
  PoolSpec s{place(d, "x"),
             place(d, "y"),
             get<bool>(d, "maximum"),
             get<bool>(d, "count_padding"),
             integer(d, "kernel_h"),
             integer(d, "kernel_w"),
             integer(d, "stride_h"),
             integer(d, "stride_w"),
             integer(d, "top"),
             integer(d, "left"),
             integer(d, "bottom"),
             integer(d, "right"),
             integer(d, "dilation_h"),
             integer(d, "dilation_w"),
             array<float>(d, "scale"),
             array<float>(d, "bias"),
             activation(d),
             {},
             false,
             false};
  s.relu_in = get_or(d, "relu_in", false);
  s.has_residual = d.contains("residual");
  if (s.has_residual) s.residual = place(d, "residual");
  return make_pool(std::move(s));
}

StepPtr map(const py::dict& d) {
  MapSpec s;
  s.x = place(d, "x");
  s.y = place(d, "y");
  s.combine = static_cast<Combine>(integer(d, "combine"));
  if (s.combine != kCopy) s.other = place(d, "other");
  s.channels = array<int32_t>(d, "channels");
  s.shift_h = array<int32_t>(d, "shift_h");
  s.shift_w = array<int32_t>(d, "shift_w");
  s.stride_h = integer(d, "stride_h");
  s.stride_w = integer(d, "stride_w");
  s.scale = array<float>(d, "scale");
  s.bias = array<float>(d, "bias");
  s.activation = activation(d);
  return make_map(std::move(s));
}

StepPtr make_step(const py::dict& d) {
  const auto kind = get<std::string>(d, "kind");
  if (kind == "rows") return make_rows(rows(d));
  if (kind == "depthwise") return make_depthwise(depthwise(d));
  if (kind == "fused") return fused(d);
  if (kind == "pool") return pool(d);
  if (kind == "map") return map(d);
  if (kind == "mean") return make_mean(place(d, "x"), place(d, "y"));
  if (kind == "gather") return make_gather(place(d, "x"), place(d, "y"));
  if (kind == "scatter") return make_scatter(place(d, "x"), place(d, "y"));
  if (kind == "gemv")
    return make_gemv({place(d, "x"), place(d, "y"), array<float>(d, "weights"), array<float>(d, "bias"), activation(d),
                      get<bool>(d, "sparse")});
  throw std::invalid_argument("unknown kind of step '" + kind + "'");
}

// Torch's own pool: no second one.
void parallel(int64_t count, const std::function<void(int64_t, int64_t)>& fn) {
  torch::stable::parallel_for(0, count, 1, fn);
}

std::vector<float*> pointers(const Program& p, const std::vector<uintptr_t>& tensors) {
  if (tensors.size() != p.apart().size())
    throw std::invalid_argument("program of " + std::to_string(p.apart().size()) + " tensors called with " +
                                std::to_string(tensors.size()));
  std::vector<float*> out;
  for (uintptr_t t : tensors) out.push_back(reinterpret_cast<float*>(t));
  return out;
}

std::unique_ptr<Program> make_program(int64_t images, int64_t arena, std::vector<int64_t> apart,
                                      const py::list& steps) {
  std::vector<StepPtr> made;
  for (const auto& step : steps) made.push_back(make_step(step.cast<py::dict>()));
  return std::make_unique<Program>(images, arena, std::move(apart), std::move(made));
}

}  // namespace

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init(&make_program))
      .def("run",
           [](const Program& p, const std::vector<uintptr_t>& tensors, int64_t batch) {
             const auto data = pointers(p, tensors);
             const py::gil_scoped_release release;
             p.run(data, batch, torch::stable::get_num_threads(), parallel);
           })
      .def("profile",
           [](const Program& p, const std::vector<uintptr_t>& tensors, int64_t batch) {
             const auto data = pointers(p, tensors);
             std::vector<double> times(p.kernels().size());
             const py::gil_scoped_release release;
             p.run(data, batch, 1, parallel, &times);
             return times;
           })
      .def_property_readonly("kernels", &Program::kernels)
      .def_property_readonly("arena_bytes", &Program::arena_bytes);
  m.def("emit_unavailable", [] {
    const char* reason = emit_unavailable();
    return reason ? py::object(py::str(reason)) : py::none();
  });
}

}  // namespace dass
