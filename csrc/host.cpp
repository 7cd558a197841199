// The host side that Python needs and torch does not: facts about this build and this machine.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "adafm/platform.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host side of adafm_kernels; no tensor passes through it.";
  m.def("build_info", &build_info,
        "Facts about this build: version, cuda, cuda_version, cuda_archs, compiler, torch_headers; and cpu_level, the "
        "instruction level of the running machine.");
}
