// The host side that Python needs and torch does not: facts about this build and this machine, and the tiles of a
// whole network.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <sstream>
#include <string>
#include <vector>

#include "adafm/platform.h"
#include "planner.h"

namespace py = pybind11;

namespace {

std::string compiler() {
  std::ostringstream text;
#if defined(__clang__)
  text << "clang " << __clang_major__ << "." << __clang_minor__ << "." << __clang_patchlevel__;
#elif defined(__GNUC__)
  text << "gcc " << __GNUC__ << "." << __GNUC_MINOR__ << "." << __GNUC_PATCHLEVEL__;
#else
  text << "unknown";
#endif
  return text.str();
}

py::list split(const std::string& text) {
  py::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) {
    parts.append(part);
  }
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["version"] = ADAFM_VERSION;
  info["cuda"] = bool(ADAFM_WITH_CUDA);
  info["cuda_version"] = ADAFM_CUDA_VERSION;
  info["cuda_archs"] = split(ADAFM_CUDA_ARCH_NAMES);
  info["compiler"] = compiler();
  info["cpu_level"] = adafm::cpu_level();
  info["torch_headers"] = ADAFM_TORCH_HEADERS;
  return info;
}

// std::invalid_argument arrives in Python as ValueError.
py::bytes plan_tiles(const std::vector<std::array<int64_t, 6>>& rows) {
  std::vector<adafm::ArenaLayer> layers;
  for (const auto& row : rows) {
    layers.push_back({row[0], row[1], row[2], row[3], row[4], row[5]});
  }
  const std::vector<adafm::Tile> tiles = adafm::plan_tiles(layers);
  return py::bytes(reinterpret_cast<const char*>(tiles.data()), tiles.size() * sizeof(adafm::Tile));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host side of adafm_kernels; no tensor passes through it.";
  m.def("build_info", &build_info,
        "Facts about this build: version, cuda, cuda_version, cuda_archs, compiler, torch_headers; and cpu_level, the "
        "instruction level of the running machine.");
  m.def("plan_tiles", &plan_tiles, py::arg("layers"),
        "The tiles of a network's arena, 16 bytes each (int32 [T, 4]), for a list of layers (weight offset, pair "
        "offset, O, I, taps, flags) with offsets in elements, multiples of 8. Raises ValueError, naming layer and "
        "value, for what a tile cannot express.");
}
