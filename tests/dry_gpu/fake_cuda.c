/* A libcuda.so.1 for an H200 that is not there: it answers what Triton asks, checks each launch and each tensor map
 * against the device's limits as the real driver would, and runs nothing.
 */
#include <stdio.h>

#include "cuda.h"

#define SHARED_OF_A_PROGRAM 232448
#define MOST_THREADS 1024
#define MOST_ACROSS 65535u /* programs along the second and third axis of a grid */

long launches = 0;

static size_t last_handle = 0x100;

static void *new_handle(void) { return (void *)(last_handle += 0x100); }

static CUresult refuse(const char *what, const char *why) {
    fprintf(stderr, "%s INVALID: %s\n", what, why);
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *launch, CUfunction kernel, void **arguments, void **extra) {
    launches++;
    if (!launch->gridDimX || !launch->gridDimY || !launch->gridDimZ) return refuse("LAUNCH", "an empty grid");
    if (launch->gridDimX > 2147483647u || launch->gridDimY > MOST_ACROSS || launch->gridDimZ > MOST_ACROSS)
        return refuse("LAUNCH", "too large a grid");
    if (launch->blockDimX * launch->blockDimY * launch->blockDimZ > MOST_THREADS)
        return refuse("LAUNCH", "too many threads");
    if (launch->sharedMemBytes > SHARED_OF_A_PROGRAM) return refuse("LAUNCH", "too much shared memory");
    return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static const cuuint64_t bytes_of[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4, 4}; /* by CUtensorMapDataType */
    static const cuuint64_t widest[] = {1 << 30, 32, 64, 128};                       /* by CUtensorMapSwizzle */
    cuuint64_t bytes = bytes_of[type], row = box[0] * bytes;
    if ((size_t)address % 16) return refuse("TENSOR MAP", "an address that is no multiple of 16");
    for (cuuint32_t i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > (1ull << 32)) return refuse("TENSOR MAP", "a size out of range");
        if (!box[i] || box[i] > 256) return refuse("TENSOR MAP", "a box of more than 256 a side, or of none");
    }
    for (cuuint32_t i = 0; i + 1 < rank; i++) {
        cuuint64_t least = i ? strides[i - 1] * sizes[i] : sizes[0] * bytes;
        if (strides[i] % 16 || strides[i] >= (1ull << 40)) return refuse("TENSOR MAP", "a stride out of range");
        if (strides[i] < least) return refuse("TENSOR MAP", "a stride within the row before");
    }
    if (row % 16) return refuse("TENSOR MAP", "a box whose rows are no multiples of 16 bytes");
    if ((int)swizzle < 4 && row > widest[swizzle]) return refuse("TENSOR MAP", "a box wider than its swizzle");
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_OF_A_PROGRAM; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
        case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        default: *value = 1000;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction kernel) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? MOST_THREADS : 0;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "an error of the stand-in driver";
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)value = pointer;
    return CUDA_SUCCESS;
}

CUresult cuInit(unsigned flags) { return CUDA_ERROR_NO_DEVICE; } /* torch itself must find none */
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)0x10; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)0x10; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { *module = new_handle(); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *kernel, CUmodule module, const char *name) { *kernel = new_handle(); return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction kernel, const CUlaunchConfig *launch) { *count = 1; return CUDA_SUCCESS; }
