// A stand-in for libcuda with the functions that Triton calls. They check every launch and descriptor, and compute
// nothing. The environment variable STAND_IN_CAPABILITY has the compute capability of the GPU, such as "90".
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, DEFAULT_SHARED = 49152, THREADS = 1024 };

// The counts so far, which Python reads.
struct {
  int64_t launches, descriptors, illegal;
  char reason[256];  // why the last illegal launch or descriptor was illegal
} stand_in;

struct function {
  int shared_limit;  // dynamic, in bytes
  char name[];
};

static int capability(void) {
  const char* text = getenv("STAND_IN_CAPABILITY");
  return text ? atoi(text) : 90;
}

static int most_shared(void) {
  return capability() < 90 ? 166912 : 232448;
}

#define REQUIRE(condition, ...)                                                   \
  do {                                                                            \
    if (!(condition)) {                                                           \
      stand_in.illegal++;                                                         \
      snprintf(stand_in.reason, sizeof stand_in.reason, "illegal: " __VA_ARGS__); \
      return INVALID_VALUE;                                                       \
    }                                                                             \
  } while (0)

struct launch {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
};

int cuLaunchKernelEx(const struct launch* c, struct function* f, void** parameters, void** extra) {
  stand_in.launches++;
  for (int i = 0; i < 3; i++) {
    unsigned most = i ? 65535 : 2147483647;
    REQUIRE(c->grid[i] >= 1 && c->grid[i] <= most, "launch of %s, grid %c is %u, expected 1 to %u", f->name, 'x' + i,
            c->grid[i], most);
    REQUIRE(c->block[i] >= 1, "launch of %s, block %c is 0", f->name, 'x' + i);
  }
  uint64_t threads = (uint64_t)c->block[0] * c->block[1] * c->block[2];
  REQUIRE(threads <= THREADS && c->block[2] <= 64, "launch of %s, %llu threads, expected at most %d", f->name,
          (unsigned long long)threads, THREADS);
  REQUIRE(c->shared <= (unsigned)most_shared(), "launch of %s, %u bytes of shared memory, expected at most %d", f->name,
          c->shared, most_shared());
  REQUIRE(c->shared <= (unsigned)f->shared_limit,
          "launch of %s, %u bytes of shared memory, but its limit was set to %d", f->name, c->shared, f->shared_limit);
  return SUCCESS;
}

static const char* TYPE_BYTES = "\1\2\4\4\10\10\2\4\10\2\4\4\4";  // by CUtensorMapDataType

int cuTensorMapEncodeTiled(void* map, unsigned type, unsigned rank, void* base, const uint64_t* dims,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* steps, int interleave,
                           unsigned swizzle, int promotion, int fill) {
  stand_in.descriptors++;
  REQUIRE(capability() >= 90, "descriptor on compute capability %d, which has no tensor memory accelerator",
          capability());
  REQUIRE(type < strlen(TYPE_BYTES), "descriptor of type %u", type);
  REQUIRE(rank >= 1 && rank <= 5, "descriptor of rank %u, expected 1 to 5", rank);
  REQUIRE((uintptr_t)map % 64 == 0, "descriptor at %p, expected a multiple of 64 bytes", map);
  REQUIRE(base && (uintptr_t)base % 16 == 0, "descriptor of memory at %p, expected a multiple of 16 bytes", base);
  REQUIRE(interleave == 0 && swizzle <= 3, "descriptor interleaved by %d, swizzled by %u", interleave, swizzle);
  uint64_t row = TYPE_BYTES[type];
  for (unsigned i = 0; i < rank; i++) {
    REQUIRE(dims[i] >= 1 && dims[i] <= 1ull << 32, "descriptor of size %llu in dimension %u",
            (unsigned long long)dims[i], i);
    REQUIRE(box[i] >= 1 && box[i] <= 256, "descriptor with a box of %u in dimension %u, expected 1 to 256", box[i], i);
    REQUIRE(steps[i] >= 1 && steps[i] <= 8, "descriptor with steps of %u in dimension %u, expected 1 to 8", steps[i],
            i);
    row *= dims[i];
    if (i + 1 == rank) break;
    REQUIRE(strides[i] % 16 == 0 && strides[i] < 1ull << 40, "descriptor with a stride of %llu bytes",
            (unsigned long long)strides[i]);
    REQUIRE(strides[i] >= row, "descriptor with a stride of %llu bytes, less than the %llu between",
            (unsigned long long)strides[i], (unsigned long long)row);
    row = strides[i];
  }
  unsigned inner = box[0] * TYPE_BYTES[type], most = swizzle ? 16u << swizzle : 4096;
  REQUIRE(inner % 16 == 0 && inner <= most,
          "descriptor with a box %u bytes wide, expected a multiple of 16, at most %u", inner, most);
  return SUCCESS;
}

int cuFuncSetAttribute(struct function* f, int attribute, int value) {
  if (attribute != 8)
    return INVALID_VALUE;  // only the limit of dynamic shared memory can be set; Triton tries other attributes, too
  REQUIRE(value >= 0 && value <= most_shared(), "limit of shared memory of %s set to %d, expected at most %d", f->name,
          value, most_shared());
  f->shared_limit = value > DEFAULT_SHARED ? value : DEFAULT_SHARED;
  return SUCCESS;
}

int cuFuncGetAttribute(int* value, int attribute, struct function* f) {
  *value = attribute == 0 ? THREADS : attribute == 4 ? 64 : 0;  // 4: registers; static shared memory and spills are 0
  return SUCCESS;
}

int cuModuleGetFunction(struct function** f, void* module, const char* name) {
  *f = malloc(sizeof **f + strlen(name) + 1);
  (*f)->shared_limit = DEFAULT_SHARED;
  strcpy((*f)->name, name);
  return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case 8:
      *value = DEFAULT_SHARED;
      break;
    case 10:
      *value = 32;
      break;  // threads of a warp
    case 12:
      *value = 65536;
      break;  // registers
    case 13:
      *value = 1980000;
      break;  // clock, kHz
    case 16:
      *value = capability() < 90 ? 108 : capability() < 100 ? 132 : 148;
      break;
    case 36:
      *value = 3201000;
      break;  // the memory's clock, kHz
    case 37:
      *value = 5120;
      break;  // the width of the memory bus, bits
    case 75:
      *value = capability() / 10;
      break;
    case 76:
      *value = capability() % 10;
      break;
    case 81:
      *value = most_shared() + 1024;
      break;  // shared memory of a multiprocessor
    case 97:
      *value = most_shared();
      break;
    default:
      *value = 1;
  }
  return SUCCESS;
}

int cuGetErrorString(int error, const char** text) {
  *text = stand_in.reason;
  return SUCCESS;
}

// A host pointer serves as a device pointer.
int cuPointerGetAttribute(uint64_t* data, int attribute, uint64_t pointer) {
  *data = pointer;
  return SUCCESS;
}

static int handle(void** out) {
  *out = (void*)1;
  return SUCCESS;
}

static int number(int* out, int value) {
  *out = value;
  return SUCCESS;
}

int cuInit(unsigned flags) {
  return SUCCESS;
}
int cuDriverGetVersion(int* version) {
  return number(version, 13000);
}
int cuDeviceGetCount(int* count) {
  return number(count, 1);
}
int cuDeviceGet(int* device, int ordinal) {
  return number(device, ordinal);
}
int cuCtxGetCurrent(void** context) {
  return handle(context);
}
int cuCtxSetCurrent(void* context) {
  return SUCCESS;
}
int cuCtxGetDevice(int* device) {
  return number(device, 0);
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return handle(context);
}
int cuStreamIsCapturing(void* stream, int* status) {
  return number(status, 0);
}
int cuModuleLoadData(void** module, const void* image) {
  return handle(module);
}
int cuModuleUnload(void* module) {
  return SUCCESS;
}
int cuFuncSetCacheConfig(void* f, int config) {
  return SUCCESS;
}
int cuCtxGetLimit(size_t* value, int limit) {
  *value = 1 << 20;
  return SUCCESS;
}
int cuCtxSetLimit(int limit, size_t value) {
  return SUCCESS;
}
int cuOccupancyMaxActiveClusters(int* count, void* f, const void* config) {
  return number(count, 1);
}
