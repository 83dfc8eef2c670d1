# The CUDA library, a file of its own beside _C. nvcc is called directly: CMake's CUDA language asks
# for a whole toolkit, and the wheels nvidia-cuda-nvcc, -runtime, -crt and nvidia-nvvm are enough.
set(DASS_CUDA_ARCHS 80 86 87 89 90 100 120 CACHE STRING "Compute capabilities to build for")
if(NOT EXISTS "${DASS_NVCC}")
  message(FATAL_ERROR "DASS_CUDA needs nvcc: DASS_NVCC is \"${DASS_NVCC}\"")
endif()
get_filename_component(cuda_root "${DASS_NVCC}/../.." ABSOLUTE)
find_library(CUDART_STATIC NAMES libcudart_static.a REQUIRED NO_DEFAULT_PATH
  PATHS ${cuda_root}/lib64 ${cuda_root}/lib ${cuda_root}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux/lib)

# Machine code for each architecture, and PTX that later ones translate.
set(gencode -gencode=arch=compute_80,code=compute_80)
foreach(arch ${DASS_CUDA_ARCHS})
  list(APPEND gencode -gencode=arch=compute_${arch},code=sm_${arch})
endforeach()
file(GLOB cuda_headers CONFIGURE_DEPENDS csrc/cuda/*.cuh csrc/cuda/kernels.h csrc/ops/pattern_words.h)
foreach(family spmm sddmm pack)
  set(source ${CMAKE_SOURCE_DIR}/csrc/cuda/${family}.cu)
  set(object ${CMAKE_BINARY_DIR}/cuda_${family}.o)
  add_custom_command(OUTPUT ${object} DEPENDS ${source} ${cuda_headers} VERBATIM
    COMMAND ${DASS_NVCC} -std=c++17 -O3 -Werror=all-warnings -ccbin=${CMAKE_CXX_COMPILER}
      -Xcompiler=-fPIC,-fvisibility=hidden ${gencode} -c ${source} -o ${object})
  list(APPEND cuda_objects ${object})
endforeach()

Python3_add_library(_cuda MODULE WITH_SOABI
  csrc/cuda/library.cpp csrc/cuda/ops.cpp csrc/cuda/device.cpp ${cuda_objects})
string(REPLACE ";" " " cuda_archs "${DASS_CUDA_ARCHS}")
target_compile_definitions(_cuda PRIVATE TORCH_TARGET_VERSION=0x020a000000000000
  DASS_CUDA_ARCHS="${cuda_archs}")
target_include_directories(_cuda SYSTEM PRIVATE ${TORCH_ROOT}/include)
target_link_directories(_cuda PRIVATE ${TORCH_ROOT}/lib)
# The runtime is linked in: one library then serves torch of any CUDA version the driver runs.
target_link_libraries(_cuda PRIVATE -Wl,--no-as-needed torch torch_cpu c10 -Wl,--as-needed
  ${CUDART_STATIC} -Wl,--exclude-libs,ALL dl rt pthread)
set_target_properties(_cuda PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
