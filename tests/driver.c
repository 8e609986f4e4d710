/* A library that answers as NVIDIA's management library does on a machine with two GPUs, of which
   the second is in use, or whose driver fails (-DFAILS)
   or hangs (-DHANGS). For tests/test_preflight.py. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct memory { unsigned version; unsigned long long total, reserved, free, used; };
struct process { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; };

int nvmlInitWithFlags(unsigned flags) {
#ifdef HANGS
    for (;;) pause();
#endif
#ifdef FAILS
    return 9; /* the driver is not loaded */
#else
    return 0;
#endif
}

const char *nvmlErrorString(int status) { return "Driver Not Loaded"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **gpu) {
    *gpu = (void *)(unsigned long)(index + 1);
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **gpu) {
    *gpu = (void *)(unsigned long)(uuid[4] - '0');
    return 0;
}
int nvmlDeviceGetUUID(void *gpu, char *uuid, unsigned size) {
    snprintf(uuid, size, "GPU-%lu1111111-aaaa", (unsigned long)gpu);
    return 0;
}
int nvmlDeviceGetName(void *gpu, char *name, unsigned size) {
    snprintf(name, size, "NVIDIA H200");
    return 0;
}
int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    snprintf(version, size, "580.159.04");
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void *gpu, struct memory *memory) {
    memory->total = 143771ULL << 20;
    memory->used = (gpu == (void *)2 ? 20481ULL : 4ULL) << 20;
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *gpu, unsigned *count, struct process *found) {
    if (gpu != (void *)2) { *count = 0; return 0; }
    *count = 1;
    if (!found) return 7; /* there is no room for it */
    found->pid = 4711;
    return 0;
}
int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size) {
    snprintf(name, size, "python3");
    return 0;
}
