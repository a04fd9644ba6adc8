/* A CUDA driver without a GPU: memory is host memory, a stream runs at once, a graph is a list.
 *
 * Launches go to a function the test registers (fake_on_launch), which gets the kernel's name, the grid, and the
 * addresses of the arguments, as the driver would. What the GPU is comes from the environment, read at each call:
 * FAKE_CUDA_DRIVER (12080: entry points of later versions are not found), FAKE_CUDA_CAPABILITY (90), FAKE_CUDA_MEMORY (bytes), FAKE_CUDA_DEVICES (1),
 * FAKE_CUDA_INIT, FAKE_CUDA_CONTEXT, FAKE_CUDA_STREAM (the status of cuInit, of making a context, and a stream),
 * FAKE_CUDA_WITHOUT (an entry point that this driver lacks), FAKE_CUDA_FAULT (what all work reports after a kernel
 * failed). Calls not listed here succeed and do nothing.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default"))) int

enum { OUT_OF_MEMORY = 2, INVALID = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500, ELAPSED_NS = 1000000 };
enum { MODE_RUN = 0, MODE_STORE = 1, MODE_REPLAY = 2 };

typedef uint64_t ptr_t;
typedef int64_t (*launch_t)(int mode, int64_t id, const char *name, const unsigned *dims, void **params);
typedef struct { int kind; void *target; const void *source; size_t size; int64_t launch; } op_t;
typedef struct { int count; op_t ops[1 << 14]; } graph_t;
typedef struct { char name[256]; int shared; } kernel_t;

static launch_t on_launch;
static graph_t *capturing;
static int64_t in_use, peak, pinned, events;
static int64_t allocations[1 << 16][2];
static int handle;
static __thread void *current;

API fake_on_launch(launch_t f) { on_launch = f; return 0; }
API fake_memory(int64_t *used, int64_t *most) { *used = in_use; *most = peak; return 0; }
API fake_pinned(void) { return pinned; }
API fake_events(void) { return events; }

static long setting(const char *name, long otherwise) { const char *s = getenv(name); return s ? atol(s) : otherwise; }
static int64_t capacity(void) { return setting("FAKE_CUDA_MEMORY", 1l << 33); }

/* the device */
API cuInit(unsigned flags) { return setting("FAKE_CUDA_INIT", 0); }
API cuDriverGetVersion(int *v) { *v = setting("FAKE_CUDA_DRIVER", 12080); return 0; }
API cuDeviceGetCount(int *n) { *n = setting("FAKE_CUDA_DEVICES", 1); return 0; }
API cuDeviceGet(int *d, int i) { *d = i; return 0; }
API cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "Fake GPU"); return 0; }
API cuDeviceGetUuid_v2(char *u, int d) { memset(u, 7, 16); return 0; }
API cuDeviceTotalMem_v2(size_t *n, int d) { *n = capacity(); return 0; }
API cuDeviceGetAttribute(int *v, int attribute, int d) {
  long capability = setting("FAKE_CUDA_CAPABILITY", 90);
  switch (attribute) {
  case 75: *v = capability / 10; break;
  case 76: *v = capability % 10; break;
  case 97: *v = capability == 75 ? 65536 : 101376; break; /* shared memory a block may ask for */
  case 16: *v = 20; break;
  case 10: *v = 32; break;
  case 1: *v = 1024; break;
  default: *v = 1;
  }
  return 0;
}
API cuDevicePrimaryCtxRetain(void **c, int d) { *c = &handle; return setting("FAKE_CUDA_CONTEXT", 0); }
API fake_forget_context(void) { current = 0; return 0; }
API cuCtxGetCurrent(void **c) { *c = current; return 0; }
API cuCtxSetCurrent(void *c) { current = c; return 0; }
API cuCtxGetDevice(int *d) { *d = 0; return 0; }
API cuCtxGetDevice_v2(int *d, void *c) { *d = 0; return 0; }
API cuStreamGetCtx(void *s, void **c) { *c = &handle; return 0; }
API cuStreamCreate(void **s, unsigned f) { *s = &handle; return setting("FAKE_CUDA_STREAM", 0); }
API cuStreamCreateWithPriority(void **s, unsigned f, int p) { return cuStreamCreate(s, f); }
API cuEventCreate(void **e, unsigned f) { *e = &handle; events++; return 0; }
API cuEventDestroy_v2(void *e) { events--; return 0; }
API cuEventSynchronize(void *e) { return current ? 0 : INVALID_CONTEXT; }
API cuEventElapsedTime_v2(float *ms, void *a, void *b) { *ms = 1; return 0; }
API cuGetErrorName(int e, const char **s) { *s = "FAKE_ERROR"; return 0; }
API cuGetErrorString(int e, const char **s) { *s = "a fake error"; return 0; }

/* memory */
API cuMemGetInfo_v2(size_t *available, size_t *total) { *total = capacity(); *available = *total - in_use; return 0; }
API cuMemAlloc_v2(ptr_t *p, size_t n) {
  if (!current) return INVALID_CONTEXT;
  if (in_use + (int64_t)n > capacity()) return OUT_OF_MEMORY;
  for (int i = 0; i < 1 << 16; i++)
    if (!allocations[i][0]) {
      *p = (ptr_t)aligned_alloc(256, (n + 255) / 256 * 256);
      memset((void *)*p, 0xff, n); /* NaN: what is not written shows */
      allocations[i][0] = *p, allocations[i][1] = n;
      in_use += n;
      if (in_use > peak) peak = in_use;
      return 0;
    }
  return OUT_OF_MEMORY;
}
API cuStreamSynchronize(void *s) { return setting("FAKE_CUDA_FAULT", 0); }
API cuMemFree_v2(ptr_t p) {
  if (capturing) return 900; /* a capture is void then */
  if (setting("FAKE_CUDA_FAULT", 0)) return setting("FAKE_CUDA_FAULT", 0);
  for (int i = 0; i < 1 << 16; i++)
    if (allocations[i][0] == (int64_t)p) {
      in_use -= allocations[i][1];
      allocations[i][0] = 0;
      free((void *)p);
      return 0;
    }
  return INVALID;
}
API cuMemHostAlloc(void **p, size_t n, unsigned f) {
  *p = aligned_alloc(4096, (n + 4095) / 4096 * 4096);
  pinned++;
  return 0;
}
API cuMemFreeHost(void *p) {
  free(p);
  pinned--;
  return 0;
}

static int do_op(op_t *op) {
  if (op->kind == 0) memmove(op->target, op->source, op->size);
  if (op->kind == 1) memset(op->target, (int)(intptr_t)op->source, op->size);
  if (op->kind == 2) on_launch(MODE_REPLAY, op->launch, 0, 0, 0);
  return 0;
}
static int issue(op_t op) {
  if (!capturing) return do_op(&op);
  capturing->ops[capturing->count++] = op;
  return 0;
}
API cuMemcpyHtoDAsync_v2(ptr_t d, const void *s, size_t n, void *stream) { return issue((op_t){0, (void *)d, s, n, 0}); }
API cuMemcpyDtoHAsync_v2(void *d, ptr_t s, size_t n, void *stream) { return issue((op_t){0, d, (void *)s, n, 0}); }
API cuMemcpyDtoDAsync_v2(ptr_t d, ptr_t s, size_t n, void *stream) {
  return issue((op_t){0, (void *)d, (void *)s, n, 0});
}
API cuMemsetD8Async(ptr_t d, unsigned char v, size_t n, void *stream) {
  return issue((op_t){1, (void *)d, (void *)(intptr_t)v, n, 0});
}

/* kernels */
API cuLibraryLoadData(void **l, const void *code, void *a, void *b, unsigned c, void *d, void *e, unsigned n) {
  *l = &handle;
  return memcmp(code, "\177ELF", 4) && memcmp(code, "//", 2) ? 200 /* invalid image */ : 0;
}
API cuLibraryGetKernel(void **k, void *l, const char *name) {
  kernel_t *kernel = calloc(1, sizeof(kernel_t));
  strncpy(kernel->name, name, 255);
  *k = kernel;
  return 0;
}
API cuKernelGetFunction(void **f, void *k) { *f = k; return 0; }
API cuKernelGetLibrary(void **l, void *k) { *l = &handle; return 0; }
API cuKernelSetAttribute(int attribute, int value, void *k, int d) {
  if (attribute == 8) ((kernel_t *)k)->shared = value;
  return 0;
}
API cuKernelGetAttribute(int *v, int attribute, void *k, int d) { *v = attribute == 0 ? 1024 : 0; return 0; }

typedef struct { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; } config_t;

API cuLaunchKernelEx(const config_t *c, void *f, void **params, void **extra) {
  kernel_t *k = f;
  unsigned dims[] = {c->grid[0], c->grid[1], c->grid[2], c->block[0], c->block[1], c->block[2], c->shared};
  if (c->shared > 49152 && k->shared < (int)c->shared) return INVALID;
  if (!on_launch) return INVALID;
  if (!capturing) return on_launch(MODE_RUN, 0, k->name, dims, params) < 0 ? INVALID : 0;
  return issue((op_t){2, 0, 0, 0, on_launch(MODE_STORE, 0, k->name, dims, params)});
}
API cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **params, void **extra) {
  config_t c = {{gx, gy, gz}, {bx, by, bz}, shared, stream, 0, 0};
  return cuLaunchKernelEx(&c, f, params, extra);
}

/* graphs */
static void *captured;
API cuStreamIsCapturing(void *s, int *status) { *status = capturing != 0; return 0; }
API cuStreamBeginCapture_v2(void *s, int mode) { captured = capturing = calloc(1, sizeof(graph_t)); return 0; }
API cuStreamEndCapture(void *s, void **g) { *g = captured; capturing = 0; return 0; }
API cuGraphInstantiateWithParams(void **e, void *g, uint64_t *params) {
  *e = g;
  ((int *)params)[6] = 0; /* result_out, after the flags, the stream and the node */
  return 0;
}
API cuGraphInstantiateWithFlags(void **e, void *g, uint64_t flags) { *e = g; return 0; }
API cuGraphLaunch(graph_t *g, void *s) {
  for (int i = 0; i < g->count; i++) do_op(&g->ops[i]);
  return 0;
}
static int capture_info_2(void *s, int *status, uint64_t *id, void **g, void **deps, size_t *n) {
  *status = capturing != 0;
  if (id) *id = 1;
  if (g) *g = captured;
  if (deps) *deps = 0;
  if (n) *n = 0;
  return 0;
}
static int capture_info_3(void *s, int *status, uint64_t *id, void **g, void **deps, void **edges, size_t *n) {
  if (edges) *edges = 0;
  return capture_info_2(s, status, id, g, deps, n);
}

/* finding all this */
static int nothing(void) { return 0; }
API cuGetProcAddress_v2(const char *symbol, void **f, int version, uint64_t flags, int *status) {
  static const char *suffixes[] = {"_v2", ""};
  static void *self;
  char name[256];
  Dl_info info;
  if (!self && dladdr((void *)nothing, &info)) self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  *f = 0;
  const char *without = getenv("FAKE_CUDA_WITHOUT");
  if (version > setting("FAKE_CUDA_DRIVER", 12080) || (without && !strcmp(symbol, without))) {
    if (status) *status = 1; /* symbol not found: it came with a later driver */
    return NOT_FOUND;
  }
  if (!strcmp(symbol, "cuStreamGetCaptureInfo")) *f = version >= 12030 ? (void *)capture_info_3 : (void *)capture_info_2;
  for (int i = 0; i < 2 && !*f; i++) {
    snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
    *f = dlsym(self, name);
  }
  if (!*f && getenv("FAKE_CUDA_TRACE")) fprintf(stderr, "fake libcuda: nothing for %s\n", symbol);
  if (!*f) *f = (void *)nothing;
  if (status) *status = 0;
  return 0;
}
API cuGetProcAddress(const char *symbol, void **f, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, f, version, flags, 0);
}
