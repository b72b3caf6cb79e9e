/* A stand-in for FlyDSL's GPU runtime (libfly_jit_runtime.so, the names of MLIR's GPU runtime
 * wrappers): modules and launches go to callbacks that Python installs; memory is host memory. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef void *(*LoadModule)(void *data, size_t size);
typedef void *(*GetFunction)(void *module, const char *name);
typedef void (*LaunchKernel)(void *function, const int64_t *sizes, int32_t shared, void **parameters);
static LoadModule load_module;
static GetFunction get_function;
static LaunchKernel launch_kernel;
void gcn_install(LoadModule l, GetFunction g, LaunchKernel k) { load_module = l; get_function = g; launch_kernel = k; }

void *mgpuModuleLoad(void *data, size_t size) { return load_module(data, size); }
void *mgpuModuleLoadJIT(void *data, int level, size_t size) { (void)level; return load_module(data, size); }
void mgpuModuleUnload(void *module) { (void)module; }
void *mgpuModuleGetFunction(void *module, const char *name) { return get_function(module, name); }
void mgpuLaunchKernel(void *function, intptr_t gx, intptr_t gy, intptr_t gz, intptr_t bx, intptr_t by, intptr_t bz,
                      int32_t shared, void *stream, void **parameters, void **extra, size_t count) {
  (void)stream; (void)extra; (void)count;
  int64_t sizes[6] = {gx, gy, gz, bx, by, bz};
  launch_kernel(function, sizes, shared, parameters); }
void mgpuLaunchClusterKernel(void *function, intptr_t cx, intptr_t cy, intptr_t cz, intptr_t gx, intptr_t gy, intptr_t gz,
                             intptr_t bx, intptr_t by, intptr_t bz, int32_t shared, void *stream, void **parameters,
                             void **extra, size_t count) {
  (void)cx; (void)cy; (void)cz;
  mgpuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra, count); }
void *mgpuStreamCreate(void) { return 0; }
void mgpuStreamDestroy(void *s) { (void)s; }
void mgpuStreamSynchronize(void *s) { (void)s; }
void mgpuStreamWaitEvent(void *s, void *e) { (void)s; (void)e; }
void *mgpuEventCreate(void) { return 0; }
void mgpuEventDestroy(void *e) { (void)e; }
void mgpuEventSynchronize(void *e) { (void)e; }
void mgpuEventRecord(void *e, void *s) { (void)e; (void)s; }
void *mgpuMemAlloc(uint64_t n, void *s, _Bool host) { (void)s; (void)host; return calloc(1, n); }
void mgpuMemFree(void *p, void *s) { (void)s; free(p); }
void mgpuMemcpy(void *to, void *from, size_t n, void *s) { (void)s; memcpy(to, from, n); }
void mgpuMemset32(void *p, int value, size_t n, void *s) { (void)s; for (size_t i = 0; i < n; i++) ((int *)p)[i] = value; }
void mgpuMemset16(void *p, int value, size_t n, void *s) { (void)s; for (size_t i = 0; i < n; i++) ((short *)p)[i] = (short)value; }
void mgpuSetDefaultDevice(int device) { (void)device; }
