/* A stand-in for libnvidia-ml.so.1, loaded by the real pynvml.

   The file named by $FAKE_NVML_STATE is read at every call, so a test changes the GPUs while a
   process runs. It holds lines of key=value; the keys of a GPU begin with its number, as in
   0.name=NVIDIA Thor. A key that is absent answers NVML_ERROR_NOT_SUPPORTED; a value of !N answers
   the NVML error N. Keys of the library itself:

     init=!9     nvmlInit fails so            hang=1     nvmlInit never returns
     fail=!15    every other call fails so    crash=1    nvmlInit kills the process

   As with the real library, an initialisation does not survive a fork. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SUCCESS = 0,
  UNINITIALIZED = 1,
  INVALID_ARGUMENT = 2,
  NOT_SUPPORTED = 3,
  INSUFFICIENT_SIZE = 7,
  DRIVER_NOT_LOADED = 9,
  GPU_IS_LOST = 15,
  RESET_REQUIRED = 16,
  LIB_RM_VERSION_MISMATCH = 18
};

typedef int result;
typedef struct device *device;
typedef struct {
  unsigned long long total, free, used;
} memory;
typedef struct {
  unsigned int gpu, memory;
} utilization;

typedef struct {
  unsigned int pid;
  unsigned long long used;
  unsigned int gpu_instance, compute_instance;
} process;

static pid_t initialised_in;

/* The value of a key, or the error that stands for it. */
static result look_up(const char *key, char *value, size_t size) {
  const char *path = getenv("FAKE_NVML_STATE");
  FILE *file = path ? fopen(path, "r") : NULL;
  if (!file) return NOT_SUPPORTED;
  char line[512];
  result answer = NOT_SUPPORTED;
  size_t length = strlen(key);
  while (fgets(line, sizeof line, file)) {
    if (strncmp(line, key, length) || line[length] != '=') continue;
    line[strcspn(line, "\n")] = 0;
    snprintf(value, size, "%s", line + length + 1);
    answer = *value == '!' ? atoi(value + 1) : SUCCESS;
  }
  fclose(file);
  return answer;
}

/* After these nothing but a new initialisation helps. */
static int is_final(result answer) {
  return answer == UNINITIALIZED || answer == DRIVER_NOT_LOADED || answer == GPU_IS_LOST ||
         answer == RESET_REQUIRED || answer == LIB_RM_VERSION_MISMATCH;
}

static result ready(void) {
  char value[512];
  result failure = look_up("fail", value, sizeof value);
  if (failure != SUCCESS && failure != NOT_SUPPORTED) return failure;
  return initialised_in == getpid() ? SUCCESS : UNINITIALIZED;
}

static result text(const char *key, char *out, unsigned int size) {
  char value[512];
  result answer = ready();
  if (answer == SUCCESS) answer = look_up(key, value, sizeof value);
  if (is_final(answer)) initialised_in = 0;
  if (answer != SUCCESS) return answer;
  if (strlen(value) + 1 > size) return INSUFFICIENT_SIZE;
  strcpy(out, value);
  return SUCCESS;
}

static result number(const char *key, unsigned long long *out) {
  char value[512];
  result answer = text(key, value, sizeof value);
  if (answer == SUCCESS) *out = strtoull(value, NULL, 10);
  return answer;
}

/* The same, of one GPU. */
static result number_of(device gpu, const char *key, unsigned long long *out) {
  char full[64];
  snprintf(full, sizeof full, "%d.%s", (int)(size_t)gpu - 1, key);
  return number(full, out);
}

static result unsigned_of(device gpu, const char *key, unsigned int *out) {
  unsigned long long value;
  result answer = number_of(gpu, key, &value);
  if (answer == SUCCESS) *out = (unsigned int)value;
  return answer;
}

result nvmlInitWithFlags(unsigned int flags) {
  char value[512];
  (void)flags;
  if (look_up("hang", value, sizeof value) == SUCCESS)
    for (;;) pause();
  if (look_up("crash", value, sizeof value) == SUCCESS) raise(SIGSEGV);
  result answer = look_up("init", value, sizeof value);
  if (answer != SUCCESS && answer != NOT_SUPPORTED) return answer;
  initialised_in = getpid();
  return SUCCESS;
}

result nvmlShutdown(void) {
  if (initialised_in != getpid()) return UNINITIALIZED;
  initialised_in = 0;
  return SUCCESS;
}

const char *nvmlErrorString(result error) { return error ? "an error of the stand-in" : "success"; }

result nvmlSystemGetDriverVersion(char *out, unsigned int size) { return text("driver", out, size); }

result nvmlSystemGetCudaDriverVersion(int *out) {
  unsigned long long value;
  result answer = number("cuda", &value);
  if (answer == SUCCESS) *out = (int)value;
  return answer;
}

result nvmlDeviceGetCount_v2(unsigned int *out) {
  unsigned long long value;
  result answer = number("count", &value);
  if (answer == SUCCESS) *out = (unsigned int)value;
  return answer;
}

result nvmlDeviceGetHandleByIndex_v2(unsigned int index, device *out) {
  unsigned int count;
  result answer = nvmlDeviceGetCount_v2(&count);
  if (answer != SUCCESS) return answer;
  if (index >= count) return INVALID_ARGUMENT;
  char key[64], value[512];
  snprintf(key, sizeof key, "%u.handle", index);
  answer = look_up(key, value, sizeof value);
  if (answer != SUCCESS && answer != NOT_SUPPORTED) return answer;
  *out = (device)(size_t)(index + 1);
  return SUCCESS;
}

result nvmlDeviceGetName(device gpu, char *out, unsigned int size) {
  char key[64];
  snprintf(key, sizeof key, "%d.name", (int)(size_t)gpu - 1);
  return text(key, out, size);
}

#ifndef OLD_DRIVER
result nvmlDeviceGetCudaComputeCapability(device gpu, int *major, int *minor) {
  unsigned long long value;
  result answer = number_of(gpu, "capability", &value); /* 87 is 8.7 */
  if (answer == SUCCESS) *major = (int)value / 10, *minor = (int)value % 10;
  return answer;
}
#endif

result nvmlDeviceGetMemoryInfo(device gpu, memory *out) {
  unsigned long long total, used;
  result answer = number_of(gpu, "memory_total", &total);
  if (answer == SUCCESS) answer = number_of(gpu, "memory_used", &used);
  if (answer == SUCCESS) *out = (memory){total, total - used, used};
  return answer;
}

result nvmlDeviceGetUtilizationRates(device gpu, utilization *out) {
  unsigned int value;
  result answer = unsigned_of(gpu, "utilisation", &value);
  if (answer == SUCCESS) *out = (utilization){value, 0};
  return answer;
}

result nvmlDeviceGetTemperature(device gpu, int sensor, unsigned int *out) {
  (void)sensor;
  return unsigned_of(gpu, "temperature_c", out);
}

result nvmlDeviceGetPowerUsage(device gpu, unsigned int *out) {
  return unsigned_of(gpu, "power_mw", out);
}

result nvmlDeviceGetClockInfo(device gpu, int clock, unsigned int *out) {
  (void)clock;
  return unsigned_of(gpu, "clock_mhz", out);
}

/* Of pid:bytes,pid:bytes; `none` for bytes: the driver does not tell. */
result nvmlDeviceGetComputeRunningProcesses_v3(device gpu, unsigned int *count, process *out) {
  char key[64], value[512];
  snprintf(key, sizeof key, "%d.processes", (int)(size_t)gpu - 1);
  result answer = text(key, value, sizeof value);
  if (answer != SUCCESS) return answer;
  unsigned int found = 0;
  for (char *rest = value, *entry; (entry = strtok_r(rest, ",", &rest));) {
    unsigned int pid = (unsigned int)strtoul(entry, &entry, 10);
    unsigned long long held = strcmp(entry, ":none") ? strtoull(entry + 1, NULL, 10) : ~0ull;
    if (found < *count) out[found] = (process){pid, held, ~0u, ~0u};
    found++;
  }
  answer = found > *count ? INSUFFICIENT_SIZE : SUCCESS;
  *count = found;
  return answer;
}

#ifndef OLD_DRIVER
result nvmlDeviceGetCurrentClocksEventReasons(device gpu, unsigned long long *out) {
  return number_of(gpu, "event_reasons", out);
}
#endif
