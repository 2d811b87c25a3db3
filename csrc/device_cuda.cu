// SPDX-License-Identifier: Apache-2.0
// Whether a GPU kernel of this binary could run here. Nothing is touched until someone asks.
#include <cuda_runtime.h>

#include "launch.h"

namespace activesel {
namespace gpu {

__global__ void witness() {}

}  // namespace gpu

int cuda_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int cuda_device_count(const char** reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  *reason = cudaGetErrorString(error);
  return -1;
}

const char* cuda_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, gpu::witness);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // leave no error behind for the next caller
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace activesel
