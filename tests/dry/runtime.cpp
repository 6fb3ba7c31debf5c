// What torch needs of the CUDA runtime and of cuBLAS, for a GPU that is not there: memory is the host's and is handed
// out for real, kernels do nothing.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#define CUDA extern "C" cudaError_t

#define NOTHING(name, ...) \
  CUDA name(__VA_ARGS__) { return cudaSuccess; }

static int succeed() { return 0; }
static int context_state(int, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return 0;
}
CUDA cudaGetDeviceCount(int*c) { *c=1; return cudaSuccess; }
CUDA cudaGetDevice(int*d) { *d=0; return cudaSuccess; }
CUDA cudaDriverGetVersion(int*v) { *v=13000; return cudaSuccess; }
CUDA cudaRuntimeGetVersion(int*v) { *v=13000; return cudaSuccess; }
CUDA cudaGetDeviceProperties(cudaDeviceProp* p, int) {  // an H200
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H200");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = 150000000000ull;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->l2CacheSize = 62914560;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
CUDA cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount           ? 132
           : attribute == cudaDevAttrComputeCapabilityMajor        ? 9
           : attribute == cudaDevAttrMaxThreadsPerBlock            ? 1024
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin  ? 232448
           : attribute == cudaDevAttrMaxThreadsPerMultiProcessor   ? 2048
                                                                   : 0;
  return cudaSuccess;
}
CUDA cudaDeviceGetStreamPriorityRange(int*a, int*b) { *a=0; *b=-5; return cudaSuccess; }
CUDA cudaDeviceGetPCIBusId(char*c, int n, int) { strncpy(c,"0000:00:00.0",n); return cudaSuccess; }
CUDA cudaDeviceCanAccessPeer(int*a, int, int) { *a=0; return cudaSuccess; }
CUDA cudaMalloc(void**p, size_t n) {
  if(posix_memalign(p,512,n?n:512)) return cudaErrorMemoryAllocation;
  return cudaSuccess;
}
CUDA cudaFree(void*p) { free(p); return cudaSuccess; }
CUDA cudaHostAlloc(void**p, size_t n, unsigned) {
  if(posix_memalign(p,512,n?n:512)) return cudaErrorMemoryAllocation;
  return cudaSuccess;
}
CUDA cudaFreeHost(void*p) { free(p); return cudaSuccess; }
CUDA cudaMemGetInfo(size_t*f, size_t*t) { *f=149000000000ull; *t=150000000000ull; return cudaSuccess; }
CUDA cudaMemcpy(void*d, const void*s, size_t n, cudaMemcpyKind) { memcpy(d,s,n); return cudaSuccess; }
CUDA cudaMemcpyAsync(void*d, const void*s, size_t n, cudaMemcpyKind, cudaStream_t) {
  memcpy(d,s,n);
  return cudaSuccess;
}
CUDA cudaMemset(void*d, int v, size_t n) { memset(d,v,n); return cudaSuccess; }
CUDA cudaMemsetAsync(void*d, int v, size_t n, cudaStream_t) { memset(d,v,n); return cudaSuccess; }
CUDA cudaEventCreate(cudaEvent_t*e) { *e=(cudaEvent_t)malloc(8); return cudaSuccess; }
CUDA cudaEventCreateWithFlags(cudaEvent_t*e, unsigned) { *e=(cudaEvent_t)malloc(8); return cudaSuccess; }
CUDA cudaEventDestroy(cudaEvent_t e) { free(e); return cudaSuccess; }
CUDA cudaEventElapsedTime(float*f, cudaEvent_t, cudaEvent_t) { *f=1.0f; return cudaSuccess; }
CUDA cudaStreamCreate(cudaStream_t*s) { *s=(cudaStream_t)malloc(8); return cudaSuccess; }
CUDA cudaStreamCreateWithPriority(cudaStream_t*s, unsigned, int) { *s=(cudaStream_t)malloc(8); return cudaSuccess; }
CUDA cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*s) {
  *s=cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
CUDA cudaStreamGetPriority(cudaStream_t, int*p) { *p=0; return cudaSuccess; }
CUDA cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus*s, unsigned long long*id, cudaGraph_t*, const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  *s=cudaStreamCaptureStatusNone;
  if(id)*id=0;
  return cudaSuccess;
}
extern "C" const char* cudaGetErrorName(cudaError_t) { return "ok"; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "ok"; }
CUDA cudaFuncGetAttributes(cudaFuncAttributes*a, const void*) {
  memset(a,0,sizeof *a);
  a->maxThreadsPerBlock=1024;
  a->numRegs=32;
  a->binaryVersion=90;
  a->ptxVersion=90;
  return cudaSuccess;
}
CUDA cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int*n, const void*, int, size_t, unsigned) {
  *n=2;
  return cudaSuccess;
}
CUDA cudaPointerGetAttributes(cudaPointerAttributes*a, const void*p) {
  memset(a,0,sizeof *a);
  a->type=cudaMemoryTypeDevice;
  a->devicePointer=(void*)p;
  return cudaSuccess;
}
CUDA cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                      cudaDriverEntryPointQueryResult* result) {
  *found = strcmp(name, "cuDevicePrimaryCtxGetState") ? (void*)succeed : (void*)context_state;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
CUDA cudaGetSymbolAddress(void**p, const void*) { *p=malloc(4096); return cudaSuccess; }
CUDA cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void*d) { f(d); return cudaSuccess; }
CUDA cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void*d, unsigned) {
  f(s,cudaSuccess,d);
  return cudaSuccess;
}
CUDA __cudaPopCallConfiguration(dim3*g, dim3*b, size_t*m, void*s) {
  g->x=g->y=g->z=b->x=b->y=b->z=1;
  *m=0;
  *(void**)s=0;
  return cudaSuccess;
}
CUDA cudaDeviceGetDefaultMemPool(cudaMemPool_t*p, int) { *p=0; return cudaSuccess; }
CUDA cudaMallocAsync(void**p, size_t n, cudaStream_t) { return cudaMalloc(p,n); }
CUDA cudaFreeAsync(void*p, cudaStream_t) { free(p); return cudaSuccess; }
CUDA cudaMemcpyPeerAsync(void*d, int, const void*s, int, size_t n, cudaStream_t) {
  memcpy(d,s,n);
  return cudaSuccess;
}
extern "C" void** __cudaRegisterFatBinary(void*) { static void*h; return &h; }
extern "C" void __cudaRegisterFatBinaryEnd(void**) { }
extern "C" void __cudaUnregisterFatBinary(void**) { }
extern "C" void __cudaRegisterFunction(void**, const char*, char*, const char*, int, void*, void*, void*, void*, int*) {

}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) { }
extern "C" char __cudaInitModule(void**) { return 1; }
CUDA __cudaGetKernel(void*k, const void*f) { *(const void**)k=f; return cudaSuccess; }
NOTHING(cudaSetDevice, int)
NOTHING(cudaDeviceSynchronize)
NOTHING(cudaDeviceEnablePeerAccess, int, unsigned)
NOTHING(cudaHostRegister, void*, size_t, unsigned)
NOTHING(cudaHostUnregister, void*)
NOTHING(cudaEventQuery, cudaEvent_t)
NOTHING(cudaEventRecord, cudaEvent_t, cudaStream_t)
NOTHING(cudaEventRecordWithFlags, cudaEvent_t, cudaStream_t, unsigned)
NOTHING(cudaEventSynchronize, cudaEvent_t)
NOTHING(cudaStreamDestroy, cudaStream_t)
NOTHING(cudaStreamQuery, cudaStream_t)
NOTHING(cudaStreamSynchronize, cudaStream_t)
NOTHING(cudaStreamWaitEvent, cudaStream_t, cudaEvent_t, unsigned)
NOTHING(cudaThreadExchangeStreamCaptureMode, cudaStreamCaptureMode*)
NOTHING(cudaGetLastError)
NOTHING(cudaPeekAtLastError)
NOTHING(cudaLaunchKernelExC, const cudaLaunchConfig_t*, const void*, void**)
NOTHING(cudaLaunchKernel, const void*, dim3, dim3, void**, size_t, cudaStream_t)
NOTHING(cudaFuncSetAttribute, const void*, cudaFuncAttribute, int)
NOTHING(cudaProfilerStart)
NOTHING(cudaProfilerStop)
NOTHING(__cudaPushCallConfiguration, dim3, dim3, size_t, void*)
NOTHING(cudaMemPoolGetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
NOTHING(cudaMemPoolSetAttribute, cudaMemPool_t, cudaMemPoolAttr, void*)
NOTHING(cudaMemcpyToSymbol, const void*, const void*, size_t, size_t, cudaMemcpyKind)
NOTHING(__cudaLaunchKernel, void*, dim3, dim3, void**, size_t, cudaStream_t)
NOTHING(__cudaLaunchKernel_ptsz, void*, dim3, dim3, void**, size_t, cudaStream_t)

// cuBLAS. What is missing here, build.py adds: it returns 0.
extern "C" int cublasCreate_v2(void** handle) { *handle = malloc(64); return 0; }
extern "C" int cublasLtCreate(void** handle) { *handle = malloc(64); return 0; }
extern "C" int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
extern "C" int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
extern "C" int cublasGetVersion_v2(void*, int* version) { *version = 130100; return 0; }
extern "C" unsigned long cublasLtGetVersion() { return 130100; }
extern "C" unsigned long cublasLtGetCudartVersion() { return 13000; }
extern "C" int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  memset(found, 0, 64);
  *count = 1;
  return 0;
}
