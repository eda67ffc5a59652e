# SPDX-License-Identifier: Apache-2.0
# Finds an nvcc that works, and compiles with it.
#
# Not CMake's own CUDA language: enabling it links a test program, which fails with the toolkit of the pip packages
# (no libcudart.so, no stubs), and it fails with an error where AUTO wants a message.

# The real architectures of a build, e.g. "90" or "75;80;86", from FASTLOOP_CUDA_ARCHITECTURES.
function(fastloop_cuda_architectures result)
  set(wheel 75 80 86 89 90 100 120)
  string(TOLOWER "${FASTLOOP_CUDA_ARCHITECTURES}" wanted)
  string(REPLACE "," ";" wanted "${wanted}")
  if(wanted MATCHES "^(wheel|all)$")
    set(${result} ${wheel} PARENT_SCOPE)
    return()
  elseif(wanted STREQUAL "" OR wanted STREQUAL "native")
    # The GPUs of this machine; 90 where there is none to ask: a development build only has to compile.
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE wanted RESULT_VARIABLE failed ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" wanted "${wanted}")
    string(REPLACE "." "" wanted "${wanted}")
    list(REMOVE_DUPLICATES wanted)
    if(failed OR wanted STREQUAL "")
      set(wanted 90)
    endif()
  endif()
  foreach(each IN LISTS wanted)
    if(NOT each MATCHES "^[0-9]+[af]?$")
      message(FATAL_ERROR "FASTLOOP_CUDA_ARCHITECTURES must be 'native', 'wheel' or a list such as '80;90', "
                          "got '${FASTLOOP_CUDA_ARCHITECTURES}'")
    endif()
  endforeach()
  list(SORT wanted COMPARE NATURAL)
  set(${result} ${wanted} PARENT_SCOPE)
endfunction()

# Machine code for each architecture, and PTX of the newest for GPUs that come later.
function(fastloop_gencode result architectures)
  set(flags "")
  foreach(each IN LISTS architectures)
    list(APPEND flags "-gencode=arch=compute_${each},code=sm_${each}")
    set(newest ${each})
  endforeach()
  set(${result} ${flags} "-gencode=arch=compute_${newest},code=compute_${newest}" PARENT_SCOPE)
endfunction()

# Every nvcc that may be meant, best first: the one named, or those of the machine and of this Python's pip packages.
function(fastloop_nvcc_candidates result)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(${result} "$ENV{CUDACXX}" PARENT_SCOPE)
    return()
  endif()
  find_program(on_path nvcc NO_CACHE)
  set(found "${on_path}" "$ENV{CUDA_HOME}/bin/nvcc" "$ENV{CUDA_PATH}/bin/nvcc" /usr/local/cuda/bin/nvcc)
  if(Python_EXECUTABLE)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import nvidia; print(*nvidia.__path__, sep=';')"
      OUTPUT_VARIABLE packages OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    foreach(each IN LISTS packages)
      file(GLOB in_packages "${each}/cu[0-9]*/bin/nvcc")
      list(SORT in_packages COMPARE NATURAL ORDER DESCENDING)
      list(APPEND found ${in_packages})
    endforeach()
  endif()
  set(existing "")
  foreach(each IN LISTS found)
    if(EXISTS "${each}" AND NOT IS_DIRECTORY "${each}")
      list(APPEND existing "${each}")
    endif()
  endforeach()
  list(REMOVE_DUPLICATES existing)
  set(${result} ${existing} PARENT_SCOPE)
endfunction()

# Whether `nvcc` compiles for the wanted architectures with this C++ compiler and has the static runtime beside it.
function(fastloop_try_nvcc nvcc gencode runtime_result problem_result)
  set(folder ${CMAKE_BINARY_DIR}/nvcc-trial)
  file(WRITE ${folder}/trial.cu "#include <cuda_bf16.h>\n__global__ void trial(__nv_bfloat16* p) { *p = *p; }\n")
  set(command ${nvcc} -ccbin ${CMAKE_CXX_COMPILER} -std=c++17 ${gencode} -c trial.cu -o trial.o)
  # The program may be a link or a script: it says itself where its toolkit is.
  execute_process(COMMAND ${command} --dryrun WORKING_DIRECTORY ${folder} OUTPUT_VARIABLE plan ERROR_VARIABLE plan)
  set(${runtime_result} "" PARENT_SCOPE)
  if(NOT plan MATCHES "#\\$ TOP=([^\r\n]+)")
    string(STRIP "${plan}" plan)
    set(${problem_result} "does not start: ${plan}" PARENT_SCOPE)
    return()
  endif()
  get_filename_component(top "${CMAKE_MATCH_1}" REALPATH)
  find_library(cudart libcudart_static.a NO_CACHE NO_DEFAULT_PATH
    PATHS ${top}/targets/${CMAKE_SYSTEM_PROCESSOR}-linux ${top}/targets/sbsa-linux ${top} PATH_SUFFIXES lib64 lib)
  if(NOT cudart)
    set(${problem_result} "no libcudart_static.a under ${top}" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND ${command} WORKING_DIRECTORY ${folder}
    RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(failed)
    string(STRIP "${output}" output)
    set(${problem_result} "cannot compile a kernel: ${output}" PARENT_SCOPE)
    return()
  endif()
  set(${runtime_result} "${cudart}" PARENT_SCOPE)
endfunction()

# Sets FASTLOOP_NVCC (empty if none works), FASTLOOP_CUDART and FASTLOOP_NVCC_GENCODE in the caller.
function(fastloop_find_nvcc)
  set(FASTLOOP_NVCC "" PARENT_SCOPE)
  fastloop_cuda_architectures(architectures)
  fastloop_gencode(gencode "${architectures}")
  fastloop_nvcc_candidates(candidates)
  set(problems "")
  foreach(nvcc IN LISTS candidates)
    set(trial "${nvcc};${CMAKE_CXX_COMPILER};${gencode}")
    if(trial STREQUAL "$CACHE{FASTLOOP_NVCC_TRIAL}" AND EXISTS "$CACHE{FASTLOOP_NVCC_RUNTIME}")
      set(runtime "$CACHE{FASTLOOP_NVCC_RUNTIME}") # this very trial has succeeded before
    else()
      fastloop_try_nvcc("${nvcc}" "${gencode}" runtime problem)
    endif()
    if(runtime)
      set(FASTLOOP_NVCC_TRIAL "${trial}" CACHE INTERNAL "")
      set(FASTLOOP_NVCC_RUNTIME "${runtime}" CACHE INTERNAL "")
      list(JOIN architectures ", " names)
      message(STATUS "CUDA kernels: for ${names}, by ${nvcc}")
      set(FASTLOOP_NVCC "${nvcc}" PARENT_SCOPE)
      set(FASTLOOP_CUDART "${runtime}" PARENT_SCOPE)
      set(FASTLOOP_NVCC_GENCODE "${gencode}" PARENT_SCOPE)
      return()
    endif()
    string(APPEND problems "\n  ${nvcc}: ${problem}")
  endforeach()
  if(problems STREQUAL "")
    set(problems " no nvcc in CUDACXX, PATH, CUDA_HOME, /usr/local/cuda or this Python's packages")
  endif()
  if(FASTLOOP_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTLOOP_CUDA=ON needs a CUDA toolkit that works:${problems}\n"
      "Install CUDA 13 and name its nvcc in CUDACXX, or, into the environment that builds:\n"
      "  pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm nvidia-cuda-runtime nvidia-cuda-cccl\n"
      "FASTLOOP_CUDA=OFF builds without CUDA kernels.")
  endif()
  message(STATUS "CUDA kernels: not built:${problems}")
endfunction()

# Compiles each of SOURCES (relative to the project) with FASTLOOP_NVCC and OPTIONS to a file of its own with the given
# suffix; lists the files in `result`.
function(fastloop_nvcc_compile result suffix)
  cmake_parse_arguments(PARSE_ARGV 2 arg "" "" "SOURCES;OPTIONS")
  set(files "")
  foreach(source IN LISTS arg_SOURCES)
    get_filename_component(name ${source} NAME_WE)
    set(file ${CMAKE_BINARY_DIR}/nvcc/${name}.${suffix})
    add_custom_command(
      OUTPUT ${file}
      COMMAND ${FASTLOOP_NVCC} -ccbin ${CMAKE_CXX_COMPILER} ${arg_OPTIONS} ${PROJECT_SOURCE_DIR}/${source} -o ${file}
              -MD -MT ${file} -MF ${file}.d
      DEPENDS ${PROJECT_SOURCE_DIR}/${source}
      DEPFILE ${file}.d
      COMMENT "Compiling ${source} to ${name}.${suffix}"
      VERBATIM)
    list(APPEND files ${file})
  endforeach()
  file(MAKE_DIRECTORY ${CMAKE_BINARY_DIR}/nvcc)
  set(${result} ${files} PARENT_SCOPE)
endfunction()
