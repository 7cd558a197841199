# The torch operators (libadafm.so, on the stable ABI, no libpython) and the pybind11 host module (_C).
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

if(NOT ADAFM_TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '', end='')"
    OUTPUT_VARIABLE ADAFM_TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${ADAFM_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "no torch headers in \"${ADAFM_TORCH_DIR}\"; type: pip install 'torch>=2.11,<2.14'")
endif()
file(STRINGS "${ADAFM_TORCH_DIR}/version.py" torch_line REGEX "^__version__ = " LIMIT_COUNT 1)
string(REGEX REPLACE "^[^'\"]*['\"]([^'\"]*)['\"].*$" "\\1" ADAFM_TORCH_HEADERS "${torch_line}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" torch_number "${ADAFM_TORCH_HEADERS}")
if(torch_number VERSION_LESS 2.11)
  message(FATAL_ERROR "torch ${ADAFM_TORCH_HEADERS} is too old; type: pip install 'torch>=2.11,<2.14'")
endif()
message(STATUS "torch headers: ${ADAFM_TORCH_HEADERS}")

add_library(adafm SHARED csrc/binding.cpp csrc/binding_adam.cpp csrc/binding_many.cpp csrc/binding_variants.cpp)
target_compile_options(adafm PRIVATE "-fmacro-prefix-map=${ADAFM_TORCH_DIR}/include/=")
target_compile_definitions(adafm PRIVATE TORCH_TARGET_VERSION=0x020B000000000000)
target_include_directories(adafm SYSTEM PRIVATE "${ADAFM_TORCH_DIR}/include")
target_compile_options(adafm PRIVATE -Wall -Wextra)
target_link_directories(adafm PRIVATE "${ADAFM_TORCH_DIR}/lib")
# libtorch.so has to stay a needed library although nothing refers to it: it is what brings in a CUDA torch's symbols,
# and without it the weak stream function stays null there.
target_link_libraries(adafm PRIVATE adafm_core -Wl,--push-state,--no-as-needed -ltorch -Wl,--pop-state -ltorch_cpu -lc10)
target_link_options(adafm PRIVATE -Wl,--as-needed -Wl,--exclude-libs,ALL)
set_target_properties(adafm PROPERTIES
  LIBRARY_OUTPUT_DIRECTORY "${ADAFM_OUTPUT_DIR}/lib"
  NO_SONAME ON)

execute_process(COMMAND ${Python_EXECUTABLE} -m pybind11 --cmakedir
  OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(_C MODULE NO_EXTRAS csrc/host.cpp)
target_link_libraries(_C PRIVATE adafm_core)
target_compile_definitions(_C PRIVATE
  ADAFM_VERSION="${ADAFM_VERSION}"
  ADAFM_CUDA_VERSION="${ADAFM_CUDA_VERSION}"
  ADAFM_CUDA_ARCH_NAMES="${ADAFM_CUDA_ARCH_NAMES}"
  ADAFM_TORCH_HEADERS="${ADAFM_TORCH_HEADERS}")
target_link_options(_C PRIVATE -Wl,--exclude-libs,ALL)
set_target_properties(_C PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${ADAFM_OUTPUT_DIR}")
