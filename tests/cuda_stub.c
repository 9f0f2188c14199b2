// The part of the CUDA driver that Triton's launcher calls, for a machine without one: it keeps what the last launch gave
// it, for tests to compare.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int CUresult;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  void *attributes;
  unsigned num_attributes;
} Config;

// Set by the test before a launch: the sizes in bytes of the kernel's parameters.
int stub_num_params;
int stub_sizes[64];
// What the last launch gave: its numbers, and its parameters one behind the other.
uint64_t stub_launch[10];
unsigned char stub_params[64 * 128];
int stub_launches, stub_encodings;

CUresult cuLaunchKernelEx(const Config *config, void *function, void **params, void **extra) {
  for (int i = 0; i < 3; i++) {
    stub_launch[i] = config->grid[i];
    stub_launch[3 + i] = config->block[i];
  }
  stub_launch[6] = config->shared;
  stub_launch[7] = (uint64_t)config->stream;
  stub_launch[8] = (uint64_t)function;
  stub_launch[9] = config->num_attributes;
  unsigned char *to = stub_params;
  for (int i = 0; i < stub_num_params; to += stub_sizes[i++])
    memcpy(to, params[i], stub_sizes[i]);
  stub_launches++;
  return 0;
}

// Enough of the arguments to tell one encoding from another.
CUresult cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address, const uint64_t *shape,
                                const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                                int interleave, int swizzle, int promotion, int fill) {
  uint64_t words[16] = {type, rank, (uint64_t)address, interleave, swizzle, promotion, fill};
  for (uint32_t i = 0; i < rank && i < 3; i++) {
    words[7 + i] = shape[i];
    words[10 + i] = box[i] + ((uint64_t)element_strides[i] << 32);
    if (i + 1 < rank)
      words[13 + i] = strides[i];
  }
  memcpy(map, words, sizeof words);
  stub_encodings++;
  return 0;
}

CUresult cuTensorMapEncodeIm2col() { return 1; }
CUresult cuGetErrorString(CUresult code, const char **text) { *text = "from the stub"; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuDevicePrimaryCtxRelease(int device) { return 0; }
CUresult cuModuleLoadData(void **module, const void *image) { *module = malloc(1); return 0; }
CUresult cuModuleUnload(void *module) { return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = malloc(1); return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *clusters, void *function, const void *config) { *clusters = 1; return 0; }
CUresult cuPointerGetAttribute(void *data, int attribute, uint64_t pointer) { *(uint64_t *)data = pointer; return 0; }
CUresult cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
